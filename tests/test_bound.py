"""The bound that spares the exact evaluation most of its work, and the mode that hands it out: never below a share.

Also what the compiled loops promise beside the numbers: the same bytes whatever the number of threads, and no need to write.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import pytest

from onnxprune.contraction import Contraction
from onnxprune.criteria import compiled, pfp
from onnxprune.criteria.fast import FastShares
from onnxprune.criteria.pfp import TOLERANCE
from onnxprune.criteria.shares import Shares

Array = np.ndarray[Any, Any]


def heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Values of rather different size, a few of them zero."""
    return (rng.lognormal(0, 0.7, shape) * (rng.random(shape) < 0.95)).astype(np.float32)


def signs(shape: tuple[int, ...], cycle: list[int]) -> Array:
    """Signs along axis 1, so that no sign part of a sum has a single term: its share would be 1."""
    return np.resize(cycle, shape[1]).astype(np.float32).reshape(1, -1, *[1] * (len(shape) - 2))


def conv(
    rng: np.random.Generator, channels: int, filters: int, taps: tuple[int, ...], signed: bool, **more: Any
) -> Contraction:
    x, w = heavy(rng, (3, channels, *(9 for _ in taps))), heavy(rng, (filters, channels, *taps))
    w = w * signs(w.shape, [1, 1, 1, 1, -1, -1, -1, -1])
    transposed = more.pop("transposed", False)
    w = np.swapaxes(w, 0, 1) if transposed else w
    return Contraction(x * signs(x.shape, [1, 1, -1, -1]) if signed else x, w, transposed, more, np.arange(channels))


CASES: dict[str, Callable[[np.random.Generator], Contraction]] = {
    "1x1": lambda rng: conv(rng, 64, 30, (1, 1), False),
    "1x1 signed": lambda rng: conv(rng, 67, 9, (1, 1), True),
    "rows": lambda rng: Contraction(heavy(rng, (40, 24, 1)), heavy(rng, (50, 24, 1)), False, {}, np.arange(24)),
    "3x3": lambda rng: conv(rng, 10, 16, (3, 3), False, pads=[1, 1, 1, 1]),
    "3x3 strided": lambda rng: conv(rng, 16, 16, (3, 3), True, strides=[2, 2]),
    "5": lambda rng: conv(rng, 16, 12, (5,), True, dilations=[2], pads=[4, 4]),
    "transposed": lambda rng: conv(rng, 24, 12, (3, 3), False, transposed=True, strides=[2, 2]),
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_bounds_lie_between_the_exact_sensitivities_and_little_more(name: str, seed: int, together: bool) -> None:
    c = CASES[name](np.random.default_rng(seed))
    count = len(c.positions)
    units, nothing = np.arange(count)[:, None], np.zeros(count)
    exact, live = FastShares(together).largest(c, units, nothing)
    plain, parts = Shares("sum" if together else "max").largest(c, units, nothing)
    np.testing.assert_allclose(exact, plain, rtol=1e-5)
    most = 1.01 if c.w[0, 0].size == 1 or not together else 1 + TOLERANCE + 1e-5
    bound, found = FastShares(together, TOLERANCE).largest(c, units, nothing)
    assert live == parts == found
    assert (bound >= plain * (1 - 1e-6)).all() and (bound <= plain * most).all() and bound.max() <= 1
    assert (bound > exact).any()


def test_logarithms_are_as_close_as_the_margins_take_for_granted() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([np.exp2(rng.uniform(-126, 127, 20000)), np.linspace(1, 2, 20001)]).astype(np.float32)
    found = np.array([compiled._log2(v) for v in x])
    assert np.abs(found - np.log2(x.astype(np.float64))).max() <= compiled.ERROR
    faint = np.array([1e-45, 1e-41, 1e-38], np.float32)
    assert all(compiled._log2(v) >= np.log2(np.float64(v)) for v in faint)
    assert compiled.ERROR * 3 < compiled.SLACK and np.iinfo(np.int16).min <= compiled.DEAD + compiled.LIGHT


@pytest.mark.parametrize("terms", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_is_above_every_share(terms: int, seed: int) -> None:
    """Every unit and column by itself, with two sign parts, dead denominators and samples of other magnitude."""
    rng = np.random.default_rng(seed)
    units, rows, columns, positive = 6, 13, 50, 8
    w, x = np.abs(heavy(rng, (units * terms, rows))), np.abs(heavy(rng, (units * terms, columns)))
    x = (x * np.exp2(rng.integers(-8, 8, columns))).astype(np.float32)
    z = w.T @ x
    peak = np.stack([z[:positive].max(axis=0), z[positive:].max(axis=0)]) * rng.uniform(1, 100, columns)
    floor = np.ascontiguousarray(peak * 1e-3, np.float32)
    scale = np.log2(np.maximum(peak.min(axis=0), 1e-9)).astype(np.float32)
    owned = np.arange(units * terms, dtype=np.int32).reshape(units, terms)
    order, light = np.empty((units, 16), np.int32), np.empty((units, 16), np.int16)
    count, top = np.empty(units, np.int32), np.empty(units, np.float32)
    compiled.norms(w, owned, order, light, count, top, 0, units)
    logarithms, best = np.empty((rows, 64), np.int16), np.empty(64, np.int16)
    compiled._reciprocals(z, positive, floor, scale, 0, columns, logarithms)
    limit = np.repeat(floor, [positive, rows - positive], axis=0)
    inverse = np.where(z > limit, 1 / np.maximum(z, 1e-30), 0)
    ratios = []
    for u in range(units):
        if count[u] == 0:
            continue
        compiled._peaks(logarithms, order[u], light[u], count[u], best)
        bound, energy, active = (np.empty(64, np.float32) for _ in range(3))
        compiled._bounds(x, owned[u], 0, columns, best, scale, top[u], energy, active, bound)
        share = (np.einsum("kr,kq->rq", w[owned[u]].astype(np.float64), x[owned[u]]) * inverse).max(axis=0)
        assert (np.exp2(bound[:columns].astype(np.float64) + compiled.SLACK) >= share).all()
        live = share > 1e-6
        ratios.append(np.exp2(bound[:columns][live]) / share[live])
    ratio = np.concatenate(ratios)
    assert np.median(ratio) < (1.01 if terms == 1 else 3), "a bound this loose would spare nothing"


def test_slow_compiling_is_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(pfp.Sensitivity):
        @property
        def engine(self) -> Any:  # type: ignore[override]
            time.sleep(0.2)
            return None

    for after, want in ((0.01, [0, 1]), (5.0, [])):
        monkeypatch.setattr(pfp, "NOTICE", after)
        told: list[int] = []
        Slow().prepare(told.append)
        assert told == want


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("name", ["1x1 signed", "3x3"])
def test_threads_do_not_matter(name: str, tolerance: float, monkeypatch: pytest.MonkeyPatch) -> None:
    c = CASES[name](np.random.default_rng(5))
    units, nothing = np.arange(len(c.positions))[:, None], np.zeros(len(c.positions))
    found = []
    for threads in ("1", "2", "5"):
        monkeypatch.setenv("ONNXPRUNE_THREADS", threads)
        found.append(FastShares(True, tolerance).largest(c, units, nothing)[0].tobytes())
    assert len(set(found)) == 1


def test_an_installation_that_cannot_be_written_compiles_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = numba.njit, []

    def refusing(*args: Any, cache: bool = False, **options: Any) -> Any:
        asked.append(cache)
        if cache:
            raise RuntimeError("cannot cache function 'twice': no locator available for file 'x.py'")
        return plain(*args, **options)

    monkeypatch.setattr(numba, "njit", refusing)

    def twice(v: Any) -> None:
        v[:] = 2 * v

    v = np.ones(3, np.float32)
    compiled.compiled("void(f4[::1])")(twice)(v)
    assert asked == [True, False] and v.tolist() == [2, 2, 2]
