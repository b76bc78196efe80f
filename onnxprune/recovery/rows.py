"""The rows of one layer's least squares: what it reads in the pruned model beside what it should make of that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxprune.graph import Array
from onnxprune.recovery.leastsq import CHUNK
from onnxprune.recovery.replay import Replay
from onnxprune.recovery.sites import Site
from onnxprune.recovery.targets import Target

HELD_OUT = 5  # one row in so many judges the ridge
AT_ONCE = 128
HELD = 512 << 20  # bytes of gathered rows that are kept between sweeps; more are gathered again


@dataclass(frozen=True, eq=False)
class Block:
    """Rows of some batches, `learnt` of them to learn from and behind these the ones that are held out. All single precision.

    x: what is read, less an origin [groups, n, D]. t: what should be made of it, up to a bias that can move
    [groups, n, outputs of one]. low, high: (where the original lies beyond a bound that its reader clips to, that bound),
    in the shape of t or one that broadcasts to it; whatever is made beyond the bound is as good there.
    """

    x: Array
    t: Array
    learnt: int
    low: tuple[Array, Array] | None = None
    high: tuple[Array, Array] | None = None

    def nearest(self, made: Array) -> Array:
        """Of the targets that a clip does not tell apart those nearest to what is made, and in its place.

        made: [groups, n, outputs of one], of which few rows at a time are looked at: they stay in the processor's cache.
        """
        for first in range(0, made.shape[1], AT_ONCE):
            some = (slice(None), slice(first, first + AT_ONCE))
            here, aim = made[some], self.t[some].copy()
            for bound, nearer in ((self.low, np.minimum), (self.high, np.maximum)):
                if bound is not None:
                    beyond, limit = (v[some] if v.shape[1] > 1 else v for v in bound)
                    np.copyto(aim, nearer(here, limit), where=beyond)
            here[...] = aim
        return made

    @property
    def nbytes(self) -> int:
        return sum(v.nbytes for v in (self.x, self.t, *(self.low or ()), *(self.high or ())))


class Rows:
    """The rows of a layer whose input the replay has reached, block by block.

    Outputs are those of the layer times `sign`, that of what multiplies them on their way: the bounds of a clip lie alike then.
    """

    def __init__(self, site: Site, replay: Replay, targets: list[Target]) -> None:
        self.site, self._replay, self._targets = site, replay, targets
        self.groups = site.linear.groups
        self.sign = np.where(site.path.gain < 0, -1.0, 1.0)
        self.reached = site.path.rest is None or site.path.rest in replay.available
        self.origin = self._origin()
        self._parts = self._together()
        self._held: dict[int, Block] | None = {}

    def split(self, values: Array) -> Array:
        """Of [n, outputs] the outputs of each group. [groups, n, outputs of one]"""
        return values.reshape(len(values), self.groups, -1).transpose(1, 0, 2)

    def __iter__(self) -> Iterator[Block]:
        for number, part in enumerate(self._parts):
            yield self._block(number, part)

    def _block(self, number: int, part: list[int]) -> Block:
        if self._held is not None and number in self._held:
            return self._held[number]
        block = self._gathered(part)
        if self._held is not None:
            self._held[number] = block
            if sum(b.nbytes for b in self._held.values()) > HELD:
                self._held = None
        return block

    def _together(self) -> list[list[int]]:
        """Which batches make a block: so many that products of their rows pay."""
        parts: list[list[int]] = []
        rows = CHUNK
        for k, target in enumerate(self._targets):
            if rows >= CHUNK:
                parts.append([])
                rows = 0
            parts[-1].append(k)
            rows += len(target.picks)
        return parts

    def _learnt(self, k: int) -> int:
        n = len(self._targets[k].picks)
        return n - n // HELD_OUT if n >= HELD_OUT else n * (k % HELD_OUT != HELD_OUT - 1)  # few rows: all of some batches

    def _origin(self) -> Array:
        """Near the mean of X, where a bias takes up what that leaves; [groups, D]"""
        zero = np.zeros((self.groups, self.site.linear.matrix(self.site.weight).shape[1]), np.float32)
        if self.site.home is None or not self._targets:
            return zero
        return np.asarray(self._inputs(0).mean(1), np.float32)

    def _inputs(self, k: int) -> Array:
        target = self._targets[k]
        return self.site.linear.inputs(np.asarray(self._replay.batches[k][self.site.x]), target.picks, target.shape)

    def _gathered(self, part: list[int]) -> Block:
        learnt = sum(self._learnt(k) for k in part)
        total = sum(len(self._targets[k].picks) for k in part)
        x = np.empty((self.groups, total, self.origin.shape[1]), np.float32)
        places, first, second = [], 0, learnt
        for k in part:
            n, cut = len(self._targets[k].picks), self._learnt(k)
            place = np.append(np.arange(first, first + cut), np.arange(second, second + n - cut))
            first, second = first + cut, second + n - cut
            read = self._inputs(k)
            for rows, at in ((slice(cut), place[:cut]), (slice(cut, n), place[cut:])):
                if len(at):
                    np.subtract(read[:, rows], self.origin[:, None], out=x[:, at[0] : at[-1] + 1], casting="same_kind")
            places.append(place)
        order = np.argsort(np.concatenate(places))
        return self._with_targets(x, learnt, part, order)

    def _with_targets(self, x: Array, learnt: int, part: list[int], order: Array) -> Block:
        """order: row order[i] of the batches one after another is row i of the block."""
        path, single = self.site.path, np.float32
        inverse = (1 / np.abs(path.gain)).astype(single)
        fixed = 0.0 if self.site.home is not None else self.sign * self.site.bias
        if not self.reached:
            made = np.concatenate([np.asarray(self._targets[k].made) for k in part])[order]
            return Block(x, self.split((made * self.sign - fixed).astype(single)), learnt)
        sums = np.concatenate([self._targets[k].sum for k in part])[order].astype(single, copy=False)
        beside = (path.shift * inverse + fixed).astype(single)[None]
        if path.rest is not None:
            beside = beside + inverse * np.concatenate([self._rest(k) for k in part])[order]
        t = self.split(sums * inverse - beside)
        low, high = (
            (self.split(beyond), self.split(single(bound) * inverse - beside)) if np.isfinite(bound) else None
            for beyond, bound in ((sums <= path.low, path.low), (sums >= path.high, path.high))
        )
        return Block(x, t, learnt, low, high)

    def _rest(self, k: int) -> Array:
        assert self.site.path.rest is not None
        batch, target = self._replay.batches[k], self._targets[k]
        return self.site.linear.outputs(np.asarray(batch[self.site.path.rest]), target.picks).astype(np.float32, copy=False)
