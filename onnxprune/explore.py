"""What the bodies of If, Loop and Scan make, taken or not: each is run as a model of its own.

Its inputs are what it reads from outside, as the run of the model around it had it; a body of a loop is run twice, on the
initial states and on those that come of them. Where that fails, or sizes do not stay what they are, the node is not
followed: its bodies are left alone, and what they read is frozen.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import onnx
from onnx import helper

from onnxprune import weights
from onnxprune.control import LOOPS, Inside, bodies, defined, every_graph, key, outer, states
from onnxprune.errors import ModelError
from onnxprune.graph import Array
from onnxprune.inline import constant_value, repeated_names

MAX_REPEATS = 1 << 20  # a trip count beyond this stands for a loop that its condition ends


@dataclass
class Seen:
    """What a run told: shapes, values of small integer tensors, and the arrays that were asked for."""

    shapes: dict[str, tuple[int, ...]]
    values: dict[str, Array]
    arrays: dict[str, Array]


Observe: TypeAlias = Callable[[onnx.ModelProto, Mapping[str, Array], Collection[str]], Seen]
"""(model, inputs, tensors whose values are wanted) -> what the run told."""


@dataclass
class Found:
    """What is known of a graph and of the bodies in it. varying: tensors whose value is another one in each iteration."""

    seen: Seen
    followed: set[str] = field(default_factory=set)
    opaque: dict[str, str] = field(default_factory=dict)
    repeats: dict[str, int] = field(default_factory=dict)
    varying: set[str] = field(default_factory=set)

    def add(self, other: Found) -> None:
        """Takes over what is known of a body."""
        self.seen.shapes |= other.seen.shapes
        self.seen.values |= other.seen.values
        self.followed |= other.followed
        self.opaque |= other.opaque
        self.repeats |= other.repeats
        self.varying |= other.varying

    @property
    def inside(self) -> Inside:
        return Inside(frozenset(self.followed), dict(self.opaque), dict(self.repeats))


class _Opaque(Exception):  # noqa: N818  (not an error: a body that cannot be followed)
    """Why a node cannot be followed."""


@dataclass(frozen=True)
class _Scope:
    """What a body can see of the graphs around it: constants, and arrays of the run. loop: the loop around it."""

    constants: Mapping[str, onnx.TensorProto]
    arrays: Mapping[str, Array]
    loop: str = ""

    def array(self, name: str) -> Array:
        if name in self.arrays and isinstance(self.arrays[name], np.ndarray):
            return self.arrays[name]
        if name in self.constants:
            return weights.array(self.constants[name])
        raise _Opaque(f"'{name}', which it reads, is no tensor")


def explore(model: onnx.ModelProto, feeds: Mapping[str, Array], observe: Observe) -> Found:
    """Runs the model, and all bodies in it that can be followed. Raises ModelError when the model does not run."""
    return _Explorer(model, observe).graph(model, feeds, {}, "")


class _Explorer:
    def __init__(self, model: onnx.ModelProto, observe: Observe) -> None:
        self.model, self.observe = model, observe
        self.repeated = repeated_names(model.graph) if any(bodies(n) for n in model.graph.node) else set()

    def graph(
        self,
        part: onnx.ModelProto,
        feeds: Mapping[str, Array],
        constants: Mapping[str, onnx.TensorProto],
        loop: str,
        wanted: Collection[str] = (),
    ) -> Found:
        nodes = [n for n in part.graph.node if bodies(n)]
        if nodes:
            constants = {**constants, **_constants(part.graph)}
        reads = [x for n in nodes for x in [*n.input, *(x for b in bodies(n) for x in outer(b))] if x not in constants]
        found = Found(self.observe(part, feeds, {*reads, *wanted}))
        scope = _Scope(constants, {**feeds, **found.seen.arrays}, loop)
        for node in nodes:
            try:
                found.add(self._follow(node, scope, found.seen))
                found.followed.add(key(node))
            except _Opaque as reason:
                found.opaque[key(node)] = str(reason)
        return found

    def _follow(self, node: onnx.NodeProto, scope: _Scope, seen: Seen) -> Found:
        inside = bodies(node)
        if scope.loop:
            raise _Opaque(f"it stands in the body of {scope.loop}")
        if node.domain not in ("", "ai.onnx") or node.op_type not in ("If", *LOOPS):
            raise _Opaque(f"onnxprune does not follow {node.op_type}")
        if any(g.sparse_initializer for body in inside for g in every_graph(body)):
            raise _Opaque("it holds sparse constants")
        if self.repeated.intersection(name for body in inside for g in every_graph(body) for name in defined(g)):
            raise _Opaque("names inside it are used elsewhere too")
        if node.op_type == "If":
            return self._branches(node, inside, scope)
        return self._loop(node, inside[0], scope, seen)

    # ------------------------------------------------------------------------------------------- If

    def _branches(self, node: onnx.NodeProto, inside: list[onnx.GraphProto], scope: _Scope) -> Found:
        first, second = (self._body(node, body, {}, scope) for body in inside)
        for a, b in zip(inside[0].output, inside[1].output, strict=True):
            one, other = first.seen.shapes.get(a.name), second.seen.shapes.get(b.name)
            if one is None or other is None:
                raise _Opaque(f"its output '{a.name}' is no tensor")
            if len(one) != len(other) or any(n != m and 1 in (n, m) for n, m in zip(one, other, strict=True)):
                raise _Opaque(f"its branches make {list(one)} and {list(other)} of '{a.name}' and '{b.name}'")
        first.add(second)
        return first

    # ------------------------------------------------------------------------------------------- Loop and Scan

    def _loop(self, node: onnx.NodeProto, body: onnx.GraphProto, scope: _Scope, seen: Seen) -> Found:
        carried = states(node, body)
        made = [o.name for o in body.output][1 if node.op_type == "Loop" else 0 :]
        if len(body.input) != len(node.input) or len(made) != len(node.output) or not all(node.output):
            raise _Opaque("its inputs and outputs are not those of its body")  # the Scan of opset 8, too
        start = 2 if node.op_type == "Loop" else 0
        values = {name: scope.array(x) for name, x in zip(carried, node.input[start:], strict=False)}
        first = self._iteration(node, body, 0, values, scope)
        last = _Scope({**scope.constants, **_constants(body)}, {**scope.arrays, **values, **first.seen.arrays})
        after = {name: last.array(out) for name, out in zip(carried, made, strict=False)}
        second = self._iteration(node, body, 1, after, scope)
        shapes = first.seen.shapes
        for name in defined(body):
            if shapes.get(name) != second.seen.shapes.get(name):
                raise _Opaque(f"'{name}' in its body changes size from one iteration to the next")
        first.varying |= {name for g in every_graph(body) for name in defined(g)}
        times = self._times(node, len(carried), scope, seen)
        first.repeats |= dict.fromkeys(defined(body), times)
        return first

    def _iteration(
        self, node: onnx.NodeProto, body: onnx.GraphProto, number: int, values: Mapping[str, Array], scope: _Scope
    ) -> Found:
        feeds = dict(values)
        if node.op_type == "Loop":
            for given, value in zip(body.input, (np.int64(number), np.bool_(True)), strict=False):
                rank = len(given.type.tensor_type.shape.dim)  # some files declare a vector of one element
                feeds[given.name] = np.asarray(value).reshape((1,) * rank)
        else:
            axes = next((list(a.ints) for a in node.attribute if a.name == "scan_input_axes"), [0] * len(body.input))
            for given, x, axis in zip(body.input[len(values) :], node.input[len(values) :], axes, strict=False):
                whole = scope.array(x)
                if not whole.shape[axis]:
                    raise _Opaque(f"'{x}' is empty in the probe run")
                feeds[given.name] = np.take(whole, min(number, whole.shape[axis] - 1), axis)
        return self._body(node, body, feeds, scope, node.op_type)

    def _times(self, node: onnx.NodeProto, carried: int, scope: _Scope, seen: Seen) -> int:
        """How often the body ran: as many slices as there are of anything scanned, else the trip count if it is one."""
        if node.op_type == "Scan":
            axes = next((a.ints[0] for a in node.attribute if a.name == "scan_input_axes" and a.ints), 0)
            return int(scope.array(node.input[carried]).shape[axes])
        if len(node.output) > carried:
            return max(1, seen.shapes[node.output[carried]][0])
        times = int(scope.array(node.input[0]).ravel()[0]) if node.input[0] else MAX_REPEATS
        return times if 0 < times < MAX_REPEATS else 1

    # ------------------------------------------------------------------------------------------- one body

    def _body(
        self, node: onnx.NodeProto, body: onnx.GraphProto, feeds: Mapping[str, Array], scope: _Scope, loop: str = ""
    ) -> Found:
        """What a body makes as a model of its own; `feeds` are its own inputs."""
        reads = outer(body)
        feeds = {**feeds, **{x: scope.array(x) for x in reads if x not in scope.constants}}
        part = onnx.ModelProto(ir_version=max(4, self.model.ir_version), opset_import=self.model.opset_import)
        part.graph.name = body.name or "body"
        part.graph.node.extend(body.node)
        part.graph.initializer.extend(body.initializer)
        part.graph.initializer.extend(_named(x, scope.constants[x]) for x in reads if x in scope.constants)
        for x, value in feeds.items():
            try:
                kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            except (KeyError, ValueError):
                raise _Opaque(f"'{x}', which it reads, is of a type that NumPy lacks") from None
            part.graph.input.append(helper.make_tensor_value_info(x, kind, value.shape))
        try:
            where = f"{node.op_type} '{node.name or key(node)}'" if loop else ""
            return self.graph(part, feeds, scope.constants, where, [o.name for o in body.output] if loop else ())
        except ModelError as error:
            raise _Opaque(f"'{body.name}' in it does not run on the sizes of the probe run{_culprit(error)}") from None


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    found = {t.name: t for t in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and (value := constant_value(node)) is not None:
            found[node.output[0]] = value
    return found


def _named(name: str, tensor: onnx.TensorProto) -> onnx.TensorProto:
    copy = onnx.TensorProto()
    copy.CopyFrom(tensor)
    copy.name = name
    return copy


def _culprit(error: ModelError) -> str:
    """The node inside that failed, where ONNX Runtime names it."""
    found = re.search(r"while running (?P<op>\w+) node\.(?: Name:'(?P<name>[^']*)')?", error.message)  # it may be abridged
    found = found or re.search(r"Node \((?P<name>.*?)\) Op \((?P<op>\w+)\)", error.message)
    return "" if found is None else f": {found['op']} '{found['name']}' fails" if found["name"] else f": {found['op']} fails"
