"""The main job: budgets, the report, the same bytes again, and files that are whole and otherwise as they were."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import small
from onnx import numpy_helper

import onnxprune
from onnxprune import certify, cli, decide, finish, pairs, scoring, wire
from onnxprune.criteria.pfp import TOLERANCE
from onnxprune.errors import BudgetError, OptionError, OutputError, ValidationError
from onnxprune.options import methods
from onnxprune.saliency import Saliency

Array = np.ndarray[Any, Any]
CANDIDATES = ("pfp", "pfp-deterministic", "obs")
SIZES = {"macs": small.count_macs, "params": small.count_params, "bytes": lambda model: model.ByteSize()}
PLAIN = ("l1", "l2", "fpgm", "activation", "random")


@functools.cache
def net(name: str) -> onnx.ModelProto:
    return small.NETS[name]()


@functools.cache
def calibration(name: str, method: str = "pfp") -> Saliency:
    """Shared by the tests, since calibrating is what takes the time."""
    return onnxprune.calibrate(net(name), small.images(6), method=method if method in PLAIN else "pfp")


def pruned(name: str, method: str = "pfp", **budget: float) -> onnxprune.Result:
    return onnxprune.prune(net(name), calibration=calibration(name, method), budget=budget, method=method)


def weights(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def output(model: onnx.ModelProto, x: Array) -> Array:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def core(path: Path) -> str:
    """A digest of the model, whatever the certificate in it says of the data."""
    return wire.digest(certify.without(onnx.load(path)))


def hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha(p) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a model and data in it."""
    monkeypatch.chdir(tmp_path)
    small.write(net("chain"), tmp_path / "m.onnx")
    np.savez(tmp_path / "d.npz", x=small.images(12), y=np.arange(12) % 10)
    return tmp_path


def run(*arguments: str) -> int:
    return cli.main([part for text in arguments for part in text.split()])


# ------------------------------------------------------------------------------------------------------------ budgets


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("name", small.NETS)
def test_budget_is_met_closely_and_never_exceeded(tmp_path: Path, name: str, kind: str) -> None:
    before = SIZES[kind](net(name))
    asked = [(0.35, "pfp"), (0.8, "pfp"), (0.5, "pfp-random"), (0.3, "pfp-deterministic"), (0.6, "l1"), (0.5, "activation")]
    for number, (budget, method) in enumerate(asked):
        result = pruned(name, method, **{kind: budget})
        path = tmp_path / f"{number}.onnx"
        result.save(path)
        written = onnx.load(path)
        after = path.stat().st_size if kind == "bytes" else SIZES[kind](written)
        close = 0.85 if method in ("pfp", "pfp-random") else 0.9  # in small networks, draws come in lumps
        assert close * budget * before <= after <= budget * before, (method, after / before)
        assert result.report["original"] == {k: count(net(name)) for k, count in SIZES.items()}
        assert result.report["pruned"] == {k: count(written) for k, count in SIZES.items()}
        assert result.report["budget"] == {"kind": kind, "value": budget}


@pytest.mark.parametrize(("name", "method"), [("chain", "pfp"), ("residual", "pfp-random"), ("dense", "l1")])
def test_a_larger_budget_never_gives_a_smaller_network(name: str, method: str) -> None:
    sizes = [pruned(name, method, macs=budget).report["pruned"]["macs"] for budget in (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95)]
    assert sizes == sorted(sizes) and len(set(sizes)) == len(sizes)


def test_an_impossible_budget_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("calibrated for a budget that cannot be reached")

    monkeypatch.setattr(scoring, "calibrate_pass", never)
    for budget in ({"macs": 0.001}, {"params": 0.001}, {"bytes": 0.01}, {}, {"macs": 0.5, "params": 0.5}, {"watts": 0.5}):
        with pytest.raises(BudgetError) as caught:
            onnxprune.prune(net("chain"), small.images(4), budget=budget)
        assert caught.value.hint


def test_bytes_that_the_cut_itself_adds_come_off_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Surgery may add to the file (a constant of its own for one of several uses): the budget holds nevertheless."""
    real = decide.surgery

    def wordy(*arguments: Any) -> onnx.ModelProto:
        model = real(*arguments)
        model.doc_string = "word " * 100
        return model

    monkeypatch.setattr(finish, "surgery", wordy)
    monkeypatch.setattr(decide, "surgery", wordy)
    result = pruned("residual", "pfp-deterministic", bytes=0.5)
    assert result.model.doc_string and 0.45 <= result.model.ByteSize() / net("residual").ByteSize() <= 0.5


def test_eps_cuts_what_it_allows_and_says_when_that_is_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune m.onnx --data d.npz -o all.onnx --eps 1e-9") == 0
    assert "nothing was cut" in capsys.readouterr().out
    assert (here / "all.onnx").read_bytes() == (here / "m.onnx").read_bytes()
    before = SIZES["macs"](net("chain"))
    sizes = {}
    for method in ("pfp", "pfp-random", "pfp-deterministic"):
        for eps in (1e-9, 5.0, 1e9):
            result = pruned("chain", method, eps=eps)
            assert result.certificate is not None
            sizes[method, eps] = SIZES["macs"](result.model)
            assert all(g["epsilon"] <= eps for g in result.certificate["sampling"].get("groups", {}).values())
        assert before == sizes[method, 1e-9] >= sizes[method, 5.0] > sizes[method, 1e9] > 0
    auto = onnxprune.prune(net("chain"), calibration=calibration("chain"), budget={"eps": 5.0})
    both = (sizes["pfp", 5.0], sizes["pfp-deterministic", 5.0])
    assert SIZES["macs"](auto.model) == min(both) < max(both)  # the smallest network with that error
    with pytest.raises(BudgetError, match="--method l1 has none"):
        onnxprune.prune(net("chain"), budget={"eps": 1.0}, method="l1")


# ------------------------------------------------------------------------------------------------------------- report

SIZE = {"macs": int, "params": int, "bytes": int}
MEMBER = {"tensor": str, "axis": int, "role": str, "removed": [int]}
CONTRACT: dict[str, Any] = {
    "onnxprune": str,
    "model": str,
    "seed": int,
    "method": str,
    "budget": dict,
    "original": SIZE,
    "pruned": SIZE,
    "groups": [
        {
            "id": str,
            "size": int,
            "kept": [int],
            "removed": [int],
            "frozen": bool,
            "reason": (str, type(None)),
            "exact": bool,
            "members": [MEMBER],
        }
    ],
    "layers": [
        {
            "name": str,
            "op": str,
            "in": [int],
            "out": [int],
            "macs": [int],
            "sensitivity_sum": float,
            "draws": int,
            "epsilon": float,
            "delta": float,
        }
    ],
    "certificate": (dict, type(None)),
    "validation": {
        "checker": bool,
        "runtime": bool,
        "masked_max_relative_error": float,
        "agreement": (float, type(None)),
        "relative_l2": (float, type(None)),
        "top1": (list, type(None)),
    },
    "seconds": dict.fromkeys(("import", "calibrate", "sample", "surgery", "validate"), float),
}


def check_contract(value: Any, wanted: Any, where: str = "report") -> None:
    if isinstance(wanted, dict):
        for key, inner in wanted.items():
            assert key in value, f"{where} has no '{key}'"
            check_contract(value[key], inner, f"{where}.{key}")
    elif isinstance(wanted, list):
        assert isinstance(value, list), where
        for i, item in enumerate(value):
            check_contract(item, wanted[0], f"{where}[{i}]")
    elif wanted is float:
        assert type(value) in (int, float), where  # JSON has but one kind of number
    elif isinstance(wanted, type):
        assert type(value) is wanted, f"{where} is {value!r}"
    else:
        assert isinstance(value, wanted), f"{where} is {value!r}"


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


@pytest.mark.parametrize("method", ["auto", "pfp-random", "fpgm"])
def test_report_has_all_that_the_contract_lists(here: Path, method: str) -> None:
    assert run(f"prune m.onnx --data d.npz -o a.onnx --macs 0.5 --seed 7 --method {method} --recover none") == 0
    report = json.loads((here / "a.onnx.report.json").read_text(), parse_constant=no_constant)
    check_contract(report, CONTRACT)
    assert report["onnxprune"] == onnxprune.__version__ and report["model"] == "m.onnx" and report["seed"] == 7
    assert report["method"] == method or (method == "auto" and report["method"] in CANDIDATES)
    provable = report["method"].startswith("pfp")
    for group in report["groups"]:
        assert sorted(group["kept"] + group["removed"]) == list(range(group["size"]))
        assert group["frozen"] == (group["reason"] is not None) and not (group["frozen"] and group["removed"])
        assert {m["role"] for m in group["members"]} <= {"producer", "consumer", "scale", "shape"}
    before, after = net("chain"), onnx.load(here / "a.onnx")
    shapes, cut = weights(before), weights(after)
    names = {"Conv_0": "w0", "Conv_3": "w3", "Conv_6": "w6", "Gemm_11": "fc.w"}
    assert [layer["name"] for layer in report["layers"]] == list(names)
    for layer in report["layers"]:
        weight = names[layer["name"]]
        assert layer["out"] == [shapes[weight].shape[0], cut[weight].shape[0]]
        assert layer["in"] == [shapes[weight].shape[1], cut[weight].shape[1]]
        assert (layer["epsilon"] > 0) == (provable and layer["in"][0] > layer["in"][1])
    for side, model in enumerate((before, after)):
        assert sum(layer["macs"][side] for layer in report["layers"]) == small.count_macs(model)
    applies = {part: report["certificate"][part]["applies"] for part in ("sampling", "calibration", "network", "population")}
    assert applies["calibration"] == provable and applies["network"] and not applies["population"]
    assert applies["sampling"] == (report["method"] in ("pfp", "pfp-random"))


def test_accuracy_is_measured_where_there_are_labels(here: Path) -> None:
    x = small.images(60)
    labels = output(net("chain"), x).argmax(1)
    result = onnxprune.prune(net("chain"), {"x": x[:20], "y": labels[:20], "x_test": x[20:], "y_test": labels[20:]}, **HALF)
    found = result.report["validation"]
    truth = (output(result.model, x[20:]).argmax(1) == labels[20:]).mean()
    assert found["samples"] == 40 and found["top1"] == [1.0, pytest.approx(truth)]
    assert found["agreement"] == pytest.approx(truth)
    difference = output(result.model, x[20:]) - output(net("chain"), x[20:])
    assert found["relative_l2"] == pytest.approx(
        np.linalg.norm(difference) / np.linalg.norm(output(net("chain"), x[20:])), 1e-3
    )
    assert onnxprune.prune(net("chain"), x, **HALF).report["validation"]["top1"] is None


HALF: dict[str, Any] = {"budget": {"macs": 0.5}, "method": "pfp-deterministic"}


@pytest.mark.parametrize("method", ["pfp-deterministic", "l2", "random"])
@pytest.mark.parametrize("name", small.NETS)
def test_the_report_alone_tells_what_the_pruned_model_computes(name: str, method: str) -> None:
    """Zeroing every consumer's removed slices gives its outputs, deleting every member's gives its very weights."""
    result = pruned(name, method, params=0.5)
    report = json.loads(json.dumps(result.report))
    assert any(g["removed"] for g in report["groups"]) and all(g["exact"] for g in report["groups"])
    masked, cut = onnx.ModelProto.FromString(net(name).SerializeToString()), weights(net(name))
    tensors = {t.name: t for t in masked.graph.initializer}
    gone: dict[tuple[str, int], list[int]] = {}
    for member in (m for g in report["groups"] for m in g["members"]):
        gone.setdefault((member["tensor"], member["axis"]), []).extend(member["removed"])
        if member["role"] == "consumer":
            value = numpy_helper.to_array(tensors[member["tensor"]]).copy()
            np.moveaxis(value, member["axis"], 0)[member["removed"]] = 0
            tensors[member["tensor"]].CopyFrom(numpy_helper.from_array(value, member["tensor"]))
    for (tensor, axis), positions in gone.items():
        assert len(set(positions)) == len(positions)
        cut[tensor] = np.delete(cut[tensor], positions, axis)
    for tensor, value in weights(result.model).items():
        assert np.array_equal(value, cut[tensor]), tensor
    x = small.images(6, seed=9)
    expected, original = output(masked, x), output(net(name), x)
    assert np.abs(output(result.model, x) - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(original - expected).max() > 1e-2 * np.abs(expected).max()  # or there would be nothing to tell


# ------------------------------------------------------------------------------------------------ the same bytes again


@pytest.mark.parametrize("method", methods())
def test_same_seed_same_bytes_for_every_method(here: Path, method: str) -> None:
    for number, seed in enumerate((3, 3) if method in ("auto", "pfp-deterministic", "obs", "activation") else (3, 3, 4)):
        recover = "none" if method in ("l1", "l2", "fpgm") else "auto"
        command = f"prune m.onnx --data d.npz --samples 4 -q --macs 0.5 --method {method} --seed {seed} --recover {recover}"
        assert run(f"{command} -o {number}.onnx") == 0
    assert sha(here / "0.onnx") == sha(here / "1.onnx")
    report = json.loads((here / "0.onnx.report.json").read_text())
    assert report["method"] == method or (method == "auto" and report["method"] in CANDIDATES)
    if method in ("pfp", "pfp-random", "random"):
        assert core(here / "0.onnx") != core(here / "2.onnx")
    if method in ("l1", "l2", "fpgm"):
        assert core(here / "0.onnx") == core(here / "2.onnx")


def test_another_process_writes_the_same_bytes_and_plain_text(here: Path) -> None:
    small.write(net("dense"), here / "dense.onnx")
    environment = {k: v for k, v in os.environ.items() if k not in ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE")}
    command = "prune dense.onnx --data d.npz --macs 0.5 --method pfp --samples 4"
    environment["PYTHONPATH"] = str(Path(onnxprune.__file__).parents[1])
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "onnxprune.cli", *shlex.split(f"{command} -v -o {seed}.onnx")],
            env={**environment, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert "written: " in done.stdout and "\x1b" not in done.stdout + done.stderr
        assert done.stderr.splitlines()[-1].startswith("comparing outputs: 8/8")
    assert sha(here / "1.onnx") == sha(here / "2.onnx")


def test_a_calibration_kept_in_a_file_gives_the_same_bytes(here: Path) -> None:
    assert run("prune m.onnx --data d.npz -q --params 0.4 --method pfp --recover none -o direct.onnx") == 0
    assert run("calibrate m.onnx --data d.npz -q -o c") == 0
    assert run("prune m.onnx --calibration c -q --params 0.4 --method pfp -o later.onnx") == 0
    assert core(here / "direct.onnx") == core(here / "later.onnx")
    assert run("prune m.onnx --data d.npz -q --params 0.4 -o auto.onnx") == 0
    assert run("prune m.onnx --data d.npz --calibration c -q --params 0.4 -o later-auto.onnx") == 0
    assert core(here / "auto.onnx") == core(here / "later-auto.onnx")


def test_shards_merge_to_the_calibration_of_all_data(here: Path) -> None:
    x = small.images(12)
    np.savez(here / "first.npz", x=x[:5])
    np.savez(here / "second.npz", x=x[5:])
    for method, scores in (("pfp", "max"), ("activation", "mean")):
        for shard in ("first", "second", "d"):
            assert run(f"calibrate m.onnx --data {shard}.npz -q --method {method} -o {shard}.{scores}") == 0
        assert run(f"merge first.{scores} second.{scores} -q -o both.{scores}") == 0
        both, whole = Saliency.load(here / f"both.{scores}"), Saliency.load(here / f"d.{scores}")
        assert both.samples == whole.samples == 12 and len(both.data) == 2
        for a, b in zip(both.layers, whole.layers, strict=True):
            assert (a.layer, a.group, a.events) == (b.layer, b.group, b.events)
            assert np.allclose(a.values, b.values, rtol=1e-5)
    assert run("prune m.onnx --calibration both.max -q --macs 0.5 --method pfp-deterministic -o both.onnx") == 0
    assert run("prune m.onnx --calibration d.max -q --macs 0.5 --method pfp-deterministic -o whole.onnx") == 0
    assert run("prune m.onnx --calibration first.max -q --macs 0.5 --method pfp-deterministic -o first.onnx") == 0
    assert core(here / "both.onnx") == core(here / "whole.onnx") != core(here / "first.onnx")


def test_bounds_of_sensitivities_are_named_and_do_not_merge_with_exact_ones(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("calibrate m.onnx --data d.npz -q -o exact") == 0
    assert run("calibrate m.onnx --data d.npz -q --sensitivity bound -o bound") == 0
    exact, bound = Saliency.load(here / "exact"), Saliency.load(here / "bound")
    assert (exact.options["sensitivity"], bound.options["sensitivity"]) == ("exact", "bound")
    for a, b in zip(exact.layers, bound.layers, strict=True):
        assert (a.values <= b.values * (1 + 1e-6)).all() and (b.values <= a.values * (1.01 + TOLERANCE)).all()
    capsys.readouterr()
    assert run("merge exact bound -q -o both") == 2
    assert "differ in options" in capsys.readouterr().err and not (here / "both").exists()
    assert (
        run("prune m.onnx --data d.npz --macs 0.5 --sensitivity bound --method pfp-deterministic --recover none -o a.onnx") == 0
    )
    assert "by upper bounds of the sensitivities" in " ".join(capsys.readouterr().out.split())
    for name, options, mode in (("b", "--calibration bound", "bound"), ("c", "--calibration exact", "exact")):
        assert run(f"prune m.onnx {options} -q --macs 0.5 --method pfp-deterministic -o {name}.onnx") == 0
        report = json.loads((here / f"{name}.onnx.report.json").read_text())
        assert report["calibration"]["options"]["sensitivity"] == report["certificate"]["calibration"]["mode"] == mode
    assert core(here / "a.onnx") == core(here / "b.onnx")


def test_a_plan_applied_again_gives_the_same_bytes(here: Path) -> None:
    for method in ("pfp", "l1"):  # the first rescales weights
        options = f"--data d.npz -q --macs 0.4 --method {method} --recover none"
        assert run(f"prune m.onnx {options} -o {method}.onnx --save-plan {method}.json") == 0
        assert run(f"apply m.onnx {method}.json -q -o again.onnx --force") == 0
        assert core(here / f"{method}.onnx") == sha(here / "again.onnx")
        assert run(f"verify m.onnx {method}.onnx --data d.npz") == 0
    assert any("scale" in g for g in json.loads((here / "pfp.json").read_text())["groups"].values())


def test_library_verify_measures_the_pair(here: Path) -> None:
    result = onnxprune.prune(here / "m.onnx", here / "d.npz", budget={"macs": 0.5})
    result.save(here / "a.onnx")
    found = onnxprune.verify(here / "m.onnx", here / "a.onnx", result.report, here / "d.npz")
    assert found["validation"] == result.report["validation"]
    assert result.model == onnx.load(here / "a.onnx")
    plain = onnxprune.prune(here / "m.onnx", here / "d.npz", budget={"macs": 0.5}, recover="none")
    assert onnxprune.apply(here / "m.onnx", plain.plan)[1] == certify.without(plain.model)


# ------------------------------------------------------------------------------------------------------------- options


def removed(result: onnxprune.Result) -> dict[str, tuple[int, int]]:
    """(size, kept) of every group that lost channels."""
    return {g["id"]: (g["size"], len(g["kept"])) for g in result.report["groups"] if g["removed"]}


@pytest.mark.parametrize("method", ["pfp", "pfp-random", "pfp-deterministic", "l1"])
def test_align_and_min_channels_are_honoured(method: str) -> None:
    options: dict[str, Any] = {"calibration": calibration("residual", method), "method": method}
    for name, value, budget in (("align", 4, 0.5), ("align", 8, 0.7), ("min_channels", 3, 0.2), ("min_channels", 4, 0.055)):
        result = onnxprune.prune(net("residual"), budget={"macs": budget}, **options, **{name: value})
        found = removed(result)
        assert found and SIZES["macs"](result.model) <= budget * SIZES["macs"](net("residual"))
        for size, kept in found.values():
            assert kept % value == 0 if name == "align" else kept >= min(value, size)
    free = onnxprune.prune(net("residual"), budget={"macs": 0.055}, **options)
    assert min(kept for _, kept in removed(free).values()) < 4  # so that the option did something
    with pytest.raises(BudgetError, match="out of reach"):
        onnxprune.prune(net("residual"), budget={"macs": 0.05}, align=8, **options)


def test_groups_narrower_than_align_stay_whole() -> None:
    result = onnxprune.prune(net("chain"), calibration=calibration("chain"), budget={"macs": 0.7}, align=20)
    assert removed(result) == {"Conv_3": (24, 20), "Conv_6": (32, 20)}  # and Conv_0, which has 16, is whole


def test_freeze_leaves_layers_and_tensors_alone() -> None:
    free = pruned("depthwise", "pfp", macs=0.5)
    for pattern, weight in (("Conv_3", "w3"), ("Conv_*", None), ("w1[0-9]", "w15")):
        result = None
        try:
            result = onnxprune.prune(
                net("depthwise"), calibration=calibration("depthwise"), budget={"macs": 0.8}, freeze=(pattern,)
            )
        except onnxprune.OnnxPruneError as error:
            assert pattern == "Conv_*" and "nothing in the model can be pruned: --freeze Conv_*" in str(error)
        if result is not None:
            assert weight and weights(result.model)[weight].shape[0] == weights(net("depthwise"))[weight].shape[0]
            assert weights(free.model)[weight].shape[0] < weights(net("depthwise"))[weight].shape[0]
            assert f"--freeze {pattern}" in [g["reason"] for g in result.report["groups"]]
    with pytest.raises(OptionError, match="--freeze nothing matches no"):
        onnxprune.prune(net("depthwise"), calibration=calibration("depthwise"), budget={"macs": 0.8}, freeze=("nothing",))


# --------------------------------------------------------------------------------------------- the files, in and out


def test_external_data_in_and_out(here: Path) -> None:
    copy = onnx.ModelProto.FromString(net("chain").SerializeToString())
    (here / "in").mkdir()
    onnx.save(copy, str(here / "in" / "m.onnx"), save_as_external_data=True, location="m.weights", size_threshold=100)
    before = hashes(here)
    assert run("prune in/m.onnx --data d.npz -q --macs 0.5 --method pfp --recover none -o out.onnx --save-plan plan.json") == 0
    assert run("prune m.onnx --data d.npz -q --macs 0.5 --method pfp --recover none -o whole.onnx") == 0
    raw = onnx.load(here / "out.onnx", load_external_data=False)
    places = {e.value for t in raw.graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {"out.onnx.data"}
    assert weights(onnx.load(here / "out.onnx")).keys() == weights(net("chain")).keys()
    for name, value in weights(onnx.load(here / "out.onnx")).items():
        assert np.array_equal(value, weights(onnx.load(here / "whole.onnx"))[name])
    assert ort.InferenceSession(here / "out.onnx", providers=["CPUExecutionProvider"]).get_inputs()
    told = {f"{name}.onnx.{what}.json" for name in ("out", "whole") for what in ("report", "certificate")}
    made = {"out.onnx", "out.onnx.data", "plan.json", "whole.onnx", *told}
    assert hashes(here).keys() - before.keys() == made and before.items() <= hashes(here).items()
    assert run("verify in/m.onnx out.onnx") == 0
    assert run("apply in/m.onnx plan.json -q -o again.onnx") == 0
    assert sha(here / "again.onnx.data") == sha(here / "out.onnx.data")


def test_somebody_elses_data_file_is_not_replaced_without_force(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = onnx.ModelProto.FromString(net("chain").SerializeToString())
    onnx.save(copy, str(here / "e.onnx"), save_as_external_data=True, location="e.weights", size_threshold=100)
    (here / "out.onnx.data").write_text("precious")
    before = hashes(here)
    for command in ("prune e.onnx --data d.npz -q --macs 0.5 -o out.onnx", "apply e.onnx d.npz -q -o out.onnx"):
        assert run(command) == 2
        assert "out.onnx.data exists already (add --force" in capsys.readouterr().err
    result = onnxprune.prune(here / "e.onnx", budget={"macs": 0.5}, method="l1")
    with pytest.raises(OutputError, match="exists already"):
        result.save(here / "out.onnx")
    assert hashes(here) == before
    result.save(here / "out.onnx", force=True)
    assert weights(onnx.load(here / "out.onnx")).keys() == weights(result.model).keys()


def test_whatever_is_not_cut_stays_as_it_was(here: Path) -> None:
    before = hashes(here)
    (here / "r").mkdir()
    options = "--method l1 --recover none --freeze Conv_0"
    assert run(f"prune m.onnx --data d.npz -q --macs 0.5 {options} -o a.onnx --report r/r.json") == 0
    made = {"a.onnx", "a.onnx.certificate.json", "r/r.json"}
    assert hashes(here).keys() - before.keys() == made and before.items() <= hashes(here).items()
    old, new = net("chain"), certify.without(onnx.load(here / "a.onnx"))
    for field in ("ir_version", "producer_name", "opset_import", "metadata_props"):
        assert getattr(old, field) == getattr(new, field) and getattr(old, field)
    assert old.graph.name == new.graph.name and list(old.graph.node) == list(new.graph.node)
    assert list(old.graph.input) == list(new.graph.input) and list(old.graph.output) == list(new.graph.output)
    assert [t.name for t in old.graph.initializer] == [t.name for t in new.graph.initializer]
    same = {t.name for t in old.graph.initializer} - {"w3", "b3", "scale4", "shift4", "mean4", "var4", "w6", "b6"}
    same -= {"scale7", "shift7", "mean7", "var7", "fc.w"}
    assert all(a == b for a, b in zip(old.graph.initializer, new.graph.initializer, strict=True) if a.name in same)
    inferred = onnx.shape_inference.infer_shapes(clean(new), strict_mode=True)
    assert shapes(inferred) == shapes(new)  # the value_info that the file came with was brought up to date


def clean(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    del copy.graph.value_info[:]
    return copy


def shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    return {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}


def test_force_replaces_and_nothing_else_does(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "prune m.onnx --method l1 -q -o a.onnx --macs"
    assert run(command, "0.5") == 0
    before = hashes(here)
    assert run(command, "0.4") == 2 and "a.onnx exists already" in capsys.readouterr().err
    (here / "a.onnx").rename(here / "b.onnx")
    assert run(command, "0.4") == 2 and "a.onnx.report.json exists already" in capsys.readouterr().err
    (here / "b.onnx").rename(here / "a.onnx")
    assert hashes(here) == before
    assert run(command, "0.4 --force") == 0
    assert SIZES["macs"](onnx.load(here / "a.onnx")) <= 0.4 * SIZES["macs"](net("chain"))
    assert json.loads((here / "a.onnx.report.json").read_text())["budget"]["value"] == 0.4
    result = onnxprune.prune(here / "m.onnx", budget={"macs": 0.5}, method="l1")
    with pytest.raises(OutputError, match="exists already"):
        result.save(here / "a.onnx")
    result.save(here / "c.onnx", here / "c.json")
    assert json.loads((here / "c.json").read_text()) == result.report


def half_written(error: BaseException, at: int) -> Callable[[Path, bytes], int]:
    """A Path.write_bytes that breaks off in the middle of its call number `at`."""
    calls = [0]

    def write(path: Path, blob: bytes) -> int:
        calls[0] += 1
        with path.open("wb") as out:
            out.write(blob[: len(blob) // 2] if calls[0] == at else blob)
        if calls[0] == at:
            raise error
        return len(blob)

    return write


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)])
def test_an_interrupted_write_leaves_no_partial_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    (here / "a.onnx").write_text("what was there before")
    before = hashes(here)
    monkeypatch.setattr(Path, "write_bytes", half_written(error, 1))
    assert run("prune m.onnx --method l1 -q --macs 0.5 -o a.onnx --force") == code
    assert run("prune m.onnx --method l1 -q --macs 0.5 -o b.onnx") == 0  # the second write is whole again
    assert before.items() <= hashes(here).items()
    assert hashes(here).keys() - before.keys() == {"b.onnx", "b.onnx.report.json"}  # hidden files would be listed too


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_interrupted_rename_leaves_no_temporary_file(
    here: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    copy = onnx.ModelProto.FromString(net("chain").SerializeToString())
    onnx.save(copy, str(here / "e.onnx"), save_as_external_data=True, location="e.weights", size_threshold=100)
    before = hashes(here)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "replace", fail)
    for model in ("m.onnx", "e.onnx"):
        assert run(f"prune {model} --method l1 -q --macs 0.5 -o a.onnx") in (2, 130)
    assert run("calibrate m.onnx --data d.npz -q -o c") in (2, 130)
    assert hashes(here) == before


# ---------------------------------------------------------------------------------- nothing that is wrong gets written


def one_off(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "w3")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.01), "w3"))


def not_finite(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "w3")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(np.nan), "w3"))


def too_narrow(model: onnx.ModelProto) -> None:
    weight = next(t for t in model.graph.initializer if t.name == "w3")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight)[:, 1:], "w3"))


def other_output(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9


def other_input(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"


@pytest.mark.parametrize("damage", [one_off, not_finite, too_narrow, other_output, other_input])
def test_failed_validation_exits_3_and_writes_nothing(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: Callable[[onnx.ModelProto], None]
) -> None:
    real = finish.surgery

    def wrong(*arguments: Any) -> onnx.ModelProto:
        model = real(*arguments)
        damage(model)
        return model

    assert run("prune m.onnx --method l1 -q --macs 0.5 -o good.onnx --save-plan good.json") == 0
    for module in (finish, pairs):
        monkeypatch.setattr(module, "surgery", wrong)
    before = hashes(here)
    for command in (
        "prune m.onnx --method l1 -q --macs 0.5 -o a.onnx --save-plan p.json",
        "apply m.onnx good.json -q -o a.onnx",
    ):
        assert run(command) == 3
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith("onnxprune: error: ") and captured.err.count("\n") == 1
    assert hashes(here) == before
    with pytest.raises(ValidationError):
        onnxprune.prune(here / "m.onnx", budget={"macs": 0.5}, method="l1")


# -------------------------------------------------------------------------------------------------- kinds of models


def newest_opset() -> int:
    """The newest opset that both onnx and this ONNX Runtime know."""
    for opset in range(onnx.defs.onnx_opset_version(), 16, -1):
        try:
            output(small.chain(opset=opset), small.images(1))
        except Exception:  # the runtime is behind
            continue
        return opset
    raise AssertionError("ONNX Runtime takes no opset from 17 on")


def check_kind(model: onnx.ModelProto, x: Array, tolerance: float = 1e-4) -> onnxprune.Result:
    """Prunes on data to half of the MACs; without reweighting the surviving weights are the original's own."""
    result = onnxprune.prune(model, x, budget={"macs": 0.5}, method="pfp-deterministic")
    assert 0.45 <= SIZES["macs"](result.model) / SIZES["macs"](model) <= 0.5
    assert result.report["validation"]["masked_max_relative_error"] <= tolerance
    batch = x[:4]
    assert output(result.model, batch).shape == output(model, batch).shape
    assert output(result.model, batch).dtype == output(model, batch).dtype == x.dtype
    assert result.model.opset_import == model.opset_import
    return result


def test_fixed_batch() -> None:
    model = small.chain(batch=4)
    for count in (10, 3):  # not a multiple of the batch; less than one batch
        result = onnxprune.prune(model, small.images(count), budget={"macs": 0.5})
        assert result.report["calibration"]["samples"] == count
        assert 0.45 <= SIZES["macs"](result.model) / SIZES["macs"](model) <= 0.5
    result = check_kind(model, small.images(12))
    assert result.report["validation"]["samples"] == 12


def test_float16() -> None:
    result = check_kind(small.chain(dtype=np.float16), small.images(12, dtype=np.float16), 2e-2)
    assert all(value.dtype == np.float16 for value in weights(result.model).values())
    sampled = onnxprune.prune(small.chain(dtype=np.float16), small.images(12), budget={"macs": 0.5}, method="pfp")
    assert all(value.dtype == np.float16 for value in weights(sampled.model).values())


@pytest.mark.parametrize("opset", [9, 11, 13, newest_opset()])
def test_opsets(opset: int) -> None:
    check_kind(small.chain(opset=opset), small.images(8))


def test_initializers_listed_as_inputs() -> None:
    model = small.chain(opset=9)
    model.ir_version = 3
    listed = [onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer]
    model.graph.input.extend(listed)
    result = check_kind(model, small.images(8))
    declared = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in result.model.graph.input[1:]}
    assert declared == {name: list(value.shape) for name, value in weights(result.model).items()}
    assert [i.name for i in result.model.graph.input] == [i.name for i in model.graph.input]


@pytest.mark.parametrize("source", ["npz", "npy", "folder", "script", "array"])
def test_data_of_every_kind_reaches_the_model(here: Path, source: str) -> None:
    x = small.images(6)
    np.save(here / "x.npy", x)
    (here / "s.py").write_text("import numpy\ndef batches():\n    yield {'x': numpy.load('x.npy')}\n")
    (here / "f").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        small.picture(here / "f" / f"{i}.png", pixels)
    data: dict[str, Any] = {"npz": "d.npz", "npy": "x.npy", "folder": "f", "script": "s.py:batches", "array": x}
    result = onnxprune.prune(here / "m.onnx", data[source], budget={"macs": 0.5})
    assert result.report["calibration"]["samples"] == (12 if source == "npz" else 6)
    same = source in ("npy", "script", "array")
    shared = onnxprune.calibrate(here / "m.onnx", x).data
    assert (result.report["calibration"]["data"] == list(shared)) == same


# ----------------------------------------------------------------------------------------------------------- printing


@pytest.mark.parametrize(
    "commands",
    [
        ["prune m.onnx --data d.npz --macs 0.5 -o a.onnx"],
        ["calibrate m.onnx --data d.npz -o c", "merge c c -o cc"],
        ["prune m.onnx --method l1 --macs 0.5 -o a.onnx --save-plan p", "apply m.onnx p -o b.onnx", "verify m.onnx a.onnx"],
        ["inspect m.onnx"],
    ],
)
def test_quiet_prints_nothing(here: Path, capsys: pytest.CaptureFixture[str], commands: Sequence[str]) -> None:
    for command in commands:
        assert run(command) == 0
        assert capsys.readouterr().out.strip()
        assert run(command, "-q", "--force" if " -o " in command else "") == 0
        assert capsys.readouterr() == ("", "")


def test_summary_tells_sizes_checks_and_certificate(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("prune m.onnx --data d.npz --macs 0.5 -o a.onnx --method pfp-random --recover none") == 0
    out = capsys.readouterr().out
    report = json.loads((here / "a.onnx.report.json").read_text())
    share = 100 * report["pruned"]["macs"] / report["original"]["macs"]
    for text in (f"kept {share:.1f} %", "method pfp-random, budget macs 0.5", "ONNX Runtime ok", "top-1", "written: a.onnx"):
        assert text in out
    assert "vacuous" in out and report["certificate"]["sampling"]["vacuous"]  # a small network on a small sample proves nothing
    for layer in report["layers"]:
        assert layer["name"] in out
    assert run("prune m.onnx --macs 0.5 -o b.onnx --method l1") == 0
    assert "certificate: none" in capsys.readouterr().out
