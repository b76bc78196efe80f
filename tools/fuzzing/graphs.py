"""A random graph from a seed: inputs, first layers, operators, last layers, and how a file says all that."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper

from fuzzing import table
from fuzzing.build import RUNS, Array, Builder, NoFitError, T
from fuzzing.layers import linear

Feeds = dict[str, Array]
TRIES = 8
WIDTHS = (2, 3, 4, 4, 6, 6, 8)
IDS = 6  # integer inputs are below this number


@dataclass(frozen=True, eq=False)
class Case:
    """A model and its two sets of inputs; the first is what it is analysed on. `story` says what was meant to be in it."""

    seed: int
    model: onnx.ModelProto
    feeds: tuple[Feeds, ...]
    story: str = ""
    refused: Counter[str] = field(default_factory=Counter)


def make(seed: int, around: Sequence[str] = ()) -> Case | None:
    """The graph of a seed, always the same; None where nothing but inputs came of it. around: operators to put in often."""
    rng = np.random.default_rng(seed)
    keys = list(table.MAKERS)
    focus = [keys[int(i)] for i in rng.choice(len(keys), 2, replace=False)]
    named = [key for key in keys if key[1] in around]
    if named:
        focus[: len(named)] = [named[int(i)] for i in rng.permutation(len(named))[:2]]
    shared = sorted(set(table.versions(focus[0])) & set(table.versions(focus[1]))) or table.versions(focus[0])
    opset = int(rng.choice(shared))
    b = Builder(int(rng.integers(2**31)), opset)
    symbols = inputs(b)
    for x in list(b.pool):
        _attempt(b, lambda x=x: first_layer(b, x), 0.97 if x.dtype.kind == "f" else 0)  # type: ignore[misc]
    body(b, focus)
    outputs = finish(b)
    if not outputs:
        return None
    model = written(b, outputs, symbols)
    feeds = tuple({x.name: x.values[r] for x in b.inputs} for r in range(RUNS))
    story = f"opset {opset}, around {' and '.join(op for _, op in focus)}"
    return Case(seed, model, feeds, story, b.refused)


def _attempt(b: Builder, action: object, share: float = 1.0) -> bool:
    if not b.chance(share):
        return False
    try:
        with b.attempt():
            action()  # type: ignore[operator]
    except NoFitError:
        return False
    return True


# ---- inputs


def inputs(b: Builder) -> dict[tuple[str, int], str]:
    """One to three inputs; returns the names of their dynamic sizes. Equal sizes may share a name."""
    symbols: dict[tuple[str, int], str] = {}
    named: dict[tuple[int, int], str] = {}
    dynamic = b.chance(0.6)
    for number in range(b.choose([1, 1, 1, 2, 2, 3])):
        rank = b.choose([1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5])
        most = 5 if rank < 5 else 3
        first = [b.choose([1, 1, 1, 2, 3])] + [b.number(1 if b.chance(0.1) else 2, most) for _ in range(rank - 1)]
        second = list(first)
        marks: dict[int, str] = {}
        for axis in range(rank):
            if dynamic and axis != 1 and b.chance(0.6 if axis == 0 else 0.35):
                second[axis] = max(1, first[axis] + b.choose([-1, 1, 2]))
                pair = (first[axis], second[axis])
                marks[axis] = named.setdefault(pair, f"d{len(named)}") if b.chance(0.8) else b.fresh("own")
        shapes = (first, second)
        if number and b.chance(0.15):
            x = b.input([b.rng.integers(0, IDS, s) for s in shapes])
        else:
            x = b.input([b.rng.standard_normal(s).astype(np.float32) for s in shapes])
        symbols |= {(x.name, axis): mark for axis, mark in marks.items()}
    return symbols


# ---- operators


def first_layer(b: Builder, x: T) -> T:
    """Gives a tensor channels."""
    axis = 1 if x.rank > 1 else 0
    if b.chance(0.3):
        axis = b.number(0, x.rank - 1)
    y = linear(b, x, axis, b.choose(WIDTHS))
    if b.chance(0.8):
        b.pool.remove(x)  # what follows reads channels, not the input
    return y


def another_layer(b: Builder) -> T:
    """Puts a tensor through one more layer, along its channels if it has some."""
    x = b.data("f", where=lambda t: t.dtype == np.float32 and t.rank > 0)
    axis = x.channel if x.channel is not None and b.chance(0.9) else b.number(0, x.rank - 1)
    return linear(b, x, axis, b.choose(WIDTHS))


def body(b: Builder, focus: Sequence[table.Key]) -> None:
    """Random operators, those in focus more often."""
    choices = table.choices(b.opset)
    wanted = [k for k in focus if table.available(k, b.opset)]
    for _ in range(b.number(3, 11)):
        for _ in range(TRIES):
            key = b.choose(choices)
            if wanted and b.chance(0.35):
                key = b.choose(wanted)
            action = another_layer if b.chance(0.2) else table.MAKERS[key]
            if _attempt(b, lambda action=action: action(b)):  # type: ignore[misc]
                break


def finish(b: Builder) -> list[T]:
    """Chooses the outputs: tensors that nothing reads, most of them after one more layer."""
    read = {name for n in b.nodes for name in _reads(n)}
    inputs = {x.name for x in b.inputs}
    loose = [t for t in b.pool if t.name not in read | inputs and not t.fixed]
    above = _ancestors(b)
    loose.sort(key=lambda t: -above.get(t.name, 0))
    chosen = [t for t in loose if t.dtype.kind == "f"][: b.choose([1, 1, 2, 3])]
    outputs = []
    for t in chosen:
        size = len(b.pool)
        if b.chance(0.93) and _attempt(b, lambda t=t: last_layer(b, t)):  # type: ignore[misc]
            outputs.append(b.pool[-1])
        else:
            del b.pool[size:]
            outputs.append(t)
    others = [t for t in b.pool if t.name not in inputs and t not in outputs and not (t.fixed and b.chance(0.9))]
    if others and b.chance(0.15 if outputs else 1.0):
        outputs.append(b.choose(others))
    return [outputs[i] for i in b.rng.permutation(len(outputs))]


def _ancestors(b: Builder) -> dict[str, int]:
    """For every tensor, how many nodes it depends on."""
    above: dict[str, set[int]] = {}
    for i, node in enumerate(b.nodes):
        mine = {i}.union(*(above.get(name, set()) for name in _reads(node)))
        above.update(dict.fromkeys(node.output, mine))
    return {name: len(nodes) for name, nodes in above.items()}


def last_layer(b: Builder, t: T) -> T:
    if t.dtype != np.float32:
        t = b.op("Cast", [t], to=1, channel=t.channel)
    axis = t.channel
    if axis is None or b.chance(0.05):
        axis = b.choose([a for a in range(t.rank) if t.static(a)])
    return linear(b, t, axis, b.number(1, 4))


def _reads(node: onnx.NodeProto) -> list[str]:
    inner = [x for a in node.attribute if a.HasField("g") for n in a.g.node for x in _reads(n)]
    return [*node.input, *inner]


# ---- the file


def written(b: Builder, outputs: Sequence[T], symbols: dict[tuple[str, int], str]) -> onnx.ModelProto:
    """The model, with or without dead ends, in any order, with complete, partial or no declared shapes."""
    stored = {t.name for t in b.stored}
    for place, t in enumerate(outputs):  # the checker wants constants to be made by a node before they are outputs
        if t.name in stored:
            b.nodes.append(helper.make_node("Identity", [t.name], [f"out{place}"]))
    outputs = [T(f"out{i}", t.values) if t.name in stored else t for i, t in enumerate(outputs)]
    if b.chance(0.7):
        _drop_dead_ends(b, {t.name for t in outputs})
    listed = b.chance(0.15)
    declared = [_declared(x, symbols) for x in b.inputs]
    if listed:  # as IR version 3 demanded
        declared += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in b.weights]
    shown = [_shown(b, t) for t in outputs]
    graph = helper.make_graph(b.nodes, "random", declared, shown, b.weights)
    imports = [helper.make_opsetid(d, v) for d, v in b.domains.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10 if b.opset >= 21 else 3 if listed else 8)
    _describe(b, model)
    if b.chance(0.2):
        nodes = [model.graph.node[i] for i in b.rng.permutation(len(model.graph.node))]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    return model


def _drop_dead_ends(b: Builder, wanted: set[str]) -> None:
    kept: list[onnx.NodeProto] = []
    for node in reversed(b.nodes):
        if any(o in wanted for o in node.output):
            kept.append(node)
            wanted |= set(_reads(node))
    b.nodes = kept[::-1]
    b.weights = [t for t in b.weights if t.name in wanted]


def _declared(x: T, symbols: dict[tuple[str, int], str]) -> onnx.ValueInfoProto:
    shape = [symbols.get((x.name, a), n) for a, n in enumerate(x.shape)]
    return helper.make_tensor_value_info(x.name, helper.np_dtype_to_tensor_dtype(x.dtype), shape)


def _shown(b: Builder, t: T) -> onnx.ValueInfoProto:
    """An output's declaration: without a shape, or with one whose sizes are named where they change."""
    kind = helper.np_dtype_to_tensor_dtype(t.dtype)
    if b.chance(0.3):
        return helper.make_tensor_value_info(t.name, kind, None)
    return helper.make_tensor_value_info(t.name, kind, [n if t.static(a) else f"{t.name}.{a}" for a, n in enumerate(t.shape)])


def _describe(b: Builder, model: onnx.ModelProto) -> None:
    """value_info: none, all of it, some of it, with constants among it, or with entries that nothing has."""
    if b.chance(0.4):
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(model)
    except Exception:  # a convenience: without it the file says less
        return
    infos = [i for i in inferred.graph.value_info if b.chance(0.8)]
    if b.chance(0.3):
        infos += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in b.weights]
    if b.chance(0.2):
        infos.append(helper.make_tensor_value_info("nobody", 1, [3, 4]))
    model.graph.value_info.extend(infos)
