"""What every source of samples has in common: the model's inputs, batches, labels, digests."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxprune.errors import DataError, OptionError

Array = npt.NDArray[Any]
_DIGEST_ROWS = 16


@dataclass(frozen=True)
class InputSpec:
    """One graph input of the model: `shape` has None for a dynamic dimension; axis 0 of rank >= 1 is the batch."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def describe(self) -> str:
        """The shape as text, such as `(N, 3, ?, ?)`; the batch axis is always `N`."""
        dims = ["N", *("?" if dim is None else str(dim) for dim in self.shape[1:])] if self.shape else []
        return f"({', '.join(dims)}{',' if len(dims) == 1 else ''})"


class Samples(ABC):
    """A lazily read list of samples.

    `source` says in messages where the samples come from; `inputs` are the model's inputs; `labels` are int64 class
    indices [n] or None; `num_classes` is the number of class folders or None where it is unknown; `held_out` are
    samples set apart by the source (arrays x_test, y_test), never to be calibrated on, or None.
    """

    def __init__(
        self, source: str, inputs: Sequence[InputSpec], labels: Array | None = None, num_classes: int | None = None
    ) -> None:
        self.source = source
        self.inputs = tuple(inputs)
        self.labels = labels
        self.num_classes = num_classes
        self.held_out: Samples | None = None

    @abstractmethod
    def __len__(self) -> int:
        """The number of samples, at least 1."""

    @abstractmethod
    def _rows(self, indices: Array) -> dict[str, Array]:
        """{input name: [len(indices), ...]} as the source has them; rank-0 inputs have no batch axis."""

    def batch(self, indices: Sequence[int] | Array) -> dict[str, Array]:
        """Read samples as they are fed to the model.

        Returns {input name: [len(indices), ...]} in the model's dtype, C-contiguous, not shared with the source. An
        input of rank 0 has one value for all samples and comes back with rank 0.
        Raises DataError for a sample that cannot be read, does not fit the dtype or is not finite, and IndexError for
        an index outside 0 .. len(self) - 1.
        """
        return self.fed(self.stored(indices), indices)

    def stored(self, indices: Sequence[int] | Array) -> dict[str, Array]:
        """Samples as compactly as the source has them, e.g. as pixels [len(indices), H, W, C]; `fed` makes batches of them.

        Raises DataError for a sample that cannot be read, and IndexError for an index outside 0 .. len(self) - 1.
        """
        wanted = np.asarray(indices)
        if wanted.size == 0:
            wanted = wanted.astype(np.int64)
        if wanted.dtype.kind not in "iu" or wanted.ndim != 1:
            raise IndexError("indices must be a list of integers")
        if wanted.size and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise IndexError(f"{self.source} has samples 0 to {len(self) - 1}")
        return self._rows(wanted)

    def fed(self, stored: Mapping[str, Array], indices: Sequence[int] | Array) -> dict[str, Array]:
        """What `stored` gave for these indices as `batch` returns it; for the errors that it raises, too."""
        rows, wanted = self._ready(stored), np.asarray(indices)
        return {spec.name: _as_fed(rows[spec.name], spec, wanted, self.source) for spec in self.inputs}

    def picture_axes(self) -> tuple[int, int] | None:
        """The axes of height and width in `stored` pictures that come from files; None for other data."""
        return None

    def _ready(self, stored: Mapping[str, Array]) -> Mapping[str, Array]:
        """Stored rows with the axes and the scale of the model's inputs."""
        return stored

    def digest(self, indices: Sequence[int] | Array) -> str:
        """SHA-256 (hex) over these samples, in this order, as fed to the model; labels are not part of it."""
        total = Digest(self.inputs)
        for start in range(0, len(indices), _DIGEST_ROWS):
            chunk = indices[start : start + _DIGEST_ROWS]
            total.add(self.batch(chunk), len(chunk))
        return total.hexdigest()


class Digest:
    """`Samples.digest` of samples that are read anyhow, batch by batch."""

    def __init__(self, inputs: Sequence[InputSpec]) -> None:
        self._inputs, self._total = inputs, hashlib.sha256()
        for spec in inputs:
            self._total.update(f"{spec.name}\0{spec.dtype.name}\0".encode())

    def add(self, fed: Mapping[str, Array], count: int) -> None:
        """The first `count` samples of one batch, as fed to the model."""
        for row in range(count):
            for spec in self._inputs:
                sample = fed[spec.name][row] if spec.shape else fed[spec.name]
                self._total.update(repr(sample.shape).encode() + sample.tobytes())

    def hexdigest(self) -> str:
        return self._total.hexdigest()


def choose(n: int, count: int | None, seed: int) -> Array:
    """Choose `count` of the indices 0 .. n-1 without replacement, in random order: int64 [min(count, n)].

    All n when `count` is None or at least n. The same n and seed give the same order, of which a smaller count takes
    the beginning. Raises OptionError for a count below 1.
    """
    if count is not None and count < 1:
        raise OptionError(f"cannot choose {count} samples", hint="give a number of at least 1")
    return np.random.default_rng(seed).permutation(n).astype(np.int64)[:count]


def castable(have: np.dtype[Any], want: np.dtype[Any]) -> bool:
    """Whether data of one dtype may be fed to an input of another: numpy's same_kind, but no bool as a float."""
    if have.kind == "b":
        return want.kind in "biu"
    if have.kind in "iuf":
        # "V" is bfloat16 and the like; strings and objects would take numbers too.
        return want.kind in "iufV" and np.can_cast(have, want, "same_kind")
    return have == want and have.names is None and have.kind == "V"


def _as_fed(rows: Array, spec: InputSpec, indices: Array, source: str) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        fed: Array = rows.astype(spec.dtype, order="C", casting="same_kind", copy=False)
    if fed.dtype.kind in "fV":
        good = np.isfinite(fed)
        fault = "is NaN or infinite"
        hint = f"clean or rescale it; it is fed as {spec.dtype}"
    elif rows.dtype != fed.dtype:
        good = fed == rows
        fault = f"does not fit in {spec.dtype}"
        hint = f"keep the values within the range of {spec.dtype}"
    else:
        return fed
    if not good.all():
        where = f"sample {indices[_first_bad(good)]}" if spec.shape else "its one value"
        raise DataError(f"{source}: {where} of input {spec.name!r} {fault}", hint=hint)
    return fed


def _first_bad(good: Array) -> int:
    return int(np.argmin(good.reshape(len(good), -1).all(axis=1)))
