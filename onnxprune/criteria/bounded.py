"""Exact sensitivities at little more than the price of the forward pass, by bounding before evaluating.

For channel j and patch p, Cauchy-Schwarz over the channel's taps and an l_8 norm over the filters give
    max_i c_ijp / z_ip  <=  |a_jp|_2 * max_i |w_ij|_2 R_ip  <=  |a_jp|_2 * (sum_i (|w_ij|_2 R_ip)^8)^(1/8) =: U_jp,
where R = 1/z, a_jp are the channel's inputs in patch p and w_ij the weights on them. All U of a layer cost one 1x1
convolution. Only the few (j, p) with U_jp above the largest share known of j are then evaluated, exactly; the more data
has been seen, the fewer they are. The result is the exact maximum: a bound only ever saves work.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from onnx import helper

from onnxprune import runtime
from onnxprune.channels import Index
from onnxprune.contraction import Contraction
from onnxprune.criteria.kernels import LEAST, TINY, Part, build_session, parts
from onnxprune.criteria.shares import Shares
from onnxprune.graph import Array

MARGIN = 1.001  # covers the rounding of the bound in float32
UNDERFLOW = 2e-5  # (1e-38)^(1/8): what the eighth power may lose of a normalised factor
HUGE = 1e30  # stands for a dead denominator: its reciprocal is no share
CACHE = 1 << 19  # elements of one intermediate that still fit the processor's cache
DENSE = 0.08  # share of the patches above which the plain evaluation of all is cheaper
SLACK = 1e-6  # relative differences of sensitivities that do not matter
PATIENCE = 4  # failures of the bound to narrow anything down, after which a layer is evaluated plainly
BLOCK = 1 << 24  # weights of which norms are taken at a time
PAIRS = 1 << 16  # (channel, patch) pairs evaluated at a time


class BoundedShares:
    """Maximal shares (`sum` sensitivity) for the contractions of one layer; convolutions and linear layers."""

    def __init__(self, providers: list[str] | None = None) -> None:
        self.providers = providers
        self._sessions: dict[Any, Any] = {}
        self._full = Shares("sum", providers)
        self._misses = 0

    def largest(self, c: Contraction, units: Index, known: Array) -> tuple[Array, int]:
        """(the larger of `known` and the maximal share, for every unit [U] float64; live sign parts).

        units: [U, m] positions within the contraction's own channel axis.
        """
        best, live = known.astype(np.float64), 0
        for part in parts(c):
            live += 1
            self._part(c, part, units, best)
        return best, live

    def _part(self, c: Contraction, part: Part, units: Index, best: Array) -> None:
        if self._misses >= PATIENCE:
            np.maximum(best, self._full.part(c, part, units), out=best)
            return
        count, per = units.shape
        taps = part.w.shape[2:]
        w = part.w[:, units.ravel()].reshape(len(part.w), count, -1)  # [O, U, m * taps]
        top, relative = _norms(w)
        constants = {"w": part.w, "v": relative.reshape(count, -1, *[1] * len(taps))}
        session = self._session(c, part, count, per)
        weights = np.ascontiguousarray(w.transpose(1, 2, 0))  # [U, m * taps, O]
        step = max(1, CACHE // max(1, int(np.prod(part.x.shape[2:])) * max(count * per, len(part.w))))
        for start in range(0, len(part.x), step):
            x = part.x[start : start + step]
            chosen = np.ascontiguousarray(x[:, units.ravel()])
            r, low, square = runtime.run(session, {"x": x, "u": chosen, **constants})
            pairs = _Pairs(c, chosen, weights, r, low, per)
            if not _raise(best, pairs, square.reshape(len(x), count, -1), top * MARGIN):
                # All units, saturated or not: sessions are kept by shape, and a new one costs more than it would save.
                np.maximum(best, self._full.part(c, Part(x, part.w), units), out=best)
                self._misses += 1

    def _session(self, c: Contraction, part: Part, count: int, per: int) -> Any:
        taps = part.w.shape[2:]
        key = (count, per, part.w.shape[0], taps, tuple(sorted((k, str(v)) for k, v in c.attributes.items())))
        if key not in self._sessions:
            self._sessions[key] = self._bound_session(c, part.w.shape[0], taps, count, per)
        return self._sessions[key]

    def _bound_session(self, c: Contraction, filters: int, taps: tuple[int, ...], count: int, per: int) -> Any:
        """x, w -> R [n, O, *out]; u (the units' channels), v, top -> U [n, count, *out]."""
        node = helper.make_node
        axes = list(range(1, 2 + len(taps)))
        nodes = [
            node("Conv", ["x", "w"], ["z"], **c.attributes),
            node("ReduceMax", ["z"], ["zmax"], axes=axes, keepdims=1),
            node("Mul", ["zmax", "tiny"], ["fraction"]),
            node("Max", ["fraction", "smallest"], ["least"]),
            node("Greater", ["z", "least"], ["alive"]),
            node("Where", ["alive", "z", "huge"], ["zsafe"]),
            node("ReduceMin", ["zsafe"], ["low"], axes=[1], keepdims=1),
            node("Div", ["low", "zsafe"], ["r"]),
            node("Mul", ["r", "r"], ["r2"]),
            node("Mul", ["r2", "r2"], ["r4"]),
            node("Mul", ["r4", "r4"], ["r8"]),
            node("Conv", ["r8", "v"], ["h8"]),
            node("Sqrt", ["h8"], ["h4"]),
            node("Sqrt", ["h4"], ["h2"]),
            node("Add", ["h2", "floor"], ["h"]),
            node("Mul", ["u", "u"], ["square"]),
            *_energy(c, len(taps), count, per, int(np.prod(taps))),
            node("Mul", ["low", "low"], ["low2"]),
            node("Div", ["energy", "low2"], ["scaled"]),
            node("Mul", ["scaled", "h"], ["bound2"]),
        ]
        constants = {
            "tiny": np.float32(TINY),
            "smallest": np.float32(LEAST),
            "huge": np.float32(HUGE),
            # What underflows adds at most f = UNDERFLOW O^(1/8) to the eighth root rho <= O^(1/8), so that the square of
            # the root is at most rho^2 + 2 rho f + f^2 <= rho^2 + 3 UNDERFLOW O^(1/4).
            "floor": np.float32(3 * UNDERFLOW * filters**0.25),
            "box": np.ones((count * per, 1, *taps), np.float32),
            "head": np.array([0, count, per], np.int64),
            "axis": np.array([2], np.int64),
        }
        return build_session(nodes, ["x", "w", "u", "v"], ["r", "low", "bound2"], constants, self.providers)


def _norms(w: Array) -> tuple[Array, Array]:
    """(largest norm of every unit's weights over the filters [U], the eighth powers of all relative to it [U, O] float32).

    Some units at a time, so that no double-precision copy is made of a large weight [O, U, m * taps].
    """
    filters, count, per = w.shape
    top, relative = np.empty(count), np.empty((count, filters), np.float32)
    step = max(1, BLOCK // max(1, filters * per))
    for start in range(0, count, step):
        here = slice(start, start + step)
        norms = np.sqrt((w[:, here].astype(np.float64) ** 2).sum(axis=2)).T  # [units, O]
        top[here] = norms.max(axis=1)
        relative[here] = (norms / np.where(top[here] > 0, top[here], 1)[:, None]) ** 8
    return top, relative


def _bar(best: Array, top: Array) -> Array:
    """What (bound / top)^2 has to exceed to matter: nothing can where the share is 1 already, or the weights are 0."""
    open_ = (top > 0) & (best < 1 - SLACK)
    bar = (best * (1 + SLACK) / np.where(top > 0, top, 1)) ** 2
    return np.where(open_, np.minimum(bar, np.finfo(np.float32).max), np.inf).astype(np.float32)


def _raise(best: Array, pairs: _Pairs, square: Array, top: Array) -> bool:
    """Raises every best[u] to the largest exact share; square [n, U, P] is (bound / top)^2.

    False where so many patches are left that evaluating all of them in one go is cheaper; best is then a lower bound.
    """
    promising = square.max(axis=2)  # [n, U]
    unit = np.flatnonzero(promising.max(axis=0) > _bar(best, top))
    if len(unit) == 0:
        return True
    # The most promising patch of every channel first: it raises the bar for all the others.
    image = promising.argmax(axis=0)[unit]
    pairs.evaluate(unit, image, square[image, unit].argmax(axis=1), best)
    above = square > _bar(best, top)[None, :, None]
    if np.count_nonzero(above) > DENSE * square.size:
        return False
    image, unit, patch = np.nonzero(above)
    order = np.argsort(unit, kind="stable")
    pairs.evaluate(unit[order], image[order], patch[order], best)
    return True


def _energy(c: Contraction, rank: int, count: int, per: int, taps: int) -> list[Any]:
    """Sum of squares of a unit's inputs in every patch: over the taps, then over the positions that the unit owns."""
    node = helper.make_node
    strided = any(s != 1 for s in c.attributes.get("strides", [1])) or any(c.attributes.get("pads", [0]))
    if taps == 1 and not strided and "auto_pad" not in c.attributes:
        nodes = [node("Identity", ["square"], ["each"])]
    else:
        nodes = [node("Conv", ["square", "box"], ["each"], **{**c.attributes, "group": count * per})]
    if per == 1:
        return [*nodes, node("Identity", ["each"], ["energy"])]
    return [
        *nodes,
        node("Shape", ["each"], ["space"], start=2),
        node("Concat", ["head", "space"], ["split"], axis=0),
        node("Reshape", ["each", "split"], ["by_unit"]),
        node("ReduceSum", ["by_unit", "axis"], ["energy"], keepdims=0),
    ]


class _Pairs:
    """Exact shares of chosen (channel, image, patch) triples."""

    def __init__(self, c: Contraction, chosen: Array, w: Array, r: Array, low: Array, per: int) -> None:
        self.w, self.per = w, per  # [U, m * taps, O]
        self.low = low.reshape(len(low), -1)  # [n, P]; R = r / low
        self.out = r.shape[2:]
        self.r = r.reshape(r.shape[0], r.shape[1], -1).transpose(0, 2, 1)  # [n, P, O], a view
        self.windows = _windows(c, chosen, r.shape[2:])  # [n, U * m, *out, *taps], a view

    def evaluate(self, unit: Index, image: Index, patch: Index, best: Array) -> None:
        """Raises best[u] to the largest share among the triples of unit u; `unit` is sorted."""
        for start in range(0, len(unit), PAIRS):
            part = slice(start, start + PAIRS)
            self._block(unit[part], image[part], patch[part], best)

    def _block(self, unit: Index, image: Index, patch: Index, best: Array) -> None:
        at = np.unravel_index(patch, self.out)
        a = np.concatenate(
            [self.windows[(image, unit * self.per + k, *at)].reshape(len(unit), -1) for k in range(self.per)],
            axis=1,
        )
        cuts = np.flatnonzero(np.diff(unit)) + 1
        starts = [0, *cuts.tolist()]
        for start, end in zip(starts, [*starts[1:], len(unit)], strict=True):
            if start == end:
                continue
            u = unit[start]
            where = (image[start:end], patch[start:end])
            shares = ((a[start:end] @ self.w[u]) * self.r[where]).max(axis=1) / self.low[where]
            best[u] = max(best[u], min(float(shares.max()), 1.0))


def _windows(c: Contraction, x: Array, out: tuple[int, ...]) -> Array:
    """All patches of every channel as a view: [n, channels, *out, *taps]."""
    rank = x.ndim - 2
    taps = c.w.shape[2:]
    strides = list(c.attributes.get("strides", [1] * rank))
    dilations = list(c.attributes.get("dilations", [1] * rank))
    reach = [d * (t - 1) + 1 for d, t in zip(dilations, taps, strict=True)]
    pads = padding(c, x.shape[2:], strides, reach)
    if any(a or b for a, b in pads):
        x = np.pad(x, [(0, 0), (0, 0), *pads])
    view = sliding_window_view(x, tuple(reach), axis=tuple(range(2, 2 + rank)))
    steps = tuple(slice(None, None, s) for s in strides) + tuple(slice(None, None, d) for d in dilations)
    view = view[(slice(None), slice(None), *steps)]
    return view[(slice(None), slice(None), *(slice(0, n) for n in out))]


def padding(c: Contraction, space: tuple[int, ...], strides: list[int], reach: list[int]) -> list[tuple[int, int]]:
    """(before, after) for every spatial axis, `auto_pad` resolved as the ONNX Conv clause has it."""
    mode = c.attributes.get("auto_pad", "NOTSET")
    rank = len(space)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        pads = []
        for n, s, k in zip(space, strides, reach, strict=True):
            total = max((-(-n // s) - 1) * s + k - n, 0)
            small, large = total // 2, total - total // 2
            pads.append((small, large) if mode == "SAME_UPPER" else (large, small))
        return pads
    flat = list(c.attributes.get("pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    return [(flat[i], flat[i + rank]) for i in range(rank)]
