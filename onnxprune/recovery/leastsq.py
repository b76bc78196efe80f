"""Least squares from normal equations that are added up batch by batch.

Products within a few thousand rows are in single precision, where they are fast, of rows that an origin near their mean
has been taken off, so that little cancels later; their sums and all that is solved are in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.linalg import LinAlgError
from scipy.linalg import cho_factor, cho_solve
from scipy.linalg.blas import get_blas_funcs

from onnxprune.graph import Array

TOGETHER = 64  # inputs * taps up to which NumPy solves all groups in one call
FEWER = 512  # and from which only every second ridge is tried
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of the Gram matrix
CHUNK = 2048  # rows that are multiplied at once
TRIANGLE = 256  # columns from which computing one triangle pays


@dataclass
class Moments:
    """Sums over rows of X [groups, n, D] and T [groups, n, O], both less their origins.

    xx: X'X [groups, D, D]. xt: X'T [groups, D, O]. tt: squares of T [groups, O]. x, t: sums of both. count: n.
    """

    count: int
    xx: Array
    xt: Array
    tt: Array
    x: Array
    t: Array

    def add_targets(self, x: Array, t: Array) -> None:
        """Adds what depends on the targets, of rows whose inputs have been counted."""
        t = t.astype(x.dtype, copy=False)
        self.xt += x.transpose(0, 2, 1) @ t
        self.tt += np.einsum("gno,gno->go", t, t, dtype=np.float64)
        self.t += t.sum(1, dtype=np.float64)

    def without_targets(self) -> Moments:
        """The same rows, their targets to be added anew."""
        return Moments(self.count, self.xx, np.zeros_like(self.xt), np.zeros_like(self.tt), self.x, np.zeros_like(self.t))

    def plus(self, other: Moments) -> Moments:
        """The moments of both sets of rows."""
        names = ("xx", "xt", "tt", "x", "t")
        return Moments(self.count + other.count, *(getattr(self, name) + getattr(other, name) for name in names))

    @property
    def means(self) -> tuple[Array, Array]:
        return self.x / max(1, self.count), self.t / max(1, self.count)

    def centred(self, about: Moments | None = None) -> Moments:
        """The moments of rows from which means are taken: those of `about`, by default their own."""
        n, (mx, mt) = self.count, (about or self).means
        side = _outer(mx, 0.5 * n * mx - self.x)
        return Moments(
            n,
            self.xx + side + side.transpose(0, 2, 1),
            self.centred_targets(about),
            self.tt - 2 * mt * self.t + n * mt * mt,
            self.x - n * mx,
            self.t - n * mt,
        )

    def centred_targets(self, about: Moments | None = None) -> Array:
        """X'T of `centred`, without the rest of it."""
        n, (mx, mt) = self.count, (about or self).means
        return np.asarray(self.xt - _outer(mx, self.t - n * mt) - _outer(self.x, mt))

    def error(self, w: Array) -> float:
        """Sum of squares of T - X W over all rows, W [groups, D, O]."""
        return float(self.tt.sum() - 2 * (w * self.xt).sum() + (w * (self.xx @ w)).sum())


class Gram:
    """Adds up X'X and the sums of X, rows [groups, n, D] batch by batch."""

    def __init__(self, groups: int, inputs: int) -> None:
        self.count, self.x, self._xx = 0, np.zeros((groups, inputs)), np.zeros((groups, inputs, inputs))
        self._one_triangle = groups == 1 and inputs >= TRIANGLE
        self._waiting: list[Array] = []

    def add(self, x: Array) -> None:
        self.count += x.shape[1]
        self.x += x.sum(1, dtype=np.float64)
        self._waiting.append(x)
        if sum(w.shape[1] for w in self._waiting) >= CHUNK:
            self._multiply()

    def _multiply(self) -> None:
        rows = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting, 1)
        self._waiting = []
        if self._one_triangle:
            square = get_blas_funcs("syrk", (rows,))
            self._xx[0] += square(1.0, np.ascontiguousarray(rows[0]).T, lower=1).T
        else:
            self._xx += rows.transpose(0, 2, 1) @ rows

    @property
    def xx(self) -> Array:
        """X'X [groups, D, D]."""
        if self._waiting:
            self._multiply()
        if not self._one_triangle:
            return self._xx
        whole = self._xx[0] + self._xx[0].T
        whole[np.diag_indices_from(whole)] *= 0.5
        return np.asarray(whole[None])

    def centred(self) -> Array:
        """X'X about the means. [groups, D, D]"""
        return np.asarray(self.xx - _outer(self.x, self.x) / max(1, self.count))


class Sums:
    """Adds up `Moments` batch by batch."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        self._gram = Gram(groups, inputs)
        nothing = (np.zeros((groups, 0, 0)), np.zeros((groups, inputs, outputs)), np.zeros((groups, outputs)))
        self._moments = Moments(0, *nothing, np.zeros((groups, inputs)), np.zeros((groups, outputs)))

    def add(self, x: Array, t: Array) -> None:
        self._gram.add(x)
        self._moments.add_targets(x, t)

    def moments(self) -> Moments:
        """Of all rows so far."""
        return replace(self._moments, count=self._gram.count, xx=self._gram.xx, x=self._gram.x)


def _outer(a: Array, b: Array) -> Array:
    return np.asarray(a[:, :, None] * b[:, None, :])


class System:
    """X'X + ridge * (mean diagonal of X'X), factorised once for all targets. Small systems are solved together instead."""

    def __init__(self, moments: Moments, start: Array, ridge: float) -> None:
        diagonal = np.einsum("gii->gi", moments.xx).mean(1)
        scale = np.where(diagonal > 0, diagonal, 1.0)
        self.start, self.made = start, moments.xx @ start
        self.matrix = moments.xx + (ridge * scale)[:, None, None] * np.eye(moments.xx.shape[1])
        self.factors = None
        if self.matrix.shape[1] > TOGETHER:
            try:
                self.factors = [cho_factor(m, check_finite=False) for m in self.matrix]
            except LinAlgError:  # by rounding no longer positive
                self.factors = None

    def solve(self, xt: Array) -> Array:
        """The W that minimises |T - X W|^2 + ridge * (mean diagonal of X'X) |W - start|^2. [groups, D, O]

        xt: X'T. The penalty is on the change: where the rows say little, the weights stay what they were.
        """
        right = xt - self.made
        if self.factors is None:
            return np.asarray(self.start + np.linalg.solve(self.matrix, right))
        found = [cho_solve(f, r, check_finite=False) for f, r in zip(self.factors, right, strict=True)]
        return np.asarray(self.start + np.stack(found))


def solve(moments: Moments, start: Array, ridge: float) -> Array:
    """`System.solve` for one set of targets."""
    return System(moments, start, ridge).solve(moments.xt)


def best_ridge(train: Moments, held_out: Moments, start: Array, ridges: tuple[float, ...] = RIDGES) -> float | None:
    """The ridge whose solution on some rows is best on others; None where `start` itself is.

    From the middle downhill: the error falls and then rises with the ridge, and every ridge that is tried costs a solution.
    """
    if start.shape[1] > FEWER:
        ridges = ridges[1::2]
    errors: dict[int, float] = {}

    def error(i: int) -> float:
        if not 0 <= i < len(ridges):
            return float("inf")
        if i not in errors:
            errors[i] = held_out.error(solve(train, start, ridges[i]))
        return errors[i]

    best = len(ridges) // 2
    while error(beside := min((best - 1, best + 1), key=error)) < error(best):
        best = beside
    return ridges[best] if error(best) < held_out.error(start) else None
