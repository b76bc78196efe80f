"""Where a network rounds activations to few bits: behind such a step, sums that differ in the last bit may differ by a step."""

from __future__ import annotations

import onnx

from onnxprune.graph import Network

QUANTISERS = {"DynamicQuantizeLinear", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "QuantizeLinear"}
INT8 = 4  # the accuracy_level at which MatMulNBits quantises its activation


def quantises(node: onnx.NodeProto) -> bool:
    """Whether the node rounds its first input to 8 bits or fewer."""
    level = next((a.i for a in node.attribute if a.name == "accuracy_level"), 0)
    return node.op_type in QUANTISERS or (node.op_type == "MatMulNBits" and level == INT8)


def rounded_by(net: Network) -> dict[str, int]:
    """For every tensor of activations that is rounded sooner or later, the node that does so first on some way."""
    found: dict[str, int] = {}
    for index in reversed(net.order):
        node = net.model.graph.node[index]
        later = next((found[o] for o in node.output if o in found), None)
        if quantises(node):
            found[node.input[0]] = index
        if later is not None:
            for name in net.reads(index):
                found.setdefault(name, later)
    return {name: index for name, index in found.items() if name not in net.fixed}
