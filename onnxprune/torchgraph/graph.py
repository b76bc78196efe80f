"""The interpreter: runs the nodes of a model one after another in torch."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper

from onnxprune import inline, weights
from onnxprune.errors import ModelError
from onnxprune.graph import Array, Network
from onnxprune.torchgraph import elementwise, linear, norm, pool, recurrent, reduce, resize, shape
from onnxprune.torchgraph.base import Node, Table, Tensor, table

KNOWN: Table = table(
    elementwise.FUNCTIONS,
    linear.FUNCTIONS,
    norm.FUNCTIONS,
    pool.FUNCTIONS,
    recurrent.FUNCTIONS,
    reduce.FUNCTIONS,
    resize.FUNCTIONS,
    shape.FUNCTIONS,
)
OLDEST = 7  # the opset that brought today's broadcasting


def unknown(model: onnx.ModelProto) -> list[str]:
    """The operators of a model that no function here computes, sorted."""
    return sorted({_key(n) for n in model.graph.node} - KNOWN.keys())


def tensor(value: Array) -> Tensor:
    """A NumPy array as a tensor of its own memory; half precision becomes single."""
    plain = np.asarray(value)
    if plain.dtype.kind in "fV" and plain.dtype.itemsize < 4:
        plain = plain.astype(np.float32)
    if plain.dtype.kind == "u" and plain.dtype != np.uint8:
        plain = plain.astype(np.int64)
    return torch.tensor(np.ascontiguousarray(plain).reshape(plain.shape))


class TorchGraph:
    """A model that runs in torch.

    trainable: names of constants that become `parameters`, leaves of the graph of gradients. functions: what to compute
    some operators by instead, e.g. batch norm with statistics of the batch. device: where; integers that come from
    constants and shapes stay on the CPU.
    Raises ModelError where the model has operators that are not `KNOWN`, which it names.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        trainable: Collection[str] = (),
        *,
        functions: Table | None = None,
        device: str = "cpu",
    ) -> None:
        require(model)
        net = Network(model, {}, {})
        self.device = torch.device(device)
        self.inputs = [v.name for v in net.inputs]
        self.outputs = net.outputs
        self.parameters: dict[str, Tensor] = {
            name: self._placed(tensor(weights.array(net.initializers[name]))).requires_grad_() for name in trainable
        }
        self._functions = {**KNOWN, **(functions or {})}
        self._constants = {
            name: self._placed(tensor(weights.array(t)))
            for name, t in net.initializers.items()
            if name not in self.parameters and t.data_type != onnx.TensorProto.STRING
        }
        self._plans: dict[tuple[str, ...], tuple[list[Node], list[list[str]]]] = {}
        opsets = {o.domain.replace("ai.onnx", ""): o.version for o in model.opset_import}
        nodes = [_node(model.graph.node[i], opsets, net.label(i)) for i in net.order]
        self._nodes = self._folded([n for n in nodes if n.op != "Constant" or n.makes[0] not in net.initializers])

    def _placed(self, value: Tensor) -> Tensor:
        return value.to(self.device) if value.dtype.is_floating_point else value

    def _folded(self, nodes: Iterable[Node]) -> list[Node]:
        """The nodes that have to run: others are computed once, as no input and no parameter reaches them."""
        left = []
        with torch.no_grad():
            for node in nodes:
                if node.op.startswith("Random") or not all(x in self._constants for x in node.reads if x):
                    left.append(node)
                else:
                    self._constants.update(self._computed(node, self._constants))
        return left

    def _computed(self, node: Node, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        operands = [values[x] if x else None for x in node.reads]
        try:
            made = self._functions[node.op](node, *operands)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            text = " ".join(str(error).split())[:200]
            raise ModelError(f"node '{node.label}' ({node.op}) does not run in torch: {text}") from error
        parts = made if isinstance(made, tuple) else (made,)
        return {name: part for name, part in zip(node.makes, parts, strict=False) if name}

    def run(self, feeds: Mapping[str, Tensor], wanted: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The tensors `wanted` (by default the outputs) for inputs by name, with gradients where torch records them.

        Raises ModelError, which names the node, where something cannot be computed.
        """
        asked = list(self.outputs if wanted is None else wanted)
        nodes, last = self._plan(tuple(asked))
        values: dict[str, Tensor] = {**self._constants, **self.parameters, **{k: feeds[k] for k in self.inputs}}
        for i, node in enumerate(nodes):
            values.update(self._computed(node, values))
            for name in last[i]:
                del values[name]
        return {name: values[name] for name in asked}

    def _plan(self, asked: tuple[str, ...]) -> tuple[list[Node], list[list[str]]]:
        """(the nodes that `asked` needs, for each of them the tensors that nobody reads after it)."""
        if asked not in self._plans:
            needed, nodes = set(asked), []
            for node in reversed(self._nodes):
                if needed.intersection(node.makes):
                    nodes.append(node)
                    needed.update(node.reads)
            nodes.reverse()
            held = {*self._constants, *self.parameters, *asked, ""}
            last: list[list[str]] = [[] for _ in nodes]
            for i in range(len(nodes) - 1, -1, -1):
                last[i] = list(dict.fromkeys(x for x in (*nodes[i].reads, *nodes[i].makes) if x not in held))
                held.update(last[i])
            self._plans[asked] = (nodes, last)
        return self._plans[asked]


def require(model: onnx.ModelProto) -> None:
    """Raises ModelError for a model that cannot be run in torch, as far as its operators tell."""
    missing = unknown(model)
    if missing:
        hint = "fine-tuning runs the graph in torch, which knows the usual operators only"
        raise ModelError(f"the model has operators that cannot be trained through: {', '.join(missing)}", hint=hint)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    if opset < OLDEST:
        raise ModelError(
            f"the model is of opset {opset}, which cannot be trained through", hint=f"convert it to {OLDEST} or later"
        )
    if model.graph.sparse_initializer:
        raise ModelError("the model has sparse initializers, which cannot be trained through")


def _key(node: onnx.NodeProto) -> str:
    domain = "" if node.domain == "ai.onnx" else node.domain
    return f"{domain}:{node.op_type}" if domain else str(node.op_type)


def _node(node: onnx.NodeProto, opsets: Mapping[str, int], label: str) -> Node:
    attributes: dict[str, Any] = {}
    for a in node.attribute:
        value = helper.get_attribute_value(a)
        attributes[a.name] = tensor(weights.array(value)) if isinstance(value, onnx.TensorProto) else value
    if node.op_type == "Constant" and (held := inline.constant_value(node)) is not None:
        attributes["value"] = tensor(weights.array(held))
    domain = "" if node.domain == "ai.onnx" else node.domain
    return Node(_key(node), opsets.get(domain, 1), attributes, tuple(node.input), tuple(node.output), label)
