"""Control flow, with layers in the bodies, and sequences of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fuzzing.build import Array, Builder, NoFitError, T
from fuzzing.elementwise import partner
from fuzzing.layers import linear, of_rank
from fuzzing.movement import any_axis
from fuzzing.norms import single
from fuzzing.weights import vector, weight

Maker = Callable[[Builder], object]
ACTIVATIONS = ("Relu", "Tanh", "Sigmoid", "Neg", "Softplus")


class Body:
    """A graph in a node. What it reads from outside is noted; constants of its own are stored in it or made in it."""

    def __init__(self, b: Builder) -> None:
        self.b = b
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.reads: list[T] = []

    def op(self, op: str, reads: Sequence[str | T], **attributes: Any) -> str:
        out = self.b.fresh("inner")
        self.nodes.append(helper.make_node(op, [self.outer(x) for x in reads], [out], f"{op}_{out}", **attributes))
        return out

    def outer(self, x: str | T) -> str:
        if isinstance(x, T):
            self.reads.append(x)
            return x.name
        return x

    def const(self, value: Array) -> str | T:
        """Stored in the body, made there by a node, or taken from outside."""
        how = self.b.choose(["stored", "node", "outside", "outside"])
        if how == "outside":
            return self.b.const(value)
        name = self.b.fresh("held")
        proto = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if how == "stored":
            self.stored.append(proto)
        else:
            self.nodes.append(helper.make_node("Constant", [], [name], value=proto))
        return name

    def random(self, *shape: int) -> str | T:
        return self.const((self.b.rng.standard_normal(shape) / np.sqrt(max(1, shape[0]))).astype(np.float32))

    def graph(self, outputs: Sequence[onnx.ValueInfoProto], inputs: Sequence[onnx.ValueInfoProto] = ()) -> onnx.GraphProto:
        return helper.make_graph(self.nodes, self.b.fresh("body"), list(inputs), list(outputs), self.stored)


def declared(name: str, t: T, shape: bool = False) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(t.dtype), list(t.shape) if shape else None)


def distinct(tensors: Sequence[T]) -> list[T]:
    return list({t.name: t for t in tensors}.values())


# ---- If


def branch(b: Builder) -> T:
    """If, whose branches read tensors of the graph around it: layers to as many channels, or one operator each."""
    x = single(b)
    limit = b.const(np.float32(b.choose([-1e6, 1e6, 0.5])))
    test = b.op("Greater", [b.op("ReduceMax", [x], keepdims=0), limit])
    layers = x.rank >= 2 and x.static(x.rank - 1) and b.chance(0.6)
    wide = b.number(1, 6)
    bodies, reads = [], [test, x]
    for _ in range(2):
        body = Body(b)
        out = _layers(body, x, wide) if layers else _single(body, x)
        bodies.append(body.graph([declared(out, x)]))
        reads += body.reads
    out = b.fresh("t")
    node = helper.make_node("If", [test.name], [out], b.fresh("If"), then_branch=bodies[0], else_branch=bodies[1])
    made = b.block([node], distinct(reads), [out])[0]
    b.pool[-1] = T(made.name, made.values, made.fixed, x.rank - 1 if layers else x.channel)
    return b.pool[-1]


def _single(body: Body, x: T) -> str:
    if body.b.chance(0.4):
        return body.op("Add", [x, partner(body.b, x)])
    return body.op(body.b.choose(ACTIVATIONS), [x])


def _layers(body: Body, x: T, wide: int) -> str:
    """One layer, or two with channels between them that nobody outside sees."""
    b, n = body.b, x.shape[-1]
    y: str | T = x
    if b.chance(0.5):
        between = b.number(1, 6)
        y = body.op(b.choose(ACTIVATIONS), [body.op("MatMul", [y, body.random(n, between)])])
        n = between
    y = body.op("MatMul", [y, body.random(n, wide) if b.chance(0.6) else weight(b, (n, wide), n)])
    return body.op("Add", [y, body.random(wide)]) if b.chance(0.5) else y


# ---- Loop and Scan


def loop(b: Builder) -> T:
    """A state that goes through a layer, or is scaled, and takes something from outside in; perhaps stacked as well."""
    x = of_rank(b, (2, 3), lambda t: t.static(t.rank - 1))
    wide = b.number(1, 6)
    u = linear(b, x, x.rank - 1, wide)
    if u.rank != x.rank:
        raise NoFitError
    start = u if b.chance(0.4) else linear(b, x, x.rank - 1, wide)
    if start.shape != u.shape:
        raise NoFitError
    body, (state, i, go) = Body(b), (b.fresh("inner") for _ in range(3))
    made: str = state
    if b.chance(0.7):
        made = body.op("MatMul", [made, body.random(wide, wide)])
    if b.chance(0.7):
        made = body.op("Add", [made, u])
    if b.chance(0.2):
        made = _nested(body, go, made)
    made = body.op(b.choose(["Tanh", "Sigmoid"]), [made]) if b.chance(0.8) else body.op("Mul", [made, body.random(wide)])
    after = [declared(body.op("Identity", [go]), T("", (np.array(True),) * 2)), declared(made, u)]
    stacked = b.chance(0.3)
    if stacked:
        after.append(declared(body.op("Identity", [made]), u))
    before = [
        helper.make_tensor_value_info(i, TensorProto.INT64, []),
        helper.make_tensor_value_info(go, TensorProto.BOOL, []),
        declared(state, u),
    ]
    times, true = b.const(np.array(b.number(1, 3), np.int64)), b.const(np.array(True))
    outs = [b.fresh("t") for _ in range(1 + stacked)]
    graph = body.graph(after, before)
    node = helper.make_node("Loop", [times.name, true.name, start.name], outs, b.fresh("Loop"), body=graph)
    found = b.block([node], distinct([times, true, start, u, *body.reads]), outs)
    b.pool[-len(found) :] = [T(t.name, t.values, t.fixed, t.rank - 1) for t in found]
    return b.pool[-1]


def _nested(body: Body, condition: str, state: str) -> str:
    """An If in the body of a loop, which is not followed."""
    b = body.b
    graphs = []
    for _ in range(2):
        inside = Body(b)
        made = inside.op("Mul", [state, inside.const(np.array([b.rng.uniform(0.5, 1)], np.float32))])
        made = inside.op(b.choose(ACTIVATIONS), [made])
        graphs.append(inside.graph([helper.make_tensor_value_info(made, TensorProto.FLOAT, None)]))
        body.reads += inside.reads
    return body.op("If", [condition], then_branch=graphs[0], else_branch=graphs[1])


def scan(b: Builder) -> T:
    """A running sum over the first axis, or a recurrent layer spelt out; forwards or backwards."""
    x = single(b, (2, 3))
    if not all(x.static(a) for a in range(1, x.rank)):
        raise NoFitError
    wide = x.shape[-1]
    start = vector(b, x.shape[1:])
    body, (state, step) = Body(b), (b.fresh("inner") for _ in range(2))
    total = body.op("Add", [state, step])
    if x.rank == 3 and b.chance(0.6):
        total = body.op("Add", [body.op("MatMul", [state, body.random(wide, wide)]), step])
        total = body.op("Tanh", [total])
    shown = body.op(b.choose(["Identity", "Relu"]), [total])
    reads, makes = [declared(n, start, True) for n in (state, step)], [declared(n, start) for n in (total, shown)]
    last, out = b.fresh("t"), b.fresh("t")
    how = {"scan_input_directions": [1]} if b.chance(0.3) else {}
    node = helper.make_node(
        "Scan", [start.name, x.name], [last, out], b.fresh("Scan"), body=body.graph(makes, reads), num_scan_inputs=1, **how
    )
    found = b.block([node], distinct([start, x, *body.reads]), [last, out])
    b.pool[-2:] = [T(t.name, t.values, t.fixed, t.rank - 1) for t in found]
    return b.pool[-1]


# ---- sequences


def split(b: Builder) -> T:
    """Split into a sequence, in equal parts or in parts of given lengths; one taken out or all put together again."""
    x = single(b)
    axis = any_axis(b, x)
    parts, out = b.fresh("sequence"), b.fresh("t")
    reads = [x]
    how: dict[str, int] = {"keepdims": b.choose([1, 1, 0])}
    if b.chance(0.4) and x.static(axis):
        cut = b.number(0, x.shape[axis] - 1)
        reads.append(b.ints(cut, x.shape[axis] - cut) if cut else b.const(np.array(b.number(1, x.shape[axis]))))
        how = {}
    first = helper.make_node("SplitToSequence", [t.name for t in reads], [parts], b.fresh("Split"), axis=axis, **how)
    return _taken(b, first, reads, parts, out, axis)


def construct(b: Builder) -> T:
    """A sequence of tensors of one shape."""
    x = single(b)
    others = [b.data("f", where=lambda t: t.dtype == np.float32 and t.rank == x.rank and t.shape == x.shape) for _ in range(2)]
    reads = [x, *others[: b.number(0, 2)]]
    parts, out = b.fresh("sequence"), b.fresh("t")
    first = helper.make_node("SequenceConstruct", [t.name for t in reads], [parts], b.fresh("Sequence"))
    return _taken(b, first, reads, parts, out, any_axis(b, x))


def _taken(b: Builder, first: onnx.NodeProto, reads: list[T], parts: str, out: str, axis: int) -> T:
    if b.chance(0.5):
        place = b.const(np.array(b.choose([0, 0, -1]), np.int64))
        second = helper.make_node("SequenceAt", [parts, place.name], [out])
        made = b.block([first, second], distinct([*reads, place]), [out])[0]
    else:
        how = {"new_axis": 1} if b.chance(0.3) else {}
        second = helper.make_node("ConcatFromSequence", [parts], [out], axis=axis, **how)
        made = b.block([first, second], distinct(reads), [out])[0]
    channel = reads[0].channel if made.rank == reads[0].rank else None
    b.pool[-1] = T(made.name, made.values, made.fixed, channel)
    return b.pool[-1]


OPS: dict[str, Maker] = {
    "ConcatFromSequence": construct,
    "If": branch,
    "Loop": loop,
    "Scan": scan,
    "SequenceAt": split,
    "SequenceConstruct": construct,
    "SplitToSequence": split,
}
