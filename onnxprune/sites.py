"""Where a pruned model has weights that can be solved for: the layer in it, what it should make, where its bias goes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx

from onnxprune import weights
from onnxprune.channels import Dim, Index
from onnxprune.control import captured
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.linear import SOLVABLE, Linear
from onnxprune.plan import Plan
from onnxprune.rules import Layer


@dataclass(frozen=True, eq=False)
class Home:
    """The constant that can take up a change of a layer's output means.

    The constant changes by `factor` times the change: 1 for a bias, -1 for the mean of a batch normalisation.
    """

    tensor: str
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Site:
    """One layer of a pruned model that least squares can give new weights.

    node: its number in the pruned graph. x, out: what it reads and makes. kept: the channels of the original that it still
    makes. bias: of the layer itself, [outputs]. home: None where no constant shifts its outputs. rest: a tensor to which
    `gain` times its output is added; rest_kept: the channels of it that stay.
    """

    layer: Layer
    node: int
    x: str
    out: str
    linear: Linear
    weight_name: str
    weight: Array
    kept: Index
    bias: Array
    home: Home | None
    rest: str | None = None
    rest_kept: Index | None = None
    gain: Array | float = 1.0

    @property
    def movable(self) -> bool:
        return self.home is not None

    def rows(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of an output without its channel axis, in which rows are counted."""
        return (shape[0], *shape[2:]) if self.linear.convolution else shape[:-1]

    def write(self, model: onnx.ModelProto, weight: Array, bias: Array) -> None:
        """Sets the weight, and the output means by way of `home`; bias: what the layer's own would be."""
        protos = {t.name: t for t in model.graph.initializer}
        _set(protos[self.weight_name], weight)
        if self.home is not None:
            old = np.asarray(weights.array(protos[self.home.tensor]), np.float64)
            _set(protos[self.home.tensor], old + (self.home.factor * (bias - self.bias)).reshape(old.shape))


def _set(proto: onnx.TensorProto, value: Array) -> None:
    kind = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
    made = onnx.numpy_helper.from_array(np.ascontiguousarray(value.astype(kind)), proto.name)
    proto.CopyFrom(made)


def sites(groups: Groups, plan: Plan, model: onnx.ModelProto) -> tuple[list[Site], dict[str, str]]:
    """(the layers that can be solved for, for every other one the reason why not)."""
    finder = _Finder(groups, plan, model)
    found, reasons = [], {}
    for layer in groups.layers:
        site = finder.site(layer)
        if isinstance(site, Site):
            found.append(site)
        else:
            reasons[layer.name] = site
    return found, reasons


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
        if layer.op not in SOLVABLE:
            return f"{layer.op} is not solved for"
        index = self.producer.get(layer.out.tensor)
        if index is None or self.nodes[index].op_type != layer.op:
            return "it lies in a body, or surgery has made another operator of it"
        node = self.nodes[index]
        name = node.input[1]
        proto = self.protos.get(name)
        if proto is None or len(self.readers[name]) > 1:
            return "its weight is computed" if proto is None else "its weight is shared"
        if proto.data_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE):
            return "its weight is not floating-point"
        if node.input[0] != layer.x.tensor or layer.steps is not None:
            return "it reads its weight from the left, or quantised"
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        linear = Linear(layer.op, tuple(proto.dims), attributes)
        rank = len(self.groups.net.shapes[layer.out.tensor])
        axis = 1 if linear.convolution else rank - 1
        if not linear.understood or layer.out.axis != axis:
            return "its geometry is not understood"
        home, bias = self._home(node, linear)
        if bias is None:
            return "its bias is computed"
        rest, gain = self._rest(layer.out.tensor)
        kept = self._kept(layer.out)
        rest_kept = None
        if rest is not None:
            rest_kept = self._kept(Dim(rest, axis))
            if len(rest_kept) != len(kept) or self.groups.net.shapes.get(rest) != self.groups.net.shapes[layer.out.tensor]:
                rest, rest_kept = None, None
        return Site(
            layer, index, node.input[0], layer.out.tensor, linear, name, weights.array(proto), kept, bias, home, rest, rest_kept, gain
        )

    def _kept(self, dim: Dim) -> Index:
        every = np.arange(self.groups.net.shapes[dim.tensor][dim.axis])
        return np.delete(every, self.removed[dim]) if dim in self.removed else every

    def _alone(self, name: str) -> bool:
        return name in self.protos and len(self.readers.get(name, ())) == 1

    def _only_reader(self, tensor: str) -> onnx.NodeProto | None:
        readers = self.readers.get(tensor, [])
        return self.nodes[readers[0]] if len(readers) == 1 and readers[0] >= 0 else None

    def _home(self, node: onnx.NodeProto, linear: Linear) -> tuple[Home | None, Array | None]:
        """(where the layer's output means can be shifted, the layer's own bias; None where that is not constant)."""
        outs = linear.matrix(np.empty(linear.shape, np.float32)).shape
        count = outs[0] * outs[2]
        bias = np.zeros(count)
        beta = next((a.f for a in node.attribute if a.name == "beta"), 1.0)
        if len(node.input) > 2 and node.input[2]:
            proto = self.protos.get(node.input[2])
            if proto is None:
                return None, None
            value = np.asarray(weights.array(proto), np.float64) * beta
            if value.size not in (1, count):
                return None, None
            bias = np.broadcast_to(value.reshape(-1), (count,))
            if value.size == count and self._alone(node.input[2]) and beta:
                return Home(node.input[2], 1 / beta), bias
        reader = self._only_reader(node.output[0])
        if reader is not None and reader.op_type == "BatchNormalization" and reader.input[0] == node.output[0]:
            training = any(a.name == "training_mode" and a.i for a in reader.attribute)
            if not training and self._alone(reader.input[3]) and len(reader.output) == 1:
                return Home(reader.input[3], -1.0), bias
        if reader is not None and reader.op_type == "Add":
            other = reader.input[1] if reader.input[0] == node.output[0] else reader.input[0]
            if self._alone(other) and self._per_channel(other, count, linear):
                return Home(other), bias
        return None, bias

    def _per_channel(self, name: str, count: int, linear: Linear) -> bool:
        dims = list(self.protos[name].dims)
        if int(np.prod(dims)) != count:
            return False
        spatial = len(linear.taps)
        return dims[-1 - spatial :] == [count, *[1] * spatial] if linear.convolution else dims[-1:] == [count]

    def _rest(self, tensor: str) -> tuple[str | None, Array | float]:
        """(what the layer's output is added to, times what), where nothing else reads it on its way there."""
        gain: Array | float = 1.0
        while (reader := self._only_reader(tensor)) is not None:
            if reader.op_type == "BatchNormalization" and reader.input[0] == tensor:
                if any(a.name == "training_mode" and a.i for a in reader.attribute):
                    return None, 1.0
                if not all(x in self.protos for x in (reader.input[1], reader.input[4])):
                    return None, 1.0
                eps = next((a.f for a in reader.attribute if a.name == "epsilon"), 1e-5)
                scale, var = (np.asarray(weights.array(self.protos[reader.input[i]]), np.float64) for i in (1, 4))
                gain = gain * scale / np.sqrt(var + eps)
            elif reader.op_type == "Add":
                other = reader.input[1] if reader.input[0] == tensor else reader.input[0]
                if other not in self.protos:
                    found = other if other != tensor and np.all(np.abs(gain) > 1e-6) else None
                    return found, gain
            elif reader.op_type != "Identity":
                return None, 1.0
            tensor = reader.output[0]
        return None, 1.0
