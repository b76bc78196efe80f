"""Sensitivities at a small multiple of the price of inference: blocked matrix products and compiled loops on the processor.

A layer's patches are unfolded into the columns of a matrix, some thousand at a time; ONNX Runtime multiplies it with the
positive parts of the weights and of the negated weights at once, which gives all denominators; the compiled kernel then finds
every unit's largest share. Such pieces are spread over threads and small enough for the cache, so memory hardly grows. How
they are cut depends on shapes alone, so that the result does not depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, TypeAlias, TypeVar

import numpy as np
from onnx import helper

from onnxprune import runtime
from onnxprune.channels import Index
from onnxprune.contraction import Contraction
from onnxprune.criteria.kernels import LEAST, TINY, build_session
from onnxprune.criteria.patches import convolution, entries
from onnxprune.graph import Array
from onnxprune.windows import Windows

PIECE = 1 << 19  # elements of an unfolded piece, unless its columns become too few for a matrix product
FEWEST = 256
MOST = 4096
HELD = 1 << 20  # elements of patches and products of the samples that are handled together, unless one has more
WEIGHTS = 1 << 24  # elements of split weights at a time
KEPT = 1 << 21  # elements of split weights that stay for the next batch
FAR = 20  # octaves that the largest activation of a sample may be from 1 without being brought there
A = TypeVar("A")
B = TypeVar("B")
Map: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]
"""`map`, or one that uses threads."""


@dataclass(frozen=True, eq=False)
class _Weights:
    """What the kernel needs to know of some filters.

    w: [C, R], the positive parts of both signs, scaled; the first `positive` rows are of positive weights. The rest: `norms`.
    """

    w: Array
    positive: int
    terms: Array
    order: Array
    light: Array
    count: Array
    top: Array


@dataclass(frozen=True, eq=False)
class _Input:
    """One sign part of a layer's input: x [n, C, space], of which the positive part of scale * x counts.

    live: [n], whether a sample has any; signed: whether x has numbers of the other sign, too.
    """

    x: Array
    windows: Windows
    scale: Array
    live: Array
    signed: bool

    @cached_property
    def direct(self) -> bool:
        """Whether the matrix of a sample's patches is the sample as it stands."""
        return self.windows.plain and not self.signed and bool((self.scale == 1).all())


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some columns of the unfolded matrix: the rows of patches [*, 2] (sample, row), and the sample of every column."""

    rows: Array
    samples: Array
    different: Array  # samples, each once
    starts: Array  # their first columns


class FastShares:
    """Largest shares of a layer's units, exact (tolerance 0) or at most 1 + tolerance times too large, never too small."""

    def __init__(self, together: bool = True, tolerance: float = 0.0) -> None:
        """together: whether the terms of a unit in one patch add up (`sum`), or count one by one (`max`)."""
        from onnxprune.criteria import compiled  # compiles at its first import, which takes seconds

        self.kernel = compiled
        self.together, self.tolerance = together, tolerance
        self.threads = max(1, runtime.default_threads())
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._session: Any = None
        self._kept: dict[Any, tuple[Array, _Weights]] = {}
        self._held = 0
        self._cuts: dict[Any, list[_Piece]] = {}  # by what they depend on, where all samples are live

    def largest(self, c: Contraction, units: Index, known: Array, key: tuple[Any, ...] | None = None) -> tuple[Array, int]:
        """(the larger of `known` and the largest share of every unit [U] float64; live sign parts).

        units: [U, m] positions within the contraction's own channel axis. key: an array that determines the weight together
        with the rest of the key, where other calls may have the same.
        """
        x, w, windows = convolution(c)
        taps = int(np.prod(windows.taps))
        terms = entries(units, taps, self.together)
        times = len(terms) // len(units)
        best = np.repeat(known.astype(np.float64), times)
        flat = np.ascontiguousarray(w.reshape(len(w), -1), np.float32)
        signs = int(flat.max(initial=0) > 0) + int(flat.min(initial=0) < 0)
        parts = list(_sign_parts(x.reshape(*x.shape[:2], -1), windows))
        step = max(1, WEIGHTS // (2 * flat.shape[1]))
        blocks = [slice(a, a + step) for a in range(0, len(flat), step)] if signs else []
        for part in parts:
            limits = None if len(blocks) == 1 else self._limits(part, flat, terms, blocks)
            for block in blocks:
                self._raise(part, self._prepared(flat[block], terms, key if len(blocks) == 1 else None), best, limits)
        return best.reshape(-1, times).max(axis=1), len(parts) * signs

    # ---- weights

    def _prepared(self, w: Array, terms: Array, key: tuple[Any, ...] | None) -> _Weights:
        """The weights as the kernel takes them, kept for next time while there is room."""
        if key is None:
            return self._split(w, terms)
        source, name = key[0], key[1:]
        if name in self._kept and self._kept[name][0] is source:
            return self._kept[name][1]
        made = self._split(w, terms)
        if name in self._kept:  # of another model
            self._kept, self._held = {}, 0
        size = made.w.size + made.order.size
        if self._held + size <= KEPT:
            self._kept[name], self._held = (source, made), self._held + size
        return made

    def _split(self, w: Array, terms: Array) -> _Weights:
        signs = [(s, np.flatnonzero((s * w > 0).any(axis=1))) for s in (1, -1)]
        filters = np.concatenate([rows for _, rows in signs])
        factors = np.concatenate([np.full(len(rows), s * _towards_one((s * w).max()), np.float32) for s, rows in signs])
        channels, count = w.shape[1], len(terms)
        split = np.empty((channels, len(filters)), np.float32)
        self._spread(channels, 64, lambda a, b: self.kernel.split(w, filters, factors, split, a, b))
        most = len(w) if terms.shape[1] == 1 else len(filters)  # a weight has one sign, several together have both
        room = (max(1, most) // self.kernel.UNROLL + 2) * self.kernel.UNROLL
        order, light = np.empty((count, room), np.int32), np.empty((count, room), np.int16)
        live, top = np.empty(count, np.int32), np.empty(count, np.float32)
        self._spread(count, 64, lambda a, b: self.kernel.norms(split, terms, order, light, live, top, a, b))
        return _Weights(split, len(signs[0][1]), terms, order, light, live, top)

    # ---- products

    def _pieces(self, part: _Input) -> list[_Piece]:
        if not part.live.all():
            return _pieces(part)
        key = (part.windows.out, len(part.x), part.x.shape[1] * len(part.windows.shift), part.direct)
        if key not in self._cuts:
            self._cuts[key] = _pieces(part)
        return self._cuts[key]

    def _limits(self, part: _Input, w: Array, terms: Array, blocks: list[slice]) -> Array:
        """The largest product of each sign and sample [2, n] over all filters, where they do not fit memory at once."""
        found = np.zeros((2, len(part.x)), np.float32)
        for block in blocks:
            weights = self._split(w[block], terms[:0])
            look = partial(self._multiplied, part=part, weights=weights)
            for piece, _, _, peaks in self._map(look, self._pieces(part)):
                found[:, piece.different] = np.maximum(found[:, piece.different], peaks)
        return found

    def _multiplied(self, piece: _Piece, part: _Input, weights: _Weights) -> tuple[_Piece, Array, Array, Array]:
        """(the piece, its columns x [C, Q], all products z [R, Q], the largest of each sign and sample [2, samples])."""
        x = self._matrix(piece, part)
        z = self._product(x, weights)
        return piece, x, z, _peaks(piece, z, weights.positive)

    def _matrix(self, piece: _Piece, part: _Input) -> Array:
        """The unfolded patches of a piece, [C, Q]."""
        windows = part.windows
        if part.direct and len(piece.samples) == windows.patches and len(piece.different) == 1:
            return np.ascontiguousarray(part.x[piece.different[0]])
        channels = part.x.shape[1] * len(windows.shift)
        out = np.empty((channels, len(piece.rows) * windows.width), np.float32)
        geometry = (windows.base, windows.shift, windows.inside, piece.rows, windows.strides[-1], windows.space[-1])
        self.kernel.unfold(part.x, part.scale, *geometry, out)
        return out

    def _product(self, x: Array, weights: _Weights) -> Array:
        if self._session is None:
            node = helper.make_node("Gemm", ["w", "x"], ["z"], transA=1)
            self._session = build_session([node], ["w", "x"], ["z"], {}, None, threads=1)
        return np.asarray(runtime.run(self._session, {"w": weights.w, "x": x})[0])

    # ---- shares

    def _raise(self, part: _Input, weights: _Weights, best: Array, limits: Array | None) -> None:
        """Raises best [U] to what the part shows, by groups of samples that fit the cache.

        The first group raises the bar for the others. They are handed to threads, or their pieces where they are too few.
        """
        size = part.windows.patches * (weights.w.shape[1] + len(weights.w))
        together = max(1, HELD // size)
        groups = [slice(a, a + together) for a in range(0, len(part.x), together)]
        spread = len(groups) > 2 * self.threads

        def score(here: slice, start: Array, each: Map) -> Array:
            group = _Input(part.x[here], part.windows, part.scale[here], part.live[here], part.signed)
            return self._group(group, weights, start, None if limits is None else limits[:, here], each)

        best[:] = score(groups[0], best, self._map)
        known = best.copy()
        inner, outer = (map, self._map) if spread else (self._map, map)
        for found in outer(lambda here: score(here, known, inner), groups[1:]):
            np.maximum(best, found, out=best)

    def _group(self, part: _Input, weights: _Weights, known: Array, limits: Array | None, each: Map) -> Array:
        found = list(each(partial(self._multiplied, part=part, weights=weights), self._pieces(part)))
        peaks = np.zeros((2, len(part.x)), np.float32) if limits is None else limits
        if limits is None:
            for piece, _, _, top in found:
                peaks[:, piece.different] = np.maximum(peaks[:, piece.different], top)
        floor, scale = _floors(peaks)

        def score(work: tuple[_Piece, Array, Array, Array]) -> Array:
            piece, x, z, _ = work
            mine = known.copy()
            about = (weights.terms, weights.order, weights.light, weights.count, weights.top, weights.w)
            columns = np.ascontiguousarray(floor[:, piece.samples]), scale[piece.samples]
            self.kernel.raise_shares(x, z, weights.positive, *columns, *about, mine, self.tolerance)
            return mine

        return np.asarray(np.max([known, *each(score, found)], axis=0))

    # ---- threads

    def _map(self, work: Callable[[A], B], items: Iterable[A]) -> Iterable[B]:
        return map(work, items) if self._pool is None else self._pool.map(work, items)

    def _spread(self, count: int, step: int, work: Callable[[int, int], None]) -> None:
        list(self._map(lambda a: work(a, min(a + step, count)), range(0, count, step)))


def _sign_parts(x: Array, windows: Windows) -> Iterator[_Input]:
    """The positive part, and the negative one where there is any."""
    flat = x.reshape(len(x), -1)
    most, least = flat.max(axis=1, initial=0), flat.min(axis=1, initial=0)
    for sign, peak in ((1, most), (-1, -least)):
        if sign > 0 or peak.any():
            _, exponent = np.frexp(peak)
            exponent = np.where(np.abs(exponent) > FAR, np.clip(exponent, -126, 126), 0)
            scale = np.float32(sign) * np.exp2(-exponent.astype(np.float32))
            yield _Input(np.ascontiguousarray(x, np.float32), windows, scale, peak > 0, bool(most.any() and least.any()))


def _towards_one(peak: Any) -> float:
    """The power of two that brings a number near 1."""
    return float(np.exp2(np.clip(-np.frexp(peak)[1], -126, 126).astype(np.float32)))


def _pieces(part: _Input) -> list[_Piece]:
    """Cuts the patches of all samples into pieces, by rows of patches."""
    windows, n = part.windows, len(part.x)
    rows = windows.patches // windows.width
    every = np.stack([np.repeat(np.arange(n), rows), np.tile(np.arange(rows), n)], axis=1)
    if not part.live.all():
        every = every[part.live[every[:, 0]]]
    if part.direct and windows.patches >= FEWEST:
        step = rows
    else:
        columns = np.clip(PIECE // (part.x.shape[1] * len(windows.shift)), FEWEST, MOST)
        step = max(1, int(columns) // windows.width)
    return [_piece(every[a : a + step], windows.width) for a in range(0, len(every), step)]


def _piece(rows: Array, width: int) -> _Piece:
    different, first = np.unique(rows[:, 0], return_index=True)
    return _Piece(np.ascontiguousarray(rows), np.repeat(rows[:, 0], width), different, first * width)


def _peaks(piece: _Piece, z: Array, positive: int) -> Array:
    if len(piece.different) == 1:
        return np.array([[z[:positive].max(initial=0)], [z[positive:].max(initial=0)]])
    each = [rows.max(axis=0, initial=0) for rows in (z[:positive], z[positive:])]
    return np.stack([np.maximum.reduceat(e, piece.starts) for e in each])


def _floors(peaks: Array) -> tuple[Array, Array]:
    """(what a denominator must exceed [2, n], the logarithm of a number that none exceeds by much [n]); peaks [2, n]."""
    floor = np.maximum(np.float32(TINY) * peaks, np.float32(LEAST))
    near = np.where(peaks > LEAST, floor / TINY, np.inf).min(axis=0)
    return floor, np.log2(np.where(np.isfinite(near), near, 1)).astype(np.float32)
