"""`report`: one page about a pair of files."""

from __future__ import annotations

import argparse
from pathlib import Path

from onnxprune import api, files, pages
from onnxprune.cli import arguments, shared
from onnxprune.cli.arguments import Add
from onnxprune.cli.verify import read_certificate, read_report
from onnxprune.report.progress import progress
from onnxprune.saliency import Saliency


def register(add: Add) -> None:
    sub = add("report", "make one HTML page about a pair of original and pruned model", report)
    arguments.pair(sub)
    arguments.output(sub)
    sub.add_argument("--report", metavar="FILE.json", help="default: PRUNED.report.json")
    sub.add_argument("--sweep", metavar="FILE.json", help="what `onnxprune sweep` wrote, to show the curve")
    sub.add_argument("--bench", metavar="FILE.json", help="what `onnxprune bench --json` printed, to show times")
    sub.add_argument("--calibration", metavar="CALIB", help="scores, where the report has none")
    sub.add_argument(
        "--shape", action="append", default=[], metavar="[NAME=]N,C,H,W", help="size of an input that the model leaves open"
    )


def report(args: argparse.Namespace) -> None:
    """onnxprune report."""
    out = Path(args.out)
    beside = Path(args.report) if args.report else api.report_path(args.pruned)
    certificate = api.certificate_path(args.pruned)
    given = [args.original, args.pruned, args.sweep, args.bench, args.calibration, beside, certificate]
    weights = [*files.external_files(args.original), *files.external_files(args.pruned)]
    files.apart([out], [*(Path(g) for g in given if g), *weights], Path(args.original))
    files.writable(out, force=args.force)
    with progress(args.quiet):
        page = pages.html(
            args.original,
            args.pruned,
            read_report(beside) if args.report or beside.exists() else None,
            certificate=read_certificate(certificate),
            sweep=pages.read_json(args.sweep, "points", "sweep") if args.sweep else None,
            bench=pages.read_json(args.bench, "models", "bench --json") if args.bench else None,
            calibration=Saliency.load(args.calibration) if args.calibration else None,
            shape=tuple(args.shape),
        )
    with files.whole_file(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    if args.json:
        shared.print_json({"out": str(out), "bytes": len(page.encode())})
        return
    shared.tell_written(args, out, f"{len(page.encode()) / 1e3:.0f} kB; open it in a browser")
