"""`calibrate` and `merge`: scores for later."""

from __future__ import annotations

import argparse
from pathlib import Path

from onnxprune import api, files
from onnxprune.cli import arguments, shared
from onnxprune.cli.arguments import Add
from onnxprune.errors import DataError
from onnxprune.options import methods
from onnxprune.report.progress import progress
from onnxprune.saliency import Saliency


def register(add: Add) -> None:
    sub = add("calibrate", "run the sample data once and keep the scores", calibrate)
    arguments.model(sub)
    arguments.output(sub)
    sub.add_argument("--method", choices=methods(), default="auto", help="which scores are made")
    arguments.data(sub, required=False)
    arguments.runtime(sub)
    sub = add("merge", "combine calibrations of shards of the data", merge)
    sub.add_argument("parts", nargs="+", metavar="CALIB", help="made by `onnxprune calibrate` of one model")
    arguments.output(sub)


def calibrate(args: argparse.Namespace) -> None:
    """onnxprune calibrate."""
    out = Path(args.out)
    shared.check_outputs(args, [out], [args.model, args.data])
    if args.data is None:
        raise DataError("`onnxprune calibrate` needs --data", hint="give images, an .npz, or script.py:function")
    with progress(args.quiet) as tell:
        saliency = api.calibrate(args.model, args.data, progress=tell, **shared.options(args))
    saliency.save(out)
    _tell(args, out, saliency, 1)


def merge(args: argparse.Namespace) -> None:
    """onnxprune merge."""
    out = Path(args.out)
    files.writable(out, force=args.force)
    parts = [Saliency.load(p) for p in args.parts]
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    total.save(out)
    _tell(args, out, total, len(parts))


def _tell(args: argparse.Namespace, out: Path, saliency: Saliency, parts: int) -> None:
    if args.json:
        found = {"out": str(out), "criterion": saliency.criterion, "samples": saliency.samples, "parts": parts}
        shared.print_json(found | {"scores": len(saliency.layers)})
        return
    what = f"{saliency.criterion}, {saliency.samples} samples" + (f" of {parts} calibrations" if parts > 1 else "")
    shared.tell_written(args, out, what)
