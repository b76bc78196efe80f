"""Pass `group`: which channels live and die together, by running every operator's rule once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from onnxprune.channels import Components, Coupling, Dim, Freeze, Tie
from onnxprune.graph import Array, Network
from onnxprune.groups import Groups
from onnxprune.rules import STANDARD, Consumer, Fresh, Layer, MustEqual, Reads, RuleTable, View, Ways
from onnxprune.rules.reshape import SHAPE_OPERANDS
from onnxprune.symbolic import Symbols, evaluate, sizes

TRIALS = 8
# Operators that make zero slices of the zero slices of all their operands.
KEEP_ZEROS = {"Cast", "Concat", "Flatten", "Gather", "GatherND", "Identity", "Mul", "Neg", "Reshape", "Slice", "Split"}
KEEP_ZEROS |= {"Squeeze", "Transpose", "Unsqueeze"}


def group(net: Network, rules: RuleTable = STANDARD) -> Groups:
    """Channel groups of a network; whatever no rule explains is frozen, with the reason.

    Linear in the size of the graph. The rules run in topological order, so that each knows which axes channels reach. Where
    a node could follow the channels along one of several axes, and the first choice ends frozen, the next one is tried.
    """
    symbols = Symbols(net)
    first = _Analysis(net, rules, symbols, {})
    best = first.run()
    if stuck := first.stuck():
        other = _Analysis(net, rules, symbols, dict.fromkeys(stuck, 1)).run()
        if _reach(other) > _reach(best):
            return other
    return best


def _reach(groups: Groups) -> int:
    """How many layer axes, weighted by their channels, lie in groups that can be pruned."""
    free = {g.id for g in groups.prunable}
    axes = [d for layer in groups.layers for d in (layer.x, layer.out)]
    return sum(g.size * per for d in axes for g, per in groups.at.get(d, []) if g.id in free)


class _Analysis:
    def __init__(self, net: Network, rules: RuleTable, symbols: Symbols, ways: Mapping[int, int]) -> None:
        self.net, self.rules = net, rules
        self.symbols = symbols
        self.ways = ways
        self.forks: dict[int, list[Tie]] = {}
        self.coupling = Coupling()
        self.live: set[Dim] = set()
        self.origin: dict[str, str] = {i.name: f"it comes from graph input '{i.name}'" for i in net.inputs}
        self.unmentioned: list[Freeze] = []
        self.roles: dict[Dim, str] = {}
        self.musts: list[MustEqual] = []
        self.layers: list[Layer] = []
        self.node_ties: list[tuple[int, list[Tie]]] = []

    def run(self) -> Groups:
        for index in self.net.order:
            self.visit(index)
        self.freeze_outputs()
        self.components = self.coupling.solve()
        self.freeze_late(self.components)
        return self.finish(self.components)

    def stuck(self) -> list[int]:
        """The nodes that had a choice of axes and whose choice ended frozen."""
        reasons, components = self.components.reasons, self.components
        return [
            index
            for index, ties in self.forks.items()
            if any(t.a in components.offset and all(int(c) in reasons for c in np.unique(components.of(t.a))) for t in ties)
        ]

    # ------------------------------------------------------------------------------------------- one node

    def visit(self, index: int) -> None:
        node = self.net.model.graph.node[index]
        if node.op_type == "Constant" and not node.input:
            return
        view = View(self.net, self.symbols, index, self.is_live, self.ways.get(index, 0))
        domain = "" if node.domain == "ai.onnx" else node.domain
        rule = self.rules.get((domain, node.op_type))
        known = rule is not None and self._has_shapes(view)
        facts = list(rule.ties(view)) if rule is not None and known else []
        if rule is not None and known and rule.layers is not None:
            self.layers.extend(rule.layers(view))
        self.live.update(f.dim for f in facts if isinstance(f, Fresh))
        ties = [f for f in facts if isinstance(f, Tie)]
        mentioned = {d for t in ties for d in (t.a, t.b)} | {f.dim for f in facts if isinstance(f, Freeze | Reads)}
        self._spread(view, ties)
        freezes = [f for f in facts if isinstance(f, Freeze)]
        freezes += [
            Freeze(f.dim, f"{view} has a weight that no constant silences: it is computed, and not by moving or scaling one")
            for f in facts
            if isinstance(f, Consumer) and not silenceable(self.net, f.dim.tensor)
        ]
        for freeze in freezes:
            if self.is_live(freeze.dim):
                self._freeze(freeze)
        self.roles.update({f.dim: "consumer" for f in facts if isinstance(f, Consumer)})
        self.musts.extend(f for f in facts if isinstance(f, MustEqual))
        self.node_ties.append((index, ties))
        if any(isinstance(f, Ways) and f.count > 1 for f in facts):
            self.forks[index] = ties
        why = (
            f"{view} mixes its positions"
            if known
            else f"operator {node.domain or 'ai.onnx'}::{node.op_type} ('{view.label}') has no rule"
        )
        self._freeze_unmentioned(view, mentioned, why)
        origin = self._origin(view) if known else why
        for name in node.output:
            self.origin.setdefault(name, origin)
        self._freeze_numbers(view, SHAPE_OPERANDS.get(view.op) if known else None)

    def _origin(self, view: View) -> str:
        """Why no channels lie on an axis that a known operator makes: as none lie on what it reads, or it is the first."""
        for tensor in view.node.inputs:
            if tensor.name in self.origin and tensor.name not in self.net.fixed:
                if any(self.is_live(Dim(tensor.name, axis)) for axis in range(len(self.net.shapes[tensor.name]))):
                    break
                return self.origin[tensor.name]
        return f"{view} makes it from no channels"

    def _has_shapes(self, view: View) -> bool:
        names = [t.name for t in [*view.node.inputs, *view.node.outputs] if t.name]
        return all(n in self.net.shapes for n in names)

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
                why = self.origin.get(other.tensor, f"{view} ties it to {other.tensor}, which has no channels to cut")
                self.coupling.freezes.append(Freeze(dim, why, positions))

    def _freeze(self, freeze: Freeze) -> None:
        self.coupling.register(freeze.dim, self.net.shapes[freeze.dim.tensor][freeze.dim.axis])
        self.coupling.freezes.append(freeze)

    def _freeze_unmentioned(self, view: View, mentioned: set[Dim], why: str) -> None:
        for name in self.net.reads(view.index):
            if name not in self.net.shapes:
                continue
            captured = name in self.net.captured[view.index]
            reason = f"a subgraph of {view} reads it" if captured else why
            for axis in range(len(self.net.shapes[name])):
                uses = [Dim(name, axis, f"{view.index}.{i}") for i, t in enumerate(view.node.inputs) if t.name == name]
                dims = [Dim(name, axis), *uses]
                if captured or not any(d in mentioned for d in dims):
                    self.unmentioned.extend(Freeze(d, reason) for d in dims)

    def _freeze_numbers(self, view: View, looked_after: int | None) -> None:
        """A size that is used as a number (a scale, a divisor) would change with a cut: such axes are frozen."""
        if view.node.outputs and view.node.outputs[0].name in self.symbols.entries:
            return
        read = [t.name for position, t in enumerate(view.node.inputs) if position != looked_after]
        for name in [*read, *self.net.captured[view.index]]:
            if name not in self.net.initializers:
                for entry in self.symbols.entries.get(name, []):
                    self.unmentioned.extend(Freeze(d, f"{view} computes with its size") for d in sizes(entry))

    # ------------------------------------------------------------------------------------------ whole graph

    def freeze_outputs(self) -> None:
        for name in self.net.outputs:
            for axis in range(len(self.net.shapes.get(name, ()))):
                self.unmentioned.append(Freeze(Dim(name, axis), f"it is graph output '{name}'"))
            for entry in self.symbols.entries.get(name, []):
                self.unmentioned.extend(Freeze(d, f"graph output '{name}' is its size") for d in sizes(entry))
        # Only axes that some rule has coupled: the others cannot be cut anyhow.
        self.coupling.freezes.extend(f for f in self.unmentioned if f.dim in self.coupling.sizes)

    def freeze_late(self, components: Components) -> None:
        """Freezes what shape arithmetic would get wrong, by trying random cuts until nothing more is found wrong.

        Every other trial gives the channels random widths instead, under which two sums of sizes that may differ do differ,
        however few the channels are.
        """
        rng = np.random.default_rng(0)
        changed = True
        while changed:
            changed = False
            for trial in range(TRIALS):
                widths = rng.integers(0, 1000 if trial % 2 else 2, components.count)
                widths[list(components.reasons)] = 1
                changed |= self._check_musts(components, widths)

    def _check_musts(self, components: Components, widths: Array) -> bool:
        def size(dim: Dim) -> int:
            return int(widths[components.of(dim)].sum()) if dim in components.offset else self.net.shapes[dim.tensor][dim.axis]

        changed = False
        for must in self.musts:
            if evaluate(must.entry, size) != size(must.dim):
                for dim in (must.dim, *sizes(must.entry)):
                    if dim in components.offset:
                        changed |= components.freeze(dim, f"the size of {must.dim} is computed in a way that a cut would break")
        return changed

    def finish(self, components: Components) -> Groups:
        for layer in self.layers:
            self._mark_producer(layer)
        self._roles_through_constants()
        order = list(self.coupling.sizes)
        names = {layer.out: layer.name for layer in reversed(self.layers)}
        groups = components.groups(names, order)
        roles = {d: self.roles.get(d, "scale") for d in order if d.tensor in self.net.initializers}
        return Groups(self.net, groups, tuple(self.layers), roles)

    def _mark_producer(self, layer: Layer) -> None:
        node = self.net.nodes[layer.index]
        for position, tensor in enumerate(node.inputs):
            if tensor.name in self.net.fixed:
                for axis in range(len(self.net.shapes.get(tensor.name, ()))):
                    for dim in (Dim(tensor.name, axis), Dim(tensor.name, axis, f"{layer.index}.{position}")):
                        self.roles.setdefault(dim, "producer")

    def _roles_through_constants(self) -> None:
        """A weight behind Transpose or Identity has the role of what comes out at the far end."""
        for index, ties in reversed(self.node_ties):
            node = self.net.model.graph.node[index]
            if node.output and node.output[0] in self.net.fixed:
                outputs = set(node.output)
                for t in ties:
                    for inner, outer in ((t.a, t.b), (t.b, t.a)):
                        if outer.tensor in outputs and inner.tensor not in outputs and outer in self.roles:
                            self.roles[inner] = self.roles[outer]


def silenceable(net: Network, tensor: str) -> bool:
    """Whether zeroing slices of the constants that `tensor` is made of zeroes slices of `tensor`."""
    if tensor in net.initializers:
        return True
    if tensor not in net.producer:
        return False
    maker = net.model.graph.node[net.producer[tensor]]
    return (maker.op_type in KEEP_ZEROS or _symmetric(net, maker)) and all(silenceable(net, x) for x in _values(maker))


def _symmetric(net: Network, node: onnx.NodeProto) -> bool:
    """A DequantizeLinear without a zero point, or with zeros for it, turns 0 into 0."""
    if node.op_type != "DequantizeLinear":
        return False
    point = net.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    return len(node.input) < 3 or not node.input[2] or (point is not None and not np.any(point))


def _values(node: onnx.NodeProto) -> list[str]:
    """The inputs of a data movement or a product that are data, not indices or shapes."""
    return list(node.input) if node.op_type in ("Concat", "Mul") else list(node.input[:1])
