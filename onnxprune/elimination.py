"""Block elimination: in which order to drop channels when what is left may adapt its weights.

A consumer makes Z = X W. Without the rows of W that channel u feeds, the other rows adapted by least squares, the squared
error grows by tr(W_u' (H_uu)^-1 W_u), H the inverse of X'X: optimal brain surgery (Hassibi and Stork, 1993) by blocks and
for several outputs. After each step H and W are those of the smaller problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.channels import Index
from onnxprune.graph import Array
from onnxprune.recovery.symmetric import add_square, inverse, mirror
from onnxprune.saliency import Scores

NAME = "obs"  # as in `--method`
DAMPING = 1e-2  # of the mean diagonal of the Gram matrix
SHRINKING = 0.3  # more of it where rows are few: so much times the weights that adapt for each row
SURE = 1 + 1e-9
WAITING = 128  # rows of W that go before the matrices are brought up to date
FEWEST = 64  # where H is made of few rows and brought up to date with little ado
LEAST = 1e-14  # of the largest eigenvalue: less is rounding


@dataclass(frozen=True, eq=False)
class Problem:
    """One linear map that reads channels.

    gram: X'X about the means [D, D], or for each unit alone [units, b, b], where the others do not adapt; with `few` X itself
    about its means [n, D], which is less where it has few rows. matrix: W [D, O]; [units, b, O] in the second case. units: the
    channels that feed it. rows: the rows of W that each feeds [units, b]. samples: how many rows X has. Fewer than it has
    columns could be fitted by anything, on these rows alone.
    """

    gram: Array
    matrix: Array
    units: Index
    rows: Index
    samples: int = 1 << 40
    few: bool = False

    @property
    def adapts(self) -> bool:
        return self.gram.ndim == 2

    @property
    def energy(self) -> float:
        """Sum of squares of Z about its means."""
        made = self.gram @ self.matrix
        return float(np.vdot(made, made) if self.few else (self.matrix * made).sum())

    @property
    def mean_diagonal(self) -> float:
        """Of X'X [D, D]."""
        total = np.vdot(self.gram, self.gram) if self.few else np.trace(self.gram)
        return float(total / self.gram.shape[1])


class _Dense:
    """H, the inverse of X'X + damping, as it stands; of its rows and columns those that units feed."""

    def __init__(self, gram: Array, damping: float, mine: Index) -> None:
        order = np.append(mine, np.setdiff1d(np.arange(len(gram)), mine))
        a = np.array(gram[np.ix_(order, order)], np.float64, order="C")
        a[np.diag_indices_from(a)] += damping
        self.matrix = inverse(a)[: len(mine), : len(mine)]

    @property
    def given(self) -> Array:
        """The rows of P that there are from the start."""
        return self.matrix[:0]

    def across(self, rows: slice) -> Array:
        return np.asarray(self.matrix[rows])

    def keep(self, rows: Index, p: Array) -> None:
        """Leaves all but some rows and columns out, once P'P of what has gone has been taken off. p: P at these [n, rows]."""
        self.matrix = self.matrix[np.ix_(rows, rows)]
        add_square(self.matrix, p, -1.0)
        mirror(self.matrix)

    def blocks(self, b: int) -> Array:
        """The blocks on the diagonal. [units, b, b]"""
        units = len(self.matrix) // b
        return np.array(np.einsum("ubuc->ubc", self.matrix.reshape(units, b, units, b)))


class _Thin:
    """H of few rows X as a multiple of the identity less P'P: 1 - X'(XX' + damping)^-1 X, over the damping."""

    def __init__(self, x: Array, damping: float, mine: Index) -> None:
        beside = np.delete(x, mine, 1).astype(np.float64)
        self.damping, self.x = damping, x[:, mine].astype(np.float64)
        self.fixed = beside @ beside.T + damping * np.eye(len(x))
        self._begin()

    def _begin(self) -> None:
        root = np.linalg.inv(np.linalg.cholesky(self.fixed + self.x @ self.x.T))
        self.given = root @ self.x / np.sqrt(self.damping)

    def across(self, rows: slice) -> Array:
        found = np.zeros((rows.stop - rows.start, self.x.shape[1]))
        found[np.arange(len(found)), np.arange(rows.start, rows.stop)] = 1 / self.damping
        return found

    def keep(self, rows: Index, p: Array) -> None:
        """Leaves all but some rows and columns out."""
        self.x = self.x[:, rows]
        self._begin()

    def blocks(self, b: int) -> Array:
        """The blocks on the diagonal. [units, b, b]"""
        each = self.given.reshape(len(self.given), self.given.shape[1] // b, b).transpose(1, 2, 0)
        return np.asarray(np.eye(b) / self.damping - each @ each.transpose(0, 2, 1))


class _Coupled:
    """A problem in which the weights that are left adapt.

    H and W are what they were at the last `_settle`, less what was dropped since: H - P'P and W - P'Q, P and Q with a row for
    each row of W that went. So each step reads one block of H, and products with all of it are of many rows at once. What the
    costs need, the diagonal blocks of H and of WW', is kept up to date [units, b, b].
    """

    def __init__(self, problem: Problem, count: int) -> None:
        share = max(DAMPING, SHRINKING * problem.gram.shape[1] / max(1, problem.samples))
        self.damping = share * problem.mean_diagonal + 1e-30
        units, self.block = problem.rows.shape
        mine = problem.rows.ravel()
        self.inverse = (_Thin if problem.few else _Dense)(problem.gram, self.damping, mine)
        self.matrix = _narrow(problem.matrix[mine].astype(np.float64))
        self.place = np.full(count, -1)
        self.place[problem.units] = np.arange(units)
        self._begin()

    def costs(self, units: Index) -> Array:
        found = np.zeros(len(units))
        here = self.place[units] >= 0
        at = self.place[units[here]]
        own, products = self.own[at], self.products[at]
        adapted = products / own if self.block == 1 else np.linalg.solve(own, products)
        # only those that stay are held back
        found[here] = np.trace(adapted, axis1=1, axis2=2) - self.damping * np.trace(products, axis1=1, axis2=2)
        return found

    def drop(self, unit: int) -> None:
        at, b = int(self.place[unit]), self.block
        if at < 0:
            return
        rows, done, end = slice(at * b, at * b + b), slice(self.gone), slice(self.gone, self.gone + b)
        before, root = self.p[done, rows].T, _root(self.own[at])
        q = self.q[end] = root @ (self.matrix[rows] - before @ self.q[done])
        products = np.concatenate([before, q @ self.q[done].T]) @ self.p[done]  # P is large, and so is read once
        p = self.p[end] = root @ (self.inverse.across(rows) - products[:b])
        across = q @ self.matrix.T - products[b:] - 0.5 * (q @ q.T) @ p
        each, other = (v.reshape(b, -1, b).transpose(1, 2, 0) for v in (p, across))
        turned = each.transpose(0, 2, 1)
        self.own -= each @ turned
        step = other @ turned
        self.products -= step + step.transpose(0, 2, 1)
        self.place[unit] = -1
        self.gone += b
        if self.gone + b > len(self.p):
            self._settle()

    def _settle(self) -> None:
        """Carries out what was dropped since the last time, and leaves it out of the matrices."""
        left, b = np.flatnonzero(self.place >= 0), self.block
        rows = (self.place[left][:, None] * b + np.arange(b)).ravel()
        gone = slice(len(self.inverse.given), self.gone)
        p = self.p[gone, rows]
        self.matrix = self.matrix[rows]
        self.matrix -= p.T @ self.q[gone]
        self.inverse.keep(rows, p)
        self.place[left] = np.arange(len(left))
        self._begin()

    def _begin(self) -> None:
        given, b = self.inverse.given, self.block
        waiting = min(WAITING, max(len(given), FEWEST)) if len(given) else WAITING
        lines = len(given) + max(1, waiting // b) * b
        self.gone, self.p = len(given), np.empty((lines, given.shape[1]))
        self.q = np.zeros((lines, self.matrix.shape[1]))
        self.p[: len(given)] = given
        self.own = self.inverse.blocks(b)
        each = self.matrix.reshape(-1, b, self.matrix.shape[1])
        self.products = each @ each.transpose(0, 2, 1)


def _narrow(matrix: Array) -> Array:
    """A matrix with no more columns than rows and the same products of its rows, which are all that costs are made of."""
    if matrix.shape[0] >= matrix.shape[1]:
        return matrix
    return np.ascontiguousarray(np.asarray(np.linalg.qr(matrix.T, mode="r")).T)


def _root(a: Array) -> Array:
    """R [b, b] with R'R the inverse of `a`, which rounding may have made indefinite."""
    try:
        return np.asarray(np.linalg.inv(np.linalg.cholesky(a)))
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(a)
        return np.asarray((vectors / np.sqrt(np.maximum(values, LEAST * max(float(values[-1]), LEAST)))).T)


class _Independent:
    """A problem in which nothing adapts: each channel costs what it adds to the output."""

    def __init__(self, problem: Problem, count: int) -> None:
        self.cost = np.zeros(count)
        self.cost[problem.units] = (problem.matrix * (problem.gram @ problem.matrix)).sum((1, 2))

    def costs(self, units: Index) -> Array:
        return self.cost[units]

    def drop(self, unit: int) -> None:
        pass


class _Consumer:
    """The linear maps of one consumer (a grouped convolution has several).

    Its errors are relative to its output's energy, and count as much as they move the model's outputs.
    """

    def __init__(self, problems: Sequence[Problem], influence: float, count: int) -> None:
        self.parts = [(_Coupled if p.adapts else _Independent)(p, count) for p in problems]
        energy = sum(p.energy for p in problems)
        self.weight = influence**2 / energy if energy > 0 else 0.0

    def costs(self, units: Index) -> Array:
        return np.asarray(self.weight * np.sum([p.costs(units) for p in self.parts], axis=0))

    def drop(self, unit: int) -> None:
        for part in self.parts:
            part.drop(unit)


def eliminate(consumers: Sequence[Sequence[Problem]], count: int, influences: Sequence[float] | None = None) -> Scores:
    """The error that each of `count` channels adds, relative to the consumers' outputs, when it goes as its turn comes.

    The channel that adds least goes first. Made to increase along that order, so that the n highest scores are those of the
    n channels that stay longest. The errors that one channel leaves in several consumers are alike, so amplitudes add.
    """
    shares = influences or [1.0] * len(consumers)
    states = [_Consumer(problems, share, count) for problems, share in zip(consumers, shares, strict=True)]
    left = np.arange(count)
    scores = np.zeros(count)
    so_far = 0.0
    while len(left):
        amplitudes = [np.sqrt(s.costs(left).clip(0)) for s in states]
        costs = np.sum(amplitudes, axis=0) ** 2 if states else np.zeros(len(left))
        k = int(np.argmin(costs))
        so_far = max(so_far * SURE, float(costs[k]))
        scores[left[k]] = so_far
        for state in states:
            state.drop(int(left[k]))
        left = np.delete(left, k)
    return scores
