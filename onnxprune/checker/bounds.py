"""The network bound once more, operator by operator on arrays, with weights that are silenced here, by the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxprune import runtime
from onnxprune.checker.numbers import same
from onnxprune.data import Samples
from onnxprune.errors import ModelError
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.imported import Imported

ROUNDING = 1e-5  # of the largest output
CLOSE = 2e-3  # relative: float32, operators fused here and not there
MOVES = (
    *("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "Expand", "Tile"),
    *("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum", "DepthToSpace", "SpaceToDepth"),
)
RISES = ("Relu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "Exp", "MaxPool", "GlobalMaxPool", "ReduceMax", "Max", "Min", "Erf")
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class Unsupported(Exception):  # noqa: N818 - no error: it says what was left unchecked
    """An operator that this module does not follow."""


def check(part: Mapping[str, Any], told: Mapping[str, Any], imported: Imported, found: tuple[Samples, Array]) -> Iterator[str]:
    """Compares the bounds of a certificate with those found here. told: the whole certificate, of which the plan is taken."""
    samples, chosen = found
    fixed = next((s.shape[0] for s in imported.specs if s.shape and s.shape[0]), None)
    size = fixed or len(chosen)
    limits: dict[str, list[tuple[Array, Array]]] = {}
    try:
        for start in range(0, len(chosen), size):
            at = chosen[start : start + size]
            walk = _Walk(imported.groups, told["plan"], samples.batch(np.resize(at, fixed) if fixed else at))
            for name, entry in part["outputs"].items():
                if "absent" not in entry:
                    limits.setdefault(name, []).append((walk.values[name].astype(np.float64), walk.error(name)))
    except (Unsupported, ModelError) as reason:
        yield f"network: moves as measured, and within the bound; the bound itself was not computed again: {reason}"
        return
    for name, runs in limits.items():
        allowance = ROUNDING * max(float(np.abs(y).max()) for y, _ in runs)
        largest = max(float((e + allowance).max()) for _, e in runs)
        relative = max(float((_norm(e + allowance) / _norm(y)).max()) for y, e in runs)
        same(part["outputs"][name]["max_abs_bound"], largest, f"network: the bound for '{name}'", CLOSE)
        same(part["outputs"][name]["relative_l2_bound"], relative, f"network: the relative bound for '{name}'", CLOSE)
    yield f"network: moves as measured, and the bounds of {len(limits)} outputs are those computed anew"


def _norm(value: Array) -> Array:
    rows = value.reshape(len(value) if value.ndim else 1, -1)
    return np.asarray(np.maximum(np.sqrt((rows**2).sum(axis=1)), np.finfo(np.float64).tiny))


class _Walk:
    """Values and errors of all tensors for one batch."""

    def __init__(self, groups: Groups, plan: Mapping[str, Any], feeds: Mapping[str, Array]) -> None:
        self.groups, self.plan, self.net = groups, plan, groups.net
        if self.net.inside.followed or any(r == "silencer" for r in groups.roles.values()):
            raise Unsupported("control flow, or products of activations")
        made = [o for n in self.net.model.graph.node for o in n.output if o and o not in self.net.fixed]
        session = runtime.session(runtime.with_outputs(self.net.model, made))
        read = {x for n in self.net.model.graph.node for x in n.input if x in self.net.fixed}
        self.values: dict[str, Array] = {**runtime.fixed_values(self.net, read), **feeds}
        self.values |= dict(zip(made, runtime.run(session, feeds, made), strict=True))
        self._errors: dict[str, Array] = {}
        for index in self.net.order:
            node = self.net.model.graph.node[index]
            if not all(o in self.net.fixed for o in node.output if o):
                self._step(index, node)

    def error(self, name: str) -> Array:
        """The bound for a tensor; zeros where no cut reaches it."""
        return self._errors.get(name, np.zeros(self.values[name].shape))

    def _step(self, index: int, node: onnx.NodeProto) -> None:
        hot = [x for x in node.input if x in self._errors]
        changed = [x for x in node.input if x in self.net.fixed and x in self.silenced]
        if (not hot and not changed) or node.op_type in ("Shape", "Size"):
            return
        rule = _RULES.get(node.op_type)
        if rule is None or (changed and node.op_type not in PRODUCTS) or node.domain not in ("", "ai.onnx"):
            raise Unsupported(f"{node.op_type} '{self.net.label(index)}'")
        for name, found in zip(node.output, rule(self, index, node), strict=False):
            self._errors[name] = np.broadcast_to(np.asarray(found, np.float64), self.values[name].shape)

    @cached_property
    def silenced(self) -> dict[str, Array]:
        """The constants that a layer reads with the dropped slices 0 and the kept ones reweighted, where that changes them."""
        direct: dict[str, Array] = {}
        for dim, found in self.groups.at.items():
            if self.groups.roles.get(dim) != "consumer" or dim.tensor not in self.net.initializers:
                continue
            factor = np.ones(self.groups.full(dim))
            for group, slot in found:
                if group.id in self.plan:
                    entry, weight = self.plan[group.id], np.zeros(group.size)
                    weight[entry["kept"]] = 1.0 if entry.get("scale") is None else entry["scale"]
                    factor[slot.positions] = weight[slot.channels]
            if (factor != 1).any():
                value = direct.get(dim.tensor)
                value = self.net.array(dim.tensor) if value is None else value
                assert value is not None
                shape = [1] * value.ndim
                shape[dim.axis] = -1
                direct[dim.tensor] = value.astype(np.float64) * factor.reshape(shape)
        return direct | self._behind(direct)

    def _behind(self, direct: Mapping[str, Array]) -> dict[str, Array]:
        """Weights that are a transposed copy of a constant."""
        found: dict[str, Array] = {}
        for index in self.net.order:
            node = self.net.model.graph.node[index]
            if node.output[0] in self.net.fixed and any(x in direct or x in found for x in node.input):
                if node.op_type not in ("Transpose", "Identity"):
                    raise Unsupported(f"weights behind {node.op_type}")
                value = direct.get(node.input[0], found.get(node.input[0]))
                assert value is not None
                order = self.net.nodes[index].attrs.get("perm", list(range(value.ndim))[::-1])
                found[node.output[0]] = value.transpose(order) if node.op_type == "Transpose" else value
        return found

    def ask(self, node: onnx.NodeProto, inputs: list[Array | None]) -> list[Array]:
        """What the operator makes of other inputs (None: as they are)."""
        arrays = [self.values.get(x) if v is None else v for x, v in zip(node.input, inputs, strict=True)]
        alone = onnx.NodeProto()
        alone.CopyFrom(node)
        alone.input[:] = [f"i{k}" if a is not None else "" for k, a in enumerate(arrays)]
        feeds = {f"i{k}": np.asarray(a, self._type(node.input[k], a)) for k, a in enumerate(arrays) if a is not None}
        kinds = [helper.make_tensor_value_info(k, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape) for k, v in feeds.items()]
        outputs = [onnx.ValueInfoProto(name=o) for o in node.output if o]
        model = helper.make_model(helper.make_graph([alone], "one", kinds, outputs), opset_imports=self.net.model.opset_import)
        model.ir_version = max(4, self.net.model.ir_version)
        return runtime.run(runtime.session(model, optimise=False), feeds)

    def _type(self, name: str, value: Array) -> np.dtype[Any]:
        known = self.values.get(name)
        return np.dtype(value.dtype if known is None else known.dtype)


def _moves(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    if any(x in walk._errors for x in node.input[1:]):
        raise Unsupported(f"{node.op_type} with a computed operand")
    return walk.ask(node, [walk.error(node.input[0]), *[None] * (len(node.input) - 1)])


def _rises(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    if any(float(v) < 0 for k, v in walk.net.nodes[index].attrs.items() if k == "alpha"):
        raise Unsupported(f"{node.op_type} that falls")
    out = walk.values[node.output[0]].astype(np.float64)
    sides = [
        walk.ask(node, [walk.values[x] + s * walk._errors[x] if x in walk._errors else None for x in node.input])[0]
        for s in (1, -1)
    ]
    return [np.maximum(sides[0] - out, out - sides[1])]


def _joined(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    return walk.ask(node, [walk.error(x) for x in node.input])


def _padded(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    del alone.attribute[:]
    alone.attribute.extend(a for a in node.attribute if a.name != "value")
    del alone.input[2:]
    return walk.ask(alone, [walk.error(node.input[0]), *[None] * (len(alone.input) - 1)])


def _sums(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    return [sum((walk._errors[x] for x in node.input if x in walk._errors), np.zeros(()))]


def _times(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    a, b = (np.abs(walk.values[x].astype(np.float64)) for x in node.input)
    ea, eb = (walk.error(x) for x in node.input)
    return [a * eb + b * ea + ea * eb]


def _over(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    if node.input[1] in walk._errors:
        raise Unsupported("division by an error")
    return [walk.error(node.input[0]) / np.abs(walk.values[node.input[1]].astype(np.float64))]


def _normalised(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    scale, _, _, variance = (walk.values[x].astype(np.float64) for x in node.input[1:5])
    slope = np.abs(scale) / np.sqrt(variance + walk.net.nodes[index].attrs.get("epsilon", 1e-5))
    error = walk.error(node.input[0])
    return [error * slope.reshape(1, -1, *[1] * (error.ndim - 2))]


def _softmax(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    """p e^t/(p e^t + 1 - p) and the same with -t, where all logits move by t/2 at most."""
    rank, old = walk.values[node.output[0]].ndim, walk.net.opset < 13
    axis = walk.net.nodes[index].attrs.get("axis", 1 if old else -1) % rank
    most = walk.error(node.input[0]).max(axis=tuple(range(axis, rank)) if old else axis, keepdims=True)
    p, t = walk.values[node.output[0]].astype(np.float64), np.exp(2 * np.minimum(most, 40.0))
    up, down = p * t / (p * t + 1 - p), p / (p + (1 - p) * t)
    return [np.where(most < 40.0, np.maximum(up - p, p - down), 1.0)]


def _product(walk: _Walk, index: int, node: onnx.NodeProto) -> list[Array]:
    a, w = node.input[:2]
    if w not in walk.net.fixed:
        raise Unsupported(f"{node.op_type} with computed weights")
    before = walk.values[w].astype(np.float64)
    after = walk.silenced.get(w, before)
    none = [np.zeros_like(walk.values[node.input[2]])] if len(node.input) > 2 else []
    total: Array = np.zeros(())
    if after is not before:
        total = total + np.abs(walk.ask(node, [None, after - before, *none])[0])
    if a in walk._errors:
        total = total + np.abs(walk.ask(node, [walk._errors[a], np.abs(after), *none])[0])
    return [total]


_RULES: dict[str, Callable[[_Walk, int, onnx.NodeProto], list[Array]]] = {
    **dict.fromkeys(MOVES, _moves),
    **dict.fromkeys(RISES, _rises),
    **dict.fromkeys(PRODUCTS, _product),
    **dict.fromkeys(("Add", "Sub", "Sum"), _sums),
    "LeakyRelu": _rises,
    "Concat": _joined,
    "Pad": _padded,
    "Mul": _times,
    "Div": _over,
    "BatchNormalization": _normalised,
    "Softmax": _softmax,
}
