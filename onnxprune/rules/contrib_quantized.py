"""Quantised operators of ONNX Runtime's own domain, com.microsoft: what its quantiser and its graph optimiser write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np

from onnxprune.channels import Freeze, Tie
from onnxprune.rules import conv, elementwise, movement, norm, quantized, recurrent
from onnxprune.rules import linear as products
from onnxprune.rules.base import Consumer, Fact, Layer, Packed, Resize, Rounds, Rule, View
from onnxprune.rules.edits import Edit, SetAttr
from onnxprune.rules.quantized import at_most_vectors, constant, follow, ranged, silenced, steps, whole

# ------------------------------------------------------------------------------------- element by element, and movement


def unary(view: View) -> Iterator[Fact]:
    """X and Y, each with its scale and zero point."""
    if whole(view, 1, 2, 3, 4):
        yield from elementwise.broadcast(view, [0])


def binary(view: View) -> Iterator[Fact]:
    """A, B and C, each with its scale and zero point."""
    if whole(view, 1, 2, 4, 5, 6, 7):
        yield from elementwise.broadcast(view, [0, 3])


def where(view: View) -> Iterator[Fact]:
    """The condition, then X, Y and Z, each with its scale and zero point."""
    if whole(view, 2, 3, 5, 6, 7, 8):
        yield from elementwise.broadcast(view, [0, 1, 4])


def concat(view: View) -> Iterator[Fact]:
    """Scale and zero point of Y, then the parts, each with its own."""
    parts = range(2, view.count, 3)
    if whole(view, 0, 1, *(i + k for i in parts for k in (1, 2))):
        yield from movement.concat(view, parts)


# ---------------------------------------------------------------------------------- normalisation, pooling, reduction


def softmax(view: View) -> Iterator[Fact]:
    """Normalises over one axis, or as before opset 13 over all from it on: the attribute `opset` says which."""
    rank = len(view.shape(0))
    first = view.attr("axis", -1) % rank
    axes = {first} if view.attr("opset", 1) >= 13 else set(range(first, rank))
    return norm.crossing(view, axes, "normalises over it")


def _channel_axis(view: View) -> int:
    return len(view.shape(0)) - 1 if view.op.startswith("Nhwc") or view.attr("channels_last", 0) else 1


def pool(view: View) -> Iterator[Fact]:
    if whole(view, 1, 2, 3, 4):
        yield from norm.pool(view, _channel_axis(view))


# --------------------------------------------------------------------------------------------------- linear operators


def _conv_form(view: View) -> conv.Form:
    return replace(quantized.LINEAR_CONV, axis=_channel_axis(view))


def qlinear_conv(view: View) -> Iterator[Fact]:
    """As in ai.onnx, but the channels may come last in X and Y (not in W)."""
    return quantized.qlinear_conv(view, _conv_form(view))


def qlinear_conv_layers(view: View) -> list[Layer]:
    return quantized.qlinear_conv_layers(view, _conv_form(view))


def conv_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    return conv.fixup(view, resize, _conv_form(view))


GEMM = products.Form(a=0, b=3, c=6)


def qgemm(view: View) -> Iterator[Fact]:
    """A and B, each with its scale and zero point, C in int32, then scale and zero point of Y if it is quantised."""
    if whole(view, 1, 2, 7, 8) and at_most_vectors(view, 4, 5):
        yield from silenced(view, products.gemm_ties(view, GEMM), {0: 2, 3: 5})
        yield from follow(view, view.y(1), 4, 5)


def qgemm_layers(view: View) -> list[Layer]:
    columns = steps(view, 4, 5, (0 if view.attr("transB", 0) else 1,))
    return [quantized.quantised(view, x, GEMM, steps(view, 1, 2), columns) for x in products.gemm_layers(view, GEMM)]


def dynamic_matmul(view: View) -> Iterator[Fact]:
    """A in floating point, B, scale and zero point of B, bias. A is quantised by its range."""
    yield from quantized.product(view, products.PLAIN, (None, None), (2, 3))
    yield from follow(view, view.y(-1), 4)
    yield from ranged(view, 0)


def integer_to_float(view: View) -> Iterator[Fact]:
    """A and B, scale of A, scale of B, zero point of A, zero point of B, bias."""
    yield from quantized.product(view, products.PLAIN, (2, 4), (3, 5))
    yield from follow(view, view.y(-1), 6)


def attention(view: View) -> Iterator[Fact]:
    """The input's channels may go; the heads that the projection makes may not."""
    if whole(view, 3, 6) and at_most_vectors(view, 4, 7):
        yield Tie(view.x(0, 0), view.y(0))
        yield Tie(view.x(0, 2), view.x(1, 0))
        yield from silenced(view, [Consumer(view.x(1, 0))], {1: 7})
        yield Freeze(view.x(1, 1), f"{view} splits it into queries, keys, values and heads")


def attention_layers(view: View) -> list[Layer]:
    """The projection of the input; products of two activations are not counted."""
    w, out = view.x(1, 0), view.x(1, 1)
    dims = (view.x(0, 0), view.x(0, 1), w, out)
    weight, x = constant(view, steps(view, 4, 7, (1,))), steps(view, 3, 6)
    return [
        Layer(view.index, view.label, view.op, view.x(0, 2), w, out, 1, dims, view.name(1), steps=weight, x_steps=x),
    ]


# ------------------------------------------------------------------------------------------------------- recurrent layers

LSTM = recurrent.Form(summed=1, rows=2)


def lstm(view: View) -> Iterator[Fact]:
    """Inputs of LSTM with W and R transposed, then scale and zero point of W and of R: [directions] or [directions, 4 H].

    The input is quantised by its range, the state by its own in every step.
    """
    unit, units = view.x(2, 1), recurrent.hidden_size(view, LSTM)
    yield from silenced(view, recurrent.ties(view, LSTM), {1: 9, 2: 11})
    for i in (8, 9, 10, 11):
        if view.has(i) and len(view.shape(i)) == 2:
            yield Tie(unit, view.x(i, 1), np.tile(np.arange(units), view.shape(i)[1] // units), None)
    yield from ranged(view, 0)
    yield Rounds(unit, f"{view} takes its steps from the range of the whole state")


def lstm_layers(view: View) -> list[Layer]:
    found = recurrent.layers(view, LSTM)
    each = [constant(view, steps(view, s, s + 1, (0, 2)[: len(view.shape(s))])) for s in (8, 10)]
    return [replace(layer, steps=made) for layer, made in zip(found, each, strict=False)]


# -------------------------------------------------------------------------------------------------------- packed weights


def matmul_nbits(view: View) -> Iterator[Fact]:
    """A [..., K], B [N, blocks, bytes], scales and zero points by row and block, group indices, bias [N] -> [..., N].

    Rows of B stand alone, so that outputs may go; the blocks run along K.
    """
    rank, n = len(view.shape(0)), view.attr("N")
    operands = [i for i in (1, 2, 3, 5) if view.has(i)]
    if view.attr("weight_prepacked", 0) or any(view.shape(i)[0] % n for i in operands):
        return
    for axis in range(rank - 1):
        if view.shape(0)[axis] > 1:
            yield Tie(view.x(0, axis), view.y(axis))
    for i in operands:
        per = view.shape(i)[0] // n
        yield Tie(view.y(-1), view.x(i, 0), np.repeat(np.arange(n), per), None)
    yield Freeze(view.x(0, -1), f"{view} packs its weight in blocks along the summed axis", remedy="prune before quantisation")


def nbits_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """`N` counts the outputs."""
    if resize.touches(view.y(-1)):
        yield SetAttr("N", resize.size(view.y(-1)))


def nbits_layers(view: View) -> list[Layer]:
    k, out = view.attr("K"), view.y(-1)
    packed = Packed(view.name(2), view.name(3) if view.has(3) else "", view.attr("bits", 4), k)
    dims = tuple(view.y(axis) for axis in range(len(view.out_shape())))
    return [Layer(view.index, view.label, view.op, view.x(0, -1), None, out, k, dims, view.name(1), steps=packed)]


LINEAR: dict[str, Rule] = {
    "DynamicQuantizeLSTM": Rule(lstm, partial(recurrent.fixup, form=LSTM), lstm_layers),
    "DynamicQuantizeMatMul": Rule(
        dynamic_matmul, None, partial(quantized.product_layers, form=products.PLAIN, a=(None, None), b=(2, 3))
    ),
    "MatMulIntegerToFloat": Rule(
        integer_to_float, None, partial(quantized.product_layers, form=products.PLAIN, a=(2, 4), b=(3, 5))
    ),
    "MatMulNBits": Rule(matmul_nbits, nbits_fixup, nbits_layers),
    "QAttention": Rule(attention, None, attention_layers),  # of which only what the projection sums over can go
    "QGemm": Rule(qgemm, None, qgemm_layers),
    "QLinearConv": Rule(qlinear_conv, conv_fixup, qlinear_conv_layers),
}
ELEMENTWISE: dict[str, Rule] = {op: Rule(unary) for op in ("QLinearLeakyRelu", "QLinearSigmoid")}
ELEMENTWISE |= {op: Rule(binary) for op in ("QLinearAdd", "QLinearMul")}
ELEMENTWISE |= {op: Rule(quantized.linear) for op in ("DequantizeLinear", "QuantizeLinear")}
ELEMENTWISE |= {"QLinearWhere": Rule(where)}
NORM: dict[str, Rule] = {op: Rule(pool) for op in ("NhwcMaxPool", "QLinearAveragePool", "QLinearGlobalAveragePool")}
NORM |= {"QLinearSoftmax": Rule(softmax)}
MOVEMENT: dict[str, Rule] = {"QLinearConcat": Rule(concat)}
