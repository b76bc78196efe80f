"""`verify`: whether a pair of files, and what was certified about them, holds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from onnxprune import api
from onnxprune.cli import arguments, shared
from onnxprune.cli.arguments import Add
from onnxprune.errors import OptionError
from onnxprune.report import terminal
from onnxprune.report.progress import progress


def register(add: Add) -> None:
    sub = add("verify", "re-validate a pair of original and pruned model", verify)
    arguments.pair(sub)
    arguments.import_model(sub)
    sub.add_argument("--report", metavar="FILE.json", help="default: PRUNED.report.json")
    sub.add_argument("--validation", metavar="DATA", help="what `prune` had, to check the certificate's numbers")
    sub.add_argument("--certify", metavar="DATA", help="what `prune` had, to check the certificate's numbers")
    arguments.data(sub)
    arguments.runtime(sub)


def verify(args: argparse.Namespace) -> None:
    """onnxprune verify."""
    path = Path(args.report) if args.report else api.report_path(args.pruned)
    report = read_report(path) if args.report or path.exists() else None
    with progress(args.quiet) as tell:
        found = api.verify(
            args.original,
            args.pruned,
            report,
            args.data,
            certificate=read_certificate(api.certificate_path(args.pruned)),
            validation=args.validation,
            certify=args.certify,
            progress=tell,
            **shared.options(args),
        )
    if args.json:
        shared.print_json(found)
        return
    console = shared.console(args)
    for line in terminal.validation_lines(found["validation"]):
        console.print(line)
    told = found["certificate"]
    if report is not None:
        console.print("the report is of these two files")
    elif told is None:
        console.print(f"no report at {terminal.escape(str(path))}, and no certificate: masked equivalence was not checked")
    for line in terminal.certificate_lines(told):
        console.print(line)
    for line in found["rechecked"]:
        console.print(f"re-checked, {terminal.escape(line)}" if not line.startswith("not ") else terminal.escape(line))


def read_certificate(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        hint = "certificates are made by `onnxprune prune`"
        raise OptionError(f"{path} is not a certificate of onnxprune: {shared.reason(error)}", hint=hint) from None


def read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        if not isinstance(report, dict) or not {"groups", "finetune"} & report.keys():
            raise ValueError("no groups in it")
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "reports are made by `onnxprune prune`"
        raise OptionError(f"{path} is not a report of onnxprune: {shared.reason(error)}", hint=hint) from None
