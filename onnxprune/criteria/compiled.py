"""The loops behind the sensitivities, compiled for the processor at hand by numba.

A linear layer is here one matrix product: z = w^T x with w >= 0, x >= 0. Rows r are filters of one sign part, columns q are
(sample, patch) pairs, and unit u owns some of the K terms of every sum. Its share in (r, q) is the sum of its own terms over
z_rq. Shares do not change when a filter or a column is multiplied by a number, so that both are brought to a largest entry of
LEVELS and rounded down to integers of 8 bits: their product, which processors make four times as fast as one of floats, is
never above z. With v_ru, a_uq the weights and activations that u owns, Cauchy-Schwarz gives for all rows at once
    max_r share_ruq  <=  |a_uq|_2 max_r |v_ru|_2 / z_rq  =:  U_uq,
and in logarithms of 16 bits that is an addition and a maximum of 32 lanes at a time (`lanes.peaks`). Only the (u, q) whose U
exceeds the largest share known of u are looked at, row by row, and only the z that then still matter are summed in float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy import float32, int16, int32

from onnxprune.criteria.jit import (
    ABSENT,
    DEAD,
    ERROR,
    FAINT,
    FULL,
    GIVEN,
    LOWEST,
    PLACES,
    SLACK,
    STEPS,
    UNKNOWN,
    compiled,
    in_steps,
    log2,
)
from onnxprune.criteria.lanes import LANES, peaks

BLOCK = 256  # columns at a time: their logarithms stay in the processor's cache
COARSE = 16  # products of integers up to this are replaced by exact sums where they are looked at


@compiled("void(i4[:,::1], i8, f4[::1], f4[::1], i8[::1], f4[:,::1])")
def measure(z: Any, positive: int, height: Any, top: Any, starts: Any, out: Any) -> None:
    """out [2, samples]: the largest z * height * top of each sign part (the first `positive` rows are one) and sample.

    z: [R, Q] int32; height: [R]; top: [Q]; starts: where the samples' columns begin.
    """
    most = np.empty(z.shape[1], np.float32)
    for part in range(2):
        most[:] = 0
        for r in range(0 if part == 0 else positive, positive if part == 0 else len(z)):
            line, s = z[r], height[r]
            for q in range(len(most)):
                most[q] = max(most[q], float32(line[q]) * s)
        for i in range(len(starts)):
            best = float32(0)
            for q in range(starts[i], starts[i + 1] if i + 1 < len(starts) else len(most)):
                best = max(best, most[q] * top[q])
            out[part, i] = best


@compiled()
def _reciprocals(z: Any, at: int, columns: int, out: Any) -> None:
    """out [R, columns]: log2(1 / z) in STEPS, at most 0.09 octaves too large: a float's bits, cut, are nearly its logarithm."""
    for r in range(len(z)):
        line, to = z[r, at : at + columns], out[r]
        for b in range(columns):
            steps = int32(127 * STEPS) - (np.float32(line[b]).view(np.int32) >> int32(15))
            to[b] = int16(steps) if line[b] > 0 else int16(UNKNOWN)
        to[columns:] = DEAD


@compiled()
def _bounds(peak: Any, energy: Any, out: Any) -> Any:
    """out [B] = peak + energy, the logarithms of a unit's bounds in STEPS; returns the largest."""
    most = int16(-32768)
    for b in range(len(energy)):
        out[b] = int16(peak[b] + energy[b]) if energy[b] > int16(ABSENT) else int16(-32768)
        most = max(most, out[b])
    return most


@compiled()
def _bar(best: float) -> Any:
    """The logarithm in STEPS at or below which a bound cannot matter."""
    return max(math.floor(math.log2(best) * STEPS), LOWEST) if best > 0 else LOWEST


@compiled()
def _places(base: Any, shift: Any, inside: Any, rows: Any, step: int, width: int, q: int, out: Any) -> None:
    """out [T]: where in a channel of x the taps of column q lie, -1 outside."""
    row, p = rows[q // width, 1], q % width
    for t in range(len(out)):
        here = base[t, row] >= 0 and inside[t, 0] <= p < inside[t, 1]
        out[t] = base[t, row] + shift[t] + p * step if here else -1


@compiled()
def _entry(x: Any, scale: float, channel: int, place: int) -> Any:
    """The positive part of an entry of the unfolded matrix."""
    return max(x[channel, place] * scale, float32(0)) if place >= 0 else float32(0)


@compiled()
def _total(line: Any, factor: Any, x: Any, scale: Any, place: Any, column: Any) -> Any:
    """The sum of the positive parts of factor * line, times a column's entries; line, column [K], the latter is filled."""
    k = 0
    for c in range(len(x)):
        for t in range(len(place)):
            column[k] = _entry(x, scale, c, place[t])
            k += 1
    total = float32(0)
    for k in range(len(line)):
        total += max(line[k] * factor, float32(0)) * column[k]
    return total


@compiled()
def _rows(r: Any, order: Any, light: Any, count: int, least: int, out: Any) -> Any:
    """Fills out with those of order[t], t < count, where r[order[t]] + light[t] is above `least`; returns how many."""
    n = np.uintp(0)
    for t in range(np.uintp(count)):
        out[n] = order[t]
        n += np.uintp(int32(r[order[t]]) + int32(light[t]) > least)
    return n


@compiled(inline=True)
def _raised(
    u: int, q: int, b: int, best: float, tolerance: float, bar: int, power: Any, here: Any, s: Any, spots: Any, octaves: Any,
    z: Any, positive: int, floor: Any, height: Any, top: Any, terms: Any, order: Any, light: Any, count: Any,
    w: Any, filters: Any, factors: Any, r: Any, own: Any, live: Any, column: Any,
) -> Any:  # fmt: skip
    """The larger of `best` and 1 + tolerance times the largest share of unit u in column q, own [K] being what it owns there.

    octaves [R]: the column of r; power: the unit's energy there. live and column are space to work in.
    """
    for t in range(_rows(octaves, order[u], light[u], count[u], bar - power, live)):
        i, part = live[t], float32(0)
        line, factor, mine = w[filters[i]], factors[i], terms[u]
        for k in range(np.uintp(len(own))):
            part += max(line[mine[k]] * factor, float32(0)) * own[k]
        if z[i, q] >= 0:  # not yet replaced by the exact sum
            if z[i, q] > COARSE and part <= float32(z[i, q]) * height[i] * top[q] * float32(best) * float32(1 - 1e-5):
                continue
            exact = _total(w[filters[i]], factors[i], here, s, spots, column)
            if exact <= floor[0 if i < positive else 1, q]:
                exact, octaves[i] = float32(0), DEAD
            else:
                fine = float32(ERROR + SLACK) - log2(exact / (height[i] * top[q]))
                octaves[i] = min(in_steps(fine), int32(UNKNOWN))
            z[i, q], r[i, b] = np.float32(exact).view(np.int32) | int32(-2147483648), octaves[i]
        exact = np.int32(z[i, q] & int32(0x7FFFFFFF)).view(np.float32)
        share = np.float64(part) / np.float64(exact) if exact > 0 else 0.0
        if share > best:
            best = share * (1 + tolerance) if share * (1 + tolerance) < FULL else 1.0
    return best


@compiled(
    f"void(i4[:,::1], i8, f4[:,::1], f4[::1], f4[::1], i2[:,::1], u4[:,::1], u4[:,::1], i2[:,::1], i4[::1], "
    f"{GIVEN.format(2)}, u4[::1], f4[::1], {GIVEN.format(3)}, f4[::1], {PLACES}, f8[::1], f8)"
)
def raise_shares(
    z: Any, positive: int, floor: Any, height: Any, top: Any, energy: Any,
    terms: Any, order: Any, light: Any, count: Any, w: Any, filters: Any, factors: Any,
    x: Any, scale: Any, base: Any, shift: Any, inside: Any, rows: Any, step: int, line: int,
    best: Any, tolerance: float,
) -> None:  # fmt: skip
    """Raises best [U] so that best[u] >= every share of u, and best[u] <= (1 + tolerance) * the largest, or what it was.

    z [R, Q]: the product of integers, which the exact sums replace where they were needed (as floats, their sign bit set). The
    first `positive` rows are one sign part, the others another. floor [2, Q]: what the sums must exceed, by part. height [R]
    and top [Q]: what a unit of z stands for is their product. energy [U, Q], x, scale, base, shift, inside, rows, step, line:
    see `encode`. terms [U, *]; w [O, K], filters, factors: what `split` had; order, light, count: see `norms`.
    """
    taps, width, size = len(shift), z.shape[1] // len(rows), min(BLOCK, (z.shape[1] + LANES - 1) // LANES * LANES)
    r, peak, bound = np.empty((len(z), size), np.int16), np.empty(size, np.int16), np.empty(size, np.int16)
    have, mine, live = np.empty(size, np.bool_), np.empty((size, len(z)), np.int16), np.empty(len(z) + 1, np.uint32)
    place, own = np.empty((size, taps), np.int64), np.empty(terms.shape[1], np.float32)
    column = np.empty(w.shape[1], np.float32)
    channel, tap = (terms // taps).astype(np.uint32), (terms % taps).astype(np.uint32)
    for at in range(0, z.shape[1], size):
        columns = min(size, z.shape[1] - at)
        _reciprocals(z, at, columns, r)
        have[:] = False
        for u in range(len(terms)):
            if best[u] >= 1 or count[u] == 0:
                continue
            peaks(r, order[u], light[u], np.intp(count[u]), int16(DEAD + FAINT), peak)
            bar = _bar(best[u])
            if _bounds(peak[:columns], energy[u, at : at + columns], bound[:columns]) <= bar:
                continue
            b = int(np.argmax(bound[:columns]))  # the most promising first: it raises the bar for all the others
            following = -1
            while b < columns:
                if bound[b] > bar:
                    q, bound[b] = at + b, -32768
                    spots, octaves, sample = place[b], mine[b], rows[(at + b) // width, 0]
                    if not have[b]:
                        _places(base, shift, inside, rows, step, width, q, spots)
                        octaves[:] = r[:, b]
                        have[b] = True
                    here, s, power = x[sample], scale[sample], int32(energy[u, q])
                    for k in range(len(own)):
                        own[k] = _entry(here, s, channel[u, k], spots[tap[u, k]])
                    best[u] = _raised(
                        u, q, b, best[u], tolerance, bar, power, here, s, spots, octaves, z, positive, floor, height, top,
                        terms, order, light, count, w, filters, factors, r, own, live, column,
                    )  # fmt: skip
                    bar = _bar(best[u])
                following += 1
                b = following
            best[u] = min(best[u], 1.0)
