"""Deformable convolution: an ordinary one, but for where it reads."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Tie
from onnxprune.rules import conv
from onnxprune.rules.base import Fact, Rule, View


def ties(view: View) -> Iterator[Fact]:
    """X [N, C, ...], W [M, C/group, k...], offset [N, ...], B [M], mask [N, ...] -> Y [N, M, ...].

    Every one of `offset_group` runs of channels reads at places of its own, so all of them keep equally many.
    """
    for fact in conv.conv_ties(view):
        if not (isinstance(fact, Tie) and fact.b.tensor == view.name(2)):  # where Conv has its bias stands the offset
            yield fact
    if view.has(3):
        yield Tie(view.y(1), view.x(3, 0))
    runs, channels = view.attr("offset_group", 1), view.shape(0)[1]
    if runs > 1:
        x = view.x(0, 1)
        yield Tie(x, x, np.arange(channels), np.arange(channels) % (channels // runs))


RULES = {"DeformConv": Rule(ties, conv.fixup, conv.layers)}
