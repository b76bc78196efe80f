"""Linear layers, and how any axis of any tensor is put through one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fuzzing.build import Builder, NoFitError, T
from fuzzing.weights import vector, weight

Maker = Callable[[Builder], object]
WIDEST = 8


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def linear(b: Builder, x: T, axis: int, wide: int) -> T:
    """Any axis of x, of constant size, through a matrix: as a Gemm, a MatMul from either side, or a 1x1 convolution."""
    if not x.static(axis) or x.dtype != np.float32:
        raise NoFitError
    inner = x.shape[axis]
    ways = []
    if x.rank == 2:
        ways.append("gemm")
    if x.rank >= 2 and axis == x.rank - 1:
        ways.append("right")
    if x.rank >= 2 and axis == x.rank - 2:
        ways.append("left")
    if x.rank in (3, 4, 5) and axis == 1:
        ways += ["conv"] * 2
    how = b.choose(ways or ["turn"])
    if how == "gemm":
        turned = axis == 0
        w = weight(b, (wide, inner), inner) if (flip := b.chance(0.5)) else weight(b, (inner, wide), inner)
        bias = vector(b, (wide,)) if b.opset < 11 or b.chance(0.7) else None
        return b.op("Gemm", [x, w, bias], transA=int(turned), transB=int(flip), channel=1)
    if how == "right":
        y = b.op("MatMul", [x, weight(b, (inner, wide), inner)], channel=axis)
        return b.op("Add", [y, vector(b, (wide,))], channel=axis) if b.chance(0.4) else y
    if how == "left":
        return b.op("MatMul", [weight(b, (wide, inner), inner), x], channel=axis)
    if how == "conv":
        w = weight(b, (wide, inner, *[1] * (x.rank - 2)), inner)
        return b.op("Conv", [x, w, vector(b, (wide,)) if b.chance(0.6) else None], channel=1)
    if x.rank == 1:
        return linear(b, b.op("Reshape", [x, b.ints(1, -1)]), 1, wide)
    perm = [i for i in range(x.rank) if i != axis] + [axis]
    last = linear(b, b.op("Transpose", [x], perm=perm, channel=x.rank - 1), x.rank - 1, wide)
    if x.rank != last.rank or b.chance(0.3):
        return last
    return b.op("Transpose", [last], perm=[int(i) for i in np.argsort(perm)], channel=axis)


def like(b: Builder, x: T) -> T:
    """Another tensor with channels, of the shape of x."""
    axis = x.channel if x.channel is not None else b.number(0, x.rank - 1)
    y = linear(b, x, axis, x.shape[axis])
    if y.shape != x.shape:
        raise NoFitError
    return y


def signal(b: Builder, ranks: tuple[int, ...]) -> T:
    """A float32 tensor [N, C, ...] of one of these ranks whose axis 1 has a constant size, at need cut to shape."""

    def fits(t: T) -> bool:
        return t.static(1) and t.dtype == np.float32

    if b.chance(0.85):
        try:
            return b.data("f", ranks, fits)
        except NoFitError:
            pass
    return to_rank(b, b.data("f", [r for r in (2, 3, 4, 5) if r not in ranks], fits), b.choose(ranks))


def to_rank(b: Builder, x: T, rank: int) -> T:
    """x with its last axes merged, or with more of them that have one position."""
    if x.rank > rank:
        return b.op("Reshape", [x, b.ints(*[0] * (rank - 1), -1)], channel=x.channel)
    shape = [0] * x.rank + [1] * (rank - x.rank)
    return b.op("Reshape", [x, b.ints(*shape)], channel=x.channel) if rank > x.rank else x


def of_rank(b: Builder, ranks: tuple[int, ...], fits: Callable[[T], bool] = lambda t: True) -> T:
    """A float32 tensor of one of these ranks, at need reshaped."""
    if b.chance(0.85):
        try:
            return b.data("f", ranks, lambda t: t.dtype == np.float32 and fits(t))
        except NoFitError:
            pass
    x = to_rank(b, b.data("f", where=lambda t: t.dtype == np.float32 and t.rank > 0), b.choose(ranks))
    if not fits(x):
        raise NoFitError
    return x


# ---- convolutions


def window(b: Builder, x: T, transposed: bool = False) -> dict[str, object]:
    """Kernel and how it moves, for the spatial axes of x; channels are left to the caller."""
    n = x.rank - 2
    kernel = [b.number(1, 3) for _ in range(n)]
    how: dict[str, object] = {"kernel_shape": kernel} if b.chance(0.5) else {}
    if b.chance(0.4):
        how["strides"] = [b.number(1, 2) for _ in range(n)]
    if b.chance(0.2):
        how["dilations"] = [b.number(1, 2) for _ in range(n)]
    if b.chance(0.6):
        how["pads"] = [k // 2 for k in kernel] * 2 if b.chance(0.7) else [b.number(0, k - 1) for k in kernel * 2]
    elif b.chance(0.2) and not transposed:
        how["auto_pad"] = b.choose(["SAME_UPPER", "SAME_LOWER", "VALID"])
        how.pop("dilations", None)
    return {"kernel": kernel, **how}


def groups_for(b: Builder, channels: int) -> int:
    return int(b.choose([1, 1, 1, channels, b.choose(divisors(channels))]))


def conv(b: Builder, op: str = "Conv", domain: str = "", more: Callable[[T], list[T]] | None = None, **extra: object) -> T:
    x = signal(b, (3, 4, 5))
    c = x.shape[1]
    how = window(b, x)
    kernel = how.pop("kernel")
    assert isinstance(kernel, list)
    groups = groups_for(b, c)
    wide = groups * b.number(1, 3) if groups > 1 else b.number(1, WIDEST)
    w = weight(b, (wide, c // groups, *kernel), c // groups * int(np.prod(kernel)))
    bias = vector(b, (wide,)) if b.chance(0.6) else None
    reads = [x, w, bias]
    return b.op(op, reads, domain, 1, group=groups if groups > 1 or b.chance(0.3) else None, **how, **extra)


def conv_transpose(b: Builder) -> T:
    x = signal(b, (3, 4, 5))
    c = x.shape[1]
    how = window(b, x, transposed=True)
    kernel = how.pop("kernel")
    assert isinstance(kernel, list)
    groups = groups_for(b, c)
    width = b.number(1, 3 if groups > 1 else WIDEST)
    w = weight(b, (c, width, *kernel), c // groups * int(np.prod(kernel)))
    bias = vector(b, (width * groups,)) if b.chance(0.6) else None
    if "strides" in how and b.chance(0.3):
        how["output_padding"] = [int(s > 1) for s in how["strides"]]  # type: ignore[attr-defined]
    if b.chance(0.1) and x.steady:
        how.pop("pads", None)
        how["output_shape"] = [n + k - 1 for n, k in zip(x.shape[2:], kernel, strict=True)]
    return b.op("ConvTranspose", [x, w, bias], channel=1, group=groups, **how)


ACTIVATIONS = ["Relu", "Tanh", "Sigmoid", "LeakyRelu", "HardSigmoid"]


def fused_conv(b: Builder) -> T:
    """Conv, perhaps a sum with another tensor, and an activation."""
    x = signal(b, (4,))
    c, wide = x.shape[1], b.number(2, WIDEST)
    w, bias = weight(b, (wide, c, 1, 1), c), vector(b, (wide,))
    kind = b.choose(ACTIVATIONS[:3])
    z = None
    if b.chance(0.4):
        z = b.op("Conv", [x, weight(b, (wide, c, 1, 1), c)], channel=1)
        kind = "Relu"
    return b.op("FusedConv", [x, w, bias, z], "com.microsoft", 1, activation=kind, kernel_shape=[1, 1])


# ---- matrices


def gemm(b: Builder, op: str = "Gemm", domain: str = "", **extra: object) -> T:
    """Constants on either side, or two activations; C of any shape that broadcasts."""
    x = of_rank(b, (2,))
    turned = b.chance(0.3)
    rows, inner = (1, 0) if turned else (0, 1)
    flip, left = b.chance(0.5), b.chance(0.25)
    scales = {"alpha": 0.7} if b.chance(0.3) else {}
    if not x.static(inner if not left else 0):
        raise NoFitError
    wide = b.number(1, WIDEST)
    if left:  # the constant stands on the left, x on the right
        summed = 1 if flip else 0
        n = x.shape[summed]
        w = weight(b, (n, wide) if turned else (wide, n), n)
        reads, out = [w, x], (wide, x.shape[1 - summed])
        steady = x.static(1 - summed)
    elif b.chance(0.1):
        summed = 1 if flip else 0
        y = b.data("f", [2], lambda t: t.dtype == np.float32 and t.sizes(summed) == x.sizes(inner))
        reads, out, steady = [x, y], (x.shape[rows], y.shape[1 - summed]), False
    else:
        n = x.shape[inner]
        w = weight(b, (wide, n) if flip else (n, wide), n)
        reads, out, steady = [x, w], (x.shape[rows], wide), x.static(rows)
    extra = {**extra, **scales, **({"beta": 1.5} if b.chance(0.2) else {})}
    bias = gemm_bias(b, out, steady, left)
    return b.op(op, [*reads, bias], domain, 0 if left else 1, transA=int(turned), transB=int(flip), **extra)


def gemm_bias(b: Builder, out: tuple[int, int], steady: bool, left: bool) -> T | None:
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1)]
    shapes += [(out[0], 1)] if left else [(out[1],), (1, out[1])] * 2
    shapes += [(out[0], 1), (1, out[1]), out, out] if steady else []
    if b.opset >= 11 and b.chance(0.3):
        return None
    return vector(b, b.choose(shapes))


def matmul(b: Builder) -> T:
    """A weight on either side, with batch axes of its own perhaps; or two activations; or vectors."""
    x = b.data("f", where=lambda t: t.dtype == np.float32 and t.rank >= 1)
    how = b.choose(["right", "right", "left", "batched", "both", "vector"])
    wide = b.number(1, WIDEST)
    if how == "vector" or x.rank == 1:
        if not x.static(x.rank - 1):
            raise NoFitError
        return b.op("MatMul", [x, weight(b, (x.shape[-1],) if b.chance(0.5) else (x.shape[-1], wide), x.shape[-1])])
    if how == "both":
        perm = [*range(x.rank - 2), x.rank - 1, x.rank - 2]
        other = b.op("Transpose", [x], perm=perm)
        return b.op("MatMul", [x, other] if b.chance(0.5) else [other, x])
    summed = x.rank - 2 if how == "left" else x.rank - 1
    if not x.static(summed):
        raise NoFitError
    n = x.shape[summed]
    lead: list[int] = []
    if how == "batched":
        lead = [m if x.static(a) and b.chance(0.6) else 1 for a, m in enumerate(x.shape[:-2])]
        lead = lead[b.number(0, len(lead)) :]
    if how == "left":
        return b.op("MatMul", [weight(b, (*lead, wide, n), n), x], channel=x.rank - 2)
    return b.op("MatMul", [x, weight(b, (*lead, n, wide), n)], channel=x.rank - 1)


# ---- recurrent layers


def recurrent(b: Builder, op: str) -> T:
    x = of_rank(b, (3,), lambda t: t.static(2))
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    ways = b.choose([1, 1, 2])
    units, features = b.number(2, 6), x.shape[2]
    direction = "bidirectional" if ways == 2 else b.choose(["forward", "reverse"])
    how: dict[str, object] = {"hidden_size": units, "direction": direction}
    w = weight(b, (ways, gates * units, features), features)
    r = weight(b, (ways, gates * units, units), units)
    reads: list[T | None] = [x, w, r, vector(b, (ways, 2 * gates * units)) if b.chance(0.7) else None, None]
    if b.chance(0.3) and x.static(1):
        reads.append(vector(b, (ways, x.shape[1], units)))
        if op == "LSTM" and b.chance(0.7):
            reads.append(vector(b, (ways, x.shape[1], units)))
    if op == "LSTM" and b.chance(0.3):
        reads += [None] * (7 - len(reads))
        reads.append(vector(b, (ways, 3 * units)))
    if op == "GRU" and b.chance(0.5):
        how["linear_before_reset"] = 1
    if b.chance(0.2):
        how["clip"] = 0.8
    if op == "RNN" and b.chance(0.3):
        how["activations"] = ["Relu"] * ways
    outputs = [b.chance(0.8), b.chance(0.4), op == "LSTM" and b.chance(0.4)]
    made = b.ops(op, reads, outputs if any(outputs) else [True], channel=None, **how)
    made = [T(t.name, t.values, t.fixed, t.rank - 1) for t in made]
    b.pool[-len(made) :] = made
    return made[0]


OPS: dict[str, Maker] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "Gemm": gemm,
    "MatMul": matmul,
    **{op: partial(recurrent, op=op) for op in ("GRU", "LSTM", "RNN")},
}
CONTRIB: dict[str, Maker] = {
    "FusedConv": fused_conv,
    "FusedGemm": lambda b: gemm(b, "FusedGemm", "com.microsoft", activation=b.choose(ACTIVATIONS)),
}
