"""Small networks as whole files have them (names, value_info, metadata), sample data, and counting that trusts nobody."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from PIL import Image

Array = np.ndarray[Any, Any]


class Net:
    """Builds a model node by node; every method returns the name of the tensor that it makes."""

    def __init__(self, seed: int = 0, dtype: Any = np.float32) -> None:
        self.rng = np.random.default_rng(seed)
        self.dtype = np.dtype(dtype)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.wide: dict[str, int] = {"x": 3}

    def weight(self, name: str, value: Array) -> str:
        self.weights.append(numpy_helper.from_array(value.astype(self.dtype), name))
        return name

    def node(self, op: str, reads: list[str], channels: int, **attributes: Any) -> str:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, reads, [out], f"{op}_{len(self.nodes)}", **attributes))
        self.wide[out] = channels
        return out

    def conv(self, x: str, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> str:
        number, inner = len(self.nodes), self.wide[x] // groups
        shape = (out, inner, kernel, kernel)
        w = self.weight(f"w{number}", self.rng.standard_normal(shape) / np.sqrt(inner * kernel * kernel))
        b = self.weight(f"b{number}", 0.1 * self.rng.standard_normal(out))
        pads = [kernel // 2] * 4
        return self.node("Conv", [x, w, b], out, pads=pads, strides=[stride] * 2, kernel_shape=[kernel] * 2, group=groups)

    def norm(self, x: str) -> str:
        number, n = len(self.nodes), self.wide[x]
        values = {
            "scale": self.rng.uniform(0.5, 1.5, n),
            "shift": 0.1 * self.rng.standard_normal(n),
            "mean": 0.1 * self.rng.standard_normal(n),
            "var": self.rng.uniform(0.5, 1.5, n),
        }
        return self.node("BatchNormalization", [x, *(self.weight(f"{k}{number}", v) for k, v in values.items())], n)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], self.wide[x])

    def block(self, x: str, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> str:
        return self.relu(self.norm(self.conv(x, out, kernel, stride, groups)))

    def add(self, a: str, b: str) -> str:
        return self.node("Add", [a, b], self.wide[a])

    def concat(self, *parts: str) -> str:
        return self.node("Concat", list(parts), sum(self.wide[p] for p in parts), axis=1)

    def classify(self, x: str, classes: int = 10) -> str:
        n = self.wide[x]
        flat = self.node("Flatten", [self.node("GlobalAveragePool", [x], n)], n)
        w = self.weight("fc.w", self.rng.standard_normal((classes, n)) / np.sqrt(n))
        b = self.weight("fc.b", 0.1 * self.rng.standard_normal(classes))
        return self.node("Gemm", [flat, w, b], classes, transB=1)

    def model(self, out: str, *, batch: int | str = "N", opset: int = 17, size: int = 8) -> onnx.ModelProto:
        """The network with output `out`, called `scores`."""
        kind = helper.np_dtype_to_tensor_dtype(self.dtype)
        for node in self.nodes:
            node.output[:] = ["scores" if name == out else name for name in node.output]
        graph = helper.make_graph(
            self.nodes,
            "small",
            [helper.make_tensor_value_info("x", kind, [batch, 3, size, size])],
            [helper.make_tensor_value_info("scores", kind, [batch, self.wide[out]])],
            self.weights,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4 if opset < 10 else 8)
        model.producer_name = "the tests"
        helper.set_model_props(model, {"author": "somebody", "classes": "ten"})
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def chain(seed: int = 0, dtype: Any = np.float32, *, batch: int | str = "N", opset: int = 17) -> onnx.ModelProto:
    """Conv-BN-Relu three times, pooling, Gemm: 16, 24 and 32 filters."""
    net = Net(seed, dtype)
    out = net.classify(net.block(net.block(net.block("x", 16), 24, stride=2), 32))
    return net.model(out, batch=batch, opset=opset)


def residual(seed: int = 0) -> onnx.ModelProto:
    """A block with an identity shortcut, and a strided one with a projection."""
    net = Net(seed)
    stem = net.block("x", 16)
    first = net.relu(net.add(net.norm(net.conv(net.block(stem, 20), 16)), stem))
    projection = net.norm(net.conv(first, 32, kernel=1, stride=2))
    second = net.relu(net.add(net.norm(net.conv(net.block(first, 24, stride=2), 32)), projection))
    return net.model(net.classify(second))


def dense(seed: int = 0) -> onnx.ModelProto:
    """Every convolution reads all that was made before it (DenseNet); normalisation before the convolution."""
    net = Net(seed)
    features = net.conv("x", 16)
    for _ in range(3):
        new = net.conv(net.relu(net.norm(net.conv(net.relu(net.norm(features)), 24, kernel=1))), 12)
        features = net.concat(features, new)
    return net.model(net.classify(net.block(features, 32, kernel=1, stride=2)))


def depthwise(seed: int = 0) -> onnx.ModelProto:
    """Inverted residual blocks: widen, filter channel by channel, narrow."""
    net = Net(seed)
    x = net.block("x", 16)
    for stride in (1, 2):
        inner = net.block(net.block(x, 48, kernel=1), 48, stride=stride, groups=48)
        narrow = net.norm(net.conv(inner, 16 * stride, kernel=1))
        x = net.add(narrow, x) if stride == 1 else narrow
    return net.model(net.classify(net.block(x, 40, kernel=1)))


NETS = {"chain": chain, "residual": residual, "dense": dense, "depthwise": depthwise}


def images(count: int = 48, seed: int = 1, dtype: Any = np.float32, size: int = 8) -> Array:
    """Random inputs [count, 3, size, size]."""
    return np.random.default_rng(seed).standard_normal((count, 3, size, size)).astype(dtype)


def write(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


# --------------------------------------------------------------------------- counting, without the package's help


def count_macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of Conv and Gemm for one sample, from ONNX's own shape inference."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    copy.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 1
    del copy.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(copy, strict_mode=True)
    known = [*inferred.graph.value_info, *inferred.graph.output]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in known}
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += int(np.prod(weights[node.input[1]])) * int(np.prod(shapes[node.output[0]][2:]))
        elif node.op_type == "Gemm":
            total += int(np.prod(weights[node.input[1]]))
    return total


def count_params(model: onnx.ModelProto) -> int:
    """Elements of all floating-point weights."""
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return sum(int(np.prod(t.dims)) for t in model.graph.initializer if t.data_type in kinds)


def picture(path: Path, pixels: Array) -> None:
    """Writes [H, W, 3] bytes as a PNG."""
    Image.fromarray(pixels).save(path)
