"""Models as exporters write them, spelt in ONNX's text format, and what the tests of their quirks ask of the package."""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx
import oracle
from onnx import helper, numpy_helper

from onnxprune import runtime
from onnxprune.channels import ChannelGroup
from onnxprune.graph import Network
from onnxprune.groups import Groups
from onnxprune.passes.group import group
from onnxprune.passes.validate import QUANTISED

Array: TypeAlias = np.ndarray[Any, Any]
Weight: TypeAlias = tuple[int, ...] | Array | Sequence[int] | float
IMAGE = "float[1,3,6,6] x"


def filled(name: str, shape: Sequence[int], dtype: Any = np.float32) -> Array:
    """Random numbers that depend on the name and the shape alone, of a size that keeps activations near 1."""
    rng = np.random.default_rng(zlib.crc32(f"{name}{tuple(shape)}".encode()))
    return (rng.standard_normal(shape) / np.sqrt(max(1, np.prod(shape[1:])))).astype(dtype)


def arrays(weights: Mapping[str, Weight]) -> dict[str, Array]:
    """A tuple is a shape to fill, a list are int64 values, a number is a float32 scalar; arrays are taken as they are."""
    made: dict[str, Array] = {}
    for name, value in weights.items():
        if isinstance(value, tuple):
            made[name] = filled(name, value)
        elif isinstance(value, list):
            made[name] = np.array(value, np.int64)
        elif isinstance(value, float):
            made[name] = np.array(value, np.float32)
        else:
            made[name] = np.asarray(value)
    return made


def norm(name: str, channels: int) -> dict[str, Array]:
    """Scale, shift, mean and variance of a BatchNormalization, called NAME_s, NAME_b, NAME_m and NAME_v."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    values = (rng.uniform(0.5, 1.5, channels), *rng.standard_normal((2, channels)) / 2, rng.uniform(0.5, 1.5, channels))
    return {f"{name}_{k}": v.astype(np.float32) for k, v in zip("sbmv", values, strict=True)}


def mentioned(text: str, weights: Mapping[str, Weight]) -> dict[str, Weight]:
    """Those of the weights that the text names."""
    words = set(re.findall(r"\w+", text))
    return {k: v for k, v in weights.items() if k in words}


def net(
    body: str,
    weights: Mapping[str, Weight] | None = None,
    *,
    x: str = IMAGE,
    y: str = "y",
    opset: int = 17,
    ir: int = 8,
    domains: str = "",
    functions: str = "",
) -> onnx.ModelProto:
    """A model out of the nodes in `body`; the shapes of the outputs `y` are those that ONNX Runtime finds.

    domains: further imports, as '"name" : 1'. functions: local functions, in the text format.
    """
    imports = ", ".join(d for d in (f'"" : {opset}', domains) if d)
    outputs = ", ".join(f"float {name}" for name in y.split())
    text = f"<ir_version: {ir}, opset_import: [{imports}]>\nexported ({x}) => ({outputs}) {{\n{body}\n}}\n{functions}"
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in arrays(weights or {}).items())
    return declared(model)


def declared(model: onnx.ModelProto) -> onnx.ModelProto:
    """Writes the types and shapes of the outputs into the model."""
    results = runtime.run(runtime.session(model, optimise=False, threads=1), feeds(model))
    for value, result in zip(model.graph.output, results, strict=True):
        kind = helper.np_dtype_to_tensor_dtype(result.dtype)
        value.CopyFrom(helper.make_tensor_value_info(value.name, kind, result.shape))
    return model


def feeds(model: onnx.ModelProto, seed: int = 0) -> dict[str, Array]:
    """Random inputs; unknown sizes are 2 for the batch and 6 elsewhere."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for value in runtime.graph_inputs(model):
        shape = [d or (6 if i else 2) for i, d in enumerate(runtime.input_shape(value))]
        dtype = runtime.input_dtype(value)
        made[value.name] = (rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 2, shape)).astype(dtype)
    return made


def analysed(model: onnx.ModelProto) -> Groups:
    return group(runtime.probe(model, feeds(model)))


# ---- what became of the channels


def at(groups: Groups, tensor: str, axis: int = 1) -> list[ChannelGroup]:
    """The groups on an axis; none where no channel reaches it."""
    return list({g.id: g for d, found in groups.at.items() if (d.tensor, d.axis) == (tensor, axis) for g, _ in found}.values())


def free(groups: Groups, tensor: str, axis: int = 1) -> int:
    """How many channels of an axis can go, each by itself."""
    return sum(g.size for g in at(groups, tensor, axis) if not g.frozen)


def why(groups: Groups, tensor: str, axis: int = 1) -> str:
    """Why an axis is frozen; asserts that all of it is, for one reason."""
    reasons = {g.reason for g in at(groups, tensor, axis)}
    assert len(reasons) == 1 and None not in reasons, reasons
    return str(reasons.pop())


def sizes(groups: Groups) -> list[int]:
    return [g.size for g in groups.prunable]


def holds(groups: Groups, rounds: int = 3) -> onnx.ModelProto:
    """Asserts that there is something to cut, and that the oracle holds for half, one, all but one of each group's channels."""
    assert groups.prunable, [g.reason for g in groups.groups]
    model = groups.net.source
    rounded = any(g.flaw is not None and g.flaw.kind == "rounding" for g in groups.prunable)
    tolerance = QUANTISED if rounded else oracle.TOLERANCE
    for seed in range(rounds):
        rng = np.random.default_rng(seed)
        for fraction in (0.0, {g.id: 1 - 1 / g.size for g in groups.prunable}, 0.5):
            pruned = oracle.check(model, feeds(model, seed), oracle.keep(groups, fraction, rng), groups, tolerance).pruned
    return pruned


def right_or_frozen(model: onnx.ModelProto, tensor: str, axis: int, *words: str) -> None:
    """Asserts that an axis is either cut rightly or frozen for a reason that has one of the words."""
    groups = analysed(model)
    frozen = [g.reason for g in at(groups, tensor, axis) if g.reason]
    assert free(groups, tensor, axis) or frozen
    assert all(any(word in reason for word in words) for reason in frozen), frozen
    if groups.prunable:
        holds(groups)


def cut(groups: Groups, tensor: str, gone: Sequence[int], axis: int = 1) -> onnx.ModelProto:
    """The model without the channels at the positions `gone` of an axis, after the oracle's approval."""
    lost: dict[str, set[int]] = {}
    dim = next(d for d in groups.at if (d.tensor, d.axis) == (tensor, axis))
    found, which, channel = groups.channel_ids(dim)
    for p in gone:
        lost.setdefault(found[which[p]].id, set()).add(int(channel[p]))
    kept = {name: [c for c in range(groups.by_id[name].size) if c not in channels] for name, channels in lost.items()}
    return oracle.check(groups.net.source, feeds(groups.net.source), oracle.only(groups, kept), groups).pruned


# ---- what the pruned file holds


def stored(model: onnx.ModelProto) -> dict[str, Array]:
    """The value of every constant of a file: initializers and outputs of Constant nodes."""
    return {name: numpy_helper.to_array(t) for name, t in Network(model, {}, {}).initializers.items()}


def maker(model: onnx.ModelProto, tensor: str) -> onnx.NodeProto:
    """The node that makes a tensor."""
    return next(n for n in model.graph.node if tensor in n.output)


def operand(model: onnx.ModelProto, tensor: str, position: int) -> Array:
    """The constant that the maker of `tensor` reads at an input position."""
    return stored(model)[maker(model, tensor).input[position]]


def attribute(model: onnx.ModelProto, tensor: str, name: str) -> Any:
    """An attribute of the maker of `tensor`; None where it has none of that name."""
    return next((helper.get_attribute_value(a) for a in maker(model, tensor).attribute if a.name == name), None)


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    """The declared sizes, names where they are symbolic."""
    return [d.dim_value if d.HasField("dim_value") else d.dim_param for d in value.type.tensor_type.shape.dim]
