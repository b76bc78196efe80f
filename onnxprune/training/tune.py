"""A pruned model, its original and samples in; the same graph with trained weights out."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import runtime, wire
from onnxprune.channels import Index
from onnxprune.data import Samples, choose
from onnxprune.errors import DataError, ModelError
from onnxprune.graph import Network
from onnxprune.torchgraph import TorchGraph, require
from onnxprune.training import checkpoint
from onnxprune.training.settings import Training
from onnxprune.training.statistics import BatchStatistics
from onnxprune.training.store import Store
from onnxprune.training.targets import targets
from onnxprune.training.teacher import Teacher
from onnxprune.training.trainable import trainable
from onnxprune.training.trainer import Epoch, Score, State, Trainer, device_of, threads
from onnxprune.training.write import written
from onnxprune.weights import Scratch

HELD = 2000  # samples, at most, that decide which epoch was best
FEWEST = 64
MEMORY = 2 << 30  # bytes of activations: of larger batches the gradients add up over parts


@dataclass(frozen=True, eq=False)
class Tuned:
    """model: with trained weights, or the one that was given where no epoch was better on held-out samples."""

    model: onnx.ModelProto
    before: Score
    after: Score
    epochs: int
    best: int
    samples: int
    held: int
    weights: int
    seconds: float
    settings: Training

    def to_json(self) -> dict[str, Any]:
        """The entry in the report."""
        return {
            "epochs": self.epochs,
            "best": self.best,
            "metric": self.before.metric,
            "before": self.before.value,
            "after": self.after.value,
            "top1": None if self.before.accuracy is None else [self.before.accuracy, self.after.accuracy],
            "samples": self.samples,
            "held_out": self.held,
            "weights": self.weights,
            "seconds": round(self.seconds, 3),
            "settings": self.settings.to_json(),
        }


def tune(
    pruned: onnx.ModelProto,
    teacher: onnx.ModelProto,
    samples: Samples,
    indices: Index,
    settings: Training,
    *,
    held: Index | None = None,
    scratch: Scratch | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    said: Callable[[Epoch], None] | None = None,
    kept: Path | None = None,
    resume: bool = False,
) -> Tuned:
    """Trains the weights of `pruned` so that its outputs become those of `teacher` on samples[indices].

    The samples `held` decide which epoch was best, by default a part of the others, which is then not trained on. kept: the
    checkpoint, written after every epoch; resume: whether to go on from it. Raises ModelError for a graph that cannot be
    trained, DataError for too few samples.
    """
    start = time.perf_counter()
    require(pruned)
    held, rest = apart(indices, settings.seed) if held is None else (held, indices)
    device, count = device_of(settings.device), threads()
    net, original = Network(pruned, {}, {}), Network(teacher, {}, {})
    names = trainable(net)
    if not names:
        raise ModelError("the model has no weights to train", hint="they must be floating-point constants of the file")
    fixed = _fixed_batch(net)
    if fixed:
        settings, held, rest = _whole_batches(settings, held, rest, fixed)
    of_this = "" if kept is None else _fingerprint(pruned, teacher, samples, indices, settings)
    if kept is not None and resume:
        checkpoint.load(kept, of_this)  # before any work
    probe = runtime.probe(pruned, samples.batch(indices[: fixed or 1]))
    shapes = (probe.shapes, runtime.probe(teacher, probe.feeds).shapes)
    what = targets(net, original, shapes, settings.features > 0)
    statistics = BatchStatistics(_own(net)) if settings.batch_norm == "batch" else None
    functions = {} if statistics is None else {"BatchNormalization": statistics}
    student = TorchGraph(pruned, names, functions=functions, device=device)
    store, reserve = Store(samples, rest, settings.augment), Store(samples, held)
    reserve.keep()
    store.keep(None if progress is None else lambda done, total: progress("read", done, total))
    trainer = Trainer(
        student,
        Teacher(teacher, what.all, device, count),
        what,
        store,
        reserve,
        settings,
        statistics,
        fixed or max(1, min(settings.batch, MEMORY // _bytes(probe))),
        count > 1,
    )
    count_steps = None if progress is None else lambda done, total: progress("finetune", done, total)
    state = trainer.run(count_steps, said, None if kept is None else (kept, of_this, resume))
    return _tuned(pruned, trainer, state, scratch, time.perf_counter() - start)


def _tuned(pruned: onnx.ModelProto, trainer: Trainer, state: State, scratch: Scratch | None, seconds: float) -> Tuned:
    assert state.score is not None
    model = written(pruned, trainer.values(), scratch) if state.best else pruned
    return Tuned(
        model,
        trainer.before,
        state.score,
        state.epoch,
        state.best,
        len(trainer.store),
        len(trainer.held),
        sum(int(p.numel()) for p in trainer.weights),
        seconds,
        trainer.settings,
    )


def apart(indices: Index, seed: int) -> tuple[Index, Index]:
    """(held-out samples, samples to train on): a twentieth is held out, at least 64 of them, at most 2,000 and a quarter.

    Raises DataError for fewer than eight samples.
    """
    if len(indices) < 8:
        raise DataError(f"{len(indices)} samples are too few to train on", hint="give at least 8, better thousands")
    order = indices[choose(len(indices), None, seed)]
    count = min(HELD, max(FEWEST, len(indices) // 20), len(indices) // 4)
    return order[:count], order[count:]


def _own(net: Network) -> set[str]:
    return {name for name in net.initializers if len(net.uses.get(name, ())) == 1}


def _fixed_batch(net: Network) -> int | None:
    """How many samples every run must have, where the model says so."""
    return next((shape[0] for v in net.inputs if (shape := runtime.input_shape(v)) and shape[0]), None)


def _whole_batches(settings: Training, held: Index, rest: Index, fixed: int) -> tuple[Training, Index, Index]:
    """Everything in multiples of a prescribed batch; DataError where there are not enough samples for that."""
    if len(held) < fixed or len(rest) < fixed:
        raise DataError(f"the model takes batches of {fixed}, and there are {len(held) + len(rest)} samples", hint="give more")
    batch = min(-(-settings.batch // fixed), len(rest) // fixed) * fixed
    return replace(settings, batch=batch), held[: len(held) // fixed * fixed], rest


def _bytes(probe: Network) -> int:
    """Memory for the activations of one sample, in single precision."""
    made = (probe.shapes[o] for n in probe.model.graph.node for o in n.output if o in probe.shapes)
    return max(1, 4 * sum(math.prod(shape) for shape in made))


def _fingerprint(
    pruned: onnx.ModelProto, teacher: onnx.ModelProto, samples: Samples, indices: Index, settings: Training
) -> str:
    return checkpoint.fingerprint(
        pruned=wire.digest(pruned),
        teacher=wire.digest(teacher),
        samples=len(indices),
        first=samples.digest(indices[: min(4, len(indices))]),
        indices=int(np.asarray(indices).sum()),
        settings=settings.to_json(),
    )
