#!/usr/bin/env python3
"""Measure what pruning does to the models that ship with onnxprune; prints the table of the README.

    python tools/results.py [--macs 0.9 0.7 0.5] [--methods pfp obs l1 random] [--recover none lsq]
    python tools/results.py --certified    # what the certificates say, by default and without a recovery

No training. Accuracy is top-1 on the 2,000 test images in models/fashion-mnist.npz.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import onnxprune

SAMPLES = 84  # what the theory asks for; by default more would calibrate where weights are learnt
MODELS = Path(__file__).resolve().parent.parent / "models"


def row(model: Path, data: Path, macs: float, method: str, recover: str) -> str:
    """One line of the table."""
    start = time.perf_counter()
    report = onnxprune.prune(model, data, budget={"macs": macs}, method=method, recover=recover, samples=SAMPLES).report
    seconds = time.perf_counter() - start
    before, after = report["original"], report["pruned"]
    found = report["validation"]
    top1, error = found["top1"], found["masked_max_relative_error"]
    return (
        f"| {model.stem} | {after['macs'] / before['macs']:.3f} | {method} | {report['recover']} "
        f"| {100 * top1[0]:.2f} % | {100 * top1[1]:.2f} % | {error:.0e} | {seconds:.0f} |"
    )


def certified_row(model: Path, data: Path, macs: float, options: dict[str, str]) -> str:
    """One line of the table of certificates: what was measured on the held-out images, and what holds for all inputs."""
    result = onnxprune.prune(model, data, budget={"macs": macs}, samples=SAMPLES, **options)
    report, parts = result.report, result.certificate
    assert parts is not None
    population = parts["population"]
    found = {s["kind"]: s for s in population["statements"]}
    top1, changed = report["validation"]["top1"], found["top1_changes"]
    bounds = [layer["bound"] for layer in parts["calibration"]["layers"].values()] if parts["calibration"]["applies"] else []
    return (
        f"| {model.stem} | {macs} | {parts['recover']} | {100 * top1[0]:.2f} % -> {100 * top1[1]:.2f} % "
        f"| {100 * (top1[0] - top1[1]):.2f} | {100 * found['top1_drop']['drop']:.1f} "
        f"| {100 * changed['changed'] / population['samples']:.1f} % | {100 * changed['alpha']:.1f} % "
        f"| {f'{sorted(bounds)[len(bounds) // 2]:.2f}' if bounds else 'does not apply'} |"
    )


def certificates(models: list[Path], macs: list[float]) -> None:
    """The table of certificates."""
    print(
        "| model | MACs kept | recovery | top-1 | points lost | at most | answers changed | at most | median bound of layers |"
    )
    print("| --- " * 9 + "|")
    everything: list[dict[str, str]] = [{}, {"recover": "none"}]
    for model in models:
        for share in macs:
            for options in everything:
                print(certified_row(model, MODELS / "fashion-mnist.npz", share, options), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    parser.add_argument("--methods", nargs="+", default=["pfp", "obs", "l1", "random"])
    parser.add_argument("--recover", nargs="+", default=["none", "lsq"])
    parser.add_argument("--certified", action="store_true")
    args = parser.parse_args()
    if args.certified:
        certificates(sorted(MODELS.glob("*.onnx")), args.macs)
        return
    print("| model | MACs kept | method | recovery | top-1 before | after | oracle error of the cut | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in sorted(MODELS.glob("*.onnx")):
        for macs in args.macs:
            for recover in args.recover:
                for method in args.methods:
                    print(row(model, MODELS / "fashion-mnist.npz", macs, method, recover), flush=True)


if __name__ == "__main__":
    main()
