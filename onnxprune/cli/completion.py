"""`completion`: a script that makes a shell complete commands, options, their choices and file names."""

from __future__ import annotations

import argparse

import shtab

from onnxprune.cli import shared
from onnxprune.cli.arguments import Add, Parser

SHELLS = ("bash", "zsh", "fish")
FILES = {"MODEL", "ORIGINAL", "PRUNED", "PLAN", "CALIB", "DATA", "OUT", "FILE.json", "FILE.toml"}
"""Placeholders that stand for a file; `--data` has none."""


def register(add: Add) -> None:
    sub = add("completion", "print a script that completes commands, options and files in a shell", completion)
    sub.add_argument("shell", choices=SHELLS, help="bash and zsh: eval the script; fish: source it")


def completion(args: argparse.Namespace) -> None:
    """onnxprune completion."""
    made = script(args.shell)
    if args.json:
        shared.print_json({"shell": args.shell, "script": made})
        return
    print(made)


def script(shell: str) -> str:
    """The script for one of `SHELLS`, of the command line as it is."""
    from onnxprune.cli.program import command_line  # which imports this module, to list its command

    parser = command_line()
    for sub in parser.commands.values():
        _mark(sub)
    made: str = shtab.complete(parser, shell)
    return made


def _mark(parser: Parser) -> None:
    """Tells shtab which words are names of files or folders."""
    for action in parser.actions:
        if action.metavar in FILES or action.dest == "data":
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # shtab's own protocol
        elif action.metavar == "DIR":
            action.complete = shtab.DIRECTORY  # type: ignore[attr-defined]
