"""How strong a ridge does best on rows that are held out."""

from __future__ import annotations

import numpy as np
from numpy.linalg import LinAlgError

from onnxprune.graph import Array
from onnxprune.recovery.leastsq import FEWER, Moments, factorised, mean_diagonal, solved

MIXED = 64  # mixtures of the outputs that are looked at where there are more than twice as many
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # of the mean diagonal of the Gram matrix


def best_ridge(train: Moments, held_out: Moments, start: Array, ridges: tuple[float, ...] = RIDGES) -> float | None:
    """The ridge whose solution on some rows is best on others; None where `start` itself is.

    From the middle downhill: the error falls and then rises with the ridge, and every ridge that is tried costs a solution.
    """
    if start.shape[1] > FEWER:
        ridges = ridges[1::2]
    search = _Search(train, held_out, start)
    errors: dict[int, float] = {}

    def error(i: int) -> float:
        if not 0 <= i < len(ridges):
            return float("inf")
        if i not in errors:
            errors[i] = search.error(ridges[i])
        return errors[i]

    best = len(ridges) // 2
    while error(beside := min((best - 1, best + 1), key=error)) < error(best):
        best = beside
    return ridges[best] if error(best) < 0 else None


class _Search:
    """Solutions for the change of the weights, by ridge.

    Wide systems are in single precision, as their sums' parts are, and of many outputs a few mixtures with random signs are
    looked at there, whose squares add up to those of all of them on average.
    """

    def __init__(self, train: Moments, held_out: Moments, start: Array) -> None:
        kind = np.float32 if start.shape[1] > FEWER else np.float64
        mixture = _mixture(start.shape[2]) if start.shape[1] > FEWER else None
        first, t, held_t = (v if mixture is None else v @ mixture for v in (start, train.xt, held_out.xt))
        self.right = (t - train.xx @ first).astype(kind, copy=False)
        self.held_right = held_t - held_out.xx @ first
        self.xx, self.held = train.xx.astype(kind, copy=False), held_out.xx.astype(kind, copy=False)
        self.scale = mean_diagonal(train.xx)

    def error(self, ridge: float) -> float:
        """By how much the squared error on the held-out rows exceeds that of the weights as they are."""
        try:
            change = solved(factorised(self.xx, ridge * self.scale), self.right)
        except LinAlgError:  # by rounding not even positive: too little to go by
            return float("inf")
        return float((change * (self.held @ change - 2 * self.held_right)).sum(dtype=np.float64))


def _mixture(outputs: int) -> Array | None:
    """[outputs, MIXED]; None where there are few outputs."""
    if outputs <= 2 * MIXED:
        return None
    return np.asarray(np.random.default_rng(outputs).choice((-1.0, 1.0), (outputs, MIXED)) / np.sqrt(MIXED))
