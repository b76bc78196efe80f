"""What `onnxprune bench` prints: models side by side, then time by operator, and why time and MACs differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from onnxprune.report.terminal import escape, table
from onnxprune.report.words import number

ROOMY = 76  # columns that all of the first table takes
FEW = 8  # kinds of kernels that are listed unless asked for more


def seconds(value: float) -> str:
    """0.0123 -> 12.3 ms."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value * 1e6:.3g} us"


def bench(console: Console, report: Mapping[str, Any], *, verbose: bool = False) -> None:
    """The report of `onnxprune.bench.bench` in tables that fit the terminal."""
    names = _names([m["model"] for m in report["models"]])
    roomy = console.width >= ROOMY
    rows = []
    for name, m in zip(names, report["models"], strict=True):
        latency = m["latency"]
        quartiles = [f"{seconds(latency['low'])} - {seconds(latency['high'])}"] if roomy else []
        memory = "-" if m["peak_memory"] is None else number(m["peak_memory"]) + "B"
        rows.append(
            (name, seconds(latency["median"]), *quartiles, f"{m['speedup']:.2f}x", number(round(m["throughput"], 1)), memory)
        )
    headers = ("model", "latency", *(["quartiles"] if roomy else []), "speed", "samples/s", "memory")
    table(console, headers, rows)
    console.print()
    sizes = [
        (name, number(m["macs"]), _share(m["macs_ratio"]), number(m["params"]), number(m["bytes"]) + "B")
        for name, m in zip(names, report["models"], strict=True)
    ]
    table(console, ("model", "MACs", "of first", "parameters", "file"), sizes)
    providers = ", ".join(p.removesuffix("ExecutionProvider") for p in report["providers"])
    plural = "" if report["threads"] == 1 else "s"
    console.print(
        f"\nmedians of {report['rounds']} rounds in turn, batch {report['batch']}, "
        f"{report['threads']} thread{plural}, {providers}; "
        "speed: median over rounds of the first model's time by this one's; memory: peak beyond an idle process"
    )
    for name, profile in zip(names, report.get("profile", ()), strict=False):
        _profile(console, name, profile, verbose)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _names(paths: Sequence[str]) -> list[str]:
    """File names, with their folders where those alone would not tell the models apart."""
    short = [Path(p).name for p in paths]
    return short if len(set(short)) == len(short) else list(paths)


def _profile(console: Console, name: str, profile: Mapping[str, Any], verbose: bool) -> None:
    total = sum(k["seconds"] for k in profile["kinds"]) or 1.0
    console.print(f"\n[bold]{escape(name)}[/]: time by operator")
    shown = profile["kinds"][: None if verbose else FEW]
    table(
        console,
        ("operator", "time", "share"),
        [(k["kind"], seconds(k["seconds"]), f"{k['seconds'] / total:.1%}") for k in shown],
    )
    if verbose:
        nodes = [(k["node"], k["kind"], seconds(k["seconds"])) for k in profile["nodes"]]
        table(console, ("slowest nodes", "operator", "time"), nodes)
    if "shortfall" not in profile:
        return
    ratio, macs = profile["ratio"], profile["macs_ratio"]
    if ratio <= macs:
        console.print(f"it takes {ratio:.3f} of the first model's time with {macs:.3f} of the MACs: nothing falls short")
        return
    console.print(f"it takes {ratio:.3f} of the first model's time with {macs:.3f} of the MACs; what did not shrink with them:")
    late = [c for c in profile["shortfall"] if c["why"]]
    rows = [(c["kind"], seconds(c["before"]), seconds(c["after"]), f"+{seconds(c['excess'])}") for c in late]
    table(console, ("operator", "before", "after", "excess"), rows)
    for change in late:
        console.print(f"- {escape(change['kind'])}: {escape(change['why'])}")
