"""Which constants of a graph are weights to be trained, and which are part of how it computes."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from onnxprune.graph import Network

# Operators whose operands at these positions are weights.
SLOTS: dict[str, tuple[int, ...]] = {
    "Conv": (1, 2),
    "ConvTranspose": (1, 2),
    "FusedConv": (1, 2),
    "Gemm": (0, 1, 2),
    "MatMul": (0, 1),
    "FusedMatMul": (0, 1),
    "BatchNormalization": (1, 2),
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "InstanceNormalization": (1, 2),
    "GroupNormalization": (1, 2),
    "PRelu": (1,),
    "LSTM": (1, 2, 3),
    "GRU": (1, 2, 3),
    "RNN": (1, 2, 3),
}
# A weight may come to its layer through these.
MOVES = {"Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Slice", "Concat", "Split"}
# What an exporter writes as sum or product after one of these is a bias or a scale; elsewhere it may be a grid or a unit.
BIASED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Mul", "BatchNormalization"}
SCALED = {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "Div", "BatchNormalization", "InstanceNormalization"}
PASSES = {"Identity", "Cast", "Transpose", "Reshape", "Squeeze", "Unsqueeze"}


def trainable(net: Network) -> list[str]:
    """The names of the weights, in the order of the file: floating point, and more than one number."""
    found: set[str] = set()
    for i in net.order:
        node = net.model.graph.node[i]
        reads = [x for p, x in enumerate(node.input) if x and _slot(net, i, p)]
        for name in reads:
            found |= _sources(net, name, net.fixed)
    found -= statistics(net)
    return [name for name, kind in net.kinds.items() if name in found and _floating(kind) and _several(net, name)]


def statistics(net: Network) -> set[str]:
    """Means and variances of batch norms. Some exporters use one tensor for all constants of equal values, weights among
    them: these must not be trained, or a variance could become negative."""
    norms = [n for n in net.model.graph.node if n.op_type == "BatchNormalization"]
    return {s for n in norms for x in n.input[3:5] if x in net.fixed for s in _sources(net, x, net.fixed)}


def _floating(kind: np.dtype[np.generic]) -> bool:
    return bool(kind.kind == "f" or kind.name == "bfloat16")


def _several(net: Network, name: str) -> bool:
    return int(np.prod(list(net.initializers[name].dims), dtype=np.int64)) > 1


def _slot(net: Network, index: int, position: int) -> bool:
    node = net.model.graph.node[index]
    name = node.input[position]
    if name not in net.fixed:
        return False
    if node.op_type == "Einsum":
        return True
    if node.op_type in ("Add", "Mul"):
        other = node.input[1 - position]
        return other not in net.fixed and _vector(net, name) and _made_by(net, other) in _AFTER[node.op_type]
    return position in SLOTS.get(node.op_type, ())


_AFTER = {"Add": BIASED, "Mul": SCALED}


def _vector(net: Network, name: str) -> bool:
    """Whether a constant, as far as the file tells its shape, has one entry a channel and not more."""
    dims = list(net.initializers[name].dims) if name in net.initializers else []
    return len([n for n in dims if n > 1]) == 1


def _made_by(net: Network, name: str) -> str:
    """The operator that computes a tensor, behind what only moves entries and behind the sum with a bias."""
    while name in net.producer:
        index = net.producer[name]
        node = net.model.graph.node[index]
        biased = [node.input[1 - p] for p in (0, 1) if _slot(net, index, p)] if node.op_type == "Add" else []
        if node.op_type not in PASSES and not biased:
            return str(node.op_type)
        name = biased[0] if biased else node.input[0]
    return ""


def _sources(net: Network, name: str, fixed: Collection[str]) -> set[str]:
    """The constants that a fixed tensor consists of; none where anything else than movement makes it."""
    if name in net.initializers:
        return {name}
    node = net.model.graph.node[net.producer[name]] if name in net.producer else None
    if node is None or node.op_type not in MOVES:
        return set()
    data = node.input if node.op_type == "Concat" else node.input[:1]
    return {s for x in data if x in fixed for s in _sources(net, x, fixed)}
