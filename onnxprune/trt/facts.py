"""A model as TensorRT's parser would see it: every node of every graph, and what is known of tensors without running it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

import onnx
from onnx import TensorProto, helper

from onnxprune import inline, kinds, weights
from onnxprune.control import bodies, every_graph
from onnxprune.errors import ModelError
from onnxprune.graph import Array, graph_inputs

CONSTANT_DOMAINS = ("", "ai.onnx")
NAMES = {number: name.lower() for name, number in TensorProto.DataType.items()}
NAMES[TensorProto.FLOAT] = "float32"


@dataclass(frozen=True)
class Finding:
    """What one check says of one place. severity: "refused" (TensorRT would not take it), "unknown" (not known here) or
    "warning" (it is taken, but not as one may think). where: the node or tensor."""

    severity: str
    what: str
    where: str
    hint: str = ""


@dataclass(frozen=True, eq=False)
class Facts:
    """The model, with its local functions written out; names of tensors are those of the file where it has none."""

    model: onnx.ModelProto
    version: tuple[int, int] = (11, 5)
    known: dict[str, int | None] = field(default_factory=dict)

    @staticmethod
    def of(model: onnx.ModelProto, version: tuple[int, int]) -> Facts:
        """Raises ModelError for local functions that cannot be inlined, and nodes that lack inputs or outputs."""
        flat = inline.without_functions(model, "the model") if model.functions else model
        made = Facts(flat, version)
        for node in made.nodes():
            _complete(node, made.opset)
        return replace(made, known=_types(flat))

    @cached_property
    def opset(self) -> int:
        return next((o.version for o in self.model.opset_import if o.domain in CONSTANT_DOMAINS), 1)

    @cached_property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        return graph_inputs(self.model)

    @cached_property
    def graphs(self) -> list[onnx.GraphProto]:
        return list(every_graph(self.model.graph))

    def nodes(self) -> Iterator[onnx.NodeProto]:
        """Of all graphs, bodies of If, Loop and Scan included."""
        for graph in self.graphs:
            yield from graph.node

    @cached_property
    def ambiguous(self) -> set[str]:
        """Names that several graphs give to tensors of their own: nothing is said of them."""
        return inline.repeated_names(self.model.graph)

    @cached_property
    def constants(self) -> dict[str, TensorProto]:
        """Initializers and values of Constant nodes, of all graphs."""
        found = {t.name: t for g in self.graphs for t in g.initializer}
        for node in self.nodes():
            if node.op_type == "Constant" and node.domain in CONSTANT_DOMAINS:
                value = inline.constant_value(node)
                if value is not None:
                    found[node.output[0]] = value
        return {k: v for k, v in found.items() if k not in self.ambiguous}

    @cached_property
    def fixed(self) -> set[str]:
        """Tensors that are computed from constants alone, or from nothing but sizes that are declared."""
        found = set(self.constants)
        for graph in self.graphs:
            for node in graph.node:
                sizes = node.op_type in ("Shape", "Size") and None not in self.shapes.get(node.input[0], [None])
                if sizes or (node.input and not bodies(node) and all(x in found for x in node.input if x)):
                    found.update(o for o in node.output if o)
        return found - self.ambiguous

    @cached_property
    def shapes(self) -> dict[str, list[int | None]]:
        """Sizes that follow from the declared inputs; None where these leave one open."""
        return inline.inferred_shapes(self.model)

    def array(self, name: str) -> Array | None:
        """The value of a constant; None for anything else."""
        tensor = self.constants.get(name)
        return None if tensor is None else weights.array(tensor)

    def kind(self, name: str) -> str | None:
        """The element type of a tensor, in small letters as ONNX calls it ("float32" for FLOAT); None if it is not known."""
        tensor = self.constants.get(name)
        number = tensor.data_type if tensor is not None else self.known.get(name)
        return NAMES.get(number) if number and name not in self.ambiguous else None

    def sizes(self, name: str) -> list[int | None] | None:
        """The sizes of a tensor, None for those left open; None where not even their number is known."""
        if name in self.constants:
            return list(self.constants[name].dims)
        return None if name in self.ambiguous else self.shapes.get(name)


def _complete(node: onnx.NodeProto, opset: int) -> None:
    """Raises ModelError where a node of ONNX has fewer inputs or outputs than it needs, or came with a later operator set."""
    if node.domain not in CONSTANT_DOMAINS:
        return
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, "")
    except onnx.defs.SchemaError:
        if onnx.defs.has(node.op_type):
            hint = "the file is no valid ONNX model"
            raise ModelError(f"{node.op_type} '{label(node)}' is no operator of set {opset}", hint=hint) from None
        return
    if len(node.input) < schema.min_input or len(node.output) < schema.min_output:
        raise ModelError(f"{node.op_type} '{label(node)}' lacks inputs or outputs", hint="the file is no valid ONNX model")


def _types(model: onnx.ModelProto) -> dict[str, int | None]:
    known = {v.name: v.type.tensor_type.elem_type or None for g in every_graph(model.graph) for v in g.input}
    return known | kinds.tensor_types(model)


def label(node: onnx.NodeProto) -> str:
    """What to call a node: its name, else its first output."""
    return node.name or next((o for o in node.output if o), node.op_type)


def attributes(node: onnx.NodeProto) -> dict[str, object]:
    """The attributes by name, as Python values (text as str)."""
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {k: v.decode(errors="replace") if isinstance(v, bytes) else v for k, v in found.items()}
