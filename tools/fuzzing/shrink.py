"""Makes a graph on which something is wrong smaller, greedily, as long as the same thing is wrong with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from fuzzing.check import Outcome, examine
from fuzzing.graphs import Case
from onnxprune import runtime
from onnxprune.errors import ModelError
from onnxprune.graph import Array, Network, graph_inputs

MOST_TRIES = 250


def shrink(case: Case, kind: str) -> Case:
    """A smaller case with a finding of this kind, or the case itself."""
    tries = 0
    changed = True
    while changed and tries < MOST_TRIES:
        changed = False
        for smaller in _smaller(case):
            tries += 1
            if tries > MOST_TRIES:
                break
            if any(f.kind == kind for f in examine(smaller).findings):
                case, changed = smaller, True
                break
    return case


def _smaller(case: Case) -> Iterator[Case]:
    """Candidates: one output alone; a node left out, its output taken from its input or fed from outside; no value_info."""
    model = case.model
    if len(model.graph.output) > 1:
        for i in range(len(model.graph.output)):
            copy = _copy(model)
            kept = model.graph.output[i]
            del copy.graph.output[:]
            copy.graph.output.append(kept)
            yield _case(case, copy, {})
    if model.graph.value_info:
        copy = _copy(model)
        del copy.graph.value_info[:]
        yield _case(case, copy, {})
    values = _values(case)
    for i, node in enumerate(model.graph.node):
        if node.op_type == "Constant" or not node.output or node.output[0] not in values:
            continue
        out = node.output[0]
        same = [x for x in node.input if x in values and values[x][0].shape == values[out][0].shape]
        same = [x for x in same if values[x][0].dtype == values[out][0].dtype]
        for name in same:
            yield _case(case, _without(model, i, name), {})
        if sum(bool(o) for o in node.output) == 1:
            yield _case(case, _fed(model, i, values[out]), {out: values[out]})


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def _without(model: onnx.ModelProto, index: int, instead: str) -> onnx.ModelProto:
    """Readers of the node's first output read `instead`."""
    copy = _copy(model)
    gone = copy.graph.node[index].output[0]
    for node in copy.graph.node:
        node.input[:] = [instead if name == gone else name for name in node.input]
    if any(o.name == gone for o in copy.graph.output):
        node = copy.graph.node[index]
        node.CopyFrom(helper.make_node("Identity", [instead], [gone]))
    else:
        del copy.graph.node[index]
    return copy


def _fed(model: onnx.ModelProto, index: int, values: list[Array]) -> onnx.ModelProto:
    """The node's output becomes a graph input."""
    copy = _copy(model)
    name = copy.graph.node[index].output[0]
    del copy.graph.node[index]
    kind = helper.np_dtype_to_tensor_dtype(values[0].dtype)
    shape = [a if a == b else None for a, b in zip(values[0].shape, values[1].shape, strict=True)]
    copy.graph.input.append(helper.make_tensor_value_info(name, kind, shape))
    return copy


def _case(case: Case, model: onnx.ModelProto, more: dict[str, list[Array]]) -> Case:
    """The model without what nothing reads, and the inputs that it still has."""
    net = Network(model, {}, {})
    alive: set[int] = set()
    stack = [net.producer[o] for o in net.outputs if o in net.producer]
    while stack:
        i = stack.pop()
        if i not in alive:
            alive.add(i)
            stack.extend(net.producer[x] for x in net.reads(i) if x in net.producer)
    nodes = [model.graph.node[i] for i in range(len(model.graph.node)) if i in alive]
    read = {x for i in alive for x in net.reads(i)} | set(net.outputs)
    weights = [t for t in model.graph.initializer if t.name in read]
    inputs = [i for i in model.graph.input if i.name in read]
    for field, kept in ((model.graph.node, nodes), (model.graph.initializer, weights), (model.graph.input, inputs)):
        fresh = [type(v).FromString(v.SerializeToString()) for v in kept]
        del field[:]
        field.extend(fresh)
    wanted = {v.name for v in graph_inputs(model)}
    feeds = tuple(
        {k: v for k, v in {**f, **{n: values[r] for n, values in more.items()}}.items() if k in wanted}
        for r, f in enumerate(case.feeds)
    )
    return Case(case.seed, model, feeds, case.story)


def _values(case: Case) -> dict[str, list[Array]]:
    """The value of every tensor on each set of inputs, as far as it is a tensor."""
    names = [o for n in case.model.graph.node for o in n.output if o]
    try:
        session = runtime.session(runtime.with_outputs(case.model, names), threads=1, optimise=False)
        results = [runtime.run(session, f) for f in case.feeds]
    except ModelError:
        return {}
    made = {n: [r[i] for r in results] for i, n in enumerate(names)}
    return {n: v for n, v in made.items() if all(isinstance(a, np.ndarray) for a in v)} | {
        n: [f[n] for f in case.feeds] for n in case.feeds[0]
    }


def store(folder: Path, case: Case, made: Outcome) -> None:
    """Writes the model, its inputs and what was wrong."""
    stem = folder / str(case.seed)
    stem.with_suffix(".onnx").write_bytes(case.model.SerializeToString())
    for i, feeds in enumerate(case.feeds):
        np.savez(stem.with_suffix(f".inputs{i}.npz"), **feeds)  # type: ignore[arg-type]
    lines = [made.story, *(f"{f.plan}: {f.kind}: {f.text}" for f in made.findings), ""]
    stem.with_suffix(".txt").write_text("\n".join(lines) + onnx.printer.to_text(case.model))
