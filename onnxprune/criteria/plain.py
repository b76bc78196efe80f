"""The plain criteria that everybody compares with: filter norms, FPGM, mean activation, chance."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np

from onnxprune.channels import ChannelGroup, Dim, Slot
from onnxprune.contraction import units, weight_values
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.rules import Layer
from onnxprune.saliency import LayerScore, Scores

BLOCK = 1 << 24  # weights that are scored at a time
Makers: TypeAlias = Mapping[Dim, Callable[[], Array]]


class _WeightCriterion:
    """Scores from the producers' weights: one number per filter, added up over the producers of a group."""

    name = ""
    needs_data = False
    combine: Literal["max", "mean"] = "mean"
    provable = False
    joint = False  # whether a filter's score depends on the others

    @property
    def options(self) -> Mapping[str, Any]:
        return {}

    def observe(
        self, groups: Groups, layer: Layer, x: Array, w: Array, known: Mapping[str, Scores] | None = None
    ) -> list[LayerScore]:
        return []

    def inspect(self, groups: Groups) -> list[LayerScore]:
        makers = _makers(groups)
        return [LayerScore("", g.id, self.score(g, makers)) for g in groups.prunable]

    def score(self, group: ChannelGroup, makers: Makers) -> Array:
        """Scores of the group's channels [size]. makers: the weights that make channels, by the axis that these lie on."""
        total = np.zeros(group.size)
        for slot in group.slots:
            if slot.dim in makers:
                for channels, filters in _filters(group, slot, makers[slot.dim](), None if self.joint else BLOCK):
                    total[channels] += self.filters(filters)
        return total

    def filters(self, filters: Array) -> Array:
        """One score per row of `filters` [channels, weights of the channel's filters]."""
        raise NotImplementedError


def _makers(groups: Groups) -> Makers:
    """The axes of weights that no layer sums over, where the prunable groups lie; for each, what gives its weight."""
    weights = weight_values(groups.net, groups.layers)
    readers: dict[str, list[Layer]] = {}
    for layer in weights:
        readers.setdefault(layer.weight, []).append(layer)
    found = {}
    for dim in dict.fromkeys(slot.dim for g in groups.prunable for slot in g.slots):
        made_by = [layer for layer in readers.get(dim.tensor, ()) if _reads(layer, dim)]
        if made_by and groups.roles.get(dim) != "consumer" and all(layer.w != dim for layer in made_by):
            found[dim] = partial(weights.__getitem__, made_by[0])
    return found


def _filters(group: ChannelGroup, slot: Slot, weight: Array, most: int | None) -> Iterator[tuple[slice, Array]]:
    """(some channels, the weights that make each of them [channels, n]), where `slot` is an axis of `weight`.

    most: weights at a time, all by default, so that no whole copy is made of a large tensor.
    """
    by_position = np.moveaxis(weight, slot.dim.axis, 0)
    positions = slot.positions[np.argsort(slot.channels, kind="stable")].reshape(group.size, -1)
    step = group.size if most is None else max(1, most * group.size // max(1, weight.size))
    for start in range(0, group.size, step):
        part = positions[start : start + step]
        yield slice(start, start + len(part)), by_position[part.ravel()].astype(np.float64).reshape(len(part), -1)


def _reads(layer: Layer, dim: Dim) -> bool:
    """Whether the layer is one of the nodes that `dim` is about: constants that are shared by accident have several."""
    return not dim.use or dim.use.split(".")[0] == str(layer.index)


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
    joint = True

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

    def score(self, group: ChannelGroup, makers: Makers) -> Array:
        rng = np.random.default_rng([self._seed, zlib.crc32(group.id.encode())])
        return rng.random(group.size)


PLAIN: dict[str, Callable[[], Any]] = {"l1": L1, "l2": L2, "fpgm": FPGM, "activation": Activation, "random": Random}
