"""The top of the page: what became of the model, in plain words, and the numbers behind them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxprune.report.points import certified
from onnxprune.report.web.facts import Facts
from onnxprune.report.web.html import Html, join, tag
from onnxprune.report.web.pictures import bar
from onnxprune.report.words import number, percent

GREAT_LOSS = 0.1  # of accuracy, or of answers that changed: the page warns


def top(facts: Facts) -> Html:
    """The verdict: a headline, what stands behind it in sentences, and warnings."""
    warning = alarm(facts)
    return tag(
        "header",
        tag("p", facts.original.name, " → ", facts.pruned.name, class_="files"),
        tag("h1", unbroken(headline(facts))),
        *(tag("p", unbroken(line), class_="lead") for line in sentences(facts)),
        None if warning is None else tag("p", warning, class_="warning"),
        *(tag("p", note, class_="note") for note in facts.notes),
    )


def unbroken(line: str) -> str:
    """No line ends between a number and its per cent sign."""
    return line.replace(" %", "\u00a0%")


def headline(facts: Facts) -> str:
    """The verdict in one line."""
    before, after = facts.original, facts.pruned
    if (before.macs, before.params) == (after.macs, after.params):
        return "Nothing was cut"
    work = f"{percent(after.macs, before.macs)} of the work"
    found = _found(facts)
    if found.get("top1"):
        return f"{work}, accuracy {_points(found['top1'][0])} → {_points(found['top1'][1])}"
    if found.get("agreement") is not None:
        return f"{work}, the same answer for {percent(found['agreement'], 1)} of the samples"
    if found.get("relative_l2") is not None:
        return f"{work}, outputs differ by {100 * found['relative_l2']:.3g} % of their size"
    return f"{work}; nothing was measured on samples"


def sentences(facts: Facts) -> list[str]:
    """What stands behind the headline."""
    before, after = facts.original, facts.pruned
    lines = [
        f"The pruned file does {percent(after.macs, before.macs)} of the original's multiply-accumulates, with "
        f"{percent(after.params, before.params)} of its parameters, in {percent(after.bytes, before.bytes)} of its bytes."
    ]
    found = _found(facts)
    if found.get("samples"):
        lines.append(_measured(found))
    if (promised := _promised(facts)) is not None:
        lines.append(promised)
    return lines


def _measured(found: Mapping[str, Any]) -> str:
    parts = []
    if found.get("top1"):
        before, after = found["top1"]
        parts.append(f"it is right {_points(after)} of the time (the original: {_points(before)})")
    if found.get("agreement") is not None:
        parts.append(f"it gives the original's answer to {percent(found['agreement'], 1)}")
    if found.get("relative_l2") is not None:
        parts.append(f"its outputs differ by {100 * found['relative_l2']:.3g} % of their size")
    first = f"{', '.join(parts[:-1])} and " if len(parts) > 1 else ""
    which = "" if found.get("source") != "calibration" else ", the very ones that the choice was made on,"
    return f"On {found['samples']:,} samples{which} {first}{parts[-1]}." if parts else ""


def _promised(facts: Facts) -> str | None:
    """What is certified about inputs that nobody has seen."""
    part = (facts.certificate or {}).get("population") or {}
    bounds = certified(facts.certificate)
    if not part.get("applies"):
        return None
    said = []
    if bounds["changes"] is not None:
        said.append(f"at most {100 * bounds['changes']:.3g} % of inputs get another answer")
    if bounds["drop"] is not None:
        said.append(f"the accuracy falls by at most {100 * bounds['drop']:.3g} points")
    if not said and bounds["moved"] is not None:
        said.append(f"nine of ten inputs get outputs within {100 * bounds['moved']:.3g} % of the original's")
    if not said:
        return None
    sure = 100 * (1 - part["delta"])
    return f"Certified with confidence {sure:g} %, for new inputs of the same kind: {' and '.join(said)}."


def alarm(facts: Facts) -> str | None:
    """A warning where much was lost."""
    found = _found(facts)
    lost = found["top1"][0] - found["top1"][1] if found.get("top1") else None
    if lost is None and found.get("agreement") is not None:
        lost = 1 - found["agreement"]
    if lost is None or lost < GREAT_LOSS:
        return None
    recovered = facts.report is not None and facts.report.get("recover", "none") != "none"
    more = "keep more of it, or train it further" if recovered else "let --recover restore its weights, or keep more of it"
    return f"Much was lost: before this file is used, {more}."


def numbers(facts: Facts) -> Html:
    """The table of what there was before and is after."""
    before, after, found = facts.original, facts.pruned, _found(facts)
    rows = [
        _row("Multiply-accumulates", number(before.macs), number(after.macs), (before.macs, after.macs)),
        _row("Parameters", number(before.params), number(after.params), (before.params, after.params)),
        _row("File", f"{number(before.bytes)}B", f"{number(after.bytes)}B", (before.bytes, after.bytes)),
    ]
    if found.get("top1"):
        was, now = found["top1"]
        rows.append(_row("Top-1 accuracy", _points(was), _points(now), (was, now), f"{100 * (now - was):+.2f} pt"))
    if found.get("agreement") is not None:
        rows.append(_row("Same answer as the original", "", percent(found["agreement"], 1), (1.0, found["agreement"])))
    head = tag("tr", *(tag("th", h, class_=c, scope="col") for h, c in HEAD))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="numbers")
    distance = found.get("relative_l2")
    said = "" if distance is None else f"Distance of the outputs, relative to their size (L2): {distance:.3g}. "
    samples = f"Measured on {found['samples']:,} samples. " if found.get("samples") else ""
    inputs = f"Multiply-accumulates are counted for one run on inputs of {_inputs(facts)}." if _inputs(facts) else ""
    return tag("section", tag("h2", "Before and after"), table, tag("p", said, samples, inputs, class_="caption"))


HEAD = (("", None), ("before", "n"), ("after", "n"), ("kept", "n"), ("", "wide"))


def _row(name: str, before: str, after: str, pair: tuple[float, float], kept: str = "") -> Html:
    cells = [tag("td", x, class_="n") for x in (before, after, (kept or percent(pair[1], pair[0])).replace("-", "−"))]
    picture = tag("td", bar(pair, max(pair), f"{name}: {before} before, {after} after"), class_="wide")
    return tag("tr", tag("th", name, scope="row"), *cells, picture)


def _inputs(facts: Facts) -> str:
    shapes = (facts.report or {}).get("inputs") or {}
    return ", ".join(f"{'×'.join(str(n) for n in s) or 'a single number'}" for s in shapes.values())


def _points(share: float) -> str:
    return f"{100 * share:.2f} %"


def _found(facts: Facts) -> Mapping[str, Any]:
    found = (facts.report or {}).get("validation")
    return found if isinstance(found, Mapping) else {}


def legend() -> Html:
    """What the two colours of the pictures mean."""
    keys = (tag("span", tag("i", class_=f"key {kind}"), kind, class_="legend") for kind in ("before", "after"))
    return tag("p", join(*keys), class_="caption")
