"""Small models around one operator, and what a rule made of it: what the tests of rules are written in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
from axes import owner
from onnx import TensorProto, helper, numpy_helper

from onnxprune import runtime
from onnxprune.groups import Groups
from onnxprune.passes.group import group

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(11)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same weights, whichever tests ran before it."""
    RNG.bit_generator.state = np.random.default_rng(11).bit_generator.state


# ---- small models: nodes are (operator, "inputs", "outputs", {attributes}) and are named like their first output


def w(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def proto(op: str, reads: str, makes: str, attributes: Mapping[str, Any] | None = None) -> onnx.NodeProto:
    names, made = (["" if name == "-" else name for name in text.split()] for text in (reads, makes))
    attributes = dict(attributes or {})
    domain = attributes.pop("domain", "")
    return helper.make_node(op, names, made, makes.split(maxsplit=1)[0], domain=domain, **attributes)


def build(
    nodes: Sequence[tuple[Any, ...]],
    weights: Mapping[str, Array] | None = None,
    outputs: str = "y",
    opset: int = 18,
    x: Sequence[int] = (1, 3, 6, 6),
    ir: int = 8,
) -> Groups:
    """The groups of a model with input `x` that starts with a convolution 'a' of 8 filters, which all rules may use."""
    arrays = {"wa": w(8, x[1], *[1] * (len(x) - 2)), **(weights or {})}
    protos = [proto(*n) for n in [("Conv", "x wa", "a"), *nodes]]
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))]
    if ir < 4:
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in constants]
    made = [onnx.ValueInfoProto(name=name) for name in outputs.split()]
    graph = helper.make_graph(protos, "net", inputs, made, constants)
    domains = sorted({p.domain for p in protos} - {""})
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=ir)
    values = runtime.run(runtime.session(model, optimise=False, threads=1), {"x": w(*x)})
    for declared, value in zip(model.graph.output, values, strict=True):
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        declared.CopyFrom(helper.make_tensor_value_info(declared.name, kind, value.shape))
    return group(runtime.probe(model))


def holds(groups: Groups, rounds: int = 3) -> onnx.ModelProto:
    """Asserts that there is something to cut and that the oracle holds for half, for one channel and for all but one."""
    assert groups.prunable
    feeds = {"x": w(*groups.net.shapes["x"])}
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        for fraction in (0.5, 0.0):
            oracle.check(groups.net.model, feeds, oracle.keep(groups, fraction, rng), groups)
        nearly = {g.id: 1 - 1 / g.size for g in groups.prunable}
        pruned = oracle.check(groups.net.model, feeds, oracle.keep(groups, nearly, rng), groups).pruned
    return pruned


def cut(groups: Groups, where: str, positions: Sequence[int]) -> onnx.ModelProto:
    """The model without the channels at these positions of "tensor.axis", after the oracle's approval."""
    gone: dict[str, set[int]] = {}
    for p in positions:
        g, channel = owner(groups, f"{where}[{p}]")
        gone.setdefault(g.id, set()).add(channel)
    kept = {name: [i for i in range(groups.by_id[name].size) if i not in lost] for name, lost in gone.items()}
    feeds = {"x": w(*groups.net.shapes["x"])}
    return oracle.check(groups.net.model, feeds, oracle.only(groups, kept), groups).pruned


def node(model: onnx.ModelProto, name: str) -> onnx.NodeProto:
    return next(n for n in model.graph.node if n.name == name)


def attribute(model: onnx.ModelProto, name: str, key: str) -> Any:
    return next((helper.get_attribute_value(a) for a in node(model, name).attribute if a.name == key), None)


def operand(model: onnx.ModelProto, name: str, position: int) -> list[int]:
    """A constant input of a node, as a list."""
    wanted = node(model, name).input[position]
    return next(numpy_helper.to_array(t).tolist() for t in model.graph.initializer if t.name == wanted)


def shape(model: onnx.ModelProto, tensor: str) -> tuple[int, ...]:
    return next(tuple(t.dims) for t in model.graph.initializer if t.name == tensor)


LAST = ("Conv", "b wl", "y")
FLAT = [("Reshape", "a sf", "f")]  # [1, 8, 36]
