"""Pairs of an original and a pruned model: made from a plan, or checked again from the files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from onnxprune import files, large, runtime, weights, wire
from onnxprune.certify import without
from onnxprune.data import open_data
from onnxprune.errors import PlanError, ValidationError
from onnxprune.imported import Imported, load
from onnxprune.options import Options
from onnxprune.passes.surgery import mask, surgery
from onnxprune.passes.validate import validate
from onnxprune.plan import Plan
from onnxprune.report import build
from onnxprune.splits import Split

Progress = Callable[[str, int, int], None]


def load_as(model: str | os.PathLike[str] | onnx.ModelProto, data: Any, settings: Options) -> Imported:
    """A model imported with the options that are about the model. data: see `imported.load`."""
    return load(
        model,
        freeze=settings.freeze,
        data=data,
        images=settings.images,
        shape=settings.shape,
        approximate=settings.allow_approximate,
    )


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
    imported = load_as(model, None, settings)
    if plan.model_digest and plan.model_digest != imported.groups.net.digest:
        raise PlanError("the plan was made for another model", hint="apply it to the file that it was made from")
    pruned = surgery(imported.groups, plan)
    exact, masked = oracle_pair(imported, plan)
    validate(imported.model, pruned, masked, [imported.groups.net.feeds], exact=exact)
    return imported, pruned


def oracle_pair(imported: Imported, plan: Plan) -> tuple[onnx.ModelProto | None, onnx.ModelProto]:
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
    imported = load_as(original, data, settings)
    samples = None if data is None else open_data(data, imported.specs, settings.images)
    split = Split.of(imported, samples, None, settings)
    scratch = weights.Scratch()
    smaller = large.lean(files.load(pruned), scratch)
    exact = masked = None
    if report is not None:
        build.check_digests(report, imported.groups.net.digest, wire.digest(without(smaller)))
        exact, masked = oracle_pair(imported, build.plan_of(report))
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
