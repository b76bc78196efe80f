"""Channels: positions of tensor axes that live and die together.

Every axis of a tensor is a vector of *positions*. An operator rule says which positions belong together (a `Tie`)
or that some cannot be removed (a `Freeze`). The connected components of positions are the *channels*; channels with
the same footprint (the same axes, equally often) form a `ChannelGroup`, the unit that is scored, allotted and cut.
There are no per-architecture cases: a residual Add, a Concat, a depthwise convolution and a Flatten are all ties.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Index: TypeAlias = NDArray[np.int64]


class Dim(NamedTuple):
    """One axis of one tensor; `use` tells apart the uses of a small constant that several nodes share by accident."""

    tensor: str
    axis: int
    use: str = ""

    def __str__(self) -> str:
        return f"{self.tensor}[axis {self.axis}]"


@dataclass(frozen=True, eq=False)
class Tie:
    """Position `ia[t]` of `a` and position `ib[t]` of `b` live and die together; None means 0, 1, 2, ..."""

    a: Dim
    b: Dim
    ia: Index | None = None
    ib: Index | None = None


@dataclass(frozen=True, eq=False)
class Freeze:
    """The positions (all of them when None) of `dim` cannot be removed, for `reason`; `remedy` says what would change that."""

    dim: Dim
    reason: str
    positions: Index | None = None
    remedy: str = ""


@dataclass(frozen=True, eq=False)
class Flaw:
    """Removing positions of `dim` is not the same as zeroing the weights that read them, for `reason`.

    kind: no mask is known that the cut equals (approximation), the mask writes zero points instead of zeros (offset), or
    8-bit activations may round to another step (rounding).
    """

    dim: Dim
    reason: str
    kind: Literal["approximation", "offset", "rounding"] = "approximation"

    @property
    def comparable(self) -> bool:
        """Whether a mask is known that the cut still equals, but for rounding."""
        return self.kind != "approximation"


class Frozen(NamedTuple):
    """Why channels cannot be removed, and what would change that."""

    reason: str
    remedy: str = ""


@dataclass(frozen=True, eq=False)
class Slot:
    """Where a group lies on one axis: `positions[t]` of `dim` belongs to the group's channel `channels[t]`."""

    dim: Dim
    positions: Index
    channels: Index

    def removed(self, kept: Index, size: int) -> Index:
        """The positions of this axis that go when only the channels `kept` of `size` stay; sorted."""
        mask = np.ones(size, bool)
        mask[kept] = False
        return np.sort(self.positions[mask[self.channels]])


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels with one footprint: removing any of them shortens the same axes by the same amounts.

    size: number of channels. slots: one per axis that the group touches, in the order of the graph.
    reason: why it is frozen, None when it can be pruned; remedy: what would unfreeze it. flaw: why a cut is not exact.
    """

    id: str
    size: int
    slots: tuple[Slot, ...]
    reason: str | None = None
    remedy: str = ""
    flaw: Flaw | None = None

    @property
    def frozen(self) -> bool:
        return self.reason is not None

    @property
    def exact(self) -> bool:
        """Whether removing channels equals silencing them."""
        return self.flaw is None


def joined(labels: Index, ia: Index, ib: Index, size: int) -> Index:
    """Class numbers for the `size` positions of another axis, where position ia[t] of this one, of class labels[ia[t]], and
    position ib[t] of that one live and die together."""
    start = int(labels.max(initial=-1)) + 1
    edges = (np.ones(len(ia), np.int8), (labels[ia], start + ib))
    _, found = connected_components(coo_matrix(edges, shape=(start + size, start + size)), directed=False)
    numbers: Index = np.unique(found[start:], return_inverse=True)[1].astype(np.int64)
    return numbers


@dataclass
class Coupling:
    """Collects ties, freezes and flaws, then yields the groups."""

    sizes: dict[Dim, int] = field(default_factory=dict)
    ties: list[Tie] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    flaws: list[Flaw] = field(default_factory=list)

    def register(self, dim: Dim, size: int) -> None:
        self.sizes.setdefault(dim, size)

    def solve(self) -> Components:
        """Connected components of all positions; linear in the number of ties (SciPy's `connected_components`)."""
        dims = list(self.sizes)
        lengths = np.array([self.sizes[d] for d in dims], np.int64)
        starts = np.concatenate(([0], np.cumsum(lengths)))
        offset = {d: int(starts[i]) for i, d in enumerate(dims)}
        rows, cols = [], []
        for tie in self.ties:
            ia = np.arange(self.sizes[tie.a]) if tie.ia is None else tie.ia
            ib = np.arange(self.sizes[tie.b]) if tie.ib is None else tie.ib
            rows.append(ia + offset[tie.a])
            cols.append(ib + offset[tie.b])
        n = int(starts[-1])
        i = np.concatenate(rows) if rows else np.empty(0, np.int64)
        j = np.concatenate(cols) if cols else np.empty(0, np.int64)
        count, labels = connected_components(coo_matrix((np.ones(len(i), np.int8), (i, j)), shape=(n, n)), directed=False)
        _, first = np.unique(labels, return_index=True)
        number = np.empty(count, np.int64)
        number[np.argsort(first)] = np.arange(count)
        labels = number[labels]
        frozen, flaws = self._reasons(offset, labels), self._flaws(offset, labels)
        return Components(dims, offset, dict(self.sizes), labels, int(count), frozen, flaws)

    def _reasons(self, offset: Mapping[Dim, int], labels: Index) -> dict[int, Frozen]:
        reasons: dict[int, Frozen] = {}
        for freeze in self.freezes:
            start = offset[freeze.dim]
            if freeze.positions is None:
                where = labels[start : start + self.sizes[freeze.dim]]
            else:
                where = labels[start + freeze.positions]
            for component in np.unique(where):
                reasons.setdefault(int(component), Frozen(freeze.reason, freeze.remedy))
        return reasons

    def _flaws(self, offset: Mapping[Dim, int], labels: Index) -> dict[int, Flaw]:
        flaws: dict[int, Flaw] = {}
        for flaw in sorted(self.flaws, key=lambda f: f.kind):  # the graver one, first in the alphabet, speaks for a channel
            start = offset[flaw.dim]
            for component in np.unique(labels[start : start + self.sizes[flaw.dim]]):
                flaws.setdefault(int(component), flaw)
        return flaws


@dataclass(frozen=True, eq=False)
class Components:
    """The channels of a network: a component label for every position of every coupled axis.

    Components are numbered in the order of their first positions.
    """

    dims: list[Dim]
    offset: dict[Dim, int]
    sizes: dict[Dim, int]
    labels: Index
    count: int
    reasons: dict[int, Frozen]
    flaws: dict[int, Flaw]

    def of(self, dim: Dim) -> Index:
        """The component label of every position of `dim`."""
        start = self.offset[dim]
        return self.labels[start : start + self.sizes[dim]]

    def freeze(self, dim: Dim, frozen: Frozen) -> bool:
        """Freezes the components of `dim` after the fact; tells whether any was not frozen before."""
        fresh = [int(c) for c in np.unique(self.of(dim)) if int(c) not in self.reasons]
        self.reasons.update(dict.fromkeys(fresh, frozen))
        return bool(fresh)

    def freeze_like(self, other: Components, dims: Iterable[Dim], apart: Frozen) -> bool:
        """Freezes what is frozen in `other`, where the same positions of `dims` may belong to channels otherwise.

        apart: the reason where they do. Tells whether anything was not frozen before.
        """
        both = [(self.of(d), other.of(d) if d in other.offset else np.full(self.sizes[d], -1)) for d in dims]
        if not both:
            return False
        pairs = np.unique(np.concatenate([np.stack(p, axis=1) for p in both]), axis=0)
        lost = np.isin(pairs[:, 1], [-1, *other.reasons])
        for column in (0, 1):
            _, where, count = np.unique(pairs[:, column], return_inverse=True, return_counts=True)
            lost |= count[where] > 1
        fresh = {int(a): other.reasons.get(int(b), apart) for a, b in pairs[lost] if int(a) not in self.reasons}
        self.reasons.update(fresh)
        return bool(fresh)

    def groups(self, names: Mapping[Dim, str]) -> tuple[ChannelGroup, ...]:
        """Channels bundled by footprint and by reason, in the order in which the axes were registered.

        names: what to call a group whose first axis is this one.
        """
        axis_of = np.repeat(np.arange(len(self.dims)), [self.sizes[d] for d in self.dims])
        bundle_of, bundles = self._bundles(axis_of)
        sizes = np.bincount(bundle_of, minlength=len(bundles))
        slots = self._slots(axis_of, bundle_of, sizes)
        taken: dict[str, int] = {}
        groups = []
        for (frozen, flaw), size, found in zip(bundles, sizes.tolist(), slots, strict=True):
            name = next((names[s.dim] for s in found if s.dim in names), found[0].dim.tensor)
            taken[name] = taken.get(name, 0) + 1
            unique = name if taken[name] == 1 else f"{name}#{taken[name]}"
            reason, remedy = frozen or (None, "")
            groups.append(ChannelGroup(unique, size, tuple(found), reason, remedy, flaw))
        return tuple(groups)

    def _bundles(self, axis_of: Index) -> tuple[Index, list[tuple[Frozen | None, Flaw | None]]]:
        """(the bundle of every component, (why frozen, why inexact) of every bundle): one for each distinct footprint.

        axis_of: the number of the axis of every position.
        """
        pairs, counts = np.unique(self.labels * len(self.dims) + axis_of, return_counts=True)
        component, axis = np.divmod(pairs, max(1, len(self.dims)))
        bounds = np.searchsorted(component, np.arange(self.count + 1)).tolist()
        footprint = np.stack([axis, counts], axis=1)
        numbers: dict[tuple[Frozen | None, Flaw | None, bytes], int] = {}
        bundle_of = np.empty(self.count, np.int64)
        for c in range(self.count):
            key = (self.reasons.get(c), self.flaws.get(c), footprint[bounds[c] : bounds[c + 1]].tobytes())
            bundle_of[c] = numbers.setdefault(key, len(numbers))
        return bundle_of, [(frozen, flaw) for frozen, flaw, _ in numbers]

    def _slots(self, axis_of: Index, bundle_of: Index, sizes: Index) -> list[list[Slot]]:
        """The slots of every bundle, in the order of the axes, in one sweep over all positions sorted by bundle and axis."""
        # A bundle's channels are numbered in the order of their first positions: the numbers mean something to a reader.
        channel_of = np.empty(self.count, np.int64)
        channel_of[np.argsort(bundle_of, kind="stable")] = np.arange(self.count) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        bundles = bundle_of[self.labels]
        order = np.argsort(bundles, kind="stable")
        axes, bundles, channels = axis_of[order], bundles[order], channel_of[self.labels[order]]
        positions = order - np.array([self.offset[d] for d in self.dims], np.int64)[axes]
        cuts = np.flatnonzero((np.diff(axes) != 0) | (np.diff(bundles) != 0)) + 1
        slots: list[list[Slot]] = [[] for _ in sizes]
        for start, end in pairwise([0, *cuts.tolist(), len(order)] if len(order) else []):
            slots[bundles[start]].append(Slot(self.dims[axes[start]], positions[start:end], channels[start:end]))
        return slots
