"""Pass `eliminate`: scores channels by block elimination on what their consumers read (`--method obs`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from onnxprune import runtime
from onnxprune.channels import Index
from onnxprune.contraction import Contraction, consumers, dequantised, normal_form, parameter_names, units, weight_values
from onnxprune.control import expose
from onnxprune.elimination import NAME, Problem
from onnxprune.elimination import eliminate as by_elimination
from onnxprune.errors import ModelError
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.recovery.leastsq import Gram
from onnxprune.recovery.linear import Linear
from onnxprune.recovery.targets import ROWS, spread
from onnxprune.rules import Layer, Packed, Steps
from onnxprune.saliency import LayerScore, Saliency

MEMORY = 1 << 30  # bytes of Gram matrices at a time; the data are run as often as that takes
WIDEST = 6144  # inputs * taps of a layer whose channels are eliminated together; of wider ones each by itself

Batches = Callable[[], Iterable[Mapping[str, Array]]]


def eliminate(
    groups: Groups,
    batches: Batches,
    samples: int,
    data: tuple[str, ...] = (),
    *,
    influence: Mapping[Layer, float] | None = None,
    seed: int = 0,
    providers: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Saliency:
    """Scores of every prunable channel: the error that its consumers are left with, their other weights adapted.

    influence: how much of an error each layer hands on to the outputs (`influence.influences`); by default all alike.
    batches: makes the inputs anew each time. samples, data: how many there are in all, and their digests. Rows of the
    Gram matrices are 64 output positions for each sample. Raises ModelError when the model does not run on the data.
    """
    layers = consumers(groups)
    found: dict[str, list[list[Problem]]] = {}
    shares: dict[str, list[float]] = {}
    parts = _parts(groups, layers)
    for number, part in enumerate(parts):
        grams = _run(groups, part, batches, seed, providers)
        for layer in part:
            for name, problems in grams[layer].problems(groups, layer).items():
                found.setdefault(name, []).append(problems)
                shares.setdefault(name, []).append(1.0 if influence is None else influence[layer])
        if progress:
            progress(number + 1, len(parts) + 1)
    scores = [LayerScore(g.id, g.id, by_elimination(found.get(g.id, []), g.size, shares.get(g.id))) for g in groups.prunable]
    if progress:
        progress(len(parts) + 1, len(parts) + 1)
    return Saliency(NAME, "order", samples, tuple(scores), {}, groups.net.digest, data)


def _parts(groups: Groups, layers: Sequence[Layer]) -> list[list[Layer]]:
    """The layers in portions whose Gram matrices fit in memory."""
    parts: list[list[Layer]] = []
    space = 0
    for layer in layers:
        width = groups.full(layer.x)
        if layer.w is not None:
            shape = groups.net.shapes[layer.w.tensor]
            width = int(np.prod(shape)) // max(1, groups.full(layer.out))
        need = 8 * min(width, WIDEST) ** 2
        if not parts or space + need > MEMORY:
            parts.append([])
            space = 0
        parts[-1].append(layer)
        space += need
    return parts


def _run(
    groups: Groups, layers: Sequence[Layer], batches: Batches, seed: int, providers: Sequence[str] | None
) -> dict[Layer, _Grams]:
    weights = weight_values(groups.net, layers)
    tensors = [t for x in layers for t in (x.x.tensor, x.other.tensor if x.other else "") if t]
    parameters = parameter_names(s for x in layers for s in (x.x_steps, x.steps))
    model, outputs = expose(groups.net.source, [*tensors, *parameters])
    session = runtime.session(runtime.with_outputs(model, outputs.values()), providers=providers)
    grams = {layer: _Grams() for layer in layers}
    rng = np.random.default_rng(seed)
    for batch in batches():
        found = dict(zip(outputs, runtime.run(session, batch, list(outputs.values())), strict=True))
        for layer in layers:
            x = _value(groups, layer.x.tensor, layer.x_steps, found)
            w = weights[layer] if layer.other is None else _value(groups, layer.other.tensor, layer.steps, found)
            if x is None or w is None:
                continue  # in a body that did not run, or ran several times
            if layer.other is not None:
                grams[layer].multiply(x, layer.x.axis, w, layer.other.axis)
            else:
                rows = ROWS * max(v.shape[0] if v.ndim else 1 for v in batch.values())
                grams[layer].add(normal_form(groups, layer, x, w), rows, rng)
    return grams


def _value(groups: Groups, tensor: str, steps: Steps | Packed | None, found: Mapping[str, Array]) -> Array | None:
    """An activation, integers dequantised, the iterations of a loop as so many more samples; None where that does not work."""
    value = found[tensor]
    repeated = value.ndim - len(groups.net.shapes[tensor])
    if not value.size or repeated > 1 or (repeated and (steps is not None or value.ndim < 3)):
        return None
    if repeated:
        value = value.reshape(-1, *value.shape[2:])
    if not np.isfinite(value).all():
        raise ModelError(f"tensor '{tensor}' is NaN or infinite on the sample data", hint="does the model overflow?")
    return dequantised(value, steps, found)


class _Grams:
    """What is added up for one consumer: a Gram matrix for each of its linear maps, or the energy of each product."""

    def __init__(self) -> None:
        self.parts: list[_Gram] = []
        self.products: Array | None = None

    def add(self, contractions: Iterable[Contraction], rows: int, rng: np.random.Generator) -> None:
        for number, c in enumerate(contractions):
            if number == len(self.parts):
                self.parts.append(_Gram(c))
            self.parts[number].add(c, rows, rng)

    def multiply(self, x: Array, a: int, w: Array, b: int) -> None:
        """Two activations are multiplied: position k of the summed axis adds x_k w_k', of energy |x_k|^2 |w_k|^2."""
        energies = [np.moveaxis(np.square(v, dtype=np.float64), axis, -1).sum(-2) for v, axis in ((x, a), (w, b))]
        first, second = energies
        if first.ndim == second.ndim >= 2 and 1 < second.shape[-2] < first.shape[-2]:  # several heads share one
            second = np.repeat(second, first.shape[-2] // second.shape[-2], axis=-2)
        energy = (first * second).reshape(-1, first.shape[-1]).sum(0)
        self.products = energy if self.products is None else self.products + energy

    def problems(self, groups: Groups, layer: Layer) -> dict[str, list[Problem]]:
        """The problems of every group that the layer reads."""
        found: dict[str, list[Problem]] = {}
        for here in units(groups, layer):
            every = np.arange(here.group.size)
            if self.products is not None:
                found[here.group.id] = [_independent(self.products[here.positions].sum(1), every)]
            elif self.parts:
                made = [p for part in self.parts if (p := part.problem(here.positions)) is not None]
                found.setdefault(here.group.id, []).extend(made)
            else:  # a layer that no sample has reached may need any of its channels
                found[here.group.id] = [_independent(np.ones(here.group.size), every)]
        return found


class _Gram:
    """Sums over rows of what one linear map reads: X'X and X'1; of a very wide map only the blocks on the diagonal."""

    def __init__(self, c: Contraction) -> None:
        attributes = {k: v for k, v in c.attributes.items() if k != "group"}
        self.linear = Linear("ConvTranspose" if c.transposed else "Conv", c.w.shape, attributes)
        self.matrix = self.linear.matrix(c.w)[0]
        self.positions = c.positions
        self.taps = int(np.prod(c.w.shape[2:]))
        width = len(self.matrix)
        self.wide = width > WIDEST
        self.sums = Gram(len(self.positions), self.taps) if self.wide else Gram(1, width)
        self.origin: Array | None = None

    def add(self, c: Contraction, rows: int, rng: np.random.Generator) -> None:
        shape = (c.x.shape[0], *self.linear.space(c.x.shape[2:]))
        x = self.linear.inputs(c.x, spread(int(np.prod(shape)), rows, rng), shape).astype(np.float32)
        if self.wide:  # every channel by itself
            x = np.ascontiguousarray(x[0].reshape(x.shape[1], -1, self.taps).transpose(1, 0, 2))
        if self.origin is None:
            self.origin = x.mean(1, keepdims=True)
        self.sums.add(x - self.origin)

    def problem(self, positions: Index) -> Problem | None:
        """The problem for channels at `positions` [units, m] of the layer's axis; None where this map reads none of them."""
        place = np.full(int(max(positions.max(), self.positions.max())) + 1, -1)
        place[self.positions] = np.arange(len(self.positions))
        local = place[positions]
        counts = (local >= 0).sum(1)
        present = np.flatnonzero(counts)
        if not len(present):
            return None
        if self.wide or len(set(counts[present])) > 1:
            costs = np.append(self._costs(), 0.0)  # position -1 is that of no channel
            return _independent(costs[local[present]].sum(1), present)
        chosen = local[present]
        chosen = chosen[chosen >= 0].reshape(len(present), -1)
        rows = (chosen[:, :, None] * self.taps + np.arange(self.taps)).reshape(len(present), -1)
        few = self.sums.few()
        read = self.sums.centred() if few is None else few
        return Problem(read[0], self.matrix, present, rows, self.sums.count, few is not None)

    def _costs(self) -> Array:
        """What every channel by itself adds to the energy of the output."""
        blocks, count = self.sums.centred(), len(self.positions)
        if not self.wide:
            channels = np.arange(count)
            blocks = blocks.reshape(count, self.taps, count, self.taps)[channels, :, channels, :]
        w = self.matrix.reshape(count, self.taps, -1)
        return np.asarray((w * (blocks @ w)).sum((1, 2)))


def _independent(costs: Array, units: Index) -> Problem:
    """A problem in which nothing adapts: channel units[k] costs costs[k]."""
    each = costs[:, None, None]
    return Problem(each, np.ones_like(each), units, np.zeros((len(units), 1), np.int64))
