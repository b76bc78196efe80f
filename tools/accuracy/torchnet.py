"""An ONNX classifier as a torch module that Torch-Pruning can trace, and its pruned weights back in an ONNX file.

Two things differ from the file, and neither changes what it computes (`TorchNet` is compared with the file before use):

- A zero-padded shortcut (Slice, Slice, Pad: option A of He et al.) becomes a 1 x 1 convolution with stride 2 and a constant
  kernel of zeros and ones, since Torch-Pruning cannot trace padding of channels.
- Where the exporter has folded batch normalisation away, each convolution gets one that is the identity: its statistics
  are those of the calibration images, its scale and shift undo them. Without it there is nothing to re-estimate.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

EPSILON = 1e-5


class Selection(nn.Conv2d):
    """A shortcut that skips pixels and puts channels in the middle of more channels."""


class TorchNet(nn.Module):
    """The graph, node by node; `layers` and `norms` have the name of the layer's output, without dots and slashes."""

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        self.source = _simple(model)
        graph = self.source.graph
        self.constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
        self.layers, self.norms = nn.ModuleDict(), nn.ModuleDict()
        made = {n.output[0]: n for n in graph.node}
        for node in graph.node:
            key = _key(node.output[0])
            if node.op_type == "Conv":
                self.layers[key] = self._conv(node)
            elif node.op_type == "Gemm":
                weight, bias = (self.constants[name] for name in node.input[1:3])
                self.layers[key] = nn.Linear(weight.shape[1], weight.shape[0])
                _set(self.layers[key], weight=weight, bias=bias)
            elif node.op_type == "BatchNormalization":
                self.norms[_key(made[node.input[0]].output[0])] = self._norm(node)
            elif node.op_type == "Pad":
                self.layers[key] = self._selection(node, made)
        self.own_norms = bool(self.norms)
        self.eval()

    def _conv(self, node: onnx.NodeProto) -> nn.Conv2d:
        weight = self.constants[node.input[1]]
        a = {x.name: helper.get_attribute_value(x) for x in node.attribute}
        pads = a.get("pads", [0, 0, 0, 0])
        if pads[:2] != pads[2:]:
            raise NotImplementedError(f"{node.name}: padding {pads}")
        group, strides = a.get("group", 1), a.get("strides", [1, 1])
        biased = len(node.input) > 2
        conv = nn.Conv2d(
            weight.shape[1] * group,
            weight.shape[0],
            weight.shape[2:],
            tuple(strides),
            tuple(pads[:2]),
            groups=group,
            bias=biased,
        )
        _set(conv, weight=weight, **({"bias": self.constants[node.input[2]]} if biased else {}))
        return conv

    def _norm(self, node: onnx.NodeProto) -> nn.BatchNorm2d:
        scale, shift, mean, variance = (self.constants[name] for name in node.input[1:5])
        epsilon = next((a.f for a in node.attribute if a.name == "epsilon"), 1e-5)
        norm = nn.BatchNorm2d(len(scale), eps=epsilon)
        _set(norm, weight=scale, bias=shift, running_mean=mean, running_var=variance)
        return norm

    def _selection(self, node: onnx.NodeProto, made: dict[str, onnx.NodeProto]) -> Selection:
        pads = self.constants[node.input[1]]
        before, after = int(pads[1]), int(pads[5])
        channels = next(m for m in self.layers.values() if isinstance(m, nn.Conv2d)).out_channels
        for name, layer in self.layers.items():  # the stream's width: that of the last layer before, of the stage before
            if name == _key(self._stream(node, made)) and isinstance(layer, nn.Conv2d):
                channels = layer.out_channels
        conv = Selection(channels, before + channels + after, 1, 2, bias=False)
        weight = np.zeros(conv.weight.shape, np.float32)
        weight[before + np.arange(channels), np.arange(channels)] = 1
        _set(conv, weight=weight)
        return conv

    def _stream(self, node: onnx.NodeProto, made: dict[str, onnx.NodeProto]) -> str:
        """The output of the convolution that the padded tensor's channels come from."""
        while node.op_type != "Conv":
            node = made[node.input[0]]
        return str(node.output[0])

    def forward(self, x: Tensor) -> Tensor:
        held: dict[str, Tensor] = {self.source.graph.input[0].name: x}
        for node in self.source.graph.node:
            held[node.output[0]] = self._run(node, held)
        return held[self.source.graph.output[0].name]

    def _run(self, node: onnx.NodeProto, held: dict[str, Tensor]) -> Tensor:
        key, x = _key(node.output[0]), held.get(node.input[0])
        assert x is not None
        a = {y.name: helper.get_attribute_value(y) for y in node.attribute}
        match node.op_type:
            case "Conv":
                out = self.layers[key](x)
                return self.norms[key](out) if key in self.norms else out
            case "BatchNormalization" | "Slice":
                return x
            case "Pad" | "Gemm":
                return self.layers[key](x)
            case "Relu":
                return F.relu(x)
            case "Clip":
                low, high = (float(self.constants[name]) for name in node.input[1:3])
                return F.hardtanh(x, low, high)
            case "Add":
                return x + held[node.input[1]]
            case "Sub":
                return x - float(self.constants[node.input[1]])
            case "Div":
                return x / float(self.constants[node.input[1]])
            case "MaxPool":
                return F.max_pool2d(x, a["kernel_shape"], a["strides"])
            case "AveragePool":
                return F.avg_pool2d(x, a["kernel_shape"], a["strides"])
            case "GlobalAveragePool" | "ReduceMean":
                return x.mean((2, 3), keepdim=True)
            case "Flatten" | "Reshape":
                return x.flatten(1)
        raise NotImplementedError(f"{node.op_type} ({node.name})")

    @torch.no_grad()
    def insert_norms(self, x: Tensor) -> None:
        """Puts behind every convolution a batch norm that changes nothing, unless the network has its own."""
        if self.own_norms:
            return
        sums: dict[str, list[Any]] = {key: [] for key, m in self.layers.items() if type(m) is nn.Conv2d}
        hooks = [
            self.layers[key].register_forward_hook(
                lambda m, i, out, key=key: sums[key].append(
                    (out.double().mean((0, 2, 3)), out.double().square().mean((0, 2, 3)))
                )
            )
            for key in sums
        ]
        for part in x.split(128):
            self(part)
        for hook in hooks:
            hook.remove()
        for key, found in sums.items():
            mean, square = (torch.stack([f[i] for f in found]).mean(0) for i in (0, 1))
            variance = (square - mean.square()).clamp(min=0)
            norm = nn.BatchNorm2d(len(mean), eps=EPSILON)
            _set(norm, weight=(variance + EPSILON).sqrt(), bias=mean, running_mean=mean, running_var=variance)
            self.norms[key] = norm
        self.eval()

    @torch.no_grad()
    def reestimate(self, x: Tensor) -> None:
        """The statistics of all batch norms again, from these samples."""
        for norm in self.norms.values():
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all batches
        self.train()
        for part in x.split(128):
            self(part)
        self.eval()

    @torch.no_grad()
    def onnx(self) -> onnx.ModelProto:
        """The file with this module's weights; inserted batch norms are folded, selections are convolutions."""
        model = onnx.ModelProto()
        model.CopyFrom(self.source)
        graph, new, skipped = model.graph, dict(self.constants), 0
        renamed: dict[str, str] = {}
        nodes = []
        sizes = _sizes(self)
        for node in graph.node:
            key = _key(node.output[0])
            node.input[:] = [renamed.get(name, name) for name in node.input]
            if node.op_type == "Slice":
                renamed[node.output[0]] = node.input[0]
                continue
            if node.op_type == "Pad":
                layer = self.layers[key]
                name = f"selection_{key}"
                new[name] = layer.weight.numpy()
                made = helper.make_node("Conv", [node.input[0], name], [node.output[0]], name, strides=[2, 2])
                node.CopyFrom(made)
                skipped += layer.weight.numel() * sizes[key]
            elif node.op_type in ("Conv", "Gemm"):
                self._write(node, key, new)
            elif node.op_type == "BatchNormalization":
                norm = next(n for k, n in self.norms.items() if k == _key(node.input[0]))
                for name, value in zip(
                    node.input[1:5], (norm.weight, norm.bias, norm.running_mean, norm.running_var), strict=True
                ):
                    new[name] = value.numpy()
            elif node.op_type == "Reshape":
                new[node.input[1]] = np.array(
                    [-1, int(np.prod(next(reversed(self.layers.values())).weight.shape[1:]))], np.int64
                )
            nodes.append(node)
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(nodes)
        used = {name for node in nodes for name in node.input}
        graph.initializer.extend(numpy_helper.from_array(np.ascontiguousarray(v), k) for k, v in new.items() if k in used)
        helper.set_model_props(model, {"selection_macs": str(skipped)})
        onnx.checker.check_model(model)
        return model

    def _write(self, node: onnx.NodeProto, key: str, new: dict[str, Any]) -> None:
        layer = self.layers[key]
        weight, bias = layer.weight.double(), None if layer.bias is None else layer.bias.double()
        if key in self.norms and not self.own_norms:
            norm = self.norms[key]
            factor = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
            weight = weight * factor[:, None, None, None]
            bias = ((0 if bias is None else bias) - norm.running_mean.double()) * factor + norm.bias.double()
        new[node.input[1]] = weight.float().numpy()
        if bias is not None:
            new[node.input[2]] = bias.float().numpy()
        if isinstance(layer, nn.Conv2d):
            for attribute in node.attribute:
                if attribute.name == "group":
                    attribute.i = layer.groups


def _simple(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with the values of Constant nodes as initializers, none of them shared by two layers."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    constants = [n for n in copy.graph.node if n.op_type == "Constant"]
    for node in constants:
        value = next(a.t for a in node.attribute if a.name == "value")
        copy.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(value), node.output[0]))
        copy.graph.node.remove(node)
    values, seen = {i.name: i for i in copy.graph.initializer}, set()
    for node in copy.graph.node:
        for i, name in enumerate(node.input):
            if name in values and node.op_type in ("Conv", "Gemm", "BatchNormalization"):
                if name in seen:
                    own = f"{name}_{node.output[0]}"
                    copy.graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(values[name]), own))
                    node.input[i] = own
                seen.add(name)
    return copy


def _sizes(net: TorchNet) -> dict[str, int]:
    """Output positions of every selection."""
    found: dict[str, int] = {}
    hooks = [
        m.register_forward_hook(lambda m, i, out, key=key: found.__setitem__(key, out.shape[2] * out.shape[3]))
        for key, m in net.layers.items()
        if isinstance(m, Selection)
    ]
    net(example(net))
    for hook in hooks:
        hook.remove()
    return found


def example(net: TorchNet) -> Tensor:
    """One sample of random numbers."""
    dims = net.source.graph.input[0].type.tensor_type.shape.dim[1:]
    return torch.randn(1, *(d.dim_value for d in dims), generator=torch.Generator().manual_seed(0))


def _key(name: str) -> str:
    return name.replace(".", "_").replace("/", "_")


def _set(module: nn.Module, **values: Any) -> None:
    with torch.no_grad():
        for name, value in values.items():
            getattr(module, name).copy_(value if isinstance(value, Tensor) else torch.from_numpy(np.array(value)))
