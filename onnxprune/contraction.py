"""Every linear operator in one normal form: a convolution of [n, I, *space] with [O, I, *taps] and no bias.

Gemm and MatMul become convolutions with one tap over their rows; grouped convolutions become one contraction a group.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxprune import runtime
from onnxprune.channels import ChannelGroup, Index
from onnxprune.graph import Array, Network
from onnxprune.groups import Groups
from onnxprune.rules import Layer, Packed, Steps, einsum
from onnxprune.weights import references

CONVOLUTIONS = ("Conv", "ConvInteger", "ConvTranspose", "FusedConv", "QLinearConv")
CONV_ATTRIBUTES = ("strides", "pads", "dilations", "auto_pad", "output_padding", "output_shape")


@dataclass(frozen=True, eq=False)
class Contraction:
    """One linear map; x [n, I, *space] float32, w [O, I, *taps] float32 (ConvTranspose: [I, O, *taps])."""

    x: Array
    w: Array
    transposed: bool = False
    attributes: Mapping[str, Any] = field(default_factory=dict)
    positions: Index = field(default_factory=lambda: np.empty(0, np.int64))  # of the layer's channel axis, for each of I


@dataclass(frozen=True, eq=False)
class Units:
    """The channels of one group on one channel axis: `positions[u]` are those of the group's channel u. [U, m]"""

    group: ChannelGroup
    positions: Index


def dequantised(value: Array, steps: Steps | Packed | None, parameters: Mapping[str, Array]) -> Array:
    """What the integers stand for, float32; `parameters` has the scale and the zero point. Floats come back as they are."""
    if steps is None:
        return value
    if isinstance(steps, Packed):
        return _unpacked(value, steps, parameters)
    made = value.astype(np.float32)
    if steps.zero:
        made -= _aligned(parameters[steps.zero], value.shape, steps.axes)
    return made * _aligned(parameters[steps.scale], value.shape, steps.axes) if steps.scale else made


def _aligned(parameter: Array, shape: tuple[int, ...], axes: tuple[int, ...]) -> Array:
    """A scale or zero point as float32, laid along the axes that it has an entry for."""
    if parameter.size == 1:
        return parameter.astype(np.float32).reshape(())
    return parameter.astype(np.float32).reshape([n if axis in axes else 1 for axis, n in enumerate(shape)])


def silent_value(groups: Groups, tensor: str) -> Array:
    """What silences a slice of a constant, laid along its axes: its zero point where it is a quantised weight, else 0."""
    net = groups.net
    readings = [layer.steps for layer in groups.layers if layer.weight == tensor and isinstance(layer.steps, Steps)]
    for index, position in net.uses.get(tensor, ()):
        node = net.model.graph.node[index]
        if node.op_type == "DequantizeLinear" and position == 0 and len(node.input) > 2:
            readings.append(Steps("", node.input[2], (net.nodes[index].attrs.get("axis", 1) % len(net.shapes[tensor]),)))
    for steps in readings:
        zero = net.array(steps.zero) if steps.zero else None
        if zero is not None:
            return _aligned(zero, net.shapes[tensor], steps.axes)
    return np.zeros((), np.float32)


def _unpacked(value: Array, packed: Packed, parameters: Mapping[str, Array]) -> Array:
    """The weight [N, K] of a packed one."""
    rows, blocks = value.shape[0], value.shape[1]
    zero: Array = np.array(1 << (packed.bits - 1), np.float32)
    if packed.zero:
        stored = parameters[packed.zero].reshape(rows, -1)
        zero = _numbers(stored, packed.bits)[:, :blocks, None] if stored.dtype == np.uint8 else stored[:, :, None]
    levels = _numbers(value, packed.bits) - zero
    scaled = levels * parameters[packed.scale].astype(np.float32).reshape(rows, blocks, 1)
    return np.asarray(scaled.reshape(rows, -1)[:, : packed.k], np.float32)


def _numbers(packed: Array, bits: int) -> Array:
    """The numbers of `bits` bits that lie in the bytes of the last axis, lowest bits first, as float32."""
    ones = np.unpackbits(packed, axis=-1, bitorder="little")
    return (ones.reshape(*packed.shape[:-1], -1, bits) @ (1 << np.arange(bits))).astype(np.float32)


def parameter_names(steps: Iterable[Steps | Packed | None]) -> list[str]:
    """The scales and zero points that `dequantised` needs, each once."""
    return list(dict.fromkeys(name for s in steps if s is not None for name in (s.scale, s.zero) if name))


def weight_values(net: Network, layers: Iterable[Layer]) -> WeightValues:
    """The value of every layer's weight, integers dequantised. Layers whose weight is computed at run time are left out."""
    fixed = [layer for layer in layers if layer.weight in net.fixed]
    mapped = {x.weight for x in fixed if x.weight in net.initializers and _read_anew(net, x)}
    names = [x.weight for x in fixed if x.weight not in mapped] + parameter_names(layer.steps for layer in fixed)
    return WeightValues(net, fixed, runtime.fixed_values(net, dict.fromkeys(names)))


def _read_anew(net: Network, layer: Layer) -> bool:
    """Whether a weight need not be kept: it is in a file, or in the model as it stands."""
    return layer.steps is None or bool(references(net.initializers[layer.weight]))


class WeightValues(Mapping[Layer, Array]):
    """Values of weights by layer; those that the model has as they stand are read anew for everybody who asks, and not kept."""

    def __init__(self, net: Network, layers: Sequence[Layer], found: Mapping[str, Array]) -> None:
        self._net, self._layers, self._found = net, dict.fromkeys(layers), found
        self._held: dict[tuple[str, Steps | Packed | None], Array] = {}

    def __getitem__(self, layer: Layer) -> Array:
        if layer not in self._layers:
            raise KeyError(layer)
        if layer.weight not in self._found:
            value = self._net.array(layer.weight)
            assert value is not None
            return dequantised(value, layer.steps, self._found)
        key = (layer.weight, layer.steps)
        if key not in self._held:
            self._held[key] = dequantised(self._found[layer.weight], layer.steps, self._found)
        return self._held[key]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)


def consumers(groups: Groups) -> list[Layer]:
    """The layers that sum over channels of at least one group that can be pruned."""
    prunable = {g.id for g in groups.prunable}
    return [layer for layer in groups.layers if layer.sums and any(g.id in prunable for g, _ in groups.at.get(layer.x, []))]


def units(groups: Groups, layer: Layer) -> list[Units]:
    """The prunable channels that `layer` sums over, by group."""
    found = []
    for group, slot in groups.at.get(layer.x, []):
        if not group.frozen:
            order = np.argsort(slot.channels, kind="stable")
            found.append(Units(group, slot.positions[order].reshape(group.size, -1)))
    return found


def normal_form(groups: Groups, layer: Layer, x: Array, w: Array) -> Iterator[Contraction]:
    """The contractions that make up `layer`, given what it reads and the value of its weight (or other activation)."""
    x, w = x.astype(np.float32, copy=False), w.astype(np.float32, copy=False)
    if layer.op in CONVOLUTIONS:
        yield from _convolution(groups, layer, x, w)
    elif layer.op == "DeformConv":
        yield from _sampled(groups, layer, x, w)
    elif layer.op in einsum.PRODUCTS:
        for rows, weight in einsum.contracted(groups.net, layer, x, w):
            yield Contraction(rows, weight, positions=np.arange(rows.shape[1]))
    elif layer.other is not None:
        yield from _products(layer.x.axis, x, layer.other.axis, w)
    elif groups.net.nodes[layer.index].attrs.get("alpha", 1.0):  # a Gemm with alpha 0 makes nothing of what it reads
        assert layer.w is not None
        channels = x.shape[layer.x.axis]
        by_sample = np.moveaxis(x, layer.x.axis, 1)
        matrix = np.moveaxis(w, layer.w.axis, -1).reshape(-1, channels)
        rows = np.ascontiguousarray(by_sample.reshape(by_sample.shape[0], channels, -1))  # [samples, I, rows of a sample]
        yield Contraction(rows, np.ascontiguousarray(matrix)[:, :, None], positions=np.arange(channels))


def _sampled(groups: Groups, layer: Layer, x: Array, w: Array) -> Iterator[Contraction]:
    """A deformable convolution as if every tap were an output of its own, and read every position.

    It reads weighted means of positions, all channels at the same ones: where activations have one sign, no share of a
    channel in a sum of such means is larger than its largest share at a single tap and position, so that the sensitivities
    come out too large rather than too small. Where a mean cancels, they are estimates.
    """
    count = int(groups.net.nodes[layer.index].attrs.get("group", 1))
    width, rows = x.shape[1] // count, w.shape[0] // count
    flat = x.reshape(*x.shape[:2], -1)
    for g in range(count):
        positions = np.arange(g * width, (g + 1) * width)
        taps = np.moveaxis(w[g * rows : (g + 1) * rows], 1, -1).reshape(-1, width)
        yield Contraction(np.ascontiguousarray(flat[:, positions]), np.ascontiguousarray(taps)[:, :, None], positions=positions)


def stackable(groups: Groups, layer: Layer) -> bool:
    """Whether axis 0 of what the layer reads counts samples or rows, so that several runs can be joined along it."""
    if layer.x.axis == 0 or layer.other is not None:
        return False
    return layer.op not in einsum.PRODUCTS or einsum.rows_first(groups.net, layer)


def _products(a: int, x: Array, b: int, w: Array) -> Iterator[Contraction]:
    """x w' for every entry of the batch, in which w is another one each time. a, b: the summed axes.

    Where several heads of x share one of w (grouped queries) that one is repeated.
    """
    if x.ndim == w.ndim == 4 and 1 < w.shape[1] < x.shape[1]:
        w = np.repeat(w, x.shape[1] // w.shape[1], axis=1)
    rows, columns = np.moveaxis(x, a, -1), np.moveaxis(w, b, -1)
    batch = np.broadcast_shapes(rows.shape[:-2], columns.shape[:-2])
    rows, columns = (np.broadcast_to(v, (*batch, *v.shape[-2:])) for v in (rows, columns))
    positions = np.arange(rows.shape[-1])
    for entry in np.ndindex(*batch):
        left, right = np.ascontiguousarray(rows[entry].T)[None], np.ascontiguousarray(columns[entry])[:, :, None]
        yield Contraction(left, right, positions=positions)


def _convolution(groups: Groups, layer: Layer, x: Array, w: Array) -> Iterator[Contraction]:
    node = groups.net.nodes[layer.index]
    count = int(node.attrs.get("group", 1))
    x = np.moveaxis(x, layer.x.axis, 1)
    attributes = {k: node.attrs[k] for k in CONV_ATTRIBUTES if k in node.attrs}
    transposed = layer.op == "ConvTranspose"
    width = x.shape[1] // count
    rows = w.shape[0] // count
    for g in range(count):
        positions = np.arange(g * width, (g + 1) * width)
        part = w[g * rows : (g + 1) * rows]
        yield Contraction(x[:, positions] if count > 1 else x, part, transposed, attributes, positions)
