"""The training samples: decoded once, kept small in memory, shuffled and varied in an order that a seed gives."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune.channels import Index
from onnxprune.data import Samples
from onnxprune.errors import OptionError
from onnxprune.graph import Array
from onnxprune.training.settings import Training

HELD = 4 << 30  # bytes of samples that are kept in memory; more of them are read again in every epoch
CHUNK = 256
SHIFT = 8  # pictures are moved by up to an eighth of their size: 4 of 32 pixels
MIXED = 0.5  # the largest share of another sample


@dataclass(frozen=True, eq=False)
class Batch:
    """Samples as the model takes them, and their true classes where these are known."""

    feeds: dict[str, Array]
    labels: Array | None
    count: int

    def parts(self, size: int) -> Iterator[Batch]:
        """The same in pieces of `size` samples, in order; the last one may be smaller."""
        for start in range(0, self.count, size):
            where = slice(start, start + size)
            feeds = {k: v[where] if v.ndim else v for k, v in self.feeds.items()}
            yield Batch(feeds, None if self.labels is None else self.labels[where], min(size, self.count - start))


class Store:
    """Samples with indices, read as often as necessary.

    augment: see `Training`. Raises OptionError where arrays that are no pictures are to be varied like some, and DataError
    for samples that cannot be read, when they are.
    """

    def __init__(self, samples: Samples, indices: Index, augment: str = "none") -> None:
        self._samples, self._indices = samples, indices
        self._axes = None if augment == "none" else samples.picture_axes()
        if self._axes is None and augment not in ("none", "auto"):
            self._axes = _array_axes(samples)
        self._kept: dict[str, Array] | None = None

    def __len__(self) -> int:
        return len(self._indices)

    def keep(self, progress: Any = None) -> None:
        """Reads all samples into memory, where they fit."""
        first = self._samples.stored(self._indices[:1])
        if sum(v.nbytes for v in first.values()) * len(self) > HELD or any(v.ndim == 0 for v in first.values()):
            return
        kept = {k: np.empty((len(self), *v.shape[1:]), v.dtype) for k, v in first.items()}
        for start in range(0, len(self), CHUNK):
            for name, rows in self._samples.stored(self._indices[start : start + CHUNK]).items():
                kept[name][start : start + CHUNK] = rows
            if progress is not None:
                progress(min(start + CHUNK, len(self)), len(self))
        self._kept = kept

    def batch(self, places: Array, rng: np.random.Generator | None = None, mirrored: bool = False) -> Batch:
        """Samples by their places in the store. rng: varies pictures; mirrored: also left to right."""
        indices = self._indices[places]
        stored = self._samples.stored(indices) if self._kept is None else {k: v[places] for k, v in self._kept.items()}
        if rng is not None and self._axes is not None:
            stored = {k: _varied(v, self._axes, rng, mirrored) for k, v in stored.items()}
        labels = None if self._samples.labels is None else self._samples.labels[indices]
        return Batch(self._samples.fed(stored, indices), labels, len(places))

    def epoch(self, number: int, settings: Training, ahead: bool) -> Iterator[Batch]:
        """All samples once, in batches; the same for the same epoch and seed. ahead: the next batch is made meanwhile.

        What does not fill a batch is left out, unless there is only that.
        """
        order = np.random.default_rng((settings.seed, number)).permutation(len(self))
        size = min(settings.batch, len(self))
        parts = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        mirrored = settings.augment in ("auto", "flip+shift")

        def make(step: int) -> Batch:
            rng = np.random.default_rng((settings.seed, number, step))
            batch = self.batch(parts[step], rng, mirrored)
            return mixed(batch, rng) if settings.mix else batch

        if not ahead:
            yield from (make(step) for step in range(len(parts)))
            return
        with ThreadPoolExecutor(1) as worker:
            waiting = worker.submit(make, 0)
            for step in range(1, len(parts)):
                batch = waiting.result()
                waiting = worker.submit(make, step)
                yield batch
            yield waiting.result()

    def steps(self, settings: Training) -> int:
        """Batches in an epoch."""
        return len(self) // min(settings.batch, len(self))


def mixed(batch: Batch, rng: np.random.Generator) -> Batch:
    """Every sample with a share of another one, the same share of all of its inputs (Zhang, Cisse, Dauphin, Lopez-Paz 2018).

    The batch itself where an input is not floating-point, or has no batch axis: between tokens or indices lies nothing.
    """
    if any(v.dtype.kind != "f" or v.ndim == 0 for v in batch.feeds.values()):
        return batch
    others, share = rng.permutation(batch.count), MIXED * rng.random(batch.count)
    feeds = {}
    for name, value in batch.feeds.items():
        part = share.reshape(-1, *[1] * (value.ndim - 1)).astype(value.dtype)
        feeds[name] = value + part * (value[others] - value)
    return Batch(feeds, None, batch.count)


def _array_axes(samples: Samples) -> tuple[int, int]:
    """Height and width of arrays that are pictures by their shape."""
    shape = samples.inputs[0].shape
    if len(samples.inputs) == 1 and len(shape) == 4 and {1, 3} & {shape[1], shape[3]}:
        return (2, 3) if shape[1] in (1, 3) else (1, 2)
    raise OptionError(f"{samples.source} has no pictures to shift", hint="leave --augment out")


def _varied(stored: Array, axes: tuple[int, int], rng: np.random.Generator, mirrored: bool) -> Array:
    """Each picture moved by up to an eighth of its size, its edge mirrored, and turned round or not."""
    pictures = np.moveaxis(stored, axes, (1, 2))
    n, height, width = pictures.shape[:3]
    up, left = height // SHIFT, width // SHIFT
    wider = np.pad(pictures, ((0, 0), (up, up), (left, left), (0, 0)), mode="reflect")
    ys, xs = rng.integers(0, 2 * up + 1, n), rng.integers(0, 2 * left + 1, n)
    turned = rng.random(n) < 0.5
    varied = np.empty_like(pictures)
    for i in range(n):
        part = wider[i, ys[i] : ys[i] + height, xs[i] : xs[i] + width]
        varied[i] = part[:, ::-1] if mirrored and turned[i] else part
    return np.moveaxis(varied, (1, 2), axes)
