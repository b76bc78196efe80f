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
from onnxprune.criteria import compiled, jit, pfp
from onnxprune.criteria.fast import FastShares, _pieces, _sign_parts
from onnxprune.criteria.lanes import peaks
from onnxprune.criteria.pfp import SINGLE, TOLERANCE
from onnxprune.criteria.shares import Shares
from onnxprune.windows import geometry

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
    most = (1 + SINGLE if c.w[0, 0].size == 1 or not together else 1 + TOLERANCE) + 1e-5
    bound, found = FastShares(together, TOLERANCE, SINGLE).largest(c, units, nothing)
    assert live == parts == found
    assert (bound >= plain * (1 - 1e-6)).all() and (bound <= plain * most).all() and bound.max() <= 1
    assert (bound > exact).any()


def test_logarithms_are_as_close_as_the_margins_take_for_granted() -> None:
    rng = np.random.default_rng(0)
    x = np.concatenate([np.exp2(rng.uniform(-126, 127, 20000)), np.linspace(1, 2, 20001)]).astype(np.float32)
    found = np.array([jit.log2(v) for v in x])
    assert np.abs(found - np.log2(x.astype(np.float64))).max() <= jit.ERROR
    faint = np.array([1e-45, 1e-41, 1e-38], np.float32)
    assert all(jit.log2(v) >= np.log2(np.float64(v)) for v in faint)
    assert np.iinfo(np.int16).min <= jit.DEAD + jit.ABSENT + jit.FAINT
    assert np.iinfo(np.int16).max >= jit.UNKNOWN + 2 * 20 * jit.STEPS, "norms of units of 2^26 terms"
    assert jit.DEAD + 2 * 8 * jit.STEPS < jit.LOWEST < 2 * jit.FAINT - 31 * jit.STEPS


@numba.njit
def peaks_of(r: Any, order: Any, light: Any, count: Any, out: Any) -> None:
    peaks(r, order, light, count, np.int16(-20000), out)


@pytest.mark.parametrize("columns", [32, 96, 128, 160, 256, 416])
@pytest.mark.parametrize("count", [0, 1, 7, 20])
def test_peaks_of_all_columns(columns: int, count: int) -> None:
    rng = np.random.default_rng(columns + count)
    r, light = (rng.integers(-15000, 15000, size).astype(np.int16) for size in ((20, columns), 21))
    order, out = rng.permutation(20).astype(np.uint32), np.zeros(columns, np.int16)
    peaks_of(r, order, light, count, out)
    sums = r[order[:count]].astype(int) + light[:count, None]
    np.testing.assert_array_equal(out, np.maximum(sums.max(axis=0, initial=-20000), -20000).astype(np.int16))


@pytest.mark.parametrize("terms", [1, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_bound_is_above_every_share(terms: int, seed: int) -> None:
    """Every unit and column by itself: integers never above the numbers, norms never below, some columns dead or tiny."""
    rng = np.random.default_rng(seed)
    units, filters, columns = 6, 7, 50
    w, x = heavy(rng, (filters, units * terms)), heavy(rng, (1, units * terms, columns))
    w *= signs(w.shape, [1, -1, -1])
    x = (x * np.exp2(rng.integers(-8, 8, columns))).astype(np.float32)
    x[..., 7], x[0, 3:, 8] = 0, 0
    owned = np.arange(units * terms, dtype=np.uint32).reshape(units, terms)
    fast = FastShares()
    weights = fast._split(w, owned)
    v = np.maximum(weights.w[weights.filters] * weights.factors[:, None], 0).astype(np.float64)  # [R, K]
    (part,) = _sign_parts(x, geometry((columns,), (1,), {}))
    made = fast._multiplied(_pieces(part)[0], part, fast._most(part), weights)
    z = v @ x[0]
    lower = made.z * weights.height[:, None].astype(np.float64) * made.top
    assert (lower <= z * (1 + 1e-6)).all() and np.median(lower[z > 0] / z[z > 0]) > 0.9
    logarithms, peak, bound = np.empty((len(z), 64), np.int16), np.empty(64, np.int16), np.empty(columns, np.int16)
    compiled._reciprocals(made.z, 0, columns, logarithms)
    ratios = []
    for u in range(units):
        peaks_of(logarithms, weights.order[u], weights.light[u], weights.count[u], peak)
        compiled._bounds(peak[:columns], made.energy[u], bound)
        share = (v[:, owned[u]] @ x[0, owned[u]] / np.where(z > 0, z, np.inf)).max(axis=0)
        found = np.exp2(bound / jit.STEPS)
        assert (found[share > 0] >= share[share > 0]).all()
        ratios.append((found / np.maximum(share, 1e-9))[share > 1e-2])
    assert np.median(np.concatenate(ratios)) < (1.2 if terms == 1 else 3), "a bound this loose would spare nothing"


def test_sums_of_integers_fit_32_bits() -> None:
    """More terms than products of two numbers of 7 bits may be added of: then the weights have fewer levels."""
    count = 300_000
    x, w = np.ones((1, count, 1), np.float32), np.ones((2, count, 1), np.float32)
    w[1, 0] = 3
    units = np.arange(count)[:2, None]
    found, _ = FastShares().largest(Contraction(x, w, False, {}, np.arange(count)), units, np.zeros(2))
    np.testing.assert_allclose(found, [3 / (count + 2), 1 / count], rtol=1e-5)


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
        found.append(FastShares(True, tolerance, tolerance).largest(c, units, nothing)[0].tobytes())
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
