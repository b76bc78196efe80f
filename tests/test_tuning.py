"""`--recover tune`: what least squares left, tuned by gradient descent on the calibration samples, and never worse for it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from test_recovery import DATA, small_net

import onnxprune
from onnxprune import cli, tuning
from onnxprune.errors import OptionError
from onnxprune.training import late
from onnxprune.training.settings import Training

pytest.importorskip("torch")

from onnxprune.training.store import MIXED, Batch, mixed
from onnxprune.training.trainer import Score
from onnxprune.training.tune import Tuned

Array = np.ndarray[Any, Any]


def pruned(model: onnx.ModelProto | None = None, **options: Any) -> onnxprune.Result:
    given = {"method": "l2", "samples": 128, "recover": "tune"} | options
    return onnxprune.prune(small_net() if model is None else model, DATA, budget={"macs": 0.4}, **given)


@pytest.fixture(autouse=True, scope="module")
def few_epochs() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "MOST", 30)
        yield


@pytest.fixture(scope="module")
def result() -> onnxprune.Result:
    return pruned()


def test_tuning_brings_outputs_nearer_than_least_squares_alone(result: onnxprune.Result) -> None:
    told = result.report["recovery"]
    errors = told["held_out_relative_l2"]
    assert result.report["recover"] == told["kept"] == "tune" and told["reason"] is None
    assert errors["tune"] < errors["lsq"] < errors["none"]
    assert told["tuned"]["best"] > 0 and told["tuned"]["settings"]["labels"] == 0.0
    least_squares = pruned(recover="lsq").report
    assert least_squares["recovery"]["held_out_relative_l2"]["lsq"] == errors["lsq"]
    assert result.report["validation"]["relative_l2"] < least_squares["validation"]["relative_l2"]  # on yet other samples


def test_what_was_cut_stays_cut_and_says_how_it_came_by_its_weights(result: onnxprune.Result) -> None:
    least_squares = pruned(recover="lsq")
    assert result.plan.to_json() == least_squares.plan.to_json()
    assert [(t.name, t.dims) for t in result.model.graph.initializer] == [
        (t.name, t.dims) for t in least_squares.model.graph.initializer
    ]
    told = result.report["certificate"]
    assert told["recover"] == "tune" and told["population"]["applies"] and not told["calibration"]["applies"]
    assert "--recover tune" in told["calibration"]["reason"]


def test_the_same_seed_gives_the_same_file(result: onnxprune.Result) -> None:
    assert pruned().stored == result.stored
    assert pruned(seed=1).stored != result.stored


def test_samples_that_decide_are_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    real = late.trainer().tune

    def spy(*args: Any, **kwargs: Any) -> Tuned:
        seen.update(rest=args[3], held=kwargs["held"])
        found: Tuned = real(*args, **kwargs)
        return found

    monkeypatch.setattr(late.trainer(), "tune", spy)
    assert pruned().report["recovery"]["tuned"]["held_out"] == 64
    assert len(seen["rest"]) == 128 and len(seen["held"]) == 64 and not np.isin(seen["held"], seen["rest"]).any()
    few = pruned(samples=400).report["recovery"]["tuned"]  # none is left beside: a part of them decides
    assert len(seen["held"]) == 64 and few["samples"] + few["held_out"] == 400
    assert not np.isin(seen["held"], seen["rest"]).any()


def test_only_the_plan_that_is_kept_is_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = tuning.tuned
    monkeypatch.setattr(tuning, "tuned", lambda *args: (calls.append(args), real(*args))[1])
    told = pruned(method="auto").report["recovery"]
    assert told["tuned"]["epochs"] == 30 and len(calls) == 1


def test_what_would_be_worse_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(imported: Any, model: onnx.ModelProto, *_: Any) -> Tuned:
        worse = onnx.ModelProto.FromString(model.SerializeToString())
        bias = next(t for t in worse.graph.initializer if t.name == "bc")
        bias.CopyFrom(onnx.numpy_helper.from_array(np.full(5, 9.0, np.float32), "bc"))
        return Tuned(worse, Score(0.5, 0.2), Score(0.6, 0.1), 3, 2, 100, 20, 7, 1.0, Training())

    monkeypatch.setattr(tuning, "tuned", harm)
    result = pruned()
    told = result.report["recovery"]
    assert told["kept"] == "lsq" and told["held_out_relative_l2"]["tune"] > told["held_out_relative_l2"]["lsq"]
    assert told["reason"] == "not tuned: it would have moved held-out outputs further"
    assert result.stored == pruned(recover="lsq").stored

    def nothing(*args: Any) -> Tuned:
        return replace(harm(*args), best=0)

    monkeypatch.setattr(tuning, "tuned", nothing)
    assert pruned().report["recovery"]["reason"] == "not tuned: no epoch brought held-out outputs nearer"


def test_operators_that_torch_cannot_run_leave_least_squares() -> None:
    odd = small_net()
    odd.graph.node.append(helper.make_node("NonZero", ["y"], ["places"]))
    odd.graph.output.append(helper.make_tensor_value_info("places", TensorProto.INT64, [2, None]))
    told = pruned(odd).report["recovery"]
    assert told["kept"] == "lsq"
    assert told["reason"] == "not tuned: the model has operators that cannot be trained through: NonZero"


def test_without_torch_there_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(late.importlib, "import_module", absent)
    with pytest.raises(OptionError, match="--recover tune needs PyTorch, which is not installed"):
        pruned()
    onnx.save(small_net(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **DATA)
    command = f"prune {tmp_path}/m.onnx --data {tmp_path}/d.npz --macs 0.5 -o {tmp_path}/o.onnx --recover tune"
    assert cli.main(command.split()) == 2
    err = capsys.readouterr().err
    assert err.startswith("onnxprune: error: --recover tune needs PyTorch") and err.count("\n") == 1


def test_the_command_tells_of_it_and_the_pair_verifies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_net(), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", **DATA)
    command = f"prune {tmp_path}/m.onnx --data {tmp_path}/d.npz --macs 0.4 --method l2 --samples 128 -o {tmp_path}/o.onnx"
    assert cli.main([*command.split(), "--recover", "tune"]) == 0
    out = capsys.readouterr().out
    assert "recovered by tune, 3 layers from 128 samples" in out
    assert "tuned by 30 epochs of gradient descent on 128 samples, without labels" in out
    assert json.loads((tmp_path / "o.onnx.report.json").read_text())["recovery"]["tuned"]["epochs"] == 30
    assert cli.main(f"verify {tmp_path}/m.onnx {tmp_path}/o.onnx --data {tmp_path}/d.npz".split()) == 0
    assert cli.main(f"report {tmp_path}/m.onnx {tmp_path}/o.onnx -o {tmp_path}/o.html".split()) == 0
    page = (tmp_path / "o.html").read_text()
    assert "then tuned on these by 30 epochs of gradient descent" in page and "without training" not in page


def test_epochs_follow_from_a_budget_of_samples_and_of_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "MOST", 200)
    assert tuning.epochs_for(512, 4e7) == 80
    assert tuning.epochs_for(100, 1e6) == 200
    assert tuning.epochs_for(145, 4.1e9) == tuning.epochs_for(10**6, 1.0) == tuning.LEAST


def test_mixing_is_of_floating_point_inputs_only() -> None:
    x = np.arange(8, dtype=np.float32)[:, None, None] * np.ones((8, 2, 3), np.float32)
    other = -x[:, 0]
    labels = np.arange(8)
    made = mixed(Batch({"x": x, "z": other}, labels, 8), np.random.default_rng(0))
    assert made.labels is None and made.count == 8
    assert np.ptp(made.feeds["x"], axis=(1, 2)).max() == 0  # one share for all entries of a sample
    np.testing.assert_allclose(made.feeds["z"], -made.feeds["x"][:, 0], rtol=1e-6)  # and for all of its inputs
    moved = made.feeds["x"][:, 0, 0] - np.arange(8)
    assert 0 < np.abs(moved).max() <= MIXED * 7 and made.feeds["x"].dtype == np.float32
    again = mixed(Batch({"x": x, "z": other}, labels, 8), np.random.default_rng(0))
    assert np.array_equal(again.feeds["x"], made.feeds["x"])
    words = Batch({"x": x, "tokens": np.zeros((8, 4), np.int64)}, labels, 8)
    assert mixed(words, np.random.default_rng(0)) is words
    scalar = Batch({"x": x, "k": np.array(1.0, np.float32)}, labels, 8)
    assert mixed(scalar, np.random.default_rng(0)) is scalar


def test_epochs_are_judged_by_answers_or_by_distance() -> None:
    nearer, righter = Score(0.5, 0.1), Score(0.6, 0.2)
    assert righter.rank("agreement") > nearer.rank("agreement") and righter.rank("distance") < nearer.rank("distance")
    assert Score(None, 0.1).rank("agreement") > Score(None, float("nan")).rank("agreement")
