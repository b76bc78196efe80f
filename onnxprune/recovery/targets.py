"""What the original makes at some rows of every layer: the targets of recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from onnxprune import runtime
from onnxprune.channels import Index
from onnxprune.graph import Array, Network
from onnxprune.recovery.replay import Shelf
from onnxprune.recovery.sites import Site
from onnxprune.threads import Workers

ROWS = 64  # output positions for each sample at most: neighbours say much the same
FEWEST = 8
ENOUGH = 16384  # rows in all for layers with few weights
FOR_EACH = 64  # rows for each weight of an output that suffice


@dataclass(eq=False)
class Target:
    """Of one layer and batch: which rows, the shape that they are counted in, its path's `sum` there and its own output.

    sum, made: [rows, channels that stay]. made: only where the path adds something to it that may not be known in time.
    """

    picks: Index
    shape: tuple[int, ...]
    sum: Array
    made: Array | None = None


@dataclass(eq=False)
class Targets:
    """The targets of every layer, batch by batch, in memory or in temporary files."""

    by_node: dict[int, list[Target]] = field(default_factory=dict)
    _shelf: Shelf = field(default_factory=Shelf)

    @staticmethod
    def of(
        net: Network,
        found: Sequence[Site],
        batches: Sequence[Mapping[str, Array]],
        seed: int,
        providers: Sequence[str] | None = None,
    ) -> Targets:
        """Runs the original once over all batches."""
        targets = Targets({s.node: [] for s in found})
        names = list(dict.fromkeys(n for s in found for n in _read(s)))
        session = runtime.session(runtime.with_outputs(net.source, names), providers=providers, spin=False)
        rng = np.random.default_rng(seed)
        total = sum(_samples(batch) for batch in batches)
        workers = Workers(runtime.default_threads())
        for batch in batches:
            values = dict(zip(names, runtime.run(session, {k: np.asarray(v) for k, v in batch.items()}, names), strict=True))
            wanted = [_Wanted(s, s.rows(values[s.path.sum].shape), _samples(batch) * rows_for(s, total), rng) for s in found]
            for w, rows in zip(wanted, workers.map(partial(_Wanted.rows, values=values), wanted), strict=True):
                target = Target(w.picks, w.shape, *(targets._shelf.put(r) for r in rows))
                targets.by_node[w.site.node].append(target)
        return targets

    def drop(self, site: Site) -> None:
        """Forgets the targets of a layer."""
        for target in self.by_node.pop(site.node):
            self._shelf.drop(target.sum)
            if target.made is not None:
                self._shelf.drop(target.made)


class _Wanted:
    """Some rows of what the original makes at a site: which of them is drawn at once, they are fetched when asked for."""

    def __init__(self, site: Site, shape: tuple[int, ...], count: int, rng: np.random.Generator) -> None:
        self.site, self.shape = site, shape
        self.picks = spread(int(np.prod(shape)), count, rng)

    def rows(self, values: Mapping[str, Array]) -> list[Array]:
        """[rows, channels that stay] of each tensor that is asked for. They lie far apart in memory, which threads wait for."""
        return [self.site.linear.outputs(values[name], self.picks)[:, self.site.kept] for name in _read(self.site)]


def _read(site: Site) -> list[str]:
    """The tensors that say what a layer should make; nothing within a path is asked for, so that it may be run as one."""
    return [site.path.sum] if site.path.rest is None else [site.path.sum, site.out]


def rows_for(site: Site, samples: int) -> int:
    """Output positions to look at for each sample: the fewer weights an output has, the fewer say all."""
    weights = int(np.prod(site.linear.shape)) // max(1, site.linear.outs)
    return int(np.clip(-(-max(ENOUGH, FOR_EACH * weights) // max(1, samples)), FEWEST, ROWS))


def _samples(batch: Mapping[str, Array]) -> int:
    return max(v.shape[0] if v.ndim else 1 for v in batch.values())


def spread(total: int, wanted: int, rng: np.random.Generator) -> Index:
    """Row numbers, at most `wanted`: one at random from each of as many equal stretches."""
    if wanted >= total:
        return np.arange(total)
    return np.asarray(((np.arange(wanted) + rng.random(wanted)) * (total / wanted)).astype(np.int64))
