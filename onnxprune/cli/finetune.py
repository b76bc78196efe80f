"""`onnxprune finetune`: trains a pruned model's weights against the outputs of the original."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from onnxprune import api, files, finetuning
from onnxprune.cli import arguments, shared
from onnxprune.cli.verify import read_report
from onnxprune.errors import OptionError
from onnxprune.report import terminal
from onnxprune.report.progress import progress
from onnxprune.training.settings import CHECKPOINT, Training


def register(add: arguments.Add) -> None:
    _arguments(add("finetune", "train a pruned model's weights against the outputs of the original", finetune))


def _arguments(parser: arguments.Parser) -> None:
    parser.add_argument("pruned", metavar="PRUNED", help="what `onnxprune prune` made")
    parser.add_argument("--teacher", required=True, metavar="ORIGINAL", help="the model that was pruned")
    arguments.output(parser)
    known, group = Training(), arguments.training(parser)
    group.add_argument("--epochs", type=int, default=known.epochs, metavar="N", help=f"default {known.epochs}")
    group.add_argument("--batch", type=int, default=known.batch, metavar="N", help=f"samples a step (default {known.batch})")
    group.add_argument("--seed", type=int, default=0, help="of every random choice")
    group.add_argument("--resume", action="store_true", help="go on from the checkpoint of an interrupted training")
    parser.add_argument("--validation", metavar="DATA", help="other data to compare the outputs on")
    parser.add_argument("--certify", metavar="DATA", help="samples for the certificate alone")
    parser.add_argument("--report", metavar="FILE.json", help="default: OUT.report.json")
    arguments.data(parser, required=True)


def finetune(args: argparse.Namespace) -> None:
    """onnxprune finetune."""
    out = Path(args.out)
    report = Path(args.report) if args.report else api.report_path(out)
    outs = api.outputs(out, report, external=bool(files.external_files(args.pruned)))
    inputs = [args.pruned, args.teacher, args.data, args.validation, args.certify, *files.external_files(args.teacher)]
    shared.check_outputs(args, outs, inputs, args.pruned)
    training, kept = shared.training(args, epochs=args.epochs, batch=args.batch), out.with_name(out.name + CHECKPOINT)
    if kept.exists() and not (args.resume or args.force):
        hint = "--resume goes on with it, --force starts anew"
        raise OptionError(f"{kept} is the checkpoint of a training that was interrupted", hint=hint)
    path = api.report_path(args.pruned)
    try:
        with progress(args.quiet) as tell:
            result = finetuning.finetune(
                args.pruned,
                args.teacher,
                args.data,
                training=training,
                validation=args.validation,
                certify=args.certify,
                report=read_report(path) if path.exists() else None,
                checkpoint=kept,
                resume=args.resume,
                progress=tell,
                said=terminal.epochs(args.quiet, args.epochs),
                seed=args.seed,
                images=shared.images(args),
            )
    except KeyboardInterrupt:
        if kept.exists():
            print(f"onnxprune: {kept} has what was trained so far: --resume goes on with it", file=sys.stderr)
        raise
    result.report["command"] = shared.command(args)
    result.save(out, report, force=args.force)
    kept.unlink(missing_ok=True)
    if args.json:
        shared.print_json(result.report)
    else:
        terminal.trained(shared.console(args), result.report, str(out))
