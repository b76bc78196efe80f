"""Operators of ONNX Runtime's own domain, com.microsoft, that are neither attention nor quantised."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fuzzing.build import Builder, NoFitError, T
from fuzzing.elementwise import partner
from fuzzing.layers import linear, of_rank, signal
from fuzzing.movement import any_axis
from fuzzing.norms import single
from fuzzing.weights import vector, weight

Maker = Callable[[Builder], object]
MS = "com.microsoft"


# ---- element by element


def gelu(b: Builder, op: str) -> T:
    x = b.data("f", dtype=np.float32)
    if op == "BiasGelu" or (op == "FastGelu" and b.chance(0.4)):
        if not x.rank or not x.static(x.rank - 1):
            raise NoFitError
        return b.op(op, [x, vector(b, x.shape[-1:])], MS)
    return b.op(op, [x], MS)


def gated_sum(b: Builder) -> T:
    """x + gate * y, with one gate for a row."""
    x = of_rank(b, (2, 3), lambda t: t.static(t.rank - 1))
    y = linear(b, x, x.rank - 1, x.shape[-1])
    gate = linear(b, x, x.rank - 1, 1)
    if y.rank != x.rank or gate.rank != x.rank:
        raise NoFitError
    return b.op("GatedAdd", [x, y, gate], MS, x.rank - 1)


# ---- linear


def fused_matmul(b: Builder, op: str) -> T:
    """A weight or an activation on the right, either side transposed, or with its first axis moved inwards; vectors."""
    x = single(b, (2, 3, 4))
    turned, flip = b.chance(0.5), b.chance(0.5)
    how: dict[str, object] = {"transA": int(turned), "transB": int(flip), "alpha": 0.5 if b.chance(0.5) else None}
    moved = op == "FusedMatMul" and x.rank > 2 and b.chance(0.25)
    if moved:
        how["transBatchA"] = 1
    summed = (0 if moved else x.rank - 2) if turned else x.rank - 1
    if not x.static(summed):
        raise NoFitError
    n, wide = x.shape[summed], b.number(1, 6)
    if b.chance(0.1) and not turned:
        return b.op(op, [x, weight(b, (n,), n)], MS, **how)
    if b.chance(0.15) and not moved:
        other = b.data(
            "f", [x.rank], lambda t: t.dtype == np.float32 and t.sizes(t.rank - (1 if flip else 2)) == x.sizes(summed)
        )
        return b.op(op, [x, other], MS, channel=x.rank - 1, **how)
    w = weight(b, (wide, n) if flip else (n, wide), n)
    return b.op(op, [x, w], MS, channel=x.rank - 1, **how)


def causal_conv(b: Builder) -> T:
    """Depthwise, along the last axis, with what came before perhaps; or with the channels last."""
    x = signal(b, (3,))
    c, taps = x.shape[1], b.number(1, 4)
    how: dict[str, object] = {"activation": b.choose(["silu", "none", "swish"])}
    bias = vector(b, (c,)) if b.chance(0.6) else None
    w = weight(b, (c, 1, taps), taps)
    if b.chance(0.25):
        x = b.op("Transpose", [x], perm=[0, 2, 1], channel=2)
        return b.ops("CausalConvWithState", [x, w, bias], [True, True], MS, 2, channels_last=1, **how)[0]
    past = vector(b, (x.shape[0], c, taps - 1), spread=1.0) if taps > 1 and x.static(0) and b.chance(0.4) else None
    return b.ops("CausalConvWithState", [x, w, bias, past], [True, True], MS, 1, **how)[0]


# ---- normalisation


def skip_norm(b: Builder, op: str) -> T:
    """Normalises a sum and hands out the sum too, which other operators then read."""
    x = of_rank(b, (3,), lambda t: t.static(2))
    reads: list[T | None] = [x, partner(b, x), vector(b, x.shape[2:], 1.0)]
    simple = op == "SkipSimplifiedLayerNormalization"
    if not simple:
        reads.append(vector(b, x.shape[2:]) if b.chance(0.7) else None)
    reads.append(vector(b, x.shape[2:]) if b.chance(0.4) else None)
    if b.chance(0.5):
        return b.ops(op, reads, [True, False, False, True], MS, 2, epsilon=0.05)[1]
    return b.op(op, reads, MS, 2, epsilon=0.05)


def simple_norm(b: Builder) -> T:
    """In the standard domain, where only ONNX Runtime has it."""
    x = single(b, (2, 3, 4))
    if not x.static(x.rank - 1):
        raise NoFitError
    return b.op("SimplifiedLayerNormalization", [x, vector(b, x.shape[-1:], 1.0)], axis=-1, epsilon=0.05)


def gated_norm(b: Builder) -> T:
    """RMS over runs of the last axis, times a gate."""
    x = of_rank(b, (2, 3), lambda t: t.static(t.rank - 1))
    run, runs = b.number(1, 4), b.number(1, 4)
    y, gate = (linear(b, x, x.rank - 1, run * runs) for _ in range(2))
    if y.rank != x.rank or gate.shape != y.shape:
        raise NoFitError
    return b.op("GatedRMSNorm", [y, vector(b, (run,), 1.0), gate], MS, y.rank - 1, epsilon=0.05)


def distances(b: Builder) -> T:
    x = single(b, (2,))
    if not x.static(1):
        raise NoFitError
    rows = weight(b, (b.number(1, 5), x.shape[1]), 1)
    pair = [x, rows] if b.chance(0.7) else [rows, x]
    return b.op("CDist", pair, MS, channel=1 if pair[0] is x else 0, metric=b.choose(["euclidean", "sqeuclidean"]))


# ---- data movement


def expand_dims(b: Builder) -> T:
    x = b.data("f", where=lambda t: t.dtype == np.float32 and 1 <= t.rank <= 4)
    axis = b.number(-x.rank - 1, x.rank)
    at = axis % (x.rank + 1)
    channel = None if x.channel is None else x.channel + (at <= x.channel)
    return b.op("ExpandDims", [x, b.const(np.array(axis, np.int32))], MS, channel)


def pad(b: Builder) -> T:
    x = single(b, (1, 2, 3, 4))
    ends = [b.number(0, 2) if b.chance(0.4) else 0 for _ in range(2 * x.rank)]
    value = [b.const(np.float32(0.5))] if b.chance(0.5) else []
    return b.op("Pad", [x, b.ints(*ends), *value], MS, x.channel)


def gather_nd(b: Builder) -> T:
    x = single(b)
    depth = b.number(1, x.rank)
    rows = np.stack([b.rng.integers(0, min(x.sizes(a)), 3) for a in range(depth)], axis=1)
    return b.op("GatherND", [x, b.const(rows.astype(np.int64))], MS)


def trilu(b: Builder) -> T:
    x = single(b, (2, 3, 4))
    reads = [x, b.const(np.array(b.number(-1, 1)))] if b.chance(0.5) else [x]
    return b.op("Trilu", reads, MS, x.channel, upper=b.number(0, 1))


# ---- space


def grid_sample(b: Builder) -> T:
    x = signal(b, (4,))
    if not x.static(0):
        raise NoFitError
    grid = b.const(b.rng.uniform(-0.9, 0.9, (x.shape[0], 2, 3, 2)).astype(np.float32))
    return b.op("GridSample", [x, grid], MS, 1)


def crop_and_resize(b: Builder) -> T:
    x = signal(b, (4,))
    count = b.number(1, 3)
    regions = b.const(np.sort(b.rng.uniform(0, 1, (count, 2, 2)), axis=1).reshape(count, 4).astype(np.float32))
    which = b.const(b.rng.integers(0, min(x.sizes(0)), count).astype(np.int32))
    size = b.const(np.array([b.number(1, 4), b.number(1, 4)], np.int32))
    return b.op("CropAndResize", [x, regions, which, size], MS, 1)


def square(b: Builder) -> T:
    """A tensor whose last two axes are as long as each other: at need a product of one with itself."""
    x = single(b, (2, 3, 4))
    if x.sizes(x.rank - 1) != x.sizes(x.rank - 2):
        perm = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
        x = b.op("MatMul", [x, b.op("Transpose", [x], perm=perm)])
    return x


def inverse(b: Builder) -> T:
    """Of matrices that are far from singular."""
    x = square(b)
    if not x.static(x.rank - 1):
        raise NoFitError
    eye = b.const(10 * np.eye(x.shape[-1], dtype=np.float32))
    return b.op("Inverse", [b.op("Add", [b.op("Tanh", [x]), eye], channel=x.channel)], MS, x.channel)


def unfold(b: Builder) -> T:
    x = single(b, (2, 3, 4))
    axis = any_axis(b, x)
    size = b.number(1, min(x.sizes(axis)))
    return b.op("UnfoldTensor", [x], MS, x.channel, dim=axis, size=size, step=b.number(1, 2))


OPS: dict[str, Maker] = {"SimplifiedLayerNormalization": simple_norm}
CONTRIB: dict[str, Maker] = {
    op: partial(gelu, op=op) for op in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu", "SampleOp", "ScaledSiLU")
}
CONTRIB |= {op: partial(fused_matmul, op=op) for op in ("FusedMatMul", "TransposeMatMul")}
CONTRIB |= {op: partial(skip_norm, op=op) for op in ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")}
CONTRIB |= {
    "CDist": distances,
    "CausalConvWithState": causal_conv,
    "CropAndResize": crop_and_resize,
    "ExpandDims": expand_dims,
    "GatedAdd": gated_sum,
    "GatedRMSNorm": gated_norm,
    "GatherND": gather_nd,
    "GridSample": grid_sample,
    "Inverse": inverse,
    "Pad": pad,
    "Trilu": trilu,
    "UnfoldTensor": unfold,
}
