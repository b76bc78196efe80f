"""Products with named axes: Einsum, and the matrix products of com.microsoft that transpose their operands on the way.

An equation gives every axis of every operand a label. An axis of the output is tied to all axes of its label; a label that
is missing from the output is summed over.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.channels import Dim, Freeze, Tie
from onnxprune.graph import Array, Network
from onnxprune.rules.base import Consumer, Contracts, Fact, Layer, Rule, View

Labels = tuple[str, ...]


@dataclass(frozen=True)
class Equation:
    """Labels of the axes of every operand and of the output."""

    operands: tuple[Labels, ...]
    out: Labels


def _labels(term: str, rank: int) -> Labels:
    """One label per axis; those of an ellipsis are numbered from the right, where they are aligned."""
    before, dots, after = term.partition("...")
    count = rank - len(before) - len(after) if dots else 0
    return (*before, *(f"...{count - i}" for i in range(count)), *after)


def parse(text: str, ranks: Sequence[int]) -> Equation:
    """An Einsum equation for operands of these ranks (ONNX Einsum-12)."""
    left, arrow, right = text.replace(" ", "").partition("->")
    operands = tuple(_labels(term, rank) for term, rank in zip(left.split(","), ranks, strict=True))
    every = [label for labels in operands for label in labels]
    dots = sorted({x for x in every if x.startswith("...")}, key=lambda x: -int(x[3:]))
    if not arrow:  # the labels that occur once, in ASCII order
        return Equation(operands, (*dots, *sorted(x for x in set(every) if every.count(x) == 1 and x not in dots)))
    before, ellipsis, after = right.partition("...")
    return Equation(operands, (*before, *(dots if ellipsis else ()), *after))


def _product(a: int, b: int, attrs: dict[str, int]) -> Equation:
    """A matrix product of operands of ranks a and b; FusedMatMul may transpose either, or move its first axis inwards.

    A vector has only the axis that is summed over.
    """
    operands: list[Labels] = []
    for rank, last, key in ((a, ("m", "k"), "A"), (b, ("k", "n"), "B")):
        if rank == 1:
            operands.append(("k",))
            continue
        batch = tuple(f"...{rank - 2 - i}" for i in range(rank - 2))
        pair = last[::-1] if attrs.get(f"trans{key}", 0) else last
        moved = attrs.get(f"transBatch{key}", 0) and rank > 2
        operands.append((pair[0], *batch, pair[1]) if moved else (*batch, *pair))
    free = [label for label, rank in (("m", a), ("n", b)) if rank > 1]
    return Equation((operands[0], operands[1]), (*(f"...{i}" for i in range(max(a, b) - 2, 0, -1)), *free))


def equation(net: Network, index: int) -> Equation:
    """The equation of node `index`."""
    node = net.nodes[index]
    ranks = [len(net.shapes[t.name]) for t in node.inputs]
    return parse(node.attrs["equation"], ranks) if node.op == "Einsum" else _product(ranks[0], ranks[1], node.attrs)


class _Axes:
    """Where every label stands. An axis of size 1 that is stretched is no place of its label."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.eq = equation(view.net, view.index)
        self.places: dict[str, list[tuple[int, int]]] = {}
        at = [(label, i, axis) for i, labels in enumerate(self.eq.operands) for axis, label in enumerate(labels)]
        size: dict[str, int] = {}
        for label, i, axis in at:
            size[label] = max(size.get(label, 1), view.shape(i)[axis])
        for label, i, axis in at:
            if view.shape(i)[axis] == size[label]:
                self.places.setdefault(label, []).append((i, axis))

    def dims(self, label: str) -> list[Dim]:
        return [self.view.x(i, axis) for i, axis in self.places.get(label, [])]

    def repeated(self, label: str) -> bool:
        """Whether one operand has the label twice: its diagonal is taken."""
        operands = [i for i, _ in self.places.get(label, [])]
        return len(set(operands)) < len(operands)

    @property
    def weight(self) -> int | None:
        """Which of the two operands is a weight, the second where both are; None where both are activations."""
        return next((i for i in (1, 0) if self.view.fixed(i)), None)

    @property
    def constant(self) -> bool:
        """Whether two constants are multiplied: no weight of a layer is there to be zeroed."""
        return self.view.fixed(0) and self.view.fixed(1)

    @property
    def summed(self) -> list[str]:
        """The labels over which two operands are contracted."""
        if len(self.eq.operands) != 2:
            return []
        return [x for x, at in self.places.items() if len(at) == 2 and x not in self.eq.out and not self.repeated(x)]


def ties(view: View) -> Iterator[Fact]:
    """Labels of the output are handed on; those that two operands are contracted over are tied; the rest is frozen."""
    if view.op != "Einsum" and view.attr("transA", 0) and len(view.shape(1)) == 1 < len(view.shape(0)):
        return  # ONNX Runtime (1.31) then reads the matrix as if it were not transposed, in the other shape
    axes = _Axes(view)
    for label in axes.places:
        dims = axes.dims(label)
        if axes.repeated(label):
            yield from (Freeze(d, f"{view} takes a diagonal of it") for d in dims)
        elif label in axes.eq.out:
            yield from (Tie(d, view.y(axes.eq.out.index(label))) for d in dims)
        elif label in axes.summed and not axes.constant:
            yield Tie(dims[0], dims[1])
            yield Contracts((dims[0], dims[1])) if axes.weight is None else Consumer(dims[axes.weight])
        else:
            yield from (Freeze(d, f"{view} {_why(axes, dims)}", remedy=_remedy(view)) for d in dims)


def _why(axes: _Axes, dims: list[Dim]) -> str:
    if len(dims) == 1:
        return "sums over it without weights"
    return "sums products of more than two tensors over it" if len(axes.eq.operands) > 2 else "multiplies two constants"


def _remedy(view: View) -> str:
    return "fold constants (onnxsim does)" if all(view.fixed(i) for i in range(view.count)) else ""


def layers(view: View) -> list[Layer]:
    """A linear map for every label that is summed over; the first one carries all MACs."""
    axes = _Axes(view)
    found: list[Layer] = []
    if not axes.eq.out or not axes.summed:
        return found
    second = 1 if axes.weight is None else axes.weight
    made = [x for x in axes.eq.out if x in axes.eq.operands[second] and x not in axes.eq.operands[1 - second]]
    out = view.y(axes.eq.out.index(made[-1])) if made else view.y(-1)
    every = tuple(d for label in axes.places if view.net.shapes[(d := axes.dims(label)[0]).tensor][d.axis] > 1)
    for label in axes.summed:
        place = dict(axes.places[label])
        name = view.label if len(axes.summed) == 1 else f"{view.label} ({label})"
        x, w = view.x(1 - second, place[1 - second]), view.x(second, place[second])
        costs = (0, ()) if found else (1, every)
        if axes.weight is None:
            found.append(Layer(view.index, name, view.op, x, None, out, *costs, "", w))
        else:
            found.append(Layer(view.index, name, view.op, x, w, out, *costs, view.name(second)))
    return found


# --------------------------------------------------------------------------------------------- values, for calibration


def contracted(net: Network, layer: Layer, x: Array, w: Array) -> Iterator[tuple[Array, Array]]:
    """The pairs (x [n, I, *taps, rows], w [O, I, *taps, 1]) that make up the layer of a product with named axes.

    I is the label of the layer's own axis; further labels that are summed over become taps. There is one pair for every
    place on the axes that both operands have and the output too.
    """
    eq, other = equation(net, layer.index), layer.w or layer.other
    assert other is not None
    second = _operand(net, layer, other)
    of_x, of_w = eq.operands[1 - second], eq.operands[second]
    channel = of_x[layer.x.axis]
    sample = next((label for label in of_x[:1] if label in eq.out and label not in of_w), "")
    x, of_x = _squeezed(x, of_x, {channel, sample})
    w, of_w = _squeezed(w, of_w, {channel})
    lost = [i for i, label in enumerate(of_w) if label not in of_x and label not in eq.out]
    w, of_w = w.sum(axis=tuple(lost)), tuple(label for i, label in enumerate(of_w) if i not in lost)
    shared = [label for label in of_x if label in of_w and label in eq.out]
    taps = [label for label in of_x if label not in eq.out and label != channel]
    rows = [label for label in of_x if label in eq.out and label not in of_w and label != sample]
    made = [label for label in of_w if label in eq.out and label not in of_x]
    sizes = dict(zip(of_x, x.shape, strict=True)) | dict(zip(of_w, w.shape, strict=True)) | ({"": 1} if not sample else {})
    xs = _arranged(x, of_x, sizes, [shared, [sample], [channel], taps, rows])
    ws = _arranged(w, of_w, sizes, [shared, made, [channel], taps])
    for one, two in zip(xs, ws, strict=True):
        if taps:
            yield one, two[..., None]
        else:
            yield one[:, :, 0], two


def rows_first(net: Network, layer: Layer) -> bool:
    """Whether axis 0 of the activation is handed on and the weight does not have it."""
    eq = equation(net, layer.index)
    second = 0 if layer.w is None else _operand(net, layer, layer.w)
    label = eq.operands[1 - second][0]
    return label in eq.out and label not in eq.operands[second]


def _operand(net: Network, layer: Layer, dim: Dim) -> int:
    """Which operand the layer's weight, or its second activation, is."""
    names = [t.name for t in net.nodes[layer.index].inputs]
    return names.index(dim.tensor) if names[0] != names[1] else 1


def _squeezed(value: Array, labels: Labels, keep: set[str]) -> tuple[Array, Labels]:
    """`value` without its axes of size 1, but for those in `keep`."""
    gone = [i for i, label in enumerate(labels) if value.shape[i] == 1 and label not in keep]
    return value.squeeze(tuple(gone)), tuple(label for i, label in enumerate(labels) if i not in gone)


def _arranged(value: Array, labels: Labels, sizes: Mapping[str, int], parts: Sequence[Sequence[str]]) -> Array:
    """`value` with one axis for each of `parts`, which merges the labels in it; a label that it lacks is stretched."""
    wanted = [label for part in parts for label in part]
    present = [label for label in wanted if label in labels]
    value = value.transpose([labels.index(label) for label in present])
    value = value.reshape([sizes[label] if label in labels else 1 for label in wanted])
    value = np.broadcast_to(value, [sizes[label] for label in wanted])
    return np.ascontiguousarray(value.reshape([math.prod(sizes[label] for label in part) for part in parts]))


RULES = {"Einsum": Rule(ties, None, layers)}
CONTRIB = {op: Rule(ties, None, layers) for op in ("FusedMatMul", "TransposeMatMul")}
PRODUCTS = {*RULES, *CONTRIB}
