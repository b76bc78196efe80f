"""Operators of newer operator sets, and those that sample regions or transform signals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from fuzzing.build import Builder, NoFitError, T
from fuzzing.layers import divisors, signal
from fuzzing.norms import axis_of, single
from fuzzing.sizes import shape_like, unsqueeze
from fuzzing.weights import vector, weight

Maker = Callable[[Builder], object]


# ---- regions and grids


def regions(b: Builder, x: T) -> tuple[np.ndarray, np.ndarray]:
    """Corners of rectangles, and the image each is in."""
    count = b.number(1, 3)
    corners = np.sort(b.rng.uniform(0, 4, (count, 2, 2)), axis=1).reshape(count, 4) + np.array([0, 0, 1, 1])
    return corners.astype(np.float32), b.rng.integers(0, min(x.sizes(0)), count)


def roi_align(b: Builder) -> T:
    x = signal(b, (4,))
    corners, which = regions(b, x)
    how = {"output_height": b.number(1, 3), "output_width": b.number(1, 3), "mode": b.choose(["avg", "max"])}
    if b.opset >= 16 and b.chance(0.5):
        how["coordinate_transformation_mode"] = b.choose(["half_pixel", "output_half_pixel"])
    return b.op("RoiAlign", [x, b.const(corners), b.const(which)], channel=1, sampling_ratio=b.choose([None, 2]), **how)


def max_roi_pool(b: Builder) -> T:
    x = signal(b, (4,))
    corners, which = regions(b, x)
    rois = np.concatenate([which[:, None], np.round(corners)], axis=1).astype(np.float32)
    return b.op("MaxRoiPool", [x, b.const(rois)], channel=1, pooled_shape=[b.number(1, 3), b.number(1, 3)])


def affine_grid(b: Builder) -> T:
    """A grid of the size of what is then sampled at it."""
    x = signal(b, (4,))
    if not x.static(0):
        raise NoFitError
    theta = vector(b, (x.shape[0], 2, 3), spread=0.9)
    grid = b.op("AffineGrid", [theta, shape_like(b, x)], align_corners=b.number(0, 1))
    return b.op("GridSample", [x, grid], channel=1)


def deform_conv(b: Builder) -> T:
    x = signal(b, (4,))
    if not x.steady:
        raise NoFitError
    n, c, high, wide = x.shape
    kernel = [b.number(1, 2), b.number(1, 2)]
    if kernel[0] > high or kernel[1] > wide:
        raise NoFitError
    groups, runs = b.choose([1, 1, c, b.choose(divisors(c))]), b.choose([1, 1, b.choose(divisors(c))])
    out = groups * b.number(1, 3)
    space = (high - kernel[0] + 1, wide - kernel[1] + 1)
    taps = kernel[0] * kernel[1] * runs
    w = weight(b, (out, c // groups, *kernel), c // groups * kernel[0] * kernel[1])
    offset = vector(b, (n, 2 * taps, *space), spread=0.8)
    reads = [x, w, offset, vector(b, (out,)) if b.chance(0.5) else None]
    reads.append(vector(b, (n, taps, *space), 0.5) if b.chance(0.4) else None)
    return b.op("DeformConv", reads, channel=1, group=groups, offset_group=runs, kernel_shape=kernel)


# ---- signals


def fourier(b: Builder) -> T:
    """Along one axis, of real numbers; the two parts are added up, or left."""
    x = single(b, (2, 3, 4))
    axis = axis_of(b, x)
    u = unsqueeze(b, x, [x.rank])
    at = axis % x.rank
    how: dict[str, object] = {"onesided": 1} if b.chance(0.3) else {"inverse": 1} if b.chance(0.2) else {}
    if b.opset < 20:
        y = b.op("DFT", [u], axis=at, channel=x.channel, **how)
    elif b.chance(0.5):
        y = b.op("DFT", [u, None, b.const(np.array(at))], channel=x.channel, **how)
    else:
        y = b.op("DFT", [u], channel=x.channel, **how)
    return b.op("ReduceSum", [y, b.ints(-1)], keepdims=0, channel=x.channel) if b.chance(0.6) else y


def short_fourier(b: Builder) -> T:
    """Every row is a signal."""
    x = single(b, (2,))
    length = b.number(1, min(x.sizes(1)))
    window = b.const(b.rng.uniform(0.5, 1, length).astype(np.float32))
    step = b.const(np.array(b.number(1, 3)))
    return b.op("STFT", [unsqueeze(b, x, [2]), step, window], channel=0, onesided=b.number(0, 1))


# ---- others


def cum_prod(b: Builder) -> T:
    x = single(b)
    return b.op("CumProd", [x, b.const(np.array(axis_of(b, x)))], exclusive=b.number(0, 1), reverse=b.number(0, 1))


def bit_cast(b: Builder) -> T:
    x = b.data("f", where=lambda t: t.dtype == np.float32 and t.rank >= 1)
    y = b.op("BitCast", [x], to=TensorProto.INT32)
    return b.op("BitCast", [y], to=TensorProto.FLOAT, channel=x.channel)


def tensor_scatter(b: Builder) -> T:
    """Some rows of a cache are overwritten, from another position in every sample."""
    x = single(b, (3, 4))
    if not x.steady:
        raise NoFitError
    axis = b.number(1, x.rank - 1)
    length = b.number(1, x.shape[axis])
    update = b.op("Slice", [x, b.ints(0), b.ints(length), b.ints(axis)], channel=x.channel)
    circular = b.chance(0.5)
    places = b.rng.integers(0, x.shape[axis] if circular else x.shape[axis] - length + 1, x.shape[0])
    cache = vector(b, x.shape, spread=1.0) if b.chance(0.6) else x
    how = {"mode": "circular" if circular else "linear", "axis": axis - (x.rank if b.chance(0.5) else 0)}
    return b.op("TensorScatter", [cache, update, b.const(places)], channel=x.channel, **how)


OPS: dict[str, Maker] = {
    "AffineGrid": affine_grid,
    "BitCast": bit_cast,
    "CumProd": cum_prod,
    "DFT": fourier,
    "DeformConv": deform_conv,
    "MaxRoiPool": max_roi_pool,
    "RoiAlign": roi_align,
    "STFT": short_fourier,
    "TensorScatter": tensor_scatter,
}
