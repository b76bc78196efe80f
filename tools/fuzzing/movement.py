"""Data movement: operators that put elements elsewhere, in all the forms that their operands have taken."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fuzzing.build import Builder, NoFitError, T
from fuzzing.layers import divisors, signal
from fuzzing.sizes import Part, one, unsqueeze
from fuzzing.weights import vector

Maker = Callable[[Builder], object]


def anything(b: Builder, least: int = 1) -> T:
    kinds = b.choose(["f"] * 8 + ["i", "b"])
    return b.data(kinds, where=lambda t: t.rank >= least)


def any_axis(b: Builder, x: T) -> int:
    """Often the one with channels."""
    return int(x.channel) if x.channel is not None and b.chance(0.6) else b.number(0, x.rank - 1)


def transpose(b: Builder) -> T:
    x = anything(b)
    perm = [int(i) for i in b.rng.permutation(x.rank)]
    if b.chance(0.15):
        channel = None if x.channel is None else x.rank - 1 - x.channel
        return b.op("Transpose", [x], channel=channel)
    return b.op("Transpose", [x], perm=perm, channel=None if x.channel is None else perm.index(x.channel))


def concat(b: Builder) -> T:
    x = anything(b)
    axis = any_axis(b, x)

    def fits(t: T) -> bool:
        return t.dtype == x.dtype and t.rank == x.rank and all(t.sizes(a) == x.sizes(a) for a in range(x.rank) if a != axis)

    parts = [x]
    for _ in range(b.choose([0, 1, 1, 1, 2])):
        how = b.choose(["tensor", "tensor", "same", "constant"])
        if how == "constant" and x.dtype.kind == "f" and all(x.static(a) for a in range(x.rank) if a != axis):
            parts.append(vector(b, [b.number(1, 3) if a == axis else n for a, n in enumerate(x.shape)], dtype=x.dtype))
        else:
            parts.append(x if how == "same" else b.data(x.dtype.kind, where=fits))
    order = [parts[i] for i in b.rng.permutation(len(parts))]
    return b.op("Concat", order, axis=axis - (x.rank if b.opset >= 11 and b.chance(0.3) else 0), channel=x.channel)


def split(b: Builder) -> T:
    x = anything(b)
    axis = any_axis(b, x)
    n = x.shape[axis]
    if n < 2 or not x.static(axis):
        raise NoFitError
    even = [d for d in divisors(n) if 1 < d <= 4]
    count = b.choose(even) if even and b.chance(0.6) else b.number(2, min(3, n))
    cuts = np.sort(b.rng.choice(np.arange(1, n), count - 1, replace=False))
    sizes = [int(v) for v in np.diff([0, *cuts, n])]
    spelt = axis - (x.rank if b.opset >= 11 and b.chance(0.3) else 0)
    how: dict[str, Any] = {"axis": spelt if axis or b.chance(0.5) else None}
    named = [True] * count
    if b.opset >= 18 and b.chance(0.4):
        return _first(b, b.ops("Split", [x], named, channel=x.channel, num_outputs=count, **how))
    if n % count == 0 and b.chance(0.5):
        sizes = [n // count] * count
        if b.opset < 18 and b.chance(0.5):
            return _first(b, b.ops("Split", [x], named, channel=x.channel, **how))
    if b.opset < 13:
        return _first(b, b.ops("Split", [x], named, channel=x.channel, split=sizes, **how))
    operand = b.ints(*sizes)
    if count == 2 and n % 2 == 0 and b.chance(0.2):  # halves, computed at run time
        whole, part = Part(x, (axis,)), Part(x, (axis,), over=2)
        half = one(b, part)
        operand = b.op("Concat", [half, b.op("Sub", [one(b, whole), half])], axis=0)
    return _first(b, b.ops("Split", [x, operand], named, channel=x.channel, **how))


def _first(b: Builder, made: list[T]) -> T:
    """All parts stay in the pool, or all but one are forgotten."""
    if b.chance(0.3):
        keep = b.choose(made)
        b.pool[-len(made) :] = [keep]
        return keep  # type: ignore[no-any-return]
    return made[0]


def slice_(b: Builder) -> T:
    x = anything(b)
    first = any_axis(b, x)
    axes = [first] if b.chance(0.7) else b.some(range(x.rank))
    bounds = [_bounds(b, min(x.sizes(a))) for a in axes]
    starts, ends, steps = (list(v) for v in zip(*bounds, strict=True))
    spelt = [int(a) - (x.rank if b.opset >= 10 and b.chance(0.3) else 0) for a in axes]
    if b.opset < 10:
        if set(steps) != {1}:
            raise NoFitError
        return b.op("Slice", [x], starts=starts, ends=ends, axes=spelt, channel=x.channel)
    if len(axes) == 1 and b.chance(0.2):  # bounds that are computed from the size
        part = Part(x, (axes[0],), over=2)
        if min(part.values) >= 1:
            middle, end = one(b, part), b.ints(2**31 - 1)
            zero = b.ints(0)
            pair = b.choose([[zero, middle], [middle, end], [zero, one(b, Part(x, (axes[0],)))]])
            return b.op("Slice", [x, *pair, b.ints(*spelt)], channel=x.channel)
    kind = b.choose([np.int64, np.int64, np.int32])
    limit = 2**31 - 1 if kind == np.int32 else b.choose([2**31 - 1, 2**63 - 1])
    values = (starts, [min(e, limit) for e in ends], spelt, steps)
    operands: list[T | None] = [b.const(np.array(v, kind)) for v in values]
    if set(steps) == {1} and b.chance(0.6):
        operands[3] = None
    if axes == list(range(len(axes))) and operands[3] is None and b.chance(0.5):
        operands[2] = None
    return b.op("Slice", [x, *operands], channel=x.channel)


def _bounds(b: Builder, n: int) -> tuple[int, int, int]:
    """(start, end, step) that leave something of n positions."""
    if b.chance(0.2):
        step = b.choose([-1, -1, -2])
        start = b.choose([-1, n - 1, n + 3, b.number(0, n - 1)])
        low = b.choose([-(2**31), -n - 1, b.number(0, n - 1) - n, 0])
        return start, low, step
    start = b.number(0, n - 1)
    end = b.choose([b.number(start + 1, n), n, 2**63 - 1, n + 2])
    return (start - n if b.chance(0.2) else start), end, b.choose([1, 1, 1, 1, 1, 2, 3])


def gather(b: Builder) -> T:
    """Positions in any order, some twice; a single one; a matrix of them; found out at run time; or rows of an embedding."""
    how = b.choose(["vector", "vector", "vector", "scalar", "matrix", "computed", "embedding"])
    kind = b.choose([np.int64, np.int32])
    if how == "embedding":
        ids = b.data("i", where=lambda t: t.rank >= 1 and not t.fixed and all(v.min() >= 0 and v.max() < 12 for v in t.values))
        table = vector(b, (12, b.number(2, 8)), spread=1.0)
        return b.op("Gather", [table, ids], channel=ids.rank)
    x = anything(b)
    axis = any_axis(b, x)
    n = min(x.sizes(axis))
    low = -n if x.static(axis) and b.opset >= 11 and b.chance(0.3) else 0
    count = {"vector": (b.number(1, n + 1),), "scalar": (), "matrix": (2, b.number(1, 3)), "computed": (b.number(1, n),)}[how]
    indices = b.const(b.rng.integers(low, n, count).astype(kind))
    if how == "computed":
        test = b.op("Greater", [b.data("f", where=lambda t: t.rank > 0), b.const(np.array(1e6, np.float32))])
        extra = b.op("ReduceMax", [b.op("Cast", [test], to=6)], keepdims=0)
        indices = b.op("Add", [b.op("Cast", [indices], to=6), extra])
    moved = len(count) - 1 if x.channel is not None and axis < x.channel else 0
    channel = None if x.channel is None or (axis == x.channel and how != "vector") else x.channel + moved
    return b.op("Gather", [x, indices], axis=axis if axis or b.chance(0.5) else None, channel=channel)


def pad(b: Builder) -> T:
    x = b.data("f", where=lambda t: t.rank >= 1 and t.dtype == np.float32)
    mode = b.choose(["constant"] * 6 + ["reflect", "edge"] + (["wrap"] if b.opset >= 19 else []))
    least = -1 if b.chance(0.15) else 0
    amounts = [[b.number(least, 2) if b.chance(0.5) and x.shape[a] > 2 else 0 for a in range(x.rank)] for _ in range(2)]
    if x.channel is not None and b.chance(0.5):
        amounts = [[v if a != x.channel else b.choose([0, 0, v]) for a, v in enumerate(side)] for side in amounts]
    spelt = mode if mode != "constant" or b.chance(0.5) else None
    flat = [*amounts[0], *amounts[1]]
    if b.opset < 11:
        return b.op("Pad", [x], pads=flat, mode=spelt, value=0.3 if b.chance(0.3) else None)
    value = b.const(np.array(b.choose([0.0, 0.4]), np.float32)) if b.chance(0.5) and mode == "constant" else None
    axes = None
    if b.opset >= 18 and b.chance(0.3):
        chosen = b.some(range(x.rank))
        flat = [side[a] for side in amounts for a in chosen]
        axes = b.ints(*(a - x.rank if b.chance(0.3) else a for a in chosen))
    operand = b.ints(*flat)
    if b.chance(0.1):  # what is missing to a size, computed at run time
        axis = b.number(0, x.rank - 1)
        more = b.op("Sub", [b.ints(max(x.sizes(axis)) + 1), one(b, Part(x, (axis,)))])
        zeros = [b.ints(*[0] * n) for n in (x.rank + axis, x.rank - axis - 1) if n]
        operand = b.op("Concat", [zeros[0], more, *zeros[1:]], axis=0)
        axes = None
    return b.op("Pad", [x, operand, value, axes], mode=spelt, channel=x.channel)


def shape(b: Builder) -> T:
    """Sizes as numbers: shown as an output, or worked into the values."""
    x = b.data("fi", where=lambda t: t.rank >= 1)
    op = b.choose(["Shape", "Size"])
    made = b.op(op, [x]) if b.chance(0.5) or op == "Size" else one(b, Part(x, (any_axis(b, x),)))
    if b.chance(0.8):
        number = b.op("Cast", [made], to=1)
        if made.rank and made.shape[0] > 1:
            number = b.op("ReduceProd", [number], keepdims=0)
        y = b.data("f", dtype=np.float32)
        b.op(b.choose(["Div", "Div", "Mul", "Sub"]), [y, number], channel=y.channel)
    return made


def count(b: Builder) -> T:
    """Range over an axis, added to it: a position code."""
    x = b.data("f", where=lambda t: t.rank >= 1 and t.dtype == np.float32)
    axis = any_axis(b, x)
    size = one(b, Part(x, (axis,)))
    end = b.op("Reshape", [size, b.const(np.array([], np.int64))]) if b.opset < 13 else b.op("Squeeze", [size, b.ints(0)])
    places = b.op("Range", [b.const(np.array(0, np.int64)), end, b.const(np.array(1, np.int64))])
    code = b.op("Mul", [b.op("Cast", [places], to=1), b.const(np.float32(0.1))])
    if axis < x.rank - 1:
        code = unsqueeze(b, code, list(range(1, x.rank - axis)))
    return b.op("Add", [x, code])


def depth_to_space(b: Builder, op: str) -> T:
    def fits(t: T) -> bool:
        blocks = t.shape[1] % 4 == 0 if op == "DepthToSpace" else all(n % 2 == 0 for a in (2, 3) for n in t.sizes(a))
        return t.static(1) and t.dtype == np.float32 and blocks

    try:
        x = b.data("f", (4,), fits)
    except NoFitError:
        x = signal(b, (4,))
        for axis in (1,) * 2 if op == "DepthToSpace" else (2, 3):
            x = b.op("Concat", [x, x], axis=axis, channel=1)
    mode = b.choose([None, "DCR", "CRD"]) if op == "DepthToSpace" and b.opset >= 11 else None
    return b.op(op, [x], blocksize=2, mode=mode, channel=1)


OPS: dict[str, Maker] = {
    "Concat": concat,
    "DepthToSpace": partial(depth_to_space, op="DepthToSpace"),
    "Gather": gather,
    "Pad": pad,
    "Shape": shape,
    "Size": shape,
    "Slice": slice_,
    "SpaceToDepth": partial(depth_to_space, op="SpaceToDepth"),
    "Split": split,
    "Transpose": transpose,
}
STRANGE: dict[str, Maker] = {"Range": count}
