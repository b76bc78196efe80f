"""`--max-drop`: the smallest network whose drop is certified, by tests in a fixed order on samples used for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from onnxprune import confidence
from onnxprune.budget import Budget
from onnxprune.certificate.population import GRID, Observed
from onnxprune.certificate.words import rounded_up
from onnxprune.certify import Held
from onnxprune.decide import Decision, decide, size_of
from onnxprune.errors import BudgetError, DataError
from onnxprune.finish import Finisher
from onnxprune.imported import Imported
from onnxprune.options import Options
from onnxprune.passes.allocate import require_reachable
from onnxprune.passes.validate import compare
from onnxprune.plan import Plan
from onnxprune.saliency import Saliency
from onnxprune.targets import widths as allowed


@dataclass(frozen=True, eq=False)
class Search:
    """Everything that a search goes by. value: the largest drop, of accuracy with labels, of agreement without.

    tell: is called with the number of every test and that of all that there could be.
    """

    imported: Imported
    saliencies: Sequence[Saliency]
    settings: Options
    finish: Finisher
    held: Held
    providers: list[str]
    value: float
    tell: Callable[[int, int], None]

    def smallest(self) -> tuple[Decision, dict[str, Any]]:
        """The last network of the grid, from large to small, before the first that fails; what the certificate says of it.

        The whole network where not even the largest passes. Each test has the full level: see `confidence.fixed_sequence`.
        Raises DataError when there are too few samples, BudgetError when the network gives no class scores.
        """
        self._require_enough()
        limits: dict[float, float] = {}

        def passes(item: tuple[float, Decision]) -> bool:
            fraction, decision = item
            self.tell(len(limits) + 1, len(GRID))
            limits[fraction] = self._limit(decision)
            return limits[fraction] <= self.value

        candidates: Iterator[tuple[float, Decision]] = self._candidates()
        found = confidence.fixed_sequence(candidates, passes)
        last = found[0]
        if last is None:
            plan = Plan({}, self.imported.groups.net.digest)
            whole = Decision(self.settings.method, plan, {}, self.saliencies[0], self.finish(plan))
            return whole, self._told(whole, 0.0)
        return last[1], self._told(last[1], limits[last[0]])

    def _candidates(self) -> Iterator[tuple[float, Decision]]:
        """One network after the other, each made without a look at the samples that it is tested on."""
        widths = allowed(self.settings, self.imported.groups.net)
        for fraction in GRID:
            budget = Budget("macs", fraction)
            try:
                require_reachable(self.imported.accounting, self.imported.groups.prunable, widths, budget)
            except BudgetError:
                return
            yield fraction, decide(self.imported, self.saliencies, self.settings, budget, self.finish)

    def _require_enough(self) -> None:
        labels = self.held.samples.labels is not None
        needed = confidence.enough(self.value, self._delta / 2 if labels else self._delta)
        if len(self.held.indices) < needed:
            raise DataError(
                f"--max-drop {self.value:g} with confidence {self.settings.confidence:g} takes {needed} held-out samples at "
                f"least, and there are {len(self.held.indices)}",
                hint="give more data, or --certify DATA; or ask for less",
            )

    @property
    def _delta(self) -> float:
        return 1 - self.settings.confidence

    def _limit(self, decision: Decision) -> float:
        model, held = decision.finished.model, self.held
        return _bound(compare(self.imported.model, model, held.samples, held.indices, self.providers).observed, self._delta)

    def _told(self, decision: Decision, limit: float) -> dict[str, Any]:
        full, left = self.imported.size.macs, size_of(self.imported, decision.plan).macs
        return {
            "statement": f"the drop is at most {self.value:.9g}: the last network that passed in a fixed order of tests",
            "value": self.value,
            "delta": self._delta,
            "limit": rounded_up(limit),
            "macs": min((f for f in (1.0, *GRID) if left <= f * full), default=1.0),
        }


def _bound(seen: Observed, delta: float) -> float:
    """What the drop is at most, with confidence 1 - delta."""
    if seen.lost is not None and seen.gained is not None:
        return confidence.drop(seen.lost, seen.gained, seen.samples, delta)
    if seen.changed is None:
        raise BudgetError("--max-drop needs class scores, and no output is a vector of them", hint="ask for --macs")
    return confidence.upper(seen.changed, seen.samples, delta)
