"""Least squares from normal equations that are added up batch by batch, in double precision."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.linalg import LinAlgError
from scipy.linalg import cho_factor, cho_solve

from onnxprune.graph import Array

TOGETHER = 64  # inputs * taps up to which NumPy solves all groups in one call
FEWER = 1500  # and from which only every second ridge is tried
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of the Gram matrix


@dataclass
class Moments:
    """Sums over rows of X [groups, n, D] and T [groups, n, O].

    xx: X'X [groups, D, D]. xt: X'T [groups, D, O]. tt: squares of T [groups, O]. x, t: sums of both. count: n.
    """

    count: int
    xx: Array
    xt: Array
    tt: Array
    x: Array
    t: Array

    @staticmethod
    def none(groups: int, inputs: int, outputs: int) -> Moments:
        """Of no rows."""
        shapes = ((groups, inputs, inputs), (groups, inputs, outputs), (groups, outputs), (groups, inputs), (groups, outputs))
        return Moments(0, *(np.zeros(shape) for shape in shapes))

    def add(self, x: Array, t: Array) -> None:
        x = x.astype(np.float64)
        self.count += x.shape[1]
        self.xx += x.transpose(0, 2, 1) @ x
        self.x += x.sum(1)
        self.add_targets(x, t)

    def add_targets(self, x: Array, t: Array) -> None:
        """Adds what depends on the targets, of rows whose inputs have been counted."""
        x, t = x.astype(np.float64, copy=False), t.astype(np.float64)
        self.xt += x.transpose(0, 2, 1) @ t
        self.tt += (t * t).sum(1)
        self.t += t.sum(1)

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
        return Moments(
            n,
            self.xx - _outer(mx, self.x) - _outer(self.x, mx) + n * _outer(mx, mx),
            self.xt - _outer(mx, self.t) - _outer(self.x, mt) + n * _outer(mx, mt),
            self.tt - 2 * mt * self.t + n * mt * mt,
            self.x - n * mx,
            self.t - n * mt,
        )

    def error(self, w: Array) -> float:
        """Sum of squares of T - X W over all rows, W [groups, D, O]."""
        return float(self.tt.sum() - 2 * (w * self.xt).sum() + (w * (self.xx @ w)).sum())


def _outer(a: Array, b: Array) -> Array:
    return np.asarray(a[:, :, None] * b[:, None, :])


class System:
    """X'X + ridge * (mean diagonal of X'X), factorised once for all targets. Small systems are solved together instead."""

    def __init__(self, moments: Moments, ridge: float) -> None:
        diagonal = np.einsum("gii->gi", moments.xx).mean(1)
        scale = np.where(diagonal > 0, diagonal, 1.0)
        self.matrix = moments.xx + (ridge * scale)[:, None, None] * np.eye(moments.xx.shape[1])
        self.factors = None
        if self.matrix.shape[1] > TOGETHER:
            try:
                self.factors = [cho_factor(m, check_finite=False) for m in self.matrix]
            except LinAlgError:  # by rounding no longer positive
                self.factors = None

    def solve(self, moments: Moments, start: Array) -> Array:
        """The W that minimises |T - X W|^2 + ridge * (mean diagonal of X'X) |W - start|^2. [groups, D, O]

        The penalty is on the change: where the rows say little, the weights stay what they were.
        """
        right = moments.xt - moments.xx @ start
        if self.factors is None:
            return np.asarray(start + np.linalg.solve(self.matrix, right))
        return np.asarray(
            start + np.stack([cho_solve(f, r, check_finite=False) for f, r in zip(self.factors, right, strict=True)])
        )


def solve(moments: Moments, start: Array, ridge: float) -> Array:
    """`System.solve` for one set of targets."""
    return System(moments, ridge).solve(moments, start)


def best_ridge(train: Moments, held_out: Moments, start: Array, ridges: tuple[float, ...] = RIDGES) -> float | None:
    """The ridge whose solution on some rows is best on others; None where `start` itself is."""
    if start.shape[1] > FEWER:
        ridges = ridges[1::2]
    errors = {ridge: held_out.error(solve(train, start, ridge)) for ridge in ridges}
    best = min(errors, key=lambda ridge: errors[ridge])
    return best if errors[best] < held_out.error(start) else None
