"""Where a pruned model has weights that can be solved for: the layer, where its bias goes, what its output meets next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxprune import weights
from onnxprune.channels import Dim, Index
from onnxprune.control import captured
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.plan import Plan
from onnxprune.recovery.linear import SOLVABLE, Linear
from onnxprune.rules import Layer

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class Home:
    """The constant that takes up a shift of a layer's output, and by what the shift is multiplied there."""

    tensor: str
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Path:
    """The way of a layer's output z to what else it meets, none of it read by anybody else.

    sum: the tensor gain * z + shift (+ rest), [outputs] each. rest: the tensor that is added. low, high: how the operator
    that reads `sum` clips it (Relu: 0 and infinity); infinite where it does not, or `sum` has other readers.
    """

    sum: str
    gain: Array
    shift: Array
    rest: str | None = None
    low: float = -np.inf
    high: float = np.inf

    @property
    def clips(self) -> bool:
        return bool(np.isfinite(self.low) or np.isfinite(self.high))


@dataclass(frozen=True, eq=False)
class Site:
    """One layer of a pruned model that can be given new weights.

    node: its number in the pruned graph. x, out: the tensors that it reads and makes. kept: the channels of the original's
    output that it still makes. weight: as the cut has left it. bias: what the layer itself adds to its sums, [outputs].
    home: None where no constant can shift its output.
    """

    layer: Layer
    node: int
    x: str
    out: str
    linear: Linear
    tensor: str
    weight: Array
    kept: Index
    bias: Array
    home: Home | None
    path: Path

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an output without its channel axis, in which rows are counted."""
        return (shape[0], *shape[2:]) if self.linear.convolution else shape[:-1]

    def write(self, model: onnx.ModelProto, weight: Array, bias: Array, scratch: weights.Scratch | None) -> None:
        """Sets the weight, and by way of `home` the output's means. bias: what the layer itself would have to add."""
        protos = {t.name: t for t in model.graph.initializer}
        _set(protos[self.tensor], weight, scratch)
        if self.home is not None:
            old = np.asarray(weights.array(protos[self.home.tensor]), np.float64)
            _set(protos[self.home.tensor], old + (self.home.factor * (bias - self.bias)).reshape(old.shape), scratch)


def _set(proto: onnx.TensorProto, value: Array, scratch: weights.Scratch | None) -> None:
    name, doc = proto.name, proto.doc_string
    proto.CopyFrom(weights.tensor_of(value, proto.data_type, scratch))
    proto.name = name
    if doc:
        proto.doc_string = doc


def sites(groups: Groups, plan: Plan, model: onnx.ModelProto) -> tuple[list[Site], dict[str, str]]:
    """(the layers of a pruned model that can be solved for, for every other one the reason why not)."""
    finder = _Finder(groups, plan, model)
    found, reasons = [], {}
    for layer in groups.layers:
        site = finder.site(layer)
        if isinstance(site, Site):
            found.append(site)
        else:
            reasons[layer.name] = site
    return found, reasons


@dataclass
class _Walk:
    """How far a layer's output has been followed."""

    tensor: str
    gain: Array
    shift: Array
    rest: str | None = None
    passed: list[int] = field(default_factory=list)


class _Finder:
    def __init__(self, groups: Groups, plan: Plan, model: onnx.ModelProto) -> None:
        self.groups = groups
        self.removed = groups.removed({name: k.indices for name, k in plan.groups.items()})
        self.nodes = model.graph.node
        self.protos = {t.name: t for t in model.graph.initializer}
        self.producer = {o: i for i, n in enumerate(self.nodes) for o in n.output if o}
        self.readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in [*node.input, *captured(node)]:
                if name:
                    self.readers.setdefault(name, []).append(i)
        for output in model.graph.output:
            self.readers.setdefault(output.name, []).append(-1)

    def site(self, layer: Layer) -> Site | str:
        """The layer as a site, or why it is none."""
        index = self.producer.get(layer.out.tensor)
        if layer.op not in SOLVABLE:
            return f"{layer.op} is not solved for"
        if index is None or self.nodes[index].op_type != layer.op:
            return "it lies in a body, or surgery has made another operator of it"
        node = self.nodes[index]
        proto = self.protos.get(node.input[1])
        if proto is None or proto.data_type not in FLOATS or layer.steps is not None:
            return "its weight is computed, or not floating-point"
        if not self._alone(node.input[1]):
            return "its weight is shared"
        linear = Linear(layer.op, tuple(proto.dims), _attributes(node))
        axis = 1 if linear.convolution else len(self.groups.net.shapes[layer.out.tensor]) - 1
        if not linear.understood or layer.out.axis != axis or node.input[0] != layer.x.tensor:
            return "its geometry is not understood"
        bias = self._bias(node, linear)
        if bias is None:
            return "its bias is computed"
        home = self._home(node, linear)
        path = self._path(layer.out, linear.outs)
        kept = self._kept(layer.out)
        return Site(
            layer, index, node.input[0], layer.out.tensor, linear, proto.name, weights.array(proto), kept, bias, home, path
        )

    def _kept(self, dim: Dim) -> Index:
        every = np.arange(self.groups.full(dim))
        return np.delete(every, self.removed[dim]) if dim in self.removed else every

    def _alone(self, name: str) -> bool:
        return name in self.protos and len(self.readers.get(name, ())) == 1

    def _only_reader(self, tensor: str) -> int | None:
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and readers[0] >= 0 else None

    def _constant(self, name: str) -> Array:
        return np.asarray(weights.array(self.protos[name]), np.float64)

    def _value(self, name: str) -> Array | None:
        return self._constant(name) if name in self.protos else None

    def _bias(self, node: onnx.NodeProto, linear: Linear) -> Array | None:
        """What the layer itself adds to its sums; None where that is not a constant."""
        if len(node.input) < 3 or not node.input[2]:
            return np.zeros(linear.outs)
        value = self._value(node.input[2])
        if value is None or value.size not in (1, linear.outs):
            return None
        return np.broadcast_to(float(_attributes(node).get("beta", 1.0)) * value.reshape(-1), (linear.outs,))

    def _home(self, node: onnx.NodeProto, linear: Linear) -> Home | None:
        """Its own bias, else the mean of the batch normalisation or the constant of the Add that alone reads it."""
        beta = float(_attributes(node).get("beta", 1.0))
        if len(node.input) > 2 and self._alone(node.input[2]) and self._entries(node.input[2]) == linear.outs and beta:
            return Home(node.input[2], 1 / beta)
        index = self._only_reader(node.output[0])
        reader = None if index is None else self.nodes[index]
        if reader is not None and self._normalises(reader, node.output[0]) and self._alone(reader.input[3]):
            return Home(reader.input[3], -1.0)
        if reader is not None and reader.op_type == "Add":
            other = _other(reader, node.output[0])
            if self._alone(other) and self._per_channel(other, linear.outs, len(linear.taps)):
                return Home(other)
        return None

    def _entries(self, name: str) -> int:
        return int(np.prod(self.protos[name].dims))

    def _per_channel(self, name: str, count: int, behind: int) -> bool:
        """Whether a constant has one entry for each channel, which has `behind` axes behind it."""
        dims = list(self.protos[name].dims)
        return self._entries(name) == count and dims[len(dims) - 1 - behind :] == [count, *[1] * behind]

    def _normalises(self, node: onnx.NodeProto, tensor: str) -> bool:
        """Whether a node is a batch normalisation of the tensor by constants."""
        known = node.op_type == "BatchNormalization" and node.input[0] == tensor and not _attributes(node).get("training_mode")
        return known and all(x in self.protos for x in node.input[1:5])

    def _path(self, out: Dim, outs: int) -> Path:
        walk = _Walk(out.tensor, np.ones(outs), np.zeros(outs))
        behind = len(self.groups.net.shapes[out.tensor]) - 1 - out.axis
        while (index := self._only_reader(walk.tensor)) is not None and self._step(walk, self.nodes[index], out, behind):
            walk.passed.append(index)
        index = self._only_reader(walk.tensor)
        low, high = (-np.inf, np.inf) if index is None else self._clip(self.nodes[index], walk.tensor)
        if not (np.abs(walk.gain) > LEAST_GAIN).all():  # what the output loses on its way says nothing of it
            return Path(out.tensor, np.ones(outs), np.zeros(outs))
        return Path(walk.tensor, walk.gain, walk.shift, walk.rest, low, high)

    def _step(self, walk: _Walk, node: onnx.NodeProto, out: Dim, behind: int) -> bool:
        """Follows the output through one node; False where it cannot be followed."""
        if self._normalises(node, walk.tensor):
            scale, shift, mean, variance = (self._constant(x) for x in node.input[1:5])
            gain = scale / np.sqrt(variance + float(_attributes(node).get("epsilon", 1e-5)))
            walk.gain, walk.shift = walk.gain * gain, (walk.shift - mean) * gain + shift
        elif node.op_type == "Add" and len(set(node.input)) == 2:
            other = _other(node, walk.tensor)
            if other in self.protos:
                if not self._per_channel(other, len(walk.shift), behind):
                    return False
                walk.shift = walk.shift + self._constant(other).reshape(-1)
            elif walk.rest is None and self._alike(other, out):
                walk.rest = other
            else:
                return False
        elif node.op_type != "Identity":
            return False
        walk.tensor = node.output[0]
        return True

    def _alike(self, tensor: str, out: Dim) -> bool:
        """Whether a tensor has the shape of the layer's output, before and after the cut."""
        shapes = self.groups.net.shapes
        if shapes.get(tensor) != shapes[out.tensor]:
            return False
        return bool(np.array_equal(self._kept(Dim(tensor, out.axis)), self._kept(out)))

    def _clip(self, node: onnx.NodeProto, tensor: str) -> tuple[float, float]:
        """Below and above what a node makes no difference (Relu, Clip by constants)."""
        if node.op_type == "Relu":
            return 0.0, np.inf
        if node.op_type != "Clip" or node.input[0] != tensor:
            return -np.inf, np.inf
        attributes = _attributes(node)
        bounds = []
        for i, (name, none) in enumerate((("min", -np.inf), ("max", np.inf)), 1):
            if len(node.input) > i and node.input[i]:
                value = self._value(node.input[i])
                bounds.append(none if value is None else float(value.reshape(-1)[0]))
            else:
                bounds.append(float(attributes.get(name, none)))
        return bounds[0], bounds[1]


def _attributes(node: onnx.NodeProto) -> Mapping[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def _other(node: onnx.NodeProto, tensor: str) -> str:
    return str(node.input[1] if node.input[0] == tensor else node.input[0])
