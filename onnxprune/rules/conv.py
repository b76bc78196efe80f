"""Convolutions of any rank, grouped and depthwise, and their transposes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxprune.channels import Dim, Index, Tie
from onnxprune.rules.base import Consumer, Fact, Layer, Resize, Rule, View, blocks
from onnxprune.rules.edits import Edit, SetAttr


@dataclass(frozen=True)
class Form:
    """Which input of a convolution is the weight and which the bias, and which axis of X and Y counts the channels."""

    w: int = 1
    bias: int = 2
    axis: int = 1


PLAIN = Form()


def by_whole_groups(view: View, form: Form = PLAIN) -> bool:
    """Whether a grouped convolution is cut by whole groups (depthwise always is) or by channels inside every group.

    Either is exact; the finer of the two is taken: more, smaller units.
    """
    groups = view.attr("group", 1)
    width = max(view.shape(0)[form.axis], view.out_shape()[form.axis]) // groups
    return bool(groups > 1 and groups >= width)


def conv_ties(view: View, form: Form = PLAIN) -> Iterator[Fact]:
    """X [N, C, ...], W [M, C/group, k...], B [M] -> Y [N, M, ...]."""
    return _ties(view, view.x(form.w, 0), view.x(form.w, 1), form)


def transpose_ties(view: View) -> Iterator[Fact]:
    """X [N, C, ...], W [C, M/group, k...], B [M] -> Y [N, M, ...]."""
    return _ties(view, view.x(1, 1), view.x(1, 0), PLAIN)


def _ties(view: View, w_out: Dim, w_in: Dim, form: Form) -> Iterator[Fact]:
    groups = view.attr("group", 1)
    c, m = view.shape(0)[form.axis], view.out_shape()[form.axis]
    x, y = view.x(0, form.axis), view.y(form.axis)
    if view.has(form.bias):
        yield Tie(y, view.x(form.bias, 0))
    if _batched(view):
        yield Tie(view.x(0, 0), view.y(0))
    if groups == 1:
        yield Tie(x, w_in)
        yield Tie(y, w_out)
        yield Consumer(w_in)
        return
    transposed = view.op == "ConvTranspose"
    long, long_axis = (w_in, x) if transposed else (w_out, y)  # the weight axis that runs over all groups
    yield Tie(long_axis, long)
    if by_whole_groups(view, form):
        yield Tie(x, y, *_star(c, m, groups))
        return
    # The other weight axis is shared by the groups: the same position goes in every group, so all keep equal counts.
    short, short_axis, width = (w_out, y, m // groups) if transposed else (w_in, x, c // groups)
    yield Tie(short_axis, short, None, np.tile(np.arange(width), groups))
    same = np.tile(np.arange((c if transposed else m) // groups), groups)  # position in the first group
    yield Tie(long_axis, long_axis, np.arange(len(same)), same)
    yield Consumer(w_in)


def _batched(view: View) -> bool:
    """Whether heads may lie on the batch axis, folded into it, each with a picture of its own."""
    return view.op in ("Conv", "ConvTranspose") and view.shape(0)[0] > 1


def _star(c: int, m: int, groups: int) -> tuple[Index, Index]:
    """Index pairs that tie all inputs and outputs of each group together."""
    x_first = blocks(groups, m // groups) * (c // groups)
    y_first = blocks(groups, c // groups) * (m // groups)
    return np.concatenate([x_first, np.arange(c)]), np.concatenate([np.arange(m), y_first])


def fixup(view: View, resize: Resize, form: Form = PLAIN) -> Iterator[Edit]:
    """`group` counts channels when whole groups go; `output_shape` and pads are spatial and stay."""
    groups = view.attr("group", 1)
    if groups > 1 and by_whole_groups(view, form):
        yield SetAttr("group", resize.size(view.x(0, form.axis)) // (view.shape(0)[form.axis] // groups))


def layers(view: View, form: Form = PLAIN) -> list[Layer]:
    """MACs: every weight works once per output position (per input position for ConvTranspose)."""
    groups = view.attr("group", 1)
    transposed = view.op == "ConvTranspose"
    w_in, w_out = (view.x(form.w, 0), view.x(form.w, 1)) if transposed else (view.x(form.w, 1), view.x(form.w, 0))
    over = view.shape(0) if transposed else view.out_shape()
    positions = int(np.prod(over)) // over[form.axis]
    w_shape = view.shape(form.w)
    taps = int(np.prod(w_shape[2:]))
    whole = groups > 1 and by_whole_groups(view, form)
    long, short = (w_in, w_out) if transposed else (w_out, w_in)
    factor = positions * taps * (w_shape[short.axis] if whole else 1)
    dims: tuple[Dim, ...] = (long,) if whole else (w_in, w_out)
    if _batched(view):
        factor, dims = factor // over[0], (*dims, view.y(0))
    x, y, summed = view.x(0, form.axis), view.y(form.axis), None if whole else w_in
    return [Layer(view.index, view.label, view.op, x, summed, y, factor, dims, view.name(form.w))]


RULES = {
    "Conv": Rule(conv_ties, fixup, layers),
    "ConvTranspose": Rule(transpose_ties, fixup, layers),
}
