"""Least squares from normal equations that are added up batch by batch.

Products within a few thousand rows are in single precision, where they are fast, of rows that an origin near their mean
has been taken off, so that little cancels later; their sums and all that is solved are in double precision.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.linalg import LinAlgError

from onnxprune.graph import Array
from onnxprune.recovery.symmetric import Factors, add_square, mirror, subtract_outer

TOGETHER = 64  # inputs * taps up to which NumPy solves all groups in one call
FEWER = 512  # and from which systems are wide: each solution takes long
SINGLE = 1e-3  # the least ridge at which such a system is solved in single precision
CHUNK = 2048  # rows that are multiplied at once
FEW = 8  # columns for every row from which rows are kept instead of their products
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
        self.tt += _totals(np.square(t))
        self.t += _totals(t)

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

    def centred(self, about: Moments | None = None, *, overwrite: bool = False) -> Moments:
        """The moments of rows from which means are taken: those of `about`, by default their own. overwrite: in place of xx."""
        n, (mx, mt) = self.count, (about or self).means
        xx = self.xx if overwrite else self.xx.copy()
        for block, mean, off in zip(xx, mx, self.x - 0.5 * n * mx, strict=True):
            subtract_outer(block, mean, off)
        return Moments(
            n,
            xx,
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
        self._multiplied = False
        self._space: Array | None = None

    def add(self, x: Array) -> None:
        self.count += x.shape[1]
        self.x += _totals(x)
        self._waiting.append(x)
        if sum(w.shape[1] for w in self._waiting) >= CHUNK:
            self._multiply()

    def _multiply(self) -> None:
        rows = self._waiting[0] if len(self._waiting) == 1 else np.concatenate(self._waiting, 1)
        self._waiting, self._multiplied = [], True
        if self._one_triangle:
            if self._space is None:  # a new one each time costs as much as the product
                self._space = np.zeros(self._xx.shape[1:], rows.dtype)
            add_square(self._xx[0], rows[0], space=self._space)
        else:
            self._xx += rows.transpose(0, 2, 1) @ rows

    @property
    def xx(self) -> Array:
        """X'X [groups, D, D]; not to be changed."""
        if self._waiting:
            self._multiply()
        self._space = None
        if self._one_triangle:
            mirror(self._xx[0])
        return self._xx

    def few(self) -> Array | None:
        """X about its means [groups, n, D], where it has so few rows that they are less than their products; else None."""
        if self._multiplied or self.count * FEW > self._xx.shape[1] or not self._waiting:
            return None
        rows = np.concatenate(self._waiting, 1, dtype=np.float64)
        return np.asarray(rows - rows.mean(1, keepdims=True))

    def centred(self) -> Array:
        """X'X about the means. [groups, D, D]"""
        xx = self.xx.copy()
        for block, total in zip(xx, self.x, strict=True):
            subtract_outer(block, total, 0.5 * total / max(1, self.count))
        return xx


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


def _totals(x: Array) -> Array:
    """Sums over rows, in as many steps as a product takes. [groups, columns]"""
    return np.asarray((np.ones((1, x.shape[1]), x.dtype) @ x)[:, 0])


def _outer(a: Array, b: Array) -> Array:
    return np.asarray(a[:, :, None] * b[:, None, :])


def mean_diagonal(xx: Array) -> Array:
    """What ridges are relative to: the mean diagonal of every group. [groups]"""
    diagonal = np.einsum("gii->gi", xx).mean(1)
    return np.where(diagonal > 0, diagonal, 1.0)


def factorised(xx: Array, damping: Array) -> list[Factors] | Array:
    """xx [groups, D, D] with `damping` [groups] on its diagonals, factorised where that pays, else as it is.

    Raises LinAlgError where it is, by rounding, not positive definite.
    """
    if xx.shape[1] <= TOGETHER:
        return np.asarray(xx + damping[:, None, None] * np.eye(xx.shape[1]))
    return [Factors(m, d) for m, d in zip(xx, damping, strict=True)]


def solved(system: list[Factors] | Array, right: Array) -> Array:
    """Of what `factorised` returns, the solutions [groups, D, O] for right sides."""
    if isinstance(system, list):
        return np.stack([f.solve(r) for f, r in zip(system, right, strict=True)])
    return np.asarray(np.linalg.solve(system, right))


class System:
    """X'X + ridge * (mean diagonal of X'X), factorised once for all targets.

    Wide systems with a ridge that allows it are in single precision.
    """

    def __init__(self, moments: Moments, start: Array, ridge: float) -> None:
        kind = np.float32 if start.shape[1] > FEWER and ridge >= SINGLE else np.float64
        xx, damping = moments.xx.astype(kind, copy=False), ridge * mean_diagonal(moments.xx)
        self.start, self.made = start, xx @ start.astype(kind, copy=False)
        try:
            self._system = factorised(xx, damping)
        except LinAlgError:
            self._system = moments.xx + damping[:, None, None] * np.eye(start.shape[1])

    def solve(self, xt: Array) -> Array:
        """The W that minimises |T - X W|^2 + ridge * (mean diagonal of X'X) |W - start|^2. [groups, D, O]

        xt: X'T. The penalty is on the change: where the rows say little, the weights stay what they were.
        """
        return np.asarray(self.start + solved(self._system, xt - self.made))


def solve(moments: Moments, start: Array, ridge: float) -> Array:
    """`System.solve` for one set of targets."""
    return System(moments, start, ridge).solve(moments.xt)
