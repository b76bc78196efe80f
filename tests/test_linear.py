"""Linear operators as matrix products over rows, against ONNX Runtime; least squares against NumPy's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune import runtime
from onnxprune.recovery import leastsq, ridge
from onnxprune.recovery.leastsq import Gram, Moments, Sums, System, solve
from onnxprune.recovery.linear import Linear
from onnxprune.recovery.ridge import best_ridge
from onnxprune.recovery.targets import spread

Array = np.ndarray[Any, Any]
CASES: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "pointwise": ("Conv", (2, 3, 5, 5), (4, 3, 1, 1), {}),
    "padded": ("Conv", (2, 3, 6, 7), (4, 3, 3, 3), {"pads": [1, 2, 0, 1]}),
    "strided and dilated": ("Conv", (2, 4, 9, 8), (6, 4, 3, 2), {"strides": [2, 3], "dilations": [2, 1], "pads": [2, 0, 1, 1]}),
    "grouped": ("Conv", (2, 6, 5, 5), (4, 3, 3, 3), {"group": 2, "pads": [1, 1, 1, 1]}),
    "depthwise": ("Conv", (2, 4, 5, 5), (8, 1, 3, 3), {"group": 4, "strides": [2, 2]}),
    "same upper": ("Conv", (1, 2, 6, 5), (3, 2, 3, 2), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    "same lower": ("Conv", (1, 2, 6, 5), (3, 2, 3, 2), {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    "valid": ("Conv", (1, 2, 6, 5), (3, 2, 3, 2), {"auto_pad": "VALID"}),
    "one axis": ("Conv", (2, 3, 9), (4, 3, 4), {"strides": [2]}),
    "three axes": ("Conv", (1, 2, 4, 5, 3), (3, 2, 2, 3, 2), {"pads": [1, 0, 1, 0, 1, 0]}),
    "transposed": ("ConvTranspose", (2, 3, 4, 5), (3, 4, 3, 3), {"strides": [2, 2], "pads": [1, 0, 1, 1]}),
    "transposed, grouped": ("ConvTranspose", (2, 4, 4, 4), (4, 3, 2, 2), {"group": 2, "strides": [2, 1], "dilations": [1, 2]}),
    "transposed, more": ("ConvTranspose", (1, 2, 4, 4), (2, 3, 3, 3), {"strides": [3, 3], "output_padding": [1, 2]}),
    "transposed, same": ("ConvTranspose", (1, 2, 4, 5), (2, 3, 3, 2), {"strides": [2, 2], "auto_pad": b"SAME_UPPER"}),
    "transposed, shaped": ("ConvTranspose", (1, 2, 4, 4), (2, 3, 3, 3), {"strides": [2, 2], "output_shape": [9, 8]}),
    "transposed, one axis": ("ConvTranspose", (2, 3, 5), (3, 4, 4), {"strides": [3], "dilations": [2], "pads": [2, 1]}),
    "gemm": ("Gemm", (5, 6), (6, 4), {}),
    "gemm with transB and alpha": ("Gemm", (5, 6), (4, 6), {"transB": 1, "alpha": 0.5}),
    "matmul": ("MatMul", (2, 3, 5, 6), (6, 4), {}),
}


def made(op: str, x: Array, w: Array, attributes: dict[str, Any]) -> Array:
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))]
    graph = helper.make_graph([node], "g", inputs, [onnx.ValueInfoProto(name="y")], [numpy_helper.from_array(w, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return runtime.run(runtime.session(model, threads=1), {"x": x})[0]


@pytest.mark.parametrize("name", CASES)
def test_rows_times_matrix_is_the_operator(name: str) -> None:
    op, xs, ws, attributes = CASES[name]
    rng = np.random.default_rng(3)
    x, w = rng.standard_normal(xs).astype(np.float32), rng.standard_normal(ws).astype(np.float32)
    y = made(op, x, w, attributes)
    linear = Linear(op, ws, attributes)
    assert linear.understood
    rows = (y.shape[0], *y.shape[2:]) if linear.convolution else y.shape[:-1]
    if linear.convolution:
        assert linear.space(x.shape[2:]) == y.shape[2:]
    picks = spread(int(np.prod(rows)), 17, rng)
    product = linear.inputs(x, picks, rows) @ linear.matrix(w)
    assert linear.outs == product.shape[0] * product.shape[2]
    there = linear.outputs(y, picks)
    np.testing.assert_allclose(product.transpose(1, 0, 2).reshape(there.shape), there, atol=2e-5)
    np.testing.assert_array_equal(linear.weight(linear.matrix(w)).astype(np.float32), w)


@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [
        ("Gemm", (4, 6), {"transA": 1}),
        ("Gemm", (4, 6), {"alpha": 0.0}),
        ("MatMul", (2, 4, 6), {}),
    ],
)
def test_what_is_not_understood_says_so(op: str, shape: tuple[int, ...], attributes: dict[str, Any]) -> None:
    assert not Linear(op, shape, attributes).understood


def test_rows_are_spread_over_all() -> None:
    rng = np.random.default_rng(0)
    assert spread(5, 9, rng).tolist() == [0, 1, 2, 3, 4]
    picks = spread(1000, 10, rng)
    assert picks.shape == (10,)
    assert [p // 100 for p in picks] == list(range(10))


# -------------------------------------------------------------------------------------------------- least squares


def rows(seed: int, n: int, d: int = 5, o: int = 3, noise: float = 0.1) -> tuple[Array, Array, Array]:
    rng = np.random.default_rng(seed)
    x, w = rng.standard_normal((2, n, d)) + 1.5, np.random.default_rng(99).standard_normal((2, d, o))
    return x, x @ w + 0.7 + noise * rng.standard_normal((2, n, o)), w


def moments(x: Array, t: Array, pieces: int = 3) -> Moments:
    found = Sums(len(x), x.shape[2], t.shape[2])
    for part in np.array_split(np.arange(x.shape[1]), pieces):
        found.add(x[:, part], t[:, part])
    return found.moments()


def test_solution_is_that_of_numpy_with_an_intercept() -> None:
    x, t, _ = rows(0, 40)
    found = moments(x, t).centred()
    w = solve(found, np.zeros((2, 5, 3)), 0.0)
    for g in range(2):
        full = np.linalg.lstsq(np.hstack([x[g], np.ones((40, 1))]), t[g], rcond=None)[0]
        np.testing.assert_allclose(w[g], full[:-1], atol=1e-10)
    centred = (x - x.mean(1, keepdims=True)), (t - t.mean(1, keepdims=True))
    assert found.error(w) == pytest.approx(float(((centred[1] - centred[0] @ w) ** 2).sum()), rel=1e-9)


def test_ridge_is_on_the_change() -> None:
    x, t, _ = rows(1, 30)
    start = np.random.default_rng(5).standard_normal((2, 5, 3))
    found, strength = moments(x, t), 0.3
    w = solve(found, start, strength)
    for g in range(2):
        scale = strength * np.trace(x[g].T @ x[g]) / 5
        stacked = np.vstack([x[g], np.sqrt(scale) * np.eye(5)]), np.vstack([t[g], np.sqrt(scale) * start[g]])
        np.testing.assert_allclose(w[g], np.linalg.lstsq(*stacked, rcond=None)[0], atol=1e-10)
    np.testing.assert_allclose(solve(found, start, 1e9), start, atol=1e-6)


def test_large_systems_are_factorised_once_for_all_targets() -> None:
    x, t, _ = rows(7, 300, d=70)
    found, other = moments(x, t), moments(x, 2 * t + 1)
    start = np.random.default_rng(5).standard_normal((2, 70, 3))
    system = System(found, start, 0.01)
    matrix = found.xx + 0.01 * np.einsum("gii->gi", found.xx).mean(1)[:, None, None] * np.eye(70)
    for m in (found, other):
        expected = start + np.linalg.solve(matrix, m.xt - m.xx @ start)
        np.testing.assert_allclose(system.solve(m.xt), expected, rtol=1e-8, atol=1e-10)


def test_moments_add_up_and_take_new_targets() -> None:
    x, t, _ = rows(2, 20)
    whole, first, second = moments(x, t), moments(x[:, :8], t[:, :8]), moments(x[:, 8:], t[:, 8:])
    both = first.plus(second)
    for name in ("count", "xx", "xt", "tt", "x", "t"):
        np.testing.assert_allclose(getattr(both, name), getattr(whole, name), rtol=1e-12)
    again = whole.without_targets()
    again.add_targets(x, 2 * t)
    np.testing.assert_allclose(again.xt, 2 * whole.xt)
    np.testing.assert_allclose(again.tt, 4 * whole.tt)
    assert again.count == whole.count


def test_the_ridge_is_what_held_out_rows_like_best() -> None:
    x, t, w = rows(3, 8, d=7, noise=2.0)
    held = moments(*rows(4, 400, d=7, noise=2.0)[:2])
    train = moments(x, t)
    start = w + 0.05
    found = best_ridge(train.centred(), held.centred(train), start)
    assert found is None or found >= 1e-2  # eight noisy rows say little about seven weights that are nearly right
    clean = best_ridge(
        moments(*rows(5, 400, noise=0)[:2]).centred(), moments(*rows(6, 50, noise=0)[:2]).centred(), rows(0, 1)[2] + 1
    )
    assert clean is not None and clean <= 1e-4


def test_many_outputs_are_mixed_and_give_the_same_ridge(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mixture with random signs keeps squares on average; how errors differ between ridges it shows as well."""
    monkeypatch.setattr(ridge, "FEWER", 20)
    train, held = (moments(*rows(seed, n, d=30, o=200, noise=3.0)[:2]) for seed, n in ((8, 60), (9, 400)))
    start = rows(0, 1, d=30, o=200)[2] + 0.3
    mixed, single = ridge._Search(train, held, start), best_ridge(train, held, start)
    assert mixed.right.shape == (2, 30, ridge.MIXED)
    monkeypatch.setattr(ridge, "MIXED", 200)
    every = ridge._Search(train, held, start)
    assert every.right.shape == (2, 30, 200)
    for r in (1e-4, 1e-2, 1.0):
        assert mixed.error(r) == pytest.approx(every.error(r), rel=0.1)
        exact = held.error(solve(train, start, r)) - held.error(start)
        assert every.error(r) == pytest.approx(exact, rel=1e-3)
    assert best_ridge(train, held, start) == single


def test_wide_systems_are_solved_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    train, held = (moments(*rows(seed, n, d=80)[:2]) for seed, n in ((8, 300), (9, 400)))
    start = np.random.default_rng(5).standard_normal((2, 80, 3))
    exact, error = System(train, start, 0.01).solve(train.xt), ridge._Search(train, held, start).error(0.01)
    precise = System(train, start, 1e-5).solve(train.xt)
    for module in (leastsq, ridge):
        monkeypatch.setattr(module, "FEWER", 70)
    wide = System(train, start, 0.01)
    assert wide.made.dtype == np.float32
    np.testing.assert_allclose(wide.solve(train.xt), exact, atol=1e-4 * np.abs(exact).max())  # of numbers of condition 1e3
    assert ridge._Search(train, held, start).error(0.01) == pytest.approx(error, rel=1e-4)
    np.testing.assert_array_equal(System(train, start, 1e-5).solve(train.xt), precise)  # too small a ridge for that


def test_means_are_taken_in_place_where_that_is_asked_for() -> None:
    x, t, _ = rows(2, 20)
    first, second = moments(x, t), moments(x, t)
    expected, before = first.centred(), first.xx.copy()
    np.testing.assert_array_equal(first.xx, before)
    found = second.centred(second, overwrite=True)
    assert found.xx is second.xx
    np.testing.assert_array_equal(found.xx, expected.xx)
    np.testing.assert_array_equal(found.xt, expected.xt)


def test_wide_sums_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    """One triangle only is added up, rows together once there are enough of them."""
    x = np.random.default_rng(0).standard_normal((1, 90, 300)).astype(np.float32)
    whole = x[0].T.astype(np.float64) @ x[0]
    monkeypatch.setattr(leastsq, "CHUNK", 40)
    gram = Gram(1, 300)
    for part in np.array_split(x, 5, axis=1):
        gram.add(part)
    np.testing.assert_allclose(gram.xx[0], whole, atol=1e-4)
    np.testing.assert_allclose(gram.centred()[0], np.cov(x[0].T, bias=True) * 90, atol=1e-4)
    assert gram.few() is None
    few = Gram(1, 300)
    few.add(x[:, :20])
    kept = few.few()
    assert kept is not None
    np.testing.assert_allclose(kept[0], x[0, :20] - x[0, :20].mean(0, dtype=np.float64), atol=1e-12)
    np.testing.assert_allclose(kept[0].T @ kept[0], few.centred()[0], atol=1e-4)
