"""Edits to a copy of a model: constants by axis, node inputs, attributes. Shared by surgery and by the oracle."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
from onnx import helper

from onnxprune import weights
from onnxprune.channels import Dim
from onnxprune.control import defined, every_graph, graphs, layout
from onnxprune.graph import Array, Network
from onnxprune.inline import constant_value
from onnxprune.rules.edits import Become, Edit, SetAttr, SetConst, SetEntries, SetInput

Transform: TypeAlias = Callable[[Array, int], Array]
"""(array, axis) -> array."""


class Editor:
    """A copy of the network's model with the means to change it; `model` is the result.

    Of a large model only the graph is copied: what is changed goes into the network's scratch folder.
    """

    def __init__(self, net: Network) -> None:
        self.net = net
        self.model = onnx.ModelProto()
        self.model.CopyFrom(net.source)
        self._scratch = net.scratch if weights.references(net.source) else None
        followed = net.inside.followed
        self._graphs = list(graphs(self.model.graph, followed))
        self._nodes = [node for _, node in layout(self.model.graph, followed)]  # where the network's nodes stand in the copy
        self._protos = {t.name: t for g in self._graphs for t in g.initializer}
        self._lists: dict[str, onnx.NodeProto] = {}  # Constant nodes that say their numbers without a tensor
        for node in self._nodes:
            if node.op_type == "Constant" and node.output and node.output[0] in net.initializers:
                self._add_node(node)
        self._declared = {i.name: i for i in self.model.graph.input if i.type.HasField("tensor_type")}
        self._taken = {name for g in every_graph(self.model.graph) for name in defined(g)}
        self._added: dict[str, int] = {}  # the highest number given to an initializer like another one

    def _add_node(self, node: onnx.NodeProto) -> None:
        proto = constant_value(node)
        assert proto is not None
        self._protos[node.output[0]] = proto
        if all(a.name != "value" for a in node.attribute):
            self._lists[node.output[0]] = node

    def constants(self, changes: Mapping[Dim, Transform]) -> None:
        """Applies the transforms to constants, axis by axis; accidental sharing is undone where uses differ."""
        by_use: dict[tuple[str, str], list[tuple[int, Transform]]] = {}
        for dim, transform in changes.items():
            if dim.tensor in self._protos:
                by_use.setdefault((dim.tensor, dim.use), []).append((dim.axis, transform))
        shared: dict[str, dict[str, Array]] = {}
        for (tensor, use), transforms in by_use.items():
            value = weights.array(self._protos[tensor])
            for axis, transform in transforms:
                value = transform(value, axis)
            if use:
                shared.setdefault(tensor, {})[use] = value
            else:
                self.set(tensor, value)
        for tensor, values in shared.items():
            self._set_uses(tensor, values)

    def _set_uses(self, tensor: str, values: Mapping[str, Array]) -> None:
        """One value for each use of a shared constant: in place if all agree, else a constant of its own for each value."""
        uses = [f"{node}.{position}" for node, position in self.net.uses[tensor]]
        others = tensor in self.net.read_elsewhere
        distinct = {v.tobytes() for v in values.values()}
        if len(distinct) == 1 and set(uses) == set(values) and not others:
            self.set(tensor, next(iter(values.values())))
            return
        made: dict[bytes, str] = {}
        for use in uses:
            if use in values:
                key = values[use].tobytes()
                if key not in made:
                    made[key] = self.add(tensor, values[use])
                node, position = (int(v) for v in use.split("."))
                self._nodes[node].input[position] = made[key]

    def set(self, tensor: str, value: Array) -> None:
        """Replaces the value of a constant in place; its type stays."""
        if tensor in self._lists:
            node = self._lists[tensor]
            _set_attribute(node, next(a.name for a in node.attribute if a.name.startswith("value_")), value.tolist())
            self._add_node(node)
            return
        proto = self._protos[tensor]
        name, doc = proto.name, proto.doc_string
        proto.CopyFrom(weights.tensor_of(value, proto.data_type, self._scratch))
        proto.name = name
        if doc:  # even an empty text takes two bytes once it is set
            proto.doc_string = doc
        if tensor in self._declared:
            _declare(self._declared[tensor], value.shape)

    def add(self, like: str, value: Array) -> str:
        """A new initializer with a name of its own, after `like`; returns the name."""
        name = self._named(like)
        known = self._protos.get(like)
        kind = known.data_type if known is not None else helper.np_dtype_to_tensor_dtype(value.dtype)
        proto = weights.tensor_of(value, kind, self._scratch)
        proto.name = name
        self.model.graph.initializer.append(proto)
        self._protos[name] = self.model.graph.initializer[-1]
        if self.model.ir_version < 4:  # until then every initializer had to be a graph input too
            self.model.graph.input.append(helper.make_tensor_value_info(name, kind, list(value.shape)))
        return name

    def _named(self, like: str) -> str:
        """A name that nothing has yet, after `like`."""
        number = self._added.get(like, 0) + 1
        while (name := f"{like}.{number}") in self._taken:
            number += 1
        self._taken.add(name)
        self._added[like] = number
        return name

    def node(self, index: int, edit: Edit) -> None:
        """Applies one edit that a rule asked for at node `index`."""
        node = self._nodes[index]
        if isinstance(edit, SetAttr):
            _set_attribute(node, edit.name, edit.value)
        elif isinstance(edit, SetConst):
            tensor = self._own(edit.source[0], edit.use)
            value = weights.array(self._protos[tensor]).copy()
            value.reshape(-1)[edit.source[1]] = edit.value
            self.set(tensor, value)
        elif isinstance(edit, SetInput):
            self._set_input(node, edit)
        elif isinstance(edit, SetEntries):
            self._set_entries(node, edit)
        elif isinstance(edit, Become):
            del node.input[1:]
            for value in edit.constants:
                node.input.append(self.add(f"{node.output[0]}.operand{len(node.input)}", value))
            del node.attribute[:]
            for name, setting in edit.attributes.items():
                _set_attribute(node, name, setting)
            node.op_type = edit.op

    def _set_input(self, node: onnx.NodeProto, edit: SetInput) -> None:
        while len(node.input) <= edit.position:
            node.input.append("")
        name = node.input[edit.position]
        if name in self._protos and self._alone(name):
            self.set(name, edit.value)
        else:
            node.input[edit.position] = self.add(name or f"{node.output[0]}.operand{edit.position}", edit.value)

    def _set_entries(self, node: onnx.NodeProto, edit: SetEntries) -> None:
        """A Where before the node takes the numbers from a constant; the other entries stay computed."""
        computed = node.input[edit.position]
        chosen = np.zeros(self.net.shapes[computed], np.bool_)
        values = np.zeros(self.net.shapes[computed], np.int64)
        for k, value in edit.values.items():
            chosen.reshape(-1)[k], values.reshape(-1)[k] = True, value
        start = f"{node.output[0]}.operand{edit.position}"
        reads = [self.add(f"{start}.{what}", array) for what, array in (("set", chosen), ("sizes", values))]
        made = self._named(start)
        graph, place = next((g, i) for g in self._graphs for i, n in enumerate(g.node) if node.output[0] in n.output)
        graph.node.insert(place, helper.make_node("Where", [*reads, computed], [made], made))
        node.input[edit.position] = made

    def _alone(self, name: str) -> bool:
        """Whether a constant has one reader, so that it may be changed in place."""
        return len(self.net.uses.get(name, [])) == 1 and name not in self.net.read_elsewhere

    def _own(self, tensor: str, use: tuple[int, int]) -> str:
        """The constant itself where nobody else reads it, else a copy for this use; asked again, the same copy."""
        index, position = use
        reads = self._nodes[index].input
        if reads[position] == tensor and not self._alone(tensor):
            reads[position] = self.add(tensor, weights.array(self._protos[tensor]))
        return str(reads[position])

    def declare(self, sizes: Mapping[str, Mapping[int, int]]) -> None:
        """Brings declared shapes up to date: sizes[tensor][axis] is the new size. What does not fit is dropped.

        That is the value_info of every graph, and what a body says of its inputs and outputs.
        """
        for number, graph in enumerate(self._graphs):
            fits = [self._resized(info, sizes) for info in graph.value_info]
            if not all(fits):
                keep = [info for info, fit in zip(graph.value_info, fits, strict=True) if fit]
                fresh = [onnx.ValueInfoProto.FromString(i.SerializeToString()) for i in keep]
                del graph.value_info[:]
                graph.value_info.extend(fresh)
            for info in [*graph.input, *graph.output] if number else []:  # the first is the model's own interface
                if not self._resized(info, sizes) and info.type.tensor_type.HasField("shape"):
                    info.type.tensor_type.ClearField("shape")

    def _resized(self, info: onnx.ValueInfoProto, sizes: Mapping[str, Mapping[int, int]]) -> bool:
        """Writes the new sizes into a declared shape; False where it does not have these axes, or is a sequence's."""
        if info.type.HasField("sequence_type"):
            return not any(x in sizes for x in self.net.reads(self.net.producer[info.name]))
        if not info.type.tensor_type.HasField("shape"):
            return True
        dims = info.type.tensor_type.shape.dim
        stored = self._protos.get(info.name)
        new = sizes.get(info.name, {}) if stored is None else dict(enumerate(stored.dims))
        rank = len(self.net.shapes.get(info.name, dims) if stored is None else stored.dims)
        if new and len(dims) != rank:
            return False
        for axis, size in new.items():
            if dims[axis].HasField("dim_value"):
                dims[axis].dim_value = size
        return True


def _declare(value: onnx.ValueInfoProto, shape: tuple[int, ...]) -> None:
    del value.type.tensor_type.shape.dim[:]
    for n in shape:
        value.type.tensor_type.shape.dim.add().dim_value = n


def _set_attribute(node: onnx.NodeProto, name: str, value: Any) -> None:
    kept = [a for a in node.attribute if a.name != name]
    fresh = [onnx.AttributeProto.FromString(a.SerializeToString()) for a in kept]
    del node.attribute[:]
    node.attribute.extend(fresh)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))
