"""Plug-ins: the example package, installed and used from the command line, and what becomes of those that are unfit."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib import util
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import small

import onnxprune
from onnxprune import plugins
from onnxprune.criteria.plain import PLAIN
from onnxprune.options import methods
from onnxprune.plugins import Plugin, load_installed, register
from onnxprune.rules import STANDARD, Rule

ROOT = Path(onnxprune.__file__).resolve().parents[1]
EXAMPLE = Path(__file__).resolve().parent / "plugin"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
RELU = ("", "Relu")


def run(*words: str, cwd: Path, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(path)] if path else [])])}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the example package installed in it, and nothing else."""
    if util.find_spec("setuptools") is None or util.find_spec("pip") is None:
        pytest.skip("setuptools or pip is missing")
    here = tmp_path_factory.mktemp("plugin")
    shutil.copytree(EXAMPLE, here / "source", ignore=shutil.ignore_patterns("__pycache__"))
    words = ["-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", "site", "./source"]
    done = run(*words, cwd=here)
    assert done.returncode == 0, done.stderr
    return here / "site"


def test_the_example_prunes_from_the_command_line(installed: Path, tmp_path: Path) -> None:
    small.write(small.residual(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=small.images(32))
    words = ["-m", "onnxprune", "prune", "m.onnx", "--data", "d.npz", "--macs", "0.6", "--recover", "none", "-o", "out.onnx"]
    done = run(*words, "--method", "spread", cwd=tmp_path, path=installed)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.onnx.report.json").read_text())
    assert report["method"] == "spread"
    assert report["pruned"]["macs"] <= 0.6 * report["original"]["macs"]
    assert report["validation"]["masked_max_relative_error"] <= 1e-4
    without = run(*words, "--method", "spread", "--force", cwd=tmp_path)
    assert without.returncode == 2
    assert "spread" in without.stderr


def test_the_library_calibrates_with_the_example(installed: Path, tmp_path: Path) -> None:
    small.write(small.chain(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=small.images(32))
    call = "onnxprune.calibrate('m.onnx', 'd.npz', method='spread', samples=16)"
    program = f"import onnxprune; r = {call}; print(r.criterion, r.samples, min(s.values.min() for s in r.layers) > 0)"
    done = run("-c", program, cwd=tmp_path, path=installed)
    assert done.stdout.split() == ["spread", "16", "True"], done.stderr


def test_the_rule_of_a_plugin_is_followed(installed: Path, tmp_path: Path) -> None:
    program = "from onnxprune import load; from onnxprune.rules import STANDARD; print(('example', 'Softcap') in STANDARD)"
    assert run("-c", program, cwd=tmp_path, path=installed).stdout == "True\n"


def test_a_registered_rule_unfreezes_and_cuts_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    relu = STANDARD[RELU]
    monkeypatch.delitem(STANDARD, RELU)
    before = len(onnxprune.load(small.chain()).groups.prunable)
    register(Plugin(rules={RELU: Rule(relu.ties)}))
    assert len(onnxprune.load(small.chain()).groups.prunable) > before
    result = onnxprune.prune(small.chain(), budget={"macs": 0.5}, method="l1")
    assert result.report["validation"]["masked_max_relative_error"] <= 1e-4


@pytest.mark.parametrize(
    "plugin",
    [
        Plugin(criteria={"fresh": PLAIN["l1"], "l1": PLAIN["l2"]}),
        Plugin(criteria={"obs": PLAIN["l1"]}),
        Plugin(criteria={"fresh": PLAIN["l1"]}, rules={RELU: STANDARD[RELU]}),
    ],
    ids=["criterion", "method", "rule"],
)
def test_what_is_there_cannot_be_replaced(plugin: Plugin) -> None:
    before = methods(), dict(STANDARD)
    with pytest.raises(ValueError, match="already"):
        register(plugin)
    assert (methods(), dict(STANDARD)) == before


@pytest.mark.parametrize(
    ("value", "said"), [("no_such_module:PLUGIN", "ModuleNotFoundError"), ("json:dumps", "json:dumps is not")]
)
def test_an_unfit_plugin_is_left_out_with_a_warning(value: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = methods()
    found = [EntryPoint("broken", value, plugins.ENTRY_POINTS)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found)
    with pytest.warns(UserWarning, match=f"'broken'.*{said}"):
        load_installed()
    assert methods() == before


def test_nothing_is_imported_before_it_is_asked_for(tmp_path: Path) -> None:
    """The command line has to set how OpenBLAS waits before NumPy loads it, and lets a user's own setting stand."""
    program = "import sys, onnxprune; print('numpy' in sys.modules, sorted(set(onnxprune.__all__) - set(dir(onnxprune))))"
    assert run("-c", program, cwd=tmp_path).stdout == "False []\n"
    program = "import onnxprune\ntry: onnxprune.nothing\nexcept AttributeError as error: print(error)"
    assert run("-c", program, cwd=tmp_path).stdout == "module 'onnxprune' has no attribute 'nothing'\n"
    program = "import os; {}; import onnxprune.cli; print(os.environ['OPENBLAS_THREAD_TIMEOUT'])"
    for before, want in (
        ("os.environ.pop('OPENBLAS_THREAD_TIMEOUT', 0)", "4\n"),
        ("os.environ['OPENBLAS_THREAD_TIMEOUT'] = '9'", "9\n"),
    ):
        assert run("-c", program.format(before), cwd=tmp_path).stdout == want
