"""Activations, arithmetic, comparisons and conversions: one entry out for one entry in."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import torch
from onnx import TensorProto
from torch.nn import functional

from onnxprune.torchgraph.base import Node, Table, Tensor, given, onto, plain, together

# Half precision is trained in single precision, and rounded when it is written back.
DTYPES = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float32,
    TensorProto.BFLOAT16: torch.float32,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT8: torch.int8,
    TensorProto.INT16: torch.int16,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.UINT8: torch.uint8,
    TensorProto.BOOL: torch.bool,
}


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def apply(node: Node, a: Tensor, b: Tensor) -> Tensor:
        return function(*together((a, b)))

    return apply


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda node, *operands: reduce(function, together(operands))


def _mean(node: Node, *operands: Tensor) -> Tensor:
    return reduce(operator.add, together(operands)) / len(operands)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.dtype.is_floating_point:
        return a / b
    return torch.div(a, b, rounding_mode="trunc")


def _power(node: Node, a: Tensor, b: Tensor) -> Tensor:
    if b.numel() == 1 and b.ndim <= a.ndim and not b.requires_grad:  # torch has short ways for whole powers
        exponent = float(b)
        return torch.pow(a, int(exponent) if exponent.is_integer() else exponent).to(a.dtype)
    return torch.pow(a, onto(b, a)).to(a.dtype)


def _modulo(node: Node, a: Tensor, b: Tensor) -> Tensor:
    a, b = together((a, b))
    return torch.fmod(a, b) if node.get("fmod", 0) else torch.remainder(a, b)


def _clip(node: Node, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    ends = [given(node, name, end) for name, end in (("low", low), ("high", high))]
    bounds: list[Any] = [None if end is None else end[0] for end in ends]
    if node.opset < 11:
        bounds = [node.get("min"), node.get("max")]
    return x if bounds == [None, None] else torch.clamp(x, *bounds)


def _prelu(node: Node, x: Tensor, slope: Tensor) -> Tensor:
    return x.clamp(min=0) + slope * x.clamp(max=0)


def _gelu(node: Node, x: Tensor) -> Tensor:
    kind = node.get("approximate", b"none")
    return functional.gelu(x, approximate=kind.decode() if isinstance(kind, bytes) else kind)


def _hard_sigmoid(node: Node, x: Tensor) -> Tensor:
    return torch.clamp(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0, 1)


def _selu(node: Node, x: Tensor) -> Tensor:
    alpha, gamma = node.get("alpha", 1.67326319217681884765625), node.get("gamma", 1.05070102214813232421875)
    return gamma * functional.elu(x, alpha)


def _thresholded(node: Node, x: Tensor) -> Tensor:
    return x * (x > node.get("alpha", 1.0))


def _shrink(node: Node, x: Tensor) -> Tensor:
    bias, limit = node.get("bias", 0.0), node.get("lambd", 0.5)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


def _where(node: Node, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(*together((condition, a, b)))


def _cast(node: Node, x: Tensor) -> Tensor:
    kind = DTYPES.get(node.get("to"))
    if kind is None:
        node.refuse(f"a cast to {TensorProto.DataType.Name(node.get('to'))}")
    return x.to(kind)


def _dropout(node: Node, x: Tensor, *_: Tensor) -> Any:
    return (x, torch.ones_like(x, dtype=torch.bool)) if len(node.makes) > 1 else x


def _softmax(function: Callable[..., Tensor], node: Node, x: Tensor) -> Tensor:
    """From opset 13 on along one axis, before that over all axes from one on (ONNX operators, Softmax-1, -11, -13)."""
    axis = node.get("axis", 1 if node.opset < 13 else -1)
    if node.opset >= 13 or axis in (x.ndim - 1, -1):
        return function(x, dim=axis)
    return function(x.flatten(axis % x.ndim), dim=-1).reshape(x.shape)


def _swish(node: Node, x: Tensor) -> Tensor:
    alpha = node.get("alpha", 1.0)
    return functional.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


ACTIVATIONS: Table = {
    "Relu": plain(torch.relu),
    "Sigmoid": plain(torch.sigmoid),
    "Tanh": plain(torch.tanh),
    "Softplus": plain(lambda x: functional.softplus(x, threshold=1e4)),
    "Softsign": plain(functional.softsign),
    "Mish": plain(functional.mish),
    "HardSwish": plain(functional.hardswish),
    "LeakyRelu": lambda node, x: functional.leaky_relu(x, node.get("alpha", 0.01)),
    "Elu": lambda node, x: functional.elu(x, node.get("alpha", 1.0)),
    "Celu": lambda node, x: functional.celu(x, node.get("alpha", 1.0)),
    "Selu": _selu,
    "Gelu": _gelu,
    "com.microsoft:Gelu": plain(functional.gelu),
    "com.microsoft:QuickGelu": lambda node, x: x * torch.sigmoid(node.get("alpha", 1.702) * x),
    "Swish": _swish,
    "PRelu": _prelu,
    "HardSigmoid": _hard_sigmoid,
    "ThresholdedRelu": _thresholded,
    "Shrink": _shrink,
    "Clip": _clip,
    "Softmax": partial(_softmax, torch.softmax),
    "LogSoftmax": partial(_softmax, torch.log_softmax),
    "Dropout": _dropout,
}
UNARY = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Asin": torch.asin,
    "Atan": torch.atan,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "IsInf": torch.isinf,
    "IsNaN": torch.isnan,
    "Log": torch.log,
    "Neg": torch.neg,
    "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal,
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Identity": lambda x: x,
}
BINARY = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _divide,
    "And": torch.logical_and,
    "Or": torch.logical_or,
    "Xor": torch.logical_xor,
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}
FUNCTIONS: Table = {
    **ACTIVATIONS,
    **{name: plain(function) for name, function in UNARY.items()},
    **{name: _binary(function) for name, function in BINARY.items()},
    "Max": _variadic(torch.maximum),
    "Min": _variadic(torch.minimum),
    "Sum": _variadic(operator.add),
    "Mean": _mean,
    "Pow": _power,
    "Mod": _modulo,
    "Where": _where,
    "Cast": _cast,
    "CastLike": lambda node, x, other: x.to(other.dtype),
}
