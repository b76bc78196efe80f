"""Where a channel can be silenced: which constants, set to zero, make an axis of a tensor zero.

A channel is masked by zeroing the slices of the weights that read it. Where no weight reads it (two activations are
multiplied) it is silenced where it is made, provided that every operator in between makes zero of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import numpy_helper

from onnxprune.channels import Dim, Tie
from onnxprune.control import FLAT
from onnxprune.graph import Network

DOMAINS = ("", "ai.onnx", "com.microsoft")
# Operators that make zero slices of the zero slices of all their operands; the moves have one operand that is data.
SINGLE = {
    "Abs", "Asin", "Asinh", "Atan", "AveragePool", "Cast", "CastLike", "Ceil", "Celu", "DepthToSpace", "Dropout", "Elu",
    "Erf", "Expand", "Flatten", "Floor", "Gather", "Gelu", "GlobalAveragePool", "GlobalMaxPool", "HardSwish",
    "Identity", "LeakyRelu", "MaxPool", "Mish", "Neg", "Relu", "Reshape", "Round", "Selu", "Sign", "Sin", "Sinh",
    "Slice", "Softsign", "SpaceToDepth", "Split", "Sqrt", "Squeeze", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Tile",
    "Transpose", "Unsqueeze",
}  # fmt: skip
EVERY = {"Add", "Concat", "Max", "Mean", "Min", "Sub", "Sum"}
ANY = {"Einsum", "FusedMatMul", "MatMul", "Mul", "TransposeMatMul"}
LAYERS = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (1, 2), "BatchNormalization": (1, 2)}
# Attention adds up values: where they, or the weight and the bias that make them, are zero, so is the sum.
ATTENTION = {
    ("", "Attention"): (2,),
    ("com.microsoft", "Attention"): (1, 2),
    ("com.microsoft", "MultiHeadAttention"): (2, 3),
}
# Operators on integers: where their weight lies, its zero point, and what is added. Those that make 8 bits are not among
# them: what stands for 0 there is a zero point.
INTEGER = {
    "ConvInteger": (1, 3, ()),
    "DynamicQuantizeMatMul": (1, 3, (4,)),
    "MatMulInteger": (1, 3, ()),
    "MatMulIntegerToFloat": (1, 5, (6,)),
}
RECURRENT = {"DynamicQuantizeLSTM": (9, 11), "GRU": (), "LSTM": (), "RNN": ()}  # and where the zero points are
# A weight may reach its layer through these without losing its zeros; scaling layers are no constants.
MOVES = {"Cast", "Concat", "Flatten", "Gather", "GatherND", "Identity", "Mul", "Neg", "Reshape", "Slice", "Split", "Squeeze"}
MOVES |= {"Transpose", "Unsqueeze"}


def silenceable(net: Network, tensor: str) -> bool:
    """Whether zeroing slices of the constants that `tensor` is made of zeroes slices of `tensor`; see `has_offset`."""
    if tensor in net.initializers:
        return True
    if tensor not in net.producer:
        return False
    maker = net.model.graph.node[net.producer[tensor]]
    moved = maker.op_type in MOVES or _symmetric(net, maker) or _offset(net, maker)
    return moved and all(silenceable(net, x) for x in _values(maker))


def made_by_bodies(net: Network, tensor: str) -> bool:
    """Whether an If, Loop or Scan makes the tensor, but for operators that keep zeros: back into the bodies no walk goes."""
    while tensor in net.producer:
        node = net.model.graph.node[net.producer[tensor]]
        if node.domain == FLAT:
            return not node.op_type.endswith("Body")
        if node.op_type not in SINGLE or not node.input:
            return False
        tensor = node.input[0]
    return False


def has_offset(net: Network, tensor: str) -> bool:
    """Whether a silenceable tensor is made of 8-bit constants of which the zero point, not 0, has to be written."""
    if tensor not in net.producer or tensor in net.initializers:
        return False
    maker = net.model.graph.node[net.producer[tensor]]
    return _offset(net, maker) or any(has_offset(net, x) for x in _values(maker))


def _offset(net: Network, node: onnx.NodeProto) -> bool:
    """A DequantizeLinear of a constant with a constant zero point other than 0."""
    if node.op_type != "DequantizeLinear" or node.input[0] not in net.initializers or _symmetric(net, node):
        return False
    return net.array(node.input[2]) is not None


def _symmetric(net: Network, node: onnx.NodeProto) -> bool:
    """Quantisation without a zero point, or with zeros for it, turns 0 into 0."""
    if node.op_type not in ("DequantizeLinear", "QuantizeLinear"):
        return False
    return _zero_point(net, node, 2)


def _zero_point(net: Network, node: onnx.NodeProto, i: int) -> bool:
    """Whether input `i`, a zero point, is 0 for certain."""
    point = net.array(node.input[i]) if has(node, i) else np.zeros(())
    return point is not None and not np.any(point)


def _clip_keeps_zero(net: Network, node: onnx.NodeProto) -> bool:
    limits = {a.name: np.array(a.f) for a in node.attribute}
    for i, name in ((1, "min"), (2, "max")):
        if has(node, i):
            value = net.array(node.input[i])
            if value is None:
                return False
            limits[name] = value
    return bool(np.all(limits.get("min", 0) <= 0) and np.all(limits.get("max", 0) >= 0))


def _positive(net: Network, node: onnx.NodeProto) -> bool:
    """Whether the exponent of a Pow is positive for certain: then 0 stays 0."""
    exponent = net.array(node.input[1])
    return exponent is not None and bool(np.all(exponent > 0))


def has(node: onnx.NodeProto, i: int) -> bool:
    """Whether optional input `i` is there."""
    return i < len(node.input) and bool(node.input[i])


def _values(node: onnx.NodeProto) -> list[str]:
    """The inputs of a data movement or a product that are data, not indices or shapes."""
    return list(node.input) if node.op_type in ("Concat", "Mul") else list(node.input[:1])


class Silencers:
    """Walks from an axis of an activation back to constants. ties: what the rules said, by node.

    offsets: whether quantised weights may count that are silenced by a zero point other than 0.
    """

    def __init__(self, net: Network, ties: Mapping[int, Sequence[Tie]], *, offsets: bool = False) -> None:
        self.net, self.ties, self.offsets = net, ties, offsets
        self._chosen: dict[Dim, list[Dim] | None] = {}

    def of(self, dim: Dim) -> set[Dim] | None:
        """The axes of constants that make `dim` zero wherever they are zero at the channels it has there; None if none do."""
        if self._choose(dim) is None:
            return None
        met, waiting = {dim}, [dim]
        while waiting:
            sources = set(self._chosen[waiting.pop()] or ()) - met
            met |= sources
            waiting.extend(sources)
        return {d for d in met if d.tensor in self.net.initializers}

    def _choose(self, dim: Dim) -> list[Dim] | None:
        """Which axes silence `dim` when all of them are silent: the first way that goes back to constants. None: no way does.

        Without recursion, for networks are deep.
        """
        waiting = [dim]
        while waiting:
            ways = self._ways(waiting[-1])
            unknown = [d for way in ways for d in way if d not in self._chosen]
            if unknown:
                waiting.extend(unknown)
            else:
                good = (way for way in ways if all(self._chosen[d] is not None for d in way))
                self._chosen[waiting.pop()] = next(good, None)
        return self._chosen[dim]

    def _ways(self, dim: Dim) -> list[list[Dim]]:
        """Sets of axes that the node behind `dim` reads, each of which silences `dim`; a constant needs none of them."""
        if dim.tensor in self.net.initializers:
            return [[]]
        index = self.net.producer.get(dim.tensor)
        if index is None:
            return []
        node = self.net.model.graph.node[index]
        if node.op_type in RECURRENT and node.domain in DOMAINS:
            return self._units(index, dim)
        sources = [self._sources(index, dim, i) for i in range(len(node.input))]
        if (inputs := ATTENTION.get((node.domain, node.op_type))) is not None:
            return self._heads(index, dim, [i for i in inputs if has(node, i)])
        possible = [inputs for inputs in self._inputs(index, sources) if inputs and all(sources[i] for i in inputs)]
        return [[d for i in inputs for d in sources[i]] for inputs in possible]

    def _inputs(self, index: int, sources: Sequence[Sequence[Dim]]) -> list[list[int]]:
        """Sets of inputs, each of which makes zero slices of zero slices. sources: the axes of each that count."""
        node = self.net.model.graph.node[index]
        op, count = node.op_type, len(node.input)
        if _symmetric(self.net, node) or (self.offsets and _offset(self.net, node)):
            return [[0]]
        if node.domain not in DOMAINS:
            return []
        if op in SINGLE or op == "PRelu" or (op == "Div" and node.input[1] in self.net.fixed):  # 0 / 0 would not do
            return [[0]]
        if (op == "Clip" and _clip_keeps_zero(self.net, node)) or (op == "Pow" and _positive(self.net, node)):
            return [[0]]
        if op == "Concat":  # those inputs that have a part in this axis
            return [[i for i in range(count) if sources[i]]]
        if op in EVERY:
            return [list(range(count))]
        if op in ANY:
            return [[i] for i in range(count)]
        if op in LAYERS:
            return [[i for i in LAYERS[op] if has(node, i)]]
        if op in INTEGER and self._silent(node, INTEGER[op][1]):
            weight, _, added = INTEGER[op]
            return [[weight, *(i for i in added if has(node, i))]]
        return []

    def _heads(self, index: int, dim: Dim, inputs: Sequence[int]) -> list[list[Dim]]:
        """All axes of these inputs that heads tie to `dim`, directly or by way of each other."""
        met = [dim]
        for known in met:
            sides = [pair for t in self.ties.get(index, ()) for pair in ((t.a, t.b), (t.b, t.a))]
            met.extend(dict.fromkeys(b for a, b in sides if a == known and b not in met))
        names = [self.net.model.graph.node[index].input[i] for i in inputs]
        found = [[d for d in met[1:] if d.tensor == name] for name in names]
        return [[d for part in found for d in part]] if all(found) else []

    def _silent(self, node: onnx.NodeProto, zero: int) -> bool:
        """Whether a weight with its zero point at input `zero` can be silenced."""
        constant = has(node, zero) and self.net.array(node.input[zero]) is not None
        return _zero_point(self.net, node, zero) or (self.offsets and constant)

    def _units(self, index: int, dim: Dim) -> list[list[Dim]]:
        """A unit with weights, biases and states of 0 stays at 0 under the activations that ONNX has by default."""
        node = self.net.model.graph.node[index]
        usual = not any(a.name == "activations" for a in node.attribute)
        state = next(iter(self._sources(index, dim, 2)), None)
        if not usual or state is None or not all(self._silent(node, i) for i in RECURRENT[node.op_type]):
            return []
        states = [i for i in (5, 6) if has(node, i) and not self._zeros(node.input[i])]
        inputs = [1, 2, *([3] if has(node, 3) else []), *states]
        sources = [self._sources(index, state, i) for i in inputs]
        return [[d for found in sources for d in found]] if all(sources) else []

    def _zeros(self, tensor: str) -> bool:
        """Whether the tensor is nothing but zeros."""
        while (value := self.net.array(tensor)) is None:
            index = self.net.producer.get(tensor)
            if index is None:
                return False
            node = self.net.model.graph.node[index]
            if node.op_type == "ConstantOfShape":
                return not any(np.any(numpy_helper.to_array(a.t)) for a in node.attribute if a.name == "value")
            if node.op_type not in SINGLE:
                return False
            tensor = node.input[0]
        return not np.any(value)

    def _sources(self, index: int, dim: Dim, position: int) -> list[Dim]:
        """The axes of input `position` that are tied to `dim`, an axis of an output of the same node."""
        name = self.net.model.graph.node[index].input[position]
        sides = [(t.a, t.b) for t in self.ties.get(index, ())] + [(t.b, t.a) for t in self.ties.get(index, ())]
        return list(
            dict.fromkeys(a for a, b in sides if b == dim and a.tensor == name and a.use in ("", f"{index}.{position}"))
        )
