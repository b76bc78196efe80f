"""Shell completion: each shell's own interpreter is asked what it would offer."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from onnxprune import cli
from onnxprune.cli.completion import SHELLS, script

BASH = """source {script}
COMP_WORDS=({words}); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
_shtab_onnxprune 2>/dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
FISH = 'source {script}; complete -C "{line}"'
CASES = {
    "onnxprune pr": ["prune"],
    "onnxprune prune x.onnx --met": ["--method"],
    "onnxprune prune x.onnx --method pfp-r": ["pfp-random"],
    "onnxprune prune mod": ["model.onnx"],
    "onnxprune verify model.onnx mod": ["model.onnx"],
    "onnxprune prune model.onnx --data sam": ["samples.npz"],
    "onnxprune sweep model.onnx --calibration sco": ["scores.calib"],
    "onnxprune completion zs": ["zsh"],
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("model.onnx", "samples.npz", "scores.calib"):
        (tmp_path / name).touch()
    for shell in SHELLS:
        (tmp_path / f"script.{shell}").write_text(script(shell))
    return tmp_path


def said(shell: str, text: str, folder: Path) -> list[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder), "TERM": "dumb"}
    done = subprocess.run(
        [shell, "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    return done.stdout.split("\n")


@pytest.mark.parametrize("line", CASES)
def test_bash_offers(line: str, folder: Path) -> None:
    assert [w for w in said("bash", BASH.format(script="script.bash", words=line), folder) if w] == CASES[line]


@pytest.mark.parametrize("line", CASES)
def test_fish_offers(line: str, folder: Path) -> None:
    offered = said("fish", FISH.format(script="./script.fish", line=line), folder)
    assert [w.split("\t")[0] for w in offered if w] == CASES[line]


def test_zsh_takes_the_script(folder: Path) -> None:
    text = 'autoload -U compinit; compinit -u -D; eval "$(<script.zsh)"; echo $_comps[onnxprune]'
    assert said("zsh", text, folder)[0].startswith("_shtab_onnxprune")


def test_the_command_prints_the_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "bash"]) == 0
    assert capsys.readouterr().out == script("bash") + "\n"
    assert cli.main(["completion", "fish", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"shell": "fish", "script": script("fish")}


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", "tcsh"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "tcsh" in error
