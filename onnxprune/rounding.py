"""Where a network rounds activations to few bits: behind such a step, sums that differ in the last bit may differ by a step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx

from onnxprune.channels import Flaw
from onnxprune.control import FLAT, LOOPS
from onnxprune.graph import Network
from onnxprune.rules import Layer

QUANTISERS = {"DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "QuantizeLinear"}
INT8 = 4  # the accuracy_level at which MatMulNBits quantises its activation


def quantises(node: onnx.NodeProto) -> bool:
    """Whether the node rounds its first input to 8 bits or fewer."""
    level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
    return node.op_type in QUANTISERS or (node.op_type == "MatMulNBits" and level == INT8)


def rounded_by(net: Network) -> dict[str, int]:
    """For every tensor of activations that is rounded sooner or later, the node that does so first on some way.

    Later may be in the next iteration: what the body of a loop makes counts as rounded where one of the loop's states is.
    """
    found: dict[str, int] = {}
    known = -1
    while known < len(found):  # twice, and once more for every loop that this carries through
        known = len(found)
        for index in reversed(net.order):
            node = net.model.graph.node[index]
            around = node.input if node.domain == FLAT and node.op_type in LOOPS else ()
            later = next((found[name] for name in (*node.output, *around) if name in found), None)
            if quantises(node):
                found[node.input[0]] = index
            if later is not None:
                for name in net.reads(index):
                    found.setdefault(name, later)
    return {name: index for name, index in found.items() if name not in net.fixed}


def rounded_sums(net: Network, layers: Iterable[Layer]) -> Iterator[Flaw]:
    """A sum of floats with fewer terms may differ in its last bit, and after rounding to 8 bits by a whole step."""
    later = rounded_by(net)
    for layer in layers:
        quantiser = later.get(layer.out.tensor)
        if layer.sums and layer.x_steps is None and quantiser is not None:
            op, label = net.model.graph.node[quantiser].op_type, net.label(quantiser)
            why = f"{op} '{label}' rounds to 8 bits what {layer.op} '{layer.name}' sums in floating point"
            yield Flaw(layer.x, why, "rounding")
