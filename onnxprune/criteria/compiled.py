"""The loops behind the sensitivities, compiled for the processor at hand by numba.

A linear layer is here one matrix product: z = w^T x with w [C, R] >= 0, x [C, Q] >= 0. Rows r are filters of one sign part,
columns q are (sample, patch) pairs, and unit u owns some of the C terms of every sum. Its share in (r, q) is the sum of its own
terms over z_rq. With R = 1/z and v_ru, a_uq the weights and activations that it owns, Cauchy-Schwarz gives for all rows at once
    max_r share_ruq  <=  |a_uq|_2 max_r |v_ru|_2 R_rq  =:  U_uq,
an equality where it owns one term. In logarithms the product is a sum, and 16 bits hold one: `_peaks` is an addition and a
maximum of 32 lanes at a time. Only the (u, q) whose U exceeds the largest share known of u are evaluated, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numpy import float32, int16, int32

F = TypeVar("F", bound=Callable[..., Any])
FAST = {"nnan", "nsz", "contract", "reassoc"}
STEPS = 512  # of the 16-bit logarithms in one octave
DEAD = -39 * STEPS  # the logarithm of 1/z where z counts as zero, and the least of all others
LIGHT = -24 * STEPS  # the least logarithm of a weight's norm relative to its unit's largest; with DEAD it still fits 16 bits
ERROR = 2e-4  # of `_log2`
SLACK = 1e-3  # more than all approximations of a bound's logarithm come to, roundings to 16 bits apart
FULL = 1 - 1e-6  # shares above this count as 1
BLOCK = 512  # columns at a time: their logarithms stay in the processor's cache
LANES = 32
UNROLL = 8  # rows that one sweep of `_peaks` takes


GIVEN = "Array(float32, {}, 'C', True)"  # numba's word for an array that may be read-only


def compiled(signature: str = "") -> Callable[[F], F]:
    """Compiles a function for a signature in numba's words; without one, together with what calls it.

    The machine code is kept beside the source or in the user's cache; in memory where neither can be written.
    """
    options: dict[str, Any] = {"nogil": True, "fastmath": FAST, "error_model": "numpy"}

    def decorate(function: F) -> F:
        if not signature:
            return cast(F, numba.njit(**options)(function))
        try:
            return cast(F, numba.njit(signature, cache=True, **options)(function))
        except RuntimeError:  # "no locator available": a read-only installation of a user without a home
            return cast(F, numba.njit(signature, **options)(function))

    return decorate


@compiled()
def _log2(v: Any) -> Any:
    """log2 of a float32 >= 0, within ERROR for normal numbers and too large below."""
    bits = np.float32(v).view(np.int32)
    m = float32(bits & int32(0x7FFFFF)) * float32(2.0**-23)
    bend = float32(0.43872575) + m * (float32(-0.23905826) + m * float32(0.08213072))
    return float32(bits - int32(0x3F800000)) * float32(2.0**-23) + m * (float32(1) - m) * bend


@compiled()
def _run(base: Any, rows: Any, k: int, step: int) -> Any:
    """How many rows from the k-th on lie one after the other in x, `step` apart; 1 at least."""
    n = 1
    while k + n < len(rows) and rows[k + n, 0] == rows[k, 0] and base[rows[k + n, 1]] == base[rows[k, 1]] + n * step:
        n += 1
    return n


@compiled(f"void({GIVEN.format(3)}, f4[::1], i8[:,::1], i8[::1], i8[:,::1], i8[:,::1], i8, i8, f4[:,::1])")
def unfold(x: Any, scale: Any, base: Any, shift: Any, inside: Any, rows: Any, step: int, line: int, out: Any) -> None:
    """out [C * T, Q]: for every channel and tap the positive part of what it meets, times the scale of the sample.

    x: [n, C, space]. rows: [*, 2], the (sample, row of patches) of every len(out) / len(rows) columns. base [T, rows]: where
    the tap's row of x begins, -1 outside. shift [T]: its first position there; step: from patch to patch. inside [T, 2]: the
    patches of a row that meet x. line: positions in a row of x.
    """
    width, taps = out.shape[1] // len(rows), len(shift)
    for c in range(x.shape[1]):
        for t in range(taps):
            low, high = inside[t, 0], inside[t, 1]
            k = 0
            while k < len(rows):
                n, begin = 1, base[t, rows[k, 1]]
                s, source = scale[rows[k, 0]], x[rows[k, 0], c]
                if begin >= 0 and step == 1 and line == width:  # as many positions as patches: rows follow one another
                    n = _run(base[t], rows, k, width)
                to, first = out[c * taps + t, k * width : (k + n) * width], begin + shift[t]
                k += n
                if begin < 0 or low >= high:
                    to[:] = 0
                elif step == 1:
                    start, stop = (0, n * width) if n > 1 else (low, high)
                    start, stop = max(start, -first), min(stop, len(source) - first)
                    here, there = to[start:stop], source[first + start : first + stop]
                    for p in range(len(here)):
                        here[p] = max(there[p] * s, float32(0))
                else:
                    for p in range(low, high):
                        to[p] = max(source[first + p * step] * s, float32(0))
                if begin >= 0 and low < high:
                    for r in range(0, n * width, width):
                        to[r : r + low] = 0
                        to[r + high : r + width] = 0


@compiled(f"void({GIVEN.format(2)}, i8[::1], f4[::1], f4[:,::1], i8, i8)")
def split(w: Any, filters: Any, factors: Any, out: Any, start: int, stop: int) -> None:
    """Columns start..stop of w [O, C] as rows of out [C, R]: row r is the positive part of factors[r] * w[filters[r]]."""
    for r0 in range(0, len(filters), 64):
        for c in range(start, stop):
            to = out[c, r0 : r0 + 64]
            for i in range(len(to)):
                to[i] = max(w[filters[r0 + i], c] * factors[r0 + i], float32(0))


@compiled("void(f4[:,::1], i4[:,::1], i4[:,::1], i2[:,::1], i4[::1], f4[::1], i8, i8)")
def norms(w: Any, terms: Any, order: Any, light: Any, count: Any, top: Any, start: int, stop: int) -> None:
    """For the units start..stop the rows with weights on them, and the logarithms of those weights' norms.

    w: [C, R]; terms: [U, K]. Fills order [U, R'], light [U, R'] (relative to top [U], the logarithm of the largest norm, in
    STEPS, rounded up) and count [U], a multiple of UNROLL, the last row repeated as needed; 0 where all weights are zero.
    """
    rows = w.shape[1]
    energy, steps = np.empty(rows, np.float64), np.empty(rows, np.int16)
    for u in range(start, stop):
        for r in range(rows):
            energy[r] = 0.0
        for k in range(terms.shape[1]):
            line = w[terms[u, k]]
            for r in range(rows):
                energy[r] += np.float64(line[r]) * np.float64(line[r])
        most = energy.max()
        count[u] = 0
        if most == 0:
            continue
        top[u] = float32(0.5 * math.log2(most) + 1e-5)
        part = 1 / most
        for r in range(rows):
            octaves = float32(0.5) * _log2(float32(energy[r] * part + 1e-37)) + float32(ERROR)
            steps[r] = max(int32(octaves * float32(STEPS) + float32(32769)) - int32(32768), int32(LIGHT))
        n = 0
        for r in range(rows):  # without a branch that nobody can predict
            order[u, n], light[u, n] = r, steps[r]
            n += 1 if energy[r] > 0 else 0
        while n % UNROLL:
            order[u, n], light[u, n] = order[u, n - 1], light[u, n - 1]
            n += 1
        count[u] = n


@compiled()
def _reciprocals(z: Any, positive: int, floor: Any, scale: Any, at: int, columns: int, out: Any) -> None:
    """out [R, columns]: log2(scale / z) in STEPS, rounded up; DEAD where z is not above its floor."""
    for r in range(len(z)):
        line, to = z[r, at : at + columns], out[r]
        least = floor[0 if r < positive else 1, at : at + columns]
        where = scale[at : at + columns]
        for b in range(columns):
            octaves = where[b] - _log2(line[b]) + float32(ERROR)
            steps = int32(max(octaves, float32(-39)) * float32(STEPS) + float32(32769)) - int32(32768)
            to[b] = int16(max(steps, int32(DEAD)) if line[b] > least[b] else int32(DEAD))
        to[columns:] = DEAD


@compiled()
def _peaks(r: Any, order: Any, light: Any, count: int, out: Any) -> None:
    """out [B]: the maximum of r[order[t]] + light[t] over t < count, a multiple of UNROLL."""
    out[:] = DEAD + LIGHT
    for t in range(0, count, UNROLL):
        a, b, c, d = r[order[t]], r[order[t + 1]], r[order[t + 2]], r[order[t + 3]]
        e, f, g, h = r[order[t + 4]], r[order[t + 5]], r[order[t + 6]], r[order[t + 7]]
        wa, wb, wc, wd = light[t], light[t + 1], light[t + 2], light[t + 3]
        we, wf, wg, wh = light[t + 4], light[t + 5], light[t + 6], light[t + 7]
        for i in range(len(out)):
            ab, cd = max(int16(a[i] + wa), int16(b[i] + wb)), max(int16(c[i] + wc), int16(d[i] + wd))
            ef, gh = max(int16(e[i] + we), int16(f[i] + wf)), max(int16(g[i] + wg), int16(h[i] + wh))
            abcd, efgh = max(ab, cd), max(ef, gh)
            most = max(abcd, efgh)
            out[i] = max(out[i], most)


@compiled()
def _norm(x: Any, terms: Any, at: int, columns: int, energy: Any, most: Any) -> None:
    """energy [columns], the sums of squares of a unit's activations, and most [columns], the largest of them."""
    energy[:columns] = 0
    most[:columns] = 0
    for k in range(0, len(terms) - len(terms) % 3, 3):
        a, b, c = x[terms[k], at:], x[terms[k + 1], at:], x[terms[k + 2], at:]
        for i in range(columns):
            energy[i] += a[i] * a[i] + b[i] * b[i] + c[i] * c[i]
            most[i] = max(most[i], a[i], b[i], c[i])
    for k in range(len(terms) - len(terms) % 3, len(terms)):
        a = x[terms[k], at:]
        for i in range(columns):
            energy[i] += a[i] * a[i]
            most[i] = max(most[i], a[i])


@compiled()
def _bounds(
    x: Any, terms: Any, at: int, columns: int, peak: Any, scale: Any, top: Any, energy: Any, active: Any, out: Any
) -> Any:
    """Fills out [columns] with log2 of the bounds U of one unit, -1e30 where it is not active; returns the largest, or -256."""
    where, most = scale[at : at + columns], int32(0)
    if len(terms) == 1:
        line = x[terms[0], at : at + columns]
        for b in range(columns):
            u = _log2(line[b]) - where[b] + float32(peak[b]) * float32(1 / STEPS) + top
            out[b] = u if line[b] > 0 else float32(-1e30)
    else:
        _norm(x, terms, at, columns, energy, active)
        least = float32(len(terms)) * float32(1.2e-38)  # what underflows in a square is below 2^-126
        for b in range(columns):
            u = float32(0.5) * _log2(energy[b] + least) - where[b] + float32(peak[b]) * float32(1 / STEPS) + top
            out[b] = u if active[b] > 0 else float32(-1e30)
    for b in range(columns):  # see `_share`
        most = max(most, np.float32(max(out[b] + float32(256), float32(0))).view(np.int32))
    return np.int32(most).view(np.float32) - float32(256)


@compiled()
def _column(z: Any, positive: int, floor: Any, at: int, out: Any) -> None:
    """out [R] = 1 / z[:, at], 0 where that is not above its floor."""
    for r in range(len(out)):
        v = z[r, at]
        out[r] = float32(1) / v if v > floor[0 if r < positive else 1, at] else float32(0)


@compiled()
def _nine(x: Any, terms: Any, at: int, w: Any, r: Any) -> Any:
    """`_share` of a unit with nine terms."""
    w0, w1, w2, w3, w4 = w[terms[0]], w[terms[1]], w[terms[2]], w[terms[3]], w[terms[4]]
    w5, w6, w7, w8 = w[terms[5]], w[terms[6]], w[terms[7]], w[terms[8]]
    a0, a1, a2, a3, a4 = x[terms[0], at], x[terms[1], at], x[terms[2], at], x[terms[3], at], x[terms[4], at]
    a5, a6, a7, a8 = x[terms[5], at], x[terms[6], at], x[terms[7], at], x[terms[8], at]
    best, whole = int32(0), len(r) - len(r) % LANES
    for start in range(0, whole, LANES):  # of a constant length, so that no row is left to the loop that takes one at a time
        most = int32(0)
        for i in range(start, start + LANES):
            c = w0[i] * a0 + w1[i] * a1 + w2[i] * a2 + w3[i] * a3 + w4[i] * a4
            most = max(most, np.float32((c + w5[i] * a5 + w6[i] * a6 + w7[i] * a7 + w8[i] * a8) * r[i]).view(np.int32))
        best = max(best, most)
    for i in range(whole, len(r)):
        c = w0[i] * a0 + w1[i] * a1 + w2[i] * a2 + w3[i] * a3 + w4[i] * a4
        best = max(best, np.float32((c + w5[i] * a5 + w6[i] * a6 + w7[i] * a7 + w8[i] * a8) * r[i]).view(np.int32))
    return np.int32(best).view(np.float32)


@compiled()
def _share(x: Any, terms: Any, at: int, w: Any, r: Any, sums: Any) -> Any:
    """The largest share of a unit over all rows, in column `at`. r: [R], the reciprocals of the column.

    Its maximum is one of integers, which order non-negative floats as well: LLVM does not vectorise that of floats.
    """
    if len(terms) == 9:
        return _nine(x, terms, at, w, r)
    best = int32(0)
    if len(terms) == 1:
        line, a = w[terms[0]], x[terms[0], at]
        for i in range(len(r)):
            best = max(best, np.float32(line[i] * a * r[i]).view(np.int32))
        return np.int32(best).view(np.float32)
    sums[:] = 0
    for k in range(len(terms)):
        line, a = w[terms[k]], x[terms[k], at]
        if a > 0:
            for i in range(len(r)):
                sums[i] += line[i] * a
    for i in range(len(r)):
        best = max(best, np.float32(sums[i] * r[i]).view(np.int32))
    return np.int32(best).view(np.float32)


@compiled()
def _bar(best: float) -> Any:
    """The logarithm below which a bound cannot matter."""
    return float32(math.log2(best)) - float32(SLACK) if best > 0 else float32(-1e29)


@compiled(
    f"void({GIVEN.format(2)}, f4[:,::1], i8, f4[:,::1], f4[::1], "
    "i4[:,::1], i4[:,::1], i2[:,::1], i4[::1], f4[::1], f4[:,::1], f8[::1], f8)"
)
def raise_shares(
    x: Any,
    z: Any,
    positive: int,
    floor: Any,
    scale: Any,
    terms: Any,
    order: Any,
    light: Any,
    count: Any,
    top: Any,
    w: Any,
    best: Any,
    tolerance: float,
) -> None:
    """Raises best [U] so that best[u] >= every share of u, and best[u] <= (1 + tolerance) * the largest, or what it was.

    x: [C, Q]; w: [C, R]; z = w^T x [R, Q]; the first `positive` rows are one sign part, the others another. floor [2, Q]: what
    z must exceed, by part; scale [Q]: the logarithm of a number near z. terms [U, K]; order, light, count, top: see `norms`.
    """
    rows, width = z.shape
    size = min(BLOCK, (width + LANES - 1) // LANES * LANES)
    r, peak = np.empty((rows, size), np.int16), np.empty(size, np.int16)
    bound, energy, active = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    sums = np.empty(rows, np.float32)
    inverse, have = np.empty((size, rows), np.float32), np.empty(size, np.bool_)
    for at in range(0, width, size):
        columns = min(size, width - at)
        _reciprocals(z, positive, floor, scale, at, columns, r)
        have[:] = False
        for u in range(len(terms)):
            if best[u] >= 1 or count[u] == 0:
                continue
            _peaks(r, order[u], light[u], count[u], peak)
            most = _bounds(x, terms[u], at, columns, peak, scale, top[u], energy, active, bound)
            bar = _bar(best[u])
            if most <= bar:
                continue
            if tolerance > 0 and terms.shape[1] == 1:
                best[u] = min(1.0, max(best[u], 2.0 ** (np.float64(most) + SLACK)))
                continue
            b = int(np.argmax(bound[:columns]))  # the most promising first: it raises the bar for all the others
            following = -1
            while b < columns:
                if bound[b] > bar:
                    if not have[b]:
                        _column(z, positive, floor, at + b, inverse[b])
                        have[b] = True
                    share = np.float64(_share(x, terms[u], at + b, w, inverse[b], sums))
                    if share > best[u]:
                        best[u] = share * (1 + tolerance) if share * (1 + tolerance) < FULL else 1.0
                        bar = _bar(best[u])
                    bound[b] = -1e30
                following += 1
                b = following
            best[u] = min(best[u], 1.0)
