"""The command line: parses options, runs a command, turns errors into one line and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
import threading
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import onnxprune
from onnxprune.budget import KINDS
from onnxprune.cli import bench, calibrate, completion, export_trt, finetune, inspect, prune, report, sweep, verify
from onnxprune.cli.arguments import Parser, Run, general
from onnxprune.errors import OnnxPruneError, OptionError
from onnxprune.report.words import visible

FAMILIES = (prune, sweep, inspect, calibrate, verify, finetune, bench, export_trt, report, completion)


def command_line() -> Parser:
    """The parser of the whole command line; each command's own is in `commands`."""
    parser = Parser(prog="onnxprune", description="Provable filter pruning of ONNX files.")
    parser.add_argument("--version", action="version", version=f"onnxprune {onnxprune.__version__}")
    kinds = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)

    def add(name: str, text: str, run: Run) -> Parser:
        sub = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run, parser=sub)
        return sub

    for family in FAMILIES:
        family.register(add)
    parser.commands = dict(kinds.choices)
    for sub in parser.commands.values():
        general(sub)
    return parser


def _with_config(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; options from the --config file go before the given ones, so that the command line wins."""
    finder = Parser(prog="onnxprune", add_help=False)
    finder.add_argument("--config")
    name = finder.parse_known_args(argv)[0].config
    if name is None or argv[0] not in parser.commands:
        return parser.parse_args(argv)
    path = Path(name)
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise OptionError(f"cannot read {path}: {error.strerror}", hint="--config names a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise OptionError(f"{path} is not TOML: {error}", hint="for example: macs = 0.5") from None
    if any(word.split("=")[0] in [f"--{k}" for k in KINDS] for word in argv):
        values = {k: v for k, v in values.items() if k not in KINDS}  # one budget replaces another
    for key in values:
        if key not in parser.commands[argv[0]].long_names:
            hint = f"see `onnxprune {argv[0]} --help`"
            raise OptionError(f"{path} sets '{key}', which is not an option of `onnxprune {argv[0]}`", hint=hint)
    extra: list[str] = []
    for key, value in values.items():
        extra += _as_arguments(key, value)
    # --config once more, last, so that a list of values does not go on into the positional arguments.
    return parser.parse_args([argv[0], *extra, f"--config={path}", *argv[1:]])


def _as_arguments(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{key}"] if value else []
    if isinstance(value, list) and key in ("freeze", "shape", "shapes", "plugin"):
        return [part for v in value for part in (f"--{key}", str(v))]
    if isinstance(value, list) and key == "budgets":
        return [f"--{key}", ",".join(str(v) for v in value)]
    if isinstance(value, list):
        return [f"--{key}", *(str(v) for v in value)]
    return [f"--{key}={value}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 the caller's mistake, 3 failed validation, 1 a bug."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not undo the work
    try:
        args = _with_config(command_line(), argv)
        with _terminable():
            args.run(args)
        sys.stdout.flush()  # here, where a closed pipe is expected
        return 0
    except OnnxPruneError as error:
        _complain(f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        print("onnxprune: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()  # the reader of a pipe went away: no message is wanted
        return 0
    except OSError as error:  # a full disk, a name that is too long, a permission
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"error: {where}{error.strerror or error}")
        return 2
    except Exception as error:  # a bug: say so in one line, with the traceback only on demand
        if "--debug" in argv:
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        _complain(f"internal error: {text} (a bug; --debug shows where)")
        return 1


def _complain(text: str) -> None:
    print(f"onnxprune: {visible(text)}", file=sys.stderr)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Makes SIGTERM what Ctrl-C is, so that it leaves no temporary files either: those of a large model are large."""

    def interrupt(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _discard_output() -> None:
    """Lets the interpreter flush its standard output into nothing when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
