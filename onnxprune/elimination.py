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
from onnxprune.saliency import Scores

NAME = "obs"  # as in `--method`
DAMPING = 1e-2  # of the mean diagonal of the Gram matrix
SHRINKING = 0.3  # more of it where rows are few: so much times the weights that adapt for each row
SURE = 1 + 1e-9


@dataclass(frozen=True, eq=False)
class Problem:
    """One linear map that reads channels.

    gram: X'X about the means [D, D], or for each unit alone [units, b, b], where the others do not adapt. matrix: W [D, O];
    [units, b, O] in the second case. units: the channels that feed it. rows: the rows of W that each feeds [units, b].
    samples: how many rows X has. Fewer than it has columns could be fitted by anything, on these rows alone.
    """

    gram: Array
    matrix: Array
    units: Index
    rows: Index
    samples: int = 1 << 40

    @property
    def adapts(self) -> bool:
        return self.gram.ndim == 2

    @property
    def energy(self) -> float:
        """Sum of squares of Z about its means."""
        return float((self.matrix * (self.gram @ self.matrix)).sum())


class _Coupled:
    """A problem in which the weights that are left adapt."""

    def __init__(self, problem: Problem, count: int) -> None:
        size = len(problem.gram)
        share = max(DAMPING, SHRINKING * size / max(1, problem.samples))
        self.damping = share * float(np.trace(problem.gram)) / size + 1e-30
        self.inverse = np.linalg.inv(problem.gram + self.damping * np.eye(size))
        self.matrix = problem.matrix.astype(np.float64)
        self.row = np.full((count, problem.rows.shape[1]), -1)
        self.row[problem.units] = problem.rows

    def costs(self, units: Index) -> Array:
        found = np.zeros(len(units))
        here = self.row[units, 0] >= 0
        rows = self.row[units[here]]
        if len(rows):
            w = self.matrix[rows]
            adapted = (w * np.linalg.solve(self.inverse[rows[:, :, None], rows[:, None, :]], w)).sum((1, 2))
            found[here] = adapted - self.damping * (w * w).sum((1, 2))  # only those that stay are held back
        return found

    def drop(self, unit: int) -> None:
        rows = self.row[unit]
        if rows[0] < 0:
            return
        across = self.inverse[:, rows]
        step = across @ np.linalg.inv(across[rows])
        self.matrix -= step @ self.matrix[rows]
        self.inverse -= step @ across.T
        self.matrix[rows] = self.inverse[rows] = self.inverse[:, rows] = 0


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
