"""The main job for programs: `prune` decides and applies; the passes it calls are pure functions of their inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx

from onnxprune import certify as certifying
from onnxprune import finetuning, runtime, tuning
from onnxprune.budget import Budget
from onnxprune.clock import Clock
from onnxprune.data import Samples, choose, open_data
from onnxprune.errors import BudgetError
from onnxprune.imported import Imported, require_prunable
from onnxprune.job import Job, Progress
from onnxprune.options import Options
from onnxprune.pairs import applied, apply, load_as, verify
from onnxprune.passes.allocate import require_reachable
from onnxprune.result import Result, certificate_path, outputs, report_path
from onnxprune.saliency import Saliency
from onnxprune.scoring import calibrated, calibrations, check_calibration, criterion_for
from onnxprune.splits import Split
from onnxprune.targets import widths as allowed
from onnxprune.training.late import trainer
from onnxprune.trials import Latency, Machine

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
    "sweep",
    "verify",
]


SIZES = ("macs", "params", "bytes")  # budgets that a sweep takes


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
    budget = budget if isinstance(budget, Budget) else _budget(budget)
    return _prepared(model, data, [budget], calibration, validation, certify, progress, Options(**options), said).result()


def sweep(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: Any = None,
    *,
    budgets: Sequence[Budget],
    calibration: Saliency | None = None,
    validation: Any = None,
    certify: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Iterator[Result]:
    """Prunes a model to several budgets from one calibration; the results in the order of `budgets`, each when it is made.

    What the certificates say of held-out samples holds for all of the networks at once, so that whoever looks at all of them
    may keep any. The rest is as in `prune`. Raises BudgetError before any work where one of the budgets is out of reach.
    """
    _require_several(budgets)
    job = _prepared(model, data, budgets, calibration, validation, certify, progress, Options(**options))
    return job.results(budgets)


def _require_several(budgets: Sequence[Budget]) -> None:
    if not budgets or any(b.kind not in SIZES for b in budgets):
        raise BudgetError("a sweep takes budgets of macs, params or bytes, one at least", hint="for example 0.9, 0.7, 0.5")
    if len(set(budgets)) < len(budgets):
        raise BudgetError("a sweep takes every budget once", hint="leave out the second one")


def _prepared(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: Any,
    budgets: Sequence[Budget],
    calibration: Saliency | None,
    validation: Any,
    certify: Any,
    progress: Progress | None,
    settings: Options,
    said: Callable[[Epoch], None] | None = None,
) -> Job:
    """Everything up to the scores, which is the same for all budgets; the job of the first."""
    if any(b.kind == "eps" for b in budgets):
        _require_provable(settings)
    if settings.finetune is not None:
        for budget in budgets:
            finetuning.require_trainable(budget, data)
    clock, tell = Clock(), progress or (lambda stage, done, total: None)
    with clock.stage("import"):
        providers = runtime.providers(settings.providers)
        if settings.recover == tuning.NAME:
            tuning.require()
        imported, split = _import(model, data, validation, settings, calibration)
        if settings.finetune is not None:
            trainer().require(imported.model)
        widths = allowed(settings, imported.groups.net)
        for budget in budgets:
            require_reachable(imported.accounting, imported.groups.prunable, widths, budget)
    latency = None
    if budgets[0].kind == "latency":
        with clock.stage("measure"):
            latency = Latency(imported, settings, budgets[0].value, Machine.of(imported, settings), tell)
    with clock.stage("calibrate"):
        if calibration is not None:
            check_calibration(calibration, imported)
        saliencies = calibrations(imported, settings, budgets[0], providers, split, tell, calibration)
    other = None if certify is None else open_data(certify, imported.specs, settings.images)
    held = certifying.held_out(imported, split, other, saliencies[0], settings, calibration is None)
    measured, several = calibration is None, len(budgets)
    return Job(
        imported, saliencies, settings, budgets[0], split, held, providers, clock, tell, measured, several, said, latency
    )


def calibrate(
    model: str | os.PathLike[str] | onnx.ModelProto, data: Any, *, progress: Progress | None = None, **options: Any
) -> Saliency:
    """The calibration alone; pass it to `prune(calibration=...)`, or save, load and merge it."""
    settings = Options(**options)
    imported, split = _import(model, data, None, settings)
    tell = progress or (lambda stage, done, total: None)
    return calibrated(imported, settings, runtime.providers(settings.providers), split, tell)


def _import(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: Any,
    validation: Any,
    settings: Options,
    calibration: Saliency | None = None,
) -> tuple[Imported, Split]:
    imported = load_as(model, data, settings)
    require_prunable(imported.groups)
    samples = None if data is None else open_data(data, imported.specs, settings.images)
    held_out = None if validation is None else open_data(validation, imported.specs, settings.images)
    if samples is not None and calibration is not None and settings.samples is None:
        settings = replace(settings, samples=_seen(samples, calibration, settings.seed))
    return imported, Split.of(imported, samples, held_out, settings)


def _seen(samples: Samples, calibration: Saliency, seed: int) -> int | None:
    """How many samples a calibration that is handed over saw, if they are the first of these; so that no other is used up."""
    count = calibration.samples
    if not 0 < count <= len(samples) or len(calibration.data) != 1:
        return None
    return count if samples.digest(choose(len(samples), count, seed)) == calibration.data[0] else None


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
