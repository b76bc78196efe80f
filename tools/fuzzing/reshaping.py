"""Operators that cut axes up differently, stretch them, or make tensors of a given shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from fuzzing.build import Builder, NoFitError, T
from fuzzing.elementwise import broadcastable, scalar
from fuzzing.layers import divisors, signal
from fuzzing.movement import any_axis, anything
from fuzzing.sizes import Part, another, by_axes, shape_like, shape_parts, vector_of

Maker = Callable[[Builder], object]


def recut(b: Builder, x: T) -> tuple[list[Part], int | None]:
    """The shape of x with axes merged, split, inserted or dropped, and where the channels may be then."""
    parts = shape_parts(x)
    channel = x.channel
    for _ in range(b.choose([1, 1, 2])):
        how = b.choose(["merge", "merge", "split", "split", "insert", "drop"])
        at = b.number(0, len(parts) - 1) if parts else 0
        if how == "insert" or not parts:
            parts.insert(at, Part())
            channel = None if channel is None else channel + (at <= channel)
        elif how == "drop" and parts[at].values == (1, 1):
            del parts[at]
            channel = None if channel is None or channel == at else channel - (at < channel)
        elif how == "merge" and at + 1 < len(parts):
            a, c = parts[at], parts[at + 1]
            parts[at : at + 2] = [Part(x, (*a.axes, *c.axes), a.times * c.times, a.over * c.over)]
            channel = None if channel is None else channel - (at < channel)
        elif how == "split" and len(parts) < 5:
            factor = b.choose(divisors(int(np.gcd.reduce(parts[at].values))))
            rest = Part(parts[at].of, parts[at].axes, parts[at].times, parts[at].over * factor)
            pieces = [Part(times=factor), rest]
            parts[at : at + 1] = pieces if b.chance(0.5) else pieces[::-1]
            channel = None if channel is None else channel + (at < channel)
    return parts, channel if channel is not None and channel < len(parts) else None


def scrambled(b: Builder, x: T) -> list[Part]:
    """Any other shape with as many elements."""
    if not x.steady:
        raise NoFitError
    sizes, rest = [], int(np.prod(x.shape))
    for _ in range(b.number(0, 3)):
        n = b.choose(divisors(rest))
        sizes.append(n)
        rest //= n
    return [Part(times=n) for n in (*sizes, rest)]


def reshape(b: Builder) -> T:
    x = anything(b, 0)
    parts, channel = (scrambled(b, x), None) if b.chance(0.1) else recut(b, x)
    if len(parts) > 5 or (not parts and b.opset < 8):
        raise NoFitError
    if not parts:
        return b.op("Reshape", [x, b.const(np.array([], np.int64))])
    allow = {"allowzero": 0} if b.opset >= 14 and b.chance(0.2) else {}
    return b.op("Reshape", [x, target(b, x, parts)], channel=channel, **allow)


def target(b: Builder, x: T, parts: list[Part]) -> T:
    """A Reshape's operand: numbers with 0 and -1, or computed, in whole or in part."""
    moving = [i for i, p in enumerate(parts) if not p.static]
    same = [i for i, p in enumerate(parts) if i < x.rank and p.values == x.sizes(i)]
    zeros = [i for i in same if b.chance(0.5)]
    rest = [i for i in moving if i not in zeros]
    how = b.choose(["numbers", "numbers", "computed", "free"])
    if how != "computed" and len(rest) <= 1:
        values = [0 if i in zeros else p.values[0] for i, p in enumerate(parts)]
        if rest or (how == "free" and len(parts)):
            values[rest[0] if rest else b.number(0, len(parts) - 1)] = -1
        return b.ints(*values)
    spelt = [another(b, p) if b.chance(0.15) else p for p in parts]
    if b.chance(0.3):
        free = b.number(0, len(parts) - 1)
        spelt[free] = Part(times=-1)
    return vector_of(b, spelt, 0.5)


def flatten(b: Builder) -> T:
    x = anything(b)
    axis = b.number(0, x.rank)
    if b.opset >= 11 and b.chance(0.2) and axis < x.rank:
        axis -= x.rank
    return b.op("Flatten", [x], axis=axis if axis != 1 or b.chance(0.5) else None)


def squeeze(b: Builder) -> T:
    try:
        x = b.data("fi", where=lambda t: t.rank >= 1 and any(v == (1, 1) for v in map(t.sizes, range(t.rank))))
    except NoFitError:
        x = b.op("GlobalMaxPool", [signal(b, (3, 4))], channel=1)
    ones = [a for a in range(x.rank) if x.sizes(a) == (1, 1)]
    if b.chance(0.15):
        return b.op("Squeeze", [x])
    axes = b.some(ones)
    channel = None if x.channel is None or x.channel in axes else x.channel - sum(a < x.channel for a in axes)
    spelt = [a - x.rank if b.opset >= 11 and b.chance(0.3) else a for a in axes]
    return by_axes(b, "Squeeze", x, spelt, 13, channel=channel)


def unsqueeze(b: Builder) -> T:
    x = b.data("fi", where=lambda t: t.rank <= 4)
    rank = x.rank + b.choose([1, 1, 2]) if x.rank <= 3 else 5
    axes = sorted(int(a) for a in b.rng.choice(rank, rank - x.rank, replace=False))
    spelt = [a - rank if b.opset >= 11 and b.chance(0.3) else a for a in axes]
    stays = [a for a in range(rank) if a not in axes]
    return by_axes(b, "Unsqueeze", x, spelt, 13, channel=None if x.channel is None else stays[x.channel])


def expand(b: Builder) -> T:
    """To the shape of another tensor, to numbers, or by numbers with ones in them."""
    x = anything(b, 0)
    how = b.choose(["like", "like", "numbers", "scalar"])
    if how == "like":
        y = b.data("f", where=broadcastable(x)) if x.dtype.kind == "f" else x
        return b.op("Expand", [x, shape_like(b, y)], channel=y.channel)
    if how == "scalar":
        y = b.data("f", where=lambda t: t.rank >= 1)
        return b.op("Expand", [scalar(b, 0.5, y), shape_like(b, y)], channel=y.channel)
    lead = [b.number(1, 3) for _ in range(b.number(0, 5 - x.rank))]
    shape = [b.number(1, 3) if x.sizes(a) == (1, 1) else b.choose([1, n]) if x.static(a) else 1 for a, n in enumerate(x.shape)]
    short = [*lead, *shape] or [1]
    channel = None if x.channel is None else x.channel + len(lead)
    return b.op("Expand", [x, b.ints(*short)], channel=channel)


def constant_of_shape(b: Builder) -> T:
    y = b.data("f", where=lambda t: t.rank >= 1 and t.dtype == np.float32)
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5]) if b.chance(0.8) else None
    parts = shape_parts(y)
    operand = shape_like(b, y) if b.chance(0.7) else vector_of(b, parts[b.number(0, len(parts) - 1) :], 0.3)
    made = b.op("ConstantOfShape", [operand], value=value)
    if b.chance(0.6) and broadcastable(y)(made):
        return b.op(b.choose(["Add", "Mul"]), [y, made] if b.chance(0.5) else [made, y], channel=y.channel)
    return made


def tile(b: Builder) -> T:
    x = anything(b)
    times = [b.number(1, 3) if b.chance(0.4) else 1 for _ in range(x.rank)]
    if b.chance(0.15):
        axis = any_axis(b, x)
        y, a = x, b.number(0, x.rank - 1)
        spelt = [Part(y, (a,)) if i == axis else Part(times=t) for i, t in enumerate(times)]
        return b.op("Tile", [x, vector_of(b, spelt, 0.5)], channel=x.channel)
    return b.op("Tile", [x, b.ints(*times)], channel=x.channel)


# ---- interpolation


def upsample(b: Builder) -> T:
    x = signal(b, (4,))
    scales = [1.0, 1.0, float(b.number(1, 2)), float(b.number(1, 2))]
    mode = b.choose(["nearest", "nearest", "linear"])
    if b.opset < 9:
        return b.op("Upsample", [x], scales=scales, mode=mode, channel=1)
    return b.op("Upsample", [x, b.const(np.array(scales, np.float32))], mode=mode, channel=1)


def resize(b: Builder) -> T:
    """By scales or to sizes; of all axes or of some; with any rule for the positions."""
    x = signal(b, (3, 4, 5)) if b.chance(0.9) else b.data("f", where=lambda t: t.dtype == np.float32 and t.rank >= 1)
    first = 2 if b.chance(0.5) and x.rank > 2 else 0
    scales = [1.0] * first + [b.choose([1.0, 1.0, 1.1, 2.0, 0.5, 1.5]) for _ in range(first, x.rank)]
    mode = b.choose(["nearest", "nearest", "linear", "cubic"] if b.opset >= 11 else ["nearest", "linear"])
    if b.opset < 11:
        return b.op("Resize", [x, b.const(np.array(scales, np.float32))], mode=mode, channel=x.channel)
    how = positions(b, mode)
    roi = None
    if how.get("coordinate_transformation_mode") == "tf_crop_and_resize":
        low, high = b.rng.uniform(0, 0.3, x.rank), b.rng.uniform(0.7, 1, x.rank)
        low[:first], high[:first] = 0, 1
        roi = b.const(np.concatenate([low, high]).astype(np.float32))
    elif b.opset < 13:
        roi = b.const(np.zeros(0, np.float32))
    axes = None
    chosen = list(range(x.rank))
    if b.opset >= 18 and roi is None and b.chance(0.3):
        chosen = list(range(first, x.rank))
        axes = [a - x.rank if b.chance(0.3) else a for a in chosen]
    if b.chance(0.5):
        factors = b.const(np.array([scales[a] for a in chosen], np.float32))
        return b.op("Resize", [x, roi, factors], mode=mode, axes=axes, channel=x.channel, **how)
    none = b.const(np.zeros(0, np.float32)) if b.opset < 13 else None
    return b.op("Resize", [x, roi, none, sizes_of(b, x, scales, chosen)], mode=mode, axes=axes, channel=x.channel, **how)


def sizes_of(b: Builder, x: T, scales: list[float], chosen: list[int]) -> T:
    parts = []
    for a in chosen:
        if scales[a] in (1.0, 2.0):
            parts.append(Part(x, (a,), times=int(scales[a])))
        else:
            parts.append(Part(times=max(1, int(x.shape[a] * scales[a]))))
    return vector_of(b, parts)


def positions(b: Builder, mode: str) -> dict[str, Any]:
    ways = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "tf_crop_and_resize"]
    how: dict[str, Any] = {"coordinate_transformation_mode": b.choose(ways)} if b.chance(0.6) else {}
    if mode == "nearest" and b.chance(0.5):
        how["nearest_mode"] = b.choose(["floor", "ceil", "round_prefer_floor", "round_prefer_ceil"])
    if mode != "nearest" and b.opset >= 18 and b.chance(0.2):
        how["antialias"] = 1
    return how


OPS: dict[str, Maker] = {
    "ConstantOfShape": constant_of_shape,
    "Expand": expand,
    "Flatten": flatten,
    "Reshape": reshape,
    "Resize": resize,
    "Squeeze": squeeze,
    "Tile": tile,
    "Unsqueeze": unsqueeze,
    "Upsample": upsample,
}
