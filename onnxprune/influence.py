"""How far an error in what a layer makes moves the model's outputs, measured by running the model with such an error.

Layers differ by more than a factor of ten in this: a residual branch says little beside its stream, the last layer all.
White noise would not tell, as what follows averages it out: the error is made of the layer's own channels, mixed at random,
and so has their pattern over positions and samples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxprune import runtime
from onnxprune.graph import Array, Network
from onnxprune.rules import Layer

AMPLITUDE = 0.3  # of the error, relative to the standard deviation of every channel; about what cuts do
MIXED = 8  # channels that every channel's error is made of
RUNS = 4  # the runs that this may take in all, in those of the samples that there are
FEWEST, MOST = 8, 128


def samples_for(layers: int, samples: int) -> int:
    """How many of the samples to measure on: every layer takes a run of them."""
    return min(samples, int(np.clip(RUNS * samples // max(1, layers), FEWEST, MOST)))


def influences(
    net: Network,
    layers: Sequence[Layer],
    batches: Iterable[Mapping[str, Array]],
    *,
    seed: int = 0,
    providers: Sequence[str] | None = None,
) -> dict[Layer, float]:
    """For every layer the relative error (L2, about the mean over samples) of the outputs for one of its own of the same kind.

    A factor of 1 means that errors arrive as they are. Layers that cannot be reached (in a body, or that make integers) get the
    median of the others, and all get 1 where the model has no floating-point output that varies. Deterministic.
    """
    made = {o for node in net.source.graph.node for o in node.output if o}
    here = [layer for layer in layers if layer.out.tensor in made]
    tensors = list(dict.fromkeys(layer.out.tensor for layer in here))
    outputs = [o.name for o in net.source.graph.output]
    plain = runtime.session(runtime.with_outputs(net.source, [*outputs, *tensors]), providers=providers)
    noisy: Any = None
    rng = np.random.default_rng(seed)
    moved, size = np.zeros((len(here), len(outputs))), np.zeros(len(outputs))
    for batch in batches:
        names = list(dict.fromkeys([*outputs, *tensors]))
        found = dict(zip(names, runtime.run(plain, batch, names), strict=True))
        floats = {t: found[t] for t in tensors if found[t].dtype.kind == "f"}  # integers have no errors to be added
        noisy = noisy or runtime.session(_noised(net.source, floats), providers=providers)
        none = {_noise(t): np.zeros(1, value.dtype) for t, value in floats.items()}
        size += [_energy(found[o]) for o in outputs]
        for k, layer in enumerate(here):
            error = _error(found[layer.out.tensor], layer.out.axis, rng)
            if error is not None:
                after = runtime.run(noisy, {**batch, **none, _noise(layer.out.tensor): error}, outputs)
                moved[k] += [_distance(found[o], v) for o, v in zip(outputs, after, strict=True)]
    return _filled(layers, here, moved, size)


def _filled(layers: Sequence[Layer], here: Sequence[Layer], moved: Array, size: Array) -> dict[Layer, float]:
    varies = (size > 0) & np.isfinite(size) & np.isfinite(moved).all(0)
    if not varies.any() or not here:
        return dict.fromkeys(layers, 1.0)
    known = np.sqrt((moved[:, varies] / size[varies]).mean(1)) / AMPLITUDE
    positive = known[known > 0]
    usual = float(np.median(positive)) if len(positive) else 1.0
    found = {layer: float(v) for layer, v in zip(here, known, strict=True) if v > 0}
    return {layer: found.get(layer, usual) for layer in layers}


def _noise(tensor: str) -> str:
    return tensor + "/onnxprune.noise"


def _noised(model: onnx.ModelProto, values: Mapping[str, Array]) -> onnx.ModelProto:
    """A copy in which an input of its own is added to each of some tensors."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    nodes = []
    for node in model.graph.node:
        own = onnx.NodeProto()
        own.CopyFrom(node)
        nodes.append(own)
        for k, name in enumerate(own.output):
            if name in values:
                own.output[k] = name + "/onnxprune.exact"
                nodes.append(helper.make_node("Add", [own.output[k], _noise(name)], [name]))
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    for name, value in values.items():
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        copy.graph.input.append(helper.make_tensor_value_info(_noise(name), kind, None))
    return copy


def _error(value: Array, axis: int, rng: np.random.Generator) -> Array | None:
    """An error of the tensor's shape: every channel's is made of several others, about their means."""
    if value.dtype.kind != "f" or not value.ndim or not value.size:
        return None
    channels = np.moveaxis(value, axis, 0).astype(np.float32)
    flat = channels.reshape(len(channels), -1)
    flat = flat - flat.mean(1, keepdims=True)
    mixed = np.zeros_like(flat)
    for _ in range(min(MIXED, len(flat))):
        mixed += rng.choice((-1.0, 1.0), len(flat)).astype(np.float32)[:, None] * flat[rng.permutation(len(flat))]
    size = np.sqrt((mixed**2).mean(1, keepdims=True))
    mixed *= AMPLITUDE * flat.std(1, keepdims=True) / np.where(size > 0, size, 1)
    return np.asarray(np.moveaxis(mixed.reshape(channels.shape), 0, axis), value.dtype)


def _energy(value: Array) -> float:
    if not isinstance(value, np.ndarray) or value.dtype.kind != "f" or not value.size:
        return 0.0
    rows = value.reshape(len(value) if value.ndim else 1, -1).astype(np.float64)
    return float(((rows - (rows.mean(0) if len(rows) > 1 else rows.mean())) ** 2).sum())


def _distance(before: Array, after: Array) -> float:
    if not isinstance(before, np.ndarray) or before.dtype.kind != "f" or before.shape != after.shape:
        return 0.0
    return float(((before.astype(np.float64) - after) ** 2).sum())
