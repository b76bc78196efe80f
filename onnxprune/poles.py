"""Where the zeros that mask channels would meet a pole: 1 / 0 is infinite, and infinity times a weight of 0 is no number.

The cut would be right there, but no masked original is left to hold it against.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import onnx

from onnxprune.channels import Dim, Freeze, Tie
from onnxprune.control import FLAT
from onnxprune.graph import Network
from onnxprune.silence import ANY, DOMAINS, LAYERS, SINGLE, has

# Operators without a finite value at 0, by the input that must not be 0.
POLES = {"Acosh": 0, "Div": 1, "Log": 0, "Mod": 1, "Reciprocal": 0, "ReduceLogSum": 0}
REDUCTIONS = {"ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"}
REMEDY = "give the layer a weight of its own"


def poles(net: Network, ties: Mapping[int, Sequence[Tie]], zeroed: Iterable[Dim]) -> Iterator[Freeze]:
    """The axes on which zeros come to a pole. zeroed: axes of constants; ties: what the rules said, by node."""
    waiting = list(zeroed)
    met = set(waiting)
    while waiting:
        dim = waiting.pop()
        for index, position in net.uses.get(dim.tensor, ()):
            if dim.use not in ("", f"{index}.{position}"):
                continue
            node = net.model.graph.node[index]
            if _is_pole(net, node, position):
                where = f"{node.op_type} '{net.label(index)}'"
                yield Freeze(dim, f"{where} has no finite value where zeros mask a channel of '{dim.tensor}'", remedy=REMEDY)
            elif _keeps_zeros(node, position):
                fresh = [d for d in _outputs(node, ties.get(index, ()), dim, f"{index}.{position}") if d not in met]
                met.update(fresh)
                waiting.extend(fresh)


def _is_pole(net: Network, node: onnx.NodeProto, position: int) -> bool:
    if node.domain not in DOMAINS:
        return False
    if node.op_type == "Pow" and position == 0:
        exponent = net.array(node.input[1])
        return exponent is None or bool(np.any(exponent < 0))
    return POLES.get(node.op_type) == position


def _keeps_zeros(node: onnx.NodeProto, position: int) -> bool:
    """Whether zero slices of this input alone make zero slices of the output."""
    if node.domain == FLAT:
        return True
    op = node.op_type
    if node.domain not in DOMAINS:
        return False
    if op in LAYERS:
        return position in (0, LAYERS[op][0]) and op != "BatchNormalization" and not has(node, LAYERS[op][1])
    if op in SINGLE or op in REDUCTIONS or op in ("Div", "Pow", "PRelu"):
        return position == 0
    return op in ANY or op == "Concat"


def _outputs(node: onnx.NodeProto, ties: Sequence[Tie], dim: Dim, use: str) -> list[Dim]:
    """The axes of the node's outputs that are tied to axis `dim` of one input."""
    sides = [(t.a, t.b) for t in ties] + [(t.b, t.a) for t in ties]
    return [b for a, b in sides if a in (dim, Dim(dim.tensor, dim.axis, use)) and b.tensor in node.output]
