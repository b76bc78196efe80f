"""Attention in ONNX Runtime's own domain, as its graph optimiser and the exporters of language models write it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate

from onnxprune.channels import Tie
from onnxprune.rules.attention import (
    Heads,
    costs,
    made,
    optional,
    packed,
    rotary,
    rotary_fixup,
    together,
)
from onnxprune.rules.base import Consumer, Fact, Layer, Resize, Rule, View
from onnxprune.rules.edits import Edit, SetAttr


def _blocks(view: View, i: int, axis: int, counts: list[int], widths: list[int]) -> list[Heads]:
    """Heads of queries, of keys and of values, one block after the other on one axis."""
    starts = [0, *accumulate(n * width for n, width in zip(counts, widths, strict=True))]
    return [Heads(view.x(i, axis), n, width, start) for n, width, start in zip(counts, widths, starts, strict=False)]


# ------------------------------------------------------------------------------------------------ with its own projection


def _sizes(view: View) -> list[int]:
    """How many positions queries, keys and values have."""
    return [int(v) for v in view.attr("qkv_hidden_sizes") or [view.shape(1)[1] // 3] * 3]


def _projected(view: View) -> list[Heads]:
    """Input [batch, sequence, n], weights [n, q | k | v], bias, mask, past, attention bias."""
    count = view.attr("num_heads")
    widths = [n // count for n in _sizes(view)]
    found = _blocks(view, 1, 1, [count] * 3, widths)
    if view.has(2):
        found += _blocks(view, 2, 0, [count] * 3, widths)
    return [*found, made(view, count), *optional(view, count, [(4, 2), (5, 1)], [(1, 2)])]


def projected(view: View) -> Iterator[Fact]:
    """com.microsoft Attention: the weight is read like that of a linear layer, its columns stand in heads."""
    yield Tie(view.x(0, 2), view.x(1, 0))
    yield Consumer(view.x(1, 0))
    yield from together(view, _projected(view), [])


def projected_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    blocks = _projected(view)[:3]
    if resize.touches(blocks[0].dim):
        yield SetAttr("num_heads", blocks[0].kept(resize))
        if "qkv_hidden_sizes" in view.node.attrs:
            yield SetAttr("qkv_hidden_sizes", [b.kept(resize) * b.width for b in blocks])


def projected_layers(view: View) -> list[Layer]:
    batch, tokens, _ = view.shape(0)
    keys = tokens + (view.shape(4)[3] if view.has(4) else 0)
    x, w, out = view.x(0, 2), view.x(1, 0), view.y(2)
    name, dims = f"{view.label} (projection)", (w, view.x(1, 1))
    linear = Layer(view.index, name, view.op, x, w, out, batch * tokens, dims, view.name(1))
    query, _, value = _sizes(view)
    rows = batch * tokens * keys
    attention, scores = costs(view, rows, (out,), (out,))
    return [attention, replace(scores, factor=rows * query // value), linear]


# --------------------------------------------------------------------------------------------- of queries, keys and values


def _multi_heads(view: View) -> list[Heads]:
    """Query, key, value, bias, padding mask, attention bias, past key and value; key and value may have four axes."""
    count = view.attr("num_heads")
    found, out = [packed(view, i, count) for i in (0, 1, 2)], made(view, count)
    if view.has(3):
        width = (view.shape(3)[0] // count - out.width) // 2
        found += _blocks(view, 3, 0, [count] * 3, [width, width, out.width])
    past, present = [(5, -3), (6, -3), (7, -3)], [(1, -3), (2, -3), (3, -3)]
    return [*found, out, *optional(view, count, past if count > 1 else past[1:], present)]


def multi_head(view: View) -> Iterator[Fact]:
    """com.microsoft MultiHeadAttention; all three in one tensor, which the CPU does not run, are left to freeze."""
    if view.has(1) and view.has(2) and len(view.shape(1)) < 5:
        yield from together(view, _multi_heads(view), [])


def multi_head_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """`num_heads` counts the heads; the scale comes from the size of a head, which stays."""
    query = packed(view, 0, view.attr("num_heads"))
    if resize.touches(query.dim):
        yield SetAttr("num_heads", query.kept(resize))


def multi_head_layers(view: View) -> list[Layer]:
    if not view.has(2):
        return []
    keys = view.shape(1)[-2] + (view.shape(6)[2] if view.has(6) else 0)
    return costs(view, view.shape(0)[0] * view.shape(0)[1] * keys, (view.x(0, 2),), (view.y(2),))


def _grouped_heads(view: View) -> tuple[list[Heads], list[Heads]]:
    """Query (or all three in one), key, value, past key and value, ..., attention bias, head sink, scales of the cache."""
    q, kv = view.attr("num_heads"), view.attr("kv_num_heads")
    if view.has(1):
        queries, keys = [packed(view, 0, q)], [packed(view, 1, kv), packed(view, 2, kv)]
    else:
        width = view.shape(0)[2] // (q + 2 * kv)
        first, *keys = _blocks(view, 0, 2, [q, kv, kv], [width] * 3)
        queries = [first]
    queries += [made(view, q), *optional(view, q, [(10, -3), (11, -1)] if q > 1 else [], [(3, -3)])]
    keys += optional(view, kv, [(3, -3), (4, -3), (12, -3), (13, -3)] if kv > 1 else [], [(1, -3), (2, -3)])
    return queries, keys


def grouped(view: View) -> Iterator[Fact]:
    """com.microsoft GroupQueryAttention."""
    return together(view, *_grouped_heads(view))


def grouped_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """The numbers of heads."""
    queries, keys = _grouped_heads(view)
    if resize.touches(queries[0].dim):
        yield SetAttr("num_heads", queries[0].kept(resize))
        yield SetAttr("kv_num_heads", keys[0].kept(resize))


def grouped_layers(view: View) -> list[Layer]:
    keys = view.shape(0)[1] + (view.shape(3)[2] if view.has(3) else 0)
    out = (view.y(2),)
    return costs(view, view.shape(0)[0] * view.shape(0)[1] * keys, out, out)


# ------------------------------------------------------------------------------------------------------ linear attention


def _recurrent_heads(view: View) -> tuple[list[Heads], list[Heads]]:
    """Query, key, value, past state, decay, beta -> output, present state; decay and beta per head, or finer."""
    q, kv = view.attr("q_num_heads"), view.attr("kv_num_heads")
    keys = [packed(view, 1, kv), packed(view, 2, kv), *optional(view, kv, [(3, -3)] if kv > 1 else [], [(1, -3)])]
    keys += [packed(view, i, kv) for i in (4, 5) if view.has(i) and view.shape(i)[-1] >= kv]
    return [packed(view, 0, q), made(view, q)], keys


def recurrent(view: View) -> Iterator[Fact]:
    """LinearAttention: a state for every head of keys. Fewer heads of queries than of keys are left to freeze."""
    if view.attr("q_num_heads") % view.attr("kv_num_heads") == 0:
        yield from together(view, *_recurrent_heads(view))


def recurrent_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """The numbers of heads."""
    queries, keys = _recurrent_heads(view)
    if resize.touches(queries[0].dim):
        yield SetAttr("q_num_heads", queries[0].kept(resize))
        yield SetAttr("kv_num_heads", keys[0].kept(resize))


def recurrent_layers(view: View) -> list[Layer]:
    """A row of keys times a row of values is added to the state, a row of queries is multiplied with it: twice d_k a value."""
    batch, tokens, size = view.shape(0)
    out = view.y(2)
    factor = 2 * batch * tokens * (size // view.attr("q_num_heads"))
    return [Layer(view.index, view.label, view.op, out, None, out, factor, (out,), "")]


LINEAR = Rule(recurrent, recurrent_fixup, recurrent_layers)
RULES = {
    "Attention": Rule(projected, projected_fixup, projected_layers),
    "MultiHeadAttention": Rule(multi_head, multi_head_fixup, multi_head_layers),
    "GroupQueryAttention": Rule(grouped, grouped_fixup, grouped_layers),
    "LinearAttention": LINEAR,
    "MRotaryEmbedding": Rule(rotary, rotary_fixup),
    "RotaryEmbedding": Rule(rotary, rotary_fixup),
}
