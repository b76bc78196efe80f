"""What options there are, in groups that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, NoReturn, TypeAlias

from onnxprune.errors import OptionError
from onnxprune.options import RECOVERIES, methods
from onnxprune.targets import TARGETS
from onnxprune.training.settings import AUGMENTATIONS, OPTIMISERS, PRECISIONS, STATISTICS, Training


class Parser(argparse.ArgumentParser):
    """argparse with this project's one-line errors and without abbreviations that break when options are added."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})
        self.commands: dict[str, Parser] = {}

    @property
    def long_names(self) -> set[str]:
        """The options that a --config file may set."""
        return {name[2:] for name in self._option_string_actions if name.startswith("--")} - {"help", "config"}

    @property
    def actions(self) -> list[argparse.Action]:
        """Everything that can be typed, in the order of the help."""
        return list(self._actions)

    def error(self, message: str) -> NoReturn:
        raise OptionError(message, hint=f"see `{self.prog} --help`")


Run: TypeAlias = Callable[[argparse.Namespace], None]
Add: TypeAlias = Callable[[str, str, Run], Parser]
"""add(name, what it does, its body) -> the parser of a new command."""


def general(parser: Parser) -> None:
    group = parser.add_argument_group("general")
    group.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    group.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    group.add_argument("-v", "--verbose", action="store_true", help="print every layer and group")
    group.add_argument("--debug", action="store_true", help="show a traceback for a bug in onnxprune")
    group.add_argument("--config", metavar="FILE.toml", help="options by their long names; the command line wins")


def model(parser: Parser) -> None:
    """What every command that analyses a model can be told about it."""
    parser.add_argument("model", metavar="MODEL", help="the .onnx file, which is never changed")
    import_model(parser)


def pair(parser: Parser) -> None:
    """The two files of a pruning."""
    parser.add_argument("original", metavar="ORIGINAL", help="the model that was pruned")
    parser.add_argument("pruned", metavar="PRUNED", help="what `onnxprune prune` made of it")


def import_model(parser: Parser) -> None:
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


def cut(parser: Parser) -> None:
    """How a budget is met, and which samples judge the result."""
    group = parser.add_argument_group("what to cut")
    group.add_argument(
        "--method", choices=methods(), default="auto", help="how channels are chosen; auto: what moves held-out outputs least"
    )
    group.add_argument(
        "--recover",
        choices=RECOVERIES,
        default="auto",
        help="new weights without training; auto: lsq where that helps; tune: lsq, then gradient descent on the same samples",
    )
    group.add_argument(
        "--align",
        type=int,
        metavar="N",
        help="kept channels are multiples of N where a layer is wide enough (default: what --target asks for)",
    )
    group.add_argument(
        "--target", choices=tuple(TARGETS), default="generic", help="where the model will run: sets --align to what pays there"
    )
    group.add_argument("--min-channels", type=int, default=1, metavar="N", help="what every group keeps at least")
    group.add_argument("--calibration", metavar="CALIB", help="made by `onnxprune calibrate`, instead of --data")
    group.add_argument("--validation", metavar="DATA", help="other data to compare the outputs on")
    group.add_argument(
        "--certify", metavar="DATA", help="samples for the certificate alone (default: those that outputs are compared on)"
    )


def data(parser: Parser, *, required: bool = False) -> None:
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
    group.add_argument("--color", choices=("rgb", "bgr"), default="rgb", help="order of the channels that the model wants")


def runtime(parser: Parser) -> None:
    group = parser.add_argument_group("runtime")
    group.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help="calibration samples (default: what the theory asks for, up to 512 where weights are learnt from them)",
    )
    group.add_argument("--batch", type=int, metavar="N", help="samples per run (default: what fits memory)")
    group.add_argument("--providers", default="cpu", help="execution providers in order, e.g. cuda,cpu")
    group.add_argument("--seed", type=int, default=0, help="of every random choice")
    group.add_argument("--delta", type=float, default=0.01, help="failure probability of the certificate")
    group.add_argument(
        "--reduce", choices=("sum", "max"), default="sum", help="sensitivity: theory (sum) or the authors' code (max)"
    )
    group.add_argument(
        "--sensitivity",
        choices=("exact", "bound"),
        default="exact",
        help="exact ones, or bounds: at most 8 %% above in 1x1 and linear layers, 35 %% in others; the guarantee holds too",
    )


def output(parser: Parser) -> None:
    parser.add_argument("-o", "--out", required=True, metavar="OUT", help="the file to write")
    parser.add_argument("--force", action="store_true", help="replace OUT if it exists")


def training(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What training can be told by `finetune` and by `prune --finetune` alike; see docs/finetune.md for the defaults."""
    known = Training()
    group = parser.add_argument_group("training")
    group.add_argument(
        "--labels", choices=("ignore", "use"), default="ignore", help="whether true classes are learnt beside the outputs"
    )
    group.add_argument("--augment", choices=AUGMENTATIONS, default=known.augment, help="auto: mirror and shift image files")
    group.add_argument("--optimiser", choices=OPTIMISERS, default=known.optimiser, help="what takes the steps")
    group.add_argument("--rate", type=float, metavar="R", help="highest learning rate (default: the optimiser's)")
    group.add_argument("--decay", type=float, default=known.decay, metavar="D", help=f"weight decay (default {known.decay:g})")
    group.add_argument(
        "--temperature", type=float, default=known.temperature, metavar="T", help="at which class scores are compared"
    )
    group.add_argument(
        "--features", type=float, default=known.features, metavar="W", help="weight of intermediate tensors in the loss"
    )
    group.add_argument(
        "--batch-norm", choices=STATISTICS, default=known.batch_norm, help="whose statistics a batch norm that was kept uses"
    )
    group.add_argument("--patience", type=int, metavar="N", help="end after N epochs without an improvement")
    group.add_argument("--precision", choices=PRECISIONS, default=known.precision, help="of the arithmetic")
    group.add_argument("--device", metavar="NAME", help="default: cuda where there is any, else cpu")
    return group
