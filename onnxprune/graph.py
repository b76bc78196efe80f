"""The graph IR: a read-only view of a network for the analyses.

The IR is ONNX GraphSurgeon's: `Network.nodes[i]` is the GraphSurgeon node of `model.graph.node[i]`. Analyses walk the
IR; surgery edits a copy of the ModelProto itself, so that whatever is not touched stays as the exporter wrote it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from onnxprune import control, inline, weights, wire
from onnxprune.control import Inside
from onnxprune.errors import OptionError
from onnxprune.weights import Scratch

Array = np.ndarray[Any, Any]

gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL  # its warnings would go to the user's standard output
# Operators that make as many elements as the data have them do.
DATA_DEPENDENT = {"Compress", "NonMaxSuppression", "NonZero", "Range", "Unique"}


@dataclass(frozen=True, eq=False)
class Network:
    """A model together with what one run of it told: the shape of every tensor, the value of every small integer one.

    model: the flat graph, see `control`; it is the model itself unless bodies of If, Loop or Scan are followed. shapes:
    concrete shape of every tensor, batch 1 where the batch is dynamic. values: of integer and constant tensors. feeds: the
    inputs of that run. again: what a second run, on inputs of other sizes, told; None if there was none. alone: whether
    that is because no other sizes ran. nested: the model itself where `model` is not. inside: what is known of its bodies.
    scratch: where edits of a large model put their changed weights; what they yield lasts as long as this does.
    """

    model: onnx.ModelProto
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Array]
    feeds: Mapping[str, Array] = field(default_factory=dict)
    again: Network | None = None
    alone: bool = False
    nested: onnx.ModelProto | None = None
    inside: Inside = field(default_factory=Inside)
    scratch: Scratch = field(default_factory=Scratch)

    @property
    def source(self) -> onnx.ModelProto:
        """The model as the file has it, which can be run and edited."""
        return self.model if self.nested is None else self.nested

    @cached_property
    def digest(self) -> str:
        """`wire.digest` of the model as the file has it."""
        return wire.digest(self.source)

    @cached_property
    def static(self) -> bool:
        """Whether every tensor has the same shape in every run."""
        open_sizes = any(d.dim_value <= 0 for v in self.inputs for d in v.type.tensor_type.shape.dim)
        return not open_sizes and not any(
            n.op_type in DATA_DEPENDENT or control.decides(n, self.shapes) for n in self.model.graph.node
        )

    def steady(self, tensor: str, axis: int) -> bool:
        """Whether an axis has the same size in every run, as far as a second run tells; False where it is not known."""
        if self.static or tensor in self.initializers:
            return True
        if self.again is None or tensor in self._undecided:
            return False
        return self.again.shapes.get(tensor, ())[axis : axis + 1] == (self.shapes[tensor][axis],)

    def certain(self, tensor: str, axis: int) -> bool:
        """Whether an axis has the same size in every run, as far as follows from the declared inputs alone."""
        if self.static or tensor in self.initializers:
            return True
        return (self._inferred.get(tensor, [])[axis : axis + 1] or [None]) != [None]

    @cached_property
    def _inferred(self) -> dict[str, list[int | None]]:
        return inline.inferred_shapes(self.source)

    @cached_property
    def _undecided(self) -> set[str]:
        """Tensors whose sizes may hang on a condition that had one value in both runs."""
        found: set[str] = set()
        for i in self.order:
            node = self.model.graph.node[i]
            if control.decides(node, self.shapes) or any(x in found for x in node.input):
                found.update(node.output)
        return found

    @cached_property
    def graph(self) -> gs.Graph:
        return gs.import_onnx(self.model)

    @cached_property
    def nodes(self) -> list[gs.Node]:
        return list(self.graph.nodes)

    @cached_property
    def order(self) -> list[int]:
        """Node indices in topological order (exporters do write unsorted graphs)."""
        producer = self.producer
        order: list[int] = []
        state = [0] * len(self.model.graph.node)
        for root in range(len(state)):
            stack = [(root, False)]
            while stack:
                i, done = stack.pop()
                if done:
                    order.append(i)
                elif not state[i]:
                    state[i] = 1
                    stack.append((i, True))
                    stack.extend(
                        (producer[x], False) for x in reversed(self.reads(i)) if x in producer and not state[producer[x]]
                    )
        return order

    @cached_property
    def producer(self) -> dict[str, int]:
        """The node that makes each tensor."""
        return {o: i for i, n in enumerate(self.model.graph.node) for o in n.output if o}

    def reads(self, index: int) -> list[str]:
        """Names of all tensors that node `index` reads, those captured by its subgraphs included."""
        return [x for x in self.model.graph.node[index].input if x] + self.captured[index]

    @cached_property
    def captured(self) -> list[list[str]]:
        """For every node the outer tensors that its subgraphs (If, Loop, Scan bodies) read."""
        return [control.captured(n) for n in self.model.graph.node]

    @cached_property
    def read_elsewhere(self) -> set[str]:
        """The tensors that `uses` does not tell all about: graph outputs, and what subgraphs capture."""
        return {x for names in self.captured for x in names}.union(self.outputs)

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """Every constant tensor of the file: initializers and outputs of Constant nodes."""
        found = {t.name: t for t in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                value = inline.constant_value(node)
                if value is not None:
                    found[node.output[0]] = value
        return found

    @cached_property
    def kinds(self) -> dict[str, np.dtype[Any]]:
        """The NumPy type of every constant tensor."""
        return {k: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(t.data_type)) for k, t in self.initializers.items()}

    @cached_property
    def uses(self) -> dict[str, list[tuple[int, int]]]:
        """For every tensor the (node, input position) pairs that read it."""
        uses: dict[str, list[tuple[int, int]]] = {}
        for i, node in enumerate(self.model.graph.node):
            for position, name in enumerate(node.input):
                if name:
                    uses.setdefault(name, []).append((i, position))
        return uses

    @cached_property
    def fixed(self) -> set[str]:
        """Tensors computed from constants alone (weights behind Identity, Transpose, Cast ...), constants included."""
        fixed = set(self.initializers)
        for i in self.order:
            node = self.model.graph.node[i]
            constant = node.op_type == "Constant" or (bool(node.input) and all(x in fixed for x in self.reads(i)))
            if constant and not node.op_type.startswith("Random") and node.domain != control.FLAT:
                fixed.update(o for o in node.output if o)
        return fixed

    @cached_property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Graph inputs proper: those that are not initializers."""
        return graph_inputs(self.model)

    @cached_property
    def outputs(self) -> list[str]:
        return [o.name for o in self.model.graph.output]

    @cached_property
    def opset(self) -> int:
        return next((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), 1)

    def array(self, name: str) -> Array | None:
        """The value of a constant tensor, or of one that the probe run recorded; None when it is unknown."""
        if name in self.initializers:
            return weights.array(self.initializers[name])
        return self.values.get(name)

    def label(self, index: int) -> str:
        """What to call node `index` in a report: its name where it has one of its own, else its first output."""
        node = self.model.graph.node[index]
        return node.name if node.name and self._names[node.name] == 1 else next((o for o in node.output if o), f"#{index}")

    @cached_property
    def _names(self) -> dict[str, int]:
        count: dict[str, int] = {}
        for node in self.model.graph.node:
            count[node.name] = count.get(node.name, 0) + 1
        return count


def graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller must feed: those without an initializer behind them."""
    constants = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    return [i for i in model.graph.input if i.name not in constants]


def named(option: str, text: str, inputs: Collection[str]) -> tuple[str, str]:
    """(the input, what is said of it) of NAME=WHAT, or WHAT of the only input. OptionError for a name that is none of these."""
    name, given, what = text.rpartition("=")
    if not given and len(inputs) == 1:
        name = next(iter(inputs))
    if name not in inputs:
        raise OptionError(f"{option} {text} names no input of the model", hint=f"the inputs are {', '.join(inputs)}")
    return name, what
