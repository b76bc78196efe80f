"""A graph that computes, beside a network's tensors, how far a pruned one's can be from them: the a-posteriori recursion.

With W the weights of the original, W^ those of the masked original (which computes what the pruned network computes) and
|a^ - a| <= e elementwise, a linear layer gives z^ - z = (W^ - W) a + W^ (a^ - a), hence |z^ - z| <= |(W^ - W) a| + |W^| e.
The first term is exact, as the original's activations and both weights are at hand; it is never larger than the theorem's
eps (|W| * |a|). `certificate.rules` has what follows for every other operator. Where nothing was cut before a tensor, e = 0.
All of it becomes one ONNX graph, so that ONNX Runtime runs the recursion on a batch of samples like any network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune import runtime
from onnxprune.graph import Array, Network

PREFIX = "onnxprune.e."


class UnknownError(Exception):
    """The recursion does not know what an operator does to an error; the text says which and why."""


@dataclass(eq=False)
class Recursion:
    """Collects the nodes. errors: for each tensor the one that bounds its error. ends: why there is none.

    changed: constants, computed ones included, of which the masked model has other values: (W, W^) by (node, position).
    """

    net: Network
    masked: onnx.ModelProto
    errors: dict[str, str] = field(default_factory=dict)
    ends: dict[str, str] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def __post_init__(self) -> None:
        pruned = Network(self.masked, self.net.shapes, {})
        names = [(i, p, a, b) for i, p, a, b in self._inputs() if a in self.net.fixed and b in pruned.fixed]
        self._values = runtime.fixed_values(self.net, dict.fromkeys(a for _, _, a, _ in names))
        after = runtime.fixed_values(pruned, dict.fromkeys(b for _, _, _, b in names))
        self.changed = {(i, p): (self._values[a], after[b]) for i, p, a, b in names if not _same(self._values[a], after[b])}

    def _inputs(self) -> list[tuple[int, int, str, str]]:
        """(node, position, name in the original, name in the masked model) of what nodes with changing outputs read."""
        pairs = list(zip(self.net.model.graph.node, self.masked.graph.node, strict=True))
        live = [(i, a, b) for i, (a, b) in enumerate(pairs) if not all(o in self.net.fixed for o in a.output if o)]
        return [(i, p, x, y) for i, a, b in live for p, (x, y) in enumerate(zip(a.input, b.input, strict=True)) if x]

    # ------------------------------------------------------------------------------------------- what rules build with

    def emit(self, op: str, inputs: Sequence[str], domain: str = "", **attributes: Any) -> str:
        """Adds a node with one output; returns its name."""
        name = f"{PREFIX}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], domain=domain, **attributes))
        return name

    def constant(self, value: Array) -> str:
        name = f"{PREFIX}c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def scalar(self, value: float, like: str) -> str:
        """A number of the same type as a tensor of the network, which is float32 unless it is known to be float64."""
        return self.constant(np.array(value, self._values[like].dtype if like in self._values else np.float32))

    def again(self, index: int, inputs: Sequence[str], **changes: Any) -> list[str]:
        """Node `index` once more on other inputs: the names of its outputs. changes: attributes; None takes one away."""
        node = onnx.NodeProto()
        node.CopyFrom(self.net.model.graph.node[index])
        kept = [a for a in node.attribute if a.name not in changes]
        del node.attribute[:]
        node.attribute.extend(kept)
        node.attribute.extend(helper.make_attribute(k, v) for k, v in changes.items() if v is not None)
        names = [f"{PREFIX}{len(self.nodes)}.{k}" if o else "" for k, o in enumerate(node.output)]
        node.input[:], node.output[:] = list(inputs), names
        node.name = ""
        self.nodes.append(node)
        return names

    def total(self, parts: Sequence[str]) -> str:
        """The sum of at least one tensor."""
        result = parts[0]
        for part in parts[1:]:
            result = self.emit("Add", [result, part])
        return result

    def filled(self, error: str, like: str) -> str:
        """An error broadcast to the shape of a tensor of the network."""
        return self.emit("Add", [error, self.emit("Sub", [like, like])])

    def value(self, index: int, position: int) -> Array | None:
        """The value of a constant input as the original has it; None where it is no constant."""
        return self._values.get(self.net.model.graph.node[index].input[position])

    def error(self, index: int, position: int) -> str | None:
        """The error of an input of a node, that of a changed constant included; None for 0."""
        if (index, position) in self.changed:
            before, after = self.changed[index, position]
            return self.constant(np.abs(after - before))
        return self.errors.get(self.net.model.graph.node[index].input[position])

    # ------------------------------------------------------------------------------------------------------ the walk

    def run(self, rules: Mapping[str, Any]) -> None:
        """Walks the network in its order. rules: by operator, (recursion, node index) -> an error or None per output."""
        for index in self.net.order:
            node = self.net.model.graph.node[index]
            outputs = [o for o in node.output if o]
            if all(o in self.net.fixed for o in outputs):
                self.nodes.append(node)
                continue
            self.nodes.append(node)
            self._propagate(index, node, rules)

    def _propagate(self, index: int, node: onnx.NodeProto, rules: Mapping[str, Any]) -> None:
        reads = self.net.reads(index)
        if node.op_type in ("Shape", "Size"):
            return
        ended = next((self.ends[x] for x in reads if x in self.ends), None)
        touched = any(x in self.errors for x in reads) or any((index, p) in self.changed for p in range(len(node.input)))
        if ended is None and touched:
            try:
                if node.domain not in ("", "ai.onnx") or node.op_type not in rules:
                    raise UnknownError(f"unknown operator {node.domain + '.' if node.domain else ''}{node.op_type}")
                found = rules[node.op_type](self, index)
            except UnknownError as reason:
                ended = f"{reason} ('{self.net.label(index)}')"
            else:
                self.errors |= {o: e for o, e in zip(node.output, found, strict=False) if o and e is not None}
        if ended is not None:
            self.ends |= {o: ended for o in node.output if o}

    def model(self) -> tuple[onnx.ModelProto, dict[str, str]]:
        """The graph that computes all outputs of the network and their errors, and the latter by output."""
        made = onnx.ModelProto()
        made.CopyFrom(self.net.model)
        del made.graph.node[:], made.graph.output[:], made.graph.value_info[:]
        made.graph.node.extend(self.nodes)
        made.graph.initializer.extend(self.constants)
        outputs = {o: self.errors[o] for o in self.net.outputs if o in self.errors}
        made.graph.output.extend(onnx.ValueInfoProto(name=n) for n in dict.fromkeys([*self.net.outputs, *outputs.values()]))
        made.ir_version = max(made.ir_version, 4)  # from then on constants need not be inputs
        return made, outputs


def _same(a: Array, b: Array) -> bool:
    return a.shape == b.shape and np.array_equal(a, b)
