"""Activations and weights as integers of 8 bits, and the norms of what units own of them: see `compiled`."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy import float32, int8, int16, int32

from onnxprune.criteria.jit import ABSENT, ERROR, FAINT, GIVEN, LEVELS, PLACES, compiled, in_steps, log2


@compiled()
def _run(base: Any, rows: Any, k: int, step: int) -> Any:
    """How many rows from the k-th on lie one after the other in x, `step` apart; 1 at least."""
    n = 1
    while k + n < len(rows) and rows[k + n, 0] == rows[k, 0] and base[rows[k + n, 1]] == base[rows[k, 1]] + n * step:
        n += 1
    return n


@compiled()
def _fetch(
    x: Any, c: int, t: int, scale: Any, base: Any, shift: Any, inside: Any, rows: Any, step: int, line: int, out: Any
) -> None:
    """out [Q]: the positive part of what tap t of channel c meets, times the scale of the sample. See `encode`."""
    width, low, high = len(out) // len(rows), inside[t, 0], inside[t, 1]
    k = 0
    while k < len(rows):
        n, begin = 1, base[t, rows[k, 1]]
        s, source = scale[rows[k, 0]], x[rows[k, 0], c]
        if begin >= 0 and step == 1 and line == width:  # as many positions as patches: rows follow one another
            n = _run(base[t], rows, k, width)
        to, first = out[k * width : (k + n) * width], begin + shift[t]
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
        if begin >= 0 and low < high and (low > 0 or high < width):
            for r in range(0, n * width, width):
                to[r : r + low] = 0
                to[r + high : r + width] = 0


@compiled(f"void({GIVEN.format(3)}, f4[::1], f4[:,:,::1])")
def largest_channel(x: Any, scale: Any, out: Any) -> None:
    """out [n, 1, space]: the maximum over channels of the positive part of scale * x; x [n, C, space]."""
    out[:] = 0
    for i in range(len(x)):
        to = out[i, 0]
        for c in range(x.shape[1]):
            source, s = x[i, c], scale[i]
            for p in range(len(to)):
                to[p] = max(to[p], source[p] * s)


@compiled(f"void({GIVEN.format(3)}, f4[::1], f4[:,:,::1], {PLACES}, u4[:,::1], u4[::1], f4[::1], i1[:,::1], i2[:,::1])")
def encode(
    x: Any,
    scale: Any,
    most: Any,
    base: Any,
    shift: Any,
    inside: Any,
    rows: Any,
    step: int,
    line: int,
    terms: Any,
    rest: Any,
    top: Any,
    out: Any,
    energy: Any,
) -> None:
    """The unfolded patches as integers out [K, Q], the largest entry of a column top [Q], and the norms of units energy [U, Q].

    Entry k = channel * T + tap is the positive part of what the tap meets, times the scale of the sample, over the column's
    top, in 1 / LEVELS and rounded down; energy is log2 of the norm of a unit's entries in that measure, in STEPS, rounded up.
    x: [n, C, space]; most: see `largest_channel`. rows: [*, 2], the (sample, row of patches) of every Q / len(rows) columns.
    base [T, rows]: where the tap's row of x begins, -1 outside. shift [T]: its first position there; step: from patch to
    patch. inside [T, 2]: the patches of a row that meet x. line: positions in a row of x. terms [U, *]: the entries that a
    unit owns; rest: those that nobody owns.
    """
    taps, columns = len(shift), out.shape[1]
    values, factor, sums = np.empty(columns, np.float32), np.empty(columns, np.float32), np.empty(columns, np.float32)
    ones = np.ones(len(most), np.float32)
    top[:] = 0
    for t in range(taps):
        _fetch(most, 0, t, ones, base, shift, inside, rows, step, line, values)
        for q in range(columns):
            top[q] = max(top[q], values[q])
    for q in range(columns):
        factor[q] = float32(LEVELS * (1 - 1e-6)) / top[q] if top[q] > 0 else float32(0)
    for u in range(len(terms)):
        sums[:] = 0
        for k in terms[u]:
            _fetch(x, k // taps, k % taps, scale, base, shift, inside, rows, step, line, values)
            to = out[k]
            for q in range(columns):
                v = values[q] * factor[q]
                to[q] = int8(int32(v))
                sums[q] += v * v + (float32(1e-30) if values[q] > 0 else float32(0))
        to16 = energy[u]
        for q in range(columns):
            octaves = float32(0.5) * log2(sums[q]) + float32(ERROR)
            to16[q] = int16(max(in_steps(max(octaves, float32(-9))), int32(FAINT)) if sums[q] > 0 else int32(ABSENT))
    for k in rest:
        _fetch(x, k // taps, k % taps, scale, base, shift, inside, rows, step, line, values)
        to = out[k]
        for q in range(columns):
            to[q] = int8(int32(values[q] * factor[q]))


@compiled(f"void({GIVEN.format(2)}, u4[::1], f4[::1], f4, u1[:,::1], f4[::1], i8, i8)")
def split(w: Any, filters: Any, factors: Any, levels: Any, out: Any, top: Any, start: int, stop: int) -> None:
    """Rows start..stop of out [R, K]: the positive part of factors[r] * w[filters[r]] over its largest top[r], times levels."""
    for r in range(start, stop):
        line, to, s = w[filters[r]], out[r], factors[r]
        most = int32(0)
        for k in range(len(to)):  # of integers, which order non-negative floats as well: LLVM does not vectorise that of floats
            most = max(most, np.float32(max(line[k] * s, float32(0))).view(np.int32))
        top[r] = np.int32(most).view(np.float32)
        factor = levels * float32(1 - 1e-6) / top[r]
        for k in range(len(to)):
            to[k] = np.uint8(int32(max(line[k] * s, float32(0)) * factor))


@compiled(f"void({GIVEN.format(2)}, u4[::1], f4[::1], u4[:,::1], u4[:,::1], i2[:,::1], i4[::1], i8, i8)")
def norms(w: Any, filters: Any, factors: Any, terms: Any, order: Any, light: Any, count: Any, start: int, stop: int) -> None:
    """For the units start..stop the rows with weights on them, and the logarithms of those weights' norms.

    w: [K, O], of which row r of the matrix is the positive part of factors[r] * w[:, filters[r]]; terms: [U, *]. Fills order
    [U, R'], light [U, R'] (log2 of the norms, in STEPS, rounded up) and count [U], how many.
    """
    rows = len(filters)
    energy, steps = np.empty(rows, np.float32), np.empty(rows, np.int16)
    for u in range(start, stop):
        energy[:] = 0
        for k in terms[u]:
            line = w[k]
            for r in range(rows):
                v = max(line[filters[r]] * factors[r], float32(0))
                energy[r] += v * v + (float32(1e-30) if v > 0 else float32(0))
        for r in range(rows):
            octaves = float32(0.5) * log2(energy[r]) + float32(ERROR)
            steps[r] = max(in_steps(max(octaves, float32(-9))), int32(FAINT))
        n = 0
        for r in range(rows):  # without a branch that nobody can predict
            order[u, n], light[u, n] = r, steps[r]
            n += 1 if energy[r] > 0 else 0
        count[u] = n
