"""Dropped channels as linear combinations of kept ones, folded into the layers that read them.

With X_k what a layer reads of kept channels in the original and X_d of those that go, both about their means, the A that
minimises |X_d - X_k A|^2 gives the layer the kernel W_k + A W_d: what the least squares of its own output Z = X_k W_k + X_d W_d
on X_k gives, so that this is what is solved. All taps of a kernel are regressed together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import numpy as np
import onnx

from onnxprune.channels import Index
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.plan import Plan
from onnxprune.recovery.replay import Replay
from onnxprune.recovery.sites import Path, Site
from onnxprune.recovery.solver import recovered
from onnxprune.recovery.targets import Targets
from onnxprune.weights import references


def fold(
    groups: Groups,
    plan: Plan,
    model: onnx.ModelProto,
    found: Sequence[Site],
    batches: Iterable[Mapping[str, Array]],
    *,
    seed: int = 0,
    providers: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Sets the weights of those of the sites of `model` that lost inputs; returns how many these are.

    Only the original runs on the batches: no layer knows of the errors that those before it make.
    """
    removed = groups.removed({name: k.indices for name, k in plan.groups.items()})
    lost = {s.node: removed[s.layer.x] for s in found if len(removed.get(s.layer.x, ()))}
    chosen = [replace(s, path=_alone(s)) for s in found if s.node in lost]
    if not chosen:
        return 0
    replay = Replay(groups.net.source, batches, providers)
    targets = Targets.of(groups.net, chosen, replay.batches, seed, providers)
    producer = {o: i for i, n in enumerate(groups.net.source.graph.node) for o in n.output}
    scratch = groups.net.scratch if references(model) else None
    left = {producer[s.out]: s for s in chosen}
    while left:
        replay.advance(left)
        ready = [i for i, s in left.items() if s.x in replay.available]
        if not ready:
            break
        for i in ready:
            site = left.pop(i)
            site.write(model, *recovered(site, _seen(replay, site, lost[site.node]), targets, "lsq"), scratch)
            targets.drop(site)
            if progress:
                progress(len(chosen) - len(left), len(chosen))
    return len(chosen) - len(left)


def _alone(site: Site) -> Path:
    """The layer's own output: nothing behind it is made up for."""
    return Path(site.out, np.ones(site.linear.outs), np.zeros(site.linear.outs))


def _seen(replay: Replay, site: Site, lost: Index) -> Replay:
    """What the layer would read of kept channels if nothing had been cut before it, as the solver takes it."""
    x = site.layer.x
    batches = [{x.tensor: np.delete(np.asarray(batch[x.tensor]), lost, x.axis)} for batch in replay.batches]
    return cast(Replay, SimpleNamespace(batches=batches, available={x.tensor}))
