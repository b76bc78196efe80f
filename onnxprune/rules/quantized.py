"""Explicitly quantised graphs: QuantizeLinear and DequantizeLinear around ordinary operators."""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune.channels import Tie
from onnxprune.rules.base import Fact, Rule, View
from onnxprune.rules.elementwise import broadcast


def linear(view: View) -> Iterator[Fact]:
    """Element by element; scales and zero points of one axis follow its channels. Blocked quantisation is left to freeze."""
    if view.attr("block_size", 0):
        return
    yield from broadcast(view, [0])
    rank = len(view.shape(0))
    for i in (1, 2):
        if view.has(i) and len(view.shape(i)) == 1 and view.shape(i)[0] > 1 and rank:
            yield Tie(view.y(view.attr("axis", 1) % rank), view.x(i, 0))


RULES = {"DequantizeLinear": Rule(linear), "QuantizeLinear": Rule(linear)}
