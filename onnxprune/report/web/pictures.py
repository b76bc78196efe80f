"""Pictures in SVG without text in them, so that they stretch to any width; words and numbers stand beside them in HTML."""

from __future__ import annotations

import math
from collections.abc import Sequence

from onnxprune.report.web.html import Html, join, tag

Pair = tuple[float, float]
"""(before, after)."""


def _canvas(width: float, height: float, *shapes: Html, label: str, class_: str) -> Html:
    """A picture that fills its box in both directions. label: what those hear who cannot see it."""
    box = f"0 0 {width:.6g} {height:.6g}"
    return tag("svg", *shapes, viewBox=box, preserveAspectRatio="none", class_=class_, role="img", aria_label=label)


def skyline(pairs: Sequence[Pair], titles: Sequence[str], label: str) -> Html:
    """A column for every layer, in order: its height before, and filled as high as it is after."""
    top = max((max(p) for p in pairs), default=0) or 1
    shapes = []
    for i, ((before, after), title) in enumerate(zip(pairs, titles, strict=True)):
        columns = [("before", before), ("after", after)]
        bars = [_column(i, 100 * v / top, kind) for kind, v in columns if v]
        shapes.append(tag("g", tag("title", title), tag("rect", x=i, y=0, width=1, height=100, class_="hit"), *bars))
    return _canvas(max(1, len(pairs)), 100, *shapes, label=label, class_="skyline")


def _column(i: int, height: float, kind: str) -> Html:
    return tag("rect", x=i + 0.12, y=100 - height, width=0.76, height=height, class_=kind)


def bar(pair: Pair, most: float, label: str) -> Html:
    """Two bars from the left, one on the other: before, and after. most: what fills the whole width."""
    before, after = (100 * v / most if most else 0.0 for v in pair)
    shapes = [tag("rect", x=0, y=0, width=before, height=10, class_="before")]
    shapes.append(tag("rect", x=0, y=2, width=after, height=6, class_="after"))
    return _canvas(100, 10, *shapes, label=label, class_="bar")


def strip(parts: Sequence[tuple[str, Sequence[float] | None]], low: float, high: float, label: str) -> Html:
    """Distributions under each other, on a logarithmic axis from low to high: range, middle half, median.

    parts: (class, the quantiles 0, 5, 25, 50, 75, 95, 100 %). What is 0 stands at the left edge.
    """
    shapes = []
    for row, (kind, levels) in enumerate(parts):
        if levels is None:
            continue
        y = 10 * row
        x = [place(v, low, high) for v in levels]
        shapes.append(tag("rect", x=x[0], y=y + 4.5, width=max(0.4, x[6] - x[0]), height=1, class_=kind))
        shapes.append(tag("rect", x=x[2], y=y + 2, width=max(0.4, x[4] - x[2]), height=6, class_=f"{kind} half"))
        shapes.append(tag("rect", x=min(99.2, max(0.0, x[3] - 0.4)), y=y + 1, width=0.8, height=8, class_=kind))
    return _canvas(100, 10 * len(parts), *shapes, label=label, class_="strip")


def place(value: float, low: float, high: float) -> float:
    """Where a value stands on a logarithmic axis of 0 to 100."""
    if value <= low or high <= low:
        return 0.0
    return min(100.0, 100 * math.log(value / low) / math.log(high / low))


def curve(
    points: Sequence[Pair], lit: Sequence[bool], titles: Sequence[str], frame: tuple[Pair, Pair], label: str, mark: float
) -> Html:
    """Points in a frame ((lowest x, highest x), (lowest y, highest y)); those that are lit are joined.

    mark: the height of a dashed line across.
    """
    (left, right), (bottom, top) = frame
    at = [(_scaled(x, left, right), 100 - _scaled(y, bottom, top)) for x, y in points]
    front = sorted(p for p, on in zip(at, lit, strict=True) if on)
    lines = [tag("line", x1=0, x2=100, y1=y, y2=y, class_="grid") for y in (0, 25, 50, 75, 100)]
    level = 100 - _scaled(mark, bottom, top)
    lines.append(tag("line", x1=0, x2=100, y1=level, y2=level, class_="mark"))
    lines.append(tag("polyline", points=" ".join(f"{x:.2f},{y:.2f}" for x, y in front), class_="front"))
    # A line of no length with round ends is a dot that does not stretch with the picture.
    for (x, y), on, title in zip(at, lit, titles, strict=True):
        shape = {"d": f"M{x:.2f} {y:.2f}h0", "class_": "dot lit" if on else "dot"}
        lines.append(tag("path", tag("title", title), **shape))
    return _canvas(100, 100, join(*lines), label=label, class_="curve")


def _scaled(value: float, low: float, high: float) -> float:
    return 50.0 if high <= low else 100 * (value - low) / (high - low)
