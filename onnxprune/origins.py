"""Why no channels lie on an axis: what a frozen group is told when it is tied to one."""

from __future__ import annotations

from onnxprune.channels import Dim
from onnxprune.control import key
from onnxprune.graph import Network
from onnxprune.rules import RuleTable, View
from onnxprune.rules.frozen import REASONS


class Origins:
    """For every tensor where its axes come from that have no channels; filled while the analysis goes through the graph."""

    def __init__(self, net: Network, rules: RuleTable) -> None:
        self.net, self.rules = net, rules
        self.told: dict[str, str] = {i.name: f"it comes from graph input '{i.name}'" for i in net.inputs}
        self.split: dict[str, str] = {}

    def note(self, view: View, origin: str) -> None:
        """Remembers the origin of what a node makes."""
        for tensor in view.node.outputs:
            self.told.setdefault(tensor.name, origin)

    def note_split(self, view: View, here: bool) -> None:
        """Remembers up to the next layer that channels lie on one of two axes and can be followed along the other no more."""
        told = [f"{view} splits channels, which are followed along the other axis"] if here else []
        told += [self.split[t.name] for t in view.node.inputs if t.name in self.split]
        self.split.update((t.name, told[0]) for t in view.node.outputs if told)

    def of(self, view: View, mentioned: set[Dim]) -> str:
        """Why no channels lie on an axis that a known operator makes: as none lie on what it reads, or it is the first.

        mentioned: the axes of which its rule says anything; it mixes those of the others.
        """
        for tensor in view.node.outputs:
            if tensor.name in self.split:
                return self.split[tensor.name]
        for tensor in view.node.inputs:
            if tensor.name in self.told and tensor.name not in self.net.fixed:
                axes = [Dim(tensor.name, axis) for axis in range(len(self.net.shapes.get(tensor.name, ())))]
                live = {d for d in axes if view.live(d)}
                if live - mentioned:
                    return f"{view} mixes channels into it"
                if live:
                    break
                return self.told[tensor.name]
        return f"{view} makes it from no channels"

    def unknown(self, view: View) -> str:
        """Why a node tells nothing of its axes."""
        node = self.net.model.graph.node[view.index]
        if key(node) in self.net.inside.opaque:
            return f"{view} is not followed: {self.net.inside.opaque[key(node)]}"
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (domain, node.op_type) in REASONS and (domain, node.op_type) not in self.rules:
            return f"{view} {REASONS[domain, node.op_type]}"
        return f"operator {node.domain or 'ai.onnx'}::{node.op_type} ('{view.label}') has no rule"
