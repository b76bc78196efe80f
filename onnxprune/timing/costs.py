"""Latency as a function of all widths: a table for every layer, and what they do not explain, fitted to whole networks.

Prediction = layers' tables + rest, rest = constant + part that shrinks with the activations (and with the multiply-adds of
layers that have no table). Both parts of the rest follow from measuring two whole networks: the original and the smallest one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxprune.channels import ChannelGroup, Dim, Index
from onnxprune.graph import Array
from onnxprune.groups import Axes, Groups, Tally, Term, Terms
from onnxprune.timing.tables import Table

UNIT = 1e-9  # seconds: costs are counted in whole nanoseconds
WORTH = 0.25  # what a narrower width must save of its share of the channels, to be one to choose


@dataclass(frozen=True)
class Fit:
    """How tables add up to a network: `scale` times their sum, and the two parts of the rest, in seconds."""

    scale: float = 1.0
    constant: float = 0.0
    shrinking: float = 0.0


@dataclass(frozen=True, eq=False)
class Priced:
    """A layer with a table: its axes in and out, and how often it runs."""

    x: Dim
    out: Dim
    table: Table
    repeats: int = 1


class Costs:
    """Predicted seconds of a network of given widths."""

    def __init__(self, groups: Groups, priced: Sequence[Priced], unpriced: Sequence[int] = (), fit: Fit = Fit()) -> None:
        """unpriced: the layers (by number) without a table, whose multiply-adds are part of the rest."""
        self.groups, self.priced, self.unpriced, self.fit = groups, tuple(priced), tuple(unpriced), fit
        rest = _rest(groups, self.unpriced)
        dims = [d for p in self.priced for d in (p.x, p.out)] + [d for _, dims in rest for d in dims]
        self._axes = Axes(groups, dict.fromkeys(dims))
        self._rest = Terms(rest, self._axes)
        self._plain = _Costs(self._axes, self.priced, self._rest, 1.0, 0.0)
        self._terms = _Costs(self._axes, self.priced, self._rest, fit.scale / UNIT, fit.shrinking / UNIT)
        self.full_widths = np.array([g.size for g in groups.groups], np.int64)

    def fitted(self, full: float, smallest: float, widths: Index) -> Costs:
        """The same with a rest such that the whole network takes `full` seconds and that of these widths `smallest`."""
        sums, shares = zip(*((self.tables(w), self.share(w)) for w in (self.full_widths, widths)), strict=True)
        scale = min(1.0, full / sums[0]) if sums[0] else 1.0
        rest, least = full - scale * sums[0], max(0.0, smallest - scale * sums[1])
        shrinking = min(rest, max(0.0, (rest - least) / (shares[0] - shares[1]))) if shares[1] < shares[0] else 0.0
        return Costs(self.groups, self.priced, self.unpriced, Fit(scale, rest - shrinking, shrinking))

    def tables(self, widths: Index) -> float:
        """Seconds by the tables alone."""
        return float(self._plain.each(self._axes.sizes(widths))[: len(self.priced)].sum())

    def share(self, widths: Index) -> float:
        """What is left of the activations, and of the work without a table: 1 for the whole network."""
        return float(self._rest.each(self._axes.sizes(widths)).sum())

    def used(self, widths: Index) -> int:
        """Predicted nanoseconds."""
        return self.tally(widths).total

    def tally(self, widths: Index) -> Tally:
        """A running account that starts from these widths."""
        return Tally(self._axes, self._terms, round(self.fit.constant / UNIT), widths)

    @cached_property
    def full(self) -> int:
        """Predicted nanoseconds of the whole network."""
        return self.used(self.full_widths)

    def ratio(self, widths: Index) -> float:
        """Predicted seconds, relative to the whole network."""
        return self.used(widths) / self.full

    def ladder(self, group: ChannelGroup) -> tuple[int, ...]:
        """The widths of a group that pay, rising, by the tables alone; the last is the full one.

        Each step down saves at least a part of its channels' share of what the layers on them cost: widths within a tread
        save nothing, and a group whose layers take as long when they are narrow stays whole. Empty where no layer on them has
        a table: then nothing is known that speaks against any width.
        """
        column = next(i for i, g in enumerate(self.groups.groups) if g.id == group.id)
        terms = _Costs(self._axes, self.priced, self._rest, 1 / UNIT, 0.0)
        tally = Tally(self._axes, terms, 0, self.full_widths)
        touched = terms.touched(column)
        if not len(touched) or touched[0] >= len(self.priced):
            return ()
        cost = np.array([tally.resize(column, n) for n in range(1, group.size + 1)], np.float64)
        layers = terms.each(self._axes.sizes(self.full_widths), touched)
        share = WORTH * float(layers.sum()) / group.size
        if share <= 0:
            return (group.size,)
        steps, n = [group.size], group.size
        while n > 1:
            below = np.arange(1, n)
            pays = np.flatnonzero(cost[n - 1] - cost[below - 1] >= share * (n - below))
            if not len(pays):
                break
            n = int(below[pays[-1]])
            steps.append(n)
        return tuple(reversed(steps))


class _Costs:
    """The layers' tables, then the terms of the rest; for a `Tally`, with steps where `Terms` has products."""

    def __init__(self, axes: Axes, priced: Sequence[Priced], rest: Terms, scale: float, shrinking: float) -> None:
        self.priced, self.rest, self.scale, self.shrinking = priced, rest, scale, shrinking
        self._ends = [(axes.number[p.x], axes.number[p.out]) for p in priced]
        self._axes = axes
        self._read: dict[int, list[int]] = {}  # the layers with a table that read an axis
        for i, ends in enumerate(self._ends):
            for axis in set(ends):
                self._read.setdefault(axis, []).append(i)

    def each(self, axes: Array, which: Index | slice = slice(None)) -> Array:
        count = len(self.priced)
        every = np.arange(count + len(self.rest.coefficients))[which]
        tables = [self._cost(int(i), axes) for i in every[every < count]]
        return np.concatenate([tables, self.shrinking * self.rest.each(axes, every[every >= count] - count)])

    def _cost(self, layer: int, axes: Array) -> float:
        priced, (x, out) = self.priced[layer], self._ends[layer]
        return self.scale * priced.repeats * priced.table.at(int(axes[x]), int(axes[out]))

    def touched(self, group: int) -> Index:
        axes, _ = self._axes.on(group)
        layers = sorted({i for axis in axes for i in self._read.get(int(axis), ())})
        return np.concatenate([np.array(layers, np.int64), self.rest.touched(group) + len(self.priced)])


def _rest(groups: Groups, unpriced: Sequence[int]) -> list[Term]:
    """The activations, and the multiply-adds without a table, each as a share of 1; together they make 1."""
    work = sum(_product(x.factor, [groups.full(d) for d in x.macs_dims]) for x in groups.layers)
    layers = [groups.layers[i] for i in unpriced]
    without = sum(_product(x.factor, [groups.full(d) for d in x.macs_dims]) for x in layers)
    part = without / work if work else 0.0
    found = [(part * x.factor / without, list(x.macs_dims)) for x in layers] if without else []
    tensors: dict[str, list[Dim]] = {}
    for dim in groups.at:
        if dim.tensor not in groups.net.fixed and not dim.use:
            tensors.setdefault(dim.tensor, []).append(dim)
    elements = {t: groups.net.inside.repeats.get(t, 1) * int(np.prod(groups.net.shapes[t])) for t in tensors}
    total = sum(elements.values())
    return found + [
        ((1 - part) * elements[t] / total / _product(1, [groups.full(d) for d in dims]), dims) for t, dims in tensors.items()
    ]


def _product(factor: float, sizes: Sequence[int]) -> float:
    return float(factor * np.prod([float(n) for n in sizes]))


def widths_of(costs: Costs, widths: Mapping[str, int]) -> Index:
    """The widths of all groups; those that are not named are whole."""
    return np.array([widths.get(g.id, g.size) for g in costs.groups.groups], np.int64)
