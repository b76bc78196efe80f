"""Resize and Upsample: the axes that are not scaled pass through."""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune.channels import Freeze, Tie
from onnxprune.graph import Network
from onnxprune.rules.base import Fact, Resize, Rule, View
from onnxprune.rules.edits import Edit
from onnxprune.rules.reshape import operand_edits, operand_facts


def _sizes_input(view: View) -> int | None:
    return 3 if view.op == "Resize" and view.has(3) else None


def _resized_axes(view: View) -> list[int]:
    rank = len(view.shape(0))
    return [a % rank for a in view.attr("axes", range(rank))]


def _scale(view: View, axis: int) -> float | None:
    """By what an axis is scaled; None when that is computed at run time."""
    if axis not in _resized_axes(view):
        return 1.0
    place = _resized_axes(view).index(axis)
    if "scales" in view.node.attrs:
        return float(view.attr("scales")[place])
    position = 1 if view.count < 3 else 2
    if view.has(position) and view.shape(position) != (0,):
        return _number(view.net, view.name(position), place)
    return view.out_shape()[axis] / view.shape(0)[axis]


def _number(net: Network, name: str, place: int) -> float | None:
    """An entry of a vector that is constant, or joined of parts of which that one is constant, cast or not."""
    value = net.array(name) if name in net.fixed else None
    if value is not None:
        return float(value.ravel()[place])
    maker = net.nodes[net.producer[name]] if name in net.producer else None
    if maker is not None and maker.op in ("Cast", "Identity", "Reshape", "Squeeze", "Unsqueeze"):
        return _number(net, maker.inputs[0].name, place)
    if maker is None or maker.op != "Concat":
        return None
    for part in maker.inputs:
        length = net.shapes[part.name][0]
        if place < length:
            return _number(net, part.name, place)
        place -= length
    return None


def _whole(view: View, axis: int) -> bool:
    """Whether an axis comes out as it went in: neither scaled nor cropped, whatever the other axes do."""
    if _scale(view, axis) != 1.0 or view.out_shape()[axis] != view.shape(0)[axis]:
        return False
    if axis not in _resized_axes(view):
        return True
    if view.attr("coordinate_transformation_mode", "") == "tf_crop_and_resize":
        region = view.value(1) if view.has(1) else None
        place, count = _resized_axes(view).index(axis), len(_resized_axes(view))
        return region is not None and float(region[place]) == 0.0 and float(region[count + place]) == 1.0
    return not view.has(3) or view.attr("keep_aspect_ratio_policy", "stretch") == "stretch"


def interpolate(view: View) -> Iterator[Fact]:
    """Axes that are not scaled pass through; the others are interpolated."""
    for axis, size in enumerate(view.shape(0)):
        if size > 1 and _whole(view, axis):
            yield Tie(view.x(0, axis), view.y(axis))
        elif view.out_shape()[axis] == size:
            why = "computes its scales at run time" if _scale(view, axis) is None else "does not keep its positions"
            yield Freeze(view.x(0, axis), f"{view} {why}")
    if (position := _sizes_input(view)) is not None:
        yield from operand_facts(view, position, _resized_axes(view))


def interpolate_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    if (position := _sizes_input(view)) is not None:
        yield from operand_edits(view, resize, position, _resized_axes(view))


RULES = {
    "Resize": Rule(interpolate, interpolate_fixup),
    "Upsample": Rule(interpolate),
}
