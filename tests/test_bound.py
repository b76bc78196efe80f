"""The bound that spares the exact evaluation most of its work: it must never lie below a share (algorithm's test: U >= s)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from onnxprune.contraction import Contraction
from onnxprune.criteria import bounded
from onnxprune.criteria.bounded import BoundedShares
from onnxprune.criteria.shares import Shares


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("per", [1, 2])
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_is_above_every_share(monkeypatch: pytest.MonkeyPatch, taps: int, per: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sparse = rng.random((5, 8, taps, taps)) < 0.6
    x = np.abs(rng.normal(size=(3, 8, 6, 6)) * 10.0 ** rng.uniform(-1, 1, (1, 8, 1, 1))).astype(np.float32)
    w = (rng.random((5, 8, taps, taps)) * sparse).astype(np.float32)
    c = Contraction(x, w, False, {"pads": [taps // 2] * 4}, np.arange(8))
    units = np.arange(8).reshape(8 // per, per)
    seen: list[tuple[Any, Any]] = []

    def spy(best: Any, pairs: Any, square: Any, top: Any) -> bool:
        seen.append((square, top))
        return True

    monkeypatch.setattr(bounded, "_raise", spy)
    BoundedShares().largest(c, units, np.zeros(len(units)))
    assert seen, "no bound was computed"
    exact, _ = Shares("sum").largest(c, units)
    bound = np.max([np.sqrt(square.max(axis=(0, 2))) * top for square, top in seen], axis=0)
    assert np.all(bound >= exact), "a bound below the exact share would lose it"
    live = exact > 0
    assert np.median(bound[live] / exact[live]) < 20, "a bound this loose would spare nothing"
    each = [exact_by_patch(c, units, n, p) for n in range(3) for p in range(36)]
    squares = np.concatenate([s for s, _ in seen]).reshape(3, len(units), 36)
    above = np.sqrt(squares.transpose(0, 2, 1).reshape(-1, len(units))) * seen[0][1]
    assert np.all(above >= np.array(each) * (1 - 1e-6))


def exact_by_patch(c: Contraction, units: Any, n: int, p: int) -> Any:
    """Largest share over the filters of every unit in one patch, in float64, from the definition."""
    k = c.w.shape[2]
    padded = np.pad(c.x[n].astype(np.float64), ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    y, z = divmod(p, 6)
    terms = np.einsum("ocij,cij->oc", c.w.astype(np.float64), padded[:, y : y + k, z : z + k])
    total = terms.sum(axis=1, keepdims=True)
    shares = np.divide(terms, total, out=np.zeros_like(terms), where=total > 0)
    return np.array([shares[:, u].sum(axis=1).max() for u in units])
