"""The plain criteria that everybody compares with: filter norms, FPGM, mean activation, chance."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from onnxprune.channels import ChannelGroup, Slot
from onnxprune.contraction import units
from onnxprune.graph import Array, Network
from onnxprune.groups import Groups
from onnxprune.rules import Layer
from onnxprune.saliency import LayerScore, Scores


class _WeightCriterion:
    """Scores from the producers' weights: one number per filter, added up over the producers of a group."""

    name = ""
    needs_data = False
    combine: Literal["max", "mean"] = "mean"
    provable = False

    @property
    def options(self) -> Mapping[str, Any]:
        return {}

    def observe(
        self, groups: Groups, layer: Layer, x: Array, w: Array, known: Mapping[str, Scores] | None = None
    ) -> list[LayerScore]:
        return []

    def inspect(self, groups: Groups) -> list[LayerScore]:
        return [LayerScore("", g.id, self.score(groups, g)) for g in groups.prunable]

    def score(self, groups: Groups, group: ChannelGroup) -> Array:
        total = np.zeros(group.size)
        for slot in group.slots:
            filters = _filters(groups, group, slot)
            if filters is not None:
                total += self.filters(filters)
        return total

    def filters(self, filters: Array) -> Array:
        """One score per row of `filters` [channels, weights of the channel's filters]."""
        raise NotImplementedError


def _filters(groups: Groups, group: ChannelGroup, slot: Slot) -> Array | None:
    """The weights that make each channel, [channels, n], where `slot` is an axis of a producer's weight matrix."""
    nodes = [(groups.net.nodes[layer.index], layer.weight) for layer in groups.layers]
    biases = _made_of(groups.net, [t.name for node, weight in nodes for t in node.inputs if t.name != weight])
    if groups.roles.get(slot.dim) != "producer" or slot.dim.tensor in biases:
        return None
    value = groups.net.array(slot.dim.tensor)
    if value is None or value.dtype.kind not in "fi":
        return None
    rows = np.moveaxis(value.astype(np.float64), slot.dim.axis, 0)[slot.positions].reshape(len(slot.positions), -1)
    order = np.argsort(slot.channels, kind="stable")
    return rows[order].reshape(group.size, -1)


def _made_of(net: Network, names: Sequence[str]) -> set[str]:
    """These tensors and, where they are computed from constants alone, all that they are computed from."""
    found: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            if name in net.fixed and name in net.producer:
                left += net.reads(net.producer[name])
    return found


class L1(_WeightCriterion):
    """Sum of absolute filter weights (Li et al. 2017, arXiv 1608.08710)."""

    name = "l1"

    def filters(self, filters: Array) -> Array:
        return np.asarray(np.abs(filters).sum(axis=1))


class L2(_WeightCriterion):
    """Euclidean norm of the filter (He et al. 2018, arXiv 1808.06866)."""

    name = "l2"

    def filters(self, filters: Array) -> Array:
        return np.asarray(np.linalg.norm(filters, axis=1))


class FPGM(_WeightCriterion):
    """Sum of distances to the other filters: those near the geometric median are redundant (He et al. 2019, 1811.00250)."""

    name = "fpgm"

    def filters(self, filters: Array) -> Array:
        square = (filters**2).sum(axis=1)
        distance = np.sqrt(np.maximum(square[:, None] + square[None] - 2 * filters @ filters.T, 0))
        return np.asarray(distance.sum(axis=1))


class Activation(_WeightCriterion):
    """Mean absolute activation of the channel where its consumers read it (Molchanov et al. 2017, arXiv 1611.06440)."""

    name = "activation"
    needs_data = True

    def observe(
        self, groups: Groups, layer: Layer, x: Array, w: Array, known: Mapping[str, Scores] | None = None
    ) -> list[LayerScore]:
        by_channel = np.abs(np.moveaxis(x, layer.x.axis, 0).astype(np.float64)).reshape(x.shape[layer.x.axis], -1).mean(1)
        return [LayerScore(layer.name, u.group.id, by_channel[u.positions].mean(axis=1)) for u in units(groups, layer)]

    def inspect(self, groups: Groups) -> list[LayerScore]:
        return []


class Random(_WeightCriterion):
    """Chance, the control that every criterion has to beat."""

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    @property
    def options(self) -> Mapping[str, Any]:
        return {"seed": self._seed}

    def score(self, groups: Groups, group: ChannelGroup) -> Array:
        rng = np.random.default_rng([self._seed, zlib.crc32(group.id.encode())])
        return rng.random(group.size)


PLAIN: dict[str, Callable[[], Any]] = {"l1": L1, "l2": L2, "fpgm": FPGM, "activation": Activation, "random": Random}
