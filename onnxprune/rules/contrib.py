"""Operators of ONNX Runtime's own domain, com.microsoft, as its graph optimiser writes them."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Freeze, Tie
from onnxprune.rules import conv, elementwise, linear, movement, norm, reshape
from onnxprune.rules.attention import has_output
from onnxprune.rules.base import Approximate, Fact, Layer, Rule, View


def fused_conv(view: View) -> Iterator[Fact]:
    """Conv, then optionally + Z, then an activation."""
    yield from conv.conv_ties(view)
    if view.has(3):
        yield from elementwise.broadcast(view, [3])


def gelu(view: View) -> Iterator[Fact]:
    """Element by element, with an optional bias added first."""
    return elementwise.broadcast(view, [i for i in range(view.count) if view.has(i)])


def attention_gate(view: View) -> Iterator[Fact]:
    """decay = scale * softplus(a + bias) and beta = sigmoid(b): inputs a, bias, scale, b. a and b have one shape."""
    yield from elementwise.broadcast(view, [0, 1, 2])
    for axis, size in enumerate(view.shape(0)):
        if size > 1 and view.has(3):
            yield Tie(view.x(0, axis), view.x(3, axis))
    if has_output(view, 1):
        yield from elementwise.broadcast(view, [3], 1)


# ---------------------------------------------------------------------------------------------------------- convolution


def causal_conv(view: View) -> Iterator[Fact]:
    """Depthwise: X [batch, channels, ...] (or channels last), W [channels, 1, ...], B, past state -> Y, present state."""
    axis = _channels(view)
    if axis is None:
        return
    x = view.x(0, axis)
    yield Tie(x, view.x(1, 0))
    if view.has(2):
        yield Tie(x, view.x(2, 0))
    yield Tie(x, view.y(axis))
    window = 1 if view.attr("state_window", 0) else 0
    if view.has(3):
        yield Tie(x, view.x(3, axis + window))
    if has_output(view, 1):
        yield Tie(x, view.y(axis + window, 1))


def _channels(view: View) -> int | None:
    """The axis of the channels; None where several axes make them up."""
    if not view.attr("channels_last", 0):
        return 1
    return 2 if len(view.shape(0)) == 3 else None


def causal_conv_layers(view: View) -> list[Layer]:
    axis = _channels(view)
    if axis is None:
        return []
    x, y, w = view.x(0, axis), view.y(axis), view.x(1, 0)
    factor = math.prod(view.shape(0)) // view.shape(0)[axis] * math.prod(view.shape(1)[1:])
    return [Layer(view.index, view.label, view.op, x, None, y, factor, (w,), view.name(1))]


# -------------------------------------------------------------------------------------------------------- normalisation


def skip_norm(view: View) -> Iterator[Fact]:
    """input + skip + bias, normalised over the last axis, which gamma and beta have too; output 3 is the plain sum."""
    yield from elementwise.broadcast(view, [i for i in range(view.count) if view.has(i)])
    if has_output(view, 3):
        yield from elementwise.broadcast(view, [0], 3)
    yield Approximate(view.x(0, -1), f"{view} sums over the channels")
    if has_output(view, 1) or has_output(view, 2):
        yield from (Freeze(view.x(0, a), f"{view} also outputs its statistics") for a in range(len(view.shape(0))))


def embed_norm(view: View) -> Iterator[Fact]:
    """Tables of words, positions and segments are looked up, added and normalised: outputs 0, and 2 without the norm."""
    for i in (2, 3, 4, 5, 6):
        if view.has(i):
            yield Tie(view.y(2), view.x(i, -1))
    if has_output(view, 2):
        yield Tie(view.y(2), view.y(2, 2))
    yield Approximate(view.x(2, 1), f"{view} sums over the channels")


def gated_norm(view: View) -> Iterator[Fact]:
    """RMS over every run of as many positions as the scale has: whole runs go, a single one is cut approximately."""
    yield from elementwise.broadcast(view, [0, 2])
    size, width = view.shape(0)[-1], view.shape(1)[0]
    x = view.x(0, -1)
    if size == width:
        yield Tie(x, view.x(1, 0))
        yield Approximate(x, f"{view} sums over the channels")
    else:
        yield Tie(x, x, np.arange(size), np.arange(size) // width * width)


def distances(view: View) -> Iterator[Fact]:
    """A [m, n] and B [k, n] -> [m, k]."""
    for i in (0, 1):
        if view.shape(i)[0] > 1:
            yield Tie(view.x(i, 0), view.y(i))
        yield Freeze(view.x(i, 1), f"{view} measures distances over it")


ELEMENTWISE: dict[str, Rule] = {op: Rule(gelu) for op in ("BiasGelu", "FastGelu", "GatedAdd", "Gelu", "QuickGelu")}
ELEMENTWISE |= {op: Rule(elementwise.unary) for op in ("SampleOp", "ScaledSiLU")}
ELEMENTWISE |= {"LinearAttentionGate": Rule(attention_gate)}
CAUSAL_CONV = Rule(causal_conv, None, causal_conv_layers)
LINEAR: dict[str, Rule] = {
    "CausalConvWithState": CAUSAL_CONV,
    "FusedConv": Rule(fused_conv, conv.fixup, conv.layers),
    "FusedGemm": Rule(linear.gemm_ties, None, linear.gemm_layers),
}
NORM: dict[str, Rule] = {
    "CDist": Rule(distances),
    "EmbedLayerNormalization": Rule(embed_norm),
    "GatedRMSNorm": Rule(gated_norm),
    "SkipLayerNormalization": Rule(skip_norm),
    "SkipSimplifiedLayerNormalization": Rule(skip_norm),
}
MOVEMENT: dict[str, Rule] = {"ExpandDims": Rule(reshape.reshape_ties), "Pad": Rule(movement.pad, movement.pad_fixup)}
# Operators that ONNX Runtime has in the standard domain, though ONNX has not.
UNOFFICIAL: dict[str, Rule] = {"SimplifiedLayerNormalization": Rule(norm.layer_norm)}
