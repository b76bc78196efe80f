"""What a person reads in the terminal: the verdict, a table of layers, the frozen groups with their reasons."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

STAGES = {
    "load": "reading models",
    "memory": "measuring memory",
    "time": "timing",
    "costs": "timing layers",
    "trials": "timing networks",
    "compile": "compiling once",
    "calibrate": "calibrating",
    "eliminate": "eliminating channels",
    "recover": "recovering layers",
    "search": "certifying networks",
    "validate": "comparing outputs",
}


def number(n: float) -> str:
    """1234567 -> 1.23 M."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.3g} {unit}"
    return f"{n:g}"


def percent(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def summary(console: Console, report: Mapping[str, Any], out: str | None) -> None:
    """The verdict: sizes, accuracy, checks, certificate."""
    budget = report["budget"]
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    for _ in range(3):
        grid.add_column(justify="right")
    before, after = report["original"], report["pruned"]
    for key, name, unit in (("macs", "MACs", ""), ("params", "parameters", ""), ("bytes", "file", "B")):
        grid.add_row(
            name,
            number(before[key]) + unit,
            f"-> {number(after[key])}{unit}",
            f"kept {percent(after[key], before[key])}",
        )
    console.print(f"[bold]{escape(report['model'])}[/]  method {report['method']}, budget {budget['kind']} {budget['value']:g}")
    console.print(grid)
    for line in [
        *latency_lines(report["latency"]),
        *recovery_lines(report["recovery"]),
        *validation_lines(report["validation"]),
    ]:
        console.print(line)
    for line in certificate_lines(report["certificate"]):
        console.print(line)
    if budget["kind"] == "eps" and not any(g["removed"] for g in report["groups"]):
        console.print(f"the smallest network with an error of at most {budget['value']:g} is the whole network")
    if out:
        console.print(f"written: [bold]{escape(out)}[/] ({sum(report['seconds'].values()):.1f} s)")


def latency_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    """What was asked of a budget of latency, predicted and measured, and on what."""
    if found is None:
        return
    part, machine = found["measured"], found["machine"]
    plural = "" if machine["threads"] == 1 else "s"
    where = f"{machine['threads']} thread{plural}, {machine['providers'][0].removesuffix('ExecutionProvider')}"
    took = f"{1e3 * found['seconds']['original']['median']:.3g} -> {1e3 * found['seconds']['pruned']['median']:.3g} ms"
    yield (
        f"latency: {took}, {part['median']:.3f} of the original's (quartiles {part['low']:.3f} - {part['high']:.3f} of "
        f"{found['rounds']} rounds; asked {found['asked']:g}, predicted {found['predicted']:.3f}), {where}"
    )
    if not found["met"]:
        yield "note: the latency is not within 5 % of what was asked; a quiet machine or other widths may allow it"


def recovery_lines(recovery: Mapping[str, Any]) -> Iterator[str]:
    """What recovery was worth, and what it left alone."""
    errors = {k: "-" if v is None else f"{v:.3g}" for k, v in recovery["held_out_relative_l2"].items()}
    if recovery["kept"] != "none":
        gain = f"on held-out samples outputs moved by {errors['none']} before, {errors[recovery['kept']]} after (relative L2)"
        yield f"recovered by {recovery['kept']}, {recovery['layers']} layers from {recovery['samples']} samples: {gain}"
    elif recovery["reason"]:
        yield escape(f"not recovered: {recovery['reason']}")
    if recovery["left"]:
        yield escape(f"layers that recovery could not solve for: {len(recovery['left'])} (see the report)")


def validation_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What re-validation found, in words."""
    error = found["masked_max_relative_error"]
    equal = "" if error is None else f", equals the masked original to {error:.1e}"
    yield f"checked: ONNX checker {'ok' if found['checker'] else 'refuses the original too'}, ONNX Runtime ok{equal}"
    parts = []
    if found["top1"]:
        parts.append("top-1 {:.2f} % -> {:.2f} %".format(*(100 * v for v in found["top1"])))
    if found["agreement"] is not None:
        parts.append(f"same answer {100 * found['agreement']:.1f} %")
    if found["relative_l2"] is not None:
        parts.append(f"outputs moved by {found['relative_l2']:.3g} (relative L2)")
    if parts:
        yield f"on {found['samples']} samples: " + ", ".join(parts)
    for note in found["notes"]:
        yield f"note: {escape(note)}"


def certificate_lines(certificate: Mapping[str, Any] | None) -> Iterator[str]:
    """The four parts of the certificate in words, vacuous or not."""
    if certificate is None:
        yield "certificate: none (no sample data, and a criterion without an error bound)"
        return
    if not certificate["plan"]:
        yield "certificate: nothing was cut, the outputs are the original's"
        return
    parts = (("sampling", _sampling), ("calibration", _calibration), ("network", _network), ("population", _population))
    silent: dict[str, list[str]] = {}
    for name, words in parts:
        part = certificate[name]
        if not part["applies"]:
            silent.setdefault(part["reason"], []).append(name)
        for line in words(part) if part["applies"] else ():
            yield escape(f"certificate, {name}: {line}")
    for reason, names in silent.items():
        yield escape(f"certificate, {' and '.join(names)}: nothing, because {reason}")


def _sampling(part: Mapping[str, Any]) -> Iterator[str]:
    found = part["layers"].values()
    empty = sum(x["vacuous"] for x in found)
    worst = "infinity" if any(x["epsilon"] is None for x in found) else f"{max(x['epsilon'] for x in found):.3g}"
    if empty:
        yield f"vacuous (epsilon >= 1) in {empty} of {len(found)} layers, up to {worst}: there it guarantees nothing"
    else:
        yield f"epsilon <= {worst} in every layer, with probability {1 - part['delta'] - part['delta_calibration']:g}"


def _calibration(part: Mapping[str, Any]) -> Iterator[str]:
    found = part["layers"].values()
    empty, worst = sum(x["vacuous"] for x in found), max(x["bound"] for x in found)
    said = f", vacuous (>= 1) in {empty} of {len(found)} layers" if empty else ""
    said += " (by upper bounds of the sensitivities)" if part["mode"] == "bound" else ""
    yield f"on the {part['samples']} samples themselves pre-activations move by at most {worst:.3g} of the absolute sum{said}"


def _network(part: Mapping[str, Any]) -> Iterator[str]:
    for name, x in part["outputs"].items():
        if "absent" in x:
            yield f"no bound for output '{name}': {x['absent']}"
        else:
            bound = "without limit" if x["max_abs_bound"] is None else f"by at most {x['max_abs_bound']:.3g}"
            said = ", vacuous" if x["vacuous"] else ""
            yield (
                f"on {part['samples']} samples '{name}' moves {bound} (measured: {x['max_abs_measured']:.3g}; relative L2 "
                f"{x['relative_l2_measured']:.3g}){said}"
            )


def _population(part: Mapping[str, Any]) -> Iterator[str]:
    if (drop := part.get("max_drop")) is not None:
        what = f"drops by at most {100 * drop['value']:g} points with confidence {1 - drop['delta']:g}"
        yield f"{what} (limit found: {100 * drop['limit']:.3g}), certified down to {drop['macs']:g} of the MACs"
    yield f"with confidence {1 - part['delta']:g}, from {part['samples']} held-out samples:"
    for s in part["statements"]:
        if s["kind"] == "top1_changes":
            yield f"at most {100 * s['alpha']:.3g} % of inputs change their top-1 answer (seen: {s['changed']})"
        elif s["kind"] == "top1_drop":
            yield f"the top-1 accuracy falls by at most {100 * s['drop']:.3g} points (lost {s['lost']}, gained {s['gained']})"
        elif s["x"] is None:
            yield f"nothing of {100 * s['alpha']:g} % of inputs: that takes {s['samples_needed']} samples, or finite outputs"
        else:
            yield f"at most {100 * s['alpha']:g} % of inputs move their outputs by more than {s['x']:.3g} (relative L2)"


def layers(console: Console, report: Mapping[str, Any]) -> None:
    """Layer by layer: channels and MACs before and after, and how much sensitivity there was."""
    rows = []
    for layer in report["layers"]:
        before, after = layer["macs"]
        rows.append(
            (
                layer["name"],
                _change(*layer["in"]),
                _change(*layer["out"]),
                number(before),
                number(after),
                percent(after, before),
                f"{layer['sensitivity_sum']:.2f}" if layer["sensitivity_sum"] else "-",
                f"{layer['epsilon']:.3g}" if layer["epsilon"] else "-",
            )
        )
    table(console, ("layer", "in", "out", "MACs", "after", "kept", "sens.", "epsilon"), rows)


def table(console: Console, headers: Sequence[str], rows: Sequence[Sequence[str]], text: int = 0) -> None:
    """A table whose first column gives way when the terminal is narrow, and whose last `text` columns are words."""
    made = Table(box=None, header_style="bold", pad_edge=False)
    widths = [max(len(h), *(len(r[i]) for r in rows), 1) if rows else len(h) for i, h in enumerate(headers)]
    numeric = sum(w + 2 for w in widths[1 : len(headers) - text])
    room = max(16, console.width - numeric - (30 if text else 0))
    made.add_column(headers[0], no_wrap=True, width=min(widths[0], room))
    for i, header in enumerate(headers[1:], start=1):
        if i < len(headers) - text:
            made.add_column(header, justify="right", no_wrap=True, min_width=widths[i])
        else:
            made.add_column(header, overflow="fold")
    for row in rows:
        made.add_row(escape(_tail(row[0], min(widths[0], room))), *(escape(c) for c in row[1:]))
    console.print(made)


def _tail(name: str, room: int) -> str:
    """The end of a long name, which tells layers apart better than its beginning."""
    return name if len(name) <= room else "…" + name[1 - room :]


def _change(before: int, after: int) -> str:
    return f"{before} -> {after}" if before != after else str(before)


def groups(console: Console, entries: Sequence[Mapping[str, Any]], limit: int | None) -> None:
    """The channel groups: size, members, MACs they take part in, and why those that are frozen are."""
    rows = [
        (
            g["id"],
            str(g["size"]),
            str(len(g["members"])),
            number(g["macs"]),
            _state(g),
        )
        for g in entries[:limit]
    ]
    table(console, ("group", "channels", "tensors", "MACs", "state"), rows, text=1)
    if limit is not None and len(entries) > limit:
        console.print(f"... and {len(entries) - limit} more (-v shows all)")


def _state(entry: Mapping[str, Any]) -> str:
    """Whether a group can be pruned, and what would unfreeze it where something would."""
    if entry["frozen"]:
        return f"frozen: {entry['reason']}" + (f" (to unfreeze: {entry['remedy']})" if entry["remedy"] else "")
    return "can be pruned" if entry["exact"] else f"can be pruned, but not exactly: {entry['flaw']}"


@contextmanager
def progress(quiet: bool) -> Iterator[Any]:
    """Yields progress(stage, done, total): bars on a terminal, plain lines in a log, nothing when quiet."""
    if quiet:
        yield lambda stage, done, total: None
    elif sys.stderr.isatty():
        with _bars() as bars:
            tasks: dict[str, TaskID] = {}

            def tell(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bars.add_task(STAGES.get(stage, stage), total=total)
                bars.update(tasks[stage], completed=done)

            yield tell
    else:
        shown: dict[str, int] = {}

        def log(stage: str, done: int, total: int) -> None:
            tenth = 10 * done // max(1, total)
            if shown.get(stage) != tenth and (done == total or tenth % 5 == 0):
                shown[stage] = tenth
                print(f"{STAGES.get(stage, stage)}: {done}/{total}", file=sys.stderr, flush=True)

        yield log


def _bars() -> Progress:
    columns = (TextColumn("{task.description:>18}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)
