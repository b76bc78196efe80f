"""Where the entries of shape tensors come from.

A Reshape's target, a Slice's end, an Expand's shape may count channels. Each entry of such an integer tensor is
traced back to its source: an element of a constant (surgery can edit it), the size of an axis (it adapts by itself),
or arithmetic on these. Whether an entry will be right after a cut is then a matter of evaluation, not of guessing.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx

from onnxprune.channels import Dim
from onnxprune.entries import ARITHMETIC, Arith, Const, Entry, Size, Unknown, combined, evaluate, operations, same, sizes
from onnxprune.graph import Array, Network

MAX_ENTRIES = 64  # shape tensors are short; longer ones are data
MAX_OPERATIONS = 64  # real ones take a few; a number that is added to itself again and again takes two to the power of that


def _leaves_integers(node: onnx.NodeProto) -> bool:
    """A Cast to a type in which arithmetic is no longer the integers': tracing stops, what follows is data."""
    integers = (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    return node.op_type == "Cast" and next((a.i for a in node.attribute if a.name == "to"), 0) not in integers


# Operators that hand on the entries of their first input (Concat: of all), perhaps not all of them, perhaps in another order.
MOVES = {"Identity", "Cast", "Expand", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Concat", "Gather", "Slice"}


def _taken(entry: Entry, index: int, position: int) -> Entry:
    fresh = isinstance(entry, Const) and entry.use is None
    return replace(entry, use=(index, position)) if isinstance(entry, Const) and fresh else entry


class Symbols:
    """The entries of every short integer tensor of a network, by tensor name."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.entries: dict[str, list[Entry]] = {}
        self.equal: dict[str, list[bool | None]] = {}  # of every Equal: which entries are alike in every run, None if unknown
        for i in net.order:
            self._trace(i)

    def of(self, name: str) -> list[Entry] | None:
        """Entries of tensor `name` in row-major order; None when they depend on data or cannot be traced."""
        if name not in self.entries and name in self.net.initializers:
            proto = self.net.initializers[name]
            if int(np.prod(proto.dims)) <= MAX_ENTRIES and (values := self.net.array(name)) is not None:
                if values.dtype.kind in "iu":
                    self.entries[name] = [Const(int(v), (name, k)) for k, v in enumerate(values.ravel())]
        return self.entries.get(name)

    def sizes_in(self, name: str) -> tuple[Dim, ...]:
        """The axes whose sizes an integer tensor is made of."""
        if name in self.net.initializers:
            return ()
        return tuple(dict.fromkeys(d for entry in self.entries.get(name, []) for d in sizes(entry)))

    def partly(self, name: str) -> bool:
        """Whether some entries of a traced tensor are unknown."""
        return any(isinstance(entry, Unknown) for entry in self.entries.get(name, []))

    def number(self, name: str) -> Array:
        """The value of a traced tensor in the probe run."""
        value = self.net.array(name)
        if value is None:
            numbers = [evaluate(e, lambda d: self.net.shapes[d.tensor][d.axis]) for e in self.entries[name]]
            value = np.array(numbers, np.int64).reshape(self.net.shapes[name])
        return value

    def _trace(self, index: int) -> None:
        node = self.net.model.graph.node[index]
        if node.domain not in ("", "ai.onnx") or not node.output or not node.output[0]:
            return
        result: list[Entry] | None = None
        if node.op_type == "Shape":
            result = self._shape(index)
        elif node.op_type == "Size":
            result = self._size(node.input[0])
        elif node.op_type in ARITHMETIC and len(node.input) == 2:
            result = self._arithmetic(node.op_type, node.input[0], node.input[1])
        elif node.op_type == "ConstantOfShape":
            result = self._repeated(index)
        elif node.op_type == "Equal":
            self._compare(node)
        elif node.op_type == "Where":
            result = self._chosen(index)
        elif node.op_type in MOVES and not _leaves_integers(node):
            result = self._move(index)
        elif node.op_type == "Constant":
            result = self.of(node.output[0])
            literal = self.net.values.get(node.output[0])
            if result is None and literal is not None and literal.size <= MAX_ENTRIES:
                result = [Const(int(v)) for v in literal.ravel()]
        if result is not None:
            self.entries[node.output[0]] = result

    def _shape(self, index: int) -> list[Entry] | None:
        node = self.net.nodes[index]
        name = node.inputs[0].name
        if name not in self.net.shapes:
            return None
        rank = len(self.net.shapes[name])
        axes = range(rank)[slice(node.attrs.get("start", 0), node.attrs.get("end"))]
        return [Size(Dim(name, a)) for a in axes]

    def _size(self, name: str) -> list[Entry] | None:
        """The number of elements: the product of the sizes of all axes."""
        if name not in self.net.shapes:
            return None
        product: Entry = Const(1)
        for axis in range(len(self.net.shapes[name])):
            product = Arith("Mul", product, Size(Dim(name, axis)))
        return [product]

    def _arithmetic(self, op: str, a: str, b: str) -> list[Entry] | None:
        if (both := self._aligned(a, b)) is None:
            return None
        made = [combined(op, x, y) for x, y in both]
        return made if all(operations(e) <= MAX_OPERATIONS for e in made) else None

    def _repeated(self, index: int) -> list[Entry] | None:
        """As many equal numbers as another traced vector has entries: what an Expand of torch's makes of its -1."""
        node = self.net.nodes[index]
        lengths, value = self.of(node.inputs[0].name), node.attrs.get("value")
        number = np.zeros(1, np.float32) if value is None else np.asarray(value.values)
        if lengths is None or len(lengths) != 1 or not isinstance(lengths[0], Size) or number.dtype.kind != "i":
            return None
        counted = self.entries.get(lengths[0].dim.tensor)
        made = counted is not None and lengths[0].dim.tensor not in self.net.initializers
        return [Const(int(number[0]))] * len(counted) if made and counted is not None else None

    def _compare(self, node: onnx.NodeProto) -> None:
        if (both := self._aligned(*node.input)) is not None:
            self.equal[node.output[0]] = [same(a, b) for a, b in both]

    def _aligned(self, a: str, b: str) -> list[tuple[Entry, Entry]] | None:
        """The entries of two tensors of one length, or of which one is a single number."""
        left, right = self.of(a), self.of(b)
        if left is None or right is None or (len(left) != len(right) and 1 not in (len(left), len(right))):
            return None
        n = max(len(left), len(right))
        return list(zip(left * (n // len(left)), right * (n // len(right)), strict=True))

    def _chosen(self, index: int) -> list[Entry] | None:
        """The entries that a Where takes from either side; unknown where that depends on more than can be told."""
        node = self.net.model.graph.node[index]
        held, yes, no = self.equal.get(node.input[0]), self.of(node.input[1]), self.of(node.input[2])
        if held is None or yes is None or no is None or len({len(held), len(yes), len(no)}) > 1:
            return None
        yes, no = ([_taken(e, index, position) for e in side] for position, side in ((1, yes), (2, no)))
        return [Unknown() if h is None else a if h else b for h, a, b in zip(held, yes, no, strict=True)]

    def hands_on(self, index: int, position: int) -> bool:
        """Whether what a node makes holds, traced, the entries of its input `position`, or some of them."""
        node = self.net.nodes[index]
        moves = node.op in MOVES and (position == 0 or node.op == "Concat")
        return (moves or (node.op == "Where" and position > 0)) and node.outputs[0].name in self.entries

    def indifferent(self, index: int) -> bool:
        """Whether a node makes the same of an integer tensor whatever sizes are cut: it asks for its length, or for -1."""
        node = self.net.nodes[index]
        return node.op == "Shape" or None not in self.equal.get(node.outputs[0].name, [None])

    def _move(self, index: int) -> list[Entry] | None:
        """Data movement is not modelled: the operator is run on numbers that stand for the entries."""
        node = self.net.nodes[index]
        operands = node.inputs if node.op == "Concat" else node.inputs[:1]
        pool: list[Entry] = []
        arrays = []
        for position, tensor in enumerate(operands):
            shape = self.net.shapes.get(tensor.name)
            found = self._entries(tensor.name) if node.op == "Concat" else self.of(tensor.name)
            if found is None or shape is None:
                return None
            arrays.append(np.arange(len(pool), len(pool) + len(found)).reshape(shape))
            pool.extend(_taken(e, index, position) for e in found)
        moved = self._run(index, arrays)
        if moved is None or moved.size != int(np.prod(self.net.shapes.get(node.outputs[0].name, (-1,)))):
            return None  # an Expand that repeats, or a shape that the probe did not see
        return [pool[int(k)] for k in moved.ravel()] if moved.size <= MAX_ENTRIES else None

    def _entries(self, name: str) -> list[Entry] | None:
        """The entries of an operand of Concat: what is not known of one does not spoil what is known of the others."""
        value = self.net.values.get(name)
        if (found := self.of(name)) is None and value is not None and value.dtype.kind == "i" and value.size <= MAX_ENTRIES:
            return [Unknown()] * value.size
        return found

    def _run(self, index: int, arrays: list[Array]) -> Array | None:
        node = self.net.nodes[index]
        if node.op == "Concat":
            return np.concatenate(arrays, axis=node.attrs["axis"])
        if node.op == "Gather":
            indices = self._literal(node.inputs[1].name)
            return None if indices is None else np.take(arrays[0], indices, axis=node.attrs.get("axis", 0))
        if node.op == "Slice":
            return self._slice(index, arrays[0])
        return arrays[0]  # the order of the elements stays

    def _slice(self, index: int, array: Array) -> Array | None:
        bounds = slice_bounds(self.net, index)
        if bounds is None or array.ndim != 1:
            return None
        for start, end, axis, step in bounds:
            if axis == 0:
                return np.asarray(array[python_slice(start, end, step, len(array))])
        return array

    def _literal(self, name: str) -> Array | None:
        entries, shape = self.of(name), self.net.shapes.get(name)
        if entries is None or shape is None or not all(isinstance(e, Const) for e in entries):
            return None
        return np.array([e.value for e in entries if isinstance(e, Const)], np.int64).reshape(shape)


def slice_bounds(net: Network, index: int) -> list[tuple[int, int, int, int]] | None:
    """(start, end, axis, step) of a Slice for each sliced axis, as numbers; None when they are not known."""
    node = net.nodes[index]
    shape = net.shapes.get(node.inputs[0].name)
    if shape is None:
        return None
    parts: list[list[int] | None] = []
    for position, key in enumerate(("starts", "ends", "axes", "steps"), start=1):
        if key in node.attrs:
            parts.append([int(v) for v in node.attrs[key]])
        elif position < len(node.inputs) and node.inputs[position].name:
            value = net.array(node.inputs[position].name)
            if value is None:
                return None
            parts.append([int(v) for v in value.ravel()])
        else:
            parts.append(None)
    starts, ends, axes, steps = parts
    if starts is None or ends is None:
        return None
    axes = [a % len(shape) for a in (axes or range(len(starts)))]
    return list(zip(starts, ends, axes, steps or [1] * len(starts), strict=True))


def python_slice(start: int, end: int, step: int, size: int) -> slice:
    """The Python slice that equals ONNX's (start, end, step) on an axis of `size`; they differ at the clamped ends."""
    if step < 0:
        start = min(start if start >= 0 else start + size, size - 1)
        end = end if end >= 0 else max(end + size, -1)
        return slice(start, None if end < 0 else end, step)
    return slice(start, end, step)
