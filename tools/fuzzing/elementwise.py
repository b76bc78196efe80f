"""Operators that work element by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from onnx import TensorProto

from fuzzing.build import Builder, NoFitError, T
from fuzzing.layers import like
from fuzzing.weights import vector

Maker = Callable[[Builder], object]
# Operators by the values that they take without blowing up.
ANY = {
    "Abs": {}, "Asinh": {}, "Atan": {}, "Ceil": {}, "Cos": {}, "Erf": {}, "Floor": {}, "HardSwish": {}, "Identity": {},
    "Mish": {}, "Neg": {}, "Relu": {}, "Round": {}, "Sigmoid": {}, "Sign": {}, "Sin": {}, "Softplus": {}, "Softsign": {},
    "Tanh": {}, "Celu": {"alpha": 0.7}, "Elu": {"alpha": 0.6}, "Gelu": {"approximate": "tanh"}, "LeakyRelu": {"alpha": 0.2},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4}, "Selu": {"alpha": 1.2}, "Shrink": {"lambd": 0.3, "bias": 0.1},
    "Swish": {"alpha": 1.3}, "ThresholdedRelu": {"alpha": 0.2},
}  # fmt: skip
UNIT = ["Acos", "Asin", "Atanh", "Cosh", "Exp", "Sinh", "Tan"]
POSITIVE = ["Log", "Reciprocal", "Sqrt"]


def scalar(b: Builder, value: float, like_: T) -> T:
    """A constant with one element, with any number of axes that broadcasting forgives."""
    rank = b.choose([0, 0, 1, min(like_.rank, 2)])
    return b.const(np.full((1,) * rank, value, like_.dtype))


def unit(b: Builder, x: T) -> T:
    """Squeezed into -0.9 .. 0.9."""
    y = b.op("Tanh", [x])
    return b.op("Mul", [y, scalar(b, 0.9, y)])


def positive(b: Builder, x: T, least: float = 0.5) -> T:
    y = b.op(b.choose(["Abs", "Sigmoid", "Relu", "Softplus"]), [x])
    return b.op("Add", [y, scalar(b, least, y)])


def floats(b: Builder, x: T | None = None) -> T:
    return b.data("f", where=lambda t: t.dtype != np.float16 or b.opset >= 13) if x is None else x


def unary(b: Builder, op: str, prepare: Callable[[Builder, T], T] | None, attributes: dict[str, Any]) -> T:
    x = floats(b)
    if op in ("Abs", "Neg", "Sign", "Identity") and b.chance(0.1):
        x = b.data("i")
    elif op == "Identity" and b.chance(0.1):
        x = b.data("b")
    elif prepare is not None and b.chance(0.9):
        x = prepare(b, x)
    return b.op(op, [x], **(attributes if b.chance(0.5) else {}))


def clip(b: Builder) -> T:
    x = floats(b)
    low, high = (-0.5 if b.chance(0.7) else None), (0.9 if b.chance(0.7) else None)
    if b.opset < 11:
        return b.op("Clip", [x], min=low, max=high)
    bounds = [None if v is None else b.const(np.array(v, x.dtype)) for v in (low, high)]
    return b.op("Clip", [x, *bounds])


def whole_numbers(b: Builder, kinds: tuple[Any, ...] = (np.int64, np.int32)) -> T:
    """Integers, at need made of floating-point values."""
    wanted = np.dtype(b.choose(kinds))
    found = [t for t in b.pool if t.dtype == wanted and t.rank and not t.fixed]
    if found and b.chance(0.4):
        return b.choose(found)
    x = floats(b)
    x = b.op("Mul", [x, scalar(b, 5.3, x)])
    if wanted.kind == "u":
        x = b.op("Abs", [x])
    return b.op("Cast", [x], to=_kind(wanted))


def _kind(dtype: Any) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))


def truths(b: Builder, x: T | None = None) -> T:
    """Booleans, at need made by a comparison far from most values."""
    found = [t for t in b.pool if t.dtype.kind == "b" and t.rank and not t.fixed]
    if x is None and found and b.chance(0.4):
        return b.choose(found)
    x = floats(b) if x is None else x
    return b.op(b.choose(["Less", "Greater"] if b.opset >= 9 else []), [x, scalar(b, 0.137, x)])


def cast(b: Builder) -> T:
    x = b.data(b.choose(["f", "f", "f", "i", "b"]))
    t = TensorProto
    kinds = [t.FLOAT, t.FLOAT, t.DOUBLE, t.FLOAT16, t.INT64, t.INT32, t.BOOL]
    return b.op("Cast", [x], to=b.choose(kinds))


def half(b: Builder) -> T:
    """A stretch in half precision between two casts."""
    y = b.op("Cast", [b.data(dtype=np.float32)], to=TensorProto.FLOAT16)
    if b.chance(0.7):
        y = b.op(b.choose(["Relu", "Sigmoid", "Tanh"]), [y])
    if b.chance(0.5):
        y = b.op(b.choose(["Add", "Mul"]), [y, partner(b, y)])
    return b.op("Cast", [y], to=TensorProto.FLOAT)


def cast_like(b: Builder) -> T:
    return b.op("CastLike", [floats(b), b.data("f") if b.chance(0.7) else b.const(np.zeros(2, np.float32))])


# ---- several operands


def stretched(b: Builder, x: T) -> list[int]:
    """A random shape that broadcasts to that of x: fewer axes, some of size 1."""
    lead = b.number(0, x.rank) if b.chance(0.4) else 0
    shape = [n if x.static(a) and b.chance(0.7) else 1 for a, n in enumerate(x.shape)]
    if x.channel is not None and b.chance(0.4):
        shape = [n if a == x.channel and x.static(a) else 1 for a, n in enumerate(x.shape)]
    return shape[lead:]


def broadcastable(x: T) -> Callable[[T], bool]:
    """Whether another tensor of the same type goes with x, on all sets of inputs."""

    def fits(t: T) -> bool:
        pairs = [zip(a.shape[::-1], c.shape[::-1], strict=False) for a, c in zip(x.values, t.values, strict=True)]
        return t.dtype == x.dtype and all(m == n or 1 in (m, n) for pair in pairs for m, n in pair)

    return fits


def partner(b: Builder, x: T, around: float = 0.0) -> T:
    """Another operand for x: a constant of any broadcastable shape, another tensor, or x itself."""
    how = b.choose(["constant", "constant", "tensor", "tensor", "like", "same", "scalar", "higher"])
    if how == "tensor":
        return b.data(x.dtype.kind, where=lambda t: broadcastable(x)(t) and t is not x)
    if how == "like" and x.dtype == np.float32 and x.rank >= 2:
        return like(b, x)
    if how == "same":
        return x
    if how == "scalar":
        return scalar(b, around + 0.3, x)
    shape = stretched(b, x)
    if how == "higher" and x.rank < 5:
        shape = [b.number(1, 2), *([1] * b.number(0, 1)), *x.shape] if x.steady else [1, *shape]
    if x.dtype.kind == "f":
        return vector(b, shape, around, dtype=x.dtype)
    return b.const(b.rng.integers(1, 4, shape).astype(x.dtype))


def in_any_order(b: Builder, op: str, pair: list[T], **attributes: Any) -> T:
    return b.op(op, pair if b.chance(0.5) else pair[::-1], **attributes)


def arithmetic(b: Builder, op: str) -> T:
    x = b.data("i") if b.chance(0.05) else floats(b)
    return in_any_order(b, op, [x, partner(b, x)])


def many(b: Builder, op: str) -> T:
    """Max, Min, Mean, Sum of one to four."""
    x = floats(b)
    others = [partner(b, x) for _ in range(b.choose([0, 1, 1, 1, 2, 3]))]
    if b.opset < 8:
        others = [t if t.shape == x.shape else x for t in others]
    return b.op(op, [x, *others])


def divide(b: Builder) -> T:
    x = floats(b)
    if b.chance(0.5):
        return b.op("Div", [x, vector(b, stretched(b, x), 2.0, dtype=x.dtype)])
    y = partner(b, x)
    return b.op("Div", [x, positive(b, y, 1.0)])


def power(b: Builder) -> T:
    x = floats(b)
    if b.chance(0.4):
        return b.op("Pow", [x, b.const(np.array(b.choose([2.0, 1.0, 3.0]), x.dtype))])
    return b.op("Pow", [positive(b, x), partner(b, x)])


def modulo(b: Builder) -> T:
    if b.chance(0.5) and b.opset >= 10:
        x = floats(b)
        return b.op("Mod", [x, vector(b, stretched(b, x), 2.0, 0.1, dtype=x.dtype)], fmod=1)
    x = whole_numbers(b)
    return b.op("Mod", [x, b.const(b.rng.integers(2, 5, stretched(b, x)).astype(x.dtype))])


def shift(b: Builder) -> T:
    x = whole_numbers(b, (np.uint8, np.uint32, np.uint64))
    by = b.const(b.rng.integers(0, 3, stretched(b, x)).astype(x.dtype))
    return b.op("BitShift", [x, by], direction=b.choose(["LEFT", "RIGHT"]))


def bitwise(b: Builder, op: str) -> T:
    x = whole_numbers(b, (np.int32, np.int64, np.uint8))
    return b.op(op, [x] if op == "BitwiseNot" else [x, partner(b, x)])


def logical(b: Builder, op: str) -> T:
    x = truths(b)
    if op == "Not":
        return b.op("Not", [x])
    if b.chance(0.5):
        return b.op(op, [x, b.const(b.rng.random(stretched(b, x)) < 0.5)])
    return in_any_order(b, op, [x, b.data("b", where=broadcastable(x))])


def compare(b: Builder, op: str) -> T:
    x = floats(b)
    if op == "Equal" and (b.opset < 11 or b.chance(0.5)):
        x = whole_numbers(b)
    if b.opset < 9 and x.dtype.kind != "f" and op != "Equal":
        raise NoFitError
    return b.op(op, [x, partner(b, x, 0.137)])


def infinite(b: Builder, op: str) -> T:
    return b.op(op, [b.data("f", dtype=np.float32)])


def where(b: Builder) -> T:
    x = floats(b)
    mask = truths(b, b.choose([x, None]))
    if b.chance(0.4):
        mask = b.const(b.rng.random(stretched(b, x)) < 0.5)
    return b.op("Where", [mask, *([x, partner(b, x)] if b.chance(0.5) else [partner(b, x), x])])


def prelu(b: Builder) -> T:
    """The slope broadcasts to x, not the other way round."""
    x = b.data("f", dtype=np.float32)
    slope = b.data("f", where=lambda t: broadcastable(x)(t) and t.rank <= x.rank) if b.chance(0.2) else None
    return b.op("PRelu", [x, slope or vector(b, stretched(b, x), 0.2)])


def dropout(b: Builder) -> T:
    x = floats(b)
    outputs = [True, b.chance(0.3)]
    if b.opset < 12:
        return b.ops("Dropout", [x], outputs, ratio=0.3)[0]
    ratio = b.const(np.array(0.3, np.float32)) if b.chance(0.5) else None
    training = b.const(np.array(False)) if b.chance(0.3) else None
    return b.ops("Dropout", [x, ratio, training], outputs)[0]


OPS: dict[str, Maker] = {op: partial(unary, op=op, prepare=None, attributes=a) for op, a in ANY.items()}
OPS |= {op: partial(unary, op=op, prepare=unit, attributes={}) for op in UNIT}
OPS |= {op: partial(unary, op=op, prepare=positive, attributes={}) for op in POSITIVE}
OPS["Acosh"] = partial(unary, op="Acosh", prepare=partial(positive, least=1.2), attributes={})
OPS |= {op: partial(arithmetic, op=op) for op in ("Add", "Mul", "Sub")}
OPS |= {op: partial(many, op=op) for op in ("Max", "Mean", "Min", "Sum")}
OPS |= {op: partial(bitwise, op=op) for op in ("BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor")}
OPS |= {op: partial(logical, op=op) for op in ("And", "Not", "Or", "Xor")}
OPS |= {op: partial(compare, op=op) for op in ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")}
OPS |= {op: partial(infinite, op=op) for op in ("IsInf", "IsNaN")}
OPS |= {
    "BitShift": shift,
    "Cast": lambda b: half(b) if b.chance(0.4) else cast(b),
    "CastLike": cast_like,
    "Clip": clip,
    "Div": divide,
    "Dropout": dropout,
    "Mod": modulo,
    "Pow": power,
    "PRelu": prelu,
    "Where": where,
}
