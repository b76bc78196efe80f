#!/usr/bin/env python3
"""Prune every model of a folder at a budget and tell how it went, as a Markdown table.

    python tools/zoo.py FOLDER [FOLDER ...] [--macs 0.7] [--json FILE]

Channels are chosen by filter norm, so that no data is needed: this measures coverage and correctness, not accuracy.
Columns: share of the MACs in layers of which an axis can be pruned; MACs kept; largest relative difference to the
masked original (the oracle); seconds for everything. A budget out of reach is tried again at the smallest reachable one.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import onnxprune
from onnxprune.errors import BudgetError, OnnxPruneError
from onnxprune.imported import load
from onnxprune.report.build import prunable_share


def try_one(path: Path, macs: float) -> dict[str, Any]:
    """What became of one model."""
    start = time.perf_counter()
    row: dict[str, Any] = {"model": path.name}
    try:
        imported = load(path)
        row["nodes"] = len(imported.model.graph.node)
        row["operators"] = len(Counter(n.op_type for n in imported.model.graph.node))
        row["share"] = prunable_share(imported.groups, imported.accounting)[0]
        report = pruned(path, macs, row)
        row["kept"] = report["pruned"]["macs"] / max(1, report["original"]["macs"])
        row["error"] = report["validation"]["masked_max_relative_error"]
        row["result"] = "ok" if not row.get("asked") else f"smallest is {row['asked']:g}"
    except OnnxPruneError as error:
        row["result"] = f"refused: {error}".replace(str(path), path.name)
    except Exception as error:
        row["result"] = f"CRASH {type(error).__name__}: {error}"
    row["seconds"] = time.perf_counter() - start
    return row


def pruned(path: Path, macs: float, row: dict[str, Any]) -> dict[str, Any]:
    try:
        return onnxprune.prune(path, budget={"macs": macs}, method="l2").report
    except BudgetError as error:
        reachable = re.search(r"ask for ([0-9.]+) or more", str(error))
        if reachable is None or float(reachable[1]) >= 1:
            raise
        row["asked"] = float(reachable[1])
        return onnxprune.prune(path, budget={"macs": row["asked"]}, method="l2").report


def line(row: dict[str, Any]) -> str:
    def show(key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    cells = (row["model"], show("nodes", "d"), show("operators", "d"), show("share", ".3f"), show("kept", ".3f"))
    return f"| {' | '.join(cells)} | {show('error', '.0e')} | {row['seconds']:.1f} | {row['result'][:160]} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    print("| model | nodes | operators | prunable share | MACs kept | oracle error | seconds | result |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    rows = []
    for path in sorted(p for f in args.folders for p in f.glob("*.onnx")):
        rows.append(try_one(path, args.macs))
        print(line(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    counts = Counter(r["result"].split(":")[0].split(" is ")[0].split(" ")[0] for r in rows)
    print(f"\n{len(rows)} models: " + ", ".join(f"{n} {k}" for k, n in counts.most_common()))


if __name__ == "__main__":
    main()
