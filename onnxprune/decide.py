"""The decision: which channels stay, by which method, within which budget. What comes before it only measures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from onnxprune import wire
from onnxprune.budget import Budget
from onnxprune.criteria import Sensitivity
from onnxprune.elimination import NAME as OBS
from onnxprune.errors import BudgetError, OptionError
from onnxprune.finish import Finished, Finisher
from onnxprune.groups import Size
from onnxprune.imported import Imported
from onnxprune.options import Options
from onnxprune.passes.allocate import allocate
from onnxprune.passes.sample import sample
from onnxprune.passes.surgery import reweightable, surgery
from onnxprune.plan import Plan
from onnxprune.saliency import Saliency
from onnxprune.selection import Method, Selector, Share
from onnxprune.targets import widths as allowed
from onnxprune.timing.costs import Costs
from onnxprune.trials import Latency


@dataclass(frozen=True, eq=False)
class Decision:
    """What stays, by which method on which scores, what the theory says of it, and the model."""

    method: str
    plan: Plan
    shares: Mapping[str, Share]
    saliency: Saliency
    finished: Finished


def decide(
    imported: Imported,
    saliencies: Sequence[Saliency],
    settings: Options,
    budget: Budget,
    finish: Finisher,
    spare: int = 0,
    latency: Latency | None = None,
) -> Decision:
    """The plan of the method asked for; `auto` tries what the calibrations allow and keeps what moves outputs least.

    saliencies: of the criteria that are candidates. spare: units of the budget to leave unused. latency: the stopwatch for a
    budget of that kind.
    """
    if budget.kind == "eps" and any(s.criterion != Sensitivity.name for s in saliencies):
        raise BudgetError(
            "--eps bounds a sampling error, and only sensitivities tell it",
            hint="leave --method out or choose pfp, with a calibration by it; or ask for --macs, --params or --bytes",
        )
    candidates = [(name, s) for s in saliencies for name in _methods(settings.method, s)]
    plans = [(name, s, *_by(name, imported, s, settings, budget, spare, latency)) for name, s in candidates]
    if budget.kind == "eps":  # all keep the promise while nothing is recovered: the smallest network is what was asked for
        name, saliency, plan, shares = min(plans, key=lambda p: size_of(imported, p[2]).macs)
        return Decision(name, plan, shares, saliency, finish(plan, recovers=False))
    best: Decision | None = None
    for name, saliency, plan, shares in plans:
        decision = Decision(name, plan, shares, saliency, finish(plan, measure=len(plans) > 1))
        better = best is None or decision.finished.error < best.finished.error
        worse = best if better else decision
        best = decision if better else best
        if worse is not None:
            finish.drop(worse.finished)
    assert best is not None
    return replace(best, finished=finish.tuned(best.finished))


def _methods(asked: str, saliency: Saliency) -> list[str]:
    """The methods that a calibration is good for. Raises OptionError where it is not good for the one asked for."""
    provable = saliency.criterion == Sensitivity.name
    if asked == "auto" and (provable or saliency.criterion == OBS):
        return ["pfp", "pfp-deterministic"] if provable else [OBS]
    if provable != asked.startswith("pfp") or (not provable and asked != saliency.criterion):
        fitting = "auto or pfp" if provable else saliency.criterion
        raise OptionError(f"--method {asked} does not fit a calibration by '{saliency.criterion}'", hint=f"give {fitting}")
    return [asked]


def size_of(imported: Imported, plan: Plan) -> Size:
    """What a plan leaves of the model."""
    accounting = imported.accounting
    return accounting.size(accounting.widths({g: k.indices for g, k in plan.groups.items()}))


def _by(
    name: str,
    imported: Imported,
    saliency: Saliency,
    settings: Options,
    budget: Budget,
    spare: int,
    latency: Latency | None,
) -> tuple[Plan, Mapping[str, Share]]:
    groups = imported.groups
    method: Method = "elimination" if name == OBS else "top"
    if name.startswith("pfp"):
        method = name  # type: ignore[assignment]  # one of the three
    selector = Selector(
        groups.prunable,
        saliency,
        method,
        widths=allowed(settings, groups.net) if latency is None else latency.widths,
        delta=settings.delta,
        seed=settings.seed,
        rescalable={g.id: reweightable(groups, g) for g in groups.prunable},
    )

    def within(budget: Budget, costs: Costs | None = None) -> tuple[Plan, Mapping[str, Share]]:
        allocation = allocate(imported.accounting, groups.prunable, selector, budget, spare, costs)
        searched = budget.kind != "eps"
        return sample(groups.prunable, allocation.choices, selector, groups.net.digest, searched)

    if latency is not None:
        return latency.search(name, lambda target: within(Budget("latency", target), latency.costs))
    while True:
        plan, shares = within(budget)
        if budget.kind != "bytes":
            return plan, shares
        # A file has more in it than weights: what the cut itself adds (say, a constant of its own) comes off the budget.
        cut = surgery(groups, plan)
        excess = wire.size(cut) - budget.value * imported.size.bytes
        groups.net.scratch.drop(cut)
        if excess <= 0:
            return plan, shares
        spare += math.ceil(excess)
