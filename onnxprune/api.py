"""The main job for programs: `prune` decides and applies; the passes it calls are pure functions of their inputs."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

import onnxprune
from onnxprune import certify as certifying
from onnxprune import files, large, runtime, weights, wire
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
from onnxprune.plan import Plan
from onnxprune.report import build
from onnxprune.saliency import Saliency
from onnxprune.scoring import calibrated, calibrations, check_calibration, criterion_for
from onnxprune.search import Search
from onnxprune.splits import Split
from onnxprune.targets import widths as allowed
from onnxprune.trials import Latency, Machine

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

STAGES = ("import", "measure", "calibrate", "sample", "surgery", "validate", "certify")
ATTEMPTS = 3  # to meet a budget of latency, each with several trials

Progress = Callable[[str, int, int], None]
"""progress(stage, done, total)."""


@dataclass(frozen=True, eq=False)
class Result:
    """What a pruning yields. `report` and `certificate` are JSON-ready.

    stored: the pruned model, of which large tensors may be references into the files of the original and temporary ones,
    which last as long as this. `save` writes it whole, and `model` is it as a ModelProto.
    """

    stored: onnx.ModelProto
    plan: Plan
    report: dict[str, Any]
    certificate: dict[str, Any] | None
    external_data: bool = False
    sources: tuple[Path, ...] = ()
    scratches: tuple[weights.Scratch, ...] = ()

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The pruned model, with its weights unless they are more than 1 GiB.

        Those of a larger one are external data with absolute paths, for as long as this result lives: `prune` and `load`
        take such a model, but `onnx.save` would write no more than the references.
        """
        return large.whole(self.stored)

    def save(self, path: str | os.PathLike[str], report: str | os.PathLike[str] | None = None, *, force: bool = False) -> None:
        """Writes the model, beside it the certificate and, there or at `report`, the report; each whole or not at all.

        Raises OutputError when that fails, also when it would replace a file that the original model is in.
        """
        where = Path(report) if report is not None else report_path(path)
        targets = outputs(Path(path), where, external=self.external_data)
        files.apart(targets, self.sources)
        files.writable(*targets, force=force)
        files.save(self.stored, path, external=self.external_data)
        for target, told in ((where, self.report), (certificate_path(path), self.certificate)):
            if told is not None:
                with files.whole_file(target) as temporary:
                    temporary.write_text(json.dumps(told, indent=1) + "\n")


def report_path(out: str | os.PathLike[str]) -> Path:
    """Where the report of OUT goes unless told otherwise: OUT.report.json."""
    return Path(out).with_name(Path(out).name + ".report.json")


def certificate_path(out: str | os.PathLike[str]) -> Path:
    """Where the certificate of OUT goes: OUT.certificate.json."""
    return Path(out).with_name(Path(out).name + ".certificate.json")


def outputs(out: Path, report: Path, *, external: bool) -> list[Path]:
    """Every file that `Result.save` writes."""
    return [out, report, certificate_path(out), *([files.data_file(out)] if external else [])]


def prune(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: Any = None,
    *,
    budget: Budget | Mapping[str, float],
    calibration: Saliency | None = None,
    validation: Any = None,
    certify: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Prunes a model to a budget and re-validates it.

    model: a path or a ModelProto, which is not changed. data: whatever `open_data` takes; optional for the criteria that
    look at weights only and when `calibration` is given. budget: `Budget` or e.g. {"macs": 0.5}. validation: other data to
    compare outputs on; by default samples that were not used to calibrate. certify: samples that are used for nothing but the
    certificate, by default those that outputs are compared on. options: the fields of `Options`.
    Raises OnnxPruneError's children; ValidationError means that the result was not fit to be used.
    """
    settings = Options(**options)
    budget = budget if isinstance(budget, Budget) else _budget(budget)
    if budget.kind == "eps":
        _require_provable(settings)
    clock, tell = Clock(), progress or (lambda stage, done, total: None)
    with clock.stage("import"):
        providers = runtime.providers(settings.providers)
        imported, split = _import(model, data, validation, settings, prunable=True)
        widths = allowed(settings, imported.groups.net)
        require_reachable(imported.accounting, imported.groups.prunable, widths, budget)
    latency = None
    if budget.kind == "latency":
        with clock.stage("measure"):
            latency = Latency(imported, settings, budget.value, Machine.of(imported, settings), tell)
    with clock.stage("calibrate"):
        if calibration is not None:
            check_calibration(calibration, imported)
        saliencies = calibrations(imported, settings, budget, providers, split, tell, calibration)
    other = None if certify is None else open_data(certify, imported.specs, settings.images)
    held = certifying.held_out(imported, split, other, saliencies[0], settings, calibration is None)
    job = _Job(imported, saliencies, settings, budget, split, held, providers, clock, tell, calibration is None, latency)
    decision, pruned, found, told = job.done()
    report = _report(imported, settings, budget, decision, pruned, found, clock)
    report["certificate"], report["latency"] = told, None if latency is None else latency.to_json(decision.plan)
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
    latency: Latency | None = None

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
        """What recovery and the certificate add to the file comes off the budget."""
        spare, imported = 0, self.imported
        for attempt in range(ATTEMPTS if self.latency is not None else sys.maxsize):
            with self.clock.stage("sample"):
                decision = decide(imported, self.saliencies, self.settings, self.budget, self.finish, spare, self.latency)
            pruned, found, told = self._made(decision)
            excess = 0.0
            if self.budget.kind == "bytes":
                excess = wire.size(pruned) - self.budget.value * imported.size.bytes
            elif self.budget.kind == "params":
                excess = imported.count_parameters(pruned) - self.budget.value * imported.size.params
            elif self.latency is not None and not self.latency.confirm(decision.plan, pruned):
                excess = attempt + 1 < ATTEMPTS
            if excess <= 0:
                break
            imported.groups.net.scratch.drop(pruned)
            spare += math.ceil(excess)
        return decision, pruned, found, told

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
        "recover": decision.finished.how,
        "recovery": decision.finished.to_json(settings.recover),
        "approximate": settings.allow_approximate,
        "attention": settings.attention,
        "budget": budget.to_json(),
        "target": {"name": settings.target, "align": allowed(settings, imported.groups.net).align},
        "original": {"macs": imported.size.macs, "params": imported.size.params, "bytes": imported.size.bytes},
        "pruned": {"macs": after.macs, "params": imported.count_parameters(pruned), "bytes": wire.size(pruned)},
        "digests": {"original": imported.groups.net.digest, "pruned": wire.digest(certifying.without(pruned))},
        "prunable": {"macs": macs, "params": params},
        "calibration": build.calibration(saliency),
        "groups": build.group_entries(imported.groups, plan),
        "layers": build.layer_entries(imported.groups, accounting, plan, decision.shares if provable else {}),
        "certificate": None,
        "validation": found.to_json(),
        "seconds": {k: clock.seconds.get(k, 0.0) for k in STAGES},
    }
