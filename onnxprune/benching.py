"""The command `onnxprune bench`: its options, and its way to the library and the terminal."""

from __future__ import annotations

import argparse
import json

from rich.console import Console

from onnxprune.bench import bench
from onnxprune.data import ImageOptions
from onnxprune.report import terminal
from onnxprune.report.bench import bench as show


def arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `onnxprune bench`, but for those of the sample data."""
    parser.add_argument("models", nargs="+", metavar="MODEL", help="the first one is what the others are compared with")
    group = parser.add_argument_group("how to measure")
    group.add_argument("--batch", type=int, metavar="N", help="samples for one run, where the models leave it open (default 1)")
    group.add_argument("--threads", type=int, metavar="N", help="threads within an operator (default: all processors)")
    group.add_argument("--providers", default="cpu", help="execution providers in order, e.g. cuda,cpu")
    group.add_argument(
        "--shape", action="append", default=[], metavar="[NAME=]N,C,H,W", help="size of an open input; repeatable"
    )
    group.add_argument("--seconds", type=float, default=10.0, metavar="S", help="at most, for every model (default 10)")
    group.add_argument("--profile", action="store_true", help="time by operator, and why a model is slower than its MACs")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace, console: Console, images: ImageOptions) -> None:
    """onnxprune bench."""
    with terminal.progress(args.quiet) as tell:
        report = bench(
            args.models,
            batch=args.batch,
            threads=args.threads,
            providers=[p.strip() for p in args.providers.split(",") if p.strip()],
            data=args.data,
            images=images,
            shape=args.shape,
            profile=args.profile,
            limit=args.seconds,
            progress=tell,
        )
    if args.json:
        print(json.dumps(report, indent=1))
        return
    show(console, report, verbose=args.verbose)
