"""Fine-tuning: what is trained, what changes in the file, what stays true of it, and what happens when it is interrupted."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import cli, files, finetuning, job, runtime
from onnxprune.data import InputSpec, open_data
from onnxprune.errors import DataError, ModelError, OptionError
from onnxprune.graph import Network, graph_inputs
from onnxprune.training.settings import Training

torch = pytest.importorskip("torch")

from onnxprune.training.optimiser import is_matrix, optimiser, orthogonal  # noqa: E402
from onnxprune.training.store import Store, _varied  # noqa: E402
from onnxprune.training.trainable import trainable  # noqa: E402
from onnxprune.training.trainer import scheduled  # noqa: E402
from onnxprune.training.tune import Tuned, apart, tune  # noqa: E402
from onnxprune.training.write import written  # noqa: E402

Array = np.ndarray[Any, Any]
Run = Callable[[str], tuple[int, str, str]]
EXACT: dict[str, Any] = {"precision": "float32", "batch": 16, "optimiser": "adamw", "rate": 3e-3}


def specs(model: onnx.ModelProto) -> list[InputSpec]:
    return [InputSpec(v.name, runtime.input_dtype(v), runtime.input_shape(v)) for v in graph_inputs(model)]


def trained(student: onnx.ModelProto, teacher: onnx.ModelProto, x: Array, **settings: Any) -> Tuned:
    samples = open_data(x, specs(teacher))
    return tune(student, teacher, samples, np.arange(len(samples)), Training(**{**EXACT, **settings}))


def cut(model: onnx.ModelProto, keep: float = 0.5) -> onnx.ModelProto:
    return onnxprune.prune(model, budget={"macs": keep}, method="l1", recover="none").model


def arrays(model: onnx.ModelProto) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def without_weights(model: onnx.ModelProto) -> bytes:
    """The file with all constants emptied of values."""
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    for tensor in copy.graph.initializer:
        for field in ("raw_data", "float_data"):
            tensor.ClearField(field)
    del copy.metadata_props[:]
    return bytes(copy.SerializeToString(deterministic=True))


# ------------------------------------------------------------------------------------------------ what is trained


def net_of(nodes: list[onnx.NodeProto], weights: dict[str, Array], x: tuple[int, ...] = (1, 4, 6)) -> Network:
    held = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in weights.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x))]
    graph = helper.make_graph(nodes, "net", inputs, [onnx.ValueInfoProto(name="y")], held)
    return Network(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), {}, {})


def test_a_bias_is_trained_and_a_grid_is_not() -> None:
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["a"]),
        helper.make_node("MatMul", ["a", "w"], ["b"]),
        helper.make_node("Add", ["bias", "b"], ["c"]),
        helper.make_node("Sigmoid", ["c"], ["d"]),
        helper.make_node("Add", ["d", "grid"], ["e"]),
        helper.make_node("Mul", ["e", "stride"], ["y"]),
        helper.make_node("Mul", ["scale", "c"], ["z"]),
    ]
    vectors = {name: np.ones(5) for name in ("bias", "grid", "stride", "scale")}
    assert trainable(net_of(nodes, {"mean": np.ones(6), "w": np.ones((6, 5)), **vectors})) == ["w", "bias", "scale"]


def test_weights_are_found_behind_what_only_moves_them() -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["t"], perm=[1, 0]),
        helper.make_node("Identity", ["t"], ["i"]),
        helper.make_node("MatMul", ["x", "i"], ["m"]),
        helper.make_node("Sqrt", ["v"], ["s"]),
        helper.make_node("MatMul", ["m", "s"], ["y"]),
    ]
    assert trainable(net_of(nodes, {"w": np.ones((5, 6)), "v": np.ones((5, 5))})) == ["w"]


def test_the_scale_and_shift_of_a_norm_in_pieces_are_trained() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["mu"], axes=[-1]),
        helper.make_node("Sub", ["x", "mu"], ["d"]),
        helper.make_node("Mul", ["d", "d"], ["sq"]),
        helper.make_node("ReduceMean", ["sq"], ["var"], axes=[-1]),
        helper.make_node("Add", ["var", "eps"], ["ve"]),
        helper.make_node("Sqrt", ["ve"], ["sd"]),
        helper.make_node("Div", ["d", "sd"], ["n"]),
        helper.make_node("Mul", ["n", "gamma"], ["g"]),
        helper.make_node("Add", ["g", "beta"], ["y"]),
    ]
    assert trainable(net_of(nodes, {"eps": np.array(1e-5), "gamma": np.ones(6), "beta": np.zeros(6)})) == ["gamma", "beta"]


def test_statistics_of_a_kept_batch_norm_stay_unless_those_of_the_batch_are_wanted() -> None:
    teacher = small.chain()
    student, x = cut(teacher, 0.2), small.images(96)
    before = arrays(student)
    for mode, moved in (("frozen", False), ("batch", True)):
        after = arrays(trained(student, teacher, x, epochs=4, batch_norm=mode).model)
        for name in ("mean1", "var1"):
            assert (not np.array_equal(after[name], before[name])) is moved
        for name in ("w0", "b0", "scale1", "shift1", "fc.w", "fc.b"):
            assert not np.array_equal(after[name], before[name])


def test_a_tensor_that_is_a_variance_somewhere_is_never_trained() -> None:
    """Some exporters merge all constants of equal values."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "ones", "shift", "mean", "ones"], ["n"]),
        helper.make_node("BatchNormalization", ["n", "scale", "mean", "mean", "ones"], ["y"]),
    ]
    vectors = {"ones": np.ones(5), "shift": np.zeros(5), "mean": np.zeros(5), "scale": np.ones(5)}
    net = net_of(nodes, {"w": np.ones((5, 4, 1)), **vectors})
    assert trainable(net) == ["w", "shift", "scale"]


# ---------------------------------------------------------------------------------------------- what changes in the file


@pytest.mark.parametrize(("optimiser", "rate"), [("adamw", 3e-3), ("muon", 1e-3), ("sgd", 3e-3)])
def test_training_brings_outputs_nearer_and_changes_nothing_but_weights(optimiser: str, rate: float) -> None:
    teacher, x = small.residual(), small.images(256)
    student = cut(teacher)
    made = trained(student, teacher, x, epochs=6, optimiser=optimiser, rate=rate)
    assert made.after.distance < 0.7 * made.before.distance
    assert made.best > 0
    assert made.model.SerializeToString() != student.SerializeToString()
    assert without_weights(made.model) == without_weights(student)
    fresh = small.images(64, seed=9)

    def distance(model: onnx.ModelProto) -> float:
        want, have = (runtime.run(runtime.session(m), {"x": fresh})[0] for m in (teacher, model))
        return float(np.square(want - have).sum() / np.square(want).sum())

    assert distance(made.model) < 0.8 * distance(student)


def test_the_same_seed_gives_the_same_file() -> None:
    teacher, x = small.chain(), small.images(96)
    student = cut(teacher)
    first, second, other = (trained(student, teacher, x, epochs=2, seed=s).model.SerializeToString() for s in (0, 0, 1))
    assert first == second
    assert first != other


def test_shared_weights_stay_shared_and_constants_are_written_where_they_are() -> None:
    rng = np.random.default_rng(0)
    w, b = rng.standard_normal((6, 6)).astype(np.float32) / 2, np.zeros(6, np.float32)
    nodes = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(w, "held")),
        helper.make_node("Constant", [], ["b"], value_floats=b.tolist()),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Tanh", ["h"], ["t"]),
        helper.make_node("MatMul", ["t", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["s"]),
        helper.make_node("MatMul", ["s", "v"], ["y"]),
    ]
    listed = helper.make_tensor("v", TensorProto.FLOAT, [6, 3], rng.standard_normal(18).tolist())
    assert listed.float_data
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", size])] for n, size in (("x", 6), ("y", 3)))
    graph = helper.make_graph(nodes, "g", inputs, outputs, [listed])
    student = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    teacher = written(student, {"w": w + 0.1, "b": b + 0.5, "v": numpy_helper.to_array(listed) * 1.5})
    made = trained(student, teacher, rng.standard_normal((128, 6)).astype(np.float32), epochs=5).model
    held, bias = made.graph.node[0].attribute[0].t, made.graph.node[1].attribute[0].floats
    assert not np.array_equal(numpy_helper.to_array(held), w) and held.name == "held"
    assert any(bias) and len(made.graph.initializer[0].float_data) == 18
    assert not made.graph.initializer[0].HasField("raw_data")
    assert [n.op_type for n in made.graph.node] == [n.op_type for n in student.graph.node]


def test_half_precision_is_trained_in_single_and_written_as_half() -> None:
    teacher = small.chain(dtype=np.float16)
    student = cut(teacher)
    made = trained(student, teacher, small.images(96, dtype=np.float16), epochs=2)
    assert made.best > 0
    assert {t.data_type for t in made.model.graph.initializer} == {t.data_type for t in student.graph.initializer}
    runtime.run(runtime.session(made.model), {"x": small.images(2, dtype=np.float16)})


def test_a_prescribed_batch_is_kept_to() -> None:
    teacher = small.chain(batch=4)
    student = cut(teacher)
    made = trained(student, teacher, small.images(64), epochs=8, batch=10)
    assert made.settings.batch == 12  # three runs of four, whose gradients add up
    assert made.after.distance < made.before.distance


def test_what_is_worse_is_not_kept() -> None:
    teacher = small.chain()
    made = trained(teacher, teacher, small.images(64), epochs=2, rate=10.0)
    assert made.best == 0
    assert made.model is teacher
    assert made.after == made.before and made.before.agreement == 1.0


def test_true_classes_are_learnt_where_they_are_to_be() -> None:
    teacher, x = small.chain(), small.images(128)
    y = np.full(128, 3)
    samples = open_data({"x": x, "y": y}, specs(teacher))
    settings = Training(**{**EXACT, "epochs": 4, "labels": 1.0, "rate": 1e-2})
    made = tune(teacher, teacher, samples, np.arange(128), settings)
    assert made.best == 0  # it is judged by the teacher's answers, from which this leads away
    assert made.before.accuracy is not None


def test_outputs_that_are_no_class_scores_are_compared_as_they_are() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((3, 3, 3, 3)).astype(np.float32) / 5
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3, 8, 8]) for n in "xy"]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    student = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    teacher = written(student, {"w": weight * 1.2})
    made = trained(student, teacher, small.images(64), epochs=8, rate=1e-2)
    assert made.before.metric == "relative_l2"
    assert made.to_json()["after"] < 0.5 * made.to_json()["before"]


# --------------------------------------------------------------------------------------------- schedule, store, samples


def test_the_rate_rises_and_falls() -> None:
    settings = Training(rate=1.0, warm_up=0.1)
    rates = [scheduled(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == rates[10] == 1.0
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] < 1e-3


def test_steps_of_muon_are_orthogonal_and_of_one_size() -> None:
    torch.manual_seed(0)
    for shape in ((8, 20), (20, 8), (6, 4, 3, 3)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(shape).reshape(shape[0], -1)))
        assert values.min() > 0.6 and values.max() < 1.3
    weight, bias = torch.zeros(8, 20, requires_grad=True), torch.zeros(8, requires_grad=True)
    made = optimiser([weight, bias], Training(rate=0.01, decay=0.0))
    for scale in (1.0, 1000.0):
        weight.grad, bias.grad = scale * torch.randn(8, 20), scale * torch.ones(8)
        made.step()
        assert weight.detach().square().mean().sqrt() == pytest.approx(0.01 * 0.2 * 20**0.5 * (8 / 160) ** 0.5, rel=0.2)
        with torch.no_grad():
            weight.zero_()
    assert float(bias.detach()[0]) == pytest.approx(-0.02, rel=0.5)


def test_what_is_no_matrix_is_left_to_adam() -> None:
    assert [is_matrix(s) for s in ((8, 20), (8, 4, 3, 3), (8, 4, 1, 1))] == [True] * 3
    assert [is_matrix(s) for s in ((8,), (1, 20), (8, 1, 3, 3), (1, 12, 4), (2000, 2000))] == [False] * 5


@pytest.mark.parametrize("name", ["muon", "adamw", "sgd"])
def test_every_optimiser_goes_on_from_its_state(name: str) -> None:
    """Steps after a restart are those of one that never stopped."""

    def steps(values: list[Any], made: Any, first: int, last: int) -> None:
        for n in range(first, last):
            torch.manual_seed(n)
            for value in values:
                value.grad = torch.randn(value.shape)
            made.step()

    def fresh() -> tuple[list[Any], Any]:
        values = [torch.ones(4, 5, requires_grad=True), torch.ones(4, requires_grad=True)]
        return values, optimiser(values, Training(optimiser=name, rate=0.01))  # type: ignore[arg-type]

    whole, made = fresh()
    steps(whole, made, 0, 5)
    part, first = fresh()
    steps(part, first, 0, 3)
    again, second = fresh()
    with torch.no_grad():
        for a, b in zip(again, part, strict=True):
            a.copy_(b)
    second.load_state_dict(first.state_dict())
    steps(again, second, 3, 5)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))


def test_an_epoch_has_every_sample_once_in_an_order_of_its_own() -> None:
    samples = open_data(np.arange(40, dtype=np.float32)[:, None], [InputSpec("x", np.dtype(np.float32), (None, 1))])
    store = Store(samples, np.arange(40), "auto")
    settings = Training(batch=10)
    orders = [
        [int(v) for b in store.epoch(e, settings, ahead) for v in b.feeds["x"][:, 0]] for e, ahead in ((0, 0), (0, 1), (1, 0))
    ]
    assert sorted(orders[0]) == list(range(40))
    assert orders[0] == orders[1] != orders[2]
    store.keep()
    assert [int(v) for b in store.epoch(0, settings, False) for v in b.feeds["x"][:, 0]] == orders[0]


def test_pictures_are_shifted_and_mirrored_and_arrays_are_not(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for n in range(8):
        small.picture(tmp_path / f"{n}.png", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    inputs = [InputSpec("x", np.dtype(np.float32), (None, 3, 16, 16))]
    pictures = open_data(tmp_path, inputs)
    plain = pictures.batch(np.arange(8))["x"]
    varied = next(iter(Store(pictures, np.arange(8), "auto").epoch(0, Training(batch=8), False))).feeds["x"]
    order = np.random.default_rng((0, 0)).permutation(8)
    assert varied.shape == plain.shape and not np.array_equal(varied, plain[order])
    for before, after in zip(plain[order], varied, strict=True):
        wider = np.pad(before, ((0, 0), (2, 2), (2, 2)), mode="reflect")
        moved = [wider[:, y : y + 16, x : x + 16] for y in range(5) for x in range(5)]
        assert any(np.array_equal(after, m) or np.array_equal(after, m[..., ::-1]) for m in moved)
    same, other = (
        next(iter(Store(open_data(plain, inputs), np.arange(8), how).epoch(0, Training(batch=8), False))).feeds["x"]
        for how in ("auto", "flip+shift")
    )
    assert np.array_equal(same, plain[order])
    assert np.array_equal(other, varied)  # where they are said to be pictures
    vectors = open_data(np.ones((8, 5), np.float32), [InputSpec("x", np.dtype(np.float32), (None, 5))])
    with pytest.raises(OptionError, match="no pictures to shift"):
        Store(vectors, np.arange(8), "shift")


def test_held_out_samples_are_not_trained_on() -> None:
    held, rest = apart(np.arange(100, 1300), 0)
    assert len(held) == 64 and sorted([*held, *rest]) == list(range(100, 1300))
    with pytest.raises(DataError, match="7 samples are too few"):
        apart(np.arange(7), 0)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"epochs": 0}, "--epochs must be at least 1"),
        ({"rate": -1.0}, "--rate must be above 0"),
        ({"optimiser": "lamb"}, "--optimiser is one of muon, adamw, sgd"),
        ({"labels": 1.5}, "share of the labels"),
        ({"batch_norm": "none"}, "--batch-norm is one of"),
        ({"seed": -1}, "--seed must not be negative"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Training(**wrong)


def test_a_model_that_cannot_be_trained_is_refused_by_name() -> None:
    teacher = small.chain()
    model = onnx.ModelProto.FromString(teacher.SerializeToString())
    model.graph.node.append(helper.make_node("NonZero", ["scores"], ["places"]))
    with pytest.raises(ModelError, match="cannot be trained through: NonZero"):
        trained(model, model, small.images(16))


# ------------------------------------------------------------------------------------------------------ the command


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here = tmp_path_factory.mktemp("tune")
    teacher, x = small.residual(), small.images(400)
    small.write(teacher, here / "m.onnx")
    answers = runtime.run(runtime.session(teacher), {"x": x})[0].argmax(1)
    np.savez(here / "d.npz", x=x, y=answers)
    np.savez(here / "other.npz", x=small.images(100, seed=5))
    np.savez(here / "few.npz", x=x[:5])
    result = onnxprune.prune(here / "m.onnx", here / "d.npz", budget={"macs": 0.5}, method="pfp", recover="none", samples=64)
    result.save(here / "p.onnx")
    small.write(small.chain(), here / "stranger.onnx")
    odd = onnx.ModelProto.FromString(teacher.SerializeToString())
    odd.graph.node.append(helper.make_node("NonZero", ["scores"], ["places"]))
    odd.graph.output.append(helper.make_tensor_value_info("places", TensorProto.INT64, [2, None]))
    small.write(odd, here / "odd.onnx")
    return here


@pytest.fixture
def run(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(given)
    monkeypatch.setenv("OUT", str(tmp_path))

    def call(arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main([os.path.expandvars(word) for word in shlex.split(arguments)])
        return code, *capsys.readouterr()

    return call


TUNE = (
    "finetune p.onnx --teacher m.onnx --data d.npz -o $OUT/t.onnx --precision float32 --batch 32 --optimiser adamw --rate 0.003"
)


def test_the_file_is_tuned_certified_anew_and_verified(run: Run, tmp_path: Path, given: Path) -> None:
    code, out, err = run(f"{TUNE} --epochs 4")
    assert code == 0, err
    assert "top-1 of the original 100.00 %" in out and "epoch 4/4" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["t.onnx", "t.onnx.certificate.json", "t.onnx.report.json"]
    report = json.loads((tmp_path / "t.onnx.report.json").read_text())
    tuned = report["finetune"]
    assert {"epochs", "before", "after", "metric", "seconds", "best", "samples", "held_out"} <= tuned.keys()
    assert (tuned["epochs"], tuned["metric"]) == (4, "agreement") and tuned["best"] > 0 and tuned["seconds"] > 0
    before = json.loads((given / "p.onnx.report.json").read_text())
    told, then = report["certificate"], before["certificate"]
    assert before["recover"] == "none" and report["recover"] == told["recover"] == "finetune"
    assert told["digests"]["pruned"] != then["digests"]["pruned"] and told["plan"] == then["plan"]
    people = told["population"]
    assert {k: people[k] for k in ("source", "start", "data")} == {
        k: then["population"][k] for k in ("source", "start", "data")
    }
    assert tuned["samples"] + tuned["held_out"] == 400 - people["samples"]
    assert not any(told[part]["applies"] for part in ("sampling", "calibration", "network"))
    code, out, err = run("verify m.onnx $OUT/t.onnx --data d.npz")
    assert code == 0, err
    assert "re-checked, population" in out


def test_a_file_without_a_true_certificate_gets_none(run: Run, tmp_path: Path, given: Path) -> None:
    model = onnx.load(given / "p.onnx")
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(numpy_helper.to_array(model.graph.initializer[0]) * 2, "w0"))
    small.write(model, tmp_path / "q.onnx")
    code, out, err = run(TUNE.replace("p.onnx", "$OUT/q.onnx", 1) + " --epochs 1")
    assert code == 0, err
    assert "certificate: none (that in the pruned file is of other models, or of other weights)" in out
    assert not onnx.load(tmp_path / "t.onnx").metadata_props or "onnxprune.certificate" not in {
        p.key for p in onnx.load(tmp_path / "t.onnx").metadata_props
    }
    assert not (tmp_path / "t.onnx.certificate.json").exists()
    assert run("verify m.onnx $OUT/t.onnx --data d.npz")[0] == 0


def test_samples_that_may_have_served_to_prune_certify_nothing(run: Run, tmp_path: Path) -> None:
    """All samples calibrated, so that none is left for the certificate; others that are given certify again."""
    assert run("prune m.onnx --data d.npz -o $OUT/a.onnx --macs 0.25 --method pfp --samples 400 --recover none -q")[0] == 0
    tune_it = f"{TUNE.replace('p.onnx', '$OUT/a.onnx', 1)} --epochs 4 --force"
    code, out, err = run(tune_it)
    assert code == 0, err
    assert "may have served to prune the model: give others with --certify DATA" in out
    code, out, err = run(f"{tune_it} --certify other.npz")
    assert code == 0, err
    people = json.loads((tmp_path / "t.onnx.report.json").read_text())["certificate"]["population"]
    assert people["applies"] and (people["source"], people["samples"]) == ("certify", 100)
    assert run("verify m.onnx $OUT/t.onnx --data d.npz --certify other.npz")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("finetune p.onnx --teacher m.onnx --data few.npz -o $OUT/t.onnx", "5 samples are too few"),
        ("finetune p.onnx --teacher m.onnx --data nothing.npz -o $OUT/t.onnx", "nothing.npz"),
        ("finetune p.onnx --teacher stranger.onnx --data d.npz -o p.onnx --force", "is the input model"),
        ("finetune p.onnx --teacher m.onnx --data d.npz -o $OUT/t.onnx --epochs 0", "--epochs must be at least 1"),
        ("finetune p.onnx --teacher m.onnx --data d.npz -o $OUT/t.onnx --resume", "there is no checkpoint"),
        ("finetune odd.onnx --teacher odd.onnx --data d.npz -o $OUT/t.onnx", "cannot be trained through: NonZero"),
        ("finetune p.onnx --data d.npz -o $OUT/t.onnx", "--teacher"),
        ("finetune p.onnx --teacher d.npz --data d.npz -o $OUT/t.onnx", "d.npz"),
        ("prune m.onnx --data d.npz -o $OUT/t.onnx --eps 0.5 --finetune 1", "--finetune would change its weights"),
        ("prune m.onnx -o $OUT/t.onnx --macs 0.5 --method l1 --finetune 1", "--finetune needs samples"),
        ("prune odd.onnx --data d.npz -o $OUT/t.onnx --macs 0.5 --finetune 1", "cannot be trained through: NonZero"),
    ],
)
def test_a_bad_input_gets_one_line(run: Run, tmp_path: Path, arguments: str, words: str) -> None:
    code, out, err = run(f"{arguments} -q")
    assert (code, out) == (2, "")
    assert err.startswith("onnxprune: error: ") and err.count("\n") == 1 and words in err
    assert not list(tmp_path.iterdir())


def test_pruning_and_tuning_in_one(run: Run, tmp_path: Path) -> None:
    options = (
        "--macs 0.5 --method l1 --recover none --samples 64 --finetune 3 --optimiser adamw --rate 0.003 --precision float32"
    )
    code, out, err = run(f"prune m.onnx --data d.npz -o $OUT/s.onnx {options}")
    assert code == 0, err
    assert "trained for 3 epochs" in out
    report = json.loads((tmp_path / "s.onnx.report.json").read_text())
    assert report["recover"] == "finetune" and report["finetune"]["after"] > report["finetune"]["before"]
    assert report["certificate"]["population"]["applies"]
    assert run("verify m.onnx $OUT/s.onnx --data d.npz")[0] == 0


# -------------------------------------------------------------------------------------------------- interrupted training


class _Stop(BaseException):
    """What an interruption raises in these tests."""


def test_a_resumed_training_ends_where_an_uninterrupted_one_does(given: Path, tmp_path: Path) -> None:
    kept = tmp_path / "t.checkpoint"
    training = Training(**{**EXACT, "epochs": 4})

    def tuned(stop: int | None = None, resume: bool = False, checkpoint: Path | None = kept) -> bytes:
        def said(epoch: Any) -> None:
            if epoch.number == stop:
                raise _Stop

        result = onnxprune.finetune(
            given / "p.onnx",
            given / "m.onnx",
            given / "d.npz",
            training=training,
            checkpoint=checkpoint,
            resume=resume,
            said=said,
        )
        return bytes(result.model.SerializeToString(deterministic=True))

    whole = tuned(checkpoint=None)
    with pytest.raises(_Stop):
        tuned(stop=3)
    assert kept.exists()
    assert tuned(resume=True) == whole
    other = Training(**{**EXACT, "epochs": 5})
    with pytest.raises(OptionError, match="is of another training"):
        onnxprune.finetune(given / "p.onnx", given / "m.onnx", given / "d.npz", training=other, checkpoint=kept, resume=True)
    kept.write_bytes(b"nonsense")
    with pytest.raises(OptionError, match="is not a checkpoint that can be read"):
        tuned(resume=True)


def test_an_interruption_leaves_a_checkpoint_and_no_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(quiet: bool, total: int | None) -> Any:
        def say(epoch: Any) -> None:
            if epoch.number == 2:
                raise KeyboardInterrupt

        return say

    monkeypatch.setattr("onnxprune.report.terminal.epochs", interrupted)
    code, out, err = run(f"{TUNE} --epochs 3")
    assert (code, out) == (130, "")
    assert "--resume goes on with it" in err and "interrupted" in err
    assert [p.name for p in tmp_path.iterdir()] == ["t.onnx.checkpoint"]
    code, _, err = run(f"{TUNE} --epochs 3 -q")
    assert code == 2 and "is the checkpoint of a training that was interrupted" in err
    assert torch.load(tmp_path / "t.onnx.checkpoint", weights_only=True)["epoch"] == 1


def test_nothing_is_imported_before_it_is_needed() -> None:
    assert "finetune" in onnxprune.__all__ and callable(onnxprune.finetune)
    assert job.STAGES.index("finetune") < job.STAGES.index("validate")
    assert files.load  # the module, which training shares, is the real one


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (9, 40), (32, 32)])
def test_pictures_of_every_size_can_be_shifted(size: tuple[int, int]) -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (5, *size, 3), np.uint8)
    varied = _varied(pictures, (1, 2), np.random.default_rng(1), mirrored=True)
    assert varied.shape == pictures.shape
    assert all(
        set(map(tuple, v.reshape(-1, 3))) <= set(map(tuple, p.reshape(-1, 3))) for v, p in zip(varied, pictures, strict=True)
    )


@pytest.mark.parametrize("budget", [{"bytes": 0.7}, {"params": 0.6}])
def test_training_is_done_once_and_the_budget_is_kept(
    budget: dict[str, float], given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, whole = [], finetuning.tuned

    def counted(*args: Any) -> Any:
        calls.append(1)
        return whole(*args)

    monkeypatch.setattr(finetuning, "tuned", counted)
    training = Training(**{**EXACT, "epochs": 4})
    options = {"method": "l1", "recover": "none", "samples": 64, "finetune": training}
    result = onnxprune.prune(given / "m.onnx", given / "d.npz", budget=budget, **options)
    assert calls == [1] and result.report["finetune"]["best"] > 0
    (kind, value), *_ = budget.items()
    assert result.report["pruned"][kind] <= value * result.report["original"][kind]
    assert kind != "bytes" or len(result.model.SerializeToString()) == result.report["pruned"]["bytes"]


def test_a_teacher_of_other_shapes_is_refused_in_words(given: Path) -> None:
    teacher = onnx.load(given / "m.onnx")
    teacher.graph.input[0].type.tensor_type.shape.dim[1].dim_value += 1
    with pytest.raises(ModelError, match=r"has inputs x \[.*\], the teacher x \["):
        finetuning._require_same_inputs(onnx.load(given / "p.onnx"), teacher)
    finetuning._require_same_inputs(onnx.load(given / "p.onnx"), onnx.load(given / "m.onnx"))
