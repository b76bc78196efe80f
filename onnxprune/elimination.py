"""Block elimination: in which order to drop channels when the consumers may adapt their other weights.

A consumer makes Z = X W. Without the rows of W that channel u feeds, the others adapted by least squares, the error grows
by tr(W_u' (H_uu)^-1 W_u), H the inverse of the Gram matrix X'X (optimal brain surgery, Hassibi and Stork 1993, for
blocks; [DERIVED] for several outputs: the sum over them). After each step H and W are those of the smaller problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxprune.channels import Index
from onnxprune.graph import Array
from onnxprune.saliency import Scores

DAMPING = 1e-3  # of the mean diagonal of the Gram matrix


@dataclass
class Problem:
    """One consumer: its Gram matrix [D, D], its weight [D, O], the rows of the weight that every unit feeds [U, b].

    weight: by which errors of this consumer count, one over the energy of its output.
    """

    gram: Array
    matrix: Array
    rows: Index
    weight: float = 1.0


class _State:
    def __init__(self, problem: Problem, damping: float) -> None:
        size = len(problem.gram)
        mean = float(np.trace(problem.gram)) / size
        self.inverse = np.linalg.inv(problem.gram + (damping * mean + 1e-30) * np.eye(size))
        self.matrix = problem.matrix.astype(np.float64).copy()
        self.rows, self.weight = problem.rows, problem.weight

    def costs(self, units: Index) -> Array:
        """Added error of each of the units."""
        rows = self.rows[units]
        blocks = self.inverse[rows[:, :, None], rows[:, None, :]]
        w = self.matrix[rows]
        return np.asarray(self.weight * (w * np.linalg.solve(blocks, w)).sum((1, 2)))

    def drop(self, unit: int) -> None:
        rows = self.rows[unit]
        across = self.inverse[:, rows]
        step = across @ np.linalg.inv(across[rows])
        self.matrix -= step @ self.matrix[rows]
        self.inverse -= step @ across.T
        self.matrix[rows] = 0
        self.inverse[rows] = 0
        self.inverse[:, rows] = 0


def eliminate(problems: Sequence[Problem], units: int, damping: float = DAMPING) -> Scores:
    """Error that the network of consumers gains when each unit goes, in the best order. [units]

    Made monotone along the order, so that the n highest scores are those of the n units that go last.
    """
    states = [_State(p, damping) for p in problems]
    left = np.arange(units)
    scores = np.zeros(units)
    so_far = 0.0
    while len(left) > 1:
        costs = _joined([s.costs(left) for s in states])
        k = int(np.argmin(costs))
        so_far = max(so_far * (1 + 1e-9), float(costs[k]))
        unit = int(left[k])
        scores[unit] = so_far
        for state in states:
            state.drop(unit)
        left = np.delete(left, k)
    if len(left):
        scores[left[0]] = max(so_far * (1 + 1e-9), float(_joined([s.costs(left) for s in states])[0]))
    return scores


def _joined(costs: Sequence[Array]) -> Array:
    """What several consumers lose together: the errors that one channel leaves in them are alike, so amplitudes add."""
    return np.asarray(np.sum([np.sqrt(c.clip(0)) for c in costs], axis=0) ** 2)
