"""Cost tables: the seconds of one layer as a function of its channels in and out, staircases included.

Kernels work on blocks of channels, so time is a staircase: as long as a tread does not end, another channel costs nothing. The
width of the treads is measured first, near a small width where a step is tall; then a grid of widths that end treads. Between
them the time is interpolated. What is measured by itself is then held to what must be true: no layer is faster for having
more channels, since it could be padded.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from onnxprune.graph import Array
from onnxprune.timing.layers import Spec

TREADS = (32, 16, 8, 4, 2)
STEEP = 0.3  # a tread may fall by this part of the whole step at its far end: measurements are not exact
FRACTIONS_OUT = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
FRACTIONS_IN = (0.125, 0.25, 0.5, 0.75)
LIMIT = 0.08  # seconds for one point of a table
AGAIN = 1.04  # a point that is so much slower than a wider one is measured again

Measure = Callable[[int, int, float], float]
"""measure(channels in, channels out, limit in seconds) -> seconds."""


@dataclass(frozen=True, eq=False)
class Table:
    """seconds[i, o] for inputs[i] channels in and outputs[o] channels out; both rise, the last ones are the full widths.

    treads: the widths of the steps, in and out.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: Array
    treads: tuple[int, int] = (1, 1)

    def at(self, inputs: int, outputs: int) -> float:
        """Seconds at any width: that of the end of its tread, bilinear between the measured ones, at least the smallest."""
        i, u = _place(self.inputs, inputs, self.treads[0])
        o, v = _place(self.outputs, outputs, self.treads[1])
        s = self.seconds
        above = s[i, o] if not v else (1 - v) * s[i, o] + v * s[i, o + 1]
        if not u:
            return float(above)
        below = s[i + 1, o] if not v else (1 - v) * s[i + 1, o] + v * s[i + 1, o + 1]
        return float((1 - u) * above + u * below)

    def to_json(self) -> dict[str, Any]:
        return {
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "seconds": self.seconds.tolist(),
            "treads": list(self.treads),
        }

    @staticmethod
    def from_json(data: dict[str, Any]) -> Table:
        """Raises ValueError, KeyError or TypeError for what is not a table."""
        inputs, outputs = tuple(int(n) for n in data["inputs"]), tuple(int(n) for n in data["outputs"])
        seconds, treads = np.array(data["seconds"], np.float64), (int(data["treads"][0]), int(data["treads"][1]))
        rising = all(list(axis) == sorted(set(axis)) for axis in (inputs, outputs))
        if seconds.shape != (len(inputs), len(outputs)) or not rising or not (seconds >= 0).all() or min(treads) < 1:
            raise ValueError("not a table of layer costs")
        return Table(inputs, outputs, seconds, treads)


def _place(axis: Sequence[int], width: int, tread: int) -> tuple[int, float]:
    """Where a width lies on an axis: the index of the point at or below it, and how far it is to the next one."""
    width = min(-(-width // tread) * tread, axis[-1])
    if width <= axis[0]:
        return 0, 0.0
    i = bisect_right(axis, width) - 1
    return (i, 0.0) if axis[i] == width else (i, (width - axis[i]) / (axis[i + 1] - axis[i]))


def measured(spec: Spec, measure: Measure) -> Table:
    """The table of a layer."""
    n, m = spec.inputs, spec.outputs
    if spec.by == "channel":
        tread = _tread(n, lambda width: measure(width, m, LIMIT))
        inputs = _points(n, tread, FRACTIONS_OUT)
        return Table(inputs, (m,), _grid(inputs, (m,), measure), (tread, 1))
    base = min(n, 64), min(m, 64)
    into = _tread(n, lambda width: measure(width, base[1], LIMIT))
    out = _tread(m, lambda width: measure(base[0], width, LIMIT))
    inputs, outputs = _points(n, into, FRACTIONS_IN), _points(m, out, FRACTIONS_OUT)
    return Table(inputs, outputs, _grid(inputs, outputs, measure), (into, out))


def agreed(tables: Mapping[Spec, Table]) -> dict[Spec, Table]:
    """The tables with the treads that most layers of a kind have: they are those of one kernel, and single ones are noisy.

    Only axes count that are wide enough to show more than one tread.
    """
    found: dict[Spec, Table] = {}
    for one, table in tables.items():
        kind = (one.op, one.by, one.w[2:])
        treads = []
        for axis, full in enumerate((table.inputs[-1], table.outputs[-1])):
            alike = [t for s, t in tables.items() if (s.op, s.by, s.w[2:]) == kind]
            votes = Counter(t.treads[axis] for t in alike if (t.inputs, t.outputs)[axis][-1] >= TREADS[0])
            most = max(votes, key=lambda tread: (votes[tread], tread), default=table.treads[axis])
            treads.append(most if len((table.inputs, table.outputs)[axis]) > 1 or full >= TREADS[0] else 1)
        found[one] = replace(table, treads=(treads[0], treads[1]))
    return found


def _tread(full: int, seconds: Callable[[int], float]) -> int:
    """How many channels are as fast as one, at least: the widest tread that a step up to 64 channels consists of."""
    base = next((b for b in (64, 32, 16, 8, 4) if b <= full), 0)
    widths = sorted({base - d for p in TREADS for d in (0, p // 2, p - 1, p) if base > d}, reverse=True) if base else []
    found = {width: seconds(width) for width in widths}
    for tread in TREADS:
        if 2 * tread <= base and (_flat(found, base, tread) or _flat(_again(found, base, tread, seconds), base, tread)):
            return tread
    return 1


def _flat(found: dict[int, float], base: int, tread: int) -> bool:
    """Whether no width within the tread below `base` is much faster than its end, measured by the step to the next one."""
    step = max(0.0, found[base] - found[base - tread])
    return all(found[w] >= found[base] - STEEP * step for w in found if base - tread < w < base)


def _again(found: dict[int, float], base: int, tread: int, seconds: Callable[[int], float]) -> dict[int, float]:
    """An interruption at the end of a tread would look like a slope."""
    for width in (base, base - tread):
        found[width] = min(found[width], seconds(width))
    return found


def _points(full: int, tread: int, fractions: Sequence[float]) -> tuple[int, ...]:
    """The widths to measure at: the first treads, then fractions of the full width, all at the ends of treads."""
    few = [tread, 2 * tread, 3 * tread, 4 * tread]
    ends = [max(1, round(full * f / tread)) * tread for f in fractions]
    return tuple(sorted({w for w in (*few, *ends) if w < full} | {full}))


def _grid(inputs: Sequence[int], outputs: Sequence[int], measure: Measure) -> Array:
    """The times at all points, those again that a wider layer beats, and then never more than a wider layer takes."""
    found = np.array([[measure(i, o, LIMIT) for o in outputs] for i in inputs])
    for i, o in np.argwhere(found > AGAIN * _monotone(found)):
        found[i, o] = min(found[i, o], measure(inputs[i], outputs[o], 3 * LIMIT))
    return _monotone(found)


def _monotone(found: Array) -> Array:
    """The least that any layer at least as wide took."""
    least = np.minimum.accumulate(found[::-1], axis=0)[::-1]
    return np.asarray(np.minimum.accumulate(least[:, ::-1], axis=1)[:, ::-1])
