#!/usr/bin/env python3
"""Accuracy after pruning, beside Torch-Pruning and onnxsim: same networks, images and seeds; the tables of docs/accuracy.md.

    python tools/bench_accuracy.py measure [--networks resnet20-cifar10 vgg8-fashion] [--who onnxprune torch-pruning onnxsim]
                                           [--macs 0.7 0.5 0.3] [--seeds 0]
    python tools/bench_accuracy.py tune [--networks ...] [--who ...] [--macs 0.5] [--seeds 0] [--epochs 2]
    python tools/bench_accuracy.py report

`measure` cuts and recovers without training: every variant on 1,000 of the test images, then, for each tool, budget and
stage, the one that did best there on all of them. `tune` trains those by `onnxprune.finetune`, whoever has cut them. Both add
lines to build/accuracy/rows.jsonl; `report` makes docs/accuracy.json, docs/accuracy.svg and the tables from it.
Needs `pip install torch torch-pruning onnxsim` for the peers; `--shared` has `models/` and `data/` with the CIFAR-10 networks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
from accuracy import peers, picture
from accuracy.networks import ROOT, Network, accuracy, macs, networks

import onnxprune

OURS = "onnxprune"
WHO = (OURS, peers.TORCH_PRUNING, peers.ONNXSIM)
METHODS = ("obs", "pfp", "l1")
CUT, RECOVERED, TUNED = "cut", "recovered", "tuned"
BUILD = ROOT / "build" / "accuracy"
MISSED = 0.05  # of the MACs, by which a variant may keep more than the budget and still be compared at it
SCREEN = 1000  # test images that every variant is measured on
Row = dict[str, Any]


def ours(network: Network, targets: list[float], calibration: Any, seed: int) -> Iterator[peers.Made]:
    """The methods that are worth comparing; recovery: `lsq`."""
    for target in targets:
        for method in METHODS:

            def made(recover: str, target: float = target, method: str = method) -> onnx.ModelProto:
                data = {network.input: calibration[0]}
                options = {"method": method, "recover": recover, "samples": len(calibration[0]), "seed": seed}
                return onnxprune.prune(network.path, data, budget={"macs": target}, **options).model

            cut = made("none")
            yield method, macs(cut) / network.macs, cut, lambda made=made: made("lsq")


def measure(network: Network, who: str, target: float, seed: int, threads: int) -> None:
    """All variants of one tool at one budget, and the best of either stage on all test images."""
    makers: dict[str, Callable[..., Iterator[peers.Made]]] = {
        OURS: ours,
        peers.TORCH_PRUNING: peers.torch_pruning,
        peers.ONNXSIM: peers.onnxsim,
    }
    best: dict[str, tuple[Row, onnx.ModelProto]] = {}
    every = max(1, len(network.testing[0]) // SCREEN)
    for method, kept, cut, recover in makers[who](network, [target], network.calibrating(seed), seed):
        for stage, model in ((CUT, cut), (RECOVERED, recover() if recover else None)):
            if model is None:
                continue
            row = {"network": network.name, "who": who, "method": method, "target": target, "seed": seed, "stage": stage}
            row |= {"macs": round(kept, 4), "images": "some", "accuracy": accuracy(model, network, threads, every)}
            write(row)
            if kept <= target + MISSED and (stage not in best or row["accuracy"] > best[stage][0]["accuracy"]):
                best[stage] = row, model
    for stage, (row, model) in best.items():
        write({**row, "images": "all", "accuracy": accuracy(model, network, threads)})
        if stage == RECOVERED:
            path = BUILD / f"{network.name}.{who}.{target}.{seed}.onnx"
            onnx.save(model, path)
            path.with_suffix(".json").write_text(json.dumps(row))


def tune(network: Network, who: str, target: float, seed: int, epochs: int, threads: int) -> None:
    """Two epochs or so for the recovered network of one tool: distillation from the original, the same for all tools."""
    path = BUILD / f"{network.name}.{who}.{target}.{seed}.onnx"
    if network.train is None or not path.exists():
        print(f"{network.name}: there is {'no training set' if network.train is None else f'no {path}: measure first'}")
        return
    start = cpu()
    training = onnxprune.Training(epochs=epochs, seed=seed)
    done = onnxprune.finetune(path, network.path, network.train, training=training, images=network.images, seed=seed)
    seconds = round(cpu() - start)
    row = json.loads(path.with_suffix(".json").read_text())
    onnx.save(done.model, path.with_suffix(f".tuned{epochs}.onnx"))
    found = accuracy(done.model, network, threads)
    write({**row, "images": "all", "stage": TUNED, "accuracy": found, "epochs": epochs, "cpu_seconds": seconds})


def cpu() -> float:
    """Processor time of this process in seconds."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def write(row: Row) -> None:
    """One line of rows.jsonl, which several processes may add to."""
    line = json.dumps(row)
    print(line, flush=True)
    with os.fdopen(os.open(BUILD / "rows.jsonl", os.O_APPEND | os.O_CREAT | os.O_WRONLY, 0o644), "w") as file:
        file.write(line + "\n")


def rows() -> list[Row]:
    """What was measured, the last of each kind."""
    file = BUILD / "rows.jsonl"
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    key = ("network", "who", "method", "target", "seed", "stage", "images")
    return list({(*(row[k] for k in key), row.get("epochs")): row for row in found}.values())


# ----------------------------------------------------------------------------------------------------------------- report


def report(known: dict[str, Network], threads: int) -> None:
    """Writes the data and the picture, prints the tables."""
    docs, found = ROOT / "docs", rows()
    bases = {name: before(known[name], threads) for name in dict.fromkeys(row["network"] for row in found)}
    (docs / "accuracy.json").write_text(json.dumps({"original": bases, "rows": found}, indent=0) + "\n")
    (docs / "accuracy.svg").write_text(picture.svg(bases, best(found)))
    for name, base in bases.items():
        print(f"\n### {name}: {base:.2f} % before\n")
        print(table([row for row in best(found) if row["network"] == name]))
        print(variants([row for row in found if row["network"] == name and row["images"] == "some"]))


def before(network: Network, threads: int) -> float:
    """The original's accuracy, measured once."""
    kept = BUILD / f"{network.name}.before"
    if not kept.exists():
        kept.write_text(str(accuracy(network.model, network, threads)))
    return float(kept.read_text())


def table(found: list[Row]) -> str:
    """The best of each tool, all test images."""
    lines = ["| MACs kept | tool | cut only | recovered without training | after fine-tuning |", "| --- " * 5 + "|"]
    for target in sorted({row["target"] for row in found}, reverse=True):
        for who in WHO:
            of = [row for row in found if (row["target"], row["who"]) == (target, who)]
            cells = [cell([row for row in of if row["stage"] == stage]) for stage in STAGES]
            lines.append(f"| {target} | {who} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


STAGES = (CUT, RECOVERED, TUNED)


def best(found: list[Row]) -> list[Row]:
    """The best row on all images for each tool, budget, stage, seed and number of epochs."""
    rising = sorted((row for row in found if row["images"] == "all"), key=lambda row: row["accuracy"])
    key = ("network", "who", "target", "stage", "seed")
    return list({(*(row[k] for k in key), row.get("epochs")): row for row in rising}.values())


def cell(found: list[Row]) -> str:
    """Accuracy (over seeds the mean and the spread), by what, at how many MACs."""
    if not found:
        return "-"
    lengths = sorted({row.get("epochs", 0) for row in found})
    if len(lengths) > 1:
        return " / ".join(cell([row for row in found if row.get("epochs", 0) == length]) for length in lengths)
    values = [row["accuracy"] for row in found]
    spread = "" if len(values) == 1 else f" ({min(values):.2f} - {max(values):.2f}, {len(values)} seeds)"
    how = "; ".join(dict.fromkeys(row["method"] for row in found))
    kept = statistics.mean(row["macs"] for row in found)
    how += f"; epochs: {lengths[0]}" if lengths[0] else ""
    return f"{statistics.mean(values):.2f}{spread} ({how}; {kept:.3f})"


def variants(found: list[Row]) -> str:
    """Every variant, 1,000 of the test images, first seed."""
    targets = sorted({row["target"] for row in found}, reverse=True)
    lines = [
        "| tool | variant | " + " | ".join(f"{t}: cut / recovered" for t in targets) + " |",
        "| --- " * (len(targets) + 2) + "|",
    ]
    first = min((row["seed"] for row in found), default=0)
    held = {(r["who"], r["method"], r["target"], r["stage"]): r["accuracy"] for r in found if r["seed"] == first}
    for who, method in sorted({(w, m) for w, m, _, _ in held}, key=lambda pair: (WHO.index(pair[0]), pair[1])):
        cells = []
        for target in targets:
            values = [held.get((who, method, target, stage)) for stage in (CUT, RECOVERED)]
            cells.append(" / ".join("-" if v is None else f"{v:.1f}" for v in values))
        lines.append(f"| {who} | {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "tune", "report"))
    parser.add_argument("--networks", nargs="+", default=["resnet20-cifar10"])
    parser.add_argument("--who", nargs="+", choices=WHO, default=list(WHO))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    args = parser.parse_args()
    known = networks(args.shared)
    BUILD.mkdir(parents=True, exist_ok=True)
    if args.what == "report":
        report(known, args.threads)
        return
    lacking = {who: line for who in args.who if (line := peers.missing(who))}
    print("".join(f"{line}\n" for line in lacking.values()), end="")
    for name in args.networks:
        for seed in args.seeds:
            for target in args.macs:
                for who in args.who:
                    if args.what == "tune":
                        tune(known[name], who, target, seed, args.epochs, args.threads)
                    elif who not in lacking:
                        measure(known[name], who, target, seed, args.threads)


if __name__ == "__main__":
    main()
