"""Sizes that a graph computes: random cuts show which of them a cut would get wrong."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxprune.channels import Components, Dim, Frozen
from onnxprune.entries import evaluate, sizes
from onnxprune.graph import Array, Network
from onnxprune.rules import MustEqual

TRIALS = 8
REMEDY = "export with fixed sizes, or fold the shape arithmetic"


def freeze_broken_sizes(net: Network, musts: Sequence[MustEqual], components: Components) -> None:
    """Freezes what shape arithmetic would get wrong, by trying random cuts until nothing more is found wrong.

    musts: which axis has to have which computed size. Every other trial gives the channels random widths instead of keeping
    or dropping them, under which two sums of sizes that may differ do differ, however few the channels are.
    """
    rng = np.random.default_rng(0)
    changed = bool(musts)
    while changed:
        changed = False
        for trial in range(TRIALS):
            widths = rng.integers(0, 1000 if trial % 2 else 2, components.count)
            widths[list(components.reasons)] = 1
            changed |= _freeze_wrong(net, musts, components, widths)


def _freeze_wrong(net: Network, musts: Sequence[MustEqual], components: Components, widths: Array) -> bool:
    """Freezes the axes whose sizes come out wrong where component i is widths[i] wide; whether there were any."""
    before = np.concatenate([[0], np.cumsum(widths[components.labels])])  # every position

    def size(dim: Dim) -> int:
        if dim not in components.offset:
            return net.shapes[dim.tensor][dim.axis]
        start = components.offset[dim]
        return int(before[start + components.sizes[dim]] - before[start])

    changed = False
    for must in musts:
        if evaluate(must.entry, size) != size(must.dim):
            for dim in (must.dim, *sizes(must.entry)):
                if dim in components.offset:
                    why = f"the size of {must.dim} is computed in a way that a cut would break"
                    changed |= components.freeze(dim, Frozen(why, REMEDY))
    return changed
