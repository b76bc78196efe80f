"""Where a pruned model has weights that can be solved for: the layer, where its bias goes, what its output meets next."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxprune import weights
from onnxprune.channels import Dim, Index
from onnxprune.control import captured
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.inline import constant_value
from onnxprune.plan import Plan
from onnxprune.recovery.linear import SOLVABLE, Linear
from onnxprune.rules import Layer

FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE)
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class Home:
    """The constant that takes up a shift of a layer's output, and by what the shift is multiplied there.

    use: (node, position of its input) that reads it there. shared: others read it too, as exporters merge equal constants.
    """

    tensor: str
    use: tuple[int, int]
    factor: float = 1.0
    shared: bool = False


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
        protos = constants(model)
        _set(model, protos[self.tensor], self.tensor, weight, scratch)
        if self.home is None:
            return
        proto = protos[self.home.tensor]
        old = np.asarray(weights.array(proto), np.float64)
        shifted = old + (self.home.factor * (bias - self.bias)).reshape(old.shape)
        if self.home.shared:
            node, position = self.home.use
            model.graph.node[node].input[position] = _add(model, proto, self.home.tensor, shifted, scratch)
        else:
            _set(model, proto, self.home.tensor, shifted, scratch)


def constants(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The constants of a model's graph, by name: initializers, Constant nodes, and what an Identity makes of one of them."""
    found = {t.name: t for t in model.graph.initializer}
    copies = {}
    for node in model.graph.node:
        if node.op_type == "Constant" and (value := constant_value(node)) is not None:
            found[node.output[0]] = value
        elif node.op_type == "Identity":
            copies[node.output[0]] = node.input[0]
    for name in copies:
        source = name
        while source in copies:
            source = copies[source]
        if source in found:
            found[name] = found[source]
    return found


def _add(model: onnx.ModelProto, like: onnx.TensorProto, name: str, value: Array, scratch: weights.Scratch | None) -> str:
    """A new initializer named after another constant; returns its name."""
    taken = {t.name for t in model.graph.initializer} | {v.name for v in model.graph.input}
    taken |= {o for n in model.graph.node for o in n.output}
    number = 1
    while (fresh := f"{name}.{number}") in taken:
        number += 1
    made = weights.tensor_of(value, like.data_type, scratch)
    made.name = fresh
    model.graph.initializer.append(made)
    if model.ir_version < 4:  # until then every initializer had to be a graph input too
        model.graph.input.append(onnx.helper.make_tensor_value_info(fresh, made.data_type, list(made.dims)))
    return fresh


def _set(model: onnx.ModelProto, proto: onnx.TensorProto, name: str, value: Array, scratch: weights.Scratch | None) -> None:
    """Gives a constant another value, where it stands: in an initializer, in a Constant node, or behind Identities."""
    maker = next((n for n in model.graph.node if name in n.output), None)
    while maker is not None and maker.op_type == "Identity":
        name = maker.input[0]
        maker = next((n for n in model.graph.node if name in n.output), None)
    old, doc = proto.name, proto.doc_string
    made = weights.tensor_of(value, proto.data_type, scratch)
    made.name = old
    if doc:
        made.doc_string = doc
    if maker is None:
        next(t for t in model.graph.initializer if t.name == name).CopyFrom(made)
        return
    del maker.attribute[:]
    maker.attribute.append(onnx.helper.make_attribute("value", made))


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


class _Finder:
    def __init__(self, groups: Groups, plan: Plan, model: onnx.ModelProto) -> None:
        self.groups = groups
        self.removed = groups.removed({name: k.indices for name, k in plan.groups.items()})
        self.nodes = model.graph.node
        self.protos = constants(model)
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
        home = self._home(index, linear)
        path = self._path(layer.out, linear.outs)
        kept = self._kept(layer.out)
        return Site(
            layer, index, node.input[0], layer.out.tensor, linear, node.input[1], weights.array(proto), kept, bias, home, path
        )

    def _kept(self, dim: Dim) -> Index:
        every = np.arange(self.groups.full(dim))
        return np.delete(every, self.removed[dim]) if dim in self.removed else every

    def _alone(self, name: str) -> bool:
        """Whether nobody else reads a constant, also where Identities lead to it."""
        if name not in self.protos or len(self.readers.get(name, ())) != 1:
            return False
        maker = self.producer.get(name)
        return maker is None or self.nodes[maker].op_type != "Identity" or self._alone(self.nodes[maker].input[0])

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

    def _home(self, index: int, linear: Linear) -> Home | None:
        """Its own bias, else the mean of the batch normalisation or the constant of the Add that alone reads it."""
        node = self.nodes[index]
        beta = float(_attributes(node).get("beta", 1.0))
        if len(node.input) > 2 and node.input[2] in self.protos and self._entries(node.input[2]) == linear.outs and beta:
            return self._as_home((index, 2), 1 / beta)
        following = self._only_reader(node.output[0])
        if following is None:
            return None
        reader = self.nodes[following]
        if self._normalises(reader, node.output[0]):
            return self._as_home((following, 3), -1.0)
        if reader.op_type == "Add":
            other = _other(reader, node.output[0])
            if other in self.protos and self._per_channel(other, linear.outs, len(linear.taps)):
                return self._as_home((following, list(reader.input).index(other)))
        return None

    def _as_home(self, use: tuple[int, int], factor: float = 1.0) -> Home:
        name = str(self.nodes[use[0]].input[use[1]])
        return Home(name, use, factor, shared=not self._alone(name))

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
            pass
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
