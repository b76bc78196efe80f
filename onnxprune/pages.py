"""What the page of `onnxprune report` is made from: the two files, analysed again, and the JSON that belongs to them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import files, wire
from onnxprune.certify import without
from onnxprune.errors import OptionError
from onnxprune.graph import graph_inputs
from onnxprune.imported import Imported, load
from onnxprune.pairs import told_by
from onnxprune.report import build
from onnxprune.report.web.facts import Facts, FileFacts, LayerFacts
from onnxprune.report.web.network import spread
from onnxprune.report.web.page import page
from onnxprune.runtime import input_shape
from onnxprune.saliency import Saliency


def html(
    original: str | os.PathLike[str],
    pruned: str | os.PathLike[str],
    report: Mapping[str, Any] | None = None,
    *,
    certificate: Mapping[str, Any] | None = None,
    sweep: Mapping[str, Any] | None = None,
    bench: Mapping[str, Any] | None = None,
    calibration: Saliency | None = None,
    shape: tuple[str, ...] = (),
) -> str:
    """The page about a pair of files, as HTML that stands by itself.

    report, certificate, sweep, bench: JSON of `prune`, `sweep` and `bench`. calibration: scores, where the report has none.
    shape: sizes of inputs that the original leaves open, by default those that the report tells. Deterministic.
    Raises ValidationError when the report or the certificate is not of these files, OptionError when JSON is not as
    onnxprune writes it.
    """
    smaller = files.load(pruned)
    told = told_by(smaller, report, certificate)
    sizes = shape or _shapes(original, report)
    before, after = load(original, shape=sizes), load(pruned, shape=sizes)
    if report is not None:
        build.check_digests(report, before.groups.net.digest, wire.digest(without(after.model)))
    if sweep is not None and sweep.get("digest") != before.groups.net.digest:
        raise OptionError("the sweep is of another original model", hint="give the sweep.json of this model")
    try:
        facts = _facts(before, after, report, told, sweep, bench, calibration)
        return page(facts)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise OptionError(f"the JSON is not as onnxprune writes it ({what})", hint="was it made by another version?") from None


def _shapes(original: str | os.PathLike[str], report: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The sizes of the run that the report's MACs are counted for, of inputs that leave any open."""
    known = (report or {}).get("inputs") or {}
    if not isinstance(known, Mapping):
        return ()
    found = []
    for value in graph_inputs(files.load(original)):
        declared, shape = input_shape(value), known.get(value.name)
        if shape and None in declared and len(shape) == len(declared):
            found.append(f"{value.name}={','.join(str(n) for n in shape)}")
    return tuple(found)


def _facts(
    before: Imported,
    after: Imported,
    report: Mapping[str, Any] | None,
    certificate: Mapping[str, Any] | None,
    sweep: Mapping[str, Any] | None,
    bench: Mapping[str, Any] | None,
    calibration: Saliency | None,
) -> Facts:
    scores = {} if report is None else spread(report)
    whole = report if report is not None and "groups" in report else None  # that of a training alone tells of no cut
    criterion = None if whole is None else whole["calibration"]["criterion"]
    if not scores and calibration is not None and whole is not None:
        scores, criterion = _scores(whole, calibration), calibration.criterion
    return Facts(
        _file(before),
        _file(after),
        _layers(before, after),
        _frozen(before, whole),
        report,
        certificate,
        sweep,
        bench,
        _notes(after, report, certificate),
        scores,
        criterion,
        wire.digest(without(after.model)),
    )


def _file(model: Imported) -> FileFacts:
    return FileFacts(Path(model.path).name, model.size.macs, model.size.params, _bytes(model))


def _bytes(model: Imported) -> int:
    return sum(p.stat().st_size for p in dict.fromkeys(model.sources))


def _layers(before: Imported, after: Imported) -> tuple[LayerFacts, ...]:
    """The layers of the original and what became of each, by name."""
    left = {x["name"]: x for x in _alone(after)}
    found = []
    for x in _alone(before):
        y = left.get(x["name"])
        pairs = ((x[k][0], None if y is None else y[k][0]) for k in ("in", "out", "macs"))
        found.append(LayerFacts(x["name"], x["op"], *pairs))
    return tuple(found)


def _alone(model: Imported) -> list[dict[str, Any]]:
    return build.layer_entries(model.groups, model.accounting, build.NOTHING, {})


def _frozen(before: Imported, report: Mapping[str, Any] | None) -> tuple[tuple[str, int, str, str], ...]:
    """As the pruning had it, with its --freeze and the like; else as the analysis of the file alone has it."""
    if report is not None:
        return tuple((g["id"], g["size"], g["reason"], g.get("remedy") or "") for g in report["groups"] if g["frozen"])
    return tuple((g.id, g.size, g.reason or "", g.remedy) for g in before.groups.groups if g.frozen)


def _notes(after: Imported, report: Mapping[str, Any] | None, certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    name, notes = Path(after.path).name, []
    if report is None:
        notes.append(
            f"There is no {name}.report.json beside the file: what follows is what the two files alone tell. How the channels "
            "were chosen and what was measured on samples is not in them."
        )
    if certificate is None:
        notes.append("There is no certificate, neither in the file nor beside it.")
    return tuple(notes)


def _scores(report: Mapping[str, Any], calibration: Saliency) -> dict[str, dict[str, Any]]:
    found = {}
    for g in report["groups"]:
        values = [s.values for s in calibration.by_group.get(g["id"], ()) if s.values.shape == (g["size"],)]
        if values and not g["frozen"]:
            found[g["id"]] = {**build.spread(np.max(values, axis=0), g), "size": g["size"], "left": len(g["kept"])}
    return found


def read_json(path: str | os.PathLike[str], key: str, made_by: str) -> dict[str, Any]:
    """A JSON object that has `key`. Raises OptionError for anything else. made_by: the command that writes such files."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or key not in found:
            raise ValueError(f"no '{key}' in it")
        return found
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        hint = f"it is what `onnxprune {made_by}` writes"
        raise OptionError(f"cannot use {path}: {reason}", hint=hint) from None
