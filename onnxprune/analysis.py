"""One analysis of a network, the work of pass `group`: every operator's rule runs once, in topological order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from onnxprune.arithmetic import freeze_broken_sizes
from onnxprune.channels import Components, Coupling, Dim, Flaw, Freeze, Tie
from onnxprune.control import handed_out, key
from onnxprune.entries import sizes
from onnxprune.graph import Network
from onnxprune.groups import Groups, Pin
from onnxprune.merged import Merged
from onnxprune.origins import Origins
from onnxprune.poles import poles
from onnxprune.roles import complete_roles
from onnxprune.rounding import rounded_sums
from onnxprune.rules import (
    OFFSET,
    Approximate,
    Consumer,
    Contracts,
    Fact,
    Fresh,
    Layer,
    MustEqual,
    Offset,
    Reads,
    Rounds,
    RuleTable,
    View,
    Way,
    Ways,
)
from onnxprune.rules.reshape import SHAPE_OPERANDS
from onnxprune.silence import Silencers, has_offset, made_by_bodies, silenceable
from onnxprune.symbolic import Symbols

SEQUENCES = ("SequenceConstruct", "SplitToSequence")
RECUT = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
UNSTEADY = "export with fixed input sizes"
FOLD = "fold the computation of the weight (onnxsim does)"


@dataclass(frozen=True)
class Setting:
    """What an analysis is told. approximate: cut also where what remains comes out differently (layer normalisation).

    way: which axis a node follows where channels come to lie on one of several; ways: the same by node, before `way`.
    """

    approximate: bool = False
    way: Way = "most"
    ways: Mapping[int, Way] = field(default_factory=dict)


class Analysis:
    """The facts of all rules about one network, and what follows from them."""

    def __init__(self, net: Network, rules: RuleTable, symbols: Symbols, setting: Setting) -> None:
        self.net, self.rules, self.setting = net, rules, setting
        self.symbols = symbols
        self.forks: dict[int, list[Tie]] = {}
        self.widest = 1  # the most ways that a node could have taken
        self.coupling = Coupling()
        self.live: set[Dim] = set()
        self.origins = Origins(net, rules)
        self.unmentioned: list[Freeze] = []
        self.roles: dict[Dim, str] = {}
        self.musts: list[MustEqual] = []
        self.layers: list[Layer] = []
        self.node_ties: dict[int, list[Tie]] = {}
        self.merged = Merged(net, self.node_ties, self.live)
        self.silencers = Silencers(net, self.node_ties)
        self.silencing: set[Dim] = set()
        self.range_silencers = Silencers(net, self.node_ties, offsets=True)
        self.ranged: set[Dim] = set()
        self.pins: list[Pin] = []

    def run(self) -> Groups:
        for index in self.net.order:
            self.visit(index)
        self.freeze_outputs()
        complete_roles(self.net, self.layers, self.node_ties, self.roles)
        self._freeze_poles()
        for flaw in rounded_sums(self.net, self.layers):
            self._flaw(flaw)
        self.components = self.coupling.solve()
        freeze_broken_sizes(self.net, self.musts, self.components)
        return self.finish(self.components)

    def stuck(self) -> list[int]:
        """The nodes that had a choice of axes and whose choice ended frozen."""
        reasons = self.components.reasons
        found = ((index, self._channels(ties)) for index, ties in self.forks.items())
        return [index for index, channels in found if any(all(c in reasons for c in some) for some in channels)]

    def beside(self, nodes: Iterable[int]) -> set[int]:
        """The nodes with a choice that have channels in common with some of these, at any remove, and these."""
        met = {index: set().union(*self._channels(ties)) for index, ties in self.forks.items()}
        chosen = set(nodes) & set(met)
        reached = set().union(*(met[index] for index in chosen))
        while more := {index for index in met if index not in chosen and met[index] & reached}:
            chosen |= more
            reached |= set().union(*(met[index] for index in more))
        return chosen

    def _channels(self, ties: list[Tie]) -> list[set[int]]:
        """The channels on the axes that a node's ties begin at."""
        return [set(np.unique(self.components.of(t.a)).tolist()) for t in ties if t.a in self.components.offset]

    # ------------------------------------------------------------------------------------------- one node

    def visit(self, index: int) -> None:
        node = self.net.model.graph.node[index]
        if node.op_type == "Constant" and not node.input:
            return
        view = View(
            self.net, self.symbols, index, self.is_live, self.setting.ways.get(index, self.setting.way), self.merged.classes
        )
        domain = "" if node.domain == "ai.onnx" else node.domain
        rule = self.rules.get((domain, node.op_type))
        known = rule is not None and self._has_shapes(view)
        facts = list(rule.ties(view)) if rule is not None and known else []
        if rule is not None and known and rule.layers is not None:
            times = self.net.inside.repeats.get(key(node), 1)
            self.layers.extend(replace(x, factor=times * x.factor) for x in rule.layers(view))
        self.live.update(f.dim for f in facts if isinstance(f, Fresh))
        ties = [f for f in facts if isinstance(f, Tie)]
        mentioned = {d for t in ties for d in (t.a, t.b)}
        mentioned |= {f.dim for f in facts if isinstance(f, Freeze | Reads | Approximate)}
        self._spread(view, ties)
        self.node_ties[index] = ties
        for fact in facts:
            self._note(view, fact)
        if rule is not None:
            self._freeze_numbered(view, ties, rewritten=rule.fixup is not None and view.op not in SHAPE_OPERANDS)
        if (ways := max((f.count for f in facts if isinstance(f, Ways)), default=1)) > 1:
            self.forks[index], self.widest = ties, max(self.widest, ways)
        why = f"{view} mixes its positions" if known else self.origins.unknown(view)
        self._freeze_unmentioned(view, mentioned, why)
        if known and not (rule is not None and rule.layers):
            self.origins.note_split(view, index in self.forks)
        self.origins.note(view, self.origins.of(view, mentioned) if known else why)
        self._pin_numbers(view, SHAPE_OPERANDS.get(view.op) if known else None)

    def _freeze_numbered(self, view: View, ties: list[Tie], rewritten: bool) -> None:
        """Positions by number mean other channels when the axis has another size.

        rewritten: surgery writes them anew, which it cannot do once for all. Elsewhere the second run tells what they mean;
        where there is none, axes count whose sizes are certain, and those that a Reshape cuts up must all be.
        """
        if not self.net.alone and not (rewritten and self.net.again is not None):
            return
        fixed = self.net.certain if self.net.alone else self.net.steady
        every = self.net.alone and view.op in RECUT
        for dim in {d for t in ties if every or t.ia is not None or t.ib is not None for d in (t.a, t.b)}:
            if not fixed(dim.tensor, dim.axis):
                why = f"{view} names positions of an axis with an open size"
                self._freeze(Freeze(dim, why, remedy=UNSTEADY))

    def _note(self, view: View, fact: Fact) -> None:
        """Records one fact other than a tie; which axes are live is known by now."""
        if isinstance(fact, Freeze):
            self._freeze(fact)
        elif isinstance(fact, MustEqual):
            self.musts.append(fact)
        elif isinstance(fact, Consumer):
            self.roles[fact.dim] = "consumer"
            if fact.dim.tensor not in self.net.fixed or not silenceable(self.net, fact.dim.tensor):
                why = "has a weight that no constant silences: it is computed, and not by moving or scaling one"
                self._freeze(Freeze(fact.dim, f"{view} {why}", remedy=FOLD))
            elif has_offset(self.net, fact.dim.tensor):
                self._flaw(Flaw(fact.dim, f"{view} {OFFSET}", "offset"))
        elif isinstance(fact, Contracts):
            self._silence(view, fact)
        elif isinstance(fact, Approximate):
            if self.setting.approximate:
                self._flaw(Flaw(fact.dim, fact.reason))
            else:
                remedy = FOLD if fact.dim.tensor in self.net.fixed else "--allow-approximate"
                self._freeze(Freeze(fact.dim, fact.reason, remedy=remedy))
        elif isinstance(fact, Rounds | Offset):
            self._flaw(Flaw(fact.dim, fact.reason, "offset" if isinstance(fact, Offset) else "rounding"))
            if isinstance(fact, Rounds) and self.is_live(fact.dim):
                found = self.range_silencers.of(fact.dim)
                self.ranged.update(found or ())
                if found is None and made_by_bodies(self.net, fact.dim.tensor):
                    self._freeze(Freeze(fact.dim, f"{view} takes its steps from the range of what control flow makes"))

    def _silence(self, view: View, fact: Contracts) -> None:
        """Finds the constants that silence one of the activations that are multiplied."""
        for dim in fact.dims:
            found = self.silencers.of(dim) if self.is_live(dim) else None
            if found:
                self.silencing.update(found)
                return
        why = f"{view} sums products of activations over it, and none of them can be silenced where it is made"
        for dim in fact.dims:
            self._freeze(Freeze(dim, why))

    def _flaw(self, flaw: Flaw) -> None:
        if self.is_live(flaw.dim) and (not flaw.comparable or flaw.dim in self.coupling.sizes):
            self.coupling.register(flaw.dim, self.net.shapes[flaw.dim.tensor][flaw.dim.axis])
            self.coupling.flaws.append(flaw)

    def _has_shapes(self, view: View) -> bool:
        """Whether the shapes of all tensors are known; sequences of tensors have none."""
        names = [t.name for t in [*view.node.inputs, *view.node.outputs] if t.name]
        return all(n in self.net.shapes or self._is_sequence(n) for n in names)

    def _is_sequence(self, name: str) -> bool:
        maker = self.net.producer.get(name)
        return maker is not None and self.net.nodes[maker].op in SEQUENCES

    def is_live(self, dim: Dim) -> bool:
        """Whether channels can lie on this axis: it stems from a weight. Axes of size 1 have nothing to give."""
        if dim.tensor not in self.net.shapes or self.net.shapes[dim.tensor][dim.axis] < 2:
            return False
        return dim in self.live or dim.tensor in self.net.initializers

    def _spread(self, view: View, ties: list[Tie]) -> None:
        """Makes the outputs live that a live axis is tied to, then records the ties; one with a dead axis freezes."""
        outputs = {t.name for t in view.node.outputs}
        for _ in range(2):  # a second round for outputs that are tied to each other, as in a grouped convolution
            for t in ties:
                for known, new in ((t.a, t.b), (t.b, t.a)):
                    if self.is_live(known) and new.tensor in outputs and self.net.shapes[new.tensor][new.axis] > 1:
                        self.live.add(new)
        for t in ties:
            a, b = self.is_live(t.a), self.is_live(t.b)
            for dim in (t.a, t.b):
                if self.is_live(dim):
                    self.coupling.register(dim, self.net.shapes[dim.tensor][dim.axis])
            if a and b:
                self.coupling.ties.append(t)
            elif a or b:
                dim, other, positions = (t.a, t.b, t.ia) if a else (t.b, t.a, t.ib)
                why = self.origins.told.get(other.tensor, f"{view} ties it to {other.tensor}, which has no channels to cut")
                self.coupling.freezes.append(Freeze(dim, why, positions))

    def _freeze(self, freeze: Freeze) -> None:
        if not self.is_live(freeze.dim):
            return
        self.coupling.register(freeze.dim, self.net.shapes[freeze.dim.tensor][freeze.dim.axis])
        self.coupling.freezes.append(freeze)

    def _freeze_unmentioned(self, view: View, mentioned: set[Dim], why: str) -> None:
        for name in self.net.reads(view.index):
            if name not in self.net.shapes:
                continue
            captured = name in self.net.captured[view.index]
            reason = f"a subgraph reads it, and {why}" if captured else why
            uses = ["", *(f"{view.index}.{i}" for i, t in enumerate(view.node.inputs) if t.name == name)]
            for axis in range(len(self.net.shapes[name])):
                dims = [Dim(name, axis, use) for use in uses]
                if captured or not any(d in mentioned for d in dims):
                    self.unmentioned.extend(Freeze(d, reason) for d in dims)

    def _pin_numbers(self, view: View, looked_after: int | None) -> None:
        """A size that is used as a number (a scale, a divisor) would change with a cut: it becomes a constant then."""
        traced = bool(view.node.outputs) and view.node.outputs[0].name in self.symbols.entries
        if traced or self.symbols.indifferent(view.index):
            return
        for position, tensor in enumerate(view.node.inputs):
            if position == looked_after or not (dims := self.symbols.sizes_in(tensor.name)):
                continue
            if handed_out(self.net.model.graph.node[view.index], position):
                self.unmentioned.extend(Freeze(d, f"{view} hands out its size") for d in dims)
            elif self.symbols.partly(tensor.name):
                self.unmentioned.extend(Freeze(d, f"{view} computes with its size", remedy=UNSTEADY) for d in dims)
            else:
                self.pins.append(Pin(view.index, position, dims, self.symbols.number(tensor.name)))
        for name in self.net.captured[view.index]:
            why = f"a subgraph of {view} computes with its size"
            self.unmentioned.extend(Freeze(d, why) for d in self.symbols.sizes_in(name))

    def _freeze_unsteady(self) -> None:
        """What depends on more than the number of channels cannot become a constant: its axes are frozen."""
        steady = []
        for pin in self.pins:
            if any(d in self.coupling.sizes for d in pin.dims):
                if all(self.net.steady(d.tensor, d.axis) for d in pin.dims):
                    steady.append(pin)
                    continue
                node = View(self.net, self.symbols, pin.index, self.is_live)
                why = f"{node} computes with its size"
                self.unmentioned.extend(Freeze(d, why, remedy=UNSTEADY) for d in pin.dims)
        self.pins = steady

    # ------------------------------------------------------------------------------------------ whole graph

    def freeze_outputs(self) -> None:
        self._freeze_unsteady()
        for name in self.net.outputs:
            for axis in range(len(self.net.shapes.get(name, ()))):
                self.unmentioned.append(Freeze(Dim(name, axis), f"it is graph output '{name}'"))
            for entry in self.symbols.entries.get(name, []):
                self.unmentioned.extend(Freeze(d, f"graph output '{name}' is its size") for d in sizes(entry))
        # Only axes that some rule has coupled: the others cannot be cut anyhow.
        self.coupling.freezes.extend(f for f in self.unmentioned if f.dim in self.coupling.sizes)

    def _freeze_poles(self) -> None:
        """What the mask sets to 0 must not be divided by."""
        zeroed = [d for d, role in self.roles.items() if role == "consumer" and d.tensor in self.net.initializers]
        for freeze in poles(self.net, self.node_ties, dict.fromkeys([*zeroed, *self.silencing, *self.ranged])):
            self._freeze(freeze)

    def finish(self, components: Components) -> Groups:
        names = {layer.out: layer.name for layer in reversed(self.layers)}
        groups = components.groups(names)
        for dim in self.silencing:
            if self.roles.get(dim) != "consumer":
                self.roles[dim] = "silencer"
        roles = {d: self.roles.get(d, "scale") for d in components.dims if d.tensor in self.net.initializers}
        return Groups(self.net, groups, tuple(self.layers), roles, tuple(self.pins), frozenset(self.ranged))
