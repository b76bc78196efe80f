"""Operators that work element by element, with multidirectional broadcasting (ONNX Broadcasting.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from onnxprune.channels import Freeze, Tie
from onnxprune.rules.base import Fact, Reads, Rule, View

UNARY = [
    "Abs",
    "Acos",
    "Acosh",
    "Asin",
    "Asinh",
    "Atan",
    "Atanh",
    "BitCast",
    "BitwiseNot",
    "Cast",
    "Ceil",
    "Celu",
    "Clip",
    "Cos",
    "Cosh",
    "Elu",
    "Erf",
    "Exp",
    "Floor",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "Identity",
    "IsInf",
    "IsNaN",
    "LeakyRelu",
    "Log",
    "Mish",
    "Neg",
    "Not",
    "Reciprocal",
    "Relu",
    "Round",
    "Selu",
    "Shrink",
    "Sigmoid",
    "Sign",
    "Sin",
    "Sinh",
    "Softplus",
    "Softsign",
    "Sqrt",
    "Swish",
    "Tan",
    "Tanh",
    "ThresholdedRelu",
]
NARY = [
    "Add",
    "And",
    "BitShift",
    "BitwiseAnd",
    "BitwiseOr",
    "BitwiseXor",
    "Div",
    "Equal",
    "Greater",
    "GreaterOrEqual",
    "Less",
    "LessOrEqual",
    "Max",
    "Mean",
    "Min",
    "Mod",
    "Mul",
    "Or",
    "PRelu",
    "Pow",
    "Sub",
    "Sum",
    "SwiGLU",
    "Where",
    "Xor",
]


def broadcast(view: View, inputs: Sequence[int], output: int = 0) -> Iterator[Fact]:
    """Ties every axis of every input to the output axis that it is aligned with; axes of size 1 are stretched, not tied."""
    out = view.out_shape(output)
    for i in inputs:
        shape = view.shape(i)
        for axis, size in enumerate(shape):
            aligned = axis + len(out) - len(shape)
            if size > 1 and out[aligned] == size:
                yield Tie(view.x(i, axis), view.y(aligned, output))


def unary(view: View) -> Iterator[Fact]:
    """The first input alone carries channels; Clip's bounds are scalars."""
    return broadcast(view, [0])


def nary(view: View) -> Iterator[Fact]:
    return broadcast(view, [i for i in range(view.count) if view.has(i)])


def legacy_nary(view: View) -> Iterator[Fact]:
    """Before opset 7 the second operand was aligned by the attribute `axis`."""
    if view.net.opset >= 7 or "axis" not in view.node.attrs:
        yield from nary(view)
        return
    yield from broadcast(view, [0])
    start = view.attr("axis") % len(view.shape(0))
    for axis, size in enumerate(view.shape(1)):
        if size > 1:
            yield Tie(view.x(1, axis), view.y(start + axis))


def dropout(view: View) -> Iterator[Fact]:
    """Both outputs, data and mask, keep the shape of the input. In training it drops at random, which a cut would change.

    Before opset 7 the attribute `is_test` says that it does not train; since opset 12 input 2 says that it does.
    """
    training = view.value(2) if view.has(2) else None
    if (view.has(2) and (training is None or np.any(training))) or (view.net.opset < 7 and not view.attr("is_test", 0)):
        yield from (Freeze(view.x(0, axis), f"{view} drops at random") for axis in range(len(view.shape(0))))
        return
    for output, tensor in enumerate(view.node.outputs):
        if tensor.name and tensor.name in view.net.shapes:
            yield from broadcast(view, [0], output)


def cast_like(view: View) -> Iterator[Fact]:
    """Only the type of the second input counts."""
    yield from broadcast(view, [0])
    for axis in range(len(view.shape(1))):
        yield Reads(view.x(1, axis))


RULES: dict[str, Rule] = {op: Rule(unary) for op in UNARY}
RULES |= {op: Rule(legacy_nary) for op in NARY}
RULES |= {"Dropout": Rule(dropout), "CastLike": Rule(cast_like)}
