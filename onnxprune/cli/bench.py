"""`onnxprune bench`: latency, memory and size of models, side by side."""

from __future__ import annotations

import argparse

from onnxprune.bench import bench as measure
from onnxprune.cli import arguments, shared
from onnxprune.report.bench import bench as show
from onnxprune.report.progress import progress


def register(add: arguments.Add) -> None:
    parser = add("bench", "latency, memory and size of models, side by side in ONNX Runtime", bench)
    _arguments(parser)
    arguments.data(parser)


def _arguments(parser: arguments.Parser) -> None:
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


def bench(args: argparse.Namespace) -> None:
    """onnxprune bench."""
    with progress(args.quiet) as tell:
        report = measure(
            args.models,
            batch=args.batch,
            threads=args.threads,
            providers=[p.strip() for p in args.providers.split(",") if p.strip()],
            data=args.data,
            images=shared.images(args),
            shape=args.shape,
            profile=args.profile,
            limit=args.seconds,
            progress=tell,
        )
    if args.json:
        shared.print_json(report)
        return
    show(shared.console(args), report, verbose=args.verbose)
