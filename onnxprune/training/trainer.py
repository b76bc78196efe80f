"""The loop: epochs of steps, a look at held-out samples after each, the best weights, a checkpoint."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

from onnxprune import runtime
from onnxprune.errors import ModelError
from onnxprune.graph import Array
from onnxprune.torchgraph import TorchGraph
from onnxprune.torchgraph.graph import tensor
from onnxprune.training import checkpoint
from onnxprune.training.losses import Targets, loss
from onnxprune.training.optimiser import optimiser
from onnxprune.training.settings import Training
from onnxprune.training.statistics import BatchStatistics
from onnxprune.training.store import Batch, Store
from onnxprune.training.teacher import Teacher

Tensor: TypeAlias = Any


@dataclass(frozen=True)
class Score:
    """How near a student is to its teacher on held-out samples.

    agreement: share of samples with the same top-1 answer; None where no output is one of class scores. distance: the mean
    relative square distance of the outputs. accuracy: share of right answers, where there are labels.
    """

    agreement: float | None
    distance: float
    accuracy: float | None = None

    def rank(self, judge: str) -> tuple[float, float]:
        """Larger is better. judge: see `Training`."""
        same = self.agreement if judge == "agreement" else None
        return same or 0.0, -self.distance if math.isfinite(self.distance) else -math.inf

    @property
    def metric(self) -> str:
        return "relative_l2" if self.agreement is None else "agreement"

    @property
    def value(self) -> float:
        return math.sqrt(self.distance) if self.agreement is None else self.agreement


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to. rate: samples a second; left: seconds until the last epoch is done."""

    number: int
    loss: float
    score: Score
    rate: float
    left: float


@dataclass
class State:
    """What changes as epochs go by, beside the weights."""

    epoch: int = 0
    best: int = 0
    score: Score | None = None
    weights: dict[str, Tensor] | None = None


class Trainer:
    """Trains a student against a teacher.

    before: the score of the student as it came, made when the trainer is. at_once: samples that run together; gradients of a
    larger batch add up. ahead: whether batches are made while others are trained on.
    """

    def __init__(
        self,
        student: TorchGraph,
        teacher: Teacher,
        targets: Targets,
        store: Store,
        held: Store,
        settings: Training,
        statistics: BatchStatistics | None,
        at_once: int,
        ahead: bool,
    ) -> None:
        self.student, self.teacher, self.targets, self.settings = student, teacher, targets, settings
        self.store, self.held, self.statistics, self.at_once, self.ahead = store, held, statistics, at_once, ahead
        self.half = _half(settings.precision, student.device)
        student.parameters = {k: _laid_out(v, student.device) for k, v in student.parameters.items()}
        self.weights = list(student.parameters.values())
        self.optimiser = optimiser(self.weights, settings)
        self.before = self.score()

    def run(
        self,
        progress: Callable[[int, int], None] | None = None,
        said: Callable[[Epoch], None] | None = None,
        kept: tuple[Path, str, bool] | None = None,
    ) -> State:
        """All epochs; the student has the best weights afterwards, which may be those that it came with.

        kept: (the checkpoint, its fingerprint, whether to go on from it).
        """
        settings, state = self.settings, State(score=self.before, weights=self._snapshot())
        if kept is not None and kept[2]:
            self._restore(checkpoint.load(kept[0], kept[1]), state)
        for number in range(state.epoch, settings.epochs):
            start = time.perf_counter()
            mean = self._epoch(number, progress)
            seconds = time.perf_counter() - start
            score = self.score()
            state.epoch = number + 1
            assert state.score is not None
            if math.isfinite(score.distance) and score.rank(settings.judge) > state.score.rank(settings.judge):
                state.best, state.score, state.weights = number + 1, score, self._snapshot()
            if said is not None:
                rate = self.store.steps(settings) * min(settings.batch, len(self.store)) / max(seconds, 1e-9)
                said(Epoch(number + 1, mean, score, rate, (time.perf_counter() - start) * (settings.epochs - number - 1)))
            if kept is not None:
                checkpoint.save(kept[0], self._saved(state, kept[1]))
            if not math.isfinite(mean) or (settings.patience is not None and number + 1 - state.best >= settings.patience):
                break
        assert state.weights is not None
        self._load(state.weights)
        return state

    def _epoch(self, number: int, progress: Callable[[int, int], None] | None) -> float:
        """One pass; the mean loss."""
        steps, total = self.store.steps(self.settings), 0.0
        for step, batch in enumerate(self.store.epoch(number, self.settings, self.ahead)):
            done = number * steps + step
            rate = scheduled(done, steps * self.settings.epochs, self.settings)
            for group in self.optimiser.param_groups:
                group["lr"] = rate
            total += self._step(batch)
            if progress is not None:
                progress(done + 1, steps * self.settings.epochs)
            if not math.isfinite(total):
                break
        return total / steps

    def _step(self, batch: Batch) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        if self.statistics is not None:
            self.statistics.training = True
        total = 0.0
        for part in batch.parts(self.at_once):
            feeds = self._feeds(part)
            answers = self.teacher.answer(part.feeds, feeds)
            labels = None if part.labels is None else torch.from_numpy(part.labels).to(self.student.device)
            with torch.autocast(self.student.device.type, dtype=torch.bfloat16, enabled=self.half):
                made = self.student.run(feeds, self.targets.all)
            value = loss(self.targets, self.settings, made, answers, labels) * (part.count / batch.count)
            value.backward()
            total += float(value.detach())
        torch.nn.utils.clip_grad_norm_(self.weights, self.settings.clip)
        self.optimiser.step()
        return total

    def _feeds(self, batch: Batch) -> dict[str, Tensor]:
        return {k: _laid_out(tensor(v), self.student.device) for k, v in batch.feeds.items()}

    def score(self) -> Score:
        """The student as it is now on the held-out samples, in single precision."""
        same = right = labelled = answered = 0
        distance, parts = 0.0, 0
        if self.statistics is not None:
            self.statistics.training = False
        with torch.no_grad():
            for start in range(0, len(self.held), self.at_once):
                places = np.arange(start, min(start + self.at_once, len(self.held)))
                batch = self.held.batch(places)
                feeds = self._feeds(batch)
                answers, made = self.teacher.answer(batch.feeds, feeds), self.student.run(feeds, self.targets.all)
                for name in (*self.targets.scores, *self.targets.others):
                    a, b = answers[name], made[name].float()
                    distance += float(((a - b).square().sum() / a.square().sum().clamp(min=1e-12)).item()) * len(places)
                    parts += len(places)
                if self.targets.scores:
                    first = made[self.targets.scores[0]].argmax(1)
                    same += int((first == answers[self.targets.scores[0]].argmax(1)).sum())
                    answered += len(places)
                    if batch.labels is not None:
                        right += int((first.cpu().numpy() == batch.labels).sum())
                        labelled += len(places)
        agreement = same / answered if answered else None
        return Score(agreement, distance / parts, right / labelled if labelled else None)

    # ------------------------------------------------------------------------------------------------ weights and state

    def values(self) -> dict[str, Array]:
        """What is to be written back, by the names of the constants."""
        running = {} if self.statistics is None else self.statistics.running
        found = {**{k: v.detach() for k, v in self.student.parameters.items()}, **running}
        return {k: v.cpu().contiguous().numpy() for k, v in found.items()}

    def _snapshot(self) -> dict[str, Tensor]:
        running = {} if self.statistics is None else {f"running {k}": v for k, v in self.statistics.state().items()}
        return {**{k: v.detach().clone() for k, v in self.student.parameters.items()}, **running}

    def _load(self, snapshot: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.student.parameters.items():
                value.copy_(snapshot[name])
        if self.statistics is not None:
            self.statistics.restore({k[8:]: v for k, v in snapshot.items() if k.startswith("running ")})

    def _saved(self, state: State, fingerprint: str) -> dict[str, Any]:
        assert state.score is not None
        score = (state.score.agreement, state.score.distance, state.score.accuracy)
        return {
            "fingerprint": fingerprint,
            "epoch": state.epoch,
            "best": state.best,
            "score": score,
            "best_weights": state.weights,
            "weights": self._snapshot(),
            "optimiser": self.optimiser.state_dict(),
        }

    def _restore(self, saved: Mapping[str, Any], state: State) -> None:
        state.epoch, state.best, state.weights = saved["epoch"], saved["best"], dict(saved["best_weights"])
        state.score = Score(*saved["score"])
        self._load(saved["weights"])
        self.optimiser.load_state_dict(saved["optimiser"])


def scheduled(step: int, total: int, settings: Training) -> float:
    """The learning rate of a step: up in a straight line, then down along a cosine (Loshchilov, Hutter 2017) to zero."""
    rising = max(1, round(settings.warm_up * total))
    if step < rising:
        return settings.highest_rate * (step + 1) / rising
    return settings.highest_rate * 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def _laid_out(value: Tensor, device: Any) -> Tensor:
    """On the device and, if it has the four axes of pictures, with channels last, which convolutions are quicker with."""
    if not value.dtype.is_floating_point:
        return value
    moved = value.detach().to(device)
    moved = moved.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else moved
    return moved.requires_grad_(value.requires_grad)


def _half(precision: str, device: Any) -> bool:
    """Whether convolutions and products are computed in bfloat16: where the machine has instructions for that."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    return any(getattr(torch.cpu, name, bool)() for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def device_of(wanted: str | None) -> str:
    """The device to train on. Raises ModelError where it is not there."""
    if wanted is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if wanted.startswith("cuda") and not torch.cuda.is_available():
        raise ModelError("this torch finds no CUDA device", hint="leave --device out")
    return wanted


def threads() -> int:
    """Threads to train with, as for ONNX Runtime; torch is told."""
    count = runtime.default_threads() or os.cpu_count() or 1
    torch.set_num_threads(count)
    return count
