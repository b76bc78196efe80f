"""The documents: every command parses, every block that is marked `sh` or `python` runs, every link leads somewhere.

They run in a folder with the names that the documents use: `models/` is the real one, `model.onnx` and `vit.onnx` are tiny
networks with random weights, `images/` a few random pictures.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small
from onnx import TensorProto, helper, numpy_helper

from onnxprune import cli
from onnxprune.cli.program import command_line

ROOT = Path(__file__).resolve().parent.parent
PAGES = {p.relative_to(ROOT).as_posix(): p for p in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
GENERATED = {"docs/cli.md", "docs/python.md"}
PROMPT = re.compile(r"^(\$ )?onnxprune [a-z]")


def fenced(path: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", path.read_text(), re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """The words after `onnxprune` of every command in a block; comments are left out, as a shell does."""
    lines = text.replace("\\\n", " ").split("\n")
    return [shlex.split(line.removeprefix("$ "), comments=True)[1:] for line in lines if PROMPT.match(line)]


def blocks(path: Path) -> list[tuple[str, str]]:
    """What is to be run: of the README all commands, of the other documents what is marked."""
    chosen = [(kind, text) for kind, text in fenced(path) if kind in ("sh", "python")]
    return [(k or "sh", t) for k, t in fenced(path) if commands(t) or k == "python"] if path.name == "README.md" else chosen


def transformer(seed: int = 0) -> onnx.ModelProto:
    """One block of a vision transformer: 4 patches of 12 numbers from [N, 3, 8, 8], 3 heads of 4, an MLP of 24, 10 classes."""
    rng = np.random.default_rng(seed)
    weights: dict[str, Any] = {"one": np.ones(12, np.float32), "half": np.float32(0.5)}
    shapes = {
        "patch": (12, 3, 4, 4),
        "q": (12, 12),
        "k": (12, 12),
        "v": (12, 12),
        "o": (12, 12),
        "up": (12, 24),
        "down": (24, 12),
    }
    for name, shape in {**shapes, "head": (12, 10)}.items():
        weights[name] = (rng.standard_normal(shape) / np.sqrt(12)).astype(np.float32)
    weights |= {"flat": np.array([0, 12, 4]), "split": np.array([0, 4, 3, 4]), "join": np.array([0, 4, 12])}
    nodes = [
        ("Conv", "x patch", "grid", {"strides": [4, 4]}),
        ("Reshape", "grid flat", "rows"),
        ("Transpose", "rows", "t0", [0, 2, 1]),
    ]
    nodes += [("LayerNormalization", "t0 one", "n0", {"axis": -1})]
    for w, perm in {"q": [0, 2, 1, 3], "k": [0, 2, 3, 1], "v": [0, 2, 1, 3]}.items():
        nodes += [("MatMul", f"n0 {w}", f"{w}0"), ("Reshape", f"{w}0 split", f"{w}1"), ("Transpose", f"{w}1", f"{w}2", perm)]
    nodes += [
        ("MatMul", "q2 k2", "s0"),
        ("Mul", "s0 half", "s1"),
        ("Softmax", "s1", "s2", {"axis": -1}),
        ("MatMul", "s2 v2", "c0"),
    ]
    nodes += [
        ("Transpose", "c0", "c1", [0, 2, 1, 3]),
        ("Reshape", "c1 join", "c2"),
        ("MatMul", "c2 o", "a"),
        ("Add", "t0 a", "t1"),
    ]
    nodes += [("LayerNormalization", "t1 one", "n1", {"axis": -1}), ("MatMul", "n1 up", "u"), ("Relu", "u", "r")]
    nodes += [
        ("MatMul", "r down", "d"),
        ("Add", "t1 d", "t2"),
        ("ReduceMean", "t2 axis", "m", {"keepdims": 0}),
        ("MatMul", "m head", "y"),
    ]
    weights["axis"] = np.array([1])
    made = []
    for op, reads, out, *more in nodes:
        attributes = {"perm": more[0]} if more and isinstance(more[0], list) else more[0] if more else {}
        made.append(helper.make_node(op, reads.split(), [out], out, **attributes))
    value = helper.make_tensor_value_info
    ends = value("x", TensorProto.FLOAT, ["N", 3, 8, 8]), value("y", TensorProto.FLOAT, ["N", 10])
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(made, "vit", [ends[0]], [ends[1]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "models").symlink_to(ROOT / "models")
    small.write(small.chain(), tmp_path / "model.onnx")
    small.write(transformer(), tmp_path / "vit.onnx")
    rng = np.random.default_rng(0)
    for source in ("images", "more-images"):
        for number in range(48):
            (tmp_path / source / str(number % 3)).mkdir(parents=True, exist_ok=True)
            small.picture(tmp_path / source / str(number % 3) / f"{number}.png", rng.integers(0, 256, (8, 8, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", [n for n, p in PAGES.items() if n not in GENERATED and any(commands(t) for _, t in fenced(p))])
def test_every_command_parses(name: str) -> None:
    parser = command_line()
    for words in (w for _, text in fenced(PAGES[name]) for w in commands(text)):
        if "..." not in words:
            assert parser.parse_args(words).command == words[0]


@pytest.mark.parametrize("name", [n for n, p in PAGES.items() if n not in GENERATED and blocks(p)])
def test_every_marked_block_runs(name: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind, text in blocks(PAGES[name]):
        if kind == "python":
            exec(compile(text, name, "exec"), {"__name__": "snippet"})
            continue
        lines = [line for line in text.replace("\\\n", " ").split("\n") if line.strip()]
        assert all(PROMPT.match(line) for line in lines), f"{name}: only commands of onnxprune are run here: {lines}"
        for words in commands(text):
            if words[0] in ("prune", "merge", "calibrate", "report", "finetune", "export-trt"):
                words.append("--force")  # several tasks of one page write small.onnx
            assert cli.main(words) == 0, f"{name}: {shlex.join(words)}\n{capsys.readouterr().err}"


def anchors(path: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere(name: str) -> None:
    page = PAGES[name]
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), f"{name} links to {target}"
        assert not anchor or anchor in anchors(there), f"{name} links to {target}"


def test_the_index_names_every_document() -> None:
    linked = set(re.findall(r"\]\(([\w.]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert linked == {p.name for p in (ROOT / "docs").glob("*.md")} - {"README.md"}
