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

from onnxprune import runtime, wire
from onnxprune.control import captured
from onnxprune.graph import Array, Network
from onnxprune.rules import Layer

AMPLITUDE = 0.3  # of the error, relative to the standard deviation of every channel; about what cuts do
MIXED = 8  # channels that every channel's error is made of
RUNS = 4  # the runs that this may take in all, in those of the samples that there are
FEWEST, MOST = 8, 128
SESSIONS, SHARING = 8, 3  # at most so many sessions, of so many layers at least
MEMORY = 1 << 30  # bytes of weights in all of them, each having those that come behind its layers


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
    model, outputs = net.source, [o.name for o in net.source.graph.output]
    parts = _parts(model, list(dict.fromkeys(layer.out.tensor for layer in here)))
    tails = {t: tail for part in parts for tail in [_Tail(net, part, providers)] for t in part}
    names = list(dict.fromkeys([*outputs, *(n for tail in tails.values() for n in tail.reads)]))
    plain = runtime.session(runtime.with_outputs(model, names), providers=providers)
    rng = np.random.default_rng(seed)
    moved, size = np.zeros((len(here), len(outputs))), np.zeros(len(outputs))
    for batch in batches:
        found = dict(zip(names, runtime.run(plain, batch, names), strict=True))
        size += [_energy(found[o]) for o in outputs]
        for k, layer in enumerate(here):
            error = _error(found[layer.out.tensor], layer.out.axis, rng)
            if error is not None:
                after = tails[layer.out.tensor].run({**batch, **found}, layer.out.tensor, error)
                moved[k] += [_distance(found[o], after[o]) if o in after else 0.0 for o in outputs]
    return _filled(layers, here, moved, size)


def _parts(model: onnx.ModelProto, tensors: Sequence[str]) -> list[list[str]]:
    """The tensors in the order in which they are made, in parts each of which has a session of its own."""
    number = {o: i for i, node in enumerate(model.graph.node) for o in node.output if o}
    count = int(np.clip(MEMORY // max(1, wire.size(model)), 1, min(SESSIONS, -(-len(tensors) // SHARING) or 1)))
    ordered = sorted(tensors, key=number.__getitem__)
    return [[str(t) for t in part] for part in np.array_split(np.array(ordered, object), count) if len(part)]


class _Tail:
    """What errors in some tensors can reach of a model, as a model of its own: everything before them is run once only."""

    def __init__(self, net: Network, tensors: Sequence[str], providers: Sequence[str] | None) -> None:
        self._model, self._tensors, self._providers = net.source, tensors, providers
        self._session: Any = None
        graph = net.source.graph
        reads = [[x for x in n.input if x] + captured(n) for n in graph.node]
        reached = _reached(graph, reads, tensors)
        self._take(reached | _constant(graph, reads), reads)
        if not net.shapes.keys() >= set(self._given):  # sequences and the like are not handed over
            reached = set(range(len(graph.node)))
            self._take(reached, reads)
        within = {o for i in reached for o in graph.node[i].output}
        self._outputs = [o.name for o in graph.output if o.name in within or o.name in tensors]
        self.reads = list(dict.fromkeys([*tensors, *self._given]))

    def _take(self, nodes: set[int], reads: Sequence[Sequence[str]]) -> None:
        graph = self._model.graph
        self._nodes = sorted(nodes)
        self._used = {x for i in self._nodes for x in reads[i]}
        known = {o for i in self._nodes for o in graph.node[i].output}
        known |= {t.name for t in graph.initializer} | {v.name for v in graph.input}
        self._given = sorted((self._used | set(self._tensors)) - known)

    def run(self, values: Mapping[str, Array], tensor: str, error: Array) -> dict[str, Array]:
        """The outputs with an error in one of the tensors. values: the inputs, and what was made without any error."""
        floats = [t for t in self._tensors if values[t].dtype.kind == "f"]  # integers have no errors to be added
        if not self._outputs:
            return {}
        if self._session is None:
            self._session = runtime.session(self._proto(values, floats), providers=self._providers)
        none = {_noise(t): np.zeros(1, values[t].dtype) for t in floats}
        exact = {_exact(t): values[t] for t in floats}
        found = runtime.run(self._session, {**values, **exact, **none, _noise(tensor): error}, self._outputs)
        return dict(zip(self._outputs, found, strict=True))

    def _proto(self, values: Mapping[str, Array], floats: Sequence[str]) -> onnx.ModelProto:
        """The reached part, in which an input of its own is added to each of the tensors."""
        whole = self._model
        model = onnx.ModelProto(ir_version=whole.ir_version, opset_import=whole.opset_import, functions=whole.functions)
        graph = model.graph
        graph.name = "tail"
        for i in self._nodes:
            own = graph.node.add()
            own.CopyFrom(whole.graph.node[i])
            own.output[:] = [_exact(o) if o in floats else o for o in own.output]
        graph.node.extend(helper.make_node("Add", [_exact(t), _noise(t)], [t]) for t in floats)
        graph.initializer.extend(t for t in whole.graph.initializer if t.name in self._used)
        graph.sparse_initializer.extend(whole.graph.sparse_initializer)
        graph.input.extend(v for v in whole.graph.input if v.name in self._used)
        given = {(_exact(t) if t in floats else t): values[t] for t in self._given} | {_noise(t): values[t] for t in floats}
        for name, value in given.items():
            graph.input.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), None))
        graph.output.extend(onnx.ValueInfoProto(name=o) for o in self._outputs)
        return model


def _reached(graph: onnx.GraphProto, reads: Sequence[Sequence[str]], tensors: Iterable[str]) -> set[int]:
    """The nodes that read one of the tensors, or what such a node makes."""
    readers: dict[str, list[int]] = {}
    for i, names in enumerate(reads):
        for name in names:
            readers.setdefault(name, []).append(i)
    reached: set[int] = set()
    waiting = list(tensors)
    while waiting:
        for i in set(readers.get(waiting.pop(), ())) - reached:
            reached.add(i)
            waiting.extend(o for o in graph.node[i].output if o)
    return reached


def _constant(graph: onnx.GraphProto, reads: Sequence[Sequence[str]]) -> set[int]:
    """The nodes that read constants only: some operators take constants and nothing else."""
    known = {t.name for t in graph.initializer}
    found: set[int] = set()
    for i, node in enumerate(graph.node):
        if node.op_type == "Constant" or (reads[i] and known.issuperset(reads[i]) and not node.op_type.startswith("Random")):
            found.add(i)
            known.update(node.output)
    return found


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


def _exact(tensor: str) -> str:
    return tensor + "/onnxprune.exact"


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
