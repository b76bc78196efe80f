"""Attention as one operator: whole heads go, and where heads have an axis of their own the places within a head too.

Heads do not see each other, so a head whose output nobody reads is as good as gone. Where query heads share a head of keys
and values they go together; where all share one, each goes by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.channels import Dim, Freeze, Tie
from onnxprune.rules.base import Contracts, Fact, Layer, Resize, Rule, View
from onnxprune.rules.edits import Edit, SetAttr


@dataclass(frozen=True)
class Heads:
    """`count` heads of `width` positions each lie on `dim`, from position `start` on."""

    dim: Dim
    count: int
    width: int = 1
    start: int = 0

    def kept(self, resize: Resize) -> int:
        """How many of them stay."""
        kept = resize.kept(self.dim)
        return int(np.count_nonzero((kept >= self.start) & (kept < self.start + self.count * self.width))) // self.width


def together(view: View, queries: Sequence[Heads], keys: Sequence[Heads]) -> Iterator[Fact]:
    """Ties the heads on all axes: those of the queries, and of keys and values, of which each may serve several queries.

    A single head of keys and values that all queries share stays.
    """
    first, kv = queries[0], keys[0].count if keys else queries[0].count
    units = kv if kv > 1 else first.count
    for axis in (*queries, *keys):
        positions = axis.start + np.arange(axis.count * axis.width)
        if axis.count % units == 0:
            unit = np.arange(len(positions)) // (axis.width * (axis.count // units))
            yield Tie(first.dim, axis.dim, first.start + unit * (first.count // units) * first.width, positions)
        else:
            yield Freeze(axis.dim, f"{view} shares its only head of keys and values", positions)


def packed(view: View, i: int, count: int) -> Heads:
    """Heads on the last axis of input [batch, sequence, heads * width], or on axis 1 of one with four axes."""
    shape = view.shape(i)
    return Heads(view.x(i, 1), count) if len(shape) == 4 else Heads(view.x(i, -1), count, shape[-1] // count)


def made(view: View, count: int) -> Heads:
    """The same for output 0."""
    shape = view.out_shape()
    return Heads(view.y(1), count) if len(shape) == 4 else Heads(view.y(-1), count, shape[-1] // count)


def optional(view: View, count: int, inputs: Sequence[tuple[int, int]], outputs: Sequence[tuple[int, int]]) -> Iterator[Heads]:
    """Heads on (input, axis) and (output, axis), where they are there; an axis of another size is stretched."""
    for i, axis in inputs:
        if view.has(i) and len(view.shape(i)) >= -axis and view.shape(i)[axis] == count:
            yield Heads(view.x(i, axis), count)
    for o, axis in outputs:
        if has_output(view, o):
            yield Heads(view.y(axis, o), count)


def has_output(view: View, o: int) -> bool:
    """Whether optional output `o` is there."""
    return o < len(view.node.outputs) and bool(view.node.outputs[o].name)


def costs(view: View, rows: int, q: tuple[Dim, ...], out: tuple[Dim, ...], other: Dim | None = None) -> list[Layer]:
    """The two products of attention: probabilities by values, queries by keys.

    rows: pairs of a query and a key. q, out: the axes with heads and places in a head. other: the places in a head of keys,
    where they have an axis.
    """
    scores = Layer(view.index, f"{view.label} (scores)", view.op, q[-1], None, out[-1], rows, q, "", other)
    return [Layer(view.index, view.label, view.op, out[-1], None, out[-1], rows, out, ""), scores]


# ------------------------------------------------------------------------------------------------- ai.onnx, since opset 23


def _counts(view: View) -> tuple[int, int]:
    """Heads of the queries, heads of keys and values."""
    if len(view.shape(0)) == 4:
        return view.shape(0)[1], view.shape(1)[1]
    return view.attr("q_num_heads"), view.attr("kv_num_heads")


def attention(view: View) -> Iterator[Fact]:
    """Q, K, V, mask, past key and value, lengths -> Y, present key and value, scores. Three axes or four, as Q has."""
    q, kv = _counts(view)
    queries = [packed(view, 0, q), made(view, q), *optional(view, q, [(3, -3)] if q > 1 else [], [(3, -3)])]
    keys = [packed(view, 1, kv), packed(view, 2, kv), *optional(view, kv, [(4, -3), (5, -3)], [(1, -3), (2, -3)])]
    yield from together(view, queries, keys)
    if len(view.shape(0)) == 4:
        yield from _places(view)


def _places(view: View) -> Iterator[Fact]:
    """Places within the heads: values hand theirs on, queries and keys are multiplied."""
    query, key, value = view.x(0, 3), view.x(1, 3), view.x(2, 3)
    yield Tie(value, view.y(3))
    if view.has(5):
        yield Tie(value, view.x(5, 3))
    if has_output(view, 2):
        yield Tie(value, view.y(3, 2))
    yield Tie(query, key)
    yield Contracts((query,) if view.has(4) else (query, key))  # the past of the keys cannot be silenced
    if view.has(4):
        yield Tie(key, view.x(4, 3))
    if has_output(view, 1):
        yield Tie(key, view.y(3, 1))


def attention_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """The numbers of heads; the scale, which else comes from the size of a head."""
    q, kv = (packed(view, i, count) for i, count in enumerate(_counts(view)))
    if len(view.shape(0)) == 4:
        if resize.touches(view.x(0, 3)) and "scale" not in view.node.attrs:
            yield SetAttr("scale", 1 / math.sqrt(view.shape(0)[3]))
    elif resize.touches(q.dim):
        yield SetAttr("q_num_heads", q.kept(resize))
        yield SetAttr("kv_num_heads", kv.kept(resize))


def attention_layers(view: View) -> list[Layer]:
    keys = view.shape(1)[-2] + (view.shape(4)[-2] if view.has(4) else 0)
    rows = view.shape(0)[0] * view.shape(0)[-2] * keys
    if len(view.shape(0)) == 3:
        return costs(view, rows, (view.x(0, 2),), (view.y(2),))
    return costs(view, rows, (view.x(0, 1), view.x(0, 3)), (view.y(1), view.y(3)), view.x(1, 3))


def rotary(view: View) -> Iterator[Fact]:
    """X [batch, heads, sequence, width] or [batch, sequence, heads * width]: whole heads pass, places in a head are mixed."""
    heads = _rotary_heads(view)
    if heads is not None:
        yield from together(view, [heads, Heads(view.y(heads.dim.axis), heads.count, heads.width)], [])


def _rotary_heads(view: View) -> Heads | None:
    """ONNX Runtime's own operator may do without a number of heads: the caches tell the width then."""
    if len(view.shape(0)) == 4:
        return Heads(view.x(0, 1), view.shape(0)[1])
    size, count = view.shape(0)[-1], view.attr("num_heads", 0)
    if not count and view.has(2) and not view.attr("rotary_embedding_dim", 0):
        count = size // (2 * view.shape(2)[-1])
    return Heads(view.x(0, -1), count, size // count) if count else None


def rotary_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    heads = _rotary_heads(view)
    if heads is not None and view.attr("num_heads", 0) and resize.touches(heads.dim):
        yield SetAttr("num_heads", heads.kept(resize))


RULES = {
    "Attention": Rule(attention, attention_fixup, attention_layers),
    "RotaryEmbedding": Rule(rotary, rotary_fixup),
}
