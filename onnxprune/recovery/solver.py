"""New weights for one layer: what it reads in the pruned model, what the original made of it, and least squares between."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np

from onnxprune.graph import Array
from onnxprune.recovery.leastsq import FEWER, Moments, Sums, System
from onnxprune.recovery.replay import Replay
from onnxprune.recovery.ridge import best_ridge
from onnxprune.recovery.rows import Rows
from onnxprune.recovery.sites import Site
from onnxprune.recovery.targets import Targets

How: TypeAlias = Literal["rescale", "bias", "bn", "lsq"]
WAYS: tuple[How, ...] = ("rescale", "bias", "bn", "lsq")

SWEEPS = 6  # of the targets that a clip leaves open, at most
SETTLED = 0.02  # of what a solution has changed: a sweep that changes less is the last
FEW_SWEEPS = 2  # in wide layers, where each takes as long as all that came before
LEAST = 1e-12
CAUTIOUS = 0.1  # the ridge where there are too few rows to judge it


def recovered(site: Site, replay: Replay, targets: Targets, how: How) -> tuple[Array, Array]:
    """(the weight, what the layer itself has to add to its sums [outputs]) of a layer whose input the replay has reached."""
    solver = _Solver(Rows(site, replay, targets.by_node[site.node]))
    return solver.solution(_FITS[how](solver))


class _Solver:
    """Solves for the layer's weights with the signs that `Rows` gives its outputs."""

    def __init__(self, rows: Rows) -> None:
        self.rows, self.site = rows, rows.site
        self.sign = rows.split(rows.sign[None])
        self.start = self.site.linear.matrix(self.site.weight) * self.sign
        self.width, self.outs = self.start.shape[1:]
        self.all: Moments | None = None

    def halves(self) -> tuple[Moments, Moments]:
        """The moments of most rows, and of those that are held out."""
        train, held = (Sums(self.rows.groups, self.width, self.outs) for _ in range(2))
        for block in self.rows:
            n = block.learnt
            train.add(block.x[:, :n], block.t[:, :n])
            held.add(block.x[:, n:], block.t[:, n:])
        return train.moments(), held.moments()

    def moments(self) -> Moments:
        if self.all is None:
            train, held = self.halves()
            self.all = train.plus(held)
        return self.all

    def least_squares(self) -> Array:
        """The ridge is what does best on held-out rows; then, where a clip follows, sweeps over what it leaves open."""
        train, held = self.halves()
        self.all = train.plus(held)
        ridge: float | None = CAUTIOUS
        if held.count and train.count:
            ridge = best_ridge(self.centred(train, train), self.centred(held, train), self.start)
        del train, held
        if ridge is None:
            return self.start
        whole = self.centred(self.all)
        self.all = replace(self.all, xx=whole.xx[:0])  # they are about the means now
        system = System(whole, self.start, ridge)
        matrix = system.solve(whole.xt)
        sweeps = FEW_SWEEPS if self.width > FEWER else SWEEPS
        for _ in range(sweeps if self.site.path.clips and self.rows.reached else 0):
            self.all = self.clipped(matrix)
            last = matrix
            matrix = system.solve(self.all.centred_targets() if self.site.home is not None else self.all.xt)
            if np.linalg.norm(matrix - last) < SETTLED * np.linalg.norm(matrix - self.start):
                break
        return matrix

    def centred(self, moments: Moments, about: Moments | None = None) -> Moments:
        """About the means where a bias can move, in the memory of `moments`."""
        return moments.centred(about, overwrite=True) if self.site.home is not None else moments

    def clipped(self, matrix: Array) -> Moments:
        """The moments with targets that a clip does not tell from what the layer makes now.

        Where the original is clipped, all that lies beyond is as good. Moving the target to what is made there, or to the
        bound, never increases the error after the clip (majorisation), and leaves the rest of the rows more freedom.
        """
        moments, single = self.moments().without_targets(), matrix.astype(np.float32)
        shift = self._shift(matrix).astype(np.float32)[:, None]
        for block in self.rows:
            made = block.x @ single
            made += shift
            moments.add_targets(block.x, block.nearest(made))
        return moments

    def _shift(self, matrix: Array) -> Array:
        """What a bias that can move adds to X W, X less its origin. [groups, outputs of one]"""
        if self.site.home is None:
            return np.zeros_like(matrix[:, 0])
        x, t = self.moments().means
        return np.asarray(t - np.einsum("gd,gdo->go", x, matrix))

    def solution(self, matrix: Array) -> tuple[Array, Array]:
        """(the layer's weight, the bias that goes with it: its own where nothing can move that)."""
        weight = self.site.linear.weight(matrix * self.sign)
        if self.site.home is None:
            return weight, self.site.bias
        bias = self._shift(matrix) - np.einsum("gd,gdo->go", self.rows.origin, matrix)
        return weight, bias.ravel() * self.rows.sign


# ---------------------------------------------------------------------------------- two numbers for each output


def _scaled(start: Array, above: Array, below: Array) -> Array:
    return np.asarray(start * np.divide(above, below, out=np.ones_like(below), where=below > LEAST)[:, None])


def _bias_only(solver: _Solver) -> Array:
    solver.moments()
    return solver.start


def _rescaled(solver: _Solver) -> Array:
    """Every filter times the number that fits best."""
    start, m = solver.start, solver.centred(solver.moments())
    return _scaled(start, (start * m.xt).sum(1), (start * (m.xx @ start)).sum(1))


def _normalised(solver: _Solver) -> Array:
    """Every filter times what gives its output the variance of the original: batch statistics, estimated again."""
    start, m = solver.start, solver.centred(solver.moments())
    return _scaled(start, np.sqrt(m.tt), np.sqrt((start * (m.xx @ start)).sum(1).clip(0)))


_FITS: Mapping[str, Callable[[_Solver], Array]] = {
    "lsq": _Solver.least_squares,
    "bias": _bias_only,
    "rescale": _rescaled,
    "bn": _normalised,
}
