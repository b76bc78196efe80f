"""Accuracy over MACs kept, as an SVG drawn by hand: one panel for each network."""

from __future__ import annotations

from typing import Any

WIDTH, HEIGHT, GAP, LEFT, TOP = 300, 240, 46, 44, 34
COLOURS = {"onnxprune": "#0b6e4f", "torch-pruning": "#c8553d", "onnxsim": "#4062bb"}
DASHES = {"cut": "2 4", "recovered": "", "tuned": "8 3"}
MEANING = {"cut": "cut only", "recovered": "recovered without training", "tuned": "fine-tuned"}


def svg(bases: dict[str, float], rows: list[dict[str, Any]]) -> str:
    """`rows` have network, who, stage, macs (fraction) and accuracy (per cent); `bases`: accuracy before, by network."""
    across = max(1, len(bases)) * (WIDTH + GAP) + LEFT
    parts = [_panel(i, name, base, [r for r in rows if r["network"] == name]) for i, (name, base) in enumerate(bases.items())]
    height = TOP + HEIGHT + 44 + 18 * 3
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across} {height}" font-family="sans-serif" font-size="11">'
    return "\n".join([head, f'<rect width="{across}" height="{height}" fill="#fff"/>', *parts, _legend(), "</svg>"]) + "\n"


def _panel(i: int, name: str, base: float, rows: list[dict[str, Any]]) -> str:
    left = LEFT + i * (WIDTH + GAP)
    parts = [f'<text x="{left}" y="{TOP - 12}" font-weight="bold">{name}, {base:.2f} % before</text>']
    for tick in range(0, 101, 20):
        y = _y(tick)
        parts.append(
            f'<path d="M{left} {y}h{WIDTH}" stroke="#ddd"/><text x="{left - 6}" y="{y + 4}" text-anchor="end">{tick}</text>'
        )
    for tick in (0.3, 0.5, 0.7, 1.0):
        x = _x(left, tick)
        label = f'<text x="{x}" y="{TOP + HEIGHT + 15}" text-anchor="middle">{tick}</text>'
        parts.append(f'<path d="M{x} {TOP}v{HEIGHT}" stroke="#eee"/>{label}')
    for who, colour in COLOURS.items():
        for stage, dash in DASHES.items():
            points = sorted((r["macs"], r["accuracy"]) for r in rows if (r["who"], r["stage"]) == (who, stage))
            if points:
                parts.append(_line(left, [*points, (1.0, base)], colour, dash))
    return "\n".join(parts)


def _line(left: float, points: list[tuple[float, float]], colour: str, dash: str) -> str:
    where = " ".join(f"{_x(left, m):.1f},{_y(a):.1f}" for m, a in points)
    dots = "".join(f'<circle cx="{_x(left, m):.1f}" cy="{_y(a):.1f}" r="3" fill="{colour}"/>' for m, a in points[:-1])
    return f'<polyline points="{where}" fill="none" stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dash}"/>{dots}'


def _legend() -> str:
    y, parts = (
        TOP + HEIGHT + 36,
        [f'<text x="{LEFT}" y="{TOP + HEIGHT + 34}">top-1 in per cent over the fraction of MACs kept</text>'],
    )
    for row, (who, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{LEFT}" y="{y + 16 * (row + 1)}" fill="{colour}" font-weight="bold">{who}</text>')
    for row, (stage, dash) in enumerate(DASHES.items()):
        line = y + 16 * (row + 1)
        parts.append(f'<path d="M{LEFT + 110} {line - 4}h34" stroke="#333" stroke-width="1.6" stroke-dasharray="{dash}"/>')
        parts.append(f'<text x="{LEFT + 150}" y="{line}">{MEANING[stage]}</text>')
    return "\n".join(parts)


def _x(left: float, kept: float) -> float:
    return left + (kept - 0.2) / 0.85 * WIDTH


def _y(accuracy: float) -> float:
    return TOP + HEIGHT * (1 - accuracy / 100)
