"""Part `population`: what held-out samples say of all inputs, whatever the network and however it came about."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune import confidence
from onnxprune.certificate.words import POPULATION, absent, present, rounded_up
from onnxprune.graph import Array

LEVELS = (0.1, 0.01)  # fractions of inputs that may move further, fixed before anything is seen
# Fractions of the MACs that --max-drop tests, in this order, whatever the network.
GRID = (*(f / 100 for f in range(98, 90, -2)), *(f / 100 for f in range(90, 0, -5)))


@dataclass(frozen=True)
class Observed:
    """What happened to n held-out samples.

    changed: how many have another top-1 answer; None where no output is a vector of class scores. lost, gained: how many
    right answers went and came; None without labels. moved: |pruned - original|/|original| of every sample, over all
    floating-point outputs; None where the outputs do not have one row a sample. data: the samples' digest.
    """

    samples: int = 0
    changed: int | None = None
    lost: int | None = None
    gained: int | None = None
    moved: tuple[float, ...] | None = None
    data: str = ""


def population(seen: Observed, delta: float, candidates: int = 1) -> dict[str, Any]:
    """The statements, which hold jointly with confidence 1 - delta: each gets an equal share of delta.

    candidates: how many networks the one at hand was chosen from by the same samples (1: by none of them).
    """
    if not seen.samples:
        least = confidence.enough(LEVELS[0], delta / _count(seen))
        return absent(POPULATION, f"no held-out samples: {least} would be enough to speak of 90 % of inputs")
    each = confidence.shared(delta / _count(seen), candidates)
    found = [s for s in (_changed(seen, each), _drop(seen, each), *_moves(seen, each)) if s is not None]
    if not found:
        return absent(POPULATION, "the outputs have neither class scores nor one row a sample")
    return present(
        POPULATION,
        all(s["vacuous"] for s in found),
        samples=seen.samples,
        delta=delta,
        candidates=candidates,
        statements=found,
    )


def _count(seen: Observed) -> int:
    return max(1, (seen.changed is not None) + (seen.lost is not None) + (len(LEVELS) if seen.moved is not None else 0))


def _changed(seen: Observed, delta: float) -> dict[str, Any] | None:
    if seen.changed is None:
        return None
    alpha = rounded_up(confidence.upper(seen.changed, seen.samples, delta)) or 0.0
    return {
        "statement": "at most a fraction alpha of inputs changes its top-1 answer",
        "kind": "top1_changes",
        "changed": seen.changed,
        "alpha": alpha,
        "delta": delta,
        "vacuous": alpha >= 1,
    }


def _drop(seen: Observed, delta: float) -> dict[str, Any] | None:
    if seen.lost is None or seen.gained is None:
        return None
    drop = rounded_up(confidence.drop(seen.lost, seen.gained, seen.samples, delta)) or 0.0
    return {
        "statement": "the top-1 accuracy falls by at most drop",
        "kind": "top1_drop",
        "lost": seen.lost,
        "gained": seen.gained,
        "drop": drop,
        "delta": delta,
        "vacuous": drop >= 1,
    }


def _moves(seen: Observed, delta: float) -> list[dict[str, Any]]:
    found = []
    for alpha in LEVELS if seen.moved is not None else ():
        x = confidence.beyond(seen.moved or (), alpha, delta)
        needed = confidence.enough(alpha, delta)
        found.append(
            {
                "statement": "at most a fraction alpha of inputs moves its output by more than x (relative L2)",
                "kind": "relative_l2",
                "alpha": alpha,
                "rank": confidence.rank(seen.samples, alpha, delta),
                "x": None if x is None else rounded_up(x),
                "delta": delta,
                "samples_needed": needed,
                "vacuous": x is None or not np.isfinite(x),
            }
        )
    return found


class Watch:
    """Collects `Observed` batch by batch."""

    def __init__(self) -> None:
        self._moved: list[Array] | None = []
        self._samples = self._changed = self._lost = self._gained = self._answers = self._labelled = 0

    def add(self, before: Sequence[Any], after: Sequence[Any], count: int) -> None:
        """One batch of `count` samples: the outputs of both networks."""
        self._samples += count
        square, norm, broken = np.zeros(count), np.zeros(count), np.zeros(count, bool)
        for a, b in zip(before, after, strict=True):
            if not isinstance(a, np.ndarray) or a.dtype.kind != "f":
                continue
            if a.shape != b.shape or (count != 1 and (a.ndim == 0 or len(a) != count)):
                self._moved = None
                return
            x, y = a.astype(np.float64).reshape(count, -1), b.astype(np.float64).reshape(count, -1)
            whole = np.isfinite(x)
            broken |= (whole != np.isfinite(y)).any(axis=1)
            both = whole & np.isfinite(y)
            square += ((np.where(both, x, 0) - np.where(both, y, 0)) ** 2).sum(axis=1)
            norm += (np.where(both, x, 0) ** 2).sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(square > 0, np.sqrt(square / norm), 0.0)
        if self._moved is not None:
            self._moved.append(np.where(broken, np.inf, ratio))

    def vote(self, first: Array, second: Array, labels: Array | None) -> None:
        """The top-1 answers of one batch before and after, and the right ones where they are known."""
        self._answers += len(first)
        self._changed += int((first != second).sum())
        if labels is not None:
            self._labelled += len(labels)
            self._lost += int(((first == labels) & (second != labels)).sum())
            self._gained += int(((first != labels) & (second == labels)).sum())

    @property
    def observed(self) -> Observed:
        """All batches so far, without the digest of their samples."""
        n = self._samples
        answered, labelled = n > 0 and self._answers == n, n > 0 and self._labelled == n
        return Observed(
            n,
            self._changed if answered else None,
            self._lost if labelled else None,
            self._gained if labelled else None,
            tuple(np.concatenate(self._moved).tolist()) if self._moved else None,
        )
