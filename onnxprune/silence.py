"""Where a channel can be silenced: which constants, set to zero, make an axis of a tensor zero.

A channel is masked by zeroing the slices of the weights that read it. Where no weight reads it (two activations are
multiplied) it is silenced where it is made, provided that every operator in between makes zero of zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
MOVES = {"Cast", "Concat", "Flatten", "Gather", "Identity", "Mul", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"}


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

    def of(self, dim: Dim) -> set[Dim] | None:
        """The axes of constants that make `dim` zero wherever they are zero at the channels it has there; None if none do."""
        return self._walk(dim, {})

    def _walk(self, dim: Dim, seen: dict[Dim, set[Dim] | None]) -> set[Dim] | None:
        if dim not in seen:
            seen[dim] = None  # a tensor that is met again on its own way back is made of nothing
            seen[dim] = self._step(dim, seen)
        return seen[dim]

    def _step(self, dim: Dim, seen: dict[Dim, set[Dim] | None]) -> set[Dim] | None:
        if dim.tensor in self.net.initializers:
            return {dim}
        index = self.net.producer.get(dim.tensor)
        if index is None:
            return None
        node = self.net.model.graph.node[index]
        if _symmetric(self.net, node):
            return self._all(index, dim, [0], seen)
        if node.domain not in ("", "ai.onnx", "com.microsoft"):
            return None
        op = node.op_type
        if op in SINGLE:
            return self._all(index, dim, [0], seen)
        if op == "PRelu" or (op == "Div" and node.input[1] in self.net.fixed):  # 0 / 0 would not do
            return self._all(index, dim, [0], seen)
        if op in EVERY:
            if op == "Concat":  # those inputs that have a part in this axis
                return self._all(index, dim, [i for i in range(len(node.input)) if self._sources(index, dim, i)], seen)
            return self._all(index, dim, range(len(node.input)), seen)
        if op in ANY:
            found = (self._all(index, dim, [i], seen) for i in range(len(node.input)))
            return next((f for f in found if f is not None), None)
        if op in LAYERS:
            inputs = [i for i in LAYERS[op] if i < len(node.input) and node.input[i]]
            return self._all(index, dim, inputs, seen)
        return None

    def _all(self, index: int, dim: Dim, inputs: Iterable[int], seen: dict[Dim, set[Dim] | None]) -> set[Dim] | None:
        """The silencers of every one of these inputs; None if one of them has none."""
        total: set[Dim] = set()
        for i in inputs:
            sources = self._sources(index, dim, i)
            if not sources:
                return None
            for source in sources:
                found = self._walk(source, seen)
                if found is None:
                    return None
                total |= found
        return total or None

    def _sources(self, index: int, dim: Dim, position: int) -> list[Dim]:
        """The axes of input `position` that are tied to `dim`, an axis of an output of the same node."""
        name = self.net.model.graph.node[index].input[position]
        sides = [(t.a, t.b) for t in self.ties.get(index, ())] + [(t.b, t.a) for t in self.ties.get(index, ())]
        return list(
            dict.fromkeys(a for a, b in sides if b == dim and a.tensor == name and a.use in ("", f"{index}.{position}"))
        )
