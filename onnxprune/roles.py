"""What the axes of constants are to their layers: which weights make channels, and which sum over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from onnxprune.channels import Dim, Tie
from onnxprune.graph import Network
from onnxprune.rules import Layer


def complete_roles(net: Network, layers: Iterable[Layer], ties: dict[int, list[Tie]], roles: dict[Dim, str]) -> None:
    """Adds to `roles` what the rules did not say. ties: by node, in topological order.

    The other axes of a layer's constants are a producer's; a constant behind Transpose or Identity has the role of what comes
    out at the far end.
    """
    for layer in layers:
        for position, tensor in enumerate(net.nodes[layer.index].inputs):
            if tensor.name in net.fixed:
                for axis in range(len(net.shapes.get(tensor.name, ()))):
                    for dim in (Dim(tensor.name, axis), Dim(tensor.name, axis, f"{layer.index}.{position}")):
                        roles.setdefault(dim, "producer")
    for index, told in reversed(ties.items()):
        node = net.model.graph.node[index]
        if node.output and node.output[0] in net.fixed:
            _carry_back(set(node.output), told, roles)


def _carry_back(outputs: set[str], ties: Sequence[Tie], roles: dict[Dim, str]) -> None:
    for t in ties:
        for inner, outer in ((t.a, t.b), (t.b, t.a)):
            if outer.tensor in outputs and inner.tensor not in outputs and outer in roles:
                roles[inner] = roles[outer]
