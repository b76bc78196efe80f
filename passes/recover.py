"""Pass `recover`: gives the layers of a pruned model new weights, without training and without labels.

Layer after layer, each with what it reads in the *pruned* model, as far as that has been recovered, and what it made in the
*original*. Where the layer's output is added to another tensor (a residual stream), it makes up for the error of that too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxprune import runtime, weights
from onnxprune.channels import Dim, Index
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.leastsq import RIDGES, Moments, best_ridge, solve
from onnxprune.linear import SOLVABLE, Linear
from onnxprune.plan import Plan
from onnxprune.replay import Replay, Shelf
from onnxprune.sites import Site, sites

ROWS = 64  # output positions for each sample
HELD_OUT = 5  # one row in so many judges the ridge


def recover(
    groups: Groups,
    plan: Plan,
    pruned: onnx.ModelProto,
    batches: Sequence[Mapping[str, Array]],
    *,
    how: str = "lsq",
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    compensate: bool = True,
    rows: int = ROWS,
) -> onnx.ModelProto:
    model = onnx.ModelProto()
    model.CopyFrom(pruned)
    found, _ = sites(groups, plan, model)
    if not found:
        return model
    targets = _Targets(groups, found, batches, seed, rows)
    replay = Replay(model, batches)
    left = {s.node: s for s in found}
    while left:
        replay.advance(left)
        ready = [s for s in left.values() if s.x in replay.available]
        if not ready:
            break
        first = [s for s in ready if s.rest is None or s.rest in replay.available]
        for site in first or ready:
            _solve(site, replay, targets, how, compensate)
            del left[site.node]
            if progress:
                progress(len(found) - len(left), len(found))
    return model


class _Targets:
    """What the original makes, at some rows of every layer."""

    def __init__(self, groups: Groups, found: Sequence[Site], batches: Sequence[Mapping[str, Array]], seed: int, rows: int):
        self._shelf = Shelf()
        self.picks: dict[int, list[tuple[Index, tuple[int, ...]]]] = {s.node: [] for s in found}
        self.made: dict[int, list[Array]] = {s.node: [] for s in found}
        self.rest: dict[int, list[Array]] = {s.node: [] for s in found}
        names = list(dict.fromkeys(n for s in found for n in (s.out, s.rest) if n))
        session = runtime.session(runtime.with_outputs(groups.net.source, names))
        rng = np.random.default_rng(seed)
        for batch in batches:
            values = dict(zip(names, runtime.run(session, batch, names), strict=True))
            count = next(iter(batch.values())).shape[0]
            for site in found:
                z = values[site.out]
                shape = site.rows(z.shape)
                picks = _spread(int(np.prod(shape)), rows * count, rng)
                self.picks[site.node].append((picks, shape))
                self.made[site.node].append(self._shelf.put(site.linear.outputs(z, picks)[:, site.kept]))
                if site.rest:
                    rest = site.linear.outputs(values[site.rest], picks)[:, site.rest_kept]
                    self.rest[site.node].append(self._shelf.put(rest))

    def drop(self, site: Site) -> None:
        for kept in (self.made, self.rest):
            for value in kept.pop(site.node):
                self._shelf.drop(value)


def _spread(total: int, wanted: int, rng: np.random.Generator) -> Index:
    """Row numbers, evenly spread with a random one of each stretch."""
    if wanted >= total:
        return np.arange(total)
    return np.asarray(((np.arange(wanted) + rng.random(wanted)) * (total / wanted)).astype(np.int64))


def _solve(site: Site, replay: Replay, targets: _Targets, how: str, compensate: bool) -> None:
    linear = site.linear
    start = linear.matrix(site.weight)
    g, width, outs = start.shape
    train, held = Moments(g, width, outs), Moments(g, width, outs)
    for k, batch in enumerate(replay.batches):
        picks, shape = targets.picks[site.node][k]
        x = linear.inputs(np.asarray(batch[site.x]), picks, shape)
        t = targets.made[site.node][k]
        if compensate and site.rest and site.rest in batch:
            now = linear.outputs(np.asarray(batch[site.rest]), picks)
            t = t + (targets.rest[site.node][k] - now) / site.gain
        if not site.movable:
            t = t - site.bias
        t = t.reshape(len(t), g, outs).transpose(1, 0, 2)
        cut = len(picks) - max(1, len(picks) // HELD_OUT)
        train.add(x[:, :cut], t[:, :cut])
        held.add(x[:, cut:], t[:, cut:])
    targets.drop(site)
    both = train.plus(held)
    a, b, c = (train.centred(), held.centred(train), both.centred()) if site.movable else (train, held, both)
    w = _fit(how, a, b, c, start)
    site.write(replay.model, linear.weight(w), ((both.t / both.count) - np.einsum("gd,gdo->go", both.x / both.count, w)).ravel())


def _fit(how: str, train: Moments, held: Moments, both: Moments, start: Array) -> Array:
    if how == "bias":
        return start
    if how == "rescale":
        across = (start * both.xt).sum(1)
        energy = (start * (both.xx @ start)).sum(1)
        return start * np.divide(across, energy, out=np.ones_like(across), where=energy > 1e-12)[:, None]
    if how == "bn":
        energy = (start * (both.xx @ start)).sum(1)
        return start * np.sqrt(np.divide(both.tt, energy, out=np.ones_like(energy), where=energy > 1e-12))[:, None]
    ridge = best_ridge(train, held, start, RIDGES)
    return start if ridge is None else solve(both, start, ridge)
