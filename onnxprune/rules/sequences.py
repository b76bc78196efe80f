"""Sequences of tensors, where it is plain which tensor is taken out: parts of a Split that the exporter could not unroll.

The rule of the operator that takes a tensor out ties it to the one that was put in; the operators that fill sequences only
say that nothing stands in the way.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Dim, Freeze, Tie
from onnxprune.rules.base import Fact, Reads, Resize, Rule, View
from onnxprune.rules.edits import Edit, SetInput

UNFOLLOWED = "puts tensors into a sequence that is not followed"


def _readers(view: View) -> list[View]:
    """The nodes that read the sequence that this node makes."""
    uses = view.net.uses.get(str(view.node.outputs[0].name), [])
    return [View(view.net, view.symbols, i, view.live) for i, _ in uses]


def _plain(view: View) -> bool:
    """Whether all readers take tensors out at constant places, or all of them at once."""
    name = str(view.node.outputs[0].name)
    if name in view.net.outputs or any(name in c for c in view.net.captured):
        return False
    return all(r.op == "ConcatFromSequence" or (r.op == "SequenceAt" and r.value(1) is not None) for r in _readers(view))


def _maker(view: View) -> View | None:
    """The node that fills the sequence that this node reads; None where it is not one of those that are followed."""
    index = view.net.producer.get(view.name(0))
    maker = None if index is None else View(view.net, view.symbols, index, view.live)
    return maker if maker is not None and maker.op in ("SequenceConstruct", "SplitToSequence") and _plain(maker) else None


def construct(view: View) -> Iterator[Fact]:
    """Its inputs are the parts."""
    for i in range(view.count):
        for axis in range(len(view.shape(i))):
            yield Reads(view.x(i, axis)) if _plain(view) else Freeze(view.x(i, axis), f"{view} {UNFOLLOWED}")


# ------------------------------------------------------------------------------------------------------ SplitToSequence


def _cut(view: View) -> int:
    return int(view.attr("axis", 0)) % len(view.shape(0))


def _lengths(view: View) -> list[int] | None:
    """How long the parts are: all as long as a scalar says but for the last, or as a vector says. None if not constant."""
    value, size = view.value(1), view.shape(0)[_cut(view)]
    if value is None:
        return None
    if value.ndim:
        return [int(v) for v in value]
    return [min(int(value), size - start) for start in range(0, size, int(value))]


def split(view: View) -> Iterator[Fact]:
    """Without constant lengths the axis that is split stays whole: parts of one position each would change their number."""
    plain, cut = _plain(view), _cut(view)
    for axis in range(len(view.shape(0))):
        if not plain:
            yield Freeze(view.x(0, axis), f"{view} {UNFOLLOWED}")
        elif axis == cut and _lengths(view) is None:
            yield Freeze(view.x(0, axis), f"{view} splits it into parts whose lengths are not constants")
        else:
            yield Reads(view.x(0, axis))


def split_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """New lengths."""
    dim, lengths = view.x(0, _cut(view)), _lengths(view)
    if resize.touches(dim) and lengths is not None:
        ends = np.cumsum(lengths)
        kept = resize.kept(dim)
        new = [int(np.count_nonzero((kept >= end - n) & (kept < end))) for n, end in zip(lengths, ends, strict=True)]
        yield SetInput(1, np.array(new, np.int64))


def _part(maker: View, place: int) -> list[tuple[Dim, np.ndarray | None]]:
    """The axes of a part: where each stands in what the sequence was made of, and at which positions."""
    if maker.op == "SequenceConstruct":
        i = place % maker.count
        return [(maker.x(i, axis), None) for axis in range(len(maker.shape(i)))]
    cut, shape = _cut(maker), maker.shape(0)
    lengths = _lengths(maker) or [1] * shape[cut]
    start = sum(lengths[: place % len(lengths)])
    positions = np.arange(start, start + lengths[place % len(lengths)])
    axes = [(maker.x(0, axis), positions if axis == cut else None) for axis in range(len(shape))]
    if not maker.has(1) and not maker.attr("keepdims", 1):
        del axes[cut]
    return axes


def _parts(maker: View) -> list[list[tuple[Dim, np.ndarray | None]]]:
    if maker.op == "SequenceConstruct":
        return [_part(maker, i) for i in range(maker.count)]
    return [_part(maker, i) for i in range(len(_lengths(maker) or range(maker.shape(0)[_cut(maker)])))]


# --------------------------------------------------------------------------------------------------------- taking out


def at(view: View) -> Iterator[Fact]:
    """One part."""
    maker, place = _maker(view), view.value(1)
    if maker is None or place is None:
        return
    for axis, (dim, positions) in enumerate(_part(maker, int(place))):
        known = positions is None or len(positions) == view.out_shape()[axis]
        if (view.out_shape()[axis] > 1 or positions is not None) and known:  # of a part of one position nothing can go
            yield Tie(dim, view.y(axis), positions, None)


def concat(view: View) -> Iterator[Fact]:
    """All parts, one behind the other on `axis`, or side by side on a new axis there."""
    maker = _maker(view)
    if maker is None or (maker.op == "SplitToSequence" and maker.has(1) and _lengths(maker) is None):
        return
    joined, new = view.attr("axis") % len(view.out_shape()), bool(view.attr("new_axis", 0))
    start = 0
    for part in _parts(maker):
        for k, (dim, positions) in enumerate(part):
            axis = k + (new and k >= joined)
            size = view.net.shapes[dim.tensor][dim.axis] if positions is None else len(positions)
            place = np.arange(start, start + size) if axis == joined and not new else None
            yield Tie(dim, view.y(axis), positions, place)
            start += size if place is not None else 0


RULES = {
    "ConcatFromSequence": Rule(concat),
    "SequenceAt": Rule(at),
    "SequenceConstruct": Rule(construct),
    "SplitToSequence": Rule(split, split_fixup),
}
