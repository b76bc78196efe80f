"""What a person reads in the terminal: the verdict, a table of layers, the frozen groups with their reasons."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import markup
from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table

from onnxprune.report import sentences
from onnxprune.report.words import number, percent, visible

LEAST = 16  # columns that a name keeps in a table
WORDS = 30  # columns that a reason keeps


def escape(text: str) -> str:
    """Text from a file, as a console's markup that shows just that: neither tags nor control characters act."""
    return markup.escape(visible(text))


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
        *map(escape, sentences.recovery(report["recovery"])),
        *training_lines(report["finetune"]),
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


def training_lines(found: Mapping[str, Any] | None) -> Iterator[str]:
    """What fine-tuning was worth."""
    if found is None:
        return
    name, worth = ("same answer", 100.0) if found["metric"] == "agreement" else ("relative L2", 1.0)
    unit = " %" if worth > 1 else ""
    change = f"{worth * found['before']:.4g}{unit} -> {worth * found['after']:.4g}{unit}"
    gain = f"{name} {change} on {found['held_out']} held-out samples"
    told = f"{found['epochs']} epochs on {found['samples']} samples"
    if found["best"]:
        yield f"trained for {told} (best: epoch {found['best']}), {number(found['weights'])} weights: {gain}"
    else:
        yield f"not trained: none of {told} was better than the weights that were there; these were kept"


def trained(console: Console, report: Mapping[str, Any], out: str) -> None:
    """The verdict on a fine-tuning."""
    found = report["finetune"]
    for line in training_lines(found):
        console.print(line)
    before, top1 = found["held_out_before"], report["validation"]["top1"]
    if before is not None and before["top1"] and top1:
        original, at_first, now = (100 * v for v in (top1[0], before["top1"][1], top1[1]))
        console.print(f"top-1 of the original {original:.2f} %, before training {at_first:.2f} %, now {now:.2f} %")
    for line in validation_lines(report["validation"]):
        console.print(line)
    if report["certificate"] is not None:
        for line in certificate_lines(report["certificate"]):
            console.print(line)
    else:
        console.print(escape(f"certificate: none ({found['certificate']})"))
    console.print(f"written: [bold]{escape(out)}[/] ({found['seconds']:.1f} s)")


def epochs(quiet: bool, total: int | None) -> Any:
    """Yields a line of the standard error for every epoch of a training; None when quiet."""

    def say(epoch: Any) -> None:
        score = epoch.score
        same = "" if score.agreement is None else f", same answer {100 * score.agreement:.2f} %"
        right = "" if score.accuracy is None else f", top-1 {100 * score.accuracy:.2f} %"
        left = f"{epoch.left / 60:.0f} min" if epoch.left > 90 else f"{epoch.left:.0f} s"
        print(
            f"epoch {epoch.number}/{total}: loss {epoch.loss:.4g}, held out: distance {score.distance**0.5:.4g}{same}{right}; "
            f"{epoch.rate:.0f} samples/s, {left} left",
            file=sys.stderr,
            flush=True,
        )

    return None if quiet else say


def validation_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What re-validation found, as markup."""
    return map(escape, sentences.validation(found))


def certificate_lines(certificate: Mapping[str, Any] | None) -> Iterator[str]:
    """The four parts of the certificate, vacuous or not, as markup."""
    return map(escape, sentences.certificate(certificate))


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
    """A table whose first column gives way when the terminal is narrow, and whose last `text` columns are words.

    Where that is not enough the last columns of numbers are left out.
    """
    rows = [[visible(cell) for cell in row] for row in rows]
    widths = [max(cell_len(h), *(cell_len(r[i]) for r in rows), 1) if rows else cell_len(h) for i, h in enumerate(headers)]
    shown, tail = list(range(len(headers) - text)), list(range(len(headers) - text, len(headers)))

    def room() -> int:
        return console.width - sum(widths[i] + 2 for i in shown[1:]) - (WORDS + 2 if text else 0)

    while room() < min(widths[0], LEAST) and len(shown) > 2:
        shown.pop()
    first = min(widths[0], max(1, room()))
    grid = Table(box=None, header_style="bold", pad_edge=False)
    grid.add_column(headers[0], no_wrap=True, width=first)
    for i in shown[1:]:
        grid.add_column(headers[i], justify="right", no_wrap=True, min_width=widths[i])
    for i in tail:
        grid.add_column(headers[i], overflow="fold")
    for row in rows:
        grid.add_row(markup.escape(_end(row[0], first)), *(markup.escape(row[i]) for i in (*shown[1:], *tail)))
    console.print(grid)


def _end(name: str, room: int) -> str:
    """The end of a long name, which tells layers apart better than its beginning."""
    if cell_len(name) <= room:
        return name
    while name and cell_len(name) > room - 1:
        name = name[1:]
    return "…" + set_cell_size(name, room - 1)


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


def sweep(console: Console, told: Mapping[str, Any]) -> None:
    """The networks of a sweep; those that no other beats in size and quality are marked."""
    rows = []
    for p in told["points"]:
        found, certified = p["validation"], p["population"]
        rows.append(
            (
                p["file"],
                "*" if p["pareto"] else "",
                percent(p["kept"]["macs"], 1),
                f"{number(p['pruned']['bytes'])}B",
                *(percent(v, 1) if v is not None else "-" for v in (found["top1"] and found["top1"][1], found["agreement"])),
                "-" if found["relative_l2"] is None else f"{found['relative_l2']:#.3g}",
                "-" if certified["changes"] is None else f"{100 * certified['changes']:.2f} %",
            )
        )
    table(console, ("network", "", "MACs", "file", "top-1", "same", "moved", "change <="), rows)
    for line in sentences.sweep(told):
        console.print(escape(line))
