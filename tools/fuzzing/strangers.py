"""Operators that are no data movement and no ordinary layer: most have no rule, so that channels must end at them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from onnx import TensorProto

from fuzzing.build import Builder, NoFitError, T
from fuzzing.contrib import square
from fuzzing.elementwise import positive
from fuzzing.layers import signal
from fuzzing.movement import any_axis
from fuzzing.norms import axis_of, single
from fuzzing.weights import vector, weight

Maker = Callable[[Builder], object]


def arg(b: Builder, op: str) -> T:
    x = single(b)
    made = b.op(op, [x], axis=axis_of(b, x) % x.rank, keepdims=b.number(0, 1))
    return b.op("Cast", [made], to=TensorProto.FLOAT) if b.chance(0.5) and made.rank else made


def top_k(b: Builder) -> T:
    x = single(b)
    axis = axis_of(b, x) % x.rank
    k = b.number(1, min(x.sizes(axis)))
    outputs = [True, b.chance(0.5)]
    if b.opset < 10:
        return b.ops("TopK", [x], [True, True], k=k, axis=axis)[0]
    return b.ops("TopK", [x, b.ints(k)], outputs if b.opset >= 10 else [True, True], axis=axis)[0]


def einsum(b: Builder) -> T:
    x = single(b, (2, 3, 4))
    letters = "abcd"[: x.rank]
    axis = any_axis(b, x)
    if b.chance(0.3):
        return b.op("Einsum", [x], equation=f"{letters}->{letters[::-1]}")
    if not x.static(axis):
        raise NoFitError
    w = weight(b, (x.shape[axis], 3), x.shape[axis])
    return b.op("Einsum", [x, w], equation=f"{letters},{letters[axis]}z->{letters.replace(letters[axis], 'z')}")


def gather_elements(b: Builder) -> T:
    x = single(b)
    if not x.steady:
        raise NoFitError
    axis = any_axis(b, x)
    shape = [b.number(1, n) if a == axis else n for a, n in enumerate(x.shape)]
    return b.op("GatherElements", [x, b.const(b.rng.integers(0, x.shape[axis], shape))], axis=axis)


def gather_nd(b: Builder) -> T:
    x = single(b)
    depth = b.number(1, x.rank)
    rows = np.stack([b.rng.integers(0, min(x.sizes(a)), 3) for a in range(depth)], axis=1)
    return b.op("GatherND", [x, b.const(rows.astype(np.int64))])


def scatter_elements(b: Builder, op: str) -> T:
    x = single(b)
    if not x.steady:
        raise NoFitError
    axis = any_axis(b, x)
    shape = [1 if a == axis else n for a, n in enumerate(x.shape)]
    indices = b.const(b.rng.integers(0, x.shape[axis], shape))
    return b.op(op, [x, indices, vector(b, shape)], axis=axis)


def scatter_nd(b: Builder) -> T:
    x = single(b)
    if not x.steady:
        raise NoFitError
    indices = b.const(np.array([[b.number(0, x.shape[0] - 1)]], np.int64))
    return b.op("ScatterND", [x, indices, vector(b, (1, *x.shape[1:]))])


def one_hot(b: Builder) -> T:
    x = single(b)
    ids = b.op("Cast", [b.op("Mul", [positive(b, x), b.const(np.float32(2))])], to=TensorProto.INT64)
    return b.op("OneHot", [ids, b.ints(4), b.const(np.array([0, 1], np.float32))], axis=b.choose([-1, 0]))


def trilu(b: Builder) -> T:
    return b.op("Trilu", [single(b, (2, 3, 4))], upper=b.number(0, 1))


def eye_like(b: Builder) -> T:
    x = single(b, (2,))
    return b.op("Add", [x, b.op("EyeLike", [x])])


def reverse_sequence(b: Builder) -> T:
    x = single(b, (2, 3, 4))
    if not x.static(1):
        raise NoFitError
    lengths = b.ints(*(b.number(1, min(x.sizes(0))) for _ in range(x.shape[1])))
    return b.op("ReverseSequence", [x, lengths], batch_axis=1, time_axis=0)


def compress(b: Builder) -> T:
    x = single(b)
    axis = any_axis(b, x)
    taken = b.rng.random(min(x.sizes(axis))) < 0.6
    taken[0] = True
    return b.op("Compress", [x, b.const(taken)], axis=axis)


def mean_variance(b: Builder) -> T:
    x = single(b, (4,))
    y = b.op("Add", [x, b.const(np.linspace(0, 3, x.shape[1]).reshape(1, -1, 1, 1).astype(np.float32))]) if x.static(1) else x
    return b.op("MeanVarianceNormalization", [y], axes=b.choose([None, [2, 3], [0, 2, 3], [1, 2, 3]]) if b.opset >= 9 else None)


def grid_sample(b: Builder) -> T:
    x = signal(b, (4,))
    if not x.static(0):
        raise NoFitError
    grid = b.const(b.rng.uniform(-0.9, 0.9, (x.shape[0], 2, 3, 2)).astype(np.float32))
    return b.op("GridSample", [x, grid], channel=1)


def determinant(b: Builder) -> T:
    return b.op("Det", [b.op("Tanh", [square(b)])])


def crop_or_pad(b: Builder) -> T:
    x = single(b)
    axis = any_axis(b, x)
    return b.op("CenterCropPad", [x, b.ints(b.number(1, 6))], axes=[axis])


def col2im(b: Builder) -> T:
    x = single(b, (3,))
    if not x.static(2) or not x.static(1):
        raise NoFitError
    return b.op("Col2Im", [x, b.ints(1, x.shape[2]), b.ints(1, 1)])


def max_unpool(b: Builder) -> T:
    x = signal(b, (4,))
    values, places = b.ops("MaxPool", [x], [True, True], kernel_shape=[1, 1])
    return b.op("MaxUnpool", [values, places], kernel_shape=[1, 1])


def non_zero(b: Builder) -> T:
    """Positions, as many as the data has: summed up, so that the number does not show."""
    x = single(b)
    places = b.op("Cast", [b.op("NonZero", [positive(b, x)])], to=TensorProto.FLOAT)
    return b.op("ReduceMax", [places], keepdims=0)


OPS: dict[str, Maker] = {op: partial(arg, op=op) for op in ("ArgMax", "ArgMin")}
OPS |= {op: partial(scatter_elements, op=op) for op in ("Scatter", "ScatterElements")}
OPS |= {
    "CenterCropPad": crop_or_pad,
    "Col2Im": col2im,
    "Compress": compress,
    "Det": determinant,
    "Einsum": einsum,
    "EyeLike": eye_like,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "GridSample": grid_sample,
    "MaxUnpool": max_unpool,
    "MeanVarianceNormalization": mean_variance,
    "NonZero": non_zero,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "ScatterND": scatter_nd,
    "TopK": top_k,
    "Trilu": trilu,
}
