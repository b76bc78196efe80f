"""Pass `calibrate`: ONNX Runtime runs the network on sample data, and a criterion scores every channel from what it sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from onnxprune import runtime
from onnxprune.channels import Index
from onnxprune.contraction import consumers
from onnxprune.criteria import Criterion
from onnxprune.data import Samples
from onnxprune.errors import DataError, ModelError
from onnxprune.graph import digest
from onnxprune.groups import Groups
from onnxprune.saliency import LayerScore, Saliency

MEMORY = 256 << 20  # bytes of activations that one run may hand over
MAX_BATCH = 32
Progress = Callable[[int, int], None]


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

    indices: which samples, all by default. batch: samples per run, by default as many as fit 256 MB of activations.
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
    weights = runtime.fixed_values(groups.net, [layer.weight for layer in layers])
    reads = list(dict.fromkeys(layer.x.tensor for layer in layers))
    constant = {name: weights[name] for name in reads if name in weights}
    session = runtime.session(runtime.with_outputs(groups.net.model, reads), providers=providers)
    size = batch_size(groups, reads, batch)
    total: Saliency | None = None
    for part in _batches(chosen, size, groups):
        feeds = samples.batch(fill(part, size, groups))
        values = dict(zip(reads, runtime.run(session, feeds, reads), strict=True)) | constant
        for name, value in values.items():
            if not np.isfinite(value).all():
                raise ModelError(f"tensor '{name}' is NaN or infinite on the sample data", hint="does the model overflow?")
        found: list[LayerScore] = []
        for layer in layers:
            known = {s.group: s.values for s in total.layers if s.layer == layer.name} if total else None
            found.extend(criterion.observe(groups, layer, values[layer.x.tensor], weights[layer.weight], known))
        shard = _finish(groups, criterion, found, len(part), ())
        total = shard if total is None else total.merged(shard)
        if progress:
            progress(total.samples, len(chosen))
    if total is None:
        return _finish(groups, criterion, [], 0, ())
    data = (samples.digest(chosen),)
    return _finish(groups, criterion, total.layers, total.samples, data)


def batch_size(groups: Groups, tensors: Sequence[str], wanted: int | None) -> int:
    """Samples per run: what the model fixes, else what was asked for, else what keeps `tensors` within the memory limit."""
    fixed = fixed_batch(groups)
    if fixed:
        return fixed
    per_sample = sum(4 * int(np.prod(groups.net.shapes.get(t, (1,)))) for t in tensors)
    return wanted or max(1, min(MAX_BATCH, MEMORY // max(1, per_sample)))


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
    model = digest(groups.net.model) if data or not criterion.needs_data else ""
    return Saliency(criterion.name, criterion.combine, samples, tuple(layers), dict(criterion.options), model, data)
