"""What an operator rule sees (`View`), what it may say (facts), and what a rule is (`Rule`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_graphsurgeon as gs

from onnxprune.channels import Dim, Freeze, Index, Tie
from onnxprune.entries import Entry
from onnxprune.graph import Array, Network
from onnxprune.rules.edits import Edit
from onnxprune.symbolic import Symbols

OFFSET = "has a weight with a zero point other than 0: slices of that silence it, not of zeros"


@dataclass(frozen=True)
class Consumer:
    """The layer sums over this axis of its weight: zeroing a slice of it masks a channel."""

    dim: Dim


@dataclass(frozen=True)
class Reads:
    """The node reads the size of this axis only, or is indifferent to it: no reason to freeze."""

    dim: Dim


@dataclass(frozen=True)
class Fresh:
    """The node makes this axis out of one value: any position of it may go, if what it meets later allows it."""

    dim: Dim


@dataclass(frozen=True)
class MustEqual:
    """After every cut `entry` must evaluate to the size of `dim`, or `dim` cannot be cut."""

    dim: Dim
    entry: Entry


@dataclass(frozen=True)
class Contracts:
    """The node sums products of activations over these axes, in step: zeroing a slice of any one masks a channel.

    No weight stands there to be zeroed, so one of the activations must be silenced where it is made, see `silence`.
    """

    dims: tuple[Dim, ...]


@dataclass(frozen=True)
class Approximate:
    """The node reckons with all positions of this axis (a mean, a norm), so what it makes of the others changes with a cut.

    Frozen unless the user allows approximation; then the groups are flagged as inexact.
    """

    dim: Dim
    reason: str


@dataclass(frozen=True)
class Rounds:
    """The positions of this axis set the range, and so the steps, of an 8-bit activation: a cut and a mask round differently.

    Unless the mask makes them 0, as the range includes 0 in any case.
    """

    dim: Dim
    reason: str


@dataclass(frozen=True)
class Offset:
    """The weight that is summed over this axis has a zero point other than 0: writing that, not 0, silences a slice of it."""

    dim: Dim
    reason: str


@dataclass(frozen=True)
class Ways:
    """The node can follow the channels along one of `count` pairs of axes, of which it took the one that `View.way` says."""

    count: int


Way: TypeAlias = Literal["most", "next", "outer", "heads", "places"]
"""Which axis to follow: the one that leaves most channels, or second most, or the outermost; or as if the last two were heads
and places in them."""

Fact: TypeAlias = Tie | Freeze | Consumer | Contracts | Approximate | Rounds | Offset | Reads | Fresh | MustEqual | Ways


@dataclass(frozen=True)
class Steps:
    """What the integers of a quantised tensor stand for: (integer - zero point) * scale.

    scale, zero: names of the tensors, empty for 1 and for 0; of one element, or of one for every position of `axes`.
    """

    scale: str = ""
    zero: str = ""
    axes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Packed:
    """A weight of few bits as MatMulNBits packs it: bytes [N, blocks, bytes of a block], lowest bits first, `k` values a row.

    scale: name of the tensor with one for every row and block. zero: that of the zero points, packed by row like the
    weight or as numbers; empty for the middle of the range.
    """

    scale: str
    zero: str
    bits: int
    k: int


@dataclass(frozen=True)
class Layer:
    """A linear operator: what it reads, what it makes and what it costs.

    x, out: channel axis of the activations in and out. w: the weight's axis that is summed over; None where the channels
    pass through one by one (depthwise). other: where two activations are multiplied, the summed axis of the second.
    MACs = `factor` times the product of the sizes of `macs_dims`. steps: how to read the weight (or other activation) where
    it is integer; x_steps: the same for the activation in, None only where the layer sums in floating point.
    """

    index: int
    name: str
    op: str
    x: Dim
    w: Dim | None
    out: Dim
    factor: int
    macs_dims: tuple[Dim, ...]
    weight: str
    other: Dim | None = None
    steps: Steps | Packed | None = None
    x_steps: Steps | None = None

    @property
    def sums(self) -> bool:
        """Whether the layer sums over its channels, and so has a say in how much each matters."""
        return self.w is not None or self.other is not None


@dataclass(frozen=True)
class View:
    """One node as its rule sees it. Axes may be negative; all shapes are the concrete ones of the probe run.

    classes: for an input's axis the number of the class that each position lies in, if positions are known to live and die
    together there (because axes were merged into it); None where each is by itself as far as is known.
    """

    net: Network
    symbols: Symbols
    index: int
    live: Callable[[Dim], bool]
    way: Way = "most"
    classes: Callable[[Dim], Index | None] = lambda _: None

    def live_axes(self, i: int) -> set[int]:
        """The axes of input `i` that channels have reached so far; the nodes before this one have been seen."""
        return {axis for axis in range(len(self.shape(i))) if self.live(self.x(i, axis))}

    @property
    def node(self) -> gs.Node:
        return self.net.nodes[self.index]

    @property
    def op(self) -> str:
        return str(self.node.op)

    @property
    def label(self) -> str:
        return self.net.label(self.index)

    def __str__(self) -> str:
        return f"{self.op} '{self.label}'"

    @property
    def count(self) -> int:
        return len(self.node.inputs)

    def has(self, i: int) -> bool:
        """Whether optional input `i` is there."""
        return i < len(self.node.inputs) and bool(self.node.inputs[i].name)

    def name(self, i: int) -> str:
        return str(self.node.inputs[i].name)

    def shape(self, i: int = 0) -> tuple[int, ...]:
        return self.net.shapes[self.name(i)]

    def out_shape(self, o: int = 0) -> tuple[int, ...]:
        return self.net.shapes[self.node.outputs[o].name]

    def attr(self, name: str, default: Any = None) -> Any:
        return self.node.attrs.get(name, default)

    def x(self, i: int, axis: int) -> Dim:
        """Axis of input `i`. Small constants that several nodes share (exporters merge equal ones) are told apart."""
        name = self.name(i)
        use = f"{self.index}.{i}" if splittable(self.net, name) else ""
        return Dim(name, axis % len(self.shape(i)), use)

    def y(self, axis: int, o: int = 0) -> Dim:
        """Axis of output `o`."""
        return Dim(self.node.outputs[o].name, axis % len(self.out_shape(o)))

    def fixed(self, i: int) -> bool:
        """Whether input `i` is computed from constants alone."""
        return self.name(i) in self.net.fixed

    def value(self, i: int) -> Array | None:
        """Value of input `i` when it is computed from constants alone, else None."""
        return self.net.array(self.name(i)) if self.has(i) and self.fixed(i) else None

    def settled(self, i: int) -> bool:
        """Whether the integers of input `i` are the same in every run: constant, or made of the sizes of steady axes alone."""
        if self.fixed(i):
            return True
        entries = self.symbols.of(self.name(i))
        known = entries is not None and not self.symbols.partly(self.name(i)) and self.name(i) in self.net.values
        return known and all(self.net.steady(d.tensor, d.axis) for d in self.symbols.sizes_in(self.name(i)))

    def ints(self, i: int, attr: str = "") -> list[int] | None:
        """Integers from attribute `attr` or else from constant input `i`; None when absent or not constant."""
        if attr and attr in self.node.attrs:
            return [int(v) for v in np.ravel(self.node.attrs[attr])]
        value = self.value(i) if self.has(i) else None
        return None if value is None else [int(v) for v in value.ravel()]


def splittable(net: Network, name: str) -> bool:
    """A constant vector or scalar with several uses: unrelated layers may share it by accident of the exporter."""
    proto = net.initializers.get(name)
    if proto is None or len(net.uses.get(name, ())) < 2:
        return False
    return bool(np.prod(proto.dims) == max([1, *proto.dims]))


class Resize:
    """What a plan leaves of every axis."""

    def __init__(self, net: Network, removed: Mapping[Dim, Index]) -> None:
        self.net = net
        self.removed = removed

    def touches(self, dim: Dim) -> bool:
        return dim in self.removed

    def full(self, dim: Dim) -> int:
        return self.net.shapes[dim.tensor][dim.axis]

    def kept(self, dim: Dim) -> Index:
        """The positions that stay, sorted."""
        every = np.arange(self.full(dim))
        return np.delete(every, self.removed[dim]) if dim in self.removed else every

    def size(self, dim: Dim) -> int:
        return self.full(dim) - (len(self.removed[dim]) if dim in self.removed else 0)


TieFn: TypeAlias = Callable[[View], Iterable[Fact]]
FixupFn: TypeAlias = Callable[[View, Resize], Iterable[Edit]]
LayersFn: TypeAlias = Callable[[View], list[Layer]]


@dataclass(frozen=True)
class Rule:
    """How one operator couples channels.

    ties: the facts about its axes; an axis that no fact mentions is frozen where channels reach it.
    fixup: edits to attributes and shape constants that count channels. layers: the linear maps that the operator consists of.
    """

    ties: TieFn
    fixup: FixupFn | None = None
    layers: LayersFn | None = None


RuleTable: TypeAlias = Mapping[tuple[str, str], Rule]


def table(*parts: Mapping[str, Rule], domain: str = "") -> dict[tuple[str, str], Rule]:
    """One table out of several, keyed (domain, operator); two rules for one operator raise ValueError."""
    merged: dict[tuple[str, str], Rule] = {}
    for part in parts:
        for op, rule in part.items():
            if (domain, op) in merged:
                raise ValueError(f"two rules for operator {op}")
            merged[domain, op] = rule
    return merged


def blocks(units: int, per_unit: int) -> Index:
    """0,0,..,1,1,..: the unit of every position when each of `units` units owns `per_unit` positions in a row."""
    return np.repeat(np.arange(units), per_unit)
