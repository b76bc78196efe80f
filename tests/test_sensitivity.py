"""Empirical sensitivities against a brute-force reference in float64, their invariances, and what calibration keeps."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import nets
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

from onnxprune import runtime
from onnxprune.contraction import consumers, normal_form
from onnxprune.criteria import FPGM, L1, L2, Activation, Random, Sensitivity, fast, shares
from onnxprune.criteria.base import Reduce
from onnxprune.errors import DataError, ModelError
from onnxprune.passes.calibrate import calibrate
from onnxprune.passes.surgery import surgery
from onnxprune.plan import Kept, Plan
from onnxprune.saliency import LayerScore, Saliency
from onnxprune.wire import digest

Array = np.ndarray[Any, Any]
BOTH = pytest.mark.parametrize("reduce", ["sum", "max"])
KERNELS = ["sum", "max", "graph sum", "graph max"]
EACH = pytest.mark.parametrize("kernel", KERNELS)


class GraphSensitivity(Sensitivity):
    """As other providers than the CPU compute it."""

    @property
    def engine(self) -> shares.Shares:  # type: ignore[override]
        return shares.Shares(self._reduce)


def made_by(kernel: str) -> Sensitivity:
    reduce: Reduce = "max" if kernel.endswith("max") else "sum"
    return GraphSensitivity(reduce) if kernel.startswith("graph") else Sensitivity(reduce)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sessions as small as these spend most of their time on starting and stopping threads."""
    with mock.patch.object(runtime, "session", functools.partial(runtime.session, threads=1)):
        yield


# ---- the reference: explicit windows, explicit loops, float64


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer to score and what it sums over.

    net: hands its input `x` to layer "out". u: [n, C, K, P], the entry of x that tap K meets at patch P, zero in the padding.
    w: [O, C/groups, K]. owner: [C], the channel of each position; one array per channel group, -1 where it has no channel.
    """

    net: onnx.ModelProto
    x: Array
    u: Array
    w: Array
    owners: tuple[Array, ...]
    groups: int = 1

    def expected(self, reduce: Reduce) -> list[Array]:
        c, o = self.u.shape[1] // self.groups, self.w.shape[0] // self.groups
        found = []
        for owner in self.owners:
            inside = [
                brute(self.u[:, g * c : (g + 1) * c], self.w[g * o : (g + 1) * o], owner[g * c : (g + 1) * c], reduce)
                for g in range(self.groups)
            ]
            size = max(len(s) for s in inside)
            found.append(np.max([np.pad(s, (0, size - len(s))) for s in inside], axis=0))
        return found

    def outputs(self) -> Array:
        """What the layer computes without its bias, [n, O, P]: the windows are right when ONNX Runtime agrees."""
        c, o = self.u.shape[1] // self.groups, self.w.shape[0] // self.groups
        each = [
            np.einsum("ncka,ock->noa", self.u[:, g * c : (g + 1) * c], self.w[g * o : (g + 1) * o]) for g in range(self.groups)
        ]
        return np.concatenate(each, axis=1)


def brute(u: Array, w: Array, owner: Array, reduce: Reduce) -> Array:
    """Largest share of every channel over sign parts, filters, patches and samples."""
    u, w = u.astype(np.float64), w.astype(np.float64)
    best = np.zeros(owner.max() + 1)
    for sign_w in (1, -1):
        for sign_x in (1, -1):
            for sample in np.maximum(sign_x * u, 0):
                events = []
                for filter_ in np.maximum(sign_w * w, 0):
                    for p in range(u.shape[3]):
                        terms = filter_ * sample[:, :, p]
                        events.append((terms.sum(), terms))
                largest = max(z for z, _ in events)
                for z, terms in events:
                    if z > 1e-6 * largest:
                        each = terms.sum(axis=1) if reduce == "sum" else terms.max(axis=1)
                        for j in range(len(best)):
                            mine = each[owner == j]
                            best[j] = max(best[j], (mine.sum() if reduce == "sum" else mine.max()) / z)
    return best


def windows(x: Array, taps: Sequence[int], out: Sequence[int], at: Callable[[int, int, int], int | None]) -> Array:
    """[n, C, K, P] by loops; `at` (axis, patch, tap) is the position of x that they meet, None where they meet nothing."""
    u = np.zeros((*x.shape[:2], int(np.prod(taps)), int(np.prod(out))))
    for p, patch in enumerate(np.ndindex(*out)):
        for k, tap in enumerate(np.ndindex(*taps)):
            place = [at(axis, patch[axis], tap[axis]) for axis in range(len(out))]
            if all(q is not None and 0 <= q < n for q, n in zip(place, x.shape[2:], strict=True)):
                u[:, :, k, p] = x[(slice(None), slice(None), *place)]
    return u


def conv_windows(x: Array, taps: Sequence[int], attributes: dict[str, Any], transposed: bool) -> Array:
    """The windows of Conv or ConvTranspose as the ONNX operator pages define them."""
    rank, space = len(taps), x.shape[2:]
    strides = attributes.get("strides", [1] * rank)
    spread = attributes.get("dilations", [1] * rank)
    pads = attributes.get("pads", [0] * 2 * rank)
    extra = attributes.get("output_padding", [0] * rank)
    auto = attributes.get("auto_pad", "NOTSET")
    begin, out = [], []
    for a in range(rank):
        reach = (taps[a] - 1) * spread[a] + 1
        full = strides[a] * (space[a] - 1) + extra[a] + reach if transposed else space[a] - reach
        if auto.startswith("SAME"):
            size = space[a] * strides[a] if transposed else -(-space[a] // strides[a])
            total = full - size if transposed else max((size - 1) * strides[a] - full, 0)
            begin.append(total // 2 if auto == "SAME_UPPER" else total - total // 2)
        elif "output_shape" in attributes:
            size = attributes["output_shape"][a]
            begin.append(full - size - (full - size) // 2)
        else:
            ends = pads[a] + pads[rank + a] if auto == "NOTSET" else 0
            begin.append(pads[a] if auto == "NOTSET" else 0)
            size = full - ends if transposed else (full + ends) // strides[a] + 1
        out.append(size)

    def gather(axis: int, patch: int, tap: int) -> int | None:
        return patch * strides[axis] - begin[axis] + tap * spread[axis]

    def scatter(axis: int, patch: int, tap: int) -> int | None:
        steps = patch + begin[axis] - tap * spread[axis]
        return None if steps % strides[axis] else steps // strides[axis]

    return windows(x, taps, out, scatter if transposed else gather)


def signs(rng: np.random.Generator, shape: Sequence[int], axis: int, cycle: Sequence[int]) -> Array:
    """Signs that repeat along one axis, with a few exceptions."""
    along = np.resize(cycle, shape[axis]).reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return along * rng.choice([1, -1], shape, p=[0.98, 0.02])


def draw(rng: np.random.Generator, shape: Sequence[int], signed: bool, axis: int = 1) -> Array:
    """Activations with the channels on `axis`.

    With `weigh`, any 8 channels in a row have two for each sign part: where one is alone, its share is 1 and tells nothing.
    """
    x = rng.uniform(0.2, 1.5, shape) * (signs(rng, shape, axis, [1, 1, -1, -1]) if signed else 1)
    return x.astype(np.float32)


def weigh(rng: np.random.Generator, shape: Sequence[int], axis: int = 1) -> Array:
    """Weights with the input channels on `axis`, the filters on the other of the first two."""
    filters = rng.choice([1, -1], [1 if a == axis or a > 1 else n for a, n in enumerate(shape)])
    return (rng.uniform(0.2, 1.5, shape) * signs(rng, shape, axis, [1] * 4 + [-1] * 4) * filters).astype(np.float32)


def conv_case(
    rng: np.random.Generator,
    space: Sequence[int],
    taps: Sequence[int],
    attributes: dict[str, Any] | None = None,
    *,
    channels: int = 8,
    filters: int = 3,
    groups: int = 1,
    signed: bool = True,
    transposed: bool = False,
    n: int = 2,
) -> Case:
    attributes = attributes or {}
    x = draw(rng, (n, channels, *space), signed)
    shape = (channels, filters // groups) if transposed else (filters, channels // groups)
    w = weigh(rng, (*shape, *taps), 0 if transposed else 1)
    weights = {"unit": nets.unit(channels, len(space)), "w": w, "b": rng.standard_normal(filters)}
    op = "ConvTranspose" if transposed else "Conv"
    nodes = [("Conv", "in unit", "a"), (op, "a w b", "out", {**attributes, **({"group": groups} if groups > 1 else {})})]
    net = nets.model(nodes, {"in": ["N", channels, *space]}, "out", weights)
    w = w.reshape(*shape, -1)
    if transposed:  # [C, O/groups, K] -> [O, C/groups, K]
        w = np.concatenate([np.swapaxes(part, 0, 1) for part in np.split(w, groups)])
    owner = np.tile(np.arange(channels // groups), groups)
    return Case(net, x, conv_windows(x, taps, attributes, transposed), w, (owner,), groups)


def score(net: onnx.ModelProto, x: Array, reduce: Reduce = "sum", **options: Any) -> Saliency:
    return calibrate(nets.grouped(net), Sensitivity(reduce), nets.samples(net, x), **options)


def check(case: Case, kernel: str) -> None:
    """The windows are those of ONNX Runtime, and the sensitivities those of the reference.

    kernel: how terms combine, and whether ONNX Runtime does it all.
    """
    reduce: Reduce = "max" if kernel.endswith("max") else "sum"
    if kernel == "max":
        (out,), (bias,) = nets.run(case.net, case.x, "out"), nets.run(case.net, np.zeros_like(case.x), "out")
        z = (out.astype(np.float64) - bias).reshape(-1)
        np.testing.assert_allclose(np.sort(z), np.sort(case.outputs().reshape(-1)), rtol=1e-3, atol=1e-4)
    scores = calibrate(nets.grouped(case.net), made_by(kernel), nets.samples(case.net, case.x)).layers
    found = [x.values for x in scores if x.layer == "out"]
    for got, want in zip(found, case.expected(reduce), strict=True):
        assert 0 < want.min() < 0.99
        np.testing.assert_allclose(got, want, rtol=1e-5)


CONVS: dict[str, dict[str, Any]] = {
    "1-D": {"space": [9], "taps": [3]},
    "1-D stride 3": {"space": [11], "taps": [4], "attributes": {"strides": [3], "pads": [2, 1]}},
    "2-D pad 1": {"space": [5, 4], "taps": [3, 3], "attributes": {"pads": [1, 1, 1, 1]}},
    "the trap of the specification": {
        "space": [7, 7],
        "taps": [3, 3],
        "attributes": {"strides": [2, 2], "pads": [1, 1, 1, 1], "dilations": [2, 2]},
    },
    "asymmetric": {
        "space": [6, 5],
        "taps": [2, 3],
        "attributes": {"strides": [1, 3], "pads": [0, 2, 1, 0], "dilations": [2, 1]},
    },
    "non-negative": {"space": [5, 5], "taps": [3, 3], "attributes": {"strides": [2, 2]}, "signed": False},
    "SAME_UPPER": {"space": [6, 5], "taps": [4, 2], "attributes": {"auto_pad": "SAME_UPPER", "strides": [1, 2]}},
    "SAME_LOWER": {"space": [5, 5], "taps": [2, 4], "attributes": {"auto_pad": "SAME_LOWER"}},
    "VALID": {"space": [7, 6], "taps": [3, 2], "attributes": {"auto_pad": "VALID", "strides": [2, 1]}},
    "3-D": {"space": [3, 4, 3], "taps": [2, 3, 1], "attributes": {"pads": [1, 0, 0, 0, 1, 0]}},
    "1x1": {"space": [4, 3], "taps": [1, 1], "channels": 16, "filters": 5},
    "1x1 stride 2": {"space": [5, 4], "taps": [1, 1], "channels": 16, "attributes": {"strides": [2, 2]}},
    "1x1 padded": {"space": [4, 3], "taps": [1, 1], "channels": 16, "attributes": {"pads": [1, 0, 0, 0]}},
    "1x1 padded as many patches as positions": {
        "space": [4, 4],
        "taps": [1, 1],
        "attributes": {"pads": [1, 1, 2, 2], "strides": [2, 2]},
        "channels": 16,
    },
    "two channels": {"space": [4, 4], "taps": [2, 2], "channels": 2, "filters": 5, "signed": False},
    "groups 2": {
        "space": [5, 5],
        "taps": [3, 3],
        "attributes": {"pads": [1, 1, 1, 1]},
        "channels": 16,
        "filters": 6,
        "groups": 2,
    },
    "groups 3, 1x1": {"space": [3, 4], "taps": [1, 1], "channels": 48, "filters": 12, "groups": 3},
    "groups 2, stride 2, non-negative": {
        "space": [6],
        "taps": [3],
        "attributes": {"strides": [2]},
        "channels": 16,
        "filters": 10,
        "groups": 2,
        "signed": False,
    },
}
TRANSPOSED: dict[str, dict[str, Any]] = {
    "plain": {"space": [3, 4], "taps": [2, 3]},
    "1-D stride 3": {"space": [5], "taps": [3], "attributes": {"strides": [3], "pads": [1, 0]}},
    "output_padding": {
        "space": [4, 3],
        "taps": [3, 3],
        "attributes": {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 1]},
    },
    "dilated": {"space": [4, 4], "taps": [2, 2], "attributes": {"dilations": [2, 3], "pads": [0, 1, 2, 0]}},
    "output_shape": {"space": [3, 3], "taps": [3, 3], "attributes": {"strides": [2, 2], "output_shape": [6, 5]}},
    "1x1": {"space": [3, 4], "taps": [1, 1], "channels": 16},
    "groups 2": {"space": [3, 3], "taps": [3, 2], "attributes": {"strides": [2, 1]}, "channels": 16, "filters": 8, "groups": 2},
}


@EACH
@pytest.mark.parametrize("name", CONVS)
def test_convolutions_equal_brute_force(name: str, kernel: str) -> None:
    check(conv_case(np.random.default_rng(1), **CONVS[name]), kernel)


@EACH
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
@given(conv_options(), st.sampled_from(KERNELS), st.integers(0, 99))
def test_any_convolution_equals_brute_force(options: dict[str, Any], kernel: str, seed: int) -> None:
    check(conv_case(np.random.default_rng(seed), **options), kernel)


# ---- matrix products


def rows_case(net: onnx.ModelProto, x: Array, rows: Array, w: Array, *owners: Array) -> Case:
    """A layer that multiplies rows [n, C] with w [O, C]."""
    return Case(net, x, rows[:, :, None, None], w[:, :, None], owners or (np.arange(rows.shape[1]),))


GEMMS = {
    "plain": {},
    "transB": {"transB": 1},
    "alpha": {"alpha": 0.25, "beta": 3.0, "transB": 1},
    "negative alpha": {"alpha": -2.0, "beta": 0.0},
}


@EACH
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


@EACH
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


@EACH
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


@EACH
@pytest.mark.parametrize("extra", [0, 1])
def test_matmul_of_sequences(extra: int, kernel: str) -> None:
    rng = np.random.default_rng(6)
    x, w = draw(rng, (3, 4, 16), True, 2), weigh(rng, (5, 16))
    nodes = [("MatMul", "in unit", "a"), ("MatMul", "a w", "out")]
    net = nets.model(nodes, {"in": ["N", 4, 16]}, "out", {"unit": np.eye(16), "w": w.T.reshape(*[1] * extra, 16, 5)})
    check(rows_case(net, x, x.reshape(12, 16), w), kernel)


@EACH
def test_matmul_with_its_weight_on_the_left(kernel: str) -> None:
    rng = np.random.default_rng(7)
    x, w = draw(rng, (3, 16, 4), True), weigh(rng, (5, 16))
    nodes = [("MatMul", "unit in", "a"), ("MatMul", "w a", "out")]
    net = nets.model(nodes, {"in": ["N", 16, 4]}, "out", {"unit": np.eye(16), "w": w})
    check(rows_case(net, x, np.swapaxes(x, 1, 2).reshape(12, 16), w), kernel)


@EACH
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


# ---- channels that come more than once, groups that lie side by side


@EACH
def test_channel_that_appears_twice(kernel: str) -> None:
    rng = np.random.default_rng(9)
    x, w = draw(rng, (2, 8, 4, 4), True), weigh(rng, (3, 16, 2, 2))
    nodes = [("Conv", "in unit", "a"), ("Concat", "a a", "aa", {"axis": 1}), ("Conv", "aa w", "out")]
    net = nets.model(nodes, {"in": ["N", 8, 4, 4]}, "out", {"unit": nets.unit(8, 2), "w": w})
    u = conv_windows(np.concatenate([x, x], axis=1), [2, 2], {}, False)
    check(Case(net, x, u, w.reshape(3, 16, 4), (np.tile(np.arange(8), 2),)), kernel)


@EACH
def test_groups_side_by_side(kernel: str) -> None:
    """Concat(a, b, a): two groups share the denominators; one of them comes twice."""
    rng = np.random.default_rng(10)
    x, w = draw(rng, (2, 8, 5), True), weigh(rng, (4, 20, 3))
    swap = rng.standard_normal((4, 8, 1)).astype(np.float32)
    nodes = [
        ("Conv", "in unit", "a"),
        ("Conv", "in swap", "b"),
        ("Concat", "a b a", "aba", {"axis": 1}),
        ("Conv", "aba w", "out"),
    ]
    net = nets.model(nodes, {"in": ["N", 8, 5]}, "out", {"unit": nets.unit(8, 1), "swap": swap, "w": w})
    (b,) = nets.run(net, x, "b")
    u = conv_windows(np.concatenate([x, b, x], axis=1), [3], {}, False)
    first, second = np.r_[np.arange(8), [-1] * 4, np.arange(8)], np.r_[[-1] * 8, np.arange(4), [-1] * 8]
    check(Case(net, x, u, w, (first, second)), kernel)


def test_depthwise_layer_is_no_evidence() -> None:
    """Every share of a depthwise layer is 1; the channels are scored where the next dense layer reads them."""
    rng = np.random.default_rng(11)
    weights = {"unit": nets.unit(8, 1), "d": rng.uniform(0.5, 1, (8, 1, 3)), "w": weigh(rng, (3, 8, 2))}
    nodes = [("Conv", "in unit", "a"), ("Conv", "a d", "m", {"group": 8}), ("Conv", "m w", "out")]
    net = nets.model(nodes, {"in": ["N", 8, 7]}, "out", weights)
    x = draw(rng, (2, 8, 7), True)
    saliency = score(net, x)
    assert [layer.layer for layer in saliency.layers] == ["out"]
    (m,) = nets.run(net, x, "m")
    want = brute(conv_windows(m, [2], {}, False), weights["w"], np.arange(8), "sum")
    assert want.min() < 0.99
    np.testing.assert_allclose(saliency.layers[0].values, want, rtol=1e-5)


def test_largest_over_several_consumers() -> None:
    rng = np.random.default_rng(12)
    weights = {"unit": nets.unit(8, 1), "v": weigh(rng, (3, 8, 2)), "w": weigh(rng, (4, 8, 3))}
    nodes = [("Conv", "in unit", "a"), ("Conv", "a v", "p"), ("Conv", "a w", "q", {"strides": [2]})]
    weights["w"][:, 2:4] *= 3
    net = nets.model(nodes, {"in": ["N", 8, 6]}, "p q", weights)
    x = draw(rng, (3, 8, 6), True)
    saliency = score(net, x)
    v, w = weights["v"], weights["w"]
    p = brute(conv_windows(x, [2], {}, False), v, np.arange(8), "sum")
    q = brute(conv_windows(x, [3], {"strides": [2]}, False), w, np.arange(8), "sum")
    (group,) = nets.grouped(net).prunable
    np.testing.assert_allclose(saliency.of(group), np.maximum(p, q), rtol=1e-5)
    assert (p > q).any() and (q > p).any()
    assert saliency.events(group) == 4 * 3 * 5 + 4 * 4 * 2


# ---- 1.9 (1): what every sensitivity satisfies


def conv_net(w: Array, space: Sequence[int], bias: Array | None = None, **attributes: Any) -> onnx.ModelProto:
    """in -> 1x1 Conv that changes nothing -> Conv with weight w."""
    weights = {"unit": nets.unit(w.shape[1], w.ndim - 2), "w": w} | ({} if bias is None else {"b": bias})
    nodes = [("Conv", "in unit", "a"), ("Conv", "a w" if bias is None else "a w b", "out", attributes)]
    return nets.model(nodes, {"in": ["N", w.shape[1], *space]}, "out", weights)


def matmul_net(w: Array) -> onnx.ModelProto:
    """in [N, C] -> MatMul that changes nothing -> MatMul with weight w [C, O]."""
    nodes = [("MatMul", "in unit", "a"), ("MatMul", "a w", "out")]
    return nets.model(nodes, {"in": ["N", len(w)]}, "out", {"unit": np.eye(len(w)), "w": w})


def values(net: onnx.ModelProto, x: Array, reduce: Reduce = "sum", **options: Any) -> Array:
    (found,) = score(net, x.astype(np.float32), reduce, **options).layers
    return found.values


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_range_and_order_of_the_two_readings(seed: int, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    x, net = draw(rng, (3, 8, 6, 6), signed), conv_net(weigh(rng, (5, 8, 3, 3)), (6, 6), pads=[1, 1, 1, 1])
    by_sum, by_max = values(net, x), values(net, x, "max")
    for s in (by_sum, by_max):
        assert s.min() >= 0 and s.max() <= 1
    assert (by_sum >= by_max * (1 - 1e-6)).all() and (by_max * 9 >= by_sum * (1 - 1e-6)).all()
    assert (by_sum > by_max).any()
    assert by_sum.sum() >= 1


@pytest.mark.parametrize("sign_w", [1, -1])
@pytest.mark.parametrize("sign_x", [1, -1])
@pytest.mark.parametrize("taps", [(3, 2), (1, 1), ()])
def test_shares_of_one_event_add_up_to_one(taps: tuple[int, ...], sign_x: int, sign_w: int) -> None:
    """One sample, one filter, one patch, one sign part: the sensitivities are the shares."""
    rng = np.random.default_rng(13)
    w, x = rng.uniform(0.01, 1, (1, 7, *taps)), rng.uniform(0.01, 1, (1, 7, *taps)).astype(np.float32)
    s = values(conv_net(sign_w * w, taps) if taps else matmul_net(sign_w * w.T), sign_x * x)
    terms = (w * x).reshape(7, -1).sum(axis=1)
    np.testing.assert_allclose(s, terms / terms.sum(), rtol=1e-5)
    assert s.sum() == pytest.approx(1, abs=1e-6)


# ---- 1.9 (3, 4): invariances and monotony


def test_scale_of_filters_and_activations_and_bias_do_not_matter() -> None:
    rng = np.random.default_rng(14)
    x, w = draw(rng, (3, 8, 5, 5), True), weigh(rng, (4, 8, 3, 3))
    s = values(conv_net(w, (5, 5)), x)
    scaled = w * np.array([8, 1, 0.25, 3])[:, None, None, None]
    np.testing.assert_allclose(values(conv_net(scaled, (5, 5)), x), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w, (5, 5)), 64 * x), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w, (5, 5)), 1e-4 * x), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w, (5, 5)), x * 10 ** rng.uniform(-4, 4, (3, 1, 1, 1))), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w, (5, 5), 100 * rng.standard_normal(4)), x), s, rtol=1e-5)
    # A negative factor swaps the signs of a filter's parts, all of which count.
    np.testing.assert_allclose(values(conv_net(-w, (5, 5)), x), s, rtol=1e-5)


@BOTH
def test_permutations(reduce: Reduce) -> None:
    """Samples and filters may come in any order; a permutation of channels permutes their sensitivities."""
    rng = np.random.default_rng(15)
    x, w = draw(rng, (6, 8, 5, 5), True), weigh(rng, (4, 8, 3, 2))
    s = values(conv_net(w, (5, 5)), x, reduce)
    order = rng.permutation(8)
    np.testing.assert_allclose(values(conv_net(w, (5, 5)), x[rng.permutation(6)], reduce), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w[rng.permutation(4)], (5, 5)), x, reduce), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w[:, order], (5, 5)), x[:, order], reduce), s[order], rtol=1e-5)
    assert len(np.unique(s)) == 8


@BOTH
@pytest.mark.parametrize("taps", [(2, 3), (1, 1)])
def test_duplicated_channel_halves_its_sensitivity(taps: tuple[int, ...], reduce: Reduce) -> None:
    rng = np.random.default_rng(16)
    x, w = draw(rng, (3, 16, 4, 4), True), weigh(rng, (4, 16, *taps))
    s = values(conv_net(w, (4, 4)), x, reduce)
    half = w * np.where(np.arange(16) == 2, 0.5, 1)[:, None, None]
    two = values(conv_net(np.concatenate([half, half[:, 2:3]], 1), (4, 4)), np.concatenate([x, x[:, 2:3]], 1), reduce)
    np.testing.assert_allclose(two, [*s[:2], s[2] / 2, *s[3:], s[2] / 2], rtol=1e-5)
    assert s[2] < 0.99


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 6), st.sampled_from(["sum", "graph sum"]))
def test_more_samples_never_lower_a_sensitivity(seed: int, few: int, more: int, kernel: str) -> None:
    """Samples of very different magnitudes, too: a faint one counts as much as a strong one."""
    rng = np.random.default_rng(seed)
    x = draw(rng, (few + more, 8, 5), True) * 10 ** rng.uniform(-9, 9, (few + more, 1, 1))
    net = conv_net(weigh(rng, (3, 8, 2)), (5,))
    groups, criterion = nets.grouped(net), made_by(kernel)
    all_of, some = (
        calibrate(groups, criterion, nets.samples(net, a.astype(np.float32))).layers[0].values for a in (x, x[:few])
    )
    assert (all_of >= some * (1 - 1e-5)).all()


@EACH
def test_batches_do_not_matter(kernel: str) -> None:
    """Not even when one sample is a hundred million times as strong as the others."""
    rng = np.random.default_rng(17)
    net = nets.convnet(rng)
    x = rng.standard_normal((33, 3, 6, 6)).astype(np.float32)
    x[5] *= 1e8
    found = {b: calibrate(nets.grouped(net), made_by(kernel), nets.samples(net, x), batch=b) for b in (1, 7, 32)}
    assert found[1].samples == 33 and len(found[1].layers) == 2
    assert len({f.data for f in found.values()}) == 1
    for other in (7, 32):
        for a, b in zip(found[1].layers, found[other].layers, strict=True):
            assert (a.layer, a.group, a.events) == (b.layer, b.group, b.events)
            np.testing.assert_allclose(a.values, b.values, rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_matrix_product_are_samples_of_their_own(transposed: bool) -> None:
    rng = np.random.default_rng(18)
    net = matmul_net(weigh(rng, (16, 3), 0))
    if transposed:
        nodes = [("Gemm", "unit in", "a", {"transB": 1}), ("Gemm", "a w", "out", {"transA": 1})]
        net = nets.model(nodes, {"in": ["N", 16]}, "out", {"unit": np.eye(16), "w": constant(net, "w")})
    x = draw(rng, (6, 16), True) * np.array([[1e9], [1], [1], [1e-9], [1], [1]])
    np.testing.assert_allclose(values(net, x, batch=6), values(net, x, batch=1), rtol=1e-5)


@pytest.mark.parametrize("count", [3, 8, 10, 11])
@pytest.mark.parametrize("criterion", [Sensitivity(), Activation()])
def test_fixed_batch(criterion: Any, count: int) -> None:
    """A model of static batch 4 gets its samples in fours, and the last few count no more than the others."""
    net = nets.convnet(np.random.default_rng(19))
    static = onnx.ModelProto.FromString(net.SerializeToString())
    static.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    x = np.random.default_rng(20).standard_normal((count, 3, 6, 6)).astype(np.float32)
    seen: list[tuple[int, int]] = []
    got = calibrate(nets.grouped(static), criterion, nets.samples(static, x), progress=lambda *a: seen.append(a))
    want = calibrate(nets.grouped(net), criterion, nets.samples(net, x))
    assert got.samples == want.samples == count
    assert seen[-1] == (count, count)
    for a, b in zip(got.layers, want.layers, strict=True):
        np.testing.assert_allclose(a.values, b.values, rtol=1e-5)


def test_chosen_samples_only() -> None:
    net = nets.convnet(np.random.default_rng(21))
    x = np.random.default_rng(22).standard_normal((9, 3, 6, 6)).astype(np.float32)
    some = np.array([7, 2, 4])
    a, b = score(net, x, indices=some), score(net, x[some])
    assert a.samples == 3 and a.data == b.data != score(net, x).data
    for m, n in zip(a.layers, b.layers, strict=True):
        np.testing.assert_array_equal(m.values, n.values)


@EACH
@pytest.mark.parametrize("chunk", [1, 40, 3000])
@pytest.mark.parametrize("kind", ["conv", "1x1", "groups", "transposed", "flatten"])
def test_chunks_do_not_matter(kind: str, chunk: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(23)
    if kind == "flatten":
        net, x = nets.convnet(rng), rng.standard_normal((3, 3, 6, 6)).astype(np.float32)
    else:
        options = {"conv": CONVS["asymmetric"], "1x1": CONVS["1x1"], "groups": CONVS["groups 2"]}
        chosen = options.get(kind, TRANSPOSED["output_padding"])
        case = conv_case(rng, **chosen, transposed=kind == "transposed")
        net, x = case.net, case.x
    whole = calibrate(nets.grouped(net), made_by(kernel), nets.samples(net, x))
    monkeypatch.setattr(shares, "CHUNK", chunk)
    for name in ("PIECE", "FEWEST", "MOST", "HELD", "WEIGHTS", "KEPT"):
        monkeypatch.setattr(fast, name, chunk)
    for a, b in zip(whole.layers, calibrate(nets.grouped(net), made_by(kernel), nets.samples(net, x)).layers, strict=True):
        np.testing.assert_allclose(a.values, b.values, rtol=2e-6)


@BOTH
@pytest.mark.parametrize("kind", ["conv", "groups", "flatten"])
def test_scores_known_from_before_only_grow(kind: str, reduce: Reduce) -> None:
    """Whatever is known of some channels already: the result is the larger of that and what the batch shows."""
    rng = np.random.default_rng(44)
    if kind == "flatten":
        net, x = nets.convnet(rng), rng.standard_normal((3, 3, 6, 6)).astype(np.float32)
    else:
        case = conv_case(rng, **CONVS["asymmetric" if kind == "conv" else "groups 2"])
        net, x = case.net, case.x
    groups = nets.grouped(net)
    layer = consumers(groups)[-1]
    w, (a,) = constant(net, layer.weight), nets.run(net, x, layer.x.tensor)
    (fresh,) = Sensitivity(reduce).observe(groups, layer, a, w)
    for known in (0 * fresh.values, rng.random(len(fresh.values)), fresh.values, np.ones(len(fresh.values))):
        before = known.copy()
        (found,) = Sensitivity(reduce).observe(groups, layer, a, w, {fresh.group: known, "another": known})
        np.testing.assert_allclose(found.values, np.maximum(known, fresh.values), rtol=1e-6)
        np.testing.assert_array_equal(known, before)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 9999), st.sampled_from([(), (3,), (2, 3)]), st.integers(6, 20), st.integers(1, 40))
def test_saving_work_costs_no_exactness(seed: int, taps: tuple[int, ...], channels: int, filters: int) -> None:
    """Heavy-tailed weights and activations, many patches: the fast kernel against the one that evaluates everything."""
    rng = np.random.default_rng(seed)
    x = np.abs(rng.standard_t(1.5, (3, channels, *(9 for _ in taps))))
    w = rng.standard_t(1.5, (filters, channels, *taps)) * rng.choice([1, 1e-3], (filters, 1, *(1 for _ in taps)))
    net = conv_net(w, x.shape[2:], pads=[1] * 2 * len(taps)) if taps else matmul_net(w.T)
    groups = nets.grouped(net)
    (layer,) = consumers(groups)
    x, w = x.astype(np.float32), constant(net, "w")
    (found,) = Sensitivity().observe(groups, layer, x, w)
    kernel, nothing = shares.Shares("sum"), np.zeros(channels)
    whole = [kernel.largest(c, np.arange(channels)[:, None], nothing)[0] for c in normal_form(groups, layer, x, w)]
    np.testing.assert_allclose(found.values, np.max(whole, axis=0), rtol=1e-5)


# ---- 1.8: denominators that are zero, or next to it


@BOTH
@pytest.mark.parametrize("taps", [(1,), (2,)])
def test_dead_channel_and_dead_layer(taps: tuple[int, ...], reduce: Reduce) -> None:
    rng = np.random.default_rng(24)
    x, w = draw(rng, (3, 5, 6), False), rng.standard_normal((4, 5, *taps))
    x[:, 2], w[:, 4] = 0, 0
    s = values(conv_net(w, (6,)), x, reduce)
    assert s[2] == s[4] == 0 and (s[[0, 1, 3]] > 0).all()
    np.testing.assert_array_equal(values(conv_net(w, (6,)), np.zeros_like(x), reduce), np.zeros(5))
    np.testing.assert_array_equal(values(conv_net(0 * w, (6,)), x, reduce), np.zeros(5))


@pytest.mark.parametrize(("size", "live"), [(0.0, False), (1e-7, False), (1e-5, True)])
@pytest.mark.parametrize("taps", [1, 2])
def test_tiny_denominators_give_no_share(taps: int, size: float, live: bool) -> None:
    """In the last patch only channel 1 is active; below a millionth of the largest denominator that is noise."""
    x = np.zeros((1, 2, 8), np.float32)
    x[0, :, :4] = 1
    x[0, 1, 7] = size
    s = values(conv_net(np.ones((1, 2, taps)), (8,)), x)
    np.testing.assert_allclose(s, [0.5, 1.0 if live else 0.5], rtol=1e-6)


@pytest.mark.parametrize("far", [1e-6, 4e-6, 1e-4])
@EACH
def test_filters_are_held_against_the_largest_of_their_layer(kernel: str, far: float) -> None:
    """The second filter sees channel 2 alone, and its denominator is much smaller than the first filter's."""
    net = matmul_net(np.array([[1, 0], [1, 0], [1, far]]))
    s = calibrate(nets.grouped(net), made_by(kernel), nets.samples(net, np.ones((2, 3), np.float32))).layers[0].values
    np.testing.assert_allclose(s, [1 / 3, 1 / 3, 1.0 if far > 3e-6 else 1 / 3], rtol=1e-6)


@BOTH
@pytest.mark.parametrize("taps", [(1,), (2,)])
def test_numbers_at_the_edge_of_float32(taps: tuple[int, ...], reduce: Reduce) -> None:
    """Squares, reciprocals and products stay within float32 whatever the scale of activations and weights."""
    rng = np.random.default_rng(25)
    x, w = draw(rng, (2, 4, 5), True), rng.uniform(1, 100, (3, 4, *taps))
    s = values(conv_net(w, (5,)), x, reduce)
    for of_x, of_w in itertools.product((1e-33, 1e-20, 1e33), (1e-30, 1.0)):
        np.testing.assert_allclose(values(conv_net(w * of_w, (5,)), x * of_x, reduce), s, rtol=1e-5)
    for faint in (1e-38, 1e-41, 1e-45):
        s = values(conv_net(w, (5,)), x * faint, reduce)
        assert np.isfinite(s).all() and s.min() >= 0 and s.max() <= 1


@EACH
@pytest.mark.parametrize("taps", [(1,), (2,)])
@pytest.mark.parametrize("far", [1e-8, 1e-14, 1e-25, 1e-40])
def test_weights_of_very_different_size(far: float, taps: tuple[int, ...], kernel: str) -> None:
    """Only the channel with the largest weights is dead, and those of another are smaller still than the rest."""
    rng = np.random.default_rng(45)
    x, w = rng.uniform(0.1, 1, (3, 4, 5)), rng.uniform(1, 2, (3, 4, *taps)).astype(np.float32)
    x[:, 0], w[:, 1:] = 0, w[:, 1:] * np.float32(far)
    w[:, 3] *= np.float32(far)
    want = brute(conv_windows(x, taps, {}, False), w, np.arange(4), "max" if kernel.endswith("max") else "sum")
    groups, x = nets.grouped(conv_net(w, (5,))), x.astype(np.float32)
    (group,), (layer,) = groups.prunable, consumers(groups)
    s = calibrate(groups, made_by(kernel), nets.samples(conv_net(w, (5,)), x), batch=1).layers[0].values
    assert np.isfinite(s).all() and s[0] == 0
    before = np.full(4, 0.3)
    (found,) = made_by(kernel).observe(groups, layer, x, w, {group.id: before})
    np.testing.assert_allclose(found.values, np.maximum(before, s), rtol=1e-5)
    if far > 1e-18:
        np.testing.assert_allclose(s[:3], want[:3], rtol=1e-5)
        np.testing.assert_allclose(s[3], want[3], rtol=1e-5, atol=1e-12)


# ---- events


@pytest.mark.parametrize(
    ("signed", "sign_w", "parts"), [(False, None, 2), (True, None, 4), (False, 1, 1), (False, -1, 1), (True, 1, 2)]
)
def test_events_are_live_parts_times_outputs(signed: bool, sign_w: int | None, parts: int) -> None:
    rng = np.random.default_rng(26)
    w = rng.standard_normal((3, 4, 2, 2))
    w = w if sign_w is None else sign_w * np.abs(w)
    net = conv_net(w, (4, 5))
    saliency = score(net, draw(rng, (5, 4, 4, 5), signed))
    (group,) = nets.grouped(net).prunable
    assert saliency.events(group) == saliency.layers[0].events == parts * 3 * 3 * 4


def test_events_of_samples_that_differ_in_sign() -> None:
    """However the samples are batched, all parts count."""
    rng = np.random.default_rng(27)
    net = conv_net(rng.standard_normal((3, 4, 2)), (4,))
    x = draw(rng, (2, 4, 4), False) * np.array([1, -1], np.float32)[:, None, None]
    assert score(net, x, batch=1).layers[0].events == score(net, x, batch=2).layers[0].events == 4 * 9


# ---- 1.9 (6): what the sensitivities promise, held against the pruned network itself


def test_bound_on_the_sample_set_holds_with_certainty() -> None:
    """Dropping channels changes no output of their consumer by more than the sum of their sensitivities, relative to |W||a|.

    With certainty for every sample of the set, filter and patch (K = 1), and for every sign part by itself.
    """
    rng = np.random.default_rng(28)
    net = nets.convnet(rng)
    groups, x = nets.grouped(net), rng.standard_normal((12, 3, 6, 6)).astype(np.float32)
    saliency = calibrate(groups, Sensitivity(), nets.samples(net, x))
    for group, consumer, weight in zip(groups.prunable, ["c2", "out"], ["w2", "w3"], strict=True):
        s = saliency.of(group)
        u, w = inputs_of(net, x, consumer), constant(net, weight).reshape(-1, group.size, 9).astype(np.float64)
        for _ in range(12):
            kept = np.sort(rng.choice(group.size, rng.integers(1, group.size), replace=False))
            dropped = np.setdiff1d(np.arange(group.size), kept)
            pruned = surgery(groups, Plan({group.id: Kept(group.size, kept)}))
            (before,), (after,) = nets.run(net, x, consumer), nets.run(pruned, x, consumer)
            change = np.abs(after.astype(np.float64) - before).reshape(12, len(w), -1)
            absolute = np.einsum("ock,ncka->noa", np.abs(w), np.abs(u))
            assert (change <= s[dropped].sum() * absolute + 1e-5 * absolute.max()).all()
            for sign in (1, -1):
                part = np.maximum(sign * w, 0)
                z, rest = np.einsum("ock,ncka->noa", part, u), np.einsum("ock,ncka->noa", part[:, kept], u[:, kept])
                assert (z - rest <= s[dropped].sum() * z + 1e-6 * z.max()).all()
        # And nothing smaller would do: each sensitivity is attained by some output.
        for j in range(group.size):
            share = 0.0
            for sign in (1, -1):
                part = np.maximum(sign * w, 0)
                z, mine = np.einsum("ock,ncka->noa", part, u), np.einsum("ok,nka->noa", part[:, j], u[:, j])
                share = max(share, (mine[z > 1e-6 * z.max()] / z[z > 1e-6 * z.max()]).max())
            assert s[j] == pytest.approx(share, rel=1e-4)


def inputs_of(net: onnx.ModelProto, x: Array, consumer: str) -> Array:
    """The windows [n, C, K, P] of a consumer of `nets.convnet`."""
    if consumer == "c2":
        (a,) = nets.run(net, x, "a1")
        return conv_windows(a, [3, 3], {"pads": [1, 1, 1, 1], "strides": [2, 2]}, False)
    (a,) = nets.run(net, x, "a2")
    return a.reshape(len(a), 6, 9, 1).astype(np.float64)


def constant(net: onnx.ModelProto, name: str) -> Array:
    return numpy_helper.to_array(next(t for t in net.graph.initializer if t.name == name))


def test_normalisation_and_bias_matter_through_activations_only() -> None:
    """The sensitivities are those of what the consumer reads, behind BatchNormalization and Relu."""
    rng = np.random.default_rng(29)
    net, x = nets.convnet(rng), rng.standard_normal((4, 3, 6, 6)).astype(np.float32)
    w2, w3 = constant(net, "w2").reshape(6, 8, 9), constant(net, "w3").reshape(5, 6, 9)
    saliency = score(net, x)
    for layer, want in zip(
        saliency.layers,
        [brute(inputs_of(net, x, "c2"), w2, np.arange(8), "sum"), brute(inputs_of(net, x, "out"), w3, np.arange(6), "sum")],
        strict=True,
    ):
        np.testing.assert_allclose(layer.values, want, rtol=1e-4)
    # a factor on the normalised channel is a factor on its activation
    (tensor,) = (t for t in net.graph.initializer if t.name == "b2")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(6, np.float32), "b2"))
    np.testing.assert_array_equal(score(net, x).layers[0].values, saliency.layers[0].values)
    assert not np.array_equal(score(net, x).layers[1].values, saliency.layers[1].values)


@BOTH
def test_half_precision_model(reduce: Reduce) -> None:
    x = np.random.default_rng(30).standard_normal((5, 3, 6, 6)).astype(np.float32)
    full = score(nets.convnet(np.random.default_rng(31)), x, reduce)
    half = score(nets.convnet(np.random.default_rng(31), np.float16), x.astype(np.float16), reduce)
    for a, b in zip(full.layers, half.layers, strict=True):
        assert np.isfinite(b.values).all() and a.events == b.events
        np.testing.assert_allclose(b.values, a.values, rtol=0.02, atol=0.01)


# ---- what calibration hands on


def small(seed: int = 32, criterion: Any = None, rows: slice = slice(None), batch: int | None = None) -> Saliency:
    net = nets.convnet(np.random.default_rng(seed))
    x = np.random.default_rng(33).standard_normal((13, 3, 6, 6)).astype(np.float32)
    criterion = criterion or Sensitivity()
    return calibrate(nets.grouped(net), criterion, nets.samples(net, x), np.arange(13)[rows], batch=batch)


def same(a: Saliency, b: Saliency) -> None:
    for name in ("criterion", "combine", "samples", "options", "model_digest", "data"):
        assert getattr(a, name) == getattr(b, name), name
    for x, y in zip(a.layers, b.layers, strict=True):
        assert (x.layer, x.group, x.events) == (y.layer, y.group, y.events)
        assert x.values.dtype == y.values.dtype == np.float64
        np.testing.assert_array_equal(x.values, y.values)


@pytest.mark.parametrize("criterion", [Sensitivity(), Sensitivity("max"), Activation(), L1(), Random(7)])
def test_save_and_load(criterion: Any, tmp_path: Path) -> None:
    saliency = small(criterion=criterion)
    saliency.save(tmp_path / "calibration.npz")
    loaded = Saliency.load(tmp_path / "calibration.npz")
    same(loaded, saliency)
    assert [p.name for p in tmp_path.iterdir()] == ["calibration.npz"]
    assert saliency.model_digest == digest(nets.convnet(np.random.default_rng(32)))
    if criterion.needs_data:
        merged = loaded.merged(saliency)
        assert merged.samples == 26 and merged.data == (*saliency.data, *saliency.data)


def made(seed: int = 35) -> Saliency:
    """A saliency as `calibrate` might have made it."""
    rng = np.random.default_rng(seed)
    layers = (LayerScore("conv", "a", rng.random(8), 77), LayerScore("gemm", "b#2", rng.random(33), 0))
    return Saliency("pfp", "max", 13, layers, {"reduce": "sum"}, "5e", ("17", "b3"))


def test_saving_twice_replaces_the_file(tmp_path: Path) -> None:
    made(36).save(tmp_path / "c.npz")
    made().save(tmp_path / "c.npz")
    same(Saliency.load(tmp_path / "c.npz"), made())


@BOTH
def test_merged_sensitivities_are_those_of_the_whole(reduce: Reduce) -> None:
    criterion = Sensitivity(reduce)
    whole = small(criterion=criterion, batch=4)
    first, second = (small(criterion=criterion, rows=r, batch=4) for r in (slice(0, 8), slice(8, 13)))
    assert first.data != second.data
    for merged in (first.merged(second), second.merged(first)):
        assert merged.samples == 13 and set(merged.data) == {*first.data, *second.data}
        for a, b, m, n in zip(merged.layers, whole.layers, first.layers, second.layers, strict=True):
            assert a.events == b.events == max(m.events, n.events)
            np.testing.assert_allclose(a.values, b.values, rtol=1e-5)
            np.testing.assert_array_equal(a.values, np.maximum(m.values, n.values))


def test_merged_activations_are_those_of_the_whole() -> None:
    whole = small(criterion=Activation())
    first, second = (small(criterion=Activation(), rows=r) for r in (slice(0, 9), slice(9, 13)))
    for merged in (first.merged(second), second.merged(first)):
        assert merged.samples == 13
        for a, b in zip(merged.layers, whole.layers, strict=True):
            np.testing.assert_allclose(a.values, b.values, rtol=1e-6)
    exact = [(9 * a.values + 4 * b.values) / 13 for a, b in zip(first.layers, second.layers, strict=True)]
    for a, want in zip(first.merged(second).layers, exact, strict=True):
        np.testing.assert_allclose(a.values, want, rtol=1e-12)


def test_merging_scores_without_data_changes_nothing() -> None:
    saliency = small(criterion=L1())
    same(saliency.merged(small(criterion=L1())), saliency)
    assert all((x.values > 0).all() for x in saliency.layers)


def test_merging_is_refused_for_what_does_not_belong_together() -> None:
    one = small()
    for other, word in [
        (small(34), "model"),
        (small(criterion=Sensitivity("max")), "options"),
        (small(criterion=Activation()), "criterion"),
        (dataclasses.replace(one, combine="mean"), "combine"),
        (dataclasses.replace(one, layers=one.layers[:1]), "layers"),
    ]:
        for a, b in ((one, other), (other, one)):
            with pytest.raises(DataError, match=word):
                a.merged(b)
    with pytest.raises(DataError, match="options"):
        small(criterion=Random(1)).merged(small(criterion=Random(2)))


def test_what_is_no_calibration_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.npz"
    made().save(path)
    good = path.read_bytes()
    bad = tmp_path / "bad.npz"
    texts = [b"", b"PK", b"no calibration", good[: len(good) // 2], good[:-30], bytes(len(good)), good[200:]]
    for text in texts:
        bad.write_bytes(text)
        with pytest.raises(DataError, match=r"bad\.npz is not a calibration"):
            Saliency.load(bad)
    np.save(tmp_path / "array.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    for name in ("array.npy", "other.npz"):
        with pytest.raises(DataError, match="is not a calibration"):
            Saliency.load(tmp_path / name)
    with pytest.raises(DataError, match="no such calibration"):
        Saliency.load(tmp_path / "missing.npz")
    with pytest.raises(DataError):
        Saliency.load(tmp_path)


@pytest.mark.parametrize("key", ["criterion", "combine", "samples", "options", "model_digest", "data", "layers"])
def test_header_must_be_complete(key: str, tmp_path: Path) -> None:
    made().save(tmp_path / "c.npz")
    with np.load(tmp_path / "c.npz") as archive:
        arrays = dict(archive)
    header = json.loads(str(arrays.pop("header")))
    del header[key]
    np.savez(tmp_path / "c.npz", header=np.array(json.dumps(header)), **arrays)
    with pytest.raises(DataError, match="is not a calibration"):
        Saliency.load(tmp_path / "c.npz")


def test_damaged_files_are_refused_or_unharmed(tmp_path: Path) -> None:
    saliency = made()
    saliency.save(tmp_path / "c.npz")
    good = (tmp_path / "c.npz").read_bytes()
    rng = np.random.default_rng(35)
    refused = 0
    for place in rng.integers(0, len(good), 150):
        damaged = bytearray(good)
        damaged[place] ^= int(rng.integers(1, 256))
        (tmp_path / "c.npz").write_bytes(damaged)
        try:
            same(Saliency.load(tmp_path / "c.npz"), saliency)
        except DataError:
            refused += 1
    assert refused > 75


def test_nothing_to_score() -> None:
    """A network without channels to prune has an empty calibration."""
    net = nets.model([("Relu", "in", "out")], {"in": ["N", 3]}, "out")
    assert score(net, np.ones((4, 3), np.float32)).layers == ()
    frozen = nets.model([("MatMul", "in w", "out")], {"in": ["N", 3]}, "out", {"w": np.eye(3)})
    assert score(frozen, np.ones((4, 3), np.float32)).layers == ()
    assert consumers(nets.grouped(frozen)) == []


def test_numbers_that_are_none_are_refused() -> None:
    """A half-precision model that overflows, say: its shares would be nonsense."""
    nodes = [("MatMul", "in w", "a"), ("MatMul", "a v", "out")]
    net = nets.model(nodes, {"in": ["N", 3]}, "out", {"w": np.full((3, 4), 300.0), "v": np.eye(4)}, np.float16)
    assert score(net, np.ones((2, 3), np.float16)).layers[0].values.max() == 1
    with pytest.raises(ModelError, match="tensor 'a' is NaN or infinite"):
        score(net, np.array([[1, 1, 1], [100, 100, 100]], np.float16))


def test_best_over_consumers_and_groups_without_any() -> None:
    net = nets.convnet(np.random.default_rng(36))
    first, second = nets.grouped(net).prunable
    layers = (LayerScore("p", first.id, np.arange(8.0), 5), LayerScore("q", first.id, np.arange(8.0)[::-1], 7))
    saliency = Saliency("pfp", "max", 1, layers)
    np.testing.assert_array_equal(saliency.of(first), [7, 6, 5, 4, 4, 5, 6, 7])
    np.testing.assert_array_equal(saliency.of(second), np.zeros(6))
    assert saliency.events(first) == 12 and saliency.events(second) == 1


# ---- the plain criteria


def norms(w: Array, name: str) -> Array:
    """Scores of filters [O, ...] straight from the definitions."""
    rows = [np.asarray(filter_, np.float64).ravel() for filter_ in w]
    if name == "fpgm":
        return np.array([sum(np.linalg.norm(a - b) for b in rows) for a in rows])
    return np.array([np.abs(a).sum() if name == "l1" else np.sqrt((a * a).sum()) for a in rows])


def plain(criterion: Any, net: onnx.ModelProto) -> dict[str, Array]:
    groups = nets.grouped(net)
    saliency = calibrate(groups, criterion)
    assert saliency.samples == 0 and saliency.data == () and not criterion.needs_data and not criterion.provable
    return {g.id: saliency.of(g) for g in groups.prunable}


@pytest.mark.parametrize("criterion", [L1(), L2(), FPGM()])
def test_filter_norms(criterion: Any) -> None:
    net = nets.convnet(np.random.default_rng(37))
    first, second = plain(criterion, net).values()
    np.testing.assert_allclose(first, norms(constant(net, "w1"), criterion.name), rtol=1e-6)
    np.testing.assert_allclose(second, norms(constant(net, "w2"), criterion.name), rtol=1e-6)


@pytest.mark.parametrize("criterion", [L1(), L2(), FPGM()])
def test_filter_norms_add_up_over_producers(criterion: Any) -> None:
    net = nets.residual(np.random.default_rng(38))
    (found,) = plain(criterion, net).values()
    want = norms(constant(net, "wa"), criterion.name) + norms(constant(net, "wb"), criterion.name)
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("criterion", [L1(), L2(), FPGM()])
@pytest.mark.parametrize("transposed", [False, True])
def test_filter_norms_of_matrices_and_transposed_convolutions(transposed: bool, criterion: Any) -> None:
    rng = np.random.default_rng(39)
    if transposed:
        w = rng.standard_normal((3, 5, 2)).astype(np.float32)  # [C, O, K]
        nodes = [("ConvTranspose", "in w", "a"), ("Conv", "a v", "out")]
        net = nets.model(nodes, {"in": ["N", 3, 4]}, "out", {"w": w, "v": rng.standard_normal((2, 5, 1))})
    else:
        w = rng.standard_normal((3, 5)).astype(np.float32)
        net = nets.model(
            [("MatMul", "in w", "a"), ("MatMul", "a v", "out")],
            {"in": ["N", 3]},
            "out",
            {"w": w, "v": rng.standard_normal((5, 2))},
        )
    (found,) = plain(criterion, net).values()
    np.testing.assert_allclose(found, norms(np.swapaxes(w, 0, 1), criterion.name), rtol=1e-6)


@pytest.mark.parametrize("criterion", [L1(), L2(), FPGM()])
def test_norm_of_a_channel_with_a_filter_in_every_group(criterion: Any) -> None:
    """A wide grouped convolution in front of another: channel j has the filters j and j + 4."""
    rng = np.random.default_rng(40)
    w = rng.standard_normal((8, 3, 1)).astype(np.float32)
    weights = {"w": w, "v": rng.standard_normal((6, 4, 1))}
    nodes = [("Conv", "in w", "a"), ("Conv", "a v", "out", {"group": 2})]
    (found,) = plain(criterion, nets.model(nodes, {"in": ["N", 3, 4]}, "out", weights)).values()
    np.testing.assert_allclose(found, norms(np.concatenate([w[:4], w[4:]], axis=1), criterion.name), rtol=1e-6)


def test_mean_activation() -> None:
    rng = np.random.default_rng(41)
    net, x = nets.convnet(rng), rng.standard_normal((7, 3, 6, 6)).astype(np.float32)
    groups = nets.grouped(net)
    saliency = calibrate(groups, Activation(), nets.samples(net, x), batch=3)
    a1, a2 = (a.astype(np.float64) for a in nets.run(net, x, "a1", "a2"))
    for group, a in zip(groups.prunable, (a1, a2), strict=True):
        np.testing.assert_allclose(saliency.of(group), np.abs(a).mean(axis=(0, 2, 3)), rtol=1e-5)
        assert saliency.events(group) == 1
    signed = nets.residual(rng)
    groups = nets.grouped(signed)
    x = rng.standard_normal((4, 3, 5, 5)).astype(np.float32)
    saliency = calibrate(groups, Activation(), nets.samples(signed, x))
    ra, rs = (np.abs(a).mean(axis=(0, 2, 3)) for a in nets.run(signed, x, "ra", "rs"))
    np.testing.assert_allclose(saliency.of(groups.prunable[0]), np.maximum(ra, rs), rtol=1e-5)


def test_mean_activation_of_signed_values_and_many_positions() -> None:
    rng = np.random.default_rng(42)
    x = draw(rng, (3, 4, 2, 3), True)
    nodes = [("Conv", "in unit", "a"), ("Flatten", "a", "f"), ("MatMul", "f w", "out")]
    net = nets.model(nodes, {"in": ["N", 4, 2, 3]}, "out", {"unit": nets.unit(4, 2), "w": rng.standard_normal((24, 2))})
    groups = nets.grouped(net)
    saliency = calibrate(groups, Activation(), nets.samples(net, x))
    np.testing.assert_allclose(saliency.of(groups.prunable[0]), np.abs(x).mean(axis=(0, 2, 3)), rtol=1e-6)


def test_chance_depends_on_the_seed_alone() -> None:
    net = nets.convnet(np.random.default_rng(43))
    again = nets.convnet(np.random.default_rng(44))  # other weights, the same groups
    first, other = plain(Random(1), net), plain(Random(2), net)
    assert first.keys() == other.keys()
    for name, s in first.items():
        np.testing.assert_array_equal(s, plain(Random(1), again)[name])
        assert not np.array_equal(s, other[name])
        assert s.min() >= 0 and s.max() < 1 and len(np.unique(s)) == len(s)
    a, b = first.values()
    assert not np.array_equal(a[: len(b)], b)
