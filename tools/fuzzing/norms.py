"""Pooling, normalisation, reduction and running sums."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fuzzing.build import Builder, NoFitError, T
from fuzzing.elementwise import positive
from fuzzing.layers import divisors, of_rank, signal, window
from fuzzing.sizes import by_axes
from fuzzing.weights import vector

Maker = Callable[[Builder], object]
REDUCTIONS = [
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
]  # fmt: skip


def single(b: Builder, ranks: tuple[int, ...] | None = None) -> T:
    return of_rank(b, ranks or (1, 2, 3, 4, 5))


def pool(b: Builder, op: str) -> T:
    x = signal(b, (3, 4, 5))
    how = window(b, x)
    kernel = how.pop("kernel")
    dilations = how.pop("dilations", None)
    how["kernel_shape"] = kernel
    if op == "MaxPool" and b.opset >= 10 and "auto_pad" not in how:
        how["dilations"] = dilations
    if b.opset >= 10 and op != "LpPool" and b.chance(0.2):
        how["ceil_mode"] = 1
    if op == "AveragePool" and b.chance(0.3):
        how["count_include_pad"] = 1
    if op == "LpPool" and b.chance(0.5):
        how["p"] = b.number(1, 3)
    if op == "MaxPool":
        return b.ops(op, [x], [True, b.chance(0.15)], **how)[0]
    return b.op(op, [x], **how)


def global_pool(b: Builder, op: str) -> T:
    return b.op(op, [signal(b, (3, 4, 5))], **({"p": b.number(1, 3)} if op == "GlobalLpPool" and b.chance(0.5) else {}))


def batch_norm(b: Builder) -> T:
    x = signal(b, (2, 3, 4, 5))
    c = (x.shape[1],)
    reads = [x, vector(b, c, 1.0), vector(b, c), vector(b, c), vector(b, c, 1.0)]
    if b.opset >= 14 and b.chance(0.1):
        return b.ops("BatchNormalization", reads, [True, *[b.chance(0.5)] * 2], training_mode=1)[0]
    return b.op("BatchNormalization", reads, epsilon=0.01 if b.chance(0.5) else None)


def instance_norm(b: Builder) -> T:
    x = signal(b, (3, 4, 5))
    return b.op("InstanceNormalization", [x, vector(b, x.shape[1:2], 1.0), vector(b, x.shape[1:2], 0.5)], epsilon=0.05)


def group_norm(b: Builder) -> T:
    """Scale and bias for each group until opset 20, for each channel since."""
    x = signal(b, (3, 4, 5))
    groups = b.choose(divisors(x.shape[1]))
    shape = (x.shape[1] if b.opset >= 21 else groups,)
    reads = [x, vector(b, shape, 1.0), vector(b, shape, 0.5)]
    return b.op("GroupNormalization", reads, num_groups=groups, epsilon=0.05)


def lrn(b: Builder) -> T:
    return b.op("LRN", [signal(b, (4,))], size=b.choose([1, 3, 5]), alpha=0.1)


def layer_norm(b: Builder, op: str) -> T:
    x = single(b, (2, 3, 4, 5))
    axis = b.number(0, x.rank - 1)
    if not all(x.static(a) for a in range(axis, x.rank)):
        raise NoFitError
    shape = x.shape[axis:]
    reads: list[T | None] = [x, vector(b, shape, 1.0)]
    if op == "LayerNormalization" and b.chance(0.7):
        reads.append(vector(b, shape))
    outputs = [True, op == "LayerNormalization" and b.chance(0.1), op == "LayerNormalization" and b.chance(0.1)]
    return b.ops(op, reads, outputs, axis=axis - (x.rank if b.chance(0.5) else 0), epsilon=0.05)[0]


def axis_of(b: Builder, x: T) -> int:
    """An axis, more often one without channels; counted from either end."""
    others = [a for a in range(x.rank) if a != x.channel]
    axis = b.choose(others) if others and b.chance(0.7) else b.number(0, x.rank - 1)
    return int(axis) - (x.rank if b.chance(0.4) else 0)


def softmax(b: Builder, op: str) -> T:
    x = single(b)
    axis = axis_of(b, x)
    if b.opset < 11:
        axis %= x.rank
    return b.op(op, [x], axis=axis if b.chance(0.8) else None)


def lp_norm(b: Builder) -> T:
    x = positive(b, single(b))
    return b.op("LpNormalization", [x], axis=axis_of(b, x), p=b.number(1, 2))


def reduction(b: Builder, op: str) -> T:
    x = single(b)
    if op == "ReduceLogSum":
        x = positive(b, x)
    axes = reduced(b, x)
    since = 13 if op == "ReduceSum" else 18
    keep = b.choose([None, 0, 0, 1])
    how: dict[str, Any] = {"keepdims": keep}
    if b.opset >= since and axes is None and b.chance(0.4):
        how["noop_with_empty_axes"] = 1
    # The hint stays valid only where the axes stay in place.
    channel = x.channel
    if channel is not None and axes is not None and keep == 0:
        gone = {a % x.rank for a in axes}
        channel = None if channel in gone else channel - sum(a < channel for a in gone)
    y = by_axes(b, op, x, axes, since, **how)
    b.pool[-1] = T(y.name, y.values, y.fixed, channel if channel is not None and channel < y.rank else None)
    return b.pool[-1]


def reduced(b: Builder, x: T) -> list[int] | None:
    """Axes to reduce; often all but the channels and the batch."""
    if b.chance(0.1):
        return None
    others = [a for a in range(x.rank) if a != x.channel]
    axes = b.some(others) if others and b.chance(0.8) else b.some(range(x.rank))
    return [int(a) - (x.rank if b.opset >= 11 and b.chance(0.3) else 0) for a in axes]


def cum_sum(b: Builder) -> T:
    x = single(b)
    kind = b.choose([np.int64, np.int32])
    axis = b.const(np.array(axis_of(b, x), kind))
    return b.op("CumSum", [x, axis], exclusive=b.number(0, 1), reverse=b.number(0, 1))


OPS: dict[str, Maker] = {op: partial(pool, op=op) for op in ("AveragePool", "LpPool", "MaxPool")}
OPS |= {op: partial(global_pool, op=op) for op in ("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool")}
OPS |= {op: partial(reduction, op=op) for op in REDUCTIONS}
OPS |= {op: partial(layer_norm, op=op) for op in ("LayerNormalization", "RMSNormalization")}
OPS |= {op: partial(softmax, op=op) for op in ("Hardmax", "LogSoftmax", "Softmax")}
OPS |= {
    "BatchNormalization": batch_norm,
    "CumSum": cum_sum,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LRN": lrn,
    "LpNormalization": lp_norm,
}
