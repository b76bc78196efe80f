"""Every operator has a decision, and the page that lists them is up to date."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as ort

from onnxprune.rules import STANDARD
from onnxprune.rules.frozen import REASONS

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("operators", ROOT / "tools" / "operators.py")
assert spec and spec.loader
operators = importlib.util.module_from_spec(spec)
spec.loader.exec_module(operators)


def test_every_operator_of_the_installed_onnx_has_a_decision() -> None:
    assert operators.undecided() == []


def test_a_new_operator_would_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {**operators.versions(), ("", "Conv3"): [99], ("ai.onnx.ml", "Forest"): [7]}
    monkeypatch.setattr(operators, "versions", lambda: known)
    assert operators.undecided() == ["ai.onnx.ml::Forest", "ai.onnx::Conv3"]


def test_every_operator_of_the_installed_runtime_has_a_decision() -> None:
    schemas = {(s.domain, s.name) for s in ort.get_all_operator_schema()}
    mine = {key for key in schemas if key[0] in ("com.microsoft", "com.microsoft.nchwc")}
    assert len(mine) > 100
    assert sorted(mine - operators.decisions().keys()) == []


def test_an_operator_has_a_rule_or_a_reason_but_not_both() -> None:
    assert sorted(STANDARD.keys() & REASONS.keys()) == []


def test_the_page_is_up_to_date() -> None:
    text = operators.PAGE.read_text()
    if f"onnx {onnx.__version__} " not in text:
        pytest.skip(f"the page was made with another onnx than the installed {onnx.__version__}")
    assert text == "\n".join(operators.page()) + "\n", "run python tools/operators.py"
