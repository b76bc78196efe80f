"""New weights for one layer: what it reads in the pruned model, what the original made of it, and least squares between."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, TypeAlias

import numpy as np

from onnxprune.graph import Array
from onnxprune.recovery.leastsq import FEWER, Moments, Sums, System, best_ridge
from onnxprune.recovery.replay import Replay
from onnxprune.recovery.sites import Site
from onnxprune.recovery.targets import Target, Targets

How: TypeAlias = Literal["rescale", "bias", "bn", "lsq"]
WAYS: tuple[How, ...] = ("rescale", "bias", "bn", "lsq")

HELD_OUT = 5  # one row in so many judges the ridge
SWEEPS = 6  # of the targets that a clip leaves open, at most
SETTLED = 0.02  # of what a solution has changed: a sweep that changes less is the last
FEW_SWEEPS = 2  # in wide layers, where each takes as long as all that came before
HELD = 512 << 20  # bytes of gathered rows that are kept between sweeps; more are gathered again
LEAST = 1e-12
CAUTIOUS = 0.1  # the ridge where there are too few rows to judge it


def recovered(site: Site, replay: Replay, targets: Targets, how: How) -> tuple[Array, Array]:
    """(the weight, what the layer itself has to add to its sums [outputs]) of a layer whose input the replay has reached."""
    solver = _Solver(site, replay, targets.by_node[site.node])
    matrix = _FITS[how](solver.moments(), site) if how != "lsq" else solver.least_squares()
    return site.linear.weight(matrix), solver.bias(matrix)


class _Solver:
    def __init__(self, site: Site, replay: Replay, targets: list[Target]) -> None:
        self.site, self.replay, self.targets = site, replay, targets
        self.start = site.linear.matrix(site.weight)
        self.groups, self.width, self.outs = self.start.shape
        self.reached = site.path.rest is None or site.path.rest in replay.available
        self.held: dict[int, Array] | None = {}
        self.all: Moments | None = None
        self.origin = self._origin()

    def rows(self) -> Iterator[tuple[Array, Array, Target]]:
        """(X less its origin [groups, rows, D], what the path adds to gain * z [rows, outputs], the target), batch by batch."""
        path = self.site.path
        for k, (batch, target) in enumerate(zip(self.replay.batches, self.targets, strict=True)):
            beside: Array = np.broadcast_to(path.shift, target.made.shape)
            if path.rest is not None and self.reached:
                beside = beside + self.site.linear.outputs(np.asarray(batch[path.rest]), target.picks)
            yield self._inputs(k, batch, target), beside, target

    def _inputs(self, k: int, batch: Mapping[str, Array], target: Target) -> Array:
        if self.held is not None and k in self.held:
            return self.held[k]
        x = self.site.linear.inputs(np.asarray(batch[self.site.x]), target.picks, target.shape).astype(np.float32)
        x -= self.origin[:, None, :]
        if self.held is not None:
            self.held[k] = x
            if sum(v.nbytes for v in self.held.values()) > HELD:
                self.held = None
        return x

    def _origin(self) -> Array:
        """Near the mean of X, where a bias takes up what that leaves; [groups, D]"""
        zero = np.zeros((self.groups, self.width), np.float32)
        if self.site.home is None or not self.targets:
            return zero
        first, target = self.replay.batches[0], self.targets[0]
        x = self.site.linear.inputs(np.asarray(first[self.site.x]), target.picks, target.shape)
        return np.asarray(x.mean(1), np.float32)

    def wanted(self, beside: Array, target: Target) -> Array:
        """The z that would make up for all error there is so far. [rows, outputs]"""
        return (target.sum - beside) / self.site.path.gain if self.reached else target.made.astype(np.float64)

    def split(self, wanted: Array) -> Array:
        """Targets as least squares takes them, a bias that cannot move taken off. [groups, rows, outputs of one]"""
        fixed = wanted if self.site.home is not None else wanted - self.site.bias
        return fixed.reshape(len(fixed), self.groups, self.outs).transpose(1, 0, 2)

    def halves(self) -> tuple[Moments, Moments]:
        """The moments of most rows, and of those that are held out."""
        train, held = (Sums(self.groups, self.width, self.outs) for _ in range(2))
        for k, (x, beside, target) in enumerate(self.rows()):
            t = self.split(self.wanted(beside, target))
            n = x.shape[1]
            cut = n - n // HELD_OUT if n >= HELD_OUT else n * (k % HELD_OUT != HELD_OUT - 1)  # few rows: all of some batches
            train.add(x[:, :cut], t[:, :cut])
            held.add(x[:, cut:], t[:, cut:])
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
        if ridge is None:
            return self.start
        whole = self.centred(self.all)
        system = System(whole, self.start, ridge)
        matrix = system.solve(whole.xt)
        sweeps = FEW_SWEEPS if self.width > FEWER else SWEEPS
        for _ in range(sweeps if self.site.path.clips and self.reached else 0):
            self.all = self.clipped(matrix)
            last = matrix
            matrix = system.solve(self.all.centred_targets() if self.site.home is not None else self.all.xt)
            if np.linalg.norm(matrix - last) < SETTLED * np.linalg.norm(matrix - self.start):
                break
        return matrix

    def centred(self, moments: Moments, about: Moments | None = None) -> Moments:
        return moments.centred(about) if self.site.home is not None else moments

    def clipped(self, matrix: Array) -> Moments:
        """The moments with targets that a clip does not tell from what the layer makes now.

        Where the original is clipped, all that lies beyond is as good. Moving the target to what is made there, or to the
        bound, never increases the error after the clip (majorisation), and leaves the rest of the rows more freedom.
        """
        assert self.all is not None
        bias = self._intercept(matrix)
        single = matrix.astype(np.float32)
        moments = self.all.without_targets()
        path = self.site.path
        for x, beside, target in self.rows():
            now = (x @ single).transpose(1, 0, 2).reshape(len(target.picks), -1) + bias
            total = path.gain * now + beside
            aim = target.sum.astype(np.float64)
            aim = np.where(target.sum <= path.low, np.minimum(total, path.low), aim)
            aim = np.where(target.sum >= path.high, np.maximum(total, path.high), aim)
            moments.add_targets(x, self.split((aim - beside) / path.gain))
        return moments

    def _intercept(self, matrix: Array) -> Array:
        """What the layer adds to X W, X less its origin. [outputs]"""
        if self.site.home is None:
            return self.site.bias
        x, t = self.moments().means
        return np.asarray((t - np.einsum("gd,gdo->go", x, matrix)).ravel())

    def bias(self, matrix: Array) -> Array:
        """The bias that goes with a solution; the layer's own where nothing can move it."""
        return np.asarray(self._intercept(matrix) - np.einsum("gd,gdo->go", self.origin, matrix).ravel())


# ---------------------------------------------------------------------------------- two numbers for each output


def _scaled(start: Array, above: Array, below: Array) -> Array:
    return np.asarray(start * np.divide(above, below, out=np.ones_like(below), where=below > LEAST)[:, None])


def _about_means(moments: Moments, site: Site) -> tuple[Array, Moments]:
    return site.linear.matrix(site.weight), moments.centred() if site.home is not None else moments


def _bias_only(moments: Moments, site: Site) -> Array:
    return site.linear.matrix(site.weight)


def _rescaled(moments: Moments, site: Site) -> Array:
    """Every filter times the number that fits best."""
    start, m = _about_means(moments, site)
    return _scaled(start, (start * m.xt).sum(1), (start * (m.xx @ start)).sum(1))


def _normalised(moments: Moments, site: Site) -> Array:
    """Every filter times what gives its output the variance of the original: batch statistics, estimated again."""
    start, m = _about_means(moments, site)
    return _scaled(start, np.sqrt(m.tt), np.sqrt((start * (m.xx @ start)).sum(1).clip(0)))


_FITS: Mapping[str, Callable[[Moments, Site], Array]] = {"bias": _bias_only, "rescale": _rescaled, "bn": _normalised}
