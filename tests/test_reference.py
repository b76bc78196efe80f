"""The reference pages are what the tool makes of the parser and the docstrings, and nothing is missing in them."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
from pathlib import Path

import pytest

import onnxprune
from onnxprune.cli.program import command_line

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("reference", ROOT / "tools" / "reference.py")
assert spec is not None and spec.loader is not None
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


@pytest.mark.parametrize("name", reference.PAGES)
def test_the_page_is_up_to_date(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == "\n".join(reference.PAGES[name]()) + "\n", "run python tools/reference.py"


def test_every_command_and_option_is_on_the_page() -> None:
    page = (ROOT / "docs" / "cli.md").read_text()
    for name, parser in command_line().commands.items():
        assert f"\n## {name}\n" in page
        section = page.split(f"\n## {name}\n")[1].split("\n## ")[0] + page.split(reference.SHARED)[1]
        for action in parser.actions:
            for word in action.option_strings:
                assert word in ("-h", "--help") or f"`{word}" in section, f"{name} {word}"


def test_an_option_without_a_meaning_is_refused() -> None:
    bare = argparse.ArgumentParser(prog="x").add_argument("--mute")
    with pytest.raises(LookupError, match="mute"):
        reference._row(bare, "x")


def test_everything_public_is_on_the_page_and_says_what_it_is() -> None:
    page = (ROOT / "docs" / "python.md").read_text()
    for name in onnxprune.__all__:
        assert f"\n## {name}\n" in page
        assert inspect.getdoc(getattr(onnxprune, name))
