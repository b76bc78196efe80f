"""How the file came about: what recovery did, what was checked, and the command that does it again."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from onnxprune.report.web.facts import Facts
from onnxprune.report.web.html import Html, tag, text

WAYS = {
    "lsq": "new weights and biases by least squares",
    "tune": "new weights and biases by least squares",
    "linear": "the dropped channels as linear combinations of the kept ones",
    "bias": "shifted biases",
    "rescale": "rescaled filters",
    "bn": "restored variances",
}

SAME = "This makes the same file again, to the byte, from the same inputs:"


def recovery(facts: Facts) -> Html | None:
    """What recovery and training were worth, and which layers were left alone and why."""
    report = facts.report or {}
    told, trained = report.get("recovery"), report.get("finetune")
    if not told and not trained:
        return None
    left: dict[str, list[str]] = {}
    for layer, reason in (told or {"left": {}})["left"].items():
        left.setdefault(reason, []).append(layer)
    return tag(
        "section",
        tag("h2", "Recovery"),
        None if not told else tag("p", _recovered(told)),
        None if not trained else tag("p", _trained(trained)),
        None if not left else tag("p", "Layers that keep the weights of the cut:", class_="caption"),
        None if not left else tag("ul", *(tag("li", f"{reason}: {_some(names)}") for reason, names in left.items())),
    )


def _recovered(told: Mapping[str, Any]) -> str:
    errors = {k: v for k, v in told["held_out_relative_l2"].items() if v is not None}
    if told["kept"] == "none":
        if told["reason"]:
            return f"Recovery was tried and not kept: {told['reason']}."
        return "No recovery was asked for." if told["asked"] == "none" else "Nothing was recovered: there were no samples."
    how = WAYS.get(told["kept"], told["kept"])
    tuned = told.get("tuned") if told["kept"] == "tune" else None
    means = (
        " and without training" if tuned is None else f", then tuned on these by {tuned['epochs']} epochs of gradient descent"
    )
    said = f"{told['layers']} layers were given {how}, from {told['samples']} samples, without labels{means}."
    if {"none", told["kept"]} <= set(errors):
        before, after = (f"{100 * errors[k]:.3g} %" for k in ("none", told["kept"]))
        where = "held-out samples" if told["held_out"] else "these very samples"
        said += f" On {where} the outputs differed from the original's by {before} of their size before, {after} after."
    if told["kept"] != "none" and told["reason"]:
        said += f" It was {told['reason']}."
    return said


def _trained(told: Mapping[str, Any]) -> str:
    """Training on top of it, as `finetune` reports it."""
    work = f"{told['epochs']} epochs on {told['samples']:,} samples, against the original's outputs"
    if not told["best"]:
        return f"Training was tried and not kept: none of {work}, was better than the weights that were there."
    name, unit = ("the same answer", 100) if told["metric"] == "agreement" else ("a distance (relative L2)", 1)
    before, after = (f"{unit * told[k]:.4g}{' %' if unit == 100 else ''}" for k in ("before", "after"))
    return f"Then the weights were trained for {work}: {name} of {before} before and {after} after, on held-out samples."


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def making(facts: Facts) -> Html | None:
    """The command, the options, the checks, the files."""
    report = facts.report
    if report is None:
        return None
    rows = (*_settings(report), *_files(facts, report))
    cells = [cell for term, value in rows for cell in (tag("dt", term), tag("dd", value))]
    return tag(
        "section",
        tag("h2", "How it was made"),
        *_again(report),
        tag("dl", *cells),
        tag("h3", "What was checked before it was written"),
        tag("ul", *(tag("li", line) for line in (*_checks(report["validation"]), *_flaws(report)))),
    )


def _again(report: Mapping[str, Any]) -> tuple[Html, ...]:
    """The command, and what it makes: not the weights where these were trained by another one."""
    if "budget" not in report:
        return ()
    words = [str(w) for w in report.get("command") or ()]
    later = report.get("finetune") and words[1:2] != ["finetune"] and not any(w.startswith("--finetune") for w in words)
    said = "This made the file that was then trained:" if later else SAME
    return tag("p", said, class_="caption"), tag("pre", _command(report))


def _settings(report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "method" in report:
        yield "method", report["method"]
    if "budget" in report:
        yield "budget", f"{report['budget']['kind']} {report['budget']['value']:g}"
    yield "seed", str(report["seed"])
    if "calibration" in report:
        told = report["calibration"]
        yield "calibration", f"{told['samples'] or 'no'} samples, scores by {told['criterion']}"
    yield "made by", f"onnxprune {report['onnxprune']}, in {sum(report['seconds'].values()):.1f} s"


def _files(facts: Facts, report: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "original", f"{facts.original.name}, SHA-256 {report['digests']['original']}"
    yield "pruned", f"{facts.pruned.name} without its certificate, SHA-256 {report['digests']['pruned']}"


def _checks(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"ONNX checker: {'passed' if found['checker'] else 'refuses the original too'}"
    yield "ONNX Runtime: loads and runs it"
    if (error := found["masked_max_relative_error"]) is None:
        yield "not compared with the masked original"
    else:
        yield f"the cut equals the original with the same channels silenced, to {error:.1e} of the largest output"
    yield from found["notes"]


def _flaws(report: Mapping[str, Any]) -> Iterator[str]:
    """Cuts that the file's outputs do not follow exactly, by reason."""
    found: dict[str, list[str]] = {}
    for group in report.get("groups", ()):
        if group["removed"] and not group["exact"]:
            found.setdefault(str(group["flaw"]), []).append(group["id"])
    for flaw, names in found.items():
        yield f"not exact: {flaw} ({_some(names)})"


def typed(command: Sequence[Any]) -> Html:
    """A command as a shell takes it, an option a line."""
    words = [shlex.quote(str(word)) for word in command]
    options = [i for i, w in enumerate(words) if w.startswith("-")] or [len(words)]
    lines = [words[a:b] for a, b in pairwise([0, *options, len(words)]) if words[a:b]]
    return Html(" \\\n    ".join(text(" ".join(line)) for line in lines))


def _command(report: Mapping[str, Any]) -> Html:
    """As it was typed, or the call of the library that does the same."""
    if report.get("command"):
        return typed(report["command"])
    given = [f"{k}={v!r}" for k, v in (report.get("options") or {}).items() if k in ("method", "recover", "seed", "align")]
    budget = {report["budget"]["kind"]: report["budget"]["value"]}
    return text(f"onnxprune.prune({report['model']!r}, data, budget={budget!r}, {', '.join(given)})")
