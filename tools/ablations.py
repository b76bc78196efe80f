#!/usr/bin/env python3
"""Measure what the parts of `--method obs` and of recovery are worth, on one model; prints a table.

    python tools/ablations.py models/resnet20.onnx --data models/fashion-mnist.npz [--macs 0.7 0.5 0.3] [--samples 512]

Rows: channels chosen with all layers' errors alike, with the influence of layers on the outputs, and with that and with care
for few rows (what the command does), each recovered by least squares; then the last of them with every other recovery.
Accuracy, or agreement with the original where there are no labels, on the held-out samples of the data, or on --validation.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import onnxprune
from onnxprune import elimination, scoring
from onnxprune.data import ImageOptions

SHRINKING = elimination.SHRINKING
ROWS: tuple[tuple[str, bool, float, str], ...] = (
    ("errors alike", False, 0.0, "lsq"),
    ("with influence", True, 0.0, "lsq"),
    ("with care for few rows too", True, SHRINKING, "lsq"),
    ("", True, SHRINKING, "linear"),
    ("", True, SHRINKING, "bn"),
    ("", True, SHRINKING, "rescale"),
    ("", True, SHRINKING, "bias"),
    ("", True, SHRINKING, "none"),
)


@contextmanager
def parts(influence: bool, shrinking: float) -> Iterator[None]:
    """Elimination with some of its parts only."""

    def alike(net: Any, layers: Any, batches: Any, **_: Any) -> dict[Any, float]:
        return dict.fromkeys(layers, 1.0)

    measured = scoring.influences if influence else alike
    with mock.patch.object(scoring, "influences", measured), mock.patch.object(elimination, "SHRINKING", shrinking):
        yield


def cell(args: argparse.Namespace, macs: float, how: str) -> str:
    images = ImageOptions(mean=tuple(args.mean) or None, std=tuple(args.std) or None, scale=args.scale)
    result = onnxprune.prune(
        args.model,
        args.data,
        validation=args.validation,
        budget={"macs": macs},
        method="obs",
        recover=how,
        samples=args.samples,
        images=images,
    )
    found = result.report["validation"]
    return f"{100 * (found['top1'][1] if found['top1'] else found['agreement']):.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--validation")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--mean", type=float, nargs="+", default=[])
    parser.add_argument("--std", type=float, nargs="+", default=[])
    parser.add_argument("--scale", type=float, default=1 / 255)
    args = parser.parse_args()
    print("| channels chosen | recovery | " + " | ".join(f"MACs {m:g}" for m in args.macs) + " |")
    print("| --- | --- |" + " --- |" * len(args.macs))
    for name, influence, shrinking, how in ROWS:
        with parts(influence, shrinking):
            cells = [cell(args, macs, how) for macs in args.macs]
        print(f"| {name} | {how} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
