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
from onnxprune import commands
from onnxprune.budget import KINDS
from onnxprune.errors import OnnxPruneError, OptionError
from onnxprune.options import METHODS, RECOVERIES


class _Parser(argparse.ArgumentParser):
    """argparse with this project's one-line errors and without abbreviations that break when options are added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self.commands: dict[str, _Parser] = {}

    @property
    def long_names(self) -> set[str]:
        """The options that a --config file may set."""
        return {name[2:] for name in self._option_string_actions if name.startswith("--")} - {"help", "config"}

    def error(self, message: str) -> NoReturn:
        raise OptionError(message, hint=f"see `{self.prog} --help`")


def _general(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("general")
    group.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    group.add_argument("-v", "--verbose", action="store_true", help="print every layer and group")
    group.add_argument("--debug", action="store_true", help="show a traceback for a bug in onnxprune")
    group.add_argument("--config", metavar="FILE.toml", help="options by their long names; the command line wins")


def _model(parser: argparse.ArgumentParser) -> None:
    """What every command that analyses a model can be told about it."""
    parser.add_argument("model", metavar="MODEL")
    _import(parser)


def _import(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model")
    group.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="[NAME=]N,C,H,W",
        help="size of an input that the model leaves open; repeatable",
    )
    group.add_argument(
        "--allow-approximate",
        action="store_true",
        help="cut also channels that a normalisation (LayerNorm, RMSNorm, LRN) reckons with: not exact, flagged in the report",
    )
    group.add_argument(
        "--attention",
        choices=("heads", "dims"),
        help="cut whole attention heads, or the same places in every head, where both can go; default: whatever leaves more",
    )
    group.add_argument(
        "--freeze", action="append", default=[], metavar="GLOB", help="layers or tensors to leave alone; repeatable"
    )


def _data(parser: argparse.ArgumentParser, *, required: bool = False) -> None:
    group = parser.add_argument_group("sample data")
    group.add_argument(
        "--data",
        required=required,
        help=".npz or .npy, a folder or .zip of images, .safetensors, .parquet, or script.py:function",
    )
    group.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="image size, where the model leaves it open")
    group.add_argument("--resize", type=int, metavar="N", help="resize the short side to N before the centre crop")
    group.add_argument(
        "--mean", nargs="+", type=float, metavar="M", help="subtracted after --scale, one value or one a channel"
    )
    group.add_argument("--std", nargs="+", type=float, metavar="S", help="divided by, after --mean")
    group.add_argument("--scale", type=float, default=1 / 255, help="multiplies the pixels 0..255 (default 1/255)")
    group.add_argument("--layout", choices=("nchw", "nhwc"), help="default: from the model's input")
    group.add_argument("--color", choices=("rgb", "bgr"), default="rgb")


def _runtime(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("runtime")
    group.add_argument("--samples", type=int, metavar="N", help="calibration samples (default: what the theory asks for)")
    group.add_argument("--batch", type=int, metavar="N", help="samples per run (default: what fits memory)")
    group.add_argument("--providers", default="cpu", help="execution providers in order, e.g. cuda,cpu")
    group.add_argument("--seed", type=int, default=0)
    group.add_argument("--delta", type=float, default=0.01, help="failure probability of the certificate")
    group.add_argument(
        "--reduce", choices=("sum", "max"), default="sum", help="sensitivity: theory (sum) or the authors' code (max)"
    )
    group.add_argument(
        "--sensitivity",
        choices=("exact", "bound"),
        default="exact",
        help="exact ones, or bounds: at most 8 %% above in 1x1 and linear layers, 25 %% in others; the guarantee holds too",
    )


def _output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def _prune(parser: argparse.ArgumentParser) -> None:
    _model(parser)
    _output(parser)
    budget = parser.add_argument_group("budget (exactly one)").add_mutually_exclusive_group()
    budget.add_argument("--macs", type=float, metavar="F", help="fraction of the multiply-accumulates to keep")
    budget.add_argument("--params", type=float, metavar="F", help="fraction of the parameters to keep")
    budget.add_argument("--bytes", type=float, metavar="F", help="fraction of the file size to keep")
    budget.add_argument(
        "--eps", type=float, metavar="E", help="the smallest network with a sampling error of at most E per group"
    )
    budget.add_argument(
        "--max-drop", type=float, metavar="X", help="the smallest network whose top-1 drop is certified to be at most X"
    )
    group = parser.add_argument_group("what to cut")
    group.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="with which --max-drop is certified (default 0.95)"
    )
    group.add_argument(
        "--method", choices=METHODS, default="auto", help="how channels are chosen; auto: what moves held-out outputs least"
    )
    group.add_argument(
        "--recover", choices=RECOVERIES, default="auto", help="new weights without training; auto: lsq where that helps"
    )
    group.add_argument(
        "--align",
        type=int,
        default=1,
        metavar="N",
        help="kept channels are multiples of N where a layer is wide enough",
    )
    group.add_argument("--min-channels", type=int, default=1, metavar="N")
    group.add_argument("--calibration", metavar="CALIB", help="made by `onnxprune calibrate`, instead of --data")
    group.add_argument("--validation", metavar="DATA", help="other data to compare the outputs on")
    group.add_argument(
        "--certify", metavar="DATA", help="samples for the certificate alone (default: those that outputs are compared on)"
    )
    group.add_argument("--report", metavar="FILE.json", help="default: OUT.report.json")
    group.add_argument("--save-plan", metavar="FILE.json", help="write the plan, for `onnxprune apply`")
    _data(parser)
    _runtime(parser)


def _parser() -> _Parser:
    parser = _Parser(prog="onnxprune", description="Provable filter pruning of ONNX files.")
    parser.add_argument("--version", action="version", version=f"onnxprune {onnxprune.__version__}")
    kinds = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=getattr(commands, name))
        return sub

    prune = command("prune", "make a model smaller and re-validate it")
    _prune(prune)
    inspect = command("inspect", "show the channel groups, which can be pruned, and why the others cannot")
    _model(inspect)
    inspect.add_argument("--json", action="store_true", help="print JSON")
    calibrate = command("calibrate", "run the sample data once and keep the scores")
    _model(calibrate)
    _output(calibrate)
    calibrate.add_argument("--method", choices=METHODS, default="auto")
    _data(calibrate, required=False)
    _runtime(calibrate)
    merge = command("merge", "combine calibrations of shards of the data")
    merge.add_argument("parts", nargs="+", metavar="CALIB")
    _output(merge)
    apply = command("apply", "apply a plan to the model that it was made for")
    _model(apply)
    apply.add_argument("plan", metavar="PLAN")
    _output(apply)
    verify = command("verify", "re-validate a pair of original and pruned model")
    verify.add_argument("original", metavar="ORIGINAL")
    verify.add_argument("pruned", metavar="PRUNED")
    _import(verify)
    verify.add_argument("--report", metavar="FILE.json", help="default: PRUNED.report.json")
    verify.add_argument("--json", action="store_true", help="print JSON")
    verify.add_argument("--validation", metavar="DATA", help="what `prune` had, to check the certificate's numbers")
    verify.add_argument("--certify", metavar="DATA", help="what `prune` had, to check the certificate's numbers")
    _data(verify)
    _runtime(verify)
    demo = command("demo", "the main job on the model and the data that ship with onnxprune")
    demo.add_argument("name", nargs="?", default="vgg8", help="vgg8, resnet20 or mobilenet")
    demo.add_argument("--macs", type=float, default=0.7, metavar="F")
    demo.add_argument("-o", "--out", default=None, metavar="OUT", help="default: onnxprune-demo/NAME.onnx")
    parser.commands = dict(kinds.choices)
    for sub in parser.commands.values():
        _general(sub)
    return parser


def _with_config(parser: _Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line; options from the --config file go before the given ones, so that the command line wins."""
    finder = _Parser(prog="onnxprune", add_help=False)
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
    if isinstance(value, list) and key in ("freeze", "shape"):
        return [part for v in value for part in (f"--{key}", str(v))]
    if isinstance(value, list):
        return [f"--{key}", *(str(v) for v in value)]
    return [f"--{key}={value}"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code: 0 done, 2 the caller's mistake, 3 failed validation, 1 a bug."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show must not undo the work
    try:
        args = _with_config(_parser(), argv)
        with _terminable():
            args.run(args)
        sys.stdout.flush()  # here, where a closed pipe is expected
        return 0
    except OnnxPruneError as error:
        print(f"onnxprune: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("onnxprune: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _discard_output()  # the reader of a pipe went away: no message is wanted
        return 0
    except OSError as error:  # a full disk, a name that is too long, a permission
        where = f"{error.filename}: " if error.filename else ""
        print(f"onnxprune: error: {where}{error.strerror or error}", file=sys.stderr)
        return 2
    except Exception as error:  # a bug: say so in one line, with the traceback only on demand
        if "--debug" in argv:
            traceback.print_exc()
        text = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        print(f"onnxprune: internal error: {text} (a bug; --debug shows where)", file=sys.stderr)
        return 1


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


if __name__ == "__main__":
    sys.exit(main())
