"""Tiny ONNX models for the tests, spelt out node by node, and what it takes to calibrate them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune import runtime
from onnxprune.data import InputSpec, Samples, open_data
from onnxprune.groups import Groups
from onnxprune.passes.group import group

Array = np.ndarray[Any, Any]
Node = tuple[Any, ...]  # operator, "inputs", "outputs", {attributes}; the node is called like its first output


def model(
    nodes: Sequence[Node],
    inputs: Mapping[str, Sequence[int | str]],
    outputs: str,
    weights: Mapping[str, Array] | None = None,
    dtype: Any = np.float32,
) -> onnx.ModelProto:
    """A model of opset 17; all floating-point tensors are of `dtype`, names are separated by blanks."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    protos = []
    for op, reads, makes, *attributes in nodes:
        names = ["" if name == "-" else name for name in reads.split()]
        protos.append(helper.make_node(op, names, makes.split(), makes.split()[0], **(attributes[0] if attributes else {})))
    arrays = {k: v if v.dtype.kind in "iub" else v.astype(dtype) for k, v in (weights or {}).items()}
    graph = helper.make_graph(
        protos,
        "net",
        [helper.make_tensor_value_info(name, kind, list(shape)) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs.split()],
        [numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def grouped(net: onnx.ModelProto) -> Groups:
    """The channel groups of a model."""
    return group(runtime.probe(net))


def samples(net: onnx.ModelProto, *arrays: Array) -> Samples:
    """Sample data for all inputs of a model, in their order."""
    values = runtime.graph_inputs(net)
    specs = [InputSpec(v.name, runtime.input_dtype(v), runtime.input_shape(v)) for v in values]
    return open_data({v.name: a for v, a in zip(values, arrays, strict=True)}, specs)


def run(net: onnx.ModelProto, x: Array, *tensors: str) -> list[Array]:
    """The values of any tensors of a model with one input."""
    session = runtime.session(runtime.with_outputs(net, tensors))
    return runtime.run(session, {runtime.graph_inputs(net)[0].name: x}, tensors)


def unit(channels: int, rank: int) -> Array:
    """The weight of a convolution that hands its input on, [C, C, 1, ...] with `rank` spatial axes."""
    return np.eye(channels).reshape(channels, channels, *(1 for _ in range(rank)))


def convnet(rng: np.random.Generator, dtype: Any = np.float32) -> onnx.ModelProto:
    """Conv(3 -> 8) BatchNormalization Relu Conv(8 -> 6, stride 2) Relu Flatten Gemm(-> 5) on [N, 3, 6, 6]."""
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)),
        "b1": rng.standard_normal(8),
        "scale": rng.uniform(0.5, 1.5, 8) * rng.choice([-1, 1], 8),
        "shift": rng.standard_normal(8),
        "mean": rng.standard_normal(8),
        "var": rng.uniform(1.0, 9.0, 8),
        "w2": rng.standard_normal((6, 8, 3, 3)),
        "b2": rng.standard_normal(6),
        "w3": rng.standard_normal((5, 54)),
        "b3": rng.standard_normal(5),
    }
    nodes = [
        ("Conv", "in w1 b1", "c1", {"pads": [1, 1, 1, 1]}),
        ("BatchNormalization", "c1 scale shift mean var", "n1"),
        ("Relu", "n1", "a1"),
        ("Conv", "a1 w2 b2", "c2", {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
        ("Relu", "c2", "a2"),
        ("Flatten", "a2", "f"),
        ("Gemm", "f w3 b3", "out", {"transB": 1}),
    ]
    return model(nodes, {"in": ["N", 3, 6, 6]}, "out", weights, dtype)


def residual(rng: np.random.Generator) -> onnx.ModelProto:
    """Two convolutions whose outputs are added, so that their filters live and die together; a third one reads the sum."""
    weights = {
        "wa": rng.standard_normal((7, 3, 3, 3)),
        "ba": rng.standard_normal(7),
        "wb": rng.standard_normal((7, 7, 1, 1)),
        "bb": rng.standard_normal(7),
        "wc": rng.standard_normal((4, 7, 3, 3)),
    }
    nodes = [
        ("Conv", "in wa ba", "a", {"pads": [1, 1, 1, 1]}),
        ("Relu", "a", "ra"),
        ("Conv", "ra wb bb", "b"),
        ("Add", "a b", "sum"),
        ("Relu", "sum", "rs"),
        ("Conv", "rs wc", "out"),
    ]
    return model(nodes, {"in": ["N", 3, 5, 5]}, "out", weights)
