"""The main job for programs: `prune` decides and applies; the passes it calls are pure functions of their inputs."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

import onnxprune
from onnxprune import files, large, runtime, weights, wire
from onnxprune.budget import Budget
from onnxprune.criteria import Criterion, Sensitivity
from onnxprune.criteria.plain import PLAIN, Random
from onnxprune.data import open_data
from onnxprune.decide import Decision, decide, size_of
from onnxprune.errors import BudgetError, DataError, PlanError, ValidationError
from onnxprune.imported import Imported, load, require_prunable
from onnxprune.options import Options
from onnxprune.passes.allocate import require_reachable
from onnxprune.passes.calibrate import calibrate as calibrate_pass
from onnxprune.passes.surgery import mask, surgery
from onnxprune.passes.validate import Validation, validate
from onnxprune.plan import Plan
from onnxprune.report import build
from onnxprune.saliency import Saliency
from onnxprune.selection import Widths
from onnxprune.splits import Split

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
        """Writes the model and, beside it or at `report`, the report; each whole or not at all.

        Raises OutputError when that fails, also when it would replace a file that the original model is in.
        """
        where = Path(report) if report is not None else report_path(path)
        targets = outputs(Path(path), where, external=self.external_data)
        files.apart(targets, self.sources)
        files.writable(*targets, force=force)
        files.save(self.stored, path, external=self.external_data)
        with files.whole_file(where) as temporary:
            temporary.write_text(json.dumps(self.report, indent=1) + "\n")


def report_path(out: str | os.PathLike[str]) -> Path:
    """Where the report of OUT goes unless told otherwise: OUT.report.json."""
    return Path(out).with_name(Path(out).name + ".report.json")


def outputs(out: Path, report: Path, *, external: bool) -> list[Path]:
    """Every file that `Result.save` writes."""
    return [out, report, *([files.data_file(out)] if external else [])]


class Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - start, 4)


def criterion_for(options: Options, providers: list[str]) -> Criterion:
    """The criterion behind `--method`."""
    if options.method == "random":
        return Random(options.seed)
    if options.method in PLAIN:
        made: Criterion = PLAIN[options.method]()
        return made
    return Sensitivity(options.reduce, providers, options.sensitivity)


def prune(
    model: str | os.PathLike[str] | onnx.ModelProto,
    data: Any = None,
    *,
    budget: Budget | Mapping[str, float],
    calibration: Saliency | None = None,
    validation: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> Result:
    """Prunes a model to a budget and re-validates it.

    model: a path or a ModelProto, which is not changed. data: whatever `open_data` takes; optional for the criteria that
    look at weights only and when `calibration` is given. budget: `Budget` or e.g. {"macs": 0.5}. validation: other data to
    compare outputs on; by default samples that were not used to calibrate. options: the fields of `Options`.
    Raises OnnxPruneError's children; ValidationError means that the result was not fit to be used.
    """
    settings = Options(**options)
    budget = budget if isinstance(budget, Budget) else _budget(budget)
    if budget.kind == "eps" and settings.method in PLAIN:
        raise BudgetError(
            f"--eps bounds a sampling error, and --method {settings.method} has none",
            hint="leave --method out, or ask for --macs, --params or --bytes",
        )
    clock, tell = Clock(), progress or (lambda stage, done, total: None)
    with clock.stage("import"):
        providers = runtime.providers(settings.providers)
        imported, split = _import(model, data, validation, settings, prunable=True)
        widths = Widths(settings.min_channels, settings.align)
        require_reachable(imported.accounting, imported.groups.prunable, widths, budget)
    with clock.stage("calibrate"):
        saliency = calibration or _calibrated(imported, settings, providers, split, tell)
        _check_calibration(saliency, imported)
    with clock.stage("sample"):
        decision = decide(imported, saliency, settings, budget, split, providers)
    with clock.stage("surgery"):
        pruned = surgery(imported.groups, decision.plan)
        exact, masked = _oracle_pair(imported, decision.plan)
    with clock.stage("validate"):
        found = validate(
            imported.model,
            pruned,
            masked,
            split.oracle_feeds(imported),
            split.validation,
            split.validation_indices,
            providers=providers,
            progress=lambda done, total: tell("validate", done, total),
            exact=exact,
        )
    imported.groups.net.scratch.drop(*[m for m in (exact, masked) if m is not None])
    report = _report(imported, settings, budget, saliency, decision, pruned, found, clock)
    certificate, external = report["certificate"], imported.external
    return Result(pruned, decision.plan, report, certificate, external, imported.sources, imported.scratches)


def calibrate(
    model: str | os.PathLike[str] | onnx.ModelProto, data: Any, *, progress: Progress | None = None, **options: Any
) -> Saliency:
    """The calibration alone; pass it to `prune(calibration=...)`, or save, load and merge it."""
    settings = Options(**options)
    imported, split = _import(model, data, None, settings, prunable=True)
    tell = progress or (lambda stage, done, total: None)
    return _calibrated(imported, settings, runtime.providers(settings.providers), split, tell)


def apply(model: str | os.PathLike[str] | onnx.ModelProto, plan: Plan, **options: Any) -> tuple[Imported, onnx.ModelProto]:
    """(the imported model, the pruned model) of a plan made elsewhere, oracle included. options: those about the model.

    The weights of a pruned model of more than 1 GiB last as long as the imported one, see `Result.model`.
    Raises PlanError when the plan is for another model, ValidationError when the result is not fit to be used.
    """
    imported, pruned = applied(model, plan, **options)
    return imported, large.whole(pruned)


def applied(model: str | os.PathLike[str] | onnx.ModelProto, plan: Plan, **options: Any) -> tuple[Imported, onnx.ModelProto]:
    """`apply`, but the large tensors of the pruned model may be references."""
    settings = Options(**options)
    imported = _load(model, None, settings)
    if plan.model_digest and plan.model_digest != imported.groups.net.digest:
        raise PlanError("the plan was made for another model", hint="apply it to the file that it was made from")
    pruned = surgery(imported.groups, plan)
    exact, masked = _oracle_pair(imported, plan)
    validate(imported.model, pruned, masked, [imported.groups.net.feeds], exact=exact)
    return imported, pruned


def _oracle_pair(imported: Imported, plan: Plan) -> tuple[onnx.ModelProto | None, onnx.ModelProto]:
    """What the oracle compares: (the model with exact cuts only, None where all cuts are; the model that masks the same)."""
    groups = imported.groups
    comparable = [g.id for g in groups.prunable if g.flaw is None or g.flaw.comparable]
    part = plan.only(comparable)
    whole = all(name in part.groups or (len(k.indices) == k.size and k.scale is None) for name, k in plan.groups.items())
    return None if whole else surgery(groups, part), mask(groups, part)


def verify(
    original: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    report: Mapping[str, Any] | None = None,
    data: Any = None,
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Re-validates a pair of files. With the report of the pruning also that it is of these files, and the oracle.

    Raises ValidationError when anything does not hold.
    """
    settings = Options(**options)
    if report is not None and report.get("approximate"):
        settings = replace(settings, allow_approximate=True)
    imported, split = _import(original, data, None, settings)
    scratch = weights.Scratch()
    smaller = large.lean(files.load(pruned), scratch)
    exact = masked = None
    if report is not None:
        build.check_digests(report, imported.groups.net.digest, wire.digest(smaller))
        exact, masked = _oracle_pair(imported, build.plan_of(report))
    try:
        found = validate(
            imported.model,
            smaller,
            masked,
            split.oracle_feeds(imported),
            split.validation,
            split.validation_indices,
            providers=runtime.providers(settings.providers),
            progress=lambda done, total: progress("validate", done, total) if progress else None,
            exact=exact,
        )
    except ValidationError as error:
        raise ValidationError(error.message, hint="is it the pair, and the report, that one pruning wrote?") from None
    return {"original": Path(original).name, "pruned": Path(pruned).name, "validation": found.to_json()}


def _import(
    model: str | os.PathLike[str] | onnx.ModelProto, data: Any, validation: Any, settings: Options, *, prunable: bool = False
) -> tuple[Imported, Split]:
    imported = _load(model, data, settings)
    if prunable:
        require_prunable(imported.groups)
    samples = None if data is None else open_data(data, imported.specs, settings.images)
    held_out = None if validation is None else open_data(validation, imported.specs, settings.images)
    return imported, Split.of(imported, samples, held_out, settings)


def _load(model: str | os.PathLike[str] | onnx.ModelProto, data: Any, settings: Options) -> Imported:
    return load(
        model,
        freeze=settings.freeze,
        data=data,
        images=settings.images,
        shape=settings.shape,
        approximate=settings.allow_approximate,
    )


def _budget(mapping: Mapping[str, float]) -> Budget:
    if len(mapping) != 1:
        raise BudgetError("a budget names exactly one quantity", hint='for example {"macs": 0.5}')
    kind, value = next(iter(mapping.items()))
    return Budget(kind, value)  # type: ignore[arg-type]  # checked by Budget itself


def _check_calibration(saliency: Saliency, imported: Imported) -> None:
    if saliency.model_digest and saliency.model_digest != imported.groups.net.digest:
        raise DataError("the calibration was made for another model", hint="calibrate this model again")
    for score in saliency.layers:
        group = imported.groups.by_id.get(score.group)
        if group is None or score.values.shape != (group.size,) or not (score.values >= 0).all():
            raise DataError(
                f"the calibration's scores for group '{score.group}' do not fit the model", hint="calibrate this model again"
            )


def _calibrated(imported: Imported, settings: Options, providers: list[str], split: Split, tell: Progress) -> Saliency:
    criterion = criterion_for(settings, providers)
    if criterion.needs_data and split.calibration is None:
        raise DataError(
            f"--method {settings.method} needs sample data",
            hint="give --data, or choose l1, l2 or fpgm, which look at weights only",
        )
    if isinstance(criterion, Sensitivity):
        criterion.prepare(lambda done: tell("compile", done, 1))
    return calibrate_pass(
        imported.groups,
        criterion,
        split.calibration,
        split.calibration_indices,
        batch=settings.batch,
        providers=providers,
        progress=lambda done, total: tell("calibrate", done, total),
    )


def _report(
    imported: Imported,
    settings: Options,
    budget: Budget,
    saliency: Saliency,
    decision: Decision,
    pruned: onnx.ModelProto,
    found: Validation,
    clock: Clock,
) -> dict[str, Any]:
    accounting, plan = imported.accounting, decision.plan
    after = size_of(imported, plan)
    macs, params = build.prunable_share(imported.groups, accounting)
    provable = saliency.criterion == Sensitivity.name
    return {
        "onnxprune": onnxprune.__version__,
        "model": Path(imported.path).name,
        "seed": settings.seed,
        "method": decision.method,
        "recover": "none",
        "approximate": settings.allow_approximate,
        "budget": budget.to_json(),
        "original": {"macs": imported.size.macs, "params": imported.size.params, "bytes": imported.size.bytes},
        "pruned": {"macs": after.macs, "params": after.params, "bytes": wire.size(pruned)},
        "digests": {"original": imported.groups.net.digest, "pruned": wire.digest(pruned)},
        "prunable": {"macs": macs, "params": params},
        "calibration": build.calibration(saliency),
        "groups": build.group_entries(imported.groups, plan),
        "layers": build.layer_entries(imported.groups, accounting, plan, decision.shares if provable else {}),
        "certificate": build.certificate(decision.shares, saliency, settings.delta, provable),
        "validation": found.to_json(),
        "seconds": {k: clock.seconds.get(k, 0.0) for k in ("import", "calibrate", "sample", "surgery", "validate")},
    }
