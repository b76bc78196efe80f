"""A sweep as plain dictionaries: what every network of it came to, and which of them nothing else beats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SIZES = ("macs", "params", "bytes")


def point(report: Mapping[str, Any], file: str) -> dict[str, Any]:
    """One network of a sweep, from its report. file: its name beside `sweep.json`."""
    return {
        "file": file,
        "budget": report["budget"],
        "digest": report["digests"]["pruned"],
        "pruned": report["pruned"],
        "kept": {k: report["pruned"][k] / report["original"][k] if report["original"][k] else 1.0 for k in SIZES},
        "method": report["method"],
        "recover": report["recover"],
        "validation": {k: report["validation"][k] for k in ("samples", "top1", "agreement", "relative_l2")},
        "population": certified(report["certificate"]),
        "seconds": sum(report["seconds"].values()),
    }


def certified(certificate: Mapping[str, Any] | None) -> dict[str, float | None]:
    """The bounds of the part `population`: changes, drop (fractions), moved (relative L2 of 90 % of inputs); None for none."""
    found: dict[str, float | None] = {"changes": None, "drop": None, "moved": None}
    part = (certificate or {}).get("population") or {}
    for s in part.get("statements") or () if part.get("applies") else ():
        if s["kind"] == "top1_changes":
            found["changes"] = s["alpha"]
        elif s["kind"] == "top1_drop":
            found["drop"] = s["drop"]
        elif found["moved"] is None:
            found["moved"] = s["x"]
    return found


def quality(points: Sequence[Mapping[str, Any]]) -> tuple[str, list[float] | None]:
    """(what the networks are compared by, its values, more is better): top-1 accuracy, else agreement, else nearness."""
    found = [p["validation"] for p in points]
    if found and all(v["top1"] for v in found):
        return "top-1 accuracy", [float(v["top1"][1]) for v in found]
    if found and all(v["agreement"] is not None for v in found):
        return "same answer as the original", [float(v["agreement"]) for v in found]
    if found and all(v["relative_l2"] is not None for v in found):
        return "1 - relative L2 of the outputs", [1 - float(v["relative_l2"]) for v in found]
    return "nothing measured", None


def marked(points: Sequence[Mapping[str, Any]], kind: str) -> list[dict[str, Any]]:
    """The points, and whether each is on the Pareto front: no other is as small (by `kind`) and as good, and better in one."""
    _, values = quality(points)
    at = [(p["pruned"][kind], -values[i] if values else 0.0) for i, p in enumerate(points)]

    def beaten(i: int) -> bool:
        return any(a <= at[i][0] and b <= at[i][1] and (a, b) != at[i] for a, b in at)

    return [{**p, "pareto": not beaten(i)} for i, p in enumerate(points)]
