"""Constants as exporters write them: plain, shared, or behind data movement, casts, products and quantisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fuzzing.build import Array, Builder, T


def weight(b: Builder, shape: Sequence[int], fan: int, dtype: Any = np.float32) -> T:
    """A random weight of `shape`, scaled for sums over `fan` values."""
    shape = tuple(int(n) for n in shape)
    if b.chance(b.shared) and (found := _in_use(b, shape, dtype)) is not None:
        return found
    value = (b.rng.standard_normal(shape) / np.sqrt(max(fan, 1))).astype(dtype)
    if not b.chance(b.dressed):
        return b.const(value, "w")
    return b.choose(DRESSES)(b, value)


def _in_use(b: Builder, shape: tuple[int, ...], dtype: Any) -> T | None:
    """A constant of this shape that other layers read, perhaps the other way round."""
    known = [*b.stored, *(t for t in b.pool if t.fixed)]
    same = [t for t in known if t.shape == shape and t.dtype == dtype and t.rank > 1]
    turned = [t for t in known if t.shape == shape[::-1] and t.dtype == dtype and t.rank > 1]
    if same and b.chance(0.7):
        return b.choose(same)
    if turned:
        return b.op("Transpose", [b.choose(turned)], perm=list(range(len(shape)))[::-1])
    return None


def vector(b: Builder, shape: Sequence[int], around: float = 0.0, spread: float = 0.3, dtype: Any = np.float32) -> T:
    """A random vector or a small tensor; some are all alike and shared, as exporters merge equal ones."""
    shape = tuple(int(n) for n in shape)
    if b.chance(0.25):
        value = np.full(shape, around, dtype)
        equal = [t for t in b.stored if t.shape == shape and t.dtype == value.dtype and np.array_equal(t.values[0], value)]
        return b.choose(equal) if equal and b.chance(0.7) else b.const(value)
    value = (around + spread * b.rng.uniform(-1, 1, shape)).astype(dtype)
    return b.choose(DRESSES)(b, value) if shape and b.chance(b.dressed / 3) else b.const(value)


# ---- ways to write a constant: (builder, value) -> tensor with that value, or one much like it


def identity(b: Builder, value: Array) -> T:
    return b.op("Identity", [b.const(value, "w")])


def transposed(b: Builder, value: Array) -> T:
    perm = [int(i) for i in b.rng.permutation(value.ndim)]
    return b.op("Transpose", [b.const(value.transpose(np.argsort(perm)), "w")], perm=perm)


def cast(b: Builder, value: Array) -> T:
    kind = {np.dtype(np.float32): 1, np.dtype(np.float16): 10, np.dtype(np.float64): 11}[value.dtype]
    return b.op("Cast", [b.const(value.astype(b.choose([np.float16, np.float64])), "w")], to=kind)


def reshaped(b: Builder, value: Array) -> T:
    flat = value.reshape(b.choose([(-1,), (1, -1), (*value.shape, 1), (value.shape[0] if value.ndim else 1, -1)]))
    return b.op("Reshape", [b.const(flat, "w"), b.ints(*value.shape)])


def concatenated(b: Builder, value: Array) -> T:
    axes = [a for a, n in enumerate(value.shape) if n > 1]
    if not axes:
        return identity(b, value)
    axis = b.choose(axes)
    cut = b.number(1, value.shape[axis] - 1)
    parts = np.split(value, [cut], axis)
    return b.op("Concat", [b.const(p, "w") for p in parts], axis=axis)


def sliced(b: Builder, value: Array) -> T:
    """A range of a larger constant, in order or backwards."""
    if not value.ndim or b.opset < 10:
        return identity(b, value)
    axis = b.number(0, value.ndim - 1)
    more = b.number(0, 3)
    before = b.number(0, more)
    padded = np.concatenate([np.take(value, np.zeros(before, np.int64), axis), value, _rest(value, axis, more - before)], axis)
    size = value.shape[axis]
    if b.chance(0.3):
        stored, start, end, step = np.flip(padded, axis), padded.shape[axis] - 1 - before, -(2**31), -1
        end = start - size if start - size >= 0 else end
        return b.op("Slice", [b.const(stored, "w"), b.ints(start), b.ints(end), b.ints(axis), b.ints(step)])
    return b.op("Slice", [b.const(padded, "w"), b.ints(before), b.ints(before + size), b.ints(axis)])


def _rest(value: Array, axis: int, count: int) -> Array:
    return np.take(value, np.zeros(count, np.int64), axis)


def gathered(b: Builder, value: Array) -> T:
    """Picked from a constant in another order."""
    if not value.ndim:
        return identity(b, value)
    axis = b.number(0, value.ndim - 1)
    order = b.rng.permutation(value.shape[axis])
    return b.op("Gather", [b.const(np.take(value, np.argsort(order), axis), "w"), b.ints(*order)], axis=axis)


def scaled(b: Builder, value: Array) -> T:
    """A weight times a scale for some of its axes, as weight normalisation leaves it; or plus something, which freezes it."""
    shape = [n if b.chance(0.5) else 1 for n in value.shape]
    factor = b.const(b.rng.uniform(0.5, 1.5, shape).astype(value.dtype))
    pair = [b.const(value, "w"), factor]
    return b.op(b.choose(["Mul", "Mul", "Mul", "Add", "Div"]), pair if b.chance(0.5) else pair[::-1])


def quantised(b: Builder, value: Array) -> T:
    """Eight bits and DequantizeLinear, with one scale or one for each position of an axis."""
    if b.opset < 10 or value.dtype != np.float32 or not value.size:
        return identity(b, value)
    axis = b.number(0, value.ndim - 1) if value.ndim and b.opset >= 13 and b.chance(0.6) else None
    largest = np.abs(value).max() if axis is None else np.moveaxis(np.abs(value), axis, 0).reshape(value.shape[axis], -1).max(1)
    step = np.asarray(np.maximum(largest, 1e-3) / 127, np.float32)
    kind = b.choose([np.int8, np.int8, np.uint8])
    point = np.zeros(step.shape, np.int8) if kind == np.int8 else np.full(step.shape, 128, np.uint8)
    shape = [1] * value.ndim
    if axis is not None:
        shape[axis] = -1
    levels = np.round(value / step.reshape(shape)) + point.reshape(shape).astype(np.float64)
    reads: list[T] = [b.const(levels.astype(kind), "w"), b.const(step)]
    if kind == np.uint8 or b.chance(0.5):
        reads.append(b.const(point))
    return b.op("DequantizeLinear", reads, axis=axis)


def unsqueezed(b: Builder, value: Array) -> T:
    """An axis more, then one less."""
    axis = b.number(0, value.ndim)
    stored = b.const(np.expand_dims(value, axis), "w")
    if b.opset >= 13:
        return b.op("Squeeze", [stored, b.ints(axis)])
    return b.op("Squeeze", [stored], axes=[axis])


def split(b: Builder, value: Array) -> T:
    """One part of a larger constant; the others may be read elsewhere."""
    if not value.ndim:
        return identity(b, value)
    axis = b.number(0, value.ndim - 1)
    size = value.shape[axis]
    other = b.number(1, 3)
    parts = [value, np.take(value, np.zeros(other, np.int64), axis)]
    first = b.number(0, 1)
    stored = b.const(np.concatenate(parts[::-1] if first else parts, axis), "w")
    sizes = [other, size] if first else [size, other]
    if b.opset >= 13:
        return b.ops("Split", [stored, b.ints(*sizes)], [True, True], axis=axis)[first]
    return b.ops("Split", [stored], [True, True], axis=axis, split=sizes)[first]


def expanded(b: Builder, value: Array) -> T:
    """Stretched along one axis."""
    if not value.ndim or b.opset < 8:
        return identity(b, value)
    axis = b.number(0, value.ndim - 1)
    return b.op("Expand", [b.const(value.take([0], axis), "w"), b.ints(*value.shape)])


def negated(b: Builder, value: Array) -> T:
    """Computed, and not by moving or scaling."""
    return b.op(b.choose(["Neg", "Tanh", "Abs"]), [b.const(value, "w")])


DRESSES: list[Callable[[Builder, Array], T]] = [
    identity, transposed, transposed, cast, reshaped, concatenated, sliced, gathered, scaled, quantised, quantised,
    unsqueezed, split, expanded, negated,
]  # fmt: skip
