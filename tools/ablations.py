#!/usr/bin/env python3
"""Measure what the parts of `--method obs` and of recovery are worth, on one model; prints a table.

    python tools/ablations.py models/resnet20.onnx --data models/fashion-mnist.npz [--macs 0.7 0.5 0.3] [--samples 512]
    python tools/ablations.py models/resnet20.onnx --data models/fashion-mnist.npz --grid --macs 0.5

`--grid`: every criterion, with its own allocation over the layers and with the same share of channels everywhere, and
every recovery after each. Without it the parts of obs: channels chosen with all layers' errors alike, with the influence of
layers on the outputs, and with that and with care for few rows (what the command does), each recovered by least squares;
then the last of them with every other recovery. Accuracy, or agreement with the original where there are no labels, on the
held-out samples of the data, or on --validation.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import onnxprune
from onnxprune import decide, elimination, scoring
from onnxprune.data import ImageOptions
from onnxprune.selection import Selector

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


CRITERIA = ("obs", "pfp-deterministic", "l1", "random")
RECOVERIES = ("none", "bias", "rescale", "bn", "linear", "lsq")


class Uniform(Selector):
    """The same share of every group, the channels with the largest scores."""

    def __init__(self, groups: Any, saliency: Any, method: Any, **others: Any) -> None:
        super().__init__(groups, saliency, "top", **others)


@contextmanager
def parts(influence: bool, shrinking: float) -> Iterator[None]:
    """Elimination with some of its parts only."""

    def alike(net: Any, layers: Any, batches: Any, **_: Any) -> dict[Any, float]:
        return dict.fromkeys(layers, 1.0)

    measured = scoring.influences if influence else alike
    with mock.patch.object(scoring, "influences", measured), mock.patch.object(elimination, "SHRINKING", shrinking):
        yield


def grid(args: argparse.Namespace, macs: float) -> None:
    """A table at one budget; l1 and random have no allocation of their own."""
    print(f"\n{macs:g} of the MACs\n\n| criterion | allocation | " + " | ".join(RECOVERIES) + " |")
    print("| --- | --- |" + " --- |" * len(RECOVERIES))
    for method in CRITERIA:
        for allocation in ("its own", "same share")[method in ("l1", "random") :]:
            with mock.patch.object(decide, "Selector", Selector if allocation == "its own" else Uniform):
                cells = [cell(args, macs, how, method) for how in RECOVERIES]
            print(f"| `{method}` | {allocation} | " + " | ".join(cells) + " |", flush=True)


def cell(args: argparse.Namespace, macs: float, how: str, method: str = "obs") -> str:
    images = ImageOptions(mean=tuple(args.mean) or None, std=tuple(args.std) or None, scale=args.scale)
    result = onnxprune.prune(
        args.model,
        args.data,
        validation=args.validation,
        budget={"macs": macs},
        method=method,
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
    parser.add_argument("--grid", action="store_true")
    args = parser.parse_args()
    if args.grid:
        for macs in args.macs:
            grid(args, macs)
        return
    print("| channels chosen | recovery | " + " | ".join(f"MACs {m:g}" for m in args.macs) + " |")
    print("| --- | --- |" + " --- |" * len(args.macs))
    for name, influence, shrinking, how in ROWS:
        with parts(influence, shrinking):
            cells = [cell(args, macs, how) for macs in args.macs]
        print(f"| {name} | {how} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
