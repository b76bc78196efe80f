"""`export-trt`: hands a pruned file over to TensorRT."""

from __future__ import annotations

import argparse
from pathlib import Path

from onnxprune import files
from onnxprune.cli import shared
from onnxprune.cli.arguments import Add, Parser
from onnxprune.report.tensorrt import handover
from onnxprune.trt import run
from onnxprune.trt.command import PRECISIONS
from onnxprune.trt.export import LATEST, NEWEST, HandOver, export_trt, installed


def register(add: Add) -> None:
    sub = add(
        "export-trt", "check a model for TensorRT, and write the commands that build, time and compare its engine", export
    )
    sub.add_argument("pruned", metavar="PRUNED", help="the model that an engine is to be built of; any .onnx file will do")
    sub.add_argument("--original", metavar="ORIGINAL", help="what it was pruned from, to build and time it as well")
    sub.add_argument("-o", "--out", metavar="OUT", help="the shell script to write (default: only print)")
    sub.add_argument("--force", action="store_true", help="replace OUT, and with --run engines, if they exist")
    _building(sub)
    _comparing(sub)


def _building(sub: Parser) -> None:
    group = sub.add_argument_group("the engine")
    versions = [int(v) for v in NEWEST]
    group.add_argument(
        "--tensorrt", type=int, choices=versions, help=f"its major version (default: what --run finds, else {LATEST})"
    )
    group.add_argument(
        "--precision", choices=PRECISIONS, default="model", help="model: the types in the file, QDQ pairs included"
    )
    group.add_argument(
        "--shapes",
        action="append",
        default=[],
        metavar="NAME=MIN:OPT:MAX",
        help="of an input with open sizes, e.g. x=1x3x224x224:8x3x224x224:32x3x224x224; repeatable",
    )
    group.add_argument(
        "--batch",
        nargs=3,
        type=int,
        metavar=("MIN", "OPT", "MAX"),
        help="first axis of inputs that leave it open and have no --shapes (default 1 8 32)",
    )
    group.add_argument(
        "--plugin", action="append", default=[], metavar="LIB", help="library with what is no operator of ONNX; repeatable"
    )
    group.add_argument("--engine", metavar="ENGINE", help="the file to build (default: PRUNED with .engine)")


def _comparing(sub: Parser) -> None:
    group = sub.add_argument_group("times and comparison")
    group.add_argument("--run", action="store_true", dest="execute", help="run the commands here, where TensorRT is installed")
    group.add_argument(
        "--val-range", nargs=2, type=float, default=(0.0, 1.0), metavar=("LOW", "HIGH"), help="of random inputs (default 0 1)"
    )
    tolerance = "tolerance (default 0.001; fp16 0.01, quantised 0.1)"
    group.add_argument("--atol", type=float, metavar="A", help=f"absolute {tolerance}")
    group.add_argument("--rtol", type=float, metavar="R", help=f"relative {tolerance}")


def export(args: argparse.Namespace) -> None:
    """onnxprune export-trt."""
    out = None if args.out is None else Path(args.out)
    if out is not None:
        inputs = [args.pruned, args.original, *files.external_files(args.pruned), *args.plugin]
        files.apart([out], [Path(i) for i in inputs if i], Path(args.pruned))
        files.writable(out, force=args.force)
    found = export_trt(
        args.pruned,
        original=args.original,
        engine=args.engine,
        folder=Path() if out is None else out.parent,
        shapes=args.shapes,
        batch=args.batch,
        precision=args.precision,
        tensorrt=_major(args),
        plugins=args.plugin,
        values=args.val_range,
        atol=args.atol,
        rtol=args.rtol,
    )
    if args.execute and not found.refused:
        found = found.run(force=args.force)
    if out is not None and not found.refused:
        found.save(out, force=args.force)
    _tell(args, found, None if found.refused else out)
    found.require_taken()


def _major(args: argparse.Namespace) -> int:
    if args.tensorrt is not None or not args.execute:
        return args.tensorrt or LATEST
    said = installed(run.require())
    return LATEST if said is None else int(said.split(".")[0])


def _tell(args: argparse.Namespace, found: HandOver, out: Path | None) -> None:
    if args.json:
        shared.print_json(found.report | {"script": None if out is None else str(out)})
        return
    handover(shared.console(args), found.report, found.script, verbose=args.verbose)
    if out is not None:
        shared.tell_written(args, out, "a shell script; it runs in its own folder")
