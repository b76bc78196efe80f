"""Pass `recover`: gives the layers of a pruned model new weights, without training and without labels.

Layer after layer, each by what it reads in the *pruned* model, as far as that has been recovered, and what it made in the
*original*. Where the output is added to another tensor (a residual stream), it makes up for the error of that as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx

from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.plan import Plan
from onnxprune.recovery.folding import fold
from onnxprune.recovery.replay import Replay
from onnxprune.recovery.sites import Site, sites
from onnxprune.recovery.solver import How, recovered
from onnxprune.recovery.targets import Targets
from onnxprune.weights import references


@dataclass(frozen=True, eq=False)
class Recovery:
    """The recovered model, how many layers have new weights, and for each that has not the reason."""

    model: onnx.ModelProto
    layers: int
    left: Mapping[str, str]


def recover(
    groups: Groups,
    plan: Plan,
    pruned: onnx.ModelProto,
    batches: Iterable[Mapping[str, Array]],
    *,
    how: How | Literal["linear"] = "lsq",
    seed: int = 0,
    providers: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Recovery:
    """A copy of `pruned` (what surgery made of the groups' network by `plan`) whose layers reproduce the original's.

    batches: inputs, as many as there are to learn from; both models run on them once, piece by piece. how: "lsq" solves for
    all weights and biases by ridge least squares on the change of the weights, the ridge chosen on rows that are held out;
    "bias" shifts the means, "rescale" also multiplies every filter by what fits best, "bn" by what restores its variance;
    "linear" makes dropped channels up from kept ones by what both are in the original alone (`recovery.folding`).
    Deterministic. Memory: two times `replay.spare_memory()` of activations, then temporary files, and a few times the square
    of the widest layer's inputs * taps in double precision. Raises ModelError when the model does not run on the data.
    """
    model = onnx.ModelProto()
    model.CopyFrom(pruned)
    found, reasons = sites(groups, plan, model)
    left = {site.node: site for site in found}
    if not left:
        return Recovery(model, 0, reasons)
    if how == "linear":
        count = fold(groups, plan, model, found, batches, seed=seed, providers=providers, progress=progress)
        return Recovery(model, count, reasons)
    replay = Replay(model, batches, providers)
    targets = Targets.of(groups.net, found, replay.batches, seed, providers)
    scratch = groups.net.scratch if references(model) else None
    while left:
        replay.advance(left)
        ready = _next(left.values(), replay)
        if not ready:
            reasons |= {s.layer.name: "what it reads is a constant" for s in left.values()}
            break
        for site in ready:
            site.write(model, *recovered(site, replay, targets, how), scratch)
            if site.home is not None and site.home.shared:
                replay.look_again()
            targets.drop(site)
            del left[site.node]
            if progress:
                progress(len(found) - len(left), len(found))
    return Recovery(model, len(found) - len(left), reasons)


def _next(left: Iterable[Site], replay: Replay) -> list[Site]:
    """The layers whose input is there; first those of them whose output meets only what is there too."""
    ready = [s for s in left if s.x in replay.available]
    return [s for s in ready if s.path.rest is None or s.path.rest in replay.available] or ready
