"""How many samples calibrate, where nobody says so: more where weights are learnt from them, and none that others need."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from test_recovery import small_net

import onnxprune
from onnxprune import cli, splits
from onnxprune.data import open_data
from onnxprune.imported import Imported, load
from onnxprune.options import Options
from onnxprune.splits import CHOICE, Split, calibration_samples, enough_samples

Array = np.ndarray[Any, Any]
LEARNING = Options()
SCORING = Options(method="pfp", recover="none")


@pytest.fixture(scope="module")
def imported() -> Imported:
    return load(small_net())


def images(count: int) -> Array:
    return np.random.default_rng(3).standard_normal((count, 3, 12, 12)).astype(np.float32)


def split_of(imported: Imported, settings: Options, count: int, held_out: int = 0) -> Split:
    samples = open_data(images(count), imported.specs)
    return Split.of(imported, samples, open_data(images(held_out), imported.specs) if held_out else None, settings)


def test_what_learns_weights_gets_512_samples_where_there_are_enough(imported: Imported) -> None:
    enough = enough_samples(imported.groups, LEARNING.delta)
    assert enough < 100
    for settings in (LEARNING, Options(method="l1"), Options(method="obs", recover="none"), Options(recover="tune")):
        assert calibration_samples(imported, settings, 10_000, compared=True) == 512
    for settings in (SCORING, Options(method="l2", recover="none")):
        assert calibration_samples(imported, settings, 10_000, compared=True) == enough
    assert calibration_samples(imported, Options(samples=7), 10_000, compared=True) == 7


def test_a_big_network_learns_from_fewer_and_never_from_less_than_the_theory_asks(
    imported: Imported, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splits, "LEARNING_WORK", 145.5 * imported.size.macs)
    assert calibration_samples(imported, LEARNING, 10_000, compared=True) == 145
    monkeypatch.setattr(splits, "LEARNING_WORK", 2.0 * imported.size.macs)
    assert calibration_samples(imported, LEARNING, 10_000, compared=True) == enough_samples(imported.groups, LEARNING.delta)


@pytest.mark.parametrize(("count", "learns"), [(50, 50), (100, None), (300, 118), (1000, 468), (2300, 512), (9000, 512)])
def test_half_of_the_samples_are_left_to_compare_outputs_on(imported: Imported, count: int, learns: int | None) -> None:
    """Of few samples as many calibrate as the theory asks for, whatever is left."""
    split = split_of(imported, LEARNING, count)
    assert split.validation_indices is not None
    assert split.count == (learns or enough_samples(imported.groups, LEARNING.delta))
    assert split.origin.source == ("calibration" if count == 50 else "data")
    if learns is not None and count > learns:
        assert len(split.validation_indices) == min(2000, count - CHOICE - learns)


def test_samples_that_decide_are_left_where_others_are_compared_on(imported: Imported) -> None:
    split = split_of(imported, LEARNING, 512, held_out=100)
    assert split.count == 512 - CHOICE and split.calibration_indices is not None
    assert len(split.choice_indices) == CHOICE and not np.isin(split.choice_indices, split.calibration_indices).any()
    few = split_of(imported, LEARNING, 60, held_out=100)
    assert few.count == 60


@pytest.mark.parametrize("held_out", [0, 100])
@pytest.mark.parametrize(("count", "deciding"), [(60, 12), (5, 1)])
def test_no_weight_is_learnt_from_the_few_that_decide(imported: Imported, count: int, deciding: int, held_out: int) -> None:
    split = split_of(imported, LEARNING, count, held_out)
    assert split.calibration_indices is not None and split.learnt_from is not None
    assert split.impartial and len(split.choice_indices) == deciding
    assert split.count == count  # scores are of all of them
    assert sorted(split.calibration_indices) == sorted([*split.learnt_from, *split.choice_indices])
    assert split.origin.source == ("validation" if held_out else "calibration")


@pytest.mark.parametrize("count", [1, 4])
def test_of_very_few_samples_all_do_both(imported: Imported, count: int) -> None:
    split = split_of(imported, LEARNING, count)
    assert not split.impartial and split.learnt_from is not None
    assert len(split.choice_indices) == len(split.learnt_from) == count


def test_what_is_judged_by_what_it_learnt_from_is_not_held_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_net(), tmp_path / "m.onnx")
    for count, words in ((4, "on these very samples outputs moved"), (40, "on held-out samples outputs moved")):
        np.save(tmp_path / "d.npy", images(count))
        assert run(tmp_path, "prune @m.onnx --data @d.npy --macs 0.5 --recover lsq -o @o.onnx --force") == 0
        told = json.loads((tmp_path / "o.onnx.report.json").read_text())["recovery"]
        assert told["held_out"] == (count == 40) and told["samples"] == (32 if count == 40 else 4)
        said = capsys.readouterr().out
        assert told["kept"] == "lsq" and words in said
        assert f"on {count} samples, all of them set aside to calibrate: " in said


def run(here: Path, arguments: str) -> int:
    return cli.main([word.replace("@", f"{here}/") for word in arguments.split()])


def test_the_report_says_how_many_and_the_pair_is_compared_on_the_same_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx.save(small_net(), tmp_path / "m.onnx")
    np.save(tmp_path / "d.npy", images(600))
    assert run(tmp_path, "prune @m.onnx --data @d.npy --macs 0.5 --method l2 -o @o.onnx") == 0
    assert "from 268 samples" in capsys.readouterr().out
    report = json.loads((tmp_path / "o.onnx.report.json").read_text())
    assert report["recovery"]["samples"] == report["calibration"]["set_aside"] == 268
    assert report["validation"]["samples"] == 268
    assert run(tmp_path, "verify @m.onnx @o.onnx --data @d.npy --json") == 0
    assert json.loads(capsys.readouterr().out)["validation"] == report["validation"]
    report["calibration"]["set_aside"] = -3
    (tmp_path / "r.json").write_text(json.dumps(report))
    assert run(tmp_path, "verify @m.onnx @o.onnx --data @d.npy --report @r.json -q") == 3
    assert "number of calibration samples" in capsys.readouterr().err


def test_a_calibration_that_is_handed_over_keeps_its_samples(tmp_path: Path) -> None:
    """Other options ask for another number of samples; those that it saw must not certify."""
    onnx.save(small_net(), tmp_path / "m.onnx")
    np.save(tmp_path / "d.npy", images(600))
    assert run(tmp_path, "calibrate @m.onnx --data @d.npy --method pfp -o @c -q") == 0
    options = {"budget": {"macs": 0.5}, "method": "pfp", "recover": "none"}
    calibration = onnxprune.Saliency.load(tmp_path / "c")
    assert calibration.samples == 268
    report = onnxprune.prune(tmp_path / "m.onnx", tmp_path / "d.npy", calibration=calibration, **options).report
    assert report["calibration"]["set_aside"] == 268 and report["certificate"]["population"]["applies"]
    alone = onnxprune.prune(tmp_path / "m.onnx", tmp_path / "d.npy", **options).report
    assert alone["calibration"]["set_aside"] < 100
    others = onnxprune.prune(tmp_path / "m.onnx", images(600) + 1, calibration=calibration, **options).report
    assert others["calibration"]["set_aside"] < 100 and not others["certificate"]["population"]["applies"]
