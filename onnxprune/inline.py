"""What is written out when a model is read: calls of local functions, and branches that are known to be taken.

An If goes where its condition is known without any input: it comes from constants, or from sizes that shape inference
finds in the declared ones (exporters ask so whether an axis has size 1 before they squeeze it).
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import onnx
import onnx.inliner
from onnx import helper, numpy_helper

from onnxprune import weights
from onnxprune.control import bodies, defined, every_graph
from onnxprune.errors import ModelError

Array = np.ndarray[Any, Any]

MAX_ELEMENTS = 4096  # of a constant that a condition depends on
# Operators that only move the elements of their first operand (Concat: of all), so that some of them may be unknown.
_MOVES = ("Cast", "Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_COMPUTED = (
    *("Abs", "Add", "Div", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Sub"),
    *("ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum"),
    *("And", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Not", "Or", "Where", "Xor"),
)


def simplified(model: onnx.ModelProto, name: str = "the model") -> onnx.ModelProto:
    """The model without local functions and without branches never taken; tensor names are unique over all graphs.

    The model itself where there is nothing to do; it is never changed. Raises ModelError, which calls the model `name`,
    when its functions cannot be inlined.
    """
    if model.functions:
        model = without_functions(model, name)
    if not any(bodies(node) for node in model.graph.node):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    changed = _unique_names(copy.graph)
    while _resolve(copy):
        changed = True
    return copy if changed else model


def without_functions(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Each call is replaced by the function's body, so that channels can be followed. Raises ModelError."""
    try:
        flat: onnx.ModelProto = onnx.inliner.inline_local_functions(model)
    except Exception as error:  # the inliner raises what its C++ core throws
        text = " ".join(str(error).split())[:200]
        raise ModelError(f"the local functions of {name} cannot be inlined: {text}") from None
    return flat


# ----------------------------------------------------------------------------------------------------- unique names


def repeated_names(graph: onnx.GraphProto) -> set[str]:
    """Names that more than one of all the graphs gives to a tensor."""
    count = Counter(name for g in every_graph(graph) for name in defined(g))
    return {name for name, times in count.items() if times > 1}


def _unique_names(graph: onnx.GraphProto) -> bool:
    """Renames what bodies define where the name is used elsewhere too; tells whether anything was."""
    repeated = repeated_names(graph)
    if repeated:
        taken = {x for g in every_graph(graph) for n in g.node for x in n.input} | {
            name for g in every_graph(graph) for name in defined(g)
        }
        _rename_bodies(graph, repeated, taken, {})
    return bool(repeated)


def _rename_bodies(graph: onnx.GraphProto, repeated: set[str], taken: set[str], scope: Mapping[str, str]) -> None:
    for node in graph.node:
        for body in bodies(node):
            inner = dict(scope)
            for name in defined(body):
                inner[name] = _fresh(name, taken) if name in repeated else name
            _rename(body, inner)
            _rename_bodies(body, repeated, taken, inner)


def _fresh(name: str, taken: set[str]) -> str:
    number = 1
    while (new := f"{name}.{number}") in taken:
        number += 1
    taken.add(new)
    return new


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Renames tensors in one graph, not in the bodies inside it."""
    for node in graph.node:
        node.input[:] = [names.get(x, x) for x in node.input]
        node.output[:] = [names.get(x, x) for x in node.output]
    tensors: list[Any] = [*graph.input, *graph.output, *graph.value_info, *graph.initializer]
    for item in [*tensors, *(t.values for t in graph.sparse_initializer)]:
        item.name = names.get(item.name, item.name)


# ------------------------------------------------------------------------------------------------ branches not taken


def _resolve(model: onnx.ModelProto) -> bool:
    """Replaces every If whose condition is known by the branch that is taken; tells whether there was one.

    Such an If may stand in any body. What is inside the branch is left for the next round.
    """
    known = _Constants(model)
    found = False
    for graph in list(every_graph(model.graph)):
        kept: list[onnx.NodeProto] = []
        for node in graph.node:
            branches = bodies(node)
            taken = known.truth(node.input[0]) if node.op_type == "If" and len(branches) == 2 else None
            if taken is None:
                kept.append(node)
            else:
                kept.extend(_spliced(graph, node, branches[0 if taken else 1]))
        if len(kept) != len(graph.node) or any(a is not b for a, b in zip(kept, graph.node, strict=True)):
            found = True
            fresh = [onnx.NodeProto.FromString(n.SerializeToString()) for n in kept]
            del graph.node[:]
            graph.node.extend(fresh)
            break  # the list of graphs no longer holds
    return found


def _spliced(graph: onnx.GraphProto, node: onnx.NodeProto, branch: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes of a branch in place of its If; the constants of the branch become the graph's."""
    made = {o for n in branch.node for o in n.output}
    names: dict[str, str] = {}
    copies = []
    for inner, out in zip((o.name for o in branch.output), node.output, strict=True):
        if out and inner in made and inner not in names:
            names[inner] = out
        elif out:  # handed out twice, a constant, or a tensor from outside
            copies.append(helper.make_node("Identity", [names.get(inner, inner)], [out]))
    nodes = onnx.GraphProto(node=branch.node)
    for part in every_graph(nodes):
        _rename(part, names)
    graph.initializer.extend(branch.initializer)
    graph.sparse_initializer.extend(branch.sparse_initializer)
    outputs = set(node.output)
    info = [v for v in [*graph.value_info, *branch.value_info] if v.name not in outputs and v.name not in names]
    fresh = [onnx.ValueInfoProto.FromString(v.SerializeToString()) for v in info]
    del graph.value_info[:]
    graph.value_info.extend(fresh)
    return [*nodes.node, *copies]


_Value: TypeAlias = tuple[Array, Array]
"""(the elements, which of them are known)."""


class _Constants:
    """Values that no input can change, as far as conditions depend on them."""

    def __init__(self, model: onnx.ModelProto) -> None:
        every = list(every_graph(model.graph))
        self.opsets = model.opset_import
        self.producer = {o: n for g in every for n in g.node for o in n.output if o}
        self.shapes = inferred_shapes(model)
        overridable = {i.name for g in every for i in g.input}  # a caller may feed these instead
        self.known: dict[str, _Value | None] = {
            t.name: None if t.name in overridable or math.prod(t.dims) > MAX_ELEMENTS else _whole(weights.array(t))
            for g in every
            for t in g.initializer
        }

    def truth(self, name: str) -> bool | None:
        """The value of a condition; None where an input decides."""
        value = self._value(name)
        return bool(value[0].ravel()[0]) if value is not None and value[0].size == 1 and value[1].all() else None

    def _value(self, name: str) -> _Value | None:
        stack, entered = [name], set[str]()
        while stack:
            top = stack[-1]
            node = self.producer.get(top)
            operands = list(node.input) if node is not None and node.op_type in (*_MOVES, *_COMPUTED) else []
            waiting = [x for x in operands if x and x not in self.known]
            if top not in self.known and waiting and top not in entered:
                entered.add(top)
                stack.extend(waiting)
                continue
            stack.pop()
            if top not in self.known:
                self.known[top] = None if node is None else self._evaluate(node)
        return self.known[name]

    def _evaluate(self, node: onnx.NodeProto) -> _Value | None:
        if node.domain not in ("", "ai.onnx") or len(node.output) != 1:
            return None
        if node.op_type in ("Shape", "Size"):
            return self._measured(node)
        if node.op_type == "Constant":
            return self._run(node, [])
        if node.op_type not in (*_MOVES, *_COMPUTED):
            return None
        operands = [self.known.get(x) for x in node.input if x]
        found = [v for v in operands if v is not None]
        if len(found) < len(operands) or not found:
            return None
        moved = 0 if node.op_type not in _MOVES else len(found) if node.op_type == "Concat" else 1
        if not all(mask.all() for _, mask in found[moved:]):
            return None
        value = self._run(node, [v for v, _ in found])
        if value is None or all(mask.all() for _, mask in found):
            return value
        which = self._run(node, [mask.astype(v.dtype) for v, mask in found[:moved]] + [v for v, _ in found[moved:]])
        return None if which is None else (value[0], which[0] != 0)

    def _measured(self, node: onnx.NodeProto) -> _Value | None:
        shape = self.shapes.get(node.input[0])
        if shape is None:
            return None
        known, sizes = np.array([n is not None for n in shape], bool), np.array([n or 0 for n in shape], np.int64)
        if node.op_type == "Size":
            return np.asarray(np.prod(sizes)), np.asarray(known.all())
        bounds: dict[str, int] = {a.name: a.i for a in node.attribute}
        part = slice(bounds.get("start", 0), bounds.get("end"))
        return sizes[part], known[part]

    def _run(self, node: onnx.NodeProto, operands: list[Array]) -> _Value | None:
        from onnx.reference import ReferenceEvaluator  # few models have an If

        inputs = [helper.make_tensor_value_info(x, onnx.TensorProto.UNDEFINED, None) for x in node.input if x]
        graph = helper.make_graph([node], "one", inputs, [onnx.ValueInfoProto(name=node.output[0])])
        try:
            with np.errstate(all="ignore"):
                feeds = dict(zip((i.name for i in inputs), operands, strict=True))
                made: Any = ReferenceEvaluator(helper.make_model(graph, opset_imports=self.opsets)).run(None, feeds)
        except Exception:  # what cannot be evaluated stays unknown
            return None
        return _whole(made[0]) if np.size(made[0]) <= MAX_ELEMENTS else None


def _whole(value: Any) -> _Value:
    array = np.asarray(value)
    return array, np.ones(array.shape, bool)


def inferred_shapes(model: onnx.ModelProto) -> dict[str, list[int | None]]:
    """The sizes that follow from the declared inputs alone, None where they leave one open.

    What the file says of intermediate tensors is left out, it may be stale; so are bodies of loops, where sizes may change.
    """
    copy = _without_weights(model)
    for graph in every_graph(copy.graph):
        del graph.value_info[:]
        for output in graph.output:
            if output.type.HasField("tensor_type"):
                output.type.tensor_type.ClearField("shape")
    with contextlib.suppress(Exception):  # inference is a convenience here: less is known without it
        copy = onnx.shape_inference.infer_shapes(copy, data_prop=True)
    shapes: dict[str, list[int | None]] = {}
    for graph in _branches(copy.graph):
        for value in [*graph.input, *graph.value_info, *graph.output]:
            if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
                dims = value.type.tensor_type.shape.dim
                shapes[value.name] = [d.dim_value if d.dim_value > 0 else None for d in dims]
        for tensor in graph.initializer:
            shapes.setdefault(tensor.name, list(tensor.dims))
    return shapes


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which large initializers are inputs: inference needs their shapes alone."""
    copy = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    copy.graph.node.extend(model.graph.node)
    copy.graph.input.extend(model.graph.input)
    copy.graph.output.extend(model.graph.output)
    copy.graph.name = model.graph.name
    declared = {i.name for i in model.graph.input}
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= MAX_ELEMENTS:
            copy.graph.initializer.append(tensor)
        elif tensor.name not in declared:
            copy.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return copy


def _branches(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        if node.op_type == "If":
            for body in bodies(node):
                yield from _branches(body)


def constant_value(node: onnx.NodeProto) -> onnx.TensorProto | None:
    """What a Constant node holds, numbers and lists of numbers as tensors too; None for strings and sparse tensors."""
    for a in node.attribute:
        if a.name == "value":
            value: onnx.TensorProto = a.t
            return value
        if a.name in ("value_float", "value_floats", "value_int", "value_ints"):
            kind = np.float32 if "float" in a.name else np.int64
            return numpy_helper.from_array(np.array(helper.get_attribute_value(a), kind))
    return None
