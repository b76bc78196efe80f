"""Pure data movement: the operator itself is run on labels, which tells where every position goes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnxprune.channels import Freeze, Index, Tie
from onnxprune.rules.base import Fact, Reads, Resize, Rule, View
from onnxprune.rules.edits import Become, Edit, SetAttr, SetInput
from onnxprune.symbolic import python_slice, slice_bounds


def _pass_axes(view: View, skip: Sequence[int], output: int = 0, source: int = 0) -> Iterator[Fact]:
    for axis, size in enumerate(view.shape(source)):
        if axis not in skip and size > 1 and view.out_shape(output)[axis] == size:
            yield Tie(view.x(source, axis), view.y(axis, output))


def transpose(view: View) -> Iterator[Fact]:
    rank = len(view.shape(0))
    for out, axis in enumerate(view.attr("perm") or reversed(range(rank))):
        if view.shape(0)[axis] > 1:
            yield Tie(view.x(0, axis), view.y(out))


def concat(view: View, inputs: Sequence[int] | None = None) -> Iterator[Fact]:
    """The parts, all inputs unless told otherwise, one behind the other."""
    axis = view.attr("axis") % len(view.out_shape())
    start = 0
    for i in range(view.count) if inputs is None else inputs:
        yield from _pass_axes(view, [axis], 0, i)
        size = view.shape(i)[axis]
        yield Tie(view.x(i, axis), view.y(axis), None, np.arange(start, start + size))
        start += size


def split(view: View) -> Iterator[Fact]:
    axis = view.attr("axis", 0) % len(view.shape(0))
    start = 0
    for o, tensor in enumerate(view.node.outputs):
        if not tensor.name:
            return
        size = view.out_shape(o)[axis]
        yield from _pass_axes(view, [axis], o)
        yield Tie(view.x(0, axis), view.y(axis, o), np.arange(start, start + size), None)
        start += size
    if view.has(1) and not view.settled(1):
        yield Freeze(view.x(0, axis), f"{view} computes its sizes at run time")


def split_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """The sizes are always written out: an even Split re-splits evenly, and wrongly, after an uneven cut."""
    axis = view.attr("axis", 0) % len(view.shape(0))
    if not resize.touches(view.x(0, axis)):
        return
    sizes = [resize.size(view.y(axis, o)) for o in range(len(view.node.outputs))]
    if view.net.opset >= 13:
        yield SetInput(1, np.array(sizes, np.int64))
        yield SetAttr("num_outputs", None)
    else:
        yield SetAttr("split", sizes)


def slice_(view: View) -> Iterator[Fact]:
    bounds = slice_bounds(view.net, view.index)
    if bounds is None:
        return
    known = all(view.settled(i) for i in range(1, view.count) if view.has(i))
    sliced = {axis: python_slice(start, end, step, view.shape(0)[axis]) for start, end, axis, step in bounds}
    for axis, size in enumerate(view.shape(0)):
        every = np.arange(size)
        taken = every[sliced[axis]] if axis in sliced else every
        if size == 1 or len(taken) == 0:
            continue
        yield Tie(view.x(0, axis), view.y(axis), taken, None)
        if not known and axis in sliced:
            yield Freeze(view.x(0, axis), f"{view} computes its bounds at run time")


def slice_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """New bounds where an axis is cut; a Gather where it was taken in strides, which the positions that stay may not be."""
    bounds = slice_bounds(view.net, view.index) or []
    if not any(resize.touches(view.x(0, axis)) for _, _, axis, _ in bounds):
        return
    if len(bounds) == 1 and abs(bounds[0][3]) > 1:
        start, end, axis, step = bounds[0]
        dim = view.x(0, axis)
        taken = np.arange(resize.full(dim))[python_slice(start, end, step, resize.full(dim))]
        kept = resize.kept(dim)
        yield Become("Gather", (np.searchsorted(kept, taken[np.isin(taken, kept)]),), {"axis": axis})
        return
    starts, ends, axes, steps = [], [], [], []
    for start, end, axis, step in bounds:
        dim = view.x(0, axis)
        if resize.touches(dim):
            taken = np.arange(resize.full(dim))[python_slice(start, end, step, resize.full(dim))]
            start, end, step = _bounds(resize.kept(dim), taken, start, end, step)  # noqa: PLW2901
        starts.append(start)
        ends.append(end)
        axes.append(axis)
        steps.append(step)
    values = {"starts": starts, "ends": ends, "axes": axes, "steps": steps}
    old = view.value(1) if view.has(1) else None
    kind = np.int64 if old is None else old.dtype  # all operands must have one type
    for position, (key, value) in enumerate(values.items(), start=1):
        if view.net.opset >= 10:
            yield SetInput(position, np.array(value, kind))
        elif key != "steps":
            yield SetAttr(key, value)


def _bounds(kept: Index, taken: Index, start: int, end: int, step: int) -> tuple[int, int, int]:
    """The slice that takes, of the positions `kept`, those in `taken`, in the same order.

    Positions are taken in a row or in reverse order.
    """
    where = np.flatnonzero(np.isin(kept, taken))
    if step < 0:
        where = where[::-1]
    if len(where) == 1:
        return int(where[0]), int(where[0]) + 1, 1
    new_step = int(where[1] - where[0])
    last = int(where[-1])
    if new_step > 0:
        return int(where[0]), last + 1, new_step
    return int(where[0]), last - 1 if last > 0 else -(2**31), new_step


def stride_facts(view: View) -> Iterator[Fact]:
    """A stride over channels turns into a Gather, which has one axis only: a Slice of several axes freezes them."""
    yield from slice_(view)
    bounds = slice_bounds(view.net, view.index) or []
    for _, _, axis, step in bounds:
        if abs(step) > 1 and len(bounds) > 1 and view.shape(0)[axis] > 1:
            yield Freeze(view.x(0, axis), f"{view} takes every {abs(step)}th position of it, and slices another axis too")


def gather(view: View) -> Iterator[Fact]:
    axis = view.attr("axis", 0) % len(view.shape(0))
    index_rank = len(view.shape(1))
    for i, size in enumerate(view.shape(0)):
        if i != axis and size > 1:
            yield Tie(view.x(0, i), view.y(i if i < axis else i + index_rank - 1))
    indices = view.value(1)
    if indices is None:
        yield Freeze(view.x(0, axis), f"{view} looks positions up at run time")
    elif index_rank == 1:
        taken = np.where(indices < 0, indices + view.shape(0)[axis], indices).astype(np.int64)
        yield Tie(view.x(0, axis), view.y(axis), taken, None)


def gather_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    axis = view.attr("axis", 0) % len(view.shape(0))
    dim = view.x(0, axis)
    indices = view.value(1)
    if indices is None or not resize.touches(dim):
        return
    number = np.full(resize.full(dim), -1)
    number[resize.kept(dim)] = np.arange(resize.size(dim))
    moved = number[np.where(indices < 0, indices + resize.full(dim), indices)]
    yield SetInput(1, moved[moved >= 0].astype(indices.dtype))


def pad_amounts(view: View) -> list[tuple[int, int]] | None:
    """(before, after) for every axis as the probe run saw them; None when unknown."""
    rank = len(view.shape(0))
    if "pads" in view.node.attrs or "paddings" in view.node.attrs:
        flat = [int(v) for v in view.attr("pads", view.attr("paddings"))]
    else:
        value = view.net.array(view.name(1))
        if value is None:
            return None
        flat = [int(v) for v in value.ravel()]
    axes = [a % rank for a in view.ints(3) or []] if view.has(3) else list(range(rank))
    amounts = [(0, 0)] * rank
    for k, axis in enumerate(axes):
        amounts[axis] = (flat[k], flat[k + len(axes)])
    return amounts


def pad(view: View) -> Iterator[Fact]:
    """Constant padding of a channel axis makes new positions, which may go like any other (zero-padded shortcuts)."""
    amounts = pad_amounts(view)
    if amounts is None:
        return
    constant = view.attr("mode", "constant") == "constant"
    for axis, size in enumerate(view.shape(0)):
        before, after = amounts[axis]
        if (before or after) and (not constant or min(before, after) < 0):
            continue
        if before or after:
            if not (view.fixed(1) if view.count > 1 else True) or view.has(3):
                continue
            yield Tie(view.x(0, axis), view.y(axis), None, np.arange(before, before + size))
        elif size > 1:
            yield Tie(view.x(0, axis), view.y(axis))


def pad_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    amounts = pad_amounts(view)
    if amounts is None or not any(resize.touches(view.y(a)) for a, p in enumerate(amounts) if p != (0, 0)):
        return
    new = []
    for axis, (before, after) in enumerate(amounts):
        if not resize.touches(view.y(axis)):  # it may be cropped, by amounts below 0
            new.append((before, after))
            continue
        kept = resize.kept(view.y(axis)) if before or after else np.empty(0, np.int64)
        new.append((int(np.sum(kept < before)), int(np.sum(kept >= before + view.shape(0)[axis]))))
    flat = [b for b, _ in new] + [a for _, a in new]
    yield SetAttr("pads", flat) if "pads" in view.node.attrs else SetInput(1, np.array(flat, np.int64))


def shape_of(view: View) -> Iterator[Fact]:
    """Shape reads sizes; what is made of them is followed by `symbolic`."""
    for axis in range(len(view.shape(0))):
        yield Reads(view.x(0, axis))


def depth_to_space(view: View) -> Iterator[Fact]:
    """[N, C, H, W] -> [N, C/b^2, bH, bW]: the operator is run on labels of the channels."""
    b, (c, made) = view.attr("blocksize"), (view.shape(0)[1], view.out_shape()[1])
    labels = np.arange(c)
    if view.op == "DepthToSpace" and view.attr("mode", "DCR") == "DCR":
        source = labels.reshape(b * b, made).T
    elif view.op == "DepthToSpace":
        source = labels.reshape(made, b * b)
    else:  # SpaceToDepth: output channel k = offset * C + c, or c * b^2 + offset (mode CRD, since opset 28)
        crd = view.attr("mode", "DCR") == "CRD"
        yield Tie(view.x(0, 1), view.y(1), np.repeat(labels, b * b) if crd else np.tile(labels, b * b), None)
        return
    yield Tie(view.x(0, 1), view.y(1), source.ravel(), np.repeat(np.arange(made), b * b))


RULES = {
    "Transpose": Rule(transpose),
    "Concat": Rule(concat),
    "Split": Rule(split, split_fixup),
    "Slice": Rule(stride_facts, slice_fixup),
    "Gather": Rule(gather, gather_fixup),
    "Pad": Rule(pad, pad_fixup),
    "Shape": Rule(shape_of),
    "Size": Rule(shape_of),
    "DepthToSpace": Rule(depth_to_space),
    "SpaceToDepth": Rule(depth_to_space),
}
