"""Least squares from normal equations that are added up batch by batch, in double precision."""

from __future__ import annotations

import numpy as np

from onnxprune.graph import Array

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of the Gram matrix


class Moments:
    """Sums over rows of X [groups, n, D] and T [groups, n, O]: X'X, X'T, T'T's diagonal, and the sums of both."""

    def __init__(self, groups: int, inputs: int, outputs: int) -> None:
        self.count = 0
        self.xx = np.zeros((groups, inputs, inputs))
        self.xt = np.zeros((groups, inputs, outputs))
        self.tt = np.zeros((groups, outputs))
        self.x = np.zeros((groups, inputs))
        self.t = np.zeros((groups, outputs))

    def add(self, x: Array, t: Array) -> None:
        x, t = x.astype(np.float64), t.astype(np.float64)
        across = x.transpose(0, 2, 1)
        self.count += x.shape[1]
        self.xx += across @ x
        self.xt += across @ t
        self.tt += (t * t).sum(1)
        self.x += x.sum(1)
        self.t += t.sum(1)

    def plus(self, other: Moments) -> Moments:
        """The moments of both sets of rows."""
        both = Moments.__new__(Moments)
        both.count = self.count + other.count
        for name in ("xx", "xt", "tt", "x", "t"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        return both

    def centred(self, about: Moments | None = None) -> Moments:
        """The moments of rows from which the means (of `about`, by default their own) are taken."""
        other = about or self
        mx, mt = other.x / other.count, other.t / other.count
        made = Moments.__new__(Moments)
        made.count = self.count
        n = self.count
        made.xx = self.xx - _outer(mx, self.x) - _outer(self.x, mx) + n * _outer(mx, mx)
        made.xt = self.xt - _outer(mx, self.t) - _outer(self.x, mt) + n * _outer(mx, mt)
        made.tt = self.tt - 2 * mt * self.t + n * mt * mt
        made.x, made.t = self.x - n * mx, self.t - n * mt
        return made

    def error(self, w: Array) -> float:
        """Sum of squares of T - X W over all rows, W [groups, D, O]."""
        return float(self.tt.sum() - 2 * (w * self.xt).sum() + (w * (self.xx @ w)).sum())


def _outer(a: Array, b: Array) -> Array:
    return np.asarray(a[:, :, None] * b[:, None, :])


def solve(moments: Moments, start: Array, ridge: float) -> Array:
    """The W that minimises |T - X W|^2 + ridge * (mean diagonal of X'X) |W - start|^2. [groups, D, O]

    The penalty is on the change: with few rows the weights stay where they were.
    """
    size = moments.xx.shape[1]
    diagonal = np.einsum("gii->gi", moments.xx).mean(1)
    scale = np.where(diagonal > 0, diagonal, 1.0)
    system = moments.xx + (ridge * scale)[:, None, None] * np.eye(size)
    return np.asarray(start + np.linalg.solve(system, moments.xt - moments.xx @ start))


def best_ridge(train: Moments, held_out: Moments, start: Array, ridges: tuple[float, ...] = RIDGES) -> float | None:
    """The ridge whose solution on some rows is best on others; None where `start` itself is."""
    errors = {r: held_out.error(solve(train, start, r)) for r in ridges}
    best = min(errors, key=lambda r: errors[r])
    return best if errors[best] < held_out.error(start) else None
