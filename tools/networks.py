"""The five networks that calibration is measured on, with random weights (batch norms folded), written with onnx alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class Net:
    """A graph that grows: every method appends nodes to the tensor named first and returns the name of what they make."""

    def __init__(self, size: int) -> None:
        self.size, self.nodes, self.weights = size, [], []  # type: ignore[var-annotated]
        self.rng = np.random.default_rng(0)

    def constant(self, value: Any) -> str:
        self.weights.append(numpy_helper.from_array(value, f"w{len(self.weights)}"))
        return str(self.weights[-1].name)

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [f"t{len(self.nodes)}"], f"{op}_{len(self.nodes)}", **attributes))
        return str(self.nodes[-1].output[0])

    def conv(self, x: str, i: int, o: int, k: int, stride: int = 1, groups: int = 1, gain: float = 2.0) -> str:
        fan = i // groups * k * k
        w = self.rng.standard_normal((o, i // groups, k, k), np.float32) * np.float32((gain / fan) ** 0.5)
        bias = self.rng.normal(0, 0.1, o).astype(np.float32)
        attributes = {"strides": [stride] * 2, "pads": [k // 2] * 4, "kernel_shape": [k, k], "group": groups}
        return self.node("Conv", x, self.constant(w), self.constant(bias), **attributes)

    def relu(self, x: str, six: bool = False) -> str:
        if six:
            return self.node("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))
        return self.node("Relu", x)

    def add(self, x: str, y: str) -> str:
        return self.node("Add", x, y)

    def classifier(self, x: str, i: int, o: int) -> onnx.ModelProto:
        x = self.node("Flatten", self.node("GlobalAveragePool", x))
        w = self.rng.standard_normal((o, i), np.float32) * np.float32(i**-0.5)
        y = self.node("Gemm", x, self.constant(w), self.constant(np.zeros(o, np.float32)), transB=1)
        ends = [
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s)]
            for n, s in (("x", ["N", 3, self.size, self.size]), (y, ["N", o]))
        ]
        graph = helper.make_graph(self.nodes, "net", *ends, self.weights)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def resnet20() -> onnx.ModelProto:
    net, width = Net(32), 16
    x = net.relu(net.conv("x", 3, 16, 3))
    for o, stride in [(16, 1)] * 3 + [(32, 2)] + [(32, 1)] * 2 + [(64, 2)] + [(64, 1)] * 2:
        y = net.conv(net.relu(net.conv(x, width, o, 3, stride)), o, o, 3, gain=0.5)
        x, width = net.relu(net.add(y, x if o == width else net.conv(x, width, o, 1, stride, gain=1))), o
    return net.classifier(x, width, 10)


def vgg16() -> onnx.ModelProto:
    net, width, x = Net(32), 3, "x"
    for o, count in [(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]:
        for _ in range(count):
            x, width = net.relu(net.conv(x, width, o, 3)), o
        x = net.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    return net.classifier(x, width, 10)


def resnet50() -> onnx.ModelProto:
    net, width = Net(224), 64
    x = net.node("MaxPool", net.relu(net.conv("x", 3, 64, 7, 2)), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    for o, count, first in [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)]:
        for i in range(count):
            stride = first if i == 0 else 1
            y = net.relu(net.conv(net.relu(net.conv(x, width, o, 1)), o, o, 3, stride))
            y = net.conv(y, o, 4 * o, 1, gain=0.5)
            x, width = net.relu(net.add(y, x if i else net.conv(x, width, 4 * o, 1, stride, gain=1))), 4 * o
    return net.classifier(x, width, 1000)


def _inverted(stages: list[tuple[int, int, int, int, int]], stem: int, last: int) -> onnx.ModelProto:
    """stages: (expansion, channels, how many, first stride, kernel)."""
    net, width = Net(224), stem
    x = net.relu(net.conv("x", 3, stem, 3, 2), six=True)
    for expand, o, count, first, k in stages:
        for i in range(count):
            stride, wide = first if i == 0 else 1, expand * width
            y = net.relu(net.conv(x, width, wide, 1), six=True) if expand > 1 else x
            y = net.conv(net.relu(net.conv(y, wide, wide, k, stride, wide), six=True), wide, o, 1, gain=1)
            x, width = net.add(x, y) if stride == 1 and o == width else y, o
    return net.classifier(net.relu(net.conv(x, width, last, 1), six=True), last, 1000)


def mobilenet_v2() -> onnx.ModelProto:
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    return _inverted([(*s, 3) for s in stages], 32, 1280)


def efficientnet_lite0() -> onnx.ModelProto:
    stages = [(1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3)]
    return _inverted([*stages, (6, 112, 3, 1, 5), (6, 192, 4, 2, 5), (6, 320, 1, 1, 3)], 32, 1280)


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "resnet20": resnet20,
    "vgg16": vgg16,
    "mobilenet_v2": mobilenet_v2,
    "efficientnet_lite0": efficientnet_lite0,
    "resnet50": resnet50,
}
