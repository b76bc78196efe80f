"""`prune`, `apply` and `demo`: the commands that write a smaller model."""

from __future__ import annotations

import argparse
from pathlib import Path

from onnxprune import api, files, wire
from onnxprune.budget import KINDS, Budget
from onnxprune.cli import arguments, shared
from onnxprune.cli.arguments import Add, Parser
from onnxprune.errors import BudgetError, ModelError, OptionError
from onnxprune.plan import Plan
from onnxprune.report import terminal
from onnxprune.report.progress import progress
from onnxprune.saliency import Saliency

DEMO = Path(__file__).resolve().parents[1] / "models"


def register(add: Add) -> None:
    sub = add("prune", "make a model smaller and re-validate it", prune)
    _prune(sub)
    sub = add("apply", "apply a plan to the model that it was made for", apply)
    arguments.model(sub)
    sub.add_argument("plan", metavar="PLAN", help="what `onnxprune prune --save-plan` wrote")
    arguments.output(sub)
    sub = add("demo", "the main job on the model and the data that ship with onnxprune", demo)
    sub.add_argument("name", nargs="?", default="vgg8", help="vgg8, resnet20 or mobilenet")
    sub.add_argument("--macs", type=float, default=0.7, metavar="F", help="fraction of the multiply-accumulates to keep")
    sub.add_argument("-o", "--out", default=None, metavar="OUT", help="default: onnxprune-demo/NAME.onnx")


def _prune(parser: Parser) -> None:
    arguments.model(parser)
    arguments.output(parser)
    budget = parser.add_argument_group("budget (exactly one)").add_mutually_exclusive_group()
    budget.add_argument("--macs", type=float, metavar="F", help="fraction of the multiply-accumulates to keep")
    budget.add_argument("--params", type=float, metavar="F", help="fraction of the parameters to keep")
    budget.add_argument("--bytes", type=float, metavar="F", help="fraction of the file size to keep")
    budget.add_argument(
        "--latency", type=float, metavar="F", help="fraction of the latency to keep, measured in ONNX Runtime on this machine"
    )
    budget.add_argument(
        "--eps", type=float, metavar="E", help="the smallest network with a sampling error of at most E per group"
    )
    budget.add_argument(
        "--max-drop", type=float, metavar="X", help="the smallest network whose top-1 drop is certified to be at most X"
    )
    parser.add_argument(
        "--confidence", type=float, default=0.95, metavar="C", help="with which --max-drop is certified (default 0.95)"
    )
    parser.add_argument("--report", metavar="FILE.json", help="default: OUT.report.json")
    parser.add_argument("--save-plan", metavar="FILE.json", help="write the plan, for `onnxprune apply`")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that --latency is measured with (default: all)")
    parser.add_argument("--latency-batch", type=int, metavar="N", help="samples for one run that --latency is measured with")
    parser.add_argument("--finetune", type=int, metavar="EPOCHS", help="train the weights against the original's outputs")
    arguments.cut(parser)
    arguments.training(parser)
    arguments.data(parser)
    arguments.runtime(parser)


def prune(args: argparse.Namespace) -> None:
    """onnxprune prune."""
    budget = _budget(args)
    out = Path(args.out)
    report = Path(args.report) if args.report else api.report_path(out)
    outs = [*api.outputs(out, report, external=bool(files.external_files(args.model))), args.save_plan]
    shared.check_outputs(args, outs, [args.model, args.data, args.validation, args.certify, args.calibration])
    calibration = Saliency.load(args.calibration) if args.calibration else None
    if args.finetune is not None and args.finetune < 1:
        raise OptionError(f"--finetune takes a number of epochs, at least 1, not {args.finetune}")
    training = None if args.finetune is None else shared.training(args, epochs=args.finetune)
    with progress(args.quiet) as tell:
        result = api.prune(
            args.model,
            args.data,
            budget=budget,
            calibration=calibration,
            validation=args.validation,
            certify=args.certify,
            progress=tell,
            said=terminal.epochs(args.quiet, args.finetune),
            finetune=training,
            **shared.options(args),
        )
    result.report["command"] = shared.command(args)
    result.save(out, report, force=args.force)
    if args.save_plan:
        with files.whole_file(Path(args.save_plan)) as temporary:
            temporary.write_text(result.plan.to_json() + "\n")
    _tell(args, result, out)


def _tell(args: argparse.Namespace, result: api.Result, out: Path) -> None:
    if args.json:
        shared.print_json(result.report)
        return
    console = shared.console(args)
    terminal.layers(console, result.report)
    console.print()
    terminal.summary(console, result.report, str(out))


def _budget(args: argparse.Namespace) -> Budget:
    given = [(k, v) for k in KINDS if (v := getattr(args, k.replace("-", "_"))) is not None]
    if len(given) != 1:
        raise BudgetError(
            "say how small: one of --macs, --params, --bytes, --latency, --eps, --max-drop",
            hint="--macs 0.5 keeps half of the MACs",
        )
    return Budget(*given[0])


def apply(args: argparse.Namespace) -> None:
    """onnxprune apply."""
    out = Path(args.out)
    outs = [out, files.data_file(out)] if files.external_files(args.model) else [out]
    shared.check_outputs(args, outs, [args.model, args.plan])
    try:
        text = Path(args.plan).read_text()
    except (OSError, UnicodeDecodeError) as error:
        hint = "plans are made by `onnxprune prune --save-plan`"
        raise OptionError(f"cannot read the plan {args.plan}: {shared.reason(error)}", hint=hint) from None
    with progress(args.quiet):
        imported, pruned = api.applied(args.model, Plan.from_json(text), **shared.about_model(args))
    files.save(pruned, out, external=imported.external)
    if args.json:
        shared.print_json({"out": str(out), "original": {"bytes": imported.size.bytes}, "pruned": {"bytes": wire.size(pruned)}})
        return
    shared.tell_written(args, out)


def demo(args: argparse.Namespace) -> None:
    """onnxprune demo."""
    model, data = DEMO / f"{args.name}.onnx", DEMO / "fashion-mnist.npz"
    if not model.exists() or not data.exists():
        have = ", ".join(sorted(p.stem for p in DEMO.glob("*.onnx"))) or "none"
        raise ModelError(f"there is no demo model '{args.name}'", hint=f"there are {have}")
    out = Path(args.out or f"onnxprune-demo/{args.name}.onnx")
    if args.out is None:
        out.parent.mkdir(exist_ok=True)
    files.writable(*api.outputs(out, api.report_path(out), external=False), force=args.out is None)
    if not args.json:
        command = f"$ onnxprune prune {model.name} --data {data.name} --macs {args.macs:g} -o {out}\n"
        shared.console(args).print(command, markup=False)
    with progress(args.quiet) as tell:
        result = api.prune(model, data, budget=Budget("macs", args.macs), progress=tell)
    result.report["command"] = shared.command(args)
    result.save(out, force=args.out is None)
    _tell(args, result, out)
