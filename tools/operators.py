#!/usr/bin/env python3
"""Write docs/operators.md: what onnxprune does at every operator, from its tables of rules and of reasons to freeze.

    python tools/operators.py [--check]

--check: write nothing, exit with 1 if the page is out of date or an operator of the installed onnx has no decision.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import onnx

from onnxprune.control import FLAT
from onnxprune.rules import FAMILIES
from onnxprune.rules.frozen import REASONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "operators.md"
CONSTANTS = {("", "Constant"): "constant: its value is cut like an initializer's"}
HEAD = """# What happens at every operator

Made by `python tools/operators.py` from the tables in `onnxprune/rules`, for onnx {version} (opset {opset}). A test fails
when an operator of ONNX has no line here.

*Linear layer*: the channels that its weights sum over, and those that it makes, can go. *Attention*: whole heads, and places
within heads where those have an axis of their own. *Element by element* and *data movement*: channels pass. *Normalisation,
pooling or reduction*: channels pass unless the operator computes across them; then they are frozen, or cut approximately
with `--allow-approximate`. *Sampling or transform of space*: channels pass, space does not. *Frozen*: nothing that reaches
the operator is cut, for the reason that `inspect` gives too. An axis that a rule does not follow is always frozen.
"""


def decisions() -> dict[tuple[str, str], str]:
    """What is done at each operator, keyed (domain, operator); rules come before reasons."""
    found = {key: f"frozen: {reason}" for key, reason in REASONS.items()} | CONSTANTS
    found |= {key: family for family, rules in FAMILIES.items() for key in rules if key[0] != FLAT}
    return found | {("", op): "control flow: its bodies are followed" for op in ("If", "Loop", "Scan")}


def versions() -> dict[tuple[str, str], list[int]]:
    """The opset versions in which the installed onnx defines each operator, oldest first."""
    known: dict[tuple[str, str], list[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        known.setdefault((schema.domain, schema.name), []).append(schema.since_version)
    return {key: sorted(numbers) for key, numbers in known.items()}


def undecided() -> list[str]:
    """Operators of the installed onnx that have no decision."""
    return sorted(f"{domain or 'ai.onnx'}::{op}" for domain, op in versions().keys() - decisions().keys())


def page() -> Iterator[str]:
    """The lines of docs/operators.md."""
    yield from HEAD.format(version=onnx.__version__, opset=onnx.defs.onnx_opset_version()).splitlines()
    known, decided = versions(), decisions()
    domains = sorted({domain for domain, _ in decided | known}, key=lambda d: (d.startswith("com."), d))
    for domain in domains:
        lines = {op: what for (where, op), what in decided.items() if where == domain}
        yield from ("", f"## {domain or 'ai.onnx'} ({len(lines)})", "")
        yield from ("| operator | since version | decision |", "| --- | --- | --- |")
        for op in sorted(lines):
            since = ", ".join(map(str, known.get((domain, op), []))) or ("1" if domain.startswith("com.") else "ONNX Runtime")
            yield f"| {op} | {since} | {lines[op]} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = "\n".join(page()) + "\n"
    if missing := undecided():
        print(f"no decision: {', '.join(missing)}", file=sys.stderr)
        return 1
    if args.check:
        return int(PAGE.read_text() != text)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
