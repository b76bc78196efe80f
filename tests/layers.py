"""Layers whose sensitivities are known: a brute-force reference in float64, and small networks to calibrate."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from onnxprune.criteria import Sensitivity, shares
from onnxprune.criteria.base import Reduce
from onnxprune.criteria.pfp import SINGLE, TOLERANCE
from onnxprune.passes.calibrate import calibrate
from onnxprune.saliency import Saliency

Array = np.ndarray[Any, Any]
BOTH = pytest.mark.parametrize("reduce", ["sum", "max"])
KERNELS = ["sum", "max", "graph sum", "graph max"]
WITH_BOUNDS = [*KERNELS, "bound sum", "bound max"]
EACH = pytest.mark.parametrize("kernel", KERNELS)
EACH_AND_BOUNDS = pytest.mark.parametrize("kernel", WITH_BOUNDS)


class GraphSensitivity(Sensitivity):
    """As other providers than the CPU compute it."""

    @property
    def engine(self) -> shares.Shares:  # type: ignore[override]
        return shares.Shares(self._reduce)


def made_by(kernel: str) -> Sensitivity:
    reduce: Reduce = "max" if kernel.endswith("max") else "sum"
    if kernel.startswith("graph"):
        return GraphSensitivity(reduce)
    return Sensitivity(reduce, mode="bound" if kernel.startswith("bound") else "exact")


def above(case: Case, reduce: Reduce) -> float:
    """By how much an upper bound may exceed the sensitivity: less where filters have one tap."""
    return SINGLE if case.w.shape[-1] == 1 or reduce == "max" else TOLERANCE


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
        if kernel.startswith("bound"):
            assert (got >= want * (1 - 1e-5)).all()
            assert (got <= want * (1 + above(case, reduce) + 1e-5)).all()
        else:
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


def constant(net: onnx.ModelProto, name: str) -> Array:
    return numpy_helper.to_array(next(t for t in net.graph.initializer if t.name == name))


def rows_case(net: onnx.ModelProto, x: Array, rows: Array, w: Array, *owners: Array) -> Case:
    """A layer that multiplies rows [n, C] with w [O, C]."""
    return Case(net, x, rows[:, :, None, None], w[:, :, None], owners or (np.arange(rows.shape[1]),))


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
