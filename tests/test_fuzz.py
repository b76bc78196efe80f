"""Random graphs, a fixed few of them: nothing is wrong with any, and the fuzzer sees what is made wrong on purpose."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from onnxprune.passes import surgery
from onnxprune.rules import STANDARD, Fact, Rule, View
from onnxprune.rules.elementwise import unary
from onnxprune.rules.movement import transpose

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from fuzzing import table
from fuzzing.check import Outcome, examine
from fuzzing.graphs import make

# Of each of these something was once wrong; a change to the makers of operators makes other graphs of their numbers.
ONCE_WRONG = (12000361, 12000430, 12000535, 13000505, 13000839, 15000102, 16000244)
OTHERS = range(20)
FEW = 12  # graphs within which the fuzzer has to see that something is wrong


def tried(seed: int, *around: str) -> Outcome | None:
    case = make(seed, around)
    return None if case is None else examine(case)


@cache
def found(seed: int) -> Outcome | None:
    return tried(seed)


@pytest.mark.parametrize("seed", [*ONCE_WRONG, *OTHERS])
def test_nothing_is_wrong_with_random_graphs(seed: int) -> None:
    made = found(seed)
    assert made is None or not made.findings, made


def test_these_graphs_have_channels_that_are_cut() -> None:
    made = [m for m in map(found, OTHERS) if m is not None]
    assert sum(m.prunable > 0 for m in made) > len(OTHERS) / 2
    assert sum(m.plans for m in made) > len(OTHERS)
    assert len(set().union(*(m.cut for m in made))) > 20


def test_every_operator_with_a_rule_and_a_runtime_is_made() -> None:
    assert table.missing() == []


# ---- what is made wrong on purpose


def first_axes(view: View) -> list[Fact]:
    """A Transpose that forgets about the order in which its axes stand."""
    facts = list(transpose(view))
    return [type(f)(f.a, view.y(f.a.axis)) if hasattr(f, "a") else f for f in facts]


def seen(*around: str) -> Counter[str]:
    """What is wrong with the first graphs that something is wrong with."""
    found: Counter[str] = Counter()
    for seed in range(FEW):
        made = tried(seed, *around)
        if made is not None and made.findings:
            found.update(f.kind for f in made.findings)
            break
    return found


@pytest.mark.parametrize(("op", "wrong"), [("Softmax", unary), ("Transpose", first_axes)], ids=["Softmax", "Transpose"])
def test_a_wrong_rule_is_found(op: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STANDARD, ("", op), Rule(wrong))  # type: ignore[arg-type]
    assert seen(op)


@pytest.mark.parametrize("name", ["_delete", "_silence"])
def test_wrong_surgery_is_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbours of the channels go, or are silenced, that should."""
    right: Callable[..., Any] = getattr(surgery, name)

    def shifted(positions: Any, *rest: Any) -> Any:
        value, axis = rest[-2:]
        return right((positions + 1) % value.shape[axis], *rest)

    monkeypatch.setattr(surgery, name, shifted)
    assert "value" in seen()
