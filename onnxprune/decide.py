"""The decision: which channels stay, by which method, within which budget. What comes before it only measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnxprune import wire
from onnxprune.budget import Budget
from onnxprune.channels import Index
from onnxprune.criteria import Sensitivity
from onnxprune.data import Samples
from onnxprune.errors import OptionError
from onnxprune.groups import Size
from onnxprune.imported import Imported
from onnxprune.options import Options
from onnxprune.passes.allocate import allocate
from onnxprune.passes.sample import sample
from onnxprune.passes.surgery import reweightable, surgery
from onnxprune.passes.validate import compare
from onnxprune.plan import Plan
from onnxprune.saliency import Saliency
from onnxprune.selection import Method, Selector, Share, Widths
from onnxprune.splits import Split


@dataclass(frozen=True, eq=False)
class Decision:
    """What stays, by which method, and what the theory says of it."""

    method: str
    plan: Plan
    shares: Mapping[str, Share]


def decide(
    imported: Imported,
    saliency: Saliency,
    settings: Options,
    budget: Budget,
    split: Split,
    providers: list[str],
    spare: int = 0,
) -> Decision:
    """The plan of the method asked for; `auto` tries what the calibration allows and keeps what moves outputs least.

    spare: bytes of the budget to leave unused.
    """
    provable = saliency.criterion == Sensitivity.name
    asked = settings.method
    if (asked != "auto" and provable != asked.startswith("pfp")) or (not provable and asked != saliency.criterion):
        fitting = "auto or pfp" if provable else saliency.criterion
        raise OptionError(f"--method {asked} does not fit a calibration by '{saliency.criterion}'", hint=f"give {fitting}")
    names = ["pfp", "pfp-deterministic"] if asked == "auto" else [asked]
    decisions = [_by(name, imported, saliency, settings, budget, spare) for name in names]
    if budget.kind == "eps":  # both keep the promise: the smaller network is what was asked for
        return min(decisions, key=lambda d: size_of(imported, d.plan).macs)
    if len(decisions) == 1 or split.calibration is None:
        return decisions[0]
    errors = [_error(imported, d, split.calibration, split.choice_indices, providers) for d in decisions]
    return min(zip(errors, decisions, strict=True), key=lambda pair: float("inf") if pair[0] is None else pair[0])[1]


def _error(imported: Imported, decision: Decision, samples: Samples, indices: Index, providers: list[str]) -> float | None:
    cut = surgery(imported.groups, decision.plan)
    error = compare(imported.model, cut, samples, indices, providers).relative_l2
    imported.groups.net.scratch.drop(cut)
    return error


def size_of(imported: Imported, plan: Plan) -> Size:
    """What a plan leaves of the model."""
    accounting = imported.accounting
    return accounting.size(accounting.widths({g: k.indices for g, k in plan.groups.items()}))


def _by(name: str, imported: Imported, saliency: Saliency, settings: Options, budget: Budget, spare: int) -> Decision:
    groups = imported.groups
    method: Method = name if name.startswith("pfp") else "top"  # type: ignore[assignment]  # one of the three
    selector = Selector(
        groups.prunable,
        saliency,
        method,
        widths=Widths(settings.min_channels, settings.align),
        delta=settings.delta,
        seed=settings.seed,
        rescalable={g.id: reweightable(groups, g) for g in groups.prunable},
    )
    while True:
        allocation = allocate(imported.accounting, groups.prunable, selector, budget, spare)
        searched = budget.kind != "eps"
        decision = Decision(name, *sample(groups.prunable, allocation.choices, selector, groups.net.digest, searched))
        if budget.kind != "bytes":
            return decision
        # A file has more in it than weights: what the cut itself adds (say, a constant of its own) comes off the budget.
        cut = surgery(groups, decision.plan)
        excess = wire.size(cut) - budget.value * imported.size.bytes
        groups.net.scratch.drop(cut)
        if excess <= 0:
            return decision
        spare += math.ceil(excess)
