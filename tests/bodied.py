"""Small models with If, Loop and Scan, and what their tests are written in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import oracle
from onnx import TensorProto, helper, numpy_helper

from onnxprune import control, runtime
from onnxprune.groups import Groups
from onnxprune.passes.group import group

Array = np.ndarray[Any, Any]
Node = tuple[Any, ...]  # operator, "inputs", "outputs", {attributes}; the node is called like its first output
Feeds = Mapping[str, Array]

KINDS = {"cond": TensorProto.BOOL, "cond2": TensorProto.BOOL, "n": TensorProto.INT64}
YES, NO = np.array(True), np.array(False)


def w(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def protos(nodes: Sequence[Node]) -> list[onnx.NodeProto]:
    made = []
    for op, reads, makes, *attributes in nodes:
        names = ["" if name == "-" else name for name in reads.split()]
        made.append(helper.make_node(op, names, makes.split(), makes.split()[0], **(attributes[0] if attributes else {})))
    return made


def body(
    nodes: Sequence[Node],
    outputs: str,
    inputs: str = "",
    weights: Mapping[str, Array] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> onnx.GraphProto:
    """A body. Inputs i and c, or j and d, are the number of the iteration and the condition; shapes: what it declares."""
    kinds = {"i": TensorProto.INT64, "c": TensorProto.BOOL, "j": TensorProto.INT64, "d": TensorProto.BOOL}
    declared = shapes or {}

    def info(name: str) -> onnx.ValueInfoProto:
        if name in declared or name in inputs.split():
            scalar = [] if name in kinds else None
            return helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), declared.get(name, scalar))
        return onnx.ValueInfoProto(name=name)

    made = helper.make_graph(
        protos(nodes),
        "body",
        [info(name) for name in inputs.split()],
        [info(name) for name in outputs.split()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()],
    )
    inner = {o for n in made.node for o in n.output} - {o.name for o in made.output}
    made.value_info.extend(info(name) for name in declared if name in inner)
    return made


def either(then: onnx.GraphProto, other: onnx.GraphProto) -> dict[str, onnx.GraphProto]:
    return {"then_branch": then, "else_branch": other}


def model(
    nodes: Sequence[Node],
    weights: Mapping[str, Array] | None = None,
    inputs: Mapping[str, Sequence[int | str]] | None = None,
    outputs: str = "y",
    ir: int = 8,
) -> onnx.ModelProto:
    """A model of opset 18 with input x [1, 3, 6, 6] and the inputs cond (BOOL) and n (INT64), where they are read."""
    declared = inputs if inputs is not None else {"x": (1, 3, 6, 6)}
    made_inside = {o for node in protos(nodes) for o in node.output}
    read = {x for node in protos(nodes) for x in [*node.input, *control.captured(node)]} - made_inside
    scalars = {name: [] for name in KINDS if name in read and name not in (weights or {})}
    made = helper.make_graph(
        protos(nodes),
        "net",
        [
            helper.make_tensor_value_info(name, KINDS.get(name, TensorProto.FLOAT), list(shape))
            for name, shape in {**declared, **scalars}.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs.split()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()],
    )
    built = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=ir)
    values = runtime.run(runtime.session(built, optimise=False, threads=1), feeds(built, n=1))
    for output, value in zip(built.graph.output, values, strict=True):  # the checker wants the types of outputs
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, [None] * value.ndim))
    return built


def feeds(net: onnx.ModelProto, seed: int = 0, **fixed: Any) -> dict[str, Array]:
    """Random inputs; open sizes are 2."""
    found: dict[str, Array] = {}
    for value in runtime.graph_inputs(net):
        shape = [d or 2 for d in runtime.input_shape(value)]
        scalar = np.array(0, runtime.input_dtype(value))
        found[value.name] = np.asarray(fixed.get(value.name, w(*shape, seed=seed) if shape else scalar))
    return found


def analysed(net: onnx.ModelProto, **fixed: Any) -> Groups:
    return group(runtime.probe(net, feeds(net, **fixed)))


def run(net: onnx.ModelProto, x: Feeds) -> list[Array]:
    return runtime.run(runtime.session(net, threads=1), x)


def holds(net: onnx.ModelProto, *cases: Mapping[str, Any], probed: int = 0) -> Groups:
    """Asserts the oracle in every case (values of scalar inputs), whichever of them the analysis was made on; returns that."""
    found = [analysed(net, **case) for case in cases]
    for groups in found:
        assert groups.prunable
        assert [(g.id, g.size, g.frozen) for g in groups.groups] == [(g.id, g.size, g.frozen) for g in found[0].groups]
        for seed, fraction in enumerate((0.5, 0.0, 0.9)):
            plan = oracle.keep(groups, fraction, np.random.default_rng(seed), scaled=fraction == 0.5)
            for case in cases:
                oracle.check(net, feeds(net, seed, **case), plan, groups)
    return found[probed]


CASES = ({"cond": YES}, {"cond": NO})
FIRST = ("Conv", "x wa", "a")
LAST = ("Conv", "b wl", "y")
WA = {"wa": w(8, 3, 1, 1)}


def layers(**more: Any) -> onnx.ModelProto:
    """Layers in both branches, of which one has a tensor between two convolutions."""
    then = body([("Conv", "a wt", "t1"), ("Relu", "t1", "t2"), ("Conv", "t2 wu", "o1")], "o1", **more)
    other = body([("Conv", "a we", "o2")], "o2")
    weights = {"wt": w(10, 8, 3, 3), "wu": w(6, 10, 3, 3), "we": w(6, 8, 5, 5), "wl": w(4, 6, 1, 1)}
    return model([FIRST, ("If", "cond", "b", either(then, other)), LAST], WA | weights)


# ---- a recurrent cell in the body of a loop

HIDDEN = 8
CELL = [("MatMul", "h wh", "hh"), ("Add", "hh u", "s"), ("Tanh", "s", "h2"), ("Identity", "c", "c2")]
CELL_WEIGHTS = {"wx": w(5, HIDDEN), "wh": w(HIDDEN, HIDDEN), "wo": w(HIDDEN, 4)}
TRIPS = ({"n": 3}, {"n": 0}, {"n": 1})


def looped(
    cell: Sequence[Node] = CELL,
    outputs: str = "c2 h2",
    start: Sequence[Node] = (("Mul", "u zero", "h0"),),
    makes: str = "hf",
    last: Sequence[Node] = (("MatMul", "hf wo", "y"),),
    **weights: Array,
) -> onnx.ModelProto:
    """h <- tanh(h wh + x wx), n times, then a linear layer."""
    loop = ("Loop", "n yes h0", makes, {"body": body(cell, outputs, "i c h")})
    constants = CELL_WEIGHTS | {"zero": np.float32(0), "yes": YES} | weights
    used = {x for node in [*start, *cell, *last] for x in node[1].split()} | {"wx", "yes", "h0"}
    return model(
        [("MatMul", "x wx", "u"), *start, loop, *last], {k: v for k, v in constants.items() if k in used}, {"x": ("N", 5)}
    )


def scanned(axis: int = 0, out: int = 0, backwards: bool = False) -> onnx.ModelProto:
    """A recurrent cell along `axis` of x, whose states are stacked along `out`; the input is widened first."""
    shape: list[int | str] = [2, 2]
    shape.insert(axis % 3, 4)
    shape[-1 if axis % 3 != 2 else 1] = 5
    cell = body([("MatMul", "h wh", "hh"), ("Add", "hh s", "t"), ("Tanh", "t", "h2"), ("MatMul", "h2 wv", "v")], "h2 v", "h s")
    attributes: dict[str, Any] = {"body": cell, "num_scan_inputs": 1}
    if axis:
        attributes["scan_input_axes"] = [axis]
    if out:
        attributes["scan_output_axes"] = [out]
    if backwards:
        attributes["scan_input_directions"] = [1]
    perms = {0: [1, 0, 2], 1: [0, 1, 2], -1: [0, 2, 1]}
    stacked = {0: [1, 0, 2], 1: [0, 1, 2], -1: [0, 2, 1]}[out]
    nodes = [
        ("MatMul", "x wx", "u0"),  # [batch, time, hidden]
        ("Transpose", "u0", "u", {"perm": perms[axis]}),
        ("Scan", "h0 u", "hf all", attributes),
        ("Transpose", "all", "a", {"perm": stacked}),
        ("MatMul", "a wy", "y1"),
        ("MatMul", "hf wo", "y2"),
    ]
    weights = {
        "wx": w(5, HIDDEN),
        "wh": w(HIDDEN, HIDDEN),
        "wv": w(HIDDEN, 6),
        "wy": w(6, 4),
        "wo": w(HIDDEN, 3),
        "h0": w(2, HIDDEN),
    }
    return model(nodes, weights, {"x": (2, 4, 5)}, "y1 y2")
