"""The fact that the `group` pass establishes: the channel groups of a network, its layers and what they cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from onnxprune.channels import ChannelGroup, Dim, Index
from onnxprune.graph import Array, Network
from onnxprune.rules.base import Layer

Kept = Mapping[str, Index]
"""For each group (by id) the sorted channel numbers that stay; groups that are not named stay whole."""


@dataclass(frozen=True)
class Pin:
    """Node `index` reads, at `position`, a number that is made of the sizes of `dims`: after a cut it must stay what it was.

    For example the square root of the head dimension, computed from a shape.
    """

    index: int
    position: int
    dims: tuple[Dim, ...]
    value: Array


@dataclass(frozen=True, eq=False)
class Groups:
    """Channel groups, layers and roles of a network.

    roles: "producer", "consumer", "silencer" (a producer that stands in for a consumer where activations are multiplied) or
    "scale" for every coupled axis of a constant tensor. pins: numbers to hold on to.
    ranged: axes of constants that make channels 0 before an operator takes the range of a tensor from them.
    """

    net: Network
    groups: tuple[ChannelGroup, ...]
    layers: tuple[Layer, ...]
    roles: Mapping[Dim, str]
    pins: tuple[Pin, ...] = ()
    ranged: frozenset[Dim] = frozenset()

    @cached_property
    def by_id(self) -> dict[str, ChannelGroup]:
        return {g.id: g for g in self.groups}

    @cached_property
    def prunable(self) -> tuple[ChannelGroup, ...]:
        return tuple(g for g in self.groups if not g.frozen)

    @cached_property
    def at(self) -> dict[Dim, list[tuple[ChannelGroup, int]]]:
        """For every coupled axis the groups on it, each with the number of positions per channel."""
        found: dict[Dim, list[tuple[ChannelGroup, int]]] = {}
        for group in self.groups:
            for slot in group.slots:
                found.setdefault(slot.dim, []).append((group, len(slot.positions) // group.size))
        return found

    def full(self, dim: Dim) -> int:
        """Size of an axis before any cut."""
        return self.net.shapes[dim.tensor][dim.axis]

    def channel_ids(self, dim: Dim) -> tuple[list[ChannelGroup], Index, Index]:
        """Which channel every position of `dim` belongs to: (groups, group number, channel number) by position.

        The group number is -1 where no group lies.
        """
        groups: list[ChannelGroup] = []
        which = np.full(self.full(dim), -1)
        channel = np.zeros(self.full(dim), np.int64)
        for group, _ in self.at.get(dim, []):
            slot = next(s for s in group.slots if s.dim == dim)
            which[slot.positions] = len(groups)
            channel[slot.positions] = slot.channels
            groups.append(group)
        return groups, which, channel

    def removed(self, kept: Kept) -> dict[Dim, Index]:
        """The positions that go, by axis; axes that stay whole are not listed."""
        gone: dict[Dim, list[Index]] = {}
        for name, channels in kept.items():
            group = self.by_id[name]
            for slot in group.slots:
                positions = slot.removed(channels, group.size)
                if len(positions):
                    gone.setdefault(slot.dim, []).append(positions)
        return {d: np.sort(np.concatenate(parts)) for d, parts in gone.items()}


@dataclass(frozen=True)
class Size:
    """MACs for one run at batch 1, parameters (elements of floating-point constants), bytes of the file."""

    macs: int
    params: int
    bytes: int


class Accounting:
    """Exact size of the network as a function of how many channels each group keeps.

    Every cost is a product of axis sizes, and axis sizes are sums of channel counts, so one vectorised evaluation of
    all terms takes microseconds: `coefficient * prod(size of each axis)`.
    """

    def __init__(self, groups: Groups, file_bytes: int) -> None:
        self.groups = groups
        self.ids = [g.id for g in groups.groups]
        self.full_widths = np.array([g.size for g in groups.groups], np.int64)
        self._dims: dict[Dim, int] = {}
        self._base: list[int] = []
        self._per: list[dict[int, int]] = []
        layers = [(float(x.factor), [self._dim(d) for d in x.macs_dims]) for x in groups.layers]
        params, weights = self._tensor_terms()
        self._matrix = self._counts_matrix()
        self._macs = _Terms(layers)
        self._params = _Terms(params)
        self._bytes = _Terms(weights)
        self.layer_count = len(layers)
        self._overhead = 0
        full = self.size(self.full_widths)
        self._overhead = file_bytes - full.bytes

    def _dim(self, dim: Dim) -> int:
        if dim not in self._dims:
            number = {g: i for i, g in enumerate(self.ids)}
            here = {number[g.id]: per for g, per in self.groups.at.get(dim, [])}
            covered = sum(self.groups.by_id[self.ids[i]].size * per for i, per in here.items())
            self._dims[dim] = len(self._base)
            self._base.append(self.groups.full(dim) - covered)
            self._per.append(here)
        return self._dims[dim]

    def _tensor_terms(self) -> tuple[list[tuple[float, list[int]]], list[tuple[float, list[int]]]]:
        """Terms for parameters and for bytes; a constant that is stored once counts once."""
        by_tensor: dict[str, dict[str, list[Dim]]] = {}
        for dim in self.groups.at:
            if dim.tensor in self.groups.net.initializers:
                by_tensor.setdefault(dim.tensor, {}).setdefault(dim.use, []).append(dim)
        params, sizes = [], []
        for name, proto in self.groups.net.initializers.items():
            uses = by_tensor.get(name, {"": []})
            dims = next(iter(uses.values()))  # accidental sharing: the uses are vectors, their sizes hardly count
            cut = {d.axis for d in dims}
            rest = float(np.prod([n for a, n in enumerate(proto.dims) if a not in cut]))
            terms = [self._dim(d) for d in dims]
            kind = self.groups.net.kinds[name]
            sizes.append((rest * kind.itemsize, terms))
            if is_parameter(self.groups.net, name):
                params.append((rest, terms))
        return params, sizes

    def _counts_matrix(self) -> Index:
        matrix = np.zeros((len(self._base), len(self.ids)), np.int64)
        for row, per in enumerate(self._per):
            for column, count in per.items():
                matrix[row, column] = count
        return matrix

    def widths(self, kept: Kept) -> Index:
        """Channel counts of all groups, in their order, from kept channels."""
        return np.array([len(kept[g]) if g in kept else n for g, n in zip(self.ids, self.full_widths, strict=True)])

    def _axis_sizes(self, widths: Index) -> Index:
        sizes: Index = np.asarray(self._base, np.int64) + self._matrix @ widths
        return sizes

    def size(self, widths: Index) -> Size:
        """Size of the network when group i keeps `widths[i]` channels."""
        axes = self._axis_sizes(widths).astype(np.float64)
        return Size(
            round(self._macs.each(axes).sum()),
            round(self._params.each(axes).sum()),
            round(self._bytes.each(axes).sum()) + self._overhead,
        )

    def layer_macs(self, widths: Index) -> Index:
        """MACs of every layer, in the order of `Groups.layers`."""
        macs: Index = np.rint(self._macs.each(self._axis_sizes(widths).astype(np.float64))).astype(np.int64)
        return macs

    def axis_size(self, dim: Dim, widths: Index) -> int:
        """Size of any axis when group i keeps `widths[i]` channels."""
        per = {g.id: n for g, n in self.groups.at.get(dim, [])}
        lost = sum(per[g] * int(n - w) for g, n, w in zip(self.ids, self.full_widths, widths, strict=True) if g in per)
        return self.groups.full(dim) - lost


def is_parameter(net: Network, name: str) -> bool:
    """Whether a constant counts as parameters: floating-point, or 8-bit weights (not vectors of indices)."""
    kind = net.kinds[name]
    weight = kind.kind == "f" or (kind.itemsize == 1 and len(net.initializers[name].dims) > 1)
    return weight and bool(net.uses.get(name))


class _Terms:
    """Many products `coefficient * a * b * ...` over axis sizes, padded to one rectangular array."""

    def __init__(self, terms: Sequence[tuple[float, list[int]]]) -> None:
        self.coefficients = np.array([c for c, _ in terms], np.float64)
        longest = max((len(t) for _, t in terms), default=0)
        # Padding points at an extra axis of size 1, see `each`.
        self.index = np.full((len(terms), longest), -1, np.int64)
        for row, (_, dims) in enumerate(terms):
            self.index[row, : len(dims)] = dims

    def each(self, axes: Array) -> Array:
        padded = np.append(axes, 1.0)
        return np.asarray(self.coefficients * padded[self.index].prod(axis=1))
