"""A sweep as a picture: what is left of the work against what is left of the quality."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onnxprune.report.points import quality
from onnxprune.report.web.html import Html, tag
from onnxprune.report.web.pictures import curve
from onnxprune.report.words import number, percent

UNITS = {"macs": "multiply-accumulates", "params": "parameters", "bytes": "file size"}


def sweep(told: Mapping[str, Any], here: str | None = None) -> Html:
    """The curve and the table. here: the digest of the pruned file of this page, which is marked in the table."""
    points, kind = told["points"], told["kind"]
    samples = points[0]["validation"]["samples"]
    said = [f"Measured on {samples:,} samples."] if samples else []
    if any(p["population"]["changes"] is not None for p in points):
        said.append(
            "The last column is certified: at most so many of all inputs get another answer, for all of these networks at "
            "once, so that any of them may be picked by this table."
        )
    return tag(
        "section",
        tag("h2", "Size against quality"),
        tag("p", "The line joins the networks that no other beats in both.", class_="caption"),
        _plot(points, kind),
        _table(points, here),
        tag("p", " ".join(said), class_="caption"),
    )


def _plot(points: Sequence[Mapping[str, Any]], kind: str) -> Html | None:
    name, values = quality(points)
    if values is None:
        return None
    x = [100 * p["kept"][kind] for p in points]
    first = points[0]["validation"]["top1"]
    best = [100 * v for v in values]
    top = 100 * first[0] if first else 100.0
    ends = ((0.0, 100.0), _ends([*best, top]))
    titles = [f"{p['file']}: {a:.1f} % of the {UNITS[kind]}, {b:.2f} % {name}" for p, a, b in zip(points, x, best, strict=True)]
    lit = [bool(p["pareto"]) for p in points]
    picture = curve(list(zip(x, best, strict=True)), lit, titles, ends, f"{name} against {UNITS[kind]}", mark=top)
    low, high = ends[1]
    ticks = [tag("span", f"{high - i * (high - low) / 4:g}") for i in range(5)]
    return tag(
        "div",
        tag(
            "div",
            f"{name[0].upper()}{name[1:]}, %" + (f" (dashed: the original, {top:.2f})" if first else " (dashed: the original)"),
            class_="title",
        ),
        tag("div", *ticks, class_="y"),
        picture,
        tag("div", *(tag("span", f"{v}") for v in (0, 25, 50, 75, 100)), class_="x"),
        tag("div", f"{UNITS[kind]} kept, %", class_="below"),
        class_="plot",
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Round ends of an axis with four equal parts around the values."""
    low, high = min(values), max(values)
    for step in (0.25, 0.5, 1.0, 2.0, 2.5, 5.0, 10.0, 12.5, 25.0, 50.0, 100.0, 1000.0):
        bottom = step * (low // step)
        if bottom + 4 * step >= high:
            return bottom, bottom + 4 * step
    return low, high


def _table(points: Sequence[Mapping[str, Any]], here: str | None) -> Html:
    heads = ("network", None), ("MACs", "n"), ("file", "n"), ("top-1", "n"), ("same", "n"), ("moved", "n"), ("changes ≤", "n")
    head = tag("tr", *(tag("th", h, class_=c, scope="col") for h, c in heads))
    return tag("table", tag("thead", head), tag("tbody", *(_row(p, here) for p in points)), class_="points")


def _row(p: Mapping[str, Any], here: str | None) -> Html:
    found, bound = p["validation"], p["population"]["changes"]
    mark = " (this file)" if here is not None and p["digest"] == here else ""
    cells = (
        percent(p["kept"]["macs"], 1),
        f"{number(p['pruned']['bytes'])}B",
        "-" if not found["top1"] else f"{100 * found['top1'][1]:.2f} %",
        "-" if found["agreement"] is None else percent(found["agreement"], 1),
        "-" if found["relative_l2"] is None else f"{found['relative_l2']:#.3g}",
        "-" if bound is None else f"{100 * bound:.2f} %",
    )
    name = tag("th", p["file"], tag("small", mark), scope="row", class_="name")
    labels = ("MACs", "file", "top-1", "same", "moved", "changes ≤")
    return tag("tr", name, *(tag("td", c, class_="n", data_label=h) for c, h in zip(cells, labels, strict=True)))
