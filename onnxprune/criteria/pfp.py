"""Empirical sensitivity, the criterion of Provable Filter Pruning (arXiv 1911.07412, section 3)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from onnxprune.channels import Index
from onnxprune.contraction import Contraction, Units, normal_form, units
from onnxprune.criteria.base import Mode, Reduce
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.rules import Layer
from onnxprune.saliency import LayerScore, Scores
from onnxprune.threads import Workers

TOLERANCE = 0.35  # by which `bound` lets an evaluated share count for more, so that fewer have to be
SINGLE = 0.08  # the same in 1x1 and linear layers, and where a unit is a single entry
NOTICE = 1.0  # seconds of silence
A = TypeVar("A")
B = TypeVar("B")


class Engine(Protocol):
    """What finds the largest shares of a contraction's units. workers: the threads on which it may be asked about several."""

    workers: Workers

    def largest(self, c: Contraction, units: Index, known: Array, key: tuple[Any, ...] | None = None) -> tuple[Array, int]:
        """(the larger of `known` and the largest share of every unit [U]; live sign parts). units: [U, m] positions.

        key: an object that determines the weight and the units together with the rest of the key, None where nothing does.
        """


class Sensitivity:
    """s_j: the largest share of channel j in any output, patch, sign part and sample of a consumer, in [0, 1].

    reduce: `sum` takes the whole channel in a patch, as the theorem needs; `max` the largest single entry of it, as the
    authors' code does (then the theorem holds with k^2 times the sum of sensitivities). mode: `exact`, or `bound`, a number
    that is never smaller, and at most 8 % larger in 1x1 and linear layers, 35 % elsewhere; the theorem holds with it as well.
    providers: where another than the CPU is the first, it evaluates all shares, exactly in either mode.
    """

    name = "pfp"
    needs_data = True
    combine: Literal["max", "mean"] = "max"
    provable = True

    def __init__(self, reduce: Reduce = "sum", providers: list[str] | None = None, mode: Mode = "exact") -> None:
        self._reduce: Reduce = reduce
        self._mode: Mode = mode
        self._providers = providers
        self._plans: dict[Layer, tuple[Groups, _Plan]] = {}

    @property
    def options(self) -> Mapping[str, Any]:
        return {"reduce": self._reduce, "sensitivity": self._mode}

    @cached_property
    def engine(self) -> Engine:
        """Made, and where need be compiled, at its first use: that takes seconds once on a machine."""
        if self._providers and self._providers[0] != "CPUExecutionProvider":
            from onnxprune.criteria.shares import Shares

            return Shares(self._reduce, self._providers)
        from onnxprune.criteria.fast import FastShares

        return FastShares(self._reduce == "sum", *((0.0, 0.0) if self._mode == "exact" else (TOLERANCE, SINGLE)))

    def spread(self, work: Callable[[A], B], items: Iterable[A]) -> Iterable[B]:
        """`map` on the engine's threads: layers do not depend on each other."""
        return self.engine.workers.map(work, items)

    def prepare(self, tell: Callable[[int], None]) -> None:
        """Makes the engine; tell(0), then tell(1), where that takes longer than a second because loops are compiled."""
        told: list[int] = []

        def announce() -> None:
            told.append(0)
            tell(0)

        notice = threading.Timer(NOTICE, announce)
        notice.start()
        try:
            _ = self.engine
        finally:
            notice.cancel()
            notice.join()
        if told:
            tell(1)

    def observe(
        self, groups: Groups, layer: Layer, x: Array, w: Array, known: Mapping[str, Scores] | None = None
    ) -> list[LayerScore]:
        """Sensitivities of all prunable channels that `layer` reads: the larger of `known` and those of this batch."""
        plan = self._plan(groups, layer)
        best = [(known or {}).get(u.group.id, np.zeros(u.group.size)).copy() for u in plan.wanted]
        live_parts = 0
        for contraction in normal_form(groups, layer, x, w):
            for together in plan.within(contraction):
                before = np.concatenate([best[m.of][m.rows] for m in together.members])
                first, width = int(contraction.positions[0]), together.positions.shape[1]
                key = (groups, layer.index, first, width) if layer.other is None else None
                found, live = self.engine.largest(contraction, together.positions, before, key)
                for m, s in zip(together.members, np.split(found, together.ends), strict=True):
                    best[m.of][m.rows] = s
                live_parts = max(live_parts, live)
        events = live_parts * groups.outputs(layer)
        return [LayerScore(layer.name, u.group.id, s, events) for s, u in zip(best, plan.wanted, strict=True)]

    def _plan(self, groups: Groups, layer: Layer) -> _Plan:
        """Which units lie where in a layer, kept for its next batch."""
        kept = self._plans.get(layer)
        if kept is None or kept[0] is not groups:
            kept = self._plans[layer] = (groups, _Plan(units(groups, layer)))
        return kept[1]

    def inspect(self, groups: Groups) -> list[LayerScore]:
        return []


@dataclass(frozen=True, eq=False)
class _Members:
    """The units of the group `of` (a number) that lie in one contraction: rows [u] of the group, positions [u, m] in there."""

    of: int
    rows: Index
    positions: Index


@dataclass(frozen=True, eq=False)
class _Together:
    """Units of a contraction with as many positions each, which share its products: of all members, one after the other.

    positions: [U, m] within the contraction's channels. ends: where each member's units end, but for the last's.
    """

    members: list[_Members]
    positions: Index
    ends: Index


@dataclass(frozen=True, eq=False)
class _Plan:
    """The units that a layer reads."""

    wanted: list[Units]
    _found: dict[tuple[int, int], list[_Together]] = field(default_factory=dict)

    def within(self, contraction: Contraction) -> list[_Together]:
        """Those in a contraction; of one layer it is known by its first channel and how many it has."""
        key = int(contraction.positions[0]), len(contraction.positions)
        if key not in self._found:
            self._found[key] = _by_width(_local(u.positions, contraction) for u in self.wanted)
        return self._found[key]


def _by_width(found: Iterable[tuple[Index, Index]]) -> list[_Together]:
    widths: dict[int, list[_Members]] = {}
    for of, (rows, positions) in enumerate(found):
        if len(rows):
            widths.setdefault(positions.shape[1], []).append(_Members(of, rows, positions))
    return [
        _Together(members, np.concatenate([m.positions for m in members]), np.cumsum([len(m.rows) for m in members])[:-1])
        for members in widths.values()
    ]


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
