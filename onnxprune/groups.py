"""The fact that the `group` pass establishes: the channel groups of a network, its layers and what they cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol, TypeAlias

import numpy as np
import onnx
from onnx import helper
from scipy.sparse import csc_array

from onnxprune.channels import ChannelGroup, Dim, Index, Slot
from onnxprune.control import bodies, every_graph
from onnxprune.graph import Array, Network
from onnxprune.inline import constant_value
from onnxprune.rules.base import Layer

Kept = Mapping[str, Index]
"""For each group (by id) the sorted channel numbers that stay; groups that are not named stay whole."""

Term: TypeAlias = tuple[float, list[Dim]]
"""A cost: the coefficient times the product of the sizes of the axes."""


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
    def at(self) -> dict[Dim, list[tuple[ChannelGroup, Slot]]]:
        """For every coupled axis the groups on it, each with its slot there."""
        found: dict[Dim, list[tuple[ChannelGroup, Slot]]] = {}
        for group in self.groups:
            for slot in group.slots:
                found.setdefault(slot.dim, []).append((group, slot))
        return found

    @cached_property
    def summed(self) -> set[Dim]:
        """The axes of weights that a layer sums over."""
        return {layer.w for layer in self.layers if layer.w is not None}

    @cached_property
    def multiplied(self) -> set[Dim]:
        """The axes of activations that a layer sums over as the second factor."""
        return {layer.other for layer in self.layers if layer.other is not None}

    def full(self, dim: Dim) -> int:
        """Size of an axis before any cut."""
        return self.net.shapes[dim.tensor][dim.axis]

    def outputs(self, layer: Layer) -> int:
        """How many scalars a layer makes in one run, over all iterations of a loop around it."""
        tensor = layer.out.tensor
        return self.net.inside.repeats.get(tensor, 1) * int(np.prod(self.net.shapes[tensor]))

    def macs(self, layer: Layer) -> float:
        """MACs of a layer in one run at batch 1, before any cut."""
        return float(layer.factor) * prod(self.full(dim) for dim in layer.macs_dims)

    def channel_ids(self, dim: Dim) -> tuple[list[ChannelGroup], Index, Index]:
        """Which channel every position of `dim` belongs to: (groups, group number, channel number) by position.

        The group number is -1 where no group lies.
        """
        groups: list[ChannelGroup] = []
        which = np.full(self.full(dim), -1)
        channel = np.zeros(self.full(dim), np.int64)
        for group, slot in self.at.get(dim, []):
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
    """MACs for one run at batch 1, parameters (elements of floating-point constants), bytes of the file.

    All branches of an If count, and the body of a loop as often as the probe run went through it.
    """

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
        self.column = {name: i for i, name in enumerate(self.ids)}
        self.full_widths = np.array([g.size for g in groups.groups], np.int64)
        params, weights = self._tensor_terms()
        macs = [(float(x.factor), list(x.macs_dims)) for x in groups.layers]
        self._axes = Axes(groups, dict.fromkeys(d for terms in (macs, params, weights) for _, dims in terms for d in dims))
        self._terms = {k: Terms(t, self._axes) for k, t in (("macs", macs), ("params", params), ("bytes", weights))}
        self._overhead = {"macs": 0, "params": _in_opaque_bodies(groups.net), "bytes": 0}
        self._overhead["bytes"] = file_bytes - self.size(self.full_widths).bytes

    def _tensor_terms(self) -> tuple[list[Term], list[Term]]:
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
            sizes.append((rest * self.groups.net.kinds[name].itemsize, dims))
            if is_parameter(self.groups.net, name):
                params.append((rest, dims))
        return params, sizes

    def widths(self, kept: Kept) -> Index:
        """Channel counts of all groups, in their order, from kept channels."""
        return np.array([len(kept[g]) if g in kept else n for g, n in zip(self.ids, self.full_widths, strict=True)])

    def size(self, widths: Index) -> Size:
        """Size of the network when group i keeps `widths[i]` channels."""
        axes = self._axes.sizes(widths)
        return Size(**{kind: round(terms.each(axes).sum()) + self._overhead[kind] for kind, terms in self._terms.items()})

    def tally(self, kind: str, widths: Index) -> Tally:
        """A running account of "macs", "params" or "bytes" that starts from these widths."""
        return Tally(self._axes, self._terms[kind], self._overhead[kind], widths)

    def layer_macs(self, widths: Index) -> Index:
        """MACs of every layer, in the order of `Groups.layers`."""
        macs: Index = np.rint(self._terms["macs"].each(self._axes.sizes(widths))).astype(np.int64)
        return macs

    def axis_size(self, dim: Dim, widths: Index) -> int:
        """Size of any axis when group i keeps `widths[i]` channels."""
        here = [(self.column[g.id], g.size, len(s.positions) // g.size) for g, s in self.groups.at.get(dim, [])]
        return self.groups.full(dim) - sum(per * (size - int(widths[column])) for column, size, per in here)


def parameters(net: Network) -> int:
    """Parameters of a network, one by one."""
    counted = [int(prod(t.dims)) for name, t in net.initializers.items() if is_parameter(net, name)]
    return _in_opaque_bodies(net) + sum(counted)


def is_parameter(net: Network, name: str) -> bool:
    """Whether a constant counts as parameters: floating-point, or 8-bit weights (not vectors of indices)."""
    return _is_weight(net.initializers[name]) and (bool(net.uses.get(name)) or name in net.read_elsewhere)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return kind.kind == "f" or (kind.kind in "iu" and kind.itemsize == 1 and len(tensor.dims) > 1)


def _in_opaque_bodies(net: Network) -> int:
    """Elements of the constants in bodies that are not followed; they stay as they are."""
    graphs = [g for node in net.model.graph.node for body in bodies(node) for g in every_graph(body)]
    read = {x for g in graphs for n in g.node for x in n.input} | {o.name for g in graphs for o in g.output}
    held = {n.output[0]: t for g in graphs for n in g.node if n.op_type == "Constant" and (t := constant_value(n)) is not None}
    stored = [(t.name, t) for g in graphs for t in g.initializer]
    return sum(prod(t.dims) for name, t in [*stored, *held.items()] if name in read and _is_weight(t))


class Axes:
    """The axes that costs depend on. Their sizes: `base + channels @ widths`."""

    def __init__(self, groups: Groups, dims: Iterable[Dim]) -> None:
        self.number = {dim: i for i, dim in enumerate(dims)}
        column = {g.id: i for i, g in enumerate(groups.groups)}
        here = [(i, column[g.id], len(s.positions) // g.size) for d, i in self.number.items() for g, s in groups.at.get(d, [])]
        rows, columns, counts = np.array(here, np.int64).reshape(-1, 3).T
        shape = (len(self.number), len(column))
        self.channels = csc_array((counts, (rows, columns)), shape)  # of each group on each axis
        full = np.array([groups.full(d) for d in self.number], np.int64)
        self.base = full - self.channels @ np.array([g.size for g in groups.groups], np.int64)

    def sizes(self, widths: Index) -> Array:
        """The size of every axis, and 1 at the end, which is the size of no axis."""
        return np.append(self.base + self.channels @ widths, 1).astype(np.float64)

    def on(self, group: int) -> tuple[Index, Index]:
        """The axes that a group lies on, and how often each of its channels does."""
        part = slice(self.channels.indptr[group], self.channels.indptr[group + 1])
        return self.channels.indices[part], self.channels.data[part]


class Terms:
    """Many products `coefficient * a * b * ...` over axis sizes, padded to one rectangular array."""

    def __init__(self, terms: Sequence[Term], axes: Axes) -> None:
        self.coefficients = np.array([c for c, _ in terms], np.float64)
        longest = max((len(dims) for _, dims in terms), default=0)
        self.index = np.full((len(terms), longest), -1, np.int64)  # padding points at the last entry of `Axes.sizes`
        for row, (_, dims) in enumerate(terms):
            self.index[row, : len(dims)] = [axes.number[d] for d in dims]
        term, place = np.nonzero(self.index >= 0)
        reads = csc_array((np.ones(len(term)), (term, self.index[term, place])), (len(terms), len(axes.number)))
        self.of_group = (reads @ axes.channels).tocsc()  # which terms depend on each group

    def each(self, axes: Array, which: Index | slice = slice(None)) -> Array:
        """The terms, or some of them, for axes of these sizes."""
        return np.asarray(self.coefficients[which] * axes[self.index[which]].prod(axis=1))

    def touched(self, group: int) -> Index:
        """The terms that depend on a group."""
        touched: Index = self.of_group.indices[self.of_group.indptr[group] : self.of_group.indptr[group + 1]]
        return touched


class Costing(Protocol):
    """What a quantity of the network is the sum of."""

    def each(self, axes: Array, which: Index | slice = slice(None)) -> Array:
        """The parts, or some of them, for axes of these sizes (see `Axes.sizes`)."""

    def touched(self, group: int) -> Index:
        """The parts that depend on a group."""


class Tally:
    """One quantity of the network while its groups change one by one; a change costs only the parts that it touches."""

    def __init__(self, axes: Axes, terms: Costing, overhead: int, widths: Index) -> None:
        self._axes, self._terms = axes, terms
        self._widths = widths.copy()
        self._sizes = axes.sizes(widths)
        self._each = terms.each(self._sizes)
        self._sum = float(self._each.sum()) + overhead  # of whole numbers: exact

    @property
    def total(self) -> int:
        return round(self._sum)

    def resize(self, group: int, width: int) -> int:
        """Gives one group another width; returns the total."""
        axes, per = self._axes.on(group)
        self._sizes[axes] += per * (width - self._widths[group])
        self._widths[group] = width
        touched = self._terms.touched(group)
        fresh = self._terms.each(self._sizes, touched)
        self._sum += float(fresh.sum() - self._each[touched].sum())
        self._each[touched] = fresh
        return self.total
