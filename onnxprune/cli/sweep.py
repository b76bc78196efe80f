"""`sweep`: many budgets from one calibration."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxprune
from onnxprune import api, files
from onnxprune.budget import Budget, Kind
from onnxprune.cli import arguments, shared
from onnxprune.cli.arguments import Add
from onnxprune.errors import OptionError, OutputError
from onnxprune.report import points, terminal
from onnxprune.report.progress import progress
from onnxprune.report.web.page import sweep_page
from onnxprune.saliency import Saliency

DEFAULT = "0.9,0.7,0.5,0.3"
TABLE, PAGE = "sweep.json", "sweep.html"


def register(add: Add) -> None:
    sub = add("sweep", "prune to several budgets from one calibration, and compare them", sweep)
    arguments.model(sub)
    sub.add_argument("-o", "--out", required=True, metavar="DIR", help="the folder to write, made if it is not there")
    sub.add_argument("--force", action="store_true", help="write into DIR although there are files in it")
    sub.add_argument("--budgets", default=DEFAULT, metavar="F,F,...", help=f"fractions to keep (default {DEFAULT})")
    kind = sub.add_argument_group("of what (at most one)").add_mutually_exclusive_group()
    kind.add_argument("--macs", action="store_true", help="the multiply-accumulates (default)")
    kind.add_argument("--params", action="store_true", help="the parameters")
    kind.add_argument("--bytes", action="store_true", help="the file size")
    arguments.cut(sub)
    arguments.data(sub)
    arguments.runtime(sub)


def sweep(args: argparse.Namespace) -> None:
    """onnxprune sweep."""
    budgets, out = _budgets(args), Path(args.out)
    names = {b: f"{Path(args.model).stem}-{b.kind}-{b.value:g}.onnx" for b in budgets}
    _check(args, out, names.values())
    calibration = Saliency.load(args.calibration) if args.calibration else None
    command, found = shared.command(args), []
    with _folder(out) as folder, progress(args.quiet) as tell:
        results = api.sweep(
            args.model,
            args.data,
            budgets=budgets,
            calibration=calibration,
            validation=args.validation,
            certify=args.certify,
            progress=tell,
            **shared.options(args),
        )
        for budget, result in zip(budgets, results, strict=True):
            result.report["command"] = command
            result.save(folder / names[budget])
            found.append(result.report)
        told = _told(found, list(names.values()), command)
        (folder / TABLE).write_text(json.dumps(told, indent=1) + "\n")
        (folder / PAGE).write_text(sweep_page(told), encoding="utf-8")
    if args.json:
        shared.print_json(told)
        return
    console = shared.console(args)
    terminal.sweep(console, told)
    shared.tell_written(args, out, f"{len(budgets)} models, {TABLE}, {PAGE}")


def _told(reports: Sequence[dict[str, Any]], names: Sequence[str], command: list[str]) -> dict[str, Any]:
    """The content of sweep.json."""
    kind = reports[0]["budget"]["kind"]
    made = [points.point(r, n) for r, n in zip(reports, names, strict=True)]
    return {
        "onnxprune_sweep": 1,
        "onnxprune": onnxprune.__version__,
        "model": reports[0]["model"],
        "command": command,
        "kind": kind,
        "original": reports[0]["original"],
        "digest": reports[0]["digests"]["original"],
        "points": points.marked(made, kind),
    }


def _budgets(args: argparse.Namespace) -> list[Budget]:
    kind: Kind = "params" if args.params else "bytes" if args.bytes else "macs"
    try:
        values = [float(v) for v in args.budgets.split(",") if v.strip()]
    except ValueError:
        raise OptionError(f"--budgets takes numbers, not '{args.budgets}'", hint="for example 0.9,0.7,0.5") from None
    if not values or len({f"{v:g}" for v in values}) < len(values):
        raise OptionError(f"--budgets takes different fractions, not '{args.budgets}'", hint="for example 0.9,0.7,0.5")
    return [Budget(kind, v) for v in sorted(values, reverse=True)]


def _check(args: argparse.Namespace, out: Path, names: Any) -> None:
    """Before any work: DIR can be written, and nothing in it is an input."""
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is not a folder", hint="sweep writes several files: name a folder")
    if out.is_dir() and any(out.iterdir()) and not args.force:
        raise OutputError(f"there are files in {out} already", hint="add --force to write among them, or name another folder")
    external = bool(files.external_files(args.model))
    outs = [p for n in names for p in api.outputs(out / n, api.report_path(out / n), external=external)]
    inputs = [args.model, args.data, args.validation, args.certify, args.calibration]
    files.apart(outs, [*(Path(i) for i in inputs if i), *files.external_files(args.model)], Path(args.model))
    if not out.parent.is_dir():
        raise OutputError(f"the folder {out.parent} does not exist", hint="create it first")
    for target in outs:
        if target.exists() and not target.is_file():
            raise OutputError(f"{target} is not a regular file", hint="name another folder")


@contextlib.contextmanager
def _folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out`, whose files go there if, and only if, the block ends well."""
    try:
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=".onnxprune-"))
    except OSError as error:
        raise OutputError(f"cannot write in {out.parent}: {error.strerror}", hint="choose another folder") from None
    try:
        yield temporary
        if out.is_dir():
            for file in sorted(temporary.iterdir()):
                file.replace(out / file.name)
        else:
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o777 & ~umask)  # mkdtemp makes folders that only their owner may read
            temporary.replace(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
