"""Pass `calibrate`: ONNX Runtime runs the network on sample data, and a criterion scores every channel from what it sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from onnxprune import large, runtime
from onnxprune.channels import Index
from onnxprune.contraction import consumers, dequantised, parameter_names, stackable, units, weight_values
from onnxprune.control import expose
from onnxprune.criteria import Criterion
from onnxprune.data import Samples
from onnxprune.errors import DataError, ModelError
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.rules import Layer, Packed, Steps
from onnxprune.saliency import LayerScore, Saliency, Scores
from onnxprune.weights import nbytes

MEMORY = 40 << 20  # bytes of activations that one run may hand over, or what the weights have
MAX_BATCH = 32
Progress = Callable[[int, int], None]
Read: TypeAlias = tuple[str, Steps | Packed | None]
"""A tensor that layers read, and how to read it where it is integer."""
Values: TypeAlias = dict[Read, Array]


def calibrate(
    groups: Groups,
    criterion: Criterion,
    samples: Samples | None = None,
    indices: Index | None = None,
    *,
    batch: int | None = None,
    providers: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Saliency:
    """Scores of every prunable channel on the chosen samples.

    indices: which samples, all by default. batch: samples per run, by default as many as fit 40 MB of activations, or what the
    weights have.
    Memory is bounded by that and by one chunk of shares, whatever the number of samples. progress(done, total) is called
    after every batch. Raises ModelError or DataError when the model does not run on the data or overflows on it.
    """
    if criterion.needs_data and samples is None:
        raise DataError(f"the criterion '{criterion.name}' needs sample data", hint="give samples")
    if samples is None or not criterion.needs_data:
        return _finish(groups, criterion, criterion.inspect(groups), 0, ())
    chosen = np.arange(len(samples)) if indices is None else indices
    layers = consumers(groups)
    if not layers:
        return _finish(groups, criterion, [], len(chosen), (samples.digest(chosen),))
    large.release()
    weights = weight_values(groups.net, layers)
    reads = list(dict.fromkeys(r for layer in layers for r in _reads(layer)))
    constant = _constant_reads(groups, reads)
    tensors = list(dict.fromkeys([name for name, _ in reads] + parameter_names(steps for _, steps in reads)))
    model, outputs = expose(groups.net.source, tensors)
    session = runtime.session(runtime.with_outputs(model, outputs.values()), providers=providers, pattern=False, spin=False)
    del model
    large.release()
    total: Saliency | None = None
    met: set[str] = set()
    runs = _runs(groups, session, samples, chosen, reads, outputs, batch)
    for seen, count in _stacked(runs, _stack(groups, layers)):
        shard = _scored(groups, criterion, layers, weights, seen | constant, count, total)
        met |= {layer.name for layer in layers if all(seen[r].size for r in _reads(layer) if r in seen)}
        del seen  # before the next run, which needs as much
        total = shard if total is None else total.merged(shard)
        if progress:
            progress(total.samples, len(chosen))
    if total is None:
        return _finish(groups, criterion, [], 0, ())
    data = (samples.digest(chosen),)
    return _finish(groups, criterion, [_unmet(criterion, s, met) for s in total.layers], total.samples, data)


def _scored(
    groups: Groups,
    criterion: Criterion,
    layers: Sequence[Layer],
    weights: Mapping[Layer, Array],
    values: Values,
    count: int,
    total: Saliency | None,
) -> Saliency:
    """What one run says of all layers, several at a time where the criterion can."""

    def look(layer: Layer) -> list[LayerScore]:
        known = total.by_layer.get(layer.name, {}) if total else {}
        x, *other = (values[read] for read in _reads(layer))
        return _observed(groups, criterion, layer, x, other[0] if other else weights[layer], known)

    spread = getattr(criterion, "spread", map)
    largest_first = sorted(range(len(layers)), key=lambda i: -groups.macs(layers[i]))  # else one thread works on it at the end
    found = dict(zip(largest_first, spread(look, [layers[i] for i in largest_first]), strict=True))
    return _finish(groups, criterion, [score for i in range(len(layers)) for score in found[i]], count, ())


def _observed(
    groups: Groups, criterion: Criterion, layer: Layer, x: Array, w: Array, known: Mapping[str, Scores]
) -> list[LayerScore]:
    """What one run says of a layer, which in the body of an If need not have run, and in that of a loop has run many times.

    The activations of the body of a loop come with a first axis of their own, see `control.expose`.
    """
    if x.size == 0 or w.size == 0:  # it adds nothing to a maximum, and 0 to a mean
        so_far = known if criterion.combine == "max" else {}
        found = [(u.group.id, so_far.get(u.group.id, np.zeros(u.group.size))) for u in units(groups, layer)]
        return [LayerScore(layer.name, name, values) for name, values in found]
    xs = x.ndim > len(groups.net.shapes[layer.x.tensor])
    ws = layer.other is not None and w.ndim > len(groups.net.shapes[layer.other.tensor])
    if xs and layer.other is None and layer.x.axis > 0:
        x, xs = x.reshape(-1, *x.shape[2:]), False  # the iterations are so many more rows
    if not (xs or ws):
        return criterion.observe(groups, layer, x, w, known)
    times = len(x) if xs else len(w)
    each = [criterion.observe(groups, layer, x[t] if xs else x, w[t] if ws else w, known) for t in range(times)]
    combined = np.max if criterion.combine == "max" else np.mean
    return [
        LayerScore(layer.name, same[0].group, combined([s.values for s in same], axis=0), max(s.events for s in same))
        for same in zip(*each, strict=True)
    ]


def _unmet(criterion: Criterion, score: LayerScore, met: set[str]) -> LayerScore:
    """A layer that no sample has reached may need any of its channels: each has the largest share there is."""
    if score.layer in met or not criterion.provable:
        return score
    return replace(score, values=np.ones_like(score.values))


def _reads(layer: Layer) -> list[Read]:
    """What the layer reads at run time: one activation, or the two that it multiplies."""
    x: Read = (layer.x.tensor, layer.x_steps)
    return [x] if layer.other is None else [x, (layer.other.tensor, layer.steps)]


def _constant_reads(groups: Groups, reads: Sequence[Read]) -> Values:
    """Those of the tensors that no sample changes: they must not be stacked."""
    fixed = [(name, steps) for name, steps in reads if name in groups.net.fixed]
    found = runtime.fixed_values(groups.net, [n for n, _ in fixed] + parameter_names(s for _, s in fixed))
    return {(name, steps): dequantised(found[name], steps, found) for name, steps in fixed}


def _runs(
    groups: Groups,
    session: Any,
    samples: Samples,
    chosen: Index,
    reads: Sequence[Read],
    outputs: Mapping[str, str],
    batch: int | None,
) -> Iterator[tuple[Values, int]]:
    """(the activations, how many of the chosen samples they are of) for every run of the model.

    outputs: the activations with the scales and zero points that they need, and the output that hands out each.
    """
    size = batch_size(groups, list(outputs), batch)
    for part in _batches(chosen, size, groups):
        feeds = samples.batch(fill(part, size, groups))
        found = dict(zip(outputs, runtime.run(session, feeds, list(outputs.values())), strict=True))
        for name, value in found.items():
            if not (np.isfinite(np.sum(value)) or np.isfinite(value).all()):  # a sum may overflow; it takes less time
                raise ModelError(f"tensor '{name}' is NaN or infinite on the sample data", hint="does the model overflow?")
        # Dynamic scales and zero points are those of one run: no later, when runs are stacked.
        values = {(name, steps): _read(groups, name, steps, found) for name, steps in reads}
        del found, value, feeds
        yield values, len(part)
        del values  # before the next run, which needs as much


def _read(groups: Groups, name: str, steps: Steps | Packed | None, found: Mapping[str, Array]) -> Array:
    """An activation, integers dequantised; in the body of a loop every iteration may have steps of its own."""
    value, ranks = found[name], groups.net.shapes
    if steps is None or not value.size:
        return value
    if value.ndim == len(ranks[name]):
        return dequantised(value, steps, found)
    parameters = {p: found[p] for p in parameter_names([steps])}
    repeated = {p for p, v in parameters.items() if v.ndim > len(ranks[p])}
    each = ({p: v[t] if p in repeated else v for p, v in parameters.items()} for t in range(len(value)))
    return np.stack([dequantised(v, steps, now) for v, now in zip(value, each, strict=True)])


def _stack(groups: Groups, layers: Sequence[Layer]) -> int:
    """How many runs of a model that prescribes a small batch are scored together: scoring one by one is all overhead.

    Axis 0 counts samples or rows of a linear map, unless a layer sums over it, shares it with its weight or multiplies two
    activations.
    """
    fixed = fixed_batch(groups)
    if fixed is None or not all(stackable(groups, layer) for layer in layers):
        return 1
    per_run = sum(4 * int(np.prod(groups.net.shapes.get(t, (1,)))) for t in {layer.x.tensor for layer in layers})
    return max(1, min(MAX_BATCH // fixed, MEMORY // max(1, per_run)))


def _stacked(runs: Iterable[tuple[Values, int]], most: int) -> Iterator[tuple[Values, int]]:
    """Joins up to `most` runs of equal shapes and sample counts along axis 0."""
    waiting: list[Values] = []
    kind: Any = None
    count = 0
    for values, samples in runs:
        new = (samples, [v.shape for v in values.values()])
        if waiting and new != kind:
            yield _joined(waiting), count
            waiting, count = [], 0
        waiting.append(values)
        kind, count = new, count + samples
        del values
        if len(waiting) == most:
            joined, waiting = _joined(waiting), []
            yield joined, count
            del joined
            count = 0
    if waiting:
        yield _joined(waiting), count


def _joined(runs: Sequence[Values]) -> Values:
    return {read: np.concatenate([r[read] for r in runs]) for read in runs[0]} if len(runs) > 1 else runs[0]


def batch_size(groups: Groups, tensors: Sequence[str], wanted: int | None, share: int = 1) -> int:
    """Samples per run: what the model fixes, else what was asked for, else what fits `share` times the limit."""
    fixed = fixed_batch(groups)
    if fixed:
        return fixed
    times = groups.net.inside.repeats
    per_sample = sum(4 * times.get(t, 1) * int(np.prod(groups.net.shapes.get(t, (1,)))) for t in tensors)
    room = max(MEMORY, sum(nbytes(t) or 0 for t in groups.net.initializers.values()))
    return wanted or max(1, min(MAX_BATCH, share * room // max(1, per_sample)))


def fixed_batch(groups: Groups) -> int | None:
    """The batch size that the model's inputs prescribe; None where it is dynamic."""
    for value in groups.net.inputs:
        shape = runtime.input_shape(value)
        if shape:
            return shape[0]
    return None


def _batches(chosen: Index, size: int, groups: Groups) -> list[Index]:
    """The samples of every run. A prescribed batch is filled up evenly, or repeated samples would weigh more in a mean."""
    cuts = list(range(size, len(chosen), size))
    rest = len(chosen) % size
    if fixed_batch(groups) and rest and size % rest:
        cuts += range(len(chosen) - rest + 1, len(chosen))  # one by one
    return np.split(chosen, cuts) if len(chosen) else []


def fill(part: Index, size: int, groups: Groups) -> Index:
    """A full batch where the model prescribes its size: the last one repeats its first samples."""
    return np.resize(part, size) if fixed_batch(groups) and len(part) < size else part


def _finish(
    groups: Groups, criterion: Criterion, layers: Sequence[LayerScore], samples: int, data: tuple[str, ...]
) -> Saliency:
    model = groups.net.digest if data or not criterion.needs_data else ""
    return Saliency(criterion.name, criterion.combine, samples, tuple(layers), dict(criterion.options), model, data)
