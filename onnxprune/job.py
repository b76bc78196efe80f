"""What is left to do once the channels are scored: decide, cut, recover, validate, certify, and tell of it."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

import onnxprune
from onnxprune import certify as certifying
from onnxprune import finetuning, wire
from onnxprune.budget import Budget
from onnxprune.clock import Clock
from onnxprune.criteria import Sensitivity
from onnxprune.decide import Decision, decide, size_of
from onnxprune.errors import DataError
from onnxprune.finish import Finisher
from onnxprune.imported import Imported
from onnxprune.options import Options
from onnxprune.pairs import oracle_pair
from onnxprune.passes.validate import Validation, validate
from onnxprune.report import build
from onnxprune.result import Result
from onnxprune.saliency import Saliency
from onnxprune.search import Search
from onnxprune.splits import Split
from onnxprune.targets import widths as allowed
from onnxprune.trials import Latency

if TYPE_CHECKING:
    from onnxprune.training.trainer import Epoch

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""

STAGES = ("import", "measure", "calibrate", "sample", "finetune", "surgery", "validate", "certify")
WORDS = 512  # bytes by which a certificate may grow when weights are trained
ATTEMPTS = 3  # to meet a budget of latency, each with several trials


@dataclass(frozen=True, eq=False)
class Job:
    """What is left to do once the channels are scored: decide, cut, validate, certify.

    candidates: among how many networks the caller will choose by what held-out samples say of them.
    """

    imported: Imported
    saliencies: list[Saliency]
    settings: Options
    budget: Budget
    split: Split
    held: certifying.Held | str
    providers: list[str]
    clock: Clock
    tell: Progress
    measured: bool
    candidates: int = 1
    said: Callable[[Epoch], None] | None = None
    latency: Latency | None = None

    def results(self, budgets: Sequence[Budget]) -> Iterator[Result]:
        """One result after the other. The seconds before the first decision, which all share, count in each."""
        for i, budget in enumerate(budgets):
            self.tell("sweep", i, len(budgets))
            yield replace(self, budget=budget, clock=self.clock.copy()).result()
        self.tell("sweep", len(budgets), len(budgets))

    def result(self) -> Result:
        """Decides, cuts, validates, certifies, and tells of it."""
        imported = self.imported
        decision, pruned, found, told = self.done()
        report = _report(imported, self.settings, self.budget, decision, pruned, found, self.clock)
        report["certificate"] = told
        report["latency"] = None if self.latency is None else self.latency.to_json(decision.plan)
        report["validation"]["source"] = self.split.origin.source
        report["calibration"]["set_aside"] = self.split.count
        return Result(pruned, decision.plan, report, told, imported.external, imported.sources, imported.scratches)

    def done(self) -> tuple[Decision, onnx.ModelProto, Validation, dict[str, Any] | None]:
        """Decides within the budget and does it."""
        if self.budget.kind != "max-drop":
            return self.within_budget()
        if isinstance(self.held, str):
            raise DataError(f"--max-drop needs held-out samples: {self.held}", hint="--certify DATA gives them")
        with self.clock.stage("sample"):
            search = Search(
                self.imported,
                self.saliencies,
                self.settings,
                self.finish,
                self.held,
                self.providers,
                self.budget.value,
                lambda done, total: self.tell("search", done, total),
            )
            decision, drop = search.smallest()
        return decision, *self._made(decision, drop)

    @cached_property
    def finish(self) -> Finisher:
        return Finisher(self.imported, self.settings, self.split, self.providers, self.tell)

    def within_budget(self) -> tuple[Decision, onnx.ModelProto, Validation, dict[str, Any] | None]:
        """What recovery and the certificate add to the file comes off the budget; training, the longest part, is done once."""
        train = self.settings.finetune is not None
        spare = WORDS if train and self.budget.kind == "bytes" else 0
        if not train or self.budget.kind in ("bytes", "params", "latency"):
            made, spare = self._fitting(spare)
            if not train:
                return made
            self.imported.groups.net.scratch.drop(made[1])
        decision = self._decided(spare)
        with self.clock.stage("finetune"):
            tuned = finetuning.tuned(self.imported, decision.finished, self.settings, self.split, self.tell, self.said)
        decision = replace(decision, finished=tuned)
        return decision, *self._made(decision)

    def _decided(self, spare: int) -> Decision:
        with self.clock.stage("sample"):
            return decide(self.imported, self.saliencies, self.settings, self.budget, self.finish, spare, self.latency)

    def _fitting(self, spare: int) -> tuple[tuple[Decision, onnx.ModelProto, Validation, dict[str, Any] | None], int]:
        """A network that keeps to the budget as a whole file, and how much had to be spared for that."""
        for attempt in range(ATTEMPTS if self.latency is not None else sys.maxsize):
            decision = self._decided(spare)
            pruned, found, told = self._made(decision)
            excess = self._excess(decision, pruned, attempt)
            if excess <= 0:
                break
            self.imported.groups.net.scratch.drop(pruned)
            spare += math.ceil(excess)
        return (decision, pruned, found, told), spare

    def _excess(self, decision: Decision, pruned: onnx.ModelProto, attempt: int) -> float:
        """By how much the model is beyond a budget that only the finished model tells."""
        if self.budget.kind == "bytes":
            return wire.size(pruned) - self.budget.value * self.imported.size.bytes
        if self.budget.kind == "params":
            return self.imported.count_parameters(pruned) - self.budget.value * self.imported.size.params
        if self.latency is not None and not self.latency.confirm(decision.plan, pruned):
            return float(attempt + 1 < ATTEMPTS)
        return 0.0

    def _made(
        self, decision: Decision, drop: Mapping[str, Any] | None = None
    ) -> tuple[onnx.ModelProto, Validation, dict[str, Any] | None]:
        imported, split = self.imported, self.split
        with self.clock.stage("surgery"):
            pruned, cut = decision.finished.model, decision.finished.cut
            exact, masked = oracle_pair(imported, decision.plan)
            if exact is None and cut is not pruned:
                exact = cut  # what recovery has made computes something better
        with self.clock.stage("validate"):
            found = validate(
                imported.model,
                pruned,
                masked,
                split.oracle_feeds(imported),
                split.validation,
                split.validation_indices,
                providers=self.providers,
                progress=lambda done, total: self.tell("validate", done, total),
                exact=exact,
                recovered=cut is not pruned,
            )
        with self.clock.stage("certify"):
            models = (pruned, masked)
            told = certifying.certificate(
                imported,
                split,
                self.held,
                decision.saliency,
                decision,
                self.settings,
                models,
                found,
                self.providers,
                self.measured,
                drop,
                self.candidates,
            )
        imported.groups.net.scratch.drop(*[m for m in (exact, masked, cut) if m is not None], keep=(pruned,))
        return certifying.attach(pruned, told), found, told


def _report(
    imported: Imported,
    settings: Options,
    budget: Budget,
    decision: Decision,
    pruned: onnx.ModelProto,
    found: Validation,
    clock: Clock,
) -> dict[str, Any]:
    accounting, plan, saliency = imported.accounting, decision.plan, decision.saliency
    after = size_of(imported, plan)
    macs, params = build.prunable_share(imported.groups, accounting)
    provable = saliency.criterion == Sensitivity.name
    return {
        "onnxprune": onnxprune.__version__,
        "model": Path(imported.path).name,
        "seed": settings.seed,
        "method": decision.method,
        "recover": decision.finished.means,
        "recovery": decision.finished.to_json(settings.recover),
        "approximate": settings.allow_approximate,
        "attention": settings.attention,
        "budget": budget.to_json(),
        "options": settings.to_json(),
        "command": None,
        "inputs": {name: list(x.shape) for name, x in imported.groups.net.feeds.items()},
        "target": {"name": settings.target, "align": allowed(settings, imported.groups.net).align},
        "original": {"macs": imported.size.macs, "params": imported.size.params, "bytes": imported.size.bytes},
        "pruned": {"macs": after.macs, "params": imported.count_parameters(pruned), "bytes": wire.size(pruned)},
        "digests": {"original": imported.groups.net.digest, "pruned": wire.digest(certifying.without(pruned))},
        "prunable": {"macs": macs, "params": params},
        "calibration": build.calibration(saliency),
        "groups": build.group_entries(imported.groups, plan, saliency),
        "layers": build.layer_entries(imported.groups, accounting, plan, decision.shares if provable else {}),
        "certificate": None,
        "finetune": None if decision.finished.tuned is None else decision.finished.tuned.to_json(),
        "validation": found.to_json(),
        "seconds": {k: clock.seconds.get(k, 0.0) for k in STAGES},
    }
