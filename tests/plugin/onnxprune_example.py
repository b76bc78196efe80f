"""A plug-in of onnxprune: a criterion, `--method spread`, and a rule for the operator Softcap of a domain of one's own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Tie
from onnxprune.plugins import Plugin
from onnxprune.rules import Fact, Rule, View
from onnxprune.saliency import LayerScore


class Spread:
    """How much a channel varies where its consumers read it: its standard deviation over samples and positions."""

    name = "spread"
    needs_data = True
    combine = "mean"
    provable = False
    options = {}  # noqa: RUF012  # what else determines the scores: nothing

    def observe(self, groups, layer, x, w, known=None):
        deviation = np.moveaxis(x, layer.x.axis, 0).reshape(x.shape[layer.x.axis], -1).std(axis=1)
        found = []
        for group in groups.prunable:
            for slot in (s for s in group.slots if s.dim == layer.x):
                scores = np.zeros(group.size)
                np.maximum.at(scores, slot.channels, deviation[slot.positions])
                found.append(LayerScore(layer.name, group.id, scores))
        return found

    def inspect(self, groups):
        return []


def softcap(view: View) -> Iterator[Fact]:
    """y = cap * tanh(x / cap), element by element."""
    for axis in range(len(view.shape(0))):
        yield Tie(view.x(0, axis), view.y(axis))


PLUGIN = Plugin(criteria={"spread": Spread}, rules={("example", "Softcap"): Rule(softcap)})
