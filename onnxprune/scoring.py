"""The scores that a pruning needs: which criteria, on which samples, and whether scores made elsewhere fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from onnxprune.budget import Budget
from onnxprune.contraction import consumers
from onnxprune.criteria import Criterion, Sensitivity
from onnxprune.criteria.plain import PLAIN, Random
from onnxprune.elimination import NAME as OBS
from onnxprune.errors import DataError
from onnxprune.finish import batches
from onnxprune.imported import Imported
from onnxprune.influence import influences, samples_for
from onnxprune.options import Options
from onnxprune.passes.calibrate import calibrate as calibrate_pass
from onnxprune.passes.eliminate import eliminate as eliminate_pass
from onnxprune.saliency import Saliency
from onnxprune.splits import Split

Progress = Callable[[str, int, int], None]


def criterion_for(options: Options, providers: list[str]) -> Criterion:
    """The criterion behind `--method`."""
    if options.method == "random":
        return Random(options.seed)
    if options.method in PLAIN:
        made: Criterion = PLAIN[options.method]()
        return made
    return Sensitivity(options.reduce, providers, options.sensitivity)


def check_calibration(saliency: Saliency, imported: Imported) -> None:
    """Raises DataError unless scores that were made elsewhere are of this model."""
    if saliency.model_digest and saliency.model_digest != imported.groups.net.digest:
        raise DataError("the calibration was made for another model", hint="calibrate this model again")
    for score in saliency.layers:
        group = imported.groups.by_id.get(score.group)
        if group is None or score.values.shape != (group.size,) or not (score.values >= 0).all():
            raise DataError(
                f"the calibration's scores for group '{score.group}' do not fit the model", hint="calibrate this model again"
            )


def calibrations(
    imported: Imported,
    settings: Options,
    budget: Budget,
    providers: list[str],
    split: Split,
    tell: Progress,
    given: Saliency | None = None,
) -> list[Saliency]:
    """The scores that the method asked for needs; `auto` has two criteria to choose from. given: made before."""
    found = [calibrated(imported, settings, providers, split, tell) if given is None else given]
    several = settings.method == "auto" and budget.kind != "eps" and split.calibration is not None
    if several and found[0].criterion == Sensitivity.name:
        found.append(calibrated(imported, replace(settings, method=OBS), providers, split, tell))
    return found


def calibrated(imported: Imported, settings: Options, providers: list[str], split: Split, tell: Progress) -> Saliency:
    """The scores by the method asked for. Raises DataError where they need samples that nobody gave."""
    by_elimination = settings.method == OBS
    criterion = criterion_for(settings, providers)
    if (by_elimination or criterion.needs_data) and split.calibration is None:
        raise DataError(
            f"--method {settings.method} needs sample data",
            hint="give --data, or choose l1, l2 or fpgm, which look at weights only",
        )
    if by_elimination:
        return _eliminated(imported, settings, providers, split, tell)
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


def _eliminated(imported: Imported, settings: Options, providers: list[str], split: Split, tell: Progress) -> Saliency:
    samples, indices = split.calibration, split.calibration_indices
    assert samples is not None and indices is not None
    layers = consumers(imported.groups)
    few = indices[: samples_for(len(layers), len(indices))]
    tell("influence", 0, 1)
    influence = influences(
        imported.groups.net,
        layers,
        batches(imported.groups, samples, few, settings.batch),
        seed=settings.seed,
        providers=providers,
    )
    tell("influence", 1, 1)
    return eliminate_pass(
        imported.groups,
        lambda: batches(imported.groups, samples, indices, settings.batch),
        len(indices),
        (samples.digest(indices),),
        influence=influence,
        seed=settings.seed,
        providers=providers,
        progress=lambda done, total: tell("eliminate", done, total),
    )
