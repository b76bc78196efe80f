"""Where a channel can be silenced: which constants, set to zero, make an axis of a tensor zero.

A channel is masked by zeroing the slices of the weights that read it. Where no weight reads it (two activations are
multiplied) it is silenced where it is made, provided that every operator in between makes zero of zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from onnxprune.channels import Dim, Tie
from onnxprune.graph import Network

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
# A weight may reach its layer through these without losing its zeros; scaling layers are no constants.
MOVES = {"Cast", "Concat", "Flatten", "Gather", "GatherND", "Identity", "Mul", "Neg", "Reshape", "Slice", "Split", "Squeeze"}
MOVES |= {"Transpose", "Unsqueeze"}


def silenceable(net: Network, tensor: str) -> bool:
    """Whether zeroing slices of the constants that `tensor` is made of zeroes slices of `tensor`."""
    if tensor in net.initializers:
        return True
    if tensor not in net.producer:
        return False
    maker = net.model.graph.node[net.producer[tensor]]
    return (maker.op_type in MOVES or _symmetric(net, maker)) and all(silenceable(net, x) for x in _values(maker))


def _symmetric(net: Network, node: onnx.NodeProto) -> bool:
    """A DequantizeLinear without a zero point, or with zeros for it, turns 0 into 0."""
    if node.op_type != "DequantizeLinear":
        return False
    point = net.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return len(node.input) < 3 or not node.input[2] or (point is not None and not np.any(point))


def _values(node: onnx.NodeProto) -> list[str]:
    """The inputs of a data movement or a product that are data, not indices or shapes."""
    return list(node.input) if node.op_type in ("Concat", "Mul") else list(node.input[:1])


class Silencers:
    """Walks from an axis of an activation back to constants. ties: what the rules said, by node."""

    def __init__(self, net: Network, ties: Mapping[int, Sequence[Tie]]) -> None:
        self.net, self.ties = net, ties
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
        sources = [self._sources(index, dim, i) for i in range(len(node.input))]
        possible = [inputs for inputs in self._inputs(index, sources) if inputs and all(sources[i] for i in inputs)]
        return [[d for i in inputs for d in sources[i]] for inputs in possible]

    def _inputs(self, index: int, sources: Sequence[Sequence[Dim]]) -> list[list[int]]:
        """Sets of inputs, each of which makes zero slices of zero slices. sources: the axes of each that count."""
        node = self.net.model.graph.node[index]
        op, count = node.op_type, len(node.input)
        if _symmetric(self.net, node):
            return [[0]]
        if node.domain not in ("", "ai.onnx", "com.microsoft"):
            return []
        if op in SINGLE or op == "PRelu" or (op == "Div" and node.input[1] in self.net.fixed):  # 0 / 0 would not do
            return [[0]]
        if op == "Concat":  # those inputs that have a part in this axis
            return [[i for i in range(count) if sources[i]]]
        if op in EVERY:
            return [list(range(count))]
        if op in ANY:
            return [[i] for i in range(count)]
        if op in LAYERS:
            return [[i for i in LAYERS[op] if i < count and node.input[i]]]
        return []

    def _sources(self, index: int, dim: Dim, position: int) -> list[Dim]:
        """The axes of input `position` that are tied to `dim`, an axis of an output of the same node."""
        name = self.net.model.graph.node[index].input[position]
        sides = [(t.a, t.b) for t in self.ties.get(index, ())] + [(t.b, t.a) for t in self.ties.get(index, ())]
        return list(
            dict.fromkeys(a for a, b in sides if b == dim and a.tensor == name and a.use in ("", f"{index}.{position}"))
        )
