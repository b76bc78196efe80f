#!/usr/bin/env python3
"""Measure what pruning does to the models that ship with onnxprune; prints the table of the README.

    python tools/results.py [--macs 0.9 0.7 0.5] [--methods pfp obs l1 random] [--recover none lsq]

No training. Accuracy is top-1 on the 2,000 test images in models/fashion-mnist.npz.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import onnxprune

MODELS = Path(__file__).resolve().parent.parent / "models"


def row(model: Path, data: Path, macs: float, method: str, recover: str) -> str:
    """One line of the table."""
    start = time.perf_counter()
    report = onnxprune.prune(model, data, budget={"macs": macs}, method=method, recover=recover).report
    seconds = time.perf_counter() - start
    before, after = report["original"], report["pruned"]
    found = report["validation"]
    top1, error = found["top1"], found["masked_max_relative_error"]
    return (
        f"| {model.stem} | {after['macs'] / before['macs']:.3f} | {method} | {report['recover']} "
        f"| {100 * top1[0]:.2f} % | {100 * top1[1]:.2f} % | {error:.0e} | {seconds:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--macs", type=float, nargs="+", default=[0.9, 0.7, 0.5])
    parser.add_argument("--methods", nargs="+", default=["pfp", "obs", "l1", "random"])
    parser.add_argument("--recover", nargs="+", default=["none", "lsq"])
    args = parser.parse_args()
    print("| model | MACs kept | method | recovery | top-1 before | after | oracle error of the cut | seconds |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for model in sorted(MODELS.glob("*.onnx")):
        for macs in args.macs:
            for recover in args.recover:
                for method in args.methods:
                    print(row(model, MODELS / "fashion-mnist.npz", macs, method, recover), flush=True)


if __name__ == "__main__":
    main()
