"""One network spelt in the ways in which exporters spell it; every function takes a model and gives a new one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import onnx
from onnx import helper, numpy_helper

Spell = Callable[[onnx.ModelProto], onnx.ModelProto]


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def with_nodes(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
    """A copy that has these nodes instead of its own."""
    copy = copied(model)
    fresh = [onnx.NodeProto.FromString(n.SerializeToString()) for n in nodes]
    del copy.graph.node[:]
    copy.graph.node.extend(fresh)
    return copy


def constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """All weights are Constant nodes and there are no initializers: Paddle, spox."""
    made = [helper.make_node("Constant", [], [t.name], value=t) for t in model.graph.initializer]
    copy = with_nodes(model, [*made, *model.graph.node])
    del copy.graph.initializer[:]
    return copy


def lists(model: onnx.ModelProto) -> onnx.ModelProto:
    """Vectors are Constant nodes that hold a bare list of numbers, as onnxscript writes them."""
    keys = {onnx.TensorProto.FLOAT: "value_floats", onnx.TensorProto.INT64: "value_ints"}
    vectors = [t for t in model.graph.initializer if len(t.dims) == 1 and t.data_type in keys]
    made = [
        helper.make_node("Constant", [], [t.name], **{keys[t.data_type]: numpy_helper.to_array(t).tolist()}) for t in vectors
    ]
    copy = with_nodes(model, [*made, *model.graph.node])
    gone = {t.name for t in vectors}
    rest = [t for t in model.graph.initializer if t.name not in gone]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(rest)
    return copy


def merged(model: onnx.ModelProto, identity: bool = False) -> onnx.ModelProto:
    """Of equal initializers the first alone is kept; identity: the others are Identities of it (torch 1.11 and later)."""
    first: dict[tuple[tuple[int, ...], bytes], str] = {}
    owner = {
        t.name: first.setdefault((tuple(t.dims), numpy_helper.to_array(t).tobytes()), t.name) for t in model.graph.initializer
    }
    copies = [helper.make_node("Identity", [to], [name]) for name, to in owner.items() if name != to] if identity else []
    copy = with_nodes(model, [*copies, *model.graph.node])
    rest = [t for t in model.graph.initializer if owner[t.name] == t.name]
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(rest)
    if not identity:
        for node in copy.graph.node:
            node.input[:] = [owner.get(name, name) for name in node.input]
    return copy


def identities(model: onnx.ModelProto, length: int = 3) -> onnx.ModelProto:
    """Every floating-point weight is read through a chain of Identity nodes."""
    chains, last = [], {}
    for t in model.graph.initializer:
        if t.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16):
            names = [t.name, *(f"{t.name}.same{i}" for i in range(length))]
            chains += [helper.make_node("Identity", [a], [b]) for a, b in pairwise(names)]
            last[t.name] = names[-1]
    copy = with_nodes(model, [*chains, *model.graph.node])
    for node in copy.graph.node[len(chains) :]:
        node.input[:] = [last.get(name, name) for name in node.input]
    return copy


def inputs(model: onnx.ModelProto, ir: int) -> onnx.ModelProto:
    """Every initializer is declared as a graph input too; IR 3 demands it, IR 4 still allows it."""
    copy = copied(model)
    copy.ir_version = ir
    copy.graph.input.extend(helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer)
    return copy


def typed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Values stand in the typed fields (float_data, int64_data) instead of raw_data."""
    copy = copied(model)
    for t in copy.graph.initializer:
        values = numpy_helper.to_array(t)
        if t.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.INT64):
            t.CopyFrom(helper.make_tensor(t.name, t.data_type, t.dims, values.ravel().tolist()))
    return copy


def unnamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """No node has a name."""
    copy = copied(model)
    for node in copy.graph.node:
        node.ClearField("name")
    return copy


def same_name(model: onnx.ModelProto) -> onnx.ModelProto:
    """All nodes have one name."""
    copy = copied(model)
    for node in copy.graph.node:
        node.name = "layer"
    return copy


def renamed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Names of tensors and nodes are in another script, with blanks and signs that mean something to a shell or a glob."""
    copy = copied(model)
    fixed = {v.name for v in [*model.graph.input, *model.graph.output]}

    def new(name: str) -> str:
        return name if not name or name in fixed else f"слой/{name}:0 [卷积] *é.1"

    for node in copy.graph.node:
        node.name = new(node.name)
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
    for named in [*copy.graph.initializer, *copy.graph.value_info]:
        named.name = new(named.name)
    return copy


def unsorted(model: onnx.ModelProto) -> onnx.ModelProto:
    """The nodes stand in reverse order."""
    return with_nodes(model, list(reversed(model.graph.node)))


def matmuls(model: onnx.ModelProto, bias_first: bool = False) -> onnx.ModelProto:
    """Every Gemm with transB is a MatMul with the transposed weight and an Add."""
    nodes, values = [], {t.name: t for t in model.graph.initializer}
    fresh = dict(values)
    for node in model.graph.node:
        if node.op_type != "Gemm":
            nodes.append(node)
            continue
        x, w, b = node.input
        fresh[w] = numpy_helper.from_array(np.ascontiguousarray(numpy_helper.to_array(values[w]).T), w)
        product = f"{node.output[0]}.product"
        nodes.append(helper.make_node("MatMul", [x, w], [product]))
        nodes.append(helper.make_node("Add", [b, product] if bias_first else [product, b], list(node.output)))
    copy = with_nodes(model, nodes)
    del copy.graph.initializer[:]
    copy.graph.initializer.extend(fresh.values())
    return copy
