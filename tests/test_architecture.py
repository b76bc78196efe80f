"""The rooms of the house: imports point down only, files stay readable, nothing of a developer's machine is in them."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*(ROOT / "onnxprune").rglob("*.py"), *(ROOT / "passes").rglob("*.py")])
LAYERS = [
    {"errors"},
    {"channels", "clock", "confidence", "theory", "threads", "weights"},
    {"windows"},
    {"control", "large", "wire"},
    {"entries", "inline", "kinds"},
    {"files", "graph", "plan"},
    {"explore"},
    {"runtime", "symbolic", "data"},
    {"rules", "arithmetic", "edit", "merged", "origins", "poles", "roles", "rounding", "silence"},
    {"groups"},
    {"timing"},
    {"analysis", "contraction", "influence", "saliency", "budget", "torchgraph"},
    {"criteria", "selection"},
    {"recovery", "training"},
    {"certificate", "elimination", "plugins"},
    {"options", "report", "result"},
    {"passes"},
    {"imported"},
    {"splits", "targets"},
    {"tuning"},
    {"finish", "trials"},
    {"decide", "scoring"},
    {"certify", "checker"},
    {"pairs", "search"},
    {"finetuning"},
    {"job"},
    {"api", "bench", "pages", "trt"},
    {"cli", "__main__"},
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def room(path: Path) -> str:
    parts = path.relative_to(ROOT).parts
    return "passes" if parts[0] == "passes" or parts[1] == "passes" else Path(parts[1]).stem


def imports(path: Path) -> set[str]:
    """Modules of this project that a file imports, as dotted names below `onnxprune`."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "onnxprune":
            rest = node.module.split(".")[1:]
            found |= {".".join([*rest, alias.name]) for alias in node.names}
    return found


def modules(path: Path) -> set[str]:
    known = {room(p) for p in SOURCES}
    return {m.split(".")[0] for m in imports(path) if m.split(".")[0] in known}


@pytest.mark.parametrize("path", [p for p in SOURCES if room(p) != "__init__"], ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    here = room(path)
    assert here in RANK, f"{here} has no place in LAYERS"
    above = {m for m in modules(path) - {here} if RANK[m] > RANK[here]}
    assert not above, f"{here} imports {above}, which stand above it"


@pytest.mark.parametrize("path", sorted((ROOT / "passes").glob("*.py")), ids=lambda p: p.name)
def test_passes_do_not_import_each_other(path: Path) -> None:
    assert not {m for m in imports(path) if m.startswith("passes.")}


def test_only_runtime_imports_onnxruntime() -> None:
    users = [str(p.relative_to(ROOT)) for p in SOURCES if re.search(r"^\s*(import|from) onnxruntime", p.read_text(), re.M)]
    assert users == ["onnxprune/runtime.py"]


def test_torch_is_imported_for_training_only() -> None:
    users = {room(p) for p in SOURCES if re.search(r"^\s*(import|from) torch\b", p.read_text(), re.M)}
    assert users == {"torchgraph", "training"}
    program = "import sys, onnxprune.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 350
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


def test_public_functions_have_docstrings() -> None:
    missing = []
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and not ast.get_docstring(node):
                missing.append(f"{path.name}:{node.name}")
    assert not missing


def test_no_path_of_a_developers_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\n")
    files = [ROOT / f for f in listed if f] or SOURCES
    pattern = re.compile(rb"/ro{2}t/|/hom[e]/[a-z]|site-packages/|index[-]url")
    marked = [str(f) for f in files if f.is_file() and f != Path(__file__) and pattern.search(f.read_bytes())]
    assert not marked
