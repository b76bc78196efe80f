"""Sensitivities at a small multiple of the price of inference: products of small integers and compiled loops on the processor.

A layer's patches are unfolded into the columns of a matrix of 8-bit integers, some thousand at a time; ONNX Runtime multiplies
it with the positive parts of the weights and of the negated weights at once, rounded down to 8 bits too, which gives lower
bounds of all denominators; the compiled kernel then finds every unit's largest share. Such pieces are spread over threads
and small enough for the cache, so memory hardly grows. How they are cut depends on shapes alone, so that the result does not
depend on the number of threads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from onnxprune import runtime
from onnxprune.channels import Index
from onnxprune.contraction import Contraction
from onnxprune.criteria.kernels import LEAST, TINY, build_session
from onnxprune.criteria.patches import convolution, entries
from onnxprune.graph import Array
from onnxprune.threads import Workers
from onnxprune.windows import Windows

PIECE = 1 << 20  # elements of an unfolded piece, unless its columns become too few for a matrix product
FEWEST = 256
MOST = 4096
HELD = 1 << 20  # elements of patches and products of the samples that are handled together, unless one has more
WEIGHTS = 1 << 24  # elements of split weights at a time
KEPT = 48 << 20  # bytes of split weights that stay for the next batch
FAR = 20  # octaves that the largest activation of a sample may be from 1 without being brought there


@dataclass(frozen=True, eq=False)
class _Weights:
    """What the kernel needs to know of some filters w [O, K].

    small: [R, K] uint8, row r the positive part of factors[r] * w[filters[r]]; the first `positive` are positive weights.
    height: [R], what one unit of a product of integers stands for, but for the column's. The rest: `norms`.
    """

    w: Array
    filters: Array
    factors: Array
    small: Array
    height: Array
    positive: int
    terms: Array
    rest: Array
    order: Array
    light: Array
    count: Array

    @property
    def signs(self) -> set[int]:
        """Those that weights have."""
        return {sign for sign, rows in ((1, self.positive), (-1, len(self.filters) - self.positive)) if rows}

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (self.w, self.small, self.order, self.light))


@dataclass(frozen=True, eq=False)
class _Input:
    """One sign part of a layer's input: x [n, C, space], of which the positive part of scale * x counts.

    live: [n], whether a sample has any.
    """

    x: Array
    windows: Windows
    scale: Array
    live: Array

    @property
    def geometry(self) -> tuple[Any, Any, Any]:
        return self.windows.base, self.windows.shift, self.windows.inside

    @property
    def steps(self) -> tuple[int, int]:
        return self.windows.strides[-1], self.windows.space[-1]


@dataclass(frozen=True, eq=False)
class _Piece:
    """Some columns of the unfolded matrix: the rows of patches [*, 2] (sample, row), and the sample of every column."""

    rows: Array
    samples: Array
    different: Array  # samples, each once
    starts: Array  # their first columns


@dataclass(frozen=True, eq=False)
class _Product:
    """A piece's products of integers z [R, Q], peaks [2, samples]; its top [Q] and energy [U, Q], see `encode`."""

    piece: _Piece
    z: Array
    top: Array
    energy: Array
    peaks: Array


class FastShares:
    """Largest shares of a layer's units, exact (tolerance 0) or at most 1 + tolerance times too large, never too small."""

    def __init__(self, together: bool = True, tolerance: float = 0.0, single: float = 0.0) -> None:
        """together: whether the terms of a unit in one patch add up (`sum`), or count one by one (`max`).

        single: the tolerance in 1x1 and linear layers, and where units have one term.
        """
        from onnxprune.criteria import compiled, encode, jit  # compile at their first import, which takes seconds

        self._compiled, self._encode, self._jit = compiled, encode, jit
        self.together, self.tolerance, self.single = together, tolerance, single
        self.workers = Workers(runtime.default_threads())
        self._lock = threading.Lock()  # of what is kept: several layers may be looked at together
        self._kept: dict[Any, tuple[Any, _Weights]] = {}
        self._held = 0
        self._cuts: dict[Any, list[_Piece]] = {}  # by what they depend on, where all samples are live

    def largest(self, c: Contraction, units: Index, known: Array, key: tuple[Any, ...] | None = None) -> tuple[Array, int]:
        """(the larger of `known` and the largest share of every unit [U] float64; live sign parts).

        units: [U, m] positions within the contraction's own channel axis. key: an object that determines the weight
        and the units together with the rest of the key, where other calls may have the same.
        """
        x, w, windows = convolution(c)
        terms = entries(units, int(np.prod(windows.taps)), self.together)
        times = len(terms) // len(units)
        best = np.repeat(known.astype(np.float64), times)
        flat = np.ascontiguousarray(w.reshape(len(w), -1), np.float32)
        parts = list(_sign_parts(x.reshape(*x.shape[:2], -1), windows))
        step = max(1, WEIGHTS // (2 * flat.shape[1]))
        signs: set[int] = set()
        blocks = [slice(a, a + step) for a in range(0, len(flat), step)]
        for part in parts:
            limits = None if len(blocks) == 1 else self._limits(part, flat, terms, blocks)
            for block in blocks:
                weights = self._prepared(flat[block], terms, key if len(blocks) == 1 else None)
                signs |= weights.signs
                if weights.signs:
                    self._raise(part, weights, best, limits)
        return best.reshape(-1, times).max(axis=1), len(parts) * len(signs)

    # ---- weights

    def _prepared(self, w: Array, terms: Array, key: tuple[Any, ...] | None) -> _Weights:
        """The weights as the kernel takes them, kept for next time while there is room."""
        if key is None:
            return self._split(w, terms)
        source, name = key[0], key[1:]
        kept = self._kept.get(name)
        if kept is not None and kept[0] is source:
            return kept[1]
        made = self._split(w, terms)
        with self._lock:
            if name in self._kept:  # of another model
                self._kept, self._held = {}, 0
            if self._held + made.nbytes <= KEPT:
                self._kept[name], self._held = (source, made), self._held + made.nbytes
        return made

    def _split(self, w: Array, terms: Array) -> _Weights:
        signs = [(s, np.flatnonzero((s * w > 0).any(axis=1))) for s in (1, -1)]
        filters = np.concatenate([rows for _, rows in signs]).astype(np.uint32)
        factors = np.concatenate([np.full(len(rows), s * _towards_one((s * w).max()), np.float32) for s, rows in signs])
        limit = self._jit.LEVELS
        levels = np.float32(min(limit, (2**31 - 1) // (limit * w.shape[1])))  # so that sums fit 32 bits
        small, top = np.empty((len(filters), w.shape[1]), np.uint8), np.empty(len(filters), np.float32)
        self._spread(len(filters), 64, lambda a, b: self._encode.split(w, filters, factors, levels, small, top, a, b))
        count = len(terms)
        most = len(w) if terms.shape[1] == 1 else len(filters)  # a weight has one sign, several together have both
        order, light = np.empty((count, most + 1), np.uint32), np.empty((count, most + 1), np.int16)
        live = np.empty(count, np.int32)
        columns, unit = np.ascontiguousarray(w.T), (factors * (levels / top)).astype(np.float32)
        self._spread(count, 64, lambda a, b: self._encode.norms(columns, filters, unit, terms, order, light, live, a, b))
        rest = np.setdiff1d(np.arange(w.shape[1], dtype=np.uint32), terms)
        height = (top / levels / np.float32(limit)).astype(np.float32)
        return _Weights(w, filters, factors, small, height, len(signs[0][1]), terms, rest, order, light, live)

    # ---- products

    def _pieces(self, part: _Input) -> list[_Piece]:
        if not part.live.all():
            return _pieces(part)
        key = (part.windows.out, len(part.x), part.x.shape[1] * len(part.windows.shift))
        if key not in self._cuts:
            self._cuts[key] = _pieces(part)
        return self._cuts[key]

    def _limits(self, part: _Input, w: Array, terms: Array, blocks: list[slice]) -> Array:
        """The largest product of each sign and sample [2, n] over all filters, where they do not fit memory at once."""
        found = np.zeros((2, len(part.x)), np.float32)
        most = self._most(part)
        for block in blocks:
            look = partial(self._multiplied, part=part, most=most, weights=self._split(w[block], terms[:0]))
            for made in self.workers.map(look, self._pieces(part)):
                here = made.piece.different
                found[:, here] = np.maximum(found[:, here], made.peaks)
        return found

    def _most(self, part: _Input) -> Array:
        out = np.empty((len(part.x), 1, part.x.shape[2]), np.float32)
        self._encode.largest_channel(part.x, part.scale, out)
        return out

    def _multiplied(self, piece: _Piece, part: _Input, most: Array, weights: _Weights) -> _Product:
        columns, terms = len(piece.samples), weights.terms
        small, top = np.empty((weights.w.shape[1], columns), np.int8), np.empty(columns, np.float32)
        energy = np.empty((len(terms), columns), np.int16)
        places = (*part.geometry, piece.rows, *part.steps)
        self._encode.encode(part.x, part.scale, most, *places, terms, weights.rest, top, small, energy)
        z = np.asarray(runtime.run(self._session, {"w": weights.small, "x": small})[0])
        peaks = np.empty((2, len(piece.different)), np.float32)
        self._compiled.measure(z, weights.positive, weights.height, top, piece.starts, peaks)
        return _Product(piece, z, top, energy, peaks)

    @cached_property
    def _session(self) -> Any:
        node = helper.make_node("MatMulInteger", ["w", "x"], ["z"])
        kinds = {"w": TensorProto.UINT8, "x": TensorProto.INT8, "z": TensorProto.INT32}
        return build_session([node], ["w", "x"], ["z"], {}, None, threads=1, kinds=kinds)

    # ---- shares

    def _raise(self, part: _Input, weights: _Weights, best: Array, limits: Array | None) -> None:
        """Raises best [U] to what the part shows, by groups of samples that fit the cache.

        The first group raises the bar for the others. They are handed to threads, or their pieces where they are too few.
        """
        size = part.windows.patches * (weights.w.shape[1] + len(weights.filters))
        together = max(1, HELD // size)
        groups = [slice(a, a + together) for a in range(0, len(part.x), together)]
        spread = len(groups) > 2 * self.workers.count

        def score(here: slice, start: Array) -> Array:
            group = _Input(part.x[here], part.windows, part.scale[here], part.live[here])
            return self._group(group, weights, start, None if limits is None else limits[:, here])

        best[:] = score(groups[0], best)
        known = best.copy()
        each = self.workers.map if spread else map
        for found in each(lambda here: score(here, known), groups[1:]):
            np.maximum(best, found, out=best)

    def _group(self, part: _Input, weights: _Weights, known: Array, limits: Array | None) -> Array:
        look = partial(self._multiplied, part=part, most=self._most(part), weights=weights)
        found = list(self.workers.map(look, self._pieces(part)))
        peaks = np.zeros((2, len(part.x)), np.float32) if limits is None else limits
        if limits is None:
            for made in found:
                here = made.piece.different
                peaks[:, here] = np.maximum(peaks[:, here], made.peaks)
        floor = np.maximum(np.float32(TINY) * peaks, np.float32(LEAST))

        def score(made: _Product) -> Array:
            mine, piece = known.copy(), made.piece
            columns = np.ascontiguousarray(floor[:, piece.samples]), weights.height, made.top, made.energy
            about = weights.terms, weights.order, weights.light, weights.count, weights.w, weights.filters, weights.factors
            places = (*part.geometry, piece.rows, *part.steps)
            single = len(part.windows.shift) == 1 or weights.terms.shape[1] == 1
            tolerance = self.single if single else self.tolerance
            self._compiled.raise_shares(
                made.z, weights.positive, *columns, *about, part.x, part.scale, *places, mine, tolerance
            )
            return mine

        return np.asarray(np.max([known, *self.workers.map(score, found)], axis=0))

    def _spread(self, count: int, step: int, work: Callable[[int, int], None]) -> None:
        list(self.workers.map(lambda a: work(a, min(a + step, count)), range(0, count, step)))


def _sign_parts(x: Array, windows: Windows) -> Iterator[_Input]:
    """The positive part, and the negative one where there is any."""
    flat = x.reshape(len(x), -1)
    most, least = flat.max(axis=1, initial=0), flat.min(axis=1, initial=0)
    for sign, peak in ((1, most), (-1, -least)):
        if sign > 0 or peak.any():
            _, exponent = np.frexp(peak)
            exponent = np.where(np.abs(exponent) > FAR, np.clip(exponent, -126, 126), 0)
            scale = np.float32(sign) * np.exp2(-exponent.astype(np.float32))
            yield _Input(np.ascontiguousarray(x, np.float32), windows, scale, peak > 0)


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
    columns = np.clip(PIECE // (part.x.shape[1] * len(windows.shift)), FEWEST, MOST)
    step = max(1, int(columns) // windows.width)
    return [_piece(every[a : a + step], windows.width) for a in range(0, len(every), step)]


def _piece(rows: Array, width: int) -> _Piece:
    different, first = np.unique(rows[:, 0], return_index=True)
    return _Piece(np.ascontiguousarray(rows), np.repeat(rows[:, 0], width), different, first * width)
