"""Convolutions of any rank, grouped and depthwise, and their transposes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Dim, Index, Tie
from onnxprune.rules.base import Consumer, Edit, Fact, Layer, Resize, Rule, SetAttr, View, blocks


def by_whole_groups(view: View) -> bool:
    """Whether a grouped convolution is cut by whole groups (depthwise always is) or by channels inside every group.

    Either is exact; the finer of the two is taken: more, smaller units.
    """
    groups = view.attr("group", 1)
    width = max(view.shape(0)[1], view.out_shape()[1]) // groups
    return bool(groups > 1 and groups >= width)


def conv_ties(view: View) -> Iterator[Fact]:
    """X [N, C, ...], W [M, C/group, k...], B [M] -> Y [N, M, ...]."""
    return _ties(view, view.x(1, 0), view.x(1, 1))


def transpose_ties(view: View) -> Iterator[Fact]:
    """X [N, C, ...], W [C, M/group, k...], B [M] -> Y [N, M, ...]."""
    return _ties(view, view.x(1, 1), view.x(1, 0))


def _ties(view: View, w_out: Dim, w_in: Dim) -> Iterator[Fact]:
    groups = view.attr("group", 1)
    c, m = view.shape(0)[1], view.out_shape()[1]
    x, y = view.x(0, 1), view.y(1)
    if view.has(2):
        yield Tie(y, view.x(2, 0))
    if groups == 1:
        yield Tie(x, w_in)
        yield Tie(y, w_out)
        yield Consumer(w_in)
        return
    transposed = view.op == "ConvTranspose"
    long, long_axis = (w_in, x) if transposed else (w_out, y)  # the weight axis that runs over all groups
    yield Tie(long_axis, long)
    if by_whole_groups(view):
        yield Tie(x, y, *_star(c, m, groups))
        return
    # The other weight axis is shared by the groups: the same position goes in every group, so all keep equal counts.
    short, short_axis, width = (w_out, y, m // groups) if transposed else (w_in, x, c // groups)
    yield Tie(short_axis, short, None, np.tile(np.arange(width), groups))
    same = np.tile(np.arange((c if transposed else m) // groups), groups)  # position in the first group
    yield Tie(long_axis, long_axis, np.arange(len(same)), same)
    yield Consumer(w_in)


def _star(c: int, m: int, groups: int) -> tuple[Index, Index]:
    """Index pairs that tie all inputs and outputs of each group together."""
    x_first = blocks(groups, m // groups) * (c // groups)
    y_first = blocks(groups, c // groups) * (m // groups)
    return np.concatenate([x_first, np.arange(c)]), np.concatenate([np.arange(m), y_first])


def fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """`group` counts channels when whole groups go; `output_shape` and pads are spatial and stay."""
    groups = view.attr("group", 1)
    if groups > 1 and by_whole_groups(view):
        yield SetAttr("group", resize.size(view.x(0, 1)) // (view.shape(0)[1] // groups))


def layers(view: View) -> list[Layer]:
    """MACs: every weight works once per output position (per input position for ConvTranspose)."""
    groups = view.attr("group", 1)
    transposed = view.op == "ConvTranspose"
    w_in, w_out = (view.x(1, 0), view.x(1, 1)) if transposed else (view.x(1, 1), view.x(1, 0))
    x_shape, y_shape, w_shape = view.shape(0), view.out_shape(), view.shape(1)
    positions = int(np.prod((x_shape if transposed else y_shape)[2:])) * y_shape[0]
    taps = int(np.prod(w_shape[2:]))
    whole = groups > 1 and by_whole_groups(view)
    long, short = (w_in, w_out) if transposed else (w_out, w_in)
    factor = positions * taps * (w_shape[short.axis] if whole else 1)
    dims = (long,) if whole else (w_in, w_out)
    return [
        Layer(view.index, view.label, view.op, view.x(0, 1), None if whole else w_in, view.y(1), factor, dims, view.name(1))
    ]


RULES = {
    "Conv": Rule(conv_ties, fixup, layers),
    "ConvTranspose": Rule(transpose_ties, fixup, layers),
}
