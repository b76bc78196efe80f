"""One linear layer by itself, as a small model of any width: what the tables of layer costs are measured on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune.graph import Network
from onnxprune.rules.base import Layer
from onnxprune.timing.models import Feeds

FILL = 0.01  # of weights: their values do not matter to a dense kernel


@dataclass(frozen=True)
class Spec:
    """A layer but for its widths: operator, attributes (serialised, in hexadecimal), shapes at full width, type, opset.

    x: shape of the activation in. w: of the weight. by: "pair" where it may have any numbers of channels in and out,
    "channel" where those in and out are the same ones (depthwise).
    """

    op: str
    attributes: tuple[str, ...]
    x: tuple[int, ...]
    w: tuple[int, ...]
    bias: bool
    dtype: str
    opset: int
    by: str

    @property
    def key(self) -> str:
        """A name for the disk cache."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:24]

    @property
    def inputs(self) -> int:
        """Channels in, at full width."""
        return self.x[self._axis]

    @property
    def outputs(self) -> int:
        """Channels out, at full width."""
        attributes = self._settings()
        if self.op == "Conv":
            return self.w[0]
        if self.op == "ConvTranspose":
            return self.w[1] * int(attributes.get("group", 1))
        return self.w[0] if attributes.get("transB") else self.w[-1]

    @property
    def _axis(self) -> int:
        return 1 if self.op in ("Conv", "ConvTranspose") else len(self.x) - 1

    def _settings(self) -> dict[str, Any]:
        protos = [onnx.AttributeProto.FromString(bytes.fromhex(a)) for a in self.attributes]
        return {a.name: helper.get_attribute_value(a) for a in protos}

    def model(self, inputs: int, outputs: int) -> tuple[onnx.ModelProto, Feeds]:
        """The layer with these numbers of channels in and out, and an input for it."""
        attributes = self._settings()
        if self.by == "channel":
            outputs, attributes["group"] = inputs * self.w[0] // self.inputs, inputs
        dtype = np.dtype(self.dtype)
        weights = [numpy_helper.from_array(np.full(self._weight(inputs, outputs, attributes), FILL, dtype), "w")]
        if self.bias:
            weights.append(numpy_helper.from_array(np.zeros(outputs, dtype), "b"))
        node = helper.make_node(self.op, ["x", *(t.name for t in weights)], ["y"], "layer", **attributes)
        shape = [*self.x]
        shape[self._axis] = inputs
        kind = helper.np_dtype_to_tensor_dtype(dtype)
        graph = helper.make_graph(
            [node],
            "layer",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("y", kind, None)],
            weights,
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=8)
        return made, {"x": np.random.default_rng(0).standard_normal(shape).astype(dtype)}

    def _weight(self, inputs: int, outputs: int, attributes: Mapping[str, Any]) -> tuple[int, ...]:
        if self.op == "Conv":
            return (outputs, 1 if self.by == "channel" else inputs, *self.w[2:])
        if self.op == "ConvTranspose":
            return (inputs, outputs, *self.w[2:])
        return (outputs, inputs) if attributes.get("transB") else (inputs, outputs)


def spec(net: Network, layer: Layer, shapes: Mapping[str, tuple[int, ...]]) -> Spec | None:
    """The layer's spec for activations of these shapes; None for what cannot be built by itself.

    That is whatever is not a floating-point Conv (in groups only where it is depthwise), ConvTranspose, Gemm or MatMul with
    a constant weight.
    """
    node = net.model.graph.node[layer.index]
    known = node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul") and node.domain in ("", "ai.onnx")
    if not known or (layer.w is None and node.op_type != "Conv"):
        return None
    x, w = node.input[0], node.input[1]
    if w not in net.initializers or net.kinds[w].kind != "f" or x in net.initializers or x not in shapes:
        return None
    group = next((a.i for a in node.attribute if a.name == "group"), 1)
    if any(a.name == "transA" and a.i for a in node.attribute) or (node.op_type == "MatMul" and len(net.shapes[w]) != 2):
        return None
    depthwise = node.op_type == "Conv" and group > 1 and group == shapes[x][1]
    if group > 1 and not depthwise:
        return None
    return Spec(
        node.op_type,
        tuple(sorted(a.SerializeToString(deterministic=True).hex() for a in node.attribute)),
        tuple(shapes[x]),
        tuple(net.shapes[w]),
        len(node.input) > 2 and bool(node.input[2]),
        str(net.kinds[w]),
        net.opset,
        "channel" if depthwise else "pair",
    )
