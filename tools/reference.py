#!/usr/bin/env python3
"""Write docs/cli.md and docs/python.md: the reference, from the parser of the command line and the public docstrings.

    python tools/reference.py [--check]

--check: write nothing, exit with 1 if a page is out of date.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import onnxprune
from onnxprune import errors
from onnxprune.cli.program import command_line

DOCS = Path(__file__).resolve().parent.parent / "docs"
Group: TypeAlias = tuple[str, tuple[str, ...]]
"""(title, rows of a table)"""

CLI_HEAD = """# Command line

Made by `python tools/reference.py` from the parser of `onnxprune`, so it says what `onnxprune COMMAND --help` says.

Exit codes: 0 done; 2 the caller's mistake or a bad input, in one line on standard error; 3 validation failed, nothing was
written; 1 a bug (`--debug` shows where); 130 interrupted. Options are never abbreviated. A file that exists is replaced with
`--force` only, and every file is written whole or not at all."""

PYTHON_HEAD = """# Python

Made by `python tools/reference.py` from the docstrings of what `onnxprune` exports. Everything else may change."""

SHARED = "## Options that several commands have"
UNTITLED = {"positional arguments", "options"}


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _placeholder(action: argparse.Action) -> str:
    names = action.metavar or ("\\|".join(map(str, action.choices)) if action.choices else action.dest.upper())
    if isinstance(names, tuple):
        return " ".join(names)
    return {"+": f"{names} ...", "?": f"[{names}]"}.get(str(action.nargs), names)


def _default(action: argparse.Action, text: str) -> str:
    if any(action.default is v for v in (None, False, argparse.SUPPRESS)) or action.default == [] or "default" in text:
        return ""
    value = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
    return f"`{value}`"


def _row(action: argparse.Action, prog: str) -> str:
    """A line of a table: option, meaning, default; LookupError for an option without a meaning."""
    if not action.help:
        raise LookupError(f"{prog} says nothing about {action.dest}")
    text = (action.help or "") % {**vars(action), "prog": prog}
    value = "" if action.nargs == 0 else _placeholder(action)
    names = [*action.option_strings[:-1], " ".join(filter(None, [*action.option_strings[-1:], value]))]
    what = ", ".join(f"`{n}`" for n in names)
    needed = "required" if action.required and action.option_strings else _default(action, text)
    return f"| {what} | {_cell(text)} | {needed} |"


def _groups(parser: argparse.ArgumentParser) -> list[Group]:
    """The groups in the order of the help; what has no group of its own comes first, under no title."""
    found: dict[str, tuple[str, ...]] = {}
    for group in parser._action_groups:
        rows = tuple(_row(a, parser.prog) for a in group._group_actions if a.dest != "help")
        if rows:
            title = "" if group.title in UNTITLED else group.title or ""
            found[title] = (*found.get(title, ()), *rows)
    return list(found.items())


def _table(rows: tuple[str, ...]) -> Iterator[str]:
    yield from ("", "| option | meaning | default |", "| --- | --- | --- |", *rows)


def _heading(title: str) -> str:
    return title[:1].upper() + title[1:]


def _anchor(title: str) -> str:
    return _heading(title).lower().replace(" ", "-")


def cli_page() -> Iterator[str]:
    """The lines of docs/cli.md."""
    parser = command_line()
    yield from CLI_HEAD.splitlines()
    groups = {name: _groups(sub) for name, sub in parser.commands.items()}
    often = Counter(g for some in groups.values() for g in some if g[0])
    shared = [g for g, times in often.items() if times > 1]
    yield from ("", "| command | what it does |", "| --- | --- |")
    yield from (f"| [`{name}`](#{name}) | {_cell(sub.description or '')} |" for name, sub in parser.commands.items())
    for name, sub in parser.commands.items():
        places = " ".join(_placeholder(a).replace("\\|", "|") for a in sub.actions if not a.option_strings)
        needed = " ".join(f"{a.option_strings[0]} {_placeholder(a)}" for a in sub.actions if a.option_strings and a.required)
        usage = " ".join(["onnxprune", name, *filter(None, [places, needed]), "[options]"])
        yield from ("", f"## {name}", "", sub.description or "", "", "```", usage, "```")
        for title, rows in (g for g in groups[name] if g not in shared):
            if title:
                yield from ("", f"**{_heading(title)}**")
            yield from _table(rows)
        also = [title for title, rows in groups[name] if (title, rows) in shared]
        yield from ("", "Also: " + ", ".join(f"[{title}](#{_anchor(title)})" for title in also) + ".")
    yield from ("", SHARED)
    for title, rows in shared:
        yield from ("", f"### {_heading(title)}", *_table(rows))


def _signature(name: str, what: Any) -> Iterator[str]:
    """The call, a parameter a line where it is long."""
    found = inspect.signature(what)
    plain = {k: p.replace(annotation=_plain(p.annotation)) for k, p in found.parameters.items() if k not in ("self", "cls")}
    result = found.return_annotation if found.return_annotation not in ("None", None, inspect.Signature.empty) else ""
    parts, keyword = [], False
    for p in plain.values():
        if p.kind is p.KEYWORD_ONLY and not keyword:
            parts.append("*")
            keyword = True
        parts.append(_parameter(p))
    end = f" -> {_plain(result)}" if result else ""
    line = f"{name}({', '.join(parts)}){end}"
    yield from [line] if len(line) <= 120 else [f"{name}(", *(f"    {p}," for p in parts), f"){end}"]


def _parameter(p: inspect.Parameter) -> str:
    name = {p.VAR_KEYWORD: "**", p.VAR_POSITIONAL: "*"}.get(p.kind, "") + p.name
    kind = f": {p.annotation}" if p.annotation is not p.empty else ""
    if p.default is p.empty:
        return name + kind
    return f"{name}{kind} = {'...' if repr(p.default) == '<factory>' else repr(p.default)}"


def _plain(annotation: Any) -> Any:
    return annotation if isinstance(annotation, str) else getattr(annotation, "__name__", annotation)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(kind).items():
        inner = value.func if isinstance(value, cached_property) else getattr(value, "fget", getattr(value, "__func__", value))
        if not name.startswith("_") and inspect.isfunction(inner) and inspect.getdoc(inner):
            yield name, value


def _class(name: str, kind: type) -> Iterator[str]:
    yield from ("", f"## {name}", "", "```", *_signature(name, kind), "```", "", inspect.getdoc(kind) or "")
    for member, value in _members(kind):
        inner = getattr(value, "__func__", value)
        prefix = f"{name}." if isinstance(value, (staticmethod, classmethod)) else "."
        call = list(_signature(prefix + member, inner)) if inspect.isfunction(inner) else [f".{member}"]
        doc = inspect.getdoc(inner if inspect.isfunction(inner) else value) or ""
        yield from ("", f"### {name}.{member}", "", "```", *call, "```", "", doc)


def python_page() -> Iterator[str]:
    """The lines of docs/python.md."""
    yield from PYTHON_HEAD.splitlines()
    public = {name: getattr(onnxprune, name) for name in onnxprune.__all__}
    for name, what in public.items():
        if inspect.isfunction(what):
            yield from ("", f"## {name}", "", "```", *_signature(name, what), "```", "", inspect.getdoc(what) or "")
    for name, what in public.items():
        if inspect.isclass(what):
            yield from _class(name, what)
    yield from ("", "## Errors", "")
    yield from ("| error (in `onnxprune.errors`) | when | exit code |", "| --- | --- | --- |")
    for name, kind in vars(errors).items():
        if inspect.isclass(kind) and issubclass(kind, onnxprune.OnnxPruneError) and kind is not onnxprune.OnnxPruneError:
            yield f"| `{name}` | {_cell(inspect.getdoc(kind) or '')} | {kind.exit_code} |"


PAGES = {"cli.md": cli_page, "python.md": python_page}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    stale = False
    for name, made in PAGES.items():
        text = "\n".join(made()) + "\n"
        stale |= not (DOCS / name).exists() or (DOCS / name).read_text() != text
        if not args.check:
            (DOCS / name).write_text(text)
    return int(args.check and stale)


if __name__ == "__main__":
    sys.exit(main())
