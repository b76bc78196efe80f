"""Source distribution and wheel: built, installed where the checkout is out of reach, and put to work."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from importlib import util
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnxruntime import InferenceSession

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
SKIPPED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "tools")
pytestmark = pytest.mark.skipif(
    any(util.find_spec(m) is None for m in ("setuptools", "pip", "venv")), reason="setuptools, pip or venv is missing"
)


def call(*words: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(w) for w in words], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def hook(name: str, source: Path, out: Path) -> Path:
    """Calls a hook of the build backend (PEP 517) in `source`; returns what it made in `out`."""
    program = f"import setuptools.build_meta as b; b.{name}({str(out)!r})"
    call(sys.executable, "-c", program, cwd=source)
    return next(p for p in out.iterdir() if p.name.endswith(".whl" if name == "build_wheel" else ".tar.gz"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source distribution, the wheel that was built from it and nothing else)."""
    here = tmp_path_factory.mktemp("built")
    shutil.copytree(ROOT, here / "checkout", symlinks=True, ignore=SKIPPED)
    sdist = hook("build_sdist", here / "checkout", here)
    with tarfile.open(sdist) as archive:
        archive.extractall(here / "unpacked", filter="data")
    (source,) = (here / "unpacked").iterdir()
    return sdist, hook("build_wheel", source, here)


@pytest.fixture(scope="module")
def program(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed `onnxprune`, in a new environment whose dependencies are those of the present one."""
    home = tmp_path_factory.mktemp("environment")
    call(sys.executable, "-m", "venv", "--without-pip", home, cwd=home)
    python = home / "bin" / "python" if os.name == "posix" else home / "Scripts" / "python.exe"
    call(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", built[1], cwd=home)
    purelib = Path(call(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=home).strip())
    # A .pth within a folder that a .pth names is not followed, so an editable onnxprune there stays unknown.
    (purelib / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python.with_name("onnxprune")


def test_the_wheel_has_what_the_checkout_has(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        packed = {n for n in wheel.namelist() if n.startswith("onnxprune/")}
        tops = {n.split("/")[0] for n in wheel.namelist()}
    sources = {p.relative_to(ROOT).as_posix() for p in [*(ROOT / "onnxprune").rglob("*.py"), *(ROOT / "passes").glob("*.py")]}
    expected = {s if s.startswith("onnxprune/") else f"onnxprune/{s}" for s in sources}  # passes/ is also reached by a link
    data = {"onnxprune/py.typed", "onnxprune/report/web/page.css", "onnxprune/models/fashion-mnist.npz"}
    models = {f"onnxprune/models/{p.name}" for p in (ROOT / "models").glob("*.onnx")}
    assert packed == expected | data | models
    assert tops == {"onnxprune", f"onnxprune-{version()}.dist-info"}


def version() -> str:
    return next(line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().split("\n") if line.startswith("version"))


def test_the_source_distribution_has_licence_documents_and_no_links(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        members = archive.getmembers()
    names = {m.name.split("/", 1)[1] for m in members if "/" in m.name}
    assert {"LICENSE", "README.md", "pyproject.toml", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))} <= names
    assert not [m.name for m in members if m.issym() or m.islnk()]


def test_the_installed_program_does_the_main_job(program: Path, tmp_path: Path) -> None:
    """On its own models and data, in a folder from which no checkout can be seen."""
    where = "import onnxprune; print(onnxprune.__file__, onnxprune.__version__)"
    home, number = call(program.with_name("python"), "-c", where, cwd=tmp_path).split()
    installed = Path(home).parent
    assert installed.is_relative_to(program.parents[1]) and number == version()
    assert call(program, "--version", cwd=tmp_path).strip() == f"onnxprune {number}"
    models = installed / "models"
    words = ["--data", models / "fashion-mnist.npz", "--method", "l1", "--samples", "16"]
    call(program, "prune", models / "mobilenet.onnx", *words, "--macs", "0.7", "-o", "small.onnx", cwd=tmp_path)
    call(program, "report", models / "mobilenet.onnx", "small.onnx", "-o", "small.html", cwd=tmp_path)
    report = json.loads((tmp_path / "small.onnx.report.json").read_text())
    assert 0.6 < report["pruned"]["macs"] / report["original"]["macs"] <= 0.7
    session = InferenceSession(onnx.load(tmp_path / "small.onnx").SerializeToString(), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": np.zeros((2, 1, 28, 28), np.float32)})
    assert logits.shape == (2, 10)
    assert "prune" in call(program, "demo", "--help", cwd=tmp_path)


def test_the_workflow_and_the_hooks_run_what_ci_runs() -> None:
    ours = (ROOT / ".ci" / "run").read_text()
    assert "run: bash .ci/run" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    hooks = [
        line.split("entry: ")[1] for line in (ROOT / ".pre-commit-config.yaml").read_text().split("\n") if "entry: " in line
    ]
    assert hooks and all(f".venv/bin/{h}" in ours for h in hooks)
