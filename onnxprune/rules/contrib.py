"""Operators of ONNX Runtime's own domain, com.microsoft, as its graph optimiser writes them."""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune.rules import conv, elementwise, linear
from onnxprune.rules.base import Fact, Rule, View


def fused_conv(view: View) -> Iterator[Fact]:
    """Conv, then optionally + Z, then an activation."""
    yield from conv.conv_ties(view)
    if view.has(3):
        yield from elementwise.broadcast(view, [3])


def gelu(view: View) -> Iterator[Fact]:
    """Element by element, with an optional bias added first."""
    return elementwise.broadcast(view, [i for i in range(view.count) if view.has(i)])


ELEMENTWISE: dict[str, Rule] = {op: Rule(gelu) for op in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")}
LINEAR: dict[str, Rule] = {
    "FusedConv": Rule(fused_conv, conv.fixup, conv.layers),
    "FusedGemm": Rule(linear.gemm_ties, None, linear.gemm_layers),
}
