"""What the commands' bodies share: from parsed options to the library's, and to the terminal."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from onnxprune import files
from onnxprune.data import ImageOptions
from onnxprune.report import terminal
from onnxprune.training.settings import LABELS, Training

SHARED = (
    "method",
    "recover",
    "align",
    "target",
    "min_channels",
    "samples",
    "batch",
    "threads",
    "latency_batch",
    "seed",
    "delta",
    "confidence",
    "reduce",
    "sensitivity",
)
PIPED_WIDTH = 120  # columns of the tables in a log or a pipe


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # which `cli.main` answers, as for output that is not rich's


def console(args: argparse.Namespace) -> Console:
    """Where a command prints its tables and lines: nowhere when quiet; without colour or control characters in a pipe."""
    if sys.stdout.isatty():
        return _Console(quiet=args.quiet, highlight=False)
    return _Console(
        quiet=args.quiet, highlight=False, soft_wrap=True, width=PIPED_WIDTH, force_terminal=False, color_system=None
    )


def tell_written(args: argparse.Namespace, out: Path, more: str = "") -> None:
    """The last line of a command that wrote OUT."""
    console(args).print(f"written: [bold]{terminal.escape(str(out))}[/]" + (f" ({terminal.escape(more)})" if more else ""))


def print_json(found: Any) -> None:
    """What `--json` prints: one object and nothing else, in ASCII; null for what is not finite."""
    print(json.dumps(_finite(found), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def images(args: argparse.Namespace) -> ImageOptions:
    return ImageOptions(
        size=tuple(args.size) if args.size else None,
        resize=args.resize,
        mean=tuple(args.mean) if args.mean else None,
        std=tuple(args.std) if args.std else None,
        scale=args.scale,
        layout=args.layout,
        color=args.color,
    )


def options(args: argparse.Namespace) -> dict[str, Any]:
    options = {k: getattr(args, k) for k in SHARED if hasattr(args, k)}
    options["providers"] = tuple(p.strip() for p in args.providers.split(",") if p.strip())
    options["images"] = images(args)
    return options | about_model(args)


def about_model(args: argparse.Namespace) -> dict[str, Any]:
    shared = ("allow_approximate", "attention")
    return {"freeze": tuple(args.freeze), "shape": tuple(args.shape), **{k: getattr(args, k) for k in shared}}


TRAINING = (
    "augment",
    "optimiser",
    "rate",
    "decay",
    "temperature",
    "features",
    "batch_norm",
    "patience",
    "precision",
    "device",
)


def training(args: argparse.Namespace, **more: Any) -> Training:
    given = {name: getattr(args, name) for name in TRAINING} | {"seed": args.seed} | more
    return Training(labels=LABELS if args.labels == "use" else 0.0, **given)


def check_outputs(args: argparse.Namespace, outs: Sequence[Any], inputs: Sequence[Any], model: str | None = None) -> None:
    """Before any work: no output is an input (the model's external data included), and all can be written."""
    targets, model = [Path(o) for o in outs if o], model or args.model
    files.apart(targets, [*(Path(i) for i in inputs if i), *files.external_files(model)], Path(model))
    files.writable(*targets, force=args.force)


def reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


SILENT = {"help", "quiet", "verbose", "debug", "config", "json", "force"}  # what does not change the result


def command(args: argparse.Namespace) -> list[str]:
    """The words that run this command again: names as they were typed, options that are not the default, --config resolved."""
    places, words = [], []
    for action in args.parser.actions:
        value = getattr(args, action.dest, None)
        if not action.option_strings:
            places += [str(v) for v in value] if isinstance(value, list) else [str(value)] if value is not None else []
        elif action.dest not in SILENT and value != action.default:
            words += _written(action, value)
    return ["onnxprune", args.command, *places, *words]


def _written(action: argparse.Action, value: Any) -> list[str]:
    name = action.option_strings[0]
    if action.nargs == 0:
        return [name]
    if isinstance(action.nargs, str) or (isinstance(action.nargs, int) and action.nargs > 1):
        return [name, *(str(v) for v in value)]
    values = value if isinstance(value, list) else [value]
    return [w for v in values for w in ([f"{name}={v}"] if str(v).startswith("-") else [name, str(v)])]
