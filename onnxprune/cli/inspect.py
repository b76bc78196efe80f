"""`inspect`: what can be pruned, what cannot, and why."""

from __future__ import annotations

import argparse
from pathlib import Path

from onnxprune.cli import arguments, shared
from onnxprune.cli.arguments import Add
from onnxprune.imported import load
from onnxprune.report import build, terminal
from onnxprune.report.progress import progress
from onnxprune.report.words import number


def register(add: Add) -> None:
    sub = add("inspect", "show the channel groups, which can be pruned, and why the others cannot", inspect)
    arguments.model(sub)


def inspect(args: argparse.Namespace) -> None:
    """onnxprune inspect."""
    about = {"freeze": args.freeze, "shape": args.shape, "attention": args.attention}
    with progress(args.quiet):
        imported = load(args.model, approximate=args.allow_approximate, **about)
    macs, params = build.prunable_share(imported.groups, imported.accounting)
    entries = build.group_entries(imported.groups)
    cost = build.group_macs(imported.groups, imported.accounting)
    for entry in entries:
        entry["macs"] = cost[entry["id"]]
        del entry["kept"], entry["removed"]
    report = {
        "model": Path(args.model).name,
        "macs": imported.size.macs,
        "params": imported.size.params,
        "bytes": imported.size.bytes,
        "prunable": {"macs": macs, "params": params},
        "groups": entries,
    }
    if args.json:
        shared.print_json(report)
        return
    console = shared.console(args)
    shown = [e for e in entries if args.verbose or e["macs"] or not e["frozen"]]
    terminal.groups(console, shown, None if args.verbose else 60)
    free = sum(not e["frozen"] for e in entries)
    size = imported.size
    console.print(
        f"\n[bold]{terminal.escape(Path(args.model).name)}[/]: {number(size.macs)} MACs, {number(size.params)} "
        f"parameters; {free} of {len(entries)} groups can be pruned, with layers that make up {100 * macs:.1f} % of the MACs; "
        f"their tensors hold {100 * params:.1f} % of the parameters"
    )
