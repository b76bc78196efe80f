"""Normalisation, pooling, reduction and other operators that keep the channels or sum over them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Freeze, Tie
from onnxprune.rules.base import Approximate, Fact, Resize, Rule, View
from onnxprune.rules.edits import Edit, SetAttr

POOLS = ["AveragePool", "GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "LpPool"]
REDUCTIONS = [
    "ReduceL1",
    "ReduceL2",
    "ReduceLogSum",
    "ReduceLogSumExp",
    "ReduceMax",
    "ReduceMean",
    "ReduceMin",
    "ReduceProd",
    "ReduceSum",
    "ReduceSumSquare",
]


def same_axes(view: View, skip: set[int]) -> Iterator[Fact]:
    """Ties all axes of input 0 to those of output 0 but for the ones in `skip`."""
    shape = view.shape(0)
    for axis, size in enumerate(shape):
        if axis not in skip and size > 1:
            yield Tie(view.x(0, axis), view.y(axis))


def crossing(view: View, axes: set[int], what: str) -> Iterator[Fact]:
    """The axes in `axes` are frozen because the operator mixes their elements; the others pass through."""
    yield from same_axes(view, axes)
    for axis in sorted(axes):
        yield Freeze(view.x(0, axis), f"{view} {what}")


def batch_norm(view: View) -> Iterator[Fact]:
    """Scale, bias, mean and variance [C] follow axis 1. In training mode the statistics are taken over the other axes."""
    training = view.attr("training_mode", 0) or sum(bool(o.name) for o in view.node.outputs) > 1
    for axis in range(len(view.shape(0))):
        if view.shape(0)[axis] > 1:
            yield Tie(view.x(0, axis), view.y(axis))
        if training and axis != 1:
            yield Approximate(view.x(0, axis), f"{view} runs in training mode: it takes statistics over it")
    for i in range(1, 5):
        yield Tie(view.y(1), view.x(i, 0))
    for o in range(1, len(view.node.outputs)):
        if view.node.outputs[o].name:
            yield Tie(view.y(1), view.y(0, o))


def instance_norm(view: View) -> Iterator[Fact]:
    """Every channel is normalised over its own positions. Reshaped, those may be channels: a group norm of one group."""
    yield Tie(view.x(0, 1), view.y(1))
    for axis in range(2, len(view.shape(0))):
        if view.shape(0)[axis] > 1:
            yield Tie(view.x(0, axis), view.y(axis))
        yield Approximate(view.x(0, axis), f"{view} normalises over it")
    for i in (1, 2):
        yield Tie(view.y(1), view.x(i, 0))


def group_norm(view: View) -> Iterator[Fact]:
    """A group is normalised as a whole, so whole groups go. Scale and bias are per group, since opset 21 per channel."""
    channels, count = view.shape(0)[1], view.attr("num_groups")
    first = np.repeat(np.arange(count) * (channels // count), channels // count)
    yield Tie(view.x(0, 1), view.y(1))
    if channels > count:
        yield Tie(view.y(1), view.y(1), np.arange(channels), first)
    for i in (1, 2):
        per = channels // view.shape(i)[0]
        yield Tie(view.y(1), view.x(i, 0), np.arange(channels), np.arange(channels) // per)


def group_norm_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """`num_groups` counts the groups that stay."""
    if resize.touches(view.x(0, 1)):
        yield SetAttr("num_groups", resize.size(view.x(0, 1)) * view.attr("num_groups") // view.shape(0)[1])


def pool(view: View, channels: int = 1) -> Iterator[Fact]:
    """Batch and channels pass through."""
    for axis in (0, channels):
        if view.shape(0)[axis] > 1:
            yield Tie(view.x(0, axis), view.y(axis))


def max_pool(view: View) -> Iterator[Fact]:
    """Indices count through the channels; only MaxUnpool, which counts alike, may read them."""
    yield from pool(view)
    if len(view.node.outputs) < 2 or not view.node.outputs[1].name:
        return
    name = str(view.node.outputs[1].name)
    alone = name not in view.net.outputs and not any(name in c for c in view.net.captured)
    if alone and all(position == 1 and view.net.nodes[i].op == "MaxUnpool" for i, position in view.net.uses.get(name, [])):
        for axis in (0, 1):
            if view.shape(0)[axis] > 1:
                yield Tie(view.x(0, axis), view.y(axis, 1))
    else:
        yield Freeze(view.x(0, 1), f"{view} also outputs indices, which count through the channels")


def reduce_axes(view: View) -> set[int] | None:
    """The axes that a reduction removes; None when they are not constant."""
    rank = len(view.shape(0))
    axes = view.ints(1, "axes")
    if axes is None and (view.has(1) and not view.fixed(1)):
        return None
    if not axes:
        return set() if view.attr("noop_with_empty_axes", 0) else set(range(rank))
    return {a % rank for a in axes}


def reduction(view: View) -> Iterator[Fact]:
    """Axes that are not reduced pass through."""
    axes = reduce_axes(view)
    if axes is None:
        return
    keep = bool(view.attr("keepdims", 1))
    out = 0
    for axis, size in enumerate(view.shape(0)):
        if axis in axes:
            yield Approximate(view.x(0, axis), f"{view} {_purpose(view)}")
            out += keep
        else:
            if size > 1:
                yield Tie(view.x(0, axis), view.y(out))
            out += 1


def _purpose(view: View) -> str:
    """What a reduction does to the axes that it removes, in the words of a layer normalisation where it is a part of one."""
    read, made = view.name(0), view.node.outputs[0].name
    if view.op == "ReduceMean" and not view.fixed(0):
        for i, _ in view.net.uses.get(made, []):
            if view.net.nodes[i].op == "Sub" and view.net.nodes[i].inputs[0].name == read:
                return "takes the mean over it for a layer normalisation"
        maker = view.net.nodes[view.net.producer[read]] if read in view.net.producer else None
        squares = maker is not None and (maker.op == "Pow" or (maker.op == "Mul" and len({t.name for t in maker.inputs}) == 1))
        if squares and _rooted(view, made):
            return "takes the mean square over it for a layer normalisation"
    return "sums over it without weights"


def _rooted(view: View, name: str) -> bool:
    """Whether a root of a tensor is taken, after a constant is added to it."""
    ops = {view.net.nodes[i].op: view.net.nodes[i] for i, _ in view.net.uses.get(name, [])}
    return "Sqrt" in ops or ("Add" in ops and _rooted(view, ops["Add"].outputs[0].name))


def softmax(view: View) -> Iterator[Fact]:
    """Before opset 13 the axis is where the tensor is flattened to a matrix, so all later axes are mixed."""
    rank = len(view.shape(0))
    one = view.net.opset >= 13
    first = view.attr("axis", -1 if one else 1) % rank
    return crossing(view, {first} if one else set(range(first, rank)), "normalises over it")


def normalising(view: View, axes: set[int], what: str) -> Iterator[Fact]:
    """Every axis passes through; along those in `axes` the positions that go would change the others."""
    yield from same_axes(view, set())
    for axis in sorted(axes):
        yield Approximate(view.x(0, axis), f"{view} {what}")


def lrn(view: View) -> Iterator[Fact]:
    return normalising(view, {1}, "normalises over neighbouring channels")


def layer_norm(view: View) -> Iterator[Fact]:
    """Mean and norm are taken over the axes from `axis` on; scale and bias follow those that they have."""
    rank = len(view.shape(0))
    yield from normalising(view, set(range(view.attr("axis", -1) % rank, rank)), "sums over the channels")
    for i in (1, 2):
        if view.has(i):
            yield from trailing(view, i)
    if sum(bool(o.name) for o in view.node.outputs) > 1:
        for axis in range(rank):
            yield Freeze(view.x(0, axis), f"{view} also outputs its statistics")


def trailing(view: View, i: int) -> Iterator[Fact]:
    """Input `i` is broadcast against the last axes of the output."""
    shape = view.shape(i)
    for axis, size in enumerate(shape):
        if size > 1:
            yield Tie(view.y(axis - len(shape)), view.x(i, axis))


def mean_variance_norm(view: View) -> Iterator[Fact]:
    """Mean and variance over `axes`, by default all but the channels."""
    rank = len(view.shape(0))
    return normalising(view, {a % rank for a in view.attr("axes", [0, 2, 3])}, "sums over it")


def lp_norm(view: View) -> Iterator[Fact]:
    return normalising(view, {view.attr("axis", -1) % len(view.shape(0))}, "normalises over it")


def cum_sum(view: View) -> Iterator[Fact]:
    axis = view.ints(1)
    if axis is not None:
        yield from crossing(view, {axis[0] % len(view.shape(0))}, "accumulates over it")


RULES: dict[str, Rule] = {op: Rule(pool) for op in POOLS}
RULES |= {op: Rule(reduction) for op in REDUCTIONS}
RULES |= {
    "BatchNormalization": Rule(batch_norm),
    "InstanceNormalization": Rule(instance_norm),
    "GroupNormalization": Rule(group_norm, group_norm_fixup),
    "MaxPool": Rule(max_pool),
    "Softmax": Rule(softmax),
    "LogSoftmax": Rule(softmax),
    "Hardmax": Rule(softmax),
    "LRN": Rule(lrn),
    "LayerNormalization": Rule(layer_norm),
    "RMSNormalization": Rule(layer_norm),
    "LpNormalization": Rule(lp_norm),
    "MeanVarianceNormalization": Rule(mean_variance_norm),
    "CumSum": Rule(cum_sum),
    "CumProd": Rule(cum_sum),
}
