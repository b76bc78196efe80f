"""Whether TensorRT would take a model, as far as the table of operators and what is public of its parser tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx

from onnxprune.control import bodies
from onnxprune.trt import quantised, restrictions
from onnxprune.trt.facts import NAMES, Facts, Finding, label
from onnxprune.trt.operators import NEWEST_OPSET, OLDEST_OPSET, TAKEN, TYPES, verdict

# The input whose type the table's types are of, where it is not the first.
_OPERAND = {"OneHot": 2, "Where": 1}
_OWN_TYPES = {*quantised.PAIR, "Cast", "CastLike", "Constant", "ConstantOfShape", "If", "Loop", "Scan"}


def check(facts: Facts, *, plugins: bool = False) -> list[Finding]:
    """All findings of a model, node by node. plugins: whether the user has a plugin for what is no operator of ONNX."""
    found = [*_model(facts)]
    for node in facts.nodes():
        found += _node(facts, node, plugins)
    return found


def counted(facts: Facts) -> dict[str, int]:
    """How many nodes of each operator there are, by "domain::name", or the name alone for ONNX's own."""
    count: dict[str, int] = {}
    for node in facts.nodes():
        name = f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type
        count[name] = count.get(name, 0) + 1
    return dict(sorted(count.items()))


def _model(facts: Facts) -> Iterator[Finding]:
    newest = NEWEST_OPSET.get(facts.version[0])
    if newest is not None and facts.opset > newest:
        yield Finding("unknown", f"operator set {facts.opset} is newer than {newest}, the newest that is listed", "the model")
    if facts.opset < OLDEST_OPSET:
        yield Finding(
            "unknown", f"operator set {facts.opset} is older than {OLDEST_OPSET}, the oldest that is listed", "the model"
        )
    for value in [*facts.inputs, *facts.model.graph.output]:
        if not value.type.HasField("tensor_type"):
            yield Finding("refused", "sequences, maps and optionals are not listed", value.name)
            continue
        kind = NAMES.get(value.type.tensor_type.elem_type, "undefined")
        if kind == "double":
            yield Finding("warning", "double is computed as float32", value.name)
        elif kind not in TYPES and kind != "undefined":
            yield Finding("refused", f"{kind} is not a type that is listed", value.name)
    if any(g.sparse_initializer for g in facts.graphs):
        yield Finding("unknown", "sparse initializers are not in the table", "the model")


def _node(facts: Facts, node: onnx.NodeProto, plugins: bool) -> list[Finding]:
    said = verdict(node.domain, node.op_type, facts.version)
    name = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
    if said.status != "taken":
        own = plugins and node.domain not in ("", "ai.onnx")
        return [Finding("unknown" if own else said.status, f"{name} {said.why}", label(node), "" if own else said.hint)]
    found = [*_weights(facts, node), *restrictions.findings(facts, node)]
    if node.op_type in quantised.PAIR:
        return [*found, *quantised.findings(facts, node)]
    return [*found, *_operand(facts, node)]


def _operand(facts: Facts, node: onnx.NodeProto) -> Iterator[Finding]:
    """Whether the type that a node computes in is listed for it."""
    position = _OPERAND.get(node.op_type, 0)
    if node.op_type in _OWN_TYPES or bodies(node) or position >= len(node.input):
        return
    kind = facts.kind(node.input[position])
    if kind is None or kind in TAKEN[node.op_type]:
        return
    if kind == "double":
        yield Finding("warning", f"{node.op_type} of double is computed in float32", label(node))
    elif kind not in TYPES:
        yield Finding("refused", f"{node.op_type} of {kind}: no type of tensors that is listed", label(node))
    else:
        yield Finding(
            "unknown", f"{node.op_type} of {kind} is not listed, only of {', '.join(TAKEN[node.op_type])}", label(node)
        )


def _weights(facts: Facts, node: onnx.NodeProto) -> Iterator[Finding]:
    """Constants of types that TensorRT does not have, or has only behind a DequantizeLinear."""
    for name in node.input:
        kind = facts.kind(name) if name in facts.constants else None
        if kind is not None and kind not in TYPES:
            yield Finding(
                "refused", f"{node.op_type} reads a constant of {kind}: no type of tensors that is listed", label(node)
            )


def summary(found: list[Finding]) -> list[dict[str, Any]]:
    """The findings in JSON, those that say the same of several nodes together, refusals first."""
    grouped: dict[tuple[str, str, str], list[str]] = {}
    for finding in found:
        grouped.setdefault((finding.severity, finding.what, finding.hint), []).append(finding.where)
    order = {"refused": 0, "unknown": 1, "warning": 2}
    rows = sorted(grouped.items(), key=lambda item: order[item[0][0]])
    return [
        {"severity": severity, "what": what, "hint": hint, "where": list(dict.fromkeys(where))}
        for (severity, what, hint), where in rows
    ]
