"""Control flow: the nodes inside If, Loop and Scan laid out among all others, so that the analyses follow them.

A *body* is a graph in an attribute of a node; it reads names of the graphs around it (ONNX IR, "Graphs"). In the flat
graph the bodies' nodes stand in one list with the others. The node itself is left as one or two *borders*, in a domain of
their own, that only say which tensors are one and the same:

    If(condition, outputs of then, outputs of else) -> outputs
    LoopBody, ScanBody(inputs) -> inputs of the body;  Loop, Scan(states in the body, outputs of the body) -> outputs

It is analysed, never run. Names have to be unique over all graphs, which `inline.simplified` sees to.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx
from onnx import helper

FLAT = "onnxprune.flat"  # domain of the borders
LOOPS = ("Loop", "Scan")


@dataclass(frozen=True)
class Inside:
    """What is known of the bodies of a model's nodes; nodes are named by `key`.

    followed: the nodes whose bodies lie in the flat graph. opaque: why the bodies of the others do not. repeats: how often
    the probe run made the tensors in bodies of loops.
    """

    followed: frozenset[str] = frozenset()
    opaque: Mapping[str, str] = field(default_factory=dict)
    repeats: Mapping[str, int] = field(default_factory=dict)


def bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node; of an If first what is run where the condition holds."""
    found = [(a.name != "then_branch", g) for a in node.attribute for g in [a.g, *a.graphs] if g.node or g.output]
    return [g for _, g in sorted(found, key=lambda pair: pair[0])] if node.op_type == "If" else [g for _, g in found]


def key(node: onnx.NodeProto) -> str:
    """What stands for a node: the first tensor that it makes."""
    return next((o for o in node.output if o), "")


def defined(graph: onnx.GraphProto) -> list[str]:
    """The names that a graph itself gives to tensors, not those of graphs inside it."""
    names = [i.name for i in graph.input] + [t.name for t in graph.initializer]
    names += [t.values.name for t in graph.sparse_initializer] + [o for n in graph.node for o in n.output if o]
    return list(dict.fromkeys(names))


def captured(node: onnx.NodeProto) -> list[str]:
    """The outer tensors that the bodies of a node read."""
    return list(dict.fromkeys(name for body in bodies(node) for name in outer(body)))


def outer(body: onnx.GraphProto) -> list[str]:
    """The tensors that a body, with the bodies inside it, reads from around it."""
    inner = set(defined(body))
    reads = [x for n in body.node for x in [*n.input, *captured(n)]] + [o.name for o in body.output]
    return list(dict.fromkeys(x for x in reads if x and x not in inner))


def every_graph(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph and all bodies in it, at any depth."""
    yield graph
    for node in graph.node:
        for body in bodies(node):
            yield from every_graph(body)


def graphs(graph: onnx.GraphProto, followed: Collection[str]) -> Iterator[onnx.GraphProto]:
    """The graph and the bodies of the nodes in `followed` (named by `key`), at any depth."""
    yield graph
    for node in graph.node:
        if key(node) in followed:
            for body in bodies(node):
                yield from graphs(body, followed)


def layout(graph: onnx.GraphProto, followed: Collection[str]) -> Iterator[tuple[onnx.NodeProto, onnx.NodeProto]]:
    """(a node of the flat graph, the node of the file that it is or stands for), in the order of the flat graph."""
    for node in graph.node:
        if key(node) not in followed:
            yield node, node
            continue
        inside = bodies(node)
        if node.op_type in LOOPS:
            yield _entry(node, inside[0]), node
        for body in inside:
            yield from layout(body, followed)
        yield _exit(node, inside), node


def flatten(model: onnx.ModelProto, followed: Collection[str]) -> onnx.ModelProto:
    """The flat graph; the model itself where no node is followed."""
    if not followed:
        return model
    flat = onnx.ModelProto()
    flat.CopyFrom(model)
    del flat.graph.node[:], flat.graph.initializer[:]
    flat.graph.node.extend(node for node, _ in layout(model.graph, followed))
    for graph in graphs(model.graph, followed):
        flat.graph.initializer.extend(graph.initializer)
    return flat


def states(node: onnx.NodeProto, body: onnx.GraphProto) -> list[str]:
    """What a Loop or Scan carries from one iteration to the next, as its body reads it."""
    scanned = next((a.i for a in node.attribute if a.name == "num_scan_inputs"), 0)
    names = [i.name for i in body.input]
    return names[2:] if node.op_type == "Loop" else names[: len(names) - scanned]


def _entry(node: onnx.NodeProto, body: onnx.GraphProto) -> onnx.NodeProto:
    made = helper.make_node(f"{node.op_type}Body", node.input, [i.name for i in body.input], domain=FLAT)
    return _with_attributes(made, node)


def _exit(node: onnx.NodeProto, inside: list[onnx.GraphProto]) -> onnx.NodeProto:
    first = states(node, inside[0]) if node.op_type in LOOPS else list(node.input)
    reads = first + [o.name for body in inside for o in body.output]
    made = helper.make_node(node.op_type, reads, list(node.output), node.name or None, domain=FLAT)
    return _with_attributes(made, node)


def _with_attributes(made: onnx.NodeProto, node: onnx.NodeProto) -> onnx.NodeProto:
    made.attribute.extend(a for a in node.attribute if a.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.INT))
    return made


def handed_out(node: onnx.NodeProto, position: int) -> bool:
    """Whether an input of a border is what a body makes, so that the node in the file does not read it."""
    return node.domain == FLAT and (position > 0 if node.op_type == "If" else node.op_type in LOOPS)


def decides(node: onnx.NodeProto, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether values decide which nodes run, or how often, and with that the sizes of what a node of the flat graph makes."""
    if node.domain != FLAT:
        return bool(bodies(node))
    if node.op_type == "If":
        count = len(node.output)
        pairs = zip(node.input[1:], node.input[1 + count :], strict=False)
        return any(shapes.get(a) != shapes.get(b) for a, b in pairs)
    return node.op_type == "Loop"


# ------------------------------------------------------------------------------------------- looking into bodies


def expose(model: onnx.ModelProto, tensors: Iterable[str]) -> tuple[onnx.ModelProto, dict[str, str]]:
    """(a copy that hands out tensors of bodies at the top, for every tensor its name there); those at the top keep theirs.

    What a branch that was not taken would have made is empty; what the body of a Loop or Scan makes is stacked along a new
    first axis, one entry for each iteration. The model itself where there is nothing in bodies.
    """
    wanted = list(dict.fromkeys(tensors))
    if set(wanted) <= set(defined(model.graph)):
        return model, {name: name for name in wanted}
    inferred = onnx.shape_inference.infer_shapes(model)
    infos = [v for g in every_graph(inferred.graph) for v in [*g.input, *g.value_info, *g.output]]
    kinds = {v.name: v.type.tensor_type.elem_type for v in infos}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = _expose(copy.graph, {name: kinds.get(name) or onnx.TensorProto.FLOAT for name in wanted})
    return copy, {name: found[name] for name in wanted}


def _expose(graph: onnx.GraphProto, tensors: Mapping[str, int]) -> dict[str, str]:
    found = {name: name for name in defined(graph) if name in tensors}
    for node in graph.node:
        inside = bodies(node)
        for body in inside:
            for tensor, name in _expose(body, tensors).items():
                if tensor in found:  # a name used twice: what is followed is not in here
                    continue
                seen = f"{name}@{len(node.output)}"
                body.node.append(helper.make_node("Identity", [name], [seen]))
                body.output.append(onnx.ValueInfoProto(name=seen))
                for other in inside:
                    if other is not body:
                        nothing = helper.make_tensor("", tensors[tensor], [0], [])
                        other.node.append(helper.make_node("Constant", [], [f"{seen}.none"], value=nothing))
                        other.output.append(onnx.ValueInfoProto(name=f"{seen}.none"))
                node.output.append(f"{seen}.out")
                _one_more_scan(node)
                found[tensor] = f"{seen}.out"
    return found


def _one_more_scan(node: onnx.NodeProto) -> None:
    for attribute in node.attribute:
        if attribute.name in ("scan_output_axes", "scan_output_directions"):
            attribute.ints.append(0)
