"""Interleaved timing: A, B, A, B, ..., so that whatever else the machine does falls on all alike; medians with their spread."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxprune.graph import Array

Call = Callable[[], Any]
Clock = Callable[[], float]

LEAST = 15  # rounds: the interval of the median below needs six, and a median of fewer is a matter of luck
SHORTEST = 1e-3  # seconds that one sample lasts: a clock read and a call in Python take microseconds
CONFIDENCE_Z = 1.96


@dataclass(frozen=True)
class Spread:
    """The median of some samples, and the quartiles below and above it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(samples: Array) -> Spread:
        low, median, high = (float(v) for v in np.quantile(samples, (0.25, 0.5, 0.75)))
        return Spread(median, low, high)

    def to_json(self) -> dict[str, float]:
        return {"median": self.median, "low": self.low, "high": self.high}


def interval(samples: Array) -> tuple[float, float]:
    """A confidence interval (95 %, normal approximation of the binomial) of the median, from order statistics alone."""
    ordered = np.sort(samples)
    n = len(ordered)
    half = CONFIDENCE_Z * math.sqrt(n) / 2
    low, high = math.floor((n - 1) / 2 - half), math.ceil((n - 1) / 2 + half)
    return float(ordered[max(0, low)]), float(ordered[min(n - 1, high)])


@dataclass(frozen=True, eq=False)
class Rounds:
    """seconds[r, m]: what model m took in round r for one run."""

    seconds: Array

    def __len__(self) -> int:
        return len(self.seconds)

    @cached_property
    def spreads(self) -> list[Spread]:
        """Seconds for one run of every model."""
        return [Spread.of(column) for column in self.seconds.T]

    def ratios(self, model: int) -> Array:
        """Seconds of one model over those of the first, round by round: what slows the machine down slows both."""
        quotients: Array = self.seconds[:, model] / self.seconds[:, 0]
        return quotients

    def ratio(self, model: int) -> Spread:
        """The median of `ratios`, with its quartiles."""
        return Spread.of(self.ratios(model))

    def precision(self) -> float:
        """Half the widest confidence interval of a median ratio, relative to it; of a single model that of its seconds."""
        columns = [self.ratios(m) for m in range(1, self.seconds.shape[1])] or [self.seconds[:, 0]]
        ends = [(*interval(c), float(np.median(c))) for c in columns]
        return max((high - low) / 2 / middle for low, high, middle in ends)


def interleaved(
    calls: Sequence[Call],
    *,
    limit: float = 10.0,
    precision: float = 0.005,
    least: int = LEAST,
    clock: Clock = time.perf_counter,
) -> Rounds:
    """Times all calls in turn, in rounds, until the median ratios to the first are known to `precision` (relative).

    Or until `limit` seconds have passed; but never fewer than `least` rounds, unless they would take ten times the limit. Every
    call is warmed up first, and repeated within a sample where it is short. Every second round goes backwards, so that none
    always follows the same other one.
    """
    start = clock()
    repeats = [_repeats(call, clock) for call in calls]
    rows: list[list[float]] = []
    while True:
        row = [0.0] * len(calls)
        order = range(len(calls)) if len(rows) % 2 == 0 else reversed(range(len(calls)))
        for m in order:
            row[m] = _sample(calls[m], repeats[m], clock)
        rows.append(row)
        spent, enough = clock() - start, len(rows) >= least
        if (enough and spent >= limit) or spent >= 10 * limit:
            return Rounds(np.array(rows))
        if enough and len(rows) % 5 == 0 and (found := Rounds(np.array(rows))).precision() <= precision:
            return found


def _repeats(call: Call, clock: Clock) -> int:
    """How often to repeat a call within one sample. The first two runs, which allocate memory, count for nothing."""
    call()
    call()
    return max(1, math.ceil(SHORTEST / max(_sample(call, 1, clock), 1e-7)))


def _sample(call: Call, repeats: int, clock: Clock) -> float:
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats


def fastest(call: Call, *, limit: float = 0.3, agree: float = 0.02, least: int = 5, clock: Clock = time.perf_counter) -> float:
    """Seconds of the fastest run, once three runs were as fast to within `agree`; or after `limit` seconds, warm-up included.

    Interruptions only ever lengthen a run, so the fastest is what the machine takes when it is left alone.
    """
    start = clock()
    call()
    found: list[float] = []
    while True:
        found.append(_sample(call, 1, clock))
        best = sorted(found)[:3]
        settled = len(found) >= least and best[-1] <= (1 + agree) * best[0]
        if settled or clock() - start >= limit:
            return best[0]
