"""Operators that sample, fold or transform the spatial axes of every channel by itself."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from onnxprune.channels import Freeze, Tie
from onnxprune.entries import sizes
from onnxprune.rules.base import Fact, Resize, Rule, View, blocks
from onnxprune.rules.edits import Edit
from onnxprune.rules.reshape import operand_edits, operand_facts


def batch_and_channels(view: View, readers: Sequence[int] = ()) -> Iterator[Fact]:
    """Axes 0 and 1 pass; axis 0 of the inputs `readers` counts the same samples."""
    for axis in (0, 1):
        if view.shape(0)[axis] > 1:
            yield Tie(view.x(0, axis), view.y(axis))
    for i in readers:
        if view.shape(i)[0] > 1:
            yield Tie(view.x(i, 0), view.y(0))


def grid_sample(view: View) -> Iterator[Fact]:
    """X [N, C, ...] at the places grid [N, ..., 2 or 3] -> [N, C, ...]."""
    return batch_and_channels(view, [1])


def regions(view: View) -> Iterator[Fact]:
    """X [N, C, H, W] and regions [R, ...] -> [R, C, h, w]."""
    if view.shape(0)[1] > 1:
        yield Tie(view.x(0, 1), view.y(1))


def max_unpool(view: View) -> Iterator[Fact]:
    """X and indices [N, C, ...] -> [N, C, ...]; the indices count through the output, channel by channel.

    They are right after a cut when a MaxPool makes them of as many channels, each as large as here.
    """
    maker = view.net.producer.get(view.name(1))
    pooled = () if maker is None else view.net.shapes[view.net.nodes[maker].inputs[0].name]
    if maker is None or view.net.nodes[maker].op != "MaxPool" or math.prod(pooled[2:]) != math.prod(view.out_shape()[2:]):
        yield from (Freeze(view.x(i, 1), f"{view} writes to places that are counted through the channels") for i in (0, 1))
        return
    yield from batch_and_channels(view, [1])
    yield Tie(view.x(1, 1), view.y(1))
    if view.has(2):
        yield from operand_facts(view, 2, range(len(view.out_shape())))


def max_unpool_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """`output_shape` counts the channels."""
    if view.has(2):
        yield from operand_edits(view, resize, 2, range(len(view.out_shape())))


def col2im(view: View) -> Iterator[Fact]:
    """X [N, C * block, L] -> [N, C, ...]: a channel is a run of positions."""
    (width, made), n = (view.shape(0)[1], view.out_shape()[1]), view.shape(0)[0]
    if n > 1:
        yield Tie(view.x(0, 0), view.y(0))
    if made > 1:
        yield Tie(view.x(0, 1), view.y(1), None, blocks(made, width // made))


def center_crop_pad(view: View) -> Iterator[Fact]:
    """Axes that are neither cropped nor padded pass; `shape` has a size for each of `axes`."""
    rank = len(view.shape(0))
    for axis, size in enumerate(view.shape(0)):
        if size > 1 and view.out_shape()[axis] == size:
            yield Tie(view.x(0, axis), view.y(axis))
    yield from operand_facts(view, 1, [a % rank for a in view.attr("axes", range(rank))])


def center_crop_pad_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    rank = len(view.shape(0))
    yield from operand_edits(view, resize, 1, [a % rank for a in view.attr("axes", range(rank))])


def affine_grid(view: View) -> Iterator[Fact]:
    """theta [N, ...] and a size (N, C, ...) -> a grid [N, ..., 2 or 3]; of the size the channels alone do not matter."""
    if view.shape(0)[0] > 1:
        yield Tie(view.x(0, 0), view.y(0))
    for k, entry in enumerate(view.symbols.of(view.name(1)) or []):
        if k != 1:
            yield from (Freeze(d, f"{view} makes a grid of its size") for d in sizes(entry))


def fourier(view: View) -> Iterator[Fact]:
    """DFT along one axis of [..., 1 or 2]: before opset 20 an attribute, by default 1; then an input, by default -2."""
    rank = len(view.shape(0))
    if view.net.opset < 20:
        axis = view.attr("axis", 1) % rank
    elif view.has(2):
        given = view.ints(2)
        if given is None:
            return
        axis = given[0] % rank
    else:
        axis = rank - 2
    for i, size in enumerate(view.shape(0)):
        if i not in (axis, rank - 1) and size > 1:
            yield Tie(view.x(0, i), view.y(i))
    for i in (axis, rank - 1):
        yield Freeze(view.x(0, i), f"{view} mixes its positions")


def short_fourier(view: View) -> Iterator[Fact]:
    """Signal [N, L, 1 or 2] -> [N, frames, bins, 2]."""
    if view.shape(0)[0] > 1:
        yield Tie(view.x(0, 0), view.y(0))


def matrices(view: View) -> Iterator[Fact]:
    """A matrix for every position of the leading axes: the last two are mixed."""
    rank = len(view.shape(0))
    for axis, size in enumerate(view.shape(0)[:-2]):
        if size > 1:
            yield Tie(view.x(0, axis), view.y(axis))
    for axis in (rank - 2, rank - 1):
        yield Freeze(view.x(0, axis), f"{view} mixes its positions")


def unfold(view: View) -> Iterator[Fact]:
    """Slices of axis `dim`, each with a new last axis: the other axes pass."""
    cut = view.attr("dim", -1) % len(view.shape(0))
    for axis, size in enumerate(view.shape(0)):
        if axis != cut and size > 1:
            yield Tie(view.x(0, axis), view.y(axis))
    yield Freeze(view.x(0, cut), f"{view} mixes its positions")


RULES = {
    "GridSample": Rule(grid_sample),
    "RoiAlign": Rule(regions),
    "MaxRoiPool": Rule(regions),
    "MaxUnpool": Rule(max_unpool, max_unpool_fixup),
    "Col2Im": Rule(col2im),
    "CenterCropPad": Rule(center_crop_pad, center_crop_pad_fixup),
    "AffineGrid": Rule(affine_grid),
    "DFT": Rule(fourier),
    "STFT": Rule(short_fourier),
    "Det": Rule(matrices),
}
CONTRIB = {
    "CropAndResize": Rule(regions),
    "GridSample": Rule(grid_sample),
    "Inverse": Rule(matrices),
    "UnfoldTensor": Rule(unfold),
}
