"""Sensitivities of every kind of layer against a brute-force reference in float64."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import nets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import CONVS, EACH_AND_BOUNDS, TRANSPOSED, WITH_BOUNDS, check, conv_case, draw, rows_case, score, weigh

from onnxprune import runtime


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sessions as small as these spend most of their time on starting and stopping threads."""
    with mock.patch.object(runtime, "session", functools.partial(runtime.session, threads=1)):
        yield


@EACH_AND_BOUNDS
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_equal_brute_force(name: str, kernel: str) -> None:
    check(conv_case(np.random.default_rng(1), **CONVS[name]), kernel)


@EACH_AND_BOUNDS
@pytest.mark.parametrize("name", TRANSPOSED)
def test_transposed_convolutions_equal_brute_force(name: str, kernel: str) -> None:
    check(conv_case(np.random.default_rng(2), transposed=True, **TRANSPOSED[name]), kernel)


@st.composite
def conv_options(draw_: st.DrawFn) -> dict[str, Any]:
    rank = draw_(st.integers(1, 2))
    each = st.integers(1, 3)
    taps, spread, strides = ([draw_(each) for _ in range(rank)] for _ in range(3))
    attributes: dict[str, Any] = {"strides": strides, "dilations": spread}
    if draw_(st.booleans()):
        attributes["pads"] = [draw_(st.integers(0, 2)) for _ in range(2 * rank)]
    space = [(k - 1) * d + draw_(st.integers(1, 3)) for k, d in zip(taps, spread, strict=True)]
    groups = draw_(st.integers(1, 2))
    options = {"channels": groups * 8, "filters": groups * draw_(st.integers(1, 3)), "groups": groups}
    return {"space": space, "taps": taps, "attributes": attributes, "signed": draw_(st.booleans()), **options}


@settings(max_examples=30, deadline=None, derandomize=True)
@given(conv_options(), st.sampled_from(WITH_BOUNDS), st.integers(0, 99))
def test_any_convolution_equals_brute_force(options: dict[str, Any], kernel: str, seed: int) -> None:
    check(conv_case(np.random.default_rng(seed), **options), kernel)


# ---- matrix products


GEMMS = {
    "plain": {},
    "transB": {"transB": 1},
    "alpha": {"alpha": 0.25, "beta": 3.0, "transB": 1},
    "negative alpha": {"alpha": -2.0, "beta": 0.0},
}


@EACH_AND_BOUNDS
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", GEMMS)
def test_gemm(name: str, signed: bool, kernel: str) -> None:
    rng = np.random.default_rng(3)
    x, w = draw(rng, (4, 16), signed), weigh(rng, (5, 16))
    attributes = GEMMS[name]
    weights = {"unit": np.eye(16), "w": w if "transB" in attributes else w.T, "b": rng.standard_normal(5)}
    nodes = [("MatMul", "in unit", "a"), ("Gemm", "a w b", "out", attributes)]
    net = nets.model(nodes, {"in": ["N", 16]}, "out", weights)
    check(rows_case(net, x, x, w * attributes.get("alpha", 1.0)), kernel)


def test_gemm_of_no_weight_is_dead() -> None:
    """alpha = 0: whatever the layer reads, it makes nothing of it."""
    rng = np.random.default_rng(3)
    nodes = [("MatMul", "in unit", "a"), ("Gemm", "a w", "out", {"alpha": 0.0})]
    net = nets.model(nodes, {"in": ["N", 16]}, "out", {"unit": np.eye(16), "w": rng.standard_normal((16, 5))})
    (found,) = score(net, draw(rng, (4, 16), True)).layers
    np.testing.assert_array_equal(found.values, np.zeros(16))


@EACH_AND_BOUNDS
@pytest.mark.parametrize("attributes", [{}, {"transA": 1}, {"transB": 1}, {"transA": 1, "transB": 1}])
def test_gemm_with_its_weight_on_the_left(attributes: dict[str, int], kernel: str) -> None:
    rng = np.random.default_rng(4)
    x, w = draw(rng, (4, 16), True), weigh(rng, (5, 16))
    weights = {"unit": np.eye(16), "w": w.T if "transA" in attributes else w}
    # With transB the activations come as [N, C], otherwise they are transposed to [C, N].
    nodes: list[nets.Node] = [("MatMul", "in unit", "a")]
    if "transB" not in attributes:
        nodes.append(("Transpose", "a", "t", {"perm": [1, 0]}))
    nodes.append(("Gemm", f"w {'a' if 'transB' in attributes else 't'}", "out", attributes))
    check(rows_case(nets.model(nodes, {"in": ["N", 16]}, "out", weights), x, x, w), kernel)


@EACH_AND_BOUNDS
@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_of_transposed_activations(transposed: bool, kernel: str) -> None:
    rng = np.random.default_rng(5)
    x, w = draw(rng, (4, 16), True), weigh(rng, (5, 16))
    nodes = [
        ("Gemm", "unit in", "a", {"transB": 1}),  # [C, N]
        ("Gemm", "a w", "out", {"transA": 1, **({"transB": 1} if transposed else {})}),
    ]
    net = nets.model(nodes, {"in": ["N", 16]}, "out", {"unit": np.eye(16), "w": w if transposed else w.T})
    check(rows_case(net, x, x, w), kernel)


@EACH_AND_BOUNDS
@pytest.mark.parametrize("extra", [0, 1])
def test_matmul_of_sequences(extra: int, kernel: str) -> None:
    rng = np.random.default_rng(6)
    x, w = draw(rng, (3, 4, 16), True, 2), weigh(rng, (5, 16))
    nodes = [("MatMul", "in unit", "a"), ("MatMul", "a w", "out")]
    net = nets.model(nodes, {"in": ["N", 4, 16]}, "out", {"unit": np.eye(16), "w": w.T.reshape(*[1] * extra, 16, 5)})
    check(rows_case(net, x, x.reshape(12, 16), w), kernel)


@EACH_AND_BOUNDS
def test_matmul_with_its_weight_on_the_left(kernel: str) -> None:
    rng = np.random.default_rng(7)
    x, w = draw(rng, (3, 16, 4), True), weigh(rng, (5, 16))
    nodes = [("MatMul", "unit in", "a"), ("MatMul", "w a", "out")]
    net = nets.model(nodes, {"in": ["N", 16, 4]}, "out", {"unit": np.eye(16), "w": w})
    check(rows_case(net, x, np.swapaxes(x, 1, 2).reshape(12, 16), w), kernel)


@EACH_AND_BOUNDS
@pytest.mark.parametrize("last", [False, True])
def test_flattened_channels_own_many_columns(last: bool, kernel: str) -> None:
    """Channel j owns H*W columns: in a row after NCHW, every C-th one after NHWC."""
    rng = np.random.default_rng(8)
    x, w = draw(rng, (3, 8, 2, 3), True), weigh(rng, (5, 8, 6))
    w = (np.swapaxes(w, 1, 2) if last else w).reshape(5, 48)
    order: list[nets.Node] = [("Transpose", "a", "t", {"perm": [0, 2, 3, 1]})] if last else [("Identity", "a", "t")]
    nodes = [("Conv", "in unit", "a"), *order, ("Flatten", "t", "f"), ("Gemm", "f w", "out", {"transB": 1})]
    net = nets.model(nodes, {"in": ["N", 8, 2, 3]}, "out", {"unit": nets.unit(8, 2), "w": w})
    rows = (np.moveaxis(x, 1, -1) if last else x).reshape(3, 48)
    owner = np.tile(np.arange(8), 6) if last else np.repeat(np.arange(8), 6)
    check(rows_case(net, x, rows, w, owner), kernel)
