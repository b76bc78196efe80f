"""Empirical sensitivity, the criterion of Provable Filter Pruning (arXiv 1911.07412, section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from onnxprune.channels import Index
from onnxprune.contraction import Contraction, normal_form, units
from onnxprune.criteria.bounded import BoundedShares
from onnxprune.criteria.shares import Reduce, Shares
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.rules import Layer
from onnxprune.saliency import LayerScore, Scores


class Sensitivity:
    """s_j: the largest share of channel j in any output, patch, sign part and sample of a consumer, in [0, 1].

    reduce: `sum` takes the whole channel in a patch, as the theorem needs; `max` the largest single entry of it, as the
    authors' code does (then the theorem holds with k^2 times the sum of sensitivities).
    """

    name = "pfp"
    needs_data = True
    combine: Literal["max", "mean"] = "max"
    provable = True

    def __init__(self, reduce: Reduce = "sum", providers: list[str] | None = None) -> None:
        self._reduce: Reduce = reduce
        self._providers = providers
        self._full: dict[int, Shares] = {}
        self._bounded: dict[int, BoundedShares] = {}

    @property
    def options(self) -> Mapping[str, Any]:
        return {"reduce": self._reduce}

    def observe(
        self, groups: Groups, layer: Layer, x: Array, w: Array, known: Mapping[str, Scores] | None = None
    ) -> list[LayerScore]:
        """Sensitivities of all prunable channels that `layer` reads: the larger of `known` and those of this batch."""
        wanted = units(groups, layer)
        best = [(known or {}).get(u.group.id, np.zeros(u.group.size)).copy() for u in wanted]
        live_parts, outputs = 0, _outputs_per_sample(groups, layer)
        for contraction in normal_form(groups, layer, x, w):
            for score, u in zip(best, wanted, strict=True):
                rows, local = _local(u.positions, contraction)
                if len(rows):
                    score[rows], live = self._largest(layer, contraction, local, score[rows])
                    live_parts = max(live_parts, live)
        return [LayerScore(layer.name, u.group.id, s, live_parts * outputs) for s, u in zip(best, wanted, strict=True)]

    def _largest(self, layer: Layer, c: Contraction, local: Index, known: Scores) -> tuple[Scores, int]:
        if self._reduce == "sum" and not c.transposed:
            bounded = self._bounded.setdefault(layer.index, BoundedShares(self._providers))
            return bounded.largest(c, local, known)
        found, live = self._full.setdefault(layer.index, Shares(self._reduce, self._providers)).largest(c, local)
        return np.maximum(known, found), live

    def inspect(self, groups: Groups) -> list[LayerScore]:
        return []


def _outputs_per_sample(groups: Groups, layer: Layer) -> int:
    """Scalar outputs of the layer for one sample; the probe ran with batch 1 where the batch is dynamic."""
    return groups.outputs(layer)


def _local(positions: Any, contraction: Contraction) -> tuple[Any, Any]:
    """The units that lie in this contraction (one group of a grouped convolution) and where; [u], [u, m]."""
    start, count = int(contraction.positions[0]), len(contraction.positions)
    inside = (positions >= start) & (positions < start + count)
    per = inside.sum(axis=1)
    rows = np.flatnonzero(per)
    if len(rows) == 0:
        return rows, np.empty((0, 1), np.int64)
    width = int(per[rows[0]])  # channels are tied across groups at equal places, so each has as many here as any other
    return rows, positions[rows][inside[rows]].reshape(len(rows), width) - start
