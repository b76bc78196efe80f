"""`onnxprune sweep`: the networks that `prune` makes, from one calibration; statements that hold for all; whole or nothing."""

from __future__ import annotations

import json
import os
import shlex
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small

import onnxprune
from onnxprune import cli, job, scoring
from onnxprune.budget import Budget
from onnxprune.errors import BudgetError
from onnxprune.report.points import marked, quality

Run = Callable[[str], tuple[int, str, str]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model, samples, and the process in it."""
    onnx.save(small.chain(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=small.images(400), y=np.arange(400) % 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(here: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(command: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(shlex.split(command))
        return code, *capsys.readouterr()

    return call


def bare(path: Path) -> bytes:
    """The model without what its metadata say of it."""
    model = onnx.load(path)
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


def test_a_sweep_makes_what_prune_makes(run: Run, here: Path) -> None:
    code, out, err = run("sweep m.onnx --data d.npz --samples 40 --budgets 0.5,0.8 -q -o s")
    assert (code, out, err) == (0, "", "")
    names = [f"m-macs-{v}.onnx" for v in ("0.8", "0.5")]
    assert {p.name for p in (here / "s").iterdir()} == {
        *(f"{n}{e}" for n in names for e in ("", ".report.json", ".certificate.json")),
        "sweep.json",
        "sweep.html",
    }
    told = json.loads((here / "s" / "sweep.json").read_text())
    assert [p["file"] for p in told["points"]] == names and told["kind"] == "macs"
    assert told["command"][:3] == ["onnxprune", "sweep", "m.onnx"] and "--budgets" in told["command"]
    for value, point in zip((0.8, 0.5), told["points"], strict=True):
        file = here / "s" / point["file"]
        assert run(f"prune m.onnx --data d.npz --samples 40 --macs {value} -q -o alone-{value}.onnx")[0] == 0
        assert bare(file) == bare(here / f"alone-{value}.onnx")
        report = json.loads(Path(f"{file}.report.json").read_text())
        assert report["pruned"] == point["pruned"] and point["kept"]["macs"] <= value
        assert point["validation"]["top1"] == report["validation"]["top1"]
        assert point["pruned"]["bytes"] == file.stat().st_size
        assert run(f"verify m.onnx {file} --data d.npz --samples 40")[0] == 0


def test_the_scores_are_made_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    whole = scoring.calibrated

    def counted(*given: Any, **more: Any) -> Any:
        calls.append(given[1].method)
        return whole(*given, **more)

    monkeypatch.setattr(scoring, "calibrated", counted)
    assert run("sweep m.onnx --data d.npz --samples 40 --budgets 0.9,0.7,0.5,0.3 -q -o s")[0] == 0
    assert calls == ["auto", "obs"]


def test_statements_hold_for_all_networks_at_once(run: Run, here: Path) -> None:
    """Who looks at all of them and keeps one has chosen by the held-out samples: delta is shared out over the networks."""
    assert run("sweep m.onnx --data d.npz --samples 40 --budgets 0.9,0.7,0.5 --delta 0.05 -q -o s")[0] == 0
    assert run("prune m.onnx --data d.npz --samples 40 --macs 0.5 --delta 0.05 -q -o alone.onnx")[0] == 0
    alone = json.loads((here / "alone.onnx.certificate.json").read_text())["population"]
    told = json.loads((here / "s" / "m-macs-0.5.onnx.certificate.json").read_text())["population"]
    assert (alone["candidates"], told["candidates"]) == (1, 3)
    for one, many in zip(alone["statements"], told["statements"], strict=True):
        assert one["kind"] == many["kind"] and many["delta"] == pytest.approx(one["delta"] / 3)
    changes = [next(s for s in part["statements"] if s["kind"] == "top1_changes") for part in (alone, told)]
    assert changes[0]["changed"] == changes[1]["changed"] and changes[0]["alpha"] < changes[1]["alpha"]


@pytest.mark.parametrize("kind", ["params", "bytes"])
def test_other_quantities(run: Run, here: Path, kind: str) -> None:
    code, out, _ = run(f"sweep m.onnx --{kind} --method l1 --budgets 0.7,0.4 --json -q -o s")
    told = json.loads(out)
    assert code == 0 and told == json.loads((here / "s" / "sweep.json").read_text())
    for value, point in zip((0.7, 0.4), told["points"], strict=True):
        assert point["kept"][kind] <= value and point["population"] == {"changes": None, "drop": None, "moved": None}
        assert point["file"] == f"m-{kind}-{value:g}.onnx"


def test_the_library_yields_results_one_by_one(here: Path) -> None:
    budgets = [Budget("macs", 0.7), Budget("params", 0.5)]
    results = onnxprune.sweep("m.onnx", "d.npz", budgets=budgets, samples=40, method="pfp")
    sizes = [r.report["pruned"] for r in results]
    assert len(sizes) == 2 and sizes[0]["macs"] > sizes[1]["macs"]
    for wrong in ([], [Budget("eps", 0.5)], [Budget("macs", 0.5)] * 2):
        with pytest.raises(BudgetError):
            onnxprune.sweep("m.onnx", "d.npz", budgets=wrong)


REFUSED = {
    "no numbers": ("--budgets some -o s", "--budgets takes numbers"),
    "none at all": ("--budgets , -o s", "different fractions"),
    "one twice": ("--budgets 0.5,0.50 -o s", "different fractions"),
    "out of range": ("--budgets 0.5,1.5 -o s", "between 0 and 1, not 1.5"),
    "out of reach": ("--budgets 0.5,0.0001 -o s", "out of reach"),
    "two quantities": ("--macs --params -o s", "not allowed"),
    "folder is a file": ("-o d.npz", "is not a folder"),
    "folder with files": ("-o .", "--force"),
    "no parent": ("-o no/s", "the folder no does not exist"),
    "no data": ("--samples 5 -o s --data no.npz", "no.npz"),
}


@pytest.mark.parametrize(("typed", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_refusals_leave_nothing(run: Run, here: Path, typed: str, words: str) -> None:
    before = sorted(p.name for p in here.rglob("*"))
    code, out, err = run(f"sweep m.onnx --data d.npz {typed}")
    assert (code, out) == (2, "") and err.count("\n") == 1 and words in err, err
    assert sorted(p.name for p in here.rglob("*")) == before


@pytest.mark.parametrize("there", [False, True])
def test_an_interruption_leaves_nothing(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    if there:
        (here / "s").mkdir()
        (here / "s" / "m-macs-0.8.onnx").write_text("mine")
    rest, whole = [1], job.validate

    def once(*given: Any, **more: Any) -> Any:
        if not rest:
            raise KeyboardInterrupt
        rest.pop()
        return whole(*given, **more)

    monkeypatch.setattr(job, "validate", once)
    assert run("sweep m.onnx --method l1 --budgets 0.8,0.5 -q --force -o s")[0] == 130
    assert sorted(str(p.relative_to(here)) for p in here.rglob("*")) == (
        ["d.npz", "m.onnx", "s", "s/m-macs-0.8.onnx"] if there else ["d.npz", "m.onnx"]
    )
    assert not there or (here / "s" / "m-macs-0.8.onnx").read_text() == "mine"


def test_force_writes_among_other_files(run: Run, here: Path) -> None:
    assert run("sweep m.onnx --method l1 --budgets 0.8,0.5 -q -o s")[0] == 0
    first = (here / "s" / "m-macs-0.5.onnx").read_bytes()
    assert stat.S_IMODE((here / "s").stat().st_mode) == 0o777 & ~_umask()
    assert run("sweep m.onnx --method l1 --budgets 0.6,0.5 -q --force -o s")[0] == 0
    assert (here / "s" / "m-macs-0.5.onnx").read_bytes() == first and (here / "s" / "m-macs-0.8.onnx").exists()
    assert run("sweep s/m-macs-0.8.onnx --method l1 --budgets 0.9 -q --force -o s")[0] == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_budgets_may_be_a_list_in_a_config(run: Run, here: Path) -> None:
    (here / "c.toml").write_text('budgets = [0.8, 0.5]\nmethod = "l1"\nout = "s"')
    assert run("sweep m.onnx -q --config c.toml")[0] == 0
    assert {p.name for p in (here / "s").glob("*.onnx")} == {"m-macs-0.8.onnx", "m-macs-0.5.onnx"}


def test_weights_in_a_file_of_their_own_stay_there(run: Run, here: Path) -> None:
    onnx.save(onnx.load("m.onnx"), "outside.onnx", save_as_external_data=True, location="w.bin", size_threshold=64)
    assert run("sweep outside.onnx --method l1 --budgets 0.8,0.5 -q -o s")[0] == 0
    for value in ("0.8", "0.5"):
        file = here / "s" / f"outside-macs-{value}.onnx"
        assert Path(f"{file}.data").exists() and run(f"verify outside.onnx {file}")[0] == 0


def test_the_table_fits_eighty_columns_and_marks_the_front(run: Run) -> None:
    code, out, _ = run("sweep m.onnx --data d.npz --samples 40 --budgets 0.9,0.7 -o s")
    table = out.splitlines()[:3]
    assert code == 0 and all(len(line.rstrip()) <= 80 for line in table)
    assert table[0].split() == ["network", "MACs", "file", "top-1", "same", "moved", "change", "<="]
    assert "*" in out and "any of them may be picked" in out


def test_the_front_is_what_nothing_else_beats() -> None:
    def point(macs: int, good: float) -> dict[str, Any]:
        found = {"top1": [0.9, good], "agreement": 0.5, "relative_l2": 0.1}
        return {"pruned": {"macs": macs}, "validation": found}

    points = [point(90, 0.90), point(70, 0.91), point(50, 0.80), point(50, 0.85), point(30, 0.85), point(30, 0.85)]
    assert [p["pareto"] for p in marked(points, "macs")] == [False, True, False, False, True, True]
    assert quality(points) == ("top-1 accuracy", [0.90, 0.91, 0.80, 0.85, 0.85, 0.85])
    points[2]["validation"]["top1"] = None
    assert quality(points)[0] == "same answer as the original"
