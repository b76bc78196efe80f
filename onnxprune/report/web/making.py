"""How the file came about: what recovery did, what was checked, and the command that does it again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from onnxprune.report.web.facts import Facts
from onnxprune.report.web.html import Html, tag, text

WAYS = {
    "lsq": "new weights and biases by least squares",
    "bias": "shifted biases",
    "rescale": "rescaled filters",
    "bn": "restored variances",
}


def recovery(facts: Facts) -> Html | None:
    """What recovery was worth, and which layers it left alone and why."""
    told = (facts.report or {}).get("recovery")
    if not told:
        return None
    errors = {k: v for k, v in told["held_out_relative_l2"].items() if v is not None}
    if told["kept"] != "none":
        how = WAYS.get(told["kept"], told["kept"])
        said = f"{told['layers']} layers were given {how}, from {told['samples']} samples, without labels and without training."
        if {"none", told["kept"]} <= set(errors):
            said += (
                f" On held-out samples the outputs lay {errors['none']:.3g} of their size away from the original's before, and "
                f"{errors[told['kept']]:.3g} after."
            )
    elif told["reason"]:
        said = f"Recovery was tried and not kept: {told['reason']}."
    else:
        said = "No recovery was asked for." if told["asked"] == "none" else "Nothing was recovered: there were no samples."
    left: dict[str, list[str]] = {}
    for layer, reason in told["left"].items():
        left.setdefault(reason, []).append(layer)
    return tag(
        "section",
        tag("h2", "Recovery"),
        tag("p", said),
        None if not left else tag("p", "Layers that keep the weights of the cut:", class_="caption"),
        None if not left else tag("ul", *(tag("li", f"{reason}: {_some(names)}") for reason, names in left.items())),
    )


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def making(facts: Facts) -> Html | None:
    """The command, the options, the checks, the files."""
    report = facts.report
    if report is None:
        return None
    found = report["validation"]
    error = found["masked_max_relative_error"]
    checks = [
        f"ONNX checker: {'passed' if found['checker'] else 'refuses the original too'}",
        "ONNX Runtime: loads and runs it",
        "not compared with the masked original"
        if error is None
        else f"the cut equals the original with the same channels silenced, to {error:.1e} of the largest output",
        *found["notes"],
    ]
    facts_of = (
        ("method", report["method"]),
        ("budget", f"{report['budget']['kind']} {report['budget']['value']:g}"),
        ("seed", str(report["seed"])),
        ("calibration", _calibration(report)),
        ("made by", f"onnxprune {report['onnxprune']}, in {sum(report['seconds'].values()):.1f} s"),
        ("original", f"{facts.original.name}, SHA-256 {report['digests']['original']}"),
        ("pruned", f"{facts.pruned.name} without its certificate, SHA-256 {report['digests']['pruned']}"),
    )
    cells = [cell for term, value in facts_of for cell in (tag("dt", term), tag("dd", value))]
    return tag(
        "section",
        tag("h2", "How it was made"),
        tag("p", "This makes the same file again, to the byte, from the same inputs:", class_="caption"),
        tag("pre", _command(report)),
        tag("dl", *cells),
        tag("h3", "What was checked before it was written"),
        tag("ul", *(tag("li", line) for line in checks)),
    )


def _calibration(report: Mapping[str, Any]) -> str:
    told = report["calibration"]
    return f"{told['samples'] or 'no'} samples, scores by {told['criterion']}"


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
