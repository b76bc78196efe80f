"""The commands' bodies: from parsed options to the library and back to the terminal."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape

from onnxprune import api, benching, files
from onnxprune.budget import KINDS, Budget
from onnxprune.data import ImageOptions
from onnxprune.errors import BudgetError, DataError, ModelError, OptionError
from onnxprune.imported import load
from onnxprune.plan import Plan
from onnxprune.report import build, terminal
from onnxprune.saliency import Saliency

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
DEMO = Path(__file__).resolve().parent / "models"


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise BrokenPipeError  # which `cli.main` answers, as for output that is not rich's


def _console(args: argparse.Namespace) -> Console:
    piped = not sys.stdout.isatty()
    return _Console(quiet=args.quiet, highlight=False, soft_wrap=piped, width=PIPED_WIDTH if piped else None)


def _images(args: argparse.Namespace) -> ImageOptions:
    return ImageOptions(
        size=tuple(args.size) if args.size else None,
        resize=args.resize,
        mean=tuple(args.mean) if args.mean else None,
        std=tuple(args.std) if args.std else None,
        scale=args.scale,
        layout=args.layout,
        color=args.color,
    )


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = {k: getattr(args, k) for k in SHARED if hasattr(args, k)}
    options["providers"] = tuple(p.strip() for p in args.providers.split(",") if p.strip())
    options["images"] = _images(args)
    return options | _about_model(args)


def _about_model(args: argparse.Namespace) -> dict[str, Any]:
    shared = ("allow_approximate", "attention")
    return {"freeze": tuple(args.freeze), "shape": tuple(args.shape), **{k: getattr(args, k) for k in shared}}


def _budget(args: argparse.Namespace) -> Budget:
    given = [(k, v) for k in KINDS if (v := getattr(args, k.replace("-", "_"))) is not None]
    if len(given) != 1:
        raise BudgetError(
            "say how small: one of --macs, --params, --bytes, --latency, --eps, --max-drop",
            hint="--macs 0.5 keeps half of the MACs",
        )
    return Budget(*given[0])


def prune(args: argparse.Namespace) -> None:
    """onnxprune prune."""
    budget = _budget(args)
    out = Path(args.out)
    report = Path(args.report) if args.report else api.report_path(out)
    outs = [*api.outputs(out, report, external=bool(files.external_files(args.model))), args.save_plan]
    _check_outputs(args, outs, [args.model, args.data, args.validation, args.certify, args.calibration])
    calibration = Saliency.load(args.calibration) if args.calibration else None
    with terminal.progress(args.quiet) as tell:
        result = api.prune(
            args.model,
            args.data,
            budget=budget,
            calibration=calibration,
            validation=args.validation,
            certify=args.certify,
            progress=tell,
            **_options(args),
        )
    result.save(out, report, force=args.force)
    if args.save_plan:
        with files.whole_file(Path(args.save_plan)) as temporary:
            temporary.write_text(result.plan.to_json() + "\n")
    console = _console(args)
    terminal.layers(console, result.report)
    console.print()
    terminal.summary(console, result.report, str(out))


def _check_outputs(args: argparse.Namespace, outs: Sequence[Any], inputs: Sequence[Any]) -> None:
    """Before any work: no output is an input (the model's external data included), and all can be written."""
    targets = [Path(o) for o in outs if o]
    files.apart(targets, [*(Path(i) for i in inputs if i), *files.external_files(args.model)], Path(args.model))
    files.writable(*targets, force=args.force)


def inspect(args: argparse.Namespace) -> None:
    """onnxprune inspect."""
    about = {"freeze": args.freeze, "shape": args.shape, "attention": args.attention}
    imported = load(args.model, approximate=args.allow_approximate, **about)
    macs, params = build.prunable_share(imported.groups, imported.accounting)
    entries = build.group_entries(imported.groups)
    cost = build.group_macs(imported.groups, imported.accounting)
    for entry in entries:
        entry["macs"] = cost[entry["id"]]
        del entry["kept"], entry["removed"]
    report = {
        "model": Path(args.model).name,
        "macs": imported.size.macs,
        "params": imported.size.params,
        "bytes": imported.size.bytes,
        "prunable": {"macs": macs, "params": params},
        "groups": entries,
    }
    if args.json:
        print(json.dumps(report, indent=1))
        return
    console = _console(args)
    shown = [e for e in entries if args.verbose or e["macs"] or not e["frozen"]]
    terminal.groups(console, shown, None if args.verbose else 60)
    free = sum(not e["frozen"] for e in entries)
    size = imported.size
    console.print(
        f"\n[bold]{escape(Path(args.model).name)}[/]: {terminal.number(size.macs)} MACs, {terminal.number(size.params)} "
        f"parameters; {free} of {len(entries)} groups can be pruned, with layers that make up {100 * macs:.1f} % of the MACs; "
        f"their tensors hold {100 * params:.1f} % of the parameters"
    )


def calibrate(args: argparse.Namespace) -> None:
    """onnxprune calibrate."""
    out = Path(args.out)
    _check_outputs(args, [out], [args.model, args.data])
    if args.data is None:
        raise DataError("`onnxprune calibrate` needs --data", hint="give images, an .npz, or script.py:function")
    with terminal.progress(args.quiet) as tell:
        saliency = api.calibrate(args.model, args.data, progress=tell, **_options(args))
    saliency.save(out)
    _console(args).print(f"written: [bold]{escape(str(out))}[/] ({saliency.criterion}, {saliency.samples} samples)")


def merge(args: argparse.Namespace) -> None:
    """onnxprune merge."""
    out = Path(args.out)
    files.writable(out, force=args.force)
    parts = [Saliency.load(p) for p in args.parts]
    total = parts[0]
    for part in parts[1:]:
        total = total.merged(part)
    total.save(out)
    what = f"{total.criterion}, {total.samples} samples of {len(parts)} calibrations"
    _console(args).print(f"written: [bold]{escape(str(out))}[/] ({what})")


def apply(args: argparse.Namespace) -> None:
    """onnxprune apply."""
    out = Path(args.out)
    outs = [out, files.data_file(out)] if files.external_files(args.model) else [out]
    _check_outputs(args, outs, [args.model, args.plan])
    try:
        text = Path(args.plan).read_text()
    except (OSError, UnicodeDecodeError) as error:
        hint = "plans are made by `onnxprune prune --save-plan`"
        raise OptionError(f"cannot read the plan {args.plan}: {_reason(error)}", hint=hint) from None
    imported, pruned = api.applied(args.model, Plan.from_json(text), **_about_model(args))
    files.save(pruned, out, external=imported.external)
    _console(args).print(f"written: [bold]{escape(str(out))}[/]")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def verify(args: argparse.Namespace) -> None:
    """onnxprune verify."""
    path = Path(args.report) if args.report else api.report_path(args.pruned)
    report = _read_report(path) if args.report or path.exists() else None
    with terminal.progress(args.quiet) as tell:
        found = api.verify(
            args.original,
            args.pruned,
            report,
            args.data,
            certificate=_read_certificate(api.certificate_path(args.pruned)),
            validation=args.validation,
            certify=args.certify,
            progress=tell,
            **_options(args),
        )
    if args.json:
        print(json.dumps(found, indent=1))
        return
    console = _console(args)
    for line in terminal.validation_lines(found["validation"]):
        console.print(line)
    told = found["certificate"]
    if report is not None:
        console.print("the report is of these two files")
    elif told is None:
        console.print(f"no report at {escape(str(path))}, and no certificate: masked equivalence was not checked")
    for line in terminal.certificate_lines(told):
        console.print(line)
    for line in found["rechecked"]:
        console.print(f"re-checked, {escape(line)}" if not line.startswith("not ") else escape(line))


def _read_certificate(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        hint = "certificates are made by `onnxprune prune`"
        raise OptionError(f"{path} is not a certificate of onnxprune: {_reason(error)}", hint=hint) from None


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        if not isinstance(report, dict) or "groups" not in report:
            raise ValueError("no groups in it")
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "reports are made by `onnxprune prune`"
        raise OptionError(f"{path} is not a report of onnxprune: {_reason(error)}", hint=hint) from None


def bench(args: argparse.Namespace) -> None:
    """onnxprune bench."""
    benching.run(args, _console(args), _images(args))


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
    console = _console(args)
    console.print(f"$ onnxprune prune {model.name} --data {data.name} --macs {args.macs:g} -o {out}\n", markup=False)
    with terminal.progress(args.quiet) as tell:
        result = api.prune(model, data, budget=Budget("macs", args.macs), progress=tell)
    result.save(out, force=args.out is None)
    terminal.layers(console, result.report)
    console.print()
    terminal.summary(console, result.report, str(out))
