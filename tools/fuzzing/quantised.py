"""Operators on 8-bit integers, between QuantizeLinear and DequantizeLinear, in both domains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from fuzzing.build import Builder, NoFitError, T
from fuzzing.layers import divisors, linear, of_rank, signal
from fuzzing.movement import any_axis
from fuzzing.norms import axis_of, single
from fuzzing.weights import vector

Maker = Callable[[Builder], object]
MS = "com.microsoft"


class Steps:
    """The scale and the zero point that all tensors of one piece share."""

    def __init__(self, b: Builder) -> None:
        if b.opset < 10:
            raise NoFitError
        self.b = b
        self.pair = [b.const(np.float32(b.choose([0.03, 0.05]))), b.const(np.uint8(b.choose([128, 120])))]

    def of(self, *tensors: T) -> list[T]:
        """Each tensor with its scale and zero point."""
        return [part for t in tensors for part in (t, *self.pair)]

    def made(self, x: T) -> T:
        return self.b.op("QuantizeLinear", self.of(x), channel=x.channel)

    def back(self, y: T) -> T:
        return self.b.op("DequantizeLinear", self.of(y), channel=y.channel)


def eight_bits(b: Builder, shape: tuple[int, ...], axis: int | None) -> list[T]:
    """A weight with its scale and zero point, of one step or of one for each position of an axis."""
    count = () if axis is None else (shape[axis],)
    kind = b.choose([np.int8, np.int8, np.uint8])
    middle = 0 if kind == np.int8 else b.choose([128, 128, 117])
    w = b.const((b.rng.integers(-100, 100, shape) + middle).clip(*((-128, 127) if middle == 0 else (0, 255))).astype(kind), "w")
    scale = b.const(b.rng.uniform(0.005, 0.01, count).astype(np.float32))
    return [w, scale, b.const(np.full(count, middle, kind))]


# ---- QuantizeLinear and DequantizeLinear


def steps(b: Builder, x: T, kind: Any) -> tuple[T, T | None, int | None]:
    """(scale, zero point, axis) that suit x."""
    largest = max(float(np.abs(v).max()) for v in x.values) + 0.1
    middle = 128 if kind == np.uint8 else 0
    axis = any_axis(b, x) if x.rank and b.opset >= 13 and b.chance(0.4) else None
    if axis is None or not x.static(axis):
        point = b.const(np.array(middle, kind)) if kind == np.uint8 or b.chance(0.6) else None
        return b.const(np.array(largest / 120, np.float32)), point, None
    n = x.shape[axis]
    point = b.const(np.full(n, middle, kind))
    return b.const((largest / 120 * b.rng.uniform(1, 1.5, n)).astype(np.float32)), point, axis


def there_and_back(b: Builder, domain: str = "") -> T:
    """QuantizeLinear and DequantizeLinear in a row."""
    x = single(b)
    if b.opset < 10:
        raise NoFitError
    kind = b.choose([np.int8, np.uint8])
    scale, point, axis = steps(b, x, kind)
    point = b.const(np.zeros(scale.shape, kind)) if point is None and kind == np.int8 else point
    spelt = axis if axis is None or b.chance(0.7) else axis - x.rank
    y = b.op("QuantizeLinear", [x, scale, point], domain, axis=spelt)
    if b.chance(0.3):
        y = b.op(b.choose(["Transpose", "Identity"]), [y])
    if y.shape != x.shape:
        raise NoFitError
    return b.op("DequantizeLinear", [y, scale, point], domain, axis=spelt, channel=x.channel)


# ---- linear


def integer_product(b: Builder, op: str) -> T:
    """DynamicQuantizeLinear, an integer product, and back to floating point."""
    x = single(b, (2, 3)) if op == "MatMulInteger" else signal(b, (4,))
    axis = x.rank - 1 if op == "MatMulInteger" else 1
    if not x.static(axis):
        raise NoFitError
    y, scale, point = b.ops("DynamicQuantizeLinear", [x], [True, True, True])
    n, wide = x.shape[axis], b.number(2, 6)
    shape = (n, wide) if op == "MatMulInteger" else (wide, n, 1, 1)
    w = b.const(b.rng.integers(-100, 100, shape).astype(np.int8), "w")
    small = b.op("Mul", [scale, b.const(np.float32(0.01))])
    total, cast, out = b.fresh("t"), b.fresh("t"), b.fresh("t")
    nodes = [
        helper.make_node(op, [y.name, w.name, point.name], [total], b.fresh(op)),
        helper.make_node("Cast", [total], [cast], b.fresh("Cast"), to=TensorProto.FLOAT),
        helper.make_node("Mul", [cast, small.name], [out], b.fresh("Mul")),
    ]
    return b.block(nodes, [y, w, point, small], [out])[0]


def convolution(b: Builder, domain: str = "") -> T:
    """QLinearConv; that of ONNX Runtime may have the channels last."""
    x = signal(b, (4,))
    q = Steps(b)
    c = x.shape[1]
    last = bool(domain) and b.chance(0.5)
    groups = b.choose([1, 1, c, b.choose(divisors(c))])
    wide = groups * b.number(1, 3) if groups > 1 else b.number(1, 6)
    taps = b.number(1, 2)
    w = eight_bits(b, (wide, c // groups, taps, taps), 0 if b.chance(0.5) else None)
    if w[0].dtype == np.uint8 and w[2].rank:
        raise NoFitError
    bias = [b.const(b.rng.integers(-500, 500, wide).astype(np.int32))] if b.chance(0.6) else []
    y = q.made(x)
    if last:
        y = b.op("Transpose", [y], perm=[0, 2, 3, 1], channel=3)
    how = {"group": groups, **({"channels_last": 1} if last else {})}
    return q.back(b.op("QLinearConv", [*q.of(y), *w, *q.pair, *bias], domain, 3 if last else 1, **how))


def product(b: Builder) -> T:
    """QLinearMatMul with a weight on either side."""
    x = single(b, (2, 3))
    left = b.chance(0.25)
    summed = x.rank - 2 if left else x.rank - 1
    if not x.static(summed):
        raise NoFitError
    q = Steps(b)
    n, wide = x.shape[summed], b.number(1, 6)
    w = eight_bits(b, (wide, n) if left else (n, wide), None if left or b.chance(0.5) else 1)
    parts = [w, q.of(q.made(x))] if left else [q.of(q.made(x)), w]
    return q.back(b.op("QLinearMatMul", [*parts[0], *parts[1], *q.pair], channel=summed))


def gemm(b: Builder) -> T:
    """QGemm to 8 bits or to floats."""
    x = of_rank(b, (2,), lambda t: t.static(1))
    q = Steps(b)
    n, wide = x.shape[1], b.number(1, 6)
    flip = b.chance(0.5)
    w = eight_bits(b, (wide, n) if flip else (n, wide), b.choose([None, 1 - int(flip)]))
    bias = b.const(b.rng.integers(-500, 500, wide).astype(np.int32)) if b.chance(0.7) else None
    whole = b.chance(0.6)
    reads = [*q.of(q.made(x)), *w, bias, *(q.pair if whole else [])]
    y = b.op("QGemm", reads, MS, 1, transB=int(flip), alpha=0.5 if b.chance(0.3) else None)
    return q.back(y) if whole else y


def dynamic_product(b: Builder) -> T:
    x = single(b, (2, 3))
    if not x.static(x.rank - 1):
        raise NoFitError
    n, wide = x.shape[-1], b.number(1, 6)
    w = eight_bits(b, (n, wide), b.choose([None, 1]))
    bias = vector(b, (wide,)) if b.chance(0.6) else None
    return b.op("DynamicQuantizeMatMul", [x, *w, bias], MS, x.rank - 1)


def integers_to_float(b: Builder) -> T:
    x = single(b, (2, 3))
    if not x.static(x.rank - 1):
        raise NoFitError
    y, scale, point = b.ops("DynamicQuantizeLinear", [x], [True, True, True])
    n, wide = x.shape[-1], b.number(1, 6)
    w, ws, wz = eight_bits(b, (n, wide), b.choose([None, 1]))
    bias = vector(b, (wide,)) if b.chance(0.6) else None
    return b.op("MatMulIntegerToFloat", [y, w, scale, ws, point, wz, bias], MS, x.rank - 1)


def packed(b: Builder) -> T:
    """MatMulNBits: blocks of 16 along what is summed, so that a layer widens the input first."""
    x = of_rank(b, (2, 3), lambda t: t.static(t.rank - 1))
    k, n = b.choose([8, 16, 20, 32]), b.number(1, 8)
    x = linear(b, x, x.rank - 1, k)
    bits, size = b.choose([4, 4, 8]), b.choose([16, 32])
    blocks = -(-k // size)
    reads: list[T | None] = [x, b.const(b.rng.integers(0, 256, (n, blocks, size * bits // 8)).astype(np.uint8))]
    reads.append(b.const(b.rng.uniform(0.001, 0.005, n * blocks).astype(np.float32)))
    points = b.choose(["", "packed", "float"])
    if points == "packed":
        reads.append(b.const(b.rng.integers(0, 256, n * -(-blocks * bits // 8)).astype(np.uint8)))
    else:
        reads.append(b.const(b.rng.uniform(5, 9, n * blocks).astype(np.float32)) if points else None)
    reads += [None, vector(b, (n,)) if b.chance(0.5) else None]
    return b.op("MatMulNBits", reads, MS, x.rank - 1, N=n, K=k, bits=bits, block_size=size)


def lstm(b: Builder) -> T:
    """DynamicQuantizeLSTM: weights transposed, in 8 bits, with one step for each direction or for each column."""
    x = of_rank(b, (3,), lambda t: t.static(2))
    ways, units, features = b.choose([1, 1, 2]), b.number(1, 5), x.shape[2]
    direction = "bidirectional" if ways == 2 else b.choose(["forward", "reverse"])
    wide = 4 * units
    count = (ways, wide) if b.chance(0.4) else (ways,)
    kind = b.choose([np.int8, np.uint8])
    middle = 0 if kind == np.int8 else 128
    parts: list[T] = []
    weights = [b.const((b.rng.integers(-100, 100, (ways, n, wide)) + middle).astype(kind), "w") for n in (features, units)]
    for _ in weights:
        parts += [b.const(b.rng.uniform(0.003, 0.008, count).astype(np.float32)), b.const(np.full(count, middle, kind))]
    bias = vector(b, (ways, 2 * wide)) if b.chance(0.6) else None
    reads: list[T | None] = [x, *weights, bias, None, None, None, None, *parts]
    outputs = [True, b.chance(0.4), b.chance(0.4)]
    made = b.ops("DynamicQuantizeLSTM", reads, outputs, MS, hidden_size=units, direction=direction)
    b.pool[-len(made) :] = [T(t.name, t.values, t.fixed, t.rank - 1) for t in made]
    return b.pool[-1]


# ---- element by element, movement, pooling: ONNX Runtime's own


def unary(b: Builder, op: str) -> T:
    x = single(b)
    q = Steps(b)
    how = {"alpha": 0.2} if op == "QLinearLeakyRelu" else {}
    return q.back(b.op(op, [*q.of(q.made(x)), *q.pair], MS, x.channel, **how))


def binary(b: Builder, op: str) -> T:
    """Two activations, or one and a constant that is stretched."""
    x = single(b)
    q = Steps(b)
    y = q.made(x)
    shape = [n if x.static(a) and b.chance(0.6) else 1 for a, n in enumerate(x.shape)]
    if b.chance(0.5) and x.channel is not None:
        z = linear(b, x, x.channel, x.shape[x.channel])
        other = q.made(z if z.shape == x.shape else x)
    else:
        other = b.const(b.rng.integers(0, 255, shape).astype(np.uint8))
    pair = [y, other] if b.chance(0.5) else [other, y]
    return q.back(b.op(op, [*q.of(*pair), *q.pair], MS, x.channel))


def where(b: Builder) -> T:
    x = single(b)
    q = Steps(b)
    shape = [n if x.static(a) and b.chance(0.6) else 1 for a, n in enumerate(x.shape)]
    condition = b.const(b.rng.integers(0, 2, shape).astype(bool))
    one, other = q.made(x), b.const(np.uint8(100)) if b.chance(0.5) else q.made(b.op("Neg", [x]))
    pair = [one, other] if b.chance(0.5) else [other, one]
    return q.back(b.op("QLinearWhere", [condition, *q.of(*pair), *q.pair], MS, x.channel))


def concat(b: Builder) -> T:
    x = single(b)
    axis = any_axis(b, x)
    q = Steps(b)
    parts = [q.made(x)]
    for _ in range(b.number(1, 2)):
        fits = b.data(
            "f", where=lambda t: t.rank == x.rank and all(t.sizes(a) == x.sizes(a) for a in range(x.rank) if a != axis)
        )
        parts.append(q.made(fits))
    return q.back(b.op("QLinearConcat", [*q.pair, *q.of(*parts)], MS, x.channel, axis=axis))


def softmax(b: Builder) -> T:
    x = single(b, (2, 3, 4))
    q = Steps(b)
    how = {"axis": axis_of(b, x), "opset": b.choose([12, 13])}
    return q.back(b.op("QLinearSoftmax", [*q.of(q.made(x)), *q.pair], MS, x.channel, **how))


def pool(b: Builder, op: str) -> T:
    x = signal(b, (4,))
    q = Steps(b)
    last = op == "NhwcMaxPool" or b.chance(0.5)
    y = q.made(x)
    if last:
        y = b.op("Transpose", [y], perm=[0, 2, 3, 1], channel=3)
    how: dict[str, object] = {} if op == "NhwcMaxPool" else {"channels_last": int(last)}
    if op != "QLinearGlobalAveragePool":
        kernel = [b.number(1, min(2, *x.sizes(a))) for a in (2, 3)]
        how |= {"kernel_shape": kernel, "strides": [b.number(1, 2), 1]}
    reads = [y] if op == "NhwcMaxPool" else [*q.of(y), *q.pair]
    return q.back(b.op(op, reads, MS, 3 if last else 1, **how))


OPS: dict[str, Maker] = {op: partial(integer_product, op=op) for op in ("ConvInteger", "MatMulInteger")}
OPS |= {"DynamicQuantizeLinear": OPS["MatMulInteger"], "QLinearConv": convolution, "QLinearMatMul": product}
OPS |= dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), there_and_back)
CONTRIB: dict[str, Maker] = {op: partial(unary, op=op) for op in ("QLinearLeakyRelu", "QLinearSigmoid")}
CONTRIB |= {op: partial(binary, op=op) for op in ("QLinearAdd", "QLinearMul")}
CONTRIB |= {op: partial(pool, op=op) for op in ("NhwcMaxPool", "QLinearAveragePool", "QLinearGlobalAveragePool")}
CONTRIB |= dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), partial(there_and_back, domain=MS))
CONTRIB |= {
    "DynamicQuantizeLSTM": lstm,
    "DynamicQuantizeMatMul": dynamic_product,
    "MatMulIntegerToFloat": integers_to_float,
    "MatMulNBits": packed,
    "QGemm": gemm,
    "QLinearConcat": concat,
    "QLinearConv": partial(convolution, domain=MS),
    "QLinearSoftmax": softmax,
    "QLinearWhere": where,
}
