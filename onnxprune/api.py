"""The main job for programs: `prune` decides and applies; the passes it calls are pure functions of their inputs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx

import onnxprune
from onnxprune import certify as certifying
from onnxprune import finetuning, runtime, wire
from onnxprune.budget import Budget
from onnxprune.clock import Clock
from onnxprune.criteria import Sensitivity
from onnxprune.data import open_data
from onnxprune.decide import Decision, decide, size_of
from onnxprune.errors import BudgetError, DataError
from onnxprune.finish import Finisher
from onnxprune.imported import Imported, require_prunable
from onnxprune.options import Options
from onnxprune.pairs import applied, apply, load_as, oracle_pair, verify
from onnxprune.passes.allocate import require_reachable
from onnxprune.passes.validate import Validation, validate
from onnxprune.report import build
from onnxprune.result import Result, certificate_path, outputs, report_path
from onnxprune.saliency import Saliency
from onnxprune.scoring import calibrated, calibrations, check_calibration, criterion_for
from onnxprune.search import Search
from onnxprune.selection import Widths
from onnxprune.splits import Split

if TYPE_CHECKING:
    from onnxprune.training.trainer import Epoch

__all__ = [
    "Progress",
    "Result",
    "applied",
    "apply",
    "calibrate",
    "certificate_path",
    "criterion_for",
    "outputs",
    "prune",
    "report_path",
    "verify",
]

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""

STAGES = ("import", "calibrate", "sample", "finetune", "surgery", "validate", "certify")


def prune(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: Any = None,
    *,
    budget: Budget | Mapping[str, float],
    calibration: Saliency | None = None,
    validation: Any = None,
    certify: Any = None,
    progress: Progress | None = None,
    said: Callable[[Epoch], None] | None = None,
    **options: Any,
) -> Result:
    """Prunes a model to a budget and re-validates it.

    model: a path or a ModelProto, which is not changed. data: whatever `open_data` takes; optional for the criteria that
    look at weights only and when `calibration` is given. budget: `Budget` or e.g. {"macs": 0.5}. validation: other data to
    compare outputs on; by default samples that were not used to calibrate. certify: samples that are used for nothing but the
    certificate, by default those that outputs are compared on. said: told of every epoch of fine-tuning. options: the fields
    of `Options`.
    Raises OnnxPruneError's children; ValidationError means that the result was not fit to be used.
    """
    settings = Options(**options)
    budget = budget if isinstance(budget, Budget) else _budget(budget)
    if budget.kind == "eps":
        _require_provable(settings)
    if settings.finetune is not None:
        finetuning.require_trainable(budget, data)
    clock, tell = Clock(), progress or (lambda stage, done, total: None)
    with clock.stage("import"):
        providers = runtime.providers(settings.providers)
        imported, split = _import(model, data, validation, settings, prunable=True)
        if settings.finetune is not None:
            finetuning.trainer().require(imported.model)
        widths = Widths(settings.min_channels, settings.align)
        require_reachable(imported.accounting, imported.groups.prunable, widths, budget)
    with clock.stage("calibrate"):
        if calibration is not None:
            check_calibration(calibration, imported)
        saliencies = calibrations(imported, settings, budget, providers, split, tell, calibration)
    other = None if certify is None else open_data(certify, imported.specs, settings.images)
    held = certifying.held_out(imported, split, other, saliencies[0], settings, calibration is None)
    job = _Job(imported, saliencies, settings, budget, split, held, providers, clock, tell, calibration is None, said)
    decision, pruned, found, told = job.done()
    report = _report(imported, settings, budget, decision, pruned, found, clock)
    report["certificate"] = told
    return Result(pruned, decision.plan, report, told, imported.external, imported.sources, imported.scratches)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is left to do once the channels are scored: decide, cut, validate, certify."""

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
    said: Callable[[Epoch], None] | None = None

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
        tell = self.tell  # not the job itself, which would be a cycle that holds temporary files
        return Finisher(
            self.imported, self.settings, self.split, self.providers, lambda done, total: tell("recover", done, total)
        )

    def within_budget(self) -> tuple[Decision, onnx.ModelProto, Validation, dict[str, Any] | None]:
        """The certificate is part of the file: what it takes comes off a budget of bytes."""
        spare = 0
        while True:
            with self.clock.stage("sample"):
                decision = decide(self.imported, self.saliencies, self.settings, self.budget, self.finish, spare)
            if self.settings.finetune is not None:
                with self.clock.stage("finetune"):
                    tuned = finetuning.tuned(self.imported, decision.finished, self.settings, self.split, self.tell, self.said)
                decision = replace(decision, finished=tuned)
            pruned, found, told = self._made(decision)
            excess = 0.0
            if self.budget.kind == "bytes":
                excess = wire.size(pruned) - self.budget.value * self.imported.size.bytes
            if excess <= 0:
                return decision, pruned, found, told
            self.imported.groups.net.scratch.drop(pruned)
            spare += math.ceil(excess)

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
            )
        imported.groups.net.scratch.drop(*[m for m in (exact, masked, cut) if m is not None], keep=(pruned,))
        return certifying.attach(pruned, told), found, told


def calibrate(
    model: str | os.PathLike[str] | onnx.ModelProto, data: Any, *, progress: Progress | None = None, **options: Any
) -> Saliency:
    """The calibration alone; pass it to `prune(calibration=...)`, or save, load and merge it."""
    settings = Options(**options)
    imported, split = _import(model, data, None, settings, prunable=True)
    tell = progress or (lambda stage, done, total: None)
    return calibrated(imported, settings, runtime.providers(settings.providers), split, tell)


def _import(
    model: str | os.PathLike[str] | onnx.ModelProto, data: Any, validation: Any, settings: Options, *, prunable: bool = False
) -> tuple[Imported, Split]:
    imported = load_as(model, data, settings)
    if prunable:
        require_prunable(imported.groups)
    samples = None if data is None else open_data(data, imported.specs, settings.images)
    held_out = None if validation is None else open_data(validation, imported.specs, settings.images)
    return imported, Split.of(imported, samples, held_out, settings)


def _require_provable(settings: Options) -> None:
    """Raises BudgetError where a bound on the sampling error is asked of what has none."""
    if settings.method != "auto" and not settings.method.startswith("pfp"):
        raise BudgetError(
            f"--eps bounds a sampling error, and --method {settings.method} has none",
            hint="leave --method out, or ask for --macs, --params or --bytes",
        )
    if settings.recover not in ("auto", "none"):
        raise BudgetError(
            f"--eps bounds the error of sampled weights, which --recover {settings.recover} would replace",
            hint="leave --recover out, or ask for --macs, --params or --bytes",
        )


def _budget(mapping: Mapping[str, float]) -> Budget:
    if len(mapping) != 1:
        raise BudgetError("a budget names exactly one quantity", hint='for example {"macs": 0.5}')
    kind, value = next(iter(mapping.items()))
    return Budget(kind, value)  # type: ignore[arg-type]  # checked by Budget itself


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
        "original": {"macs": imported.size.macs, "params": imported.size.params, "bytes": imported.size.bytes},
        "pruned": {"macs": after.macs, "params": after.params, "bytes": wire.size(pruned)},
        "digests": {"original": imported.groups.net.digest, "pruned": wire.digest(certifying.without(pruned))},
        "prunable": {"macs": macs, "params": params},
        "calibration": build.calibration(saliency),
        "groups": build.group_entries(imported.groups, plan),
        "layers": build.layer_entries(imported.groups, accounting, plan, decision.shares if provable else {}),
        "certificate": None,
        "finetune": None if decision.finished.tuned is None else decision.finished.tuned.to_json(),
        "validation": found.to_json(),
        "seconds": {k: clock.seconds.get(k, 0.0) for k in STAGES},
    }
