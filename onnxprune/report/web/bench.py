"""Measured time, where `onnxprune bench --json` told of it: of the models, and of their kernels by kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from onnxprune.report.web.html import Html, tag
from onnxprune.report.web.pictures import bar

MOST = 16  # kinds of kernels that are shown


def bench(told: Mapping[str, Any]) -> Html:
    """Latency of every model, and where the time of the last one goes."""
    heads = ("model", None), ("latency", "n"), ("speed-up", "n"), ("", "wide")
    longest = max(m["latency"]["median"] for m in told["models"])
    first = told["models"][0]["latency"]["median"]
    rows = [
        tag(
            "tr",
            tag("th", _name(m["model"]), scope="row", class_="name"),
            tag("td", _time(m["latency"]["median"]), class_="n"),
            tag("td", f"{m.get('speedup') or first / m['latency']['median']:.2f}", class_="n"),
            tag("td", bar((longest, m["latency"]["median"]), longest, _time(m["latency"]["median"])), class_="wide"),
        )
        for m in told["models"]
    ]
    head = tag("tr", *(tag("th", h, class_=c, scope="col") for h, c in heads))
    table = tag("table", tag("thead", head), tag("tbody", *rows), class_="numbers")
    where = " ".join(str(p).removesuffix("ExecutionProvider") for p in told.get("providers", ()))
    threads = told.get("threads", "?")
    many = "1 thread" if threads == 1 else f"{threads} threads"
    said = f"ONNX Runtime, {where}, {many}, batch {told.get('batch', '?')}; medians."
    return tag("section", tag("h2", "Time"), table, tag("p", said, class_="caption"), _kinds(told), _nodes(told))


def _kinds(told: Mapping[str, Any]) -> Html | None:
    """Time by kind of kernel, before and after, and why it is more than its share of the work."""
    last = next((p for p in reversed(told.get("profile") or ()) if p.get("shortfall")), None)
    if last is None:
        return None
    found = sorted(last["shortfall"], key=lambda c: -max(c["before"], c["after"]))[:MOST]
    most = max(max(c["before"], c["after"]) for c in found)
    rows = [
        tag(
            "tr",
            tag("th", c["kind"], *((tag("small", f" {c['why']}"),) if c["why"] else ()), scope="row"),
            tag("td", f"{_time(c['before'])} → {_time(c['after'])}", class_="n"),
            tag("td", bar((c["before"], c["after"]), most, c["kind"]), class_="wide"),
        )
        for c in found
    ]
    heads = ("kind of kernel", None), ("time", "n"), ("", "wide")
    head = tag("tr", *(tag("th", h, class_=c, scope="col") for h, c in heads))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="numbers kinds")


def _nodes(told: Mapping[str, Any]) -> Html | None:
    """The slowest layers of the last model, and what they took in the first where they are among its slowest too."""
    profile: list[Any] = list(told.get("profile") or ())
    if len(profile) < 2 or not profile[-1].get("nodes"):
        return None
    first: dict[str, float] = {_layer(n["node"]): n["seconds"] for n in profile[0].get("nodes") or ()}
    slow = [(_layer(n["node"]), n["kind"], n["seconds"]) for n in profile[-1]["nodes"]]
    found = [(name, kind, first.get(name), seconds) for name, kind, seconds in slow]
    most = max(max(before or 0, after) for _, _, before, after in found)
    rows = [
        tag(
            "tr",
            tag("th", name, " ", tag("small", kind), scope="row", class_="name"),
            tag("td", _time(after) if before is None else f"{_time(before)} → {_time(after)}", class_="n"),
            tag("td", bar((before or 0, after), most, name), class_="wide"),
        )
        for name, kind, before, after in found
    ]
    heads = ("slowest layers", None), ("time", "n"), ("", "wide")
    head = tag("tr", *(tag("th", h, class_=c, scope="col") for h, c in heads))
    return tag("table", tag("thead", head), tag("tbody", *rows), class_="numbers nodes")


def _layer(node: str) -> str:
    """The name that a node has in the file; ONNX Runtime adds to it where it changes the layout."""
    return node.removesuffix("_nchwc")


def _name(path: str) -> str:
    return path.replace("\\", "/").rsplit("/", 1)[-1]


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"
