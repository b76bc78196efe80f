"""Pairs of an original and a pruned model: made from a plan, or checked again from the files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx

from onnxprune import files, large, runtime, weights, wire
from onnxprune.certify import attached, without
from onnxprune.checker import Sources, check
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
        attention=settings.attention,
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
    certificate: Mapping[str, Any] | None = None,
    validation: Any = None,
    certify: Any = None,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Re-validates a pair of files, and re-checks the certificate in the pruned one; see `onnxprune.checker`.

    report: that of the pruning, to check that it is of these files. certificate: a copy of the one in the file, to compare.
    validation, certify: the samples of these options of the pruning, where it had any. Freezes, shapes and whether cuts may
    be approximate are those of the certificate unless `options` say otherwise.
    Raises ValidationError when anything does not hold.
    """
    scratch = weights.Scratch()  # lasts as long as what refers to it
    smaller = large.lean(files.load(pruned), scratch)
    told = told_by(smaller, report, certificate)
    settings = _as_then(Options(**options), report, told)
    imported = load_as(original, data, settings)
    samples, *others = (
        None if d is None else open_data(d, imported.specs, settings.images) for d in (data, validation, certify)
    )
    split = Split.of(imported, samples, others[0], settings)
    bare = without(smaller)
    exact = masked = None
    recovered = any(r.get("recover", "none") != "none" for r in (report, told) if r is not None)
    if report is not None:
        build.check_digests(report, imported.groups.net.digest, wire.digest(bare))
    lines = []
    if told is not None:
        given = {"data": samples, "validation": others[0], "certify": others[1]}
        lines = check(told, imported, bare, Sources({k: v for k, v in given.items() if v is not None}))
    if told is not None or (report is not None and "groups" in report):
        plan = _plan(report, told)
        exact, masked = oracle_pair(imported, plan)
        if recovered and exact is None:
            exact = surgery(imported.groups, plan)
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
            recovered=recovered,
        )
    except ValidationError as error:
        raise ValidationError(error.message, hint="is it the pair, and the report, that one pruning wrote?") from None
    names = {"original": Path(original).name, "pruned": Path(pruned).name}
    measured = {**found.to_json(), "source": split.origin.source}
    return {**names, "validation": measured, "certificate": told, "rechecked": lines}


def told_by(pruned: onnx.ModelProto, report: Mapping[str, Any] | None, copy: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """The certificate, of which all copies must say the same; None where there is none."""
    text = attached(pruned)
    try:
        inside = None if text is None else json.loads(text)
    except ValueError:
        raise ValidationError("the certificate in the pruned file is not JSON", hint="was the file changed?") from None
    copies = [c for c in (inside, copy, None if report is None else report.get("certificate")) if c is not None]
    if any(c != copies[0] for c in copies):
        hint = "they are the pruned file's metadata, OUT.certificate.json and the report"
        raise ValidationError("the copies of the certificate differ", hint=hint)
    if copies and not isinstance(copies[0], dict):
        raise ValidationError(
            "the certificate is not as onnxprune writes them", hint="was the file, the report or the certificate changed?"
        )
    return dict(copies[0]) if copies else None


def _as_then(settings: Options, report: Mapping[str, Any] | None, told: Mapping[str, Any] | None) -> Options:
    settings = _same_samples(settings, report)
    then = told.get("options") if told is not None else None
    if report is not None and report.get("approximate"):
        settings = replace(settings, allow_approximate=True)
    if report is not None and report.get("attention"):
        settings = replace(settings, attention=report["attention"])
    if not isinstance(then, Mapping):
        return settings
    try:
        return replace(
            settings,
            allow_approximate=settings.allow_approximate or bool(then["approximate"]),
            attention=settings.attention or then["attention"],
            freeze=settings.freeze or tuple(then["freeze"]),
            shape=settings.shape or tuple(then["shape"]),
        )
    except (KeyError, TypeError):
        raise ValidationError("the options in the certificate are not as onnxprune writes them") from None


def _same_samples(settings: Options, report: Mapping[str, Any] | None) -> Options:
    """With as many samples set aside as the pruning has set aside, so that outputs are compared on others than these."""
    then = None if report is None else report.get("calibration")
    if settings.samples is not None or not isinstance(then, Mapping) or "set_aside" not in then:
        return settings
    count = then["set_aside"]
    if count is not None and not (isinstance(count, int) and count > 0):
        raise ValidationError("the report's number of calibration samples is not as onnxprune writes it")
    return replace(settings, samples=count)


def _plan(report: Mapping[str, Any] | None, told: Mapping[str, Any] | None) -> Plan:
    if report is not None and "groups" in report:
        return build.plan_of(report)
    assert told is not None
    return Plan.from_json(json.dumps({"groups": told["plan"]}))
