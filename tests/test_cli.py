"""The command line: one line for every bad input, exit codes, --config, and what the commands print."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

import onnxprune
from onnxprune import api, cli, files, job, runtime
from onnxprune.plan import Plan

Run = Callable[..., tuple[int, str, str]]
PROGRAM = [sys.executable, "-m", "onnxprune.cli"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(onnxprune.__file__).parents[1])}


def prune(
    more: str = "", *, model: str = "m.onnx", data: str = "--data d.npz", out: str = "new.onnx", budget: str = "--macs 0.5"
) -> str:
    return f"prune {model} {data} -o {out} {budget} {more}"


def tiny(op: str, kind: int, weight: np.ndarray | None) -> onnx.ModelProto:
    """A model of one node, y = op(x, weight), which need not make sense."""
    reads = ["x"] if weight is None else ["x", "w"]
    out = TensorProto.INT32 if kind == TensorProto.INT8 else kind
    value = helper.make_tensor_value_info
    weights = [] if weight is None else [numpy_helper.from_array(weight, "w")]
    nodes = [helper.make_node(op, reads, ["y"], "only")]
    made = helper.make_graph(nodes, "tiny", [value("x", kind, ["N", 4])], [value("y", out, None)], weights)
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that a command may be given, good and bad; no test may change it."""
    here = tmp_path_factory.mktemp("given")
    model, x = small.chain(), small.images(16)
    small.write(model, here / "m.onnx")
    small.write(small.residual(), here / "other.onnx")
    bad_models(here, model)
    bad_data(here, x)
    for name, made in {
        "c": onnxprune.calibrate(model, x),
        "activation": onnxprune.calibrate(model, x, method="activation"),
        "other": onnxprune.calibrate(small.residual(), x),
    }.items():
        made.save(here / f"{name}.calib")
    (here / "cut.calib").write_bytes((here / "c.calib").read_bytes()[:700])
    result = onnxprune.prune(model, budget={"macs": 0.5}, method="l1")
    bad_plans(here, result.plan)
    for name in ("p", "changed", "told"):
        result.save(here / f"{name}.onnx")
    changed = onnx.load(here / "changed.onnx")
    weight = changed.graph.initializer[0]
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + 1, weight.name))
    small.write(changed, here / "changed.onnx")
    report = json.loads((here / "told.onnx.report.json").read_text())
    group = next(g for g in report["groups"] if g["removed"])
    group["kept"][0], group["removed"][0] = group["removed"][0], group["kept"][0]
    group["kept"].sort()
    (here / "told.onnx.report.json").write_text(json.dumps(report))
    for name, text in {"broken": "a = = 3", "unknown": "colour = 'red'", "kind": "align = 'four'"}.items():
        (here / f"{name}.toml").write_text(text)
    return here


def bad_models(here: Path, model: onnx.ModelProto) -> None:
    blob = model.SerializeToString()
    (here / "text.onnx").write_text("this is not a model\nnor is this\n")
    (here / "nothing.onnx").write_bytes(b"")
    (here / "cut.onnx").write_bytes(blob[: len(blob) // 2])
    (here / "graph.onnx").write_bytes(model.graph.SerializeToString())
    (here / "tensor.onnx").write_bytes(model.graph.initializer[0].SerializeToString())
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(here / "image.onnx", format="png")
    small.write(tiny("MatMulInteger", TensorProto.INT8, np.ones((4, 5), np.int8)), here / "integer.onnx")
    small.write(tiny("Relu", TensorProto.FLOAT, None), here / "weightless.onnx")
    small.write(tiny("Nonsense", TensorProto.FLOAT, None), here / "refused.onnx")
    copy = onnx.ModelProto.FromString(blob)
    onnx.save(copy, str(here / "outside.onnx"), save_as_external_data=True, location="outside.bin", size_threshold=64)
    copy = onnx.ModelProto.FromString(blob)
    onnx.save(copy, str(here / "lost.onnx"), save_as_external_data=True, location="lost.bin", size_threshold=64)
    (here / "lost.bin").unlink()


def bad_data(here: Path, x: np.ndarray) -> None:
    holes = x.copy()
    holes[7, 0, 0, 0] = np.nan
    np.savez(here / "d.npz", x=x, y=np.arange(16) % 10)
    np.savez(here / "shape.npz", x=x.transpose(0, 2, 3, 1))
    np.savez(here / "kind.npz", x=x.astype(np.complex64))
    np.savez(here / "name.npz", z=x)
    np.savez(here / "holes.npz", x=holes)
    (here / "empty").mkdir()
    (here / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 3), dtype=np.uint8)
    for i in range(3):
        Image.fromarray(pixels[i]).save(here / "pictures" / f"{i}.png")
    (here / "pictures" / "3.png").write_bytes((here / "pictures" / "0.png").read_bytes()[:60])


def bad_plans(here: Path, plan: Plan) -> None:
    whole: dict[str, Any] = json.loads(plan.to_json())
    first = next(iter(whole["groups"]))

    def write(name: str, groups: dict[str, Any]) -> None:
        (here / f"{name}.json").write_text(json.dumps({**whole, "groups": {**whole["groups"], **groups}}))

    write("plan", {})
    write("frozen", {"Gemm_11": {"size": 10, "kept": [0, 1]}})
    write("hollow", {first: {**whole["groups"][first], "kept": []}})
    (here / "text.json").write_text("keep the good ones")


def snapshot(folder: Path) -> dict[str, str]:
    files = {str(p.relative_to(folder)): p for p in folder.rglob("*")}
    return {name: hashlib.sha256(p.read_bytes()).hexdigest() if p.is_file() else "folder" for name, p in files.items()}


def shell(arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The real program, in a process of its own."""
    command = [*PROGRAM, *shlex.split(arguments)]
    env = {**ENVIRONMENT, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def run(given: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """run("inspect m.onnx") -> (exit code, stdout, stderr), in this process."""
    monkeypatch.chdir(given)

    def call(arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(shlex.split(arguments))
        return code, *capsys.readouterr()

    return call


def check_refusal(result: tuple[int, str, str], words: tuple[str, ...], code: int = 2) -> None:
    found, out, err = result
    assert (found, out) == (code, ""), err
    err = re.sub(r"^compiling once: .*\n", "", err, flags=re.M)  # which a busy machine may take longer than a second for
    assert err.startswith("onnxprune: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    assert "Traceback" not in err
    for word in words:
        assert word in err, f"{word!r} is not in {err!r}"


# ------------------------------------------------------------------------- bad inputs, each in a process of its own

# What is typed, and what the one line must say: the thing, and how to mend it.
BAD = {
    "model missing": (prune(model="no.onnx"), ("no.onnx", "no such", "give the path")),
    "model is a folder": (prune(model="empty"), ("empty is a folder", "give the path")),
    "model is text": (prune(model="text.onnx"), ("text.onnx", "not a readable ONNX model", "another format")),
    "model is a picture": ("inspect image.onnx", ("image.onnx", "not a readable ONNX model", "another format")),
    "model is empty": ("inspect nothing.onnx", ("nothing.onnx", "not an ONNX model", "no graph")),
    "model is cut short": (prune(model="cut.onnx"), ("cut.onnx", "not a readable ONNX model", "truncated")),
    "model is a GraphProto": ("inspect graph.onnx", ("graph.onnx", "not an ONNX model", "no graph")),
    "model without weights": (prune(model="weightless.onnx"), ("no weights to prune", "constants of the file")),
    "model of one layer": (prune(model="integer.onnx"), ("nothing", "can be pruned", "graph input 'x'", "inspect")),
    "model that the runtime refuses": (prune(model="refused.onnx"), ("refused.onnx", "ONNX Runtime", "Nonsense", "must run")),
    "model without its weights file": (prune(model="lost.onnx"), ("lost.onnx", "lost.bin", "beside it")),
    "data missing": (prune(data="--data no.npz"), ("'no.npz'", "check the path")),
    "data of a wrong shape": (prune(data="--data shape.npz"), ("shape.npz", "(16, 8, 8, 3)", "(N, 3, 8, 8)", "transpose")),
    "data of a wrong type": (prune(data="--data kind.npz"), ("kind.npz", "complex64", "convert it to float32")),
    "data of a wrong name": (prune(data="--data name.npz"), ("name.npz", "'z'", "name the array 'x'")),
    "data with NaN": (prune(data="--data holes.npz"), ("holes.npz", "sample 7", "NaN", "clean or rescale")),
    "data folder is empty": (prune(data="--data empty"), ("empty", "no images", "ending in")),
    "data with a broken image": (prune(data="--data pictures"), ("pictures", "'3.png'", "replace it")),
    "budget out of reach": (prune(budget="--macs 0.0001"), ("--macs 0.0001", "keeps 0.010 of the MACs", "ask for 0.011")),
    "budget 0": (prune(budget="--macs 0"), ("--macs", "between 0 and 1, not 0.0", "0.5 keeps half")),
    "budget 1": (prune(budget="--params 1"), ("--params", "between 0 and 1, not 1.0", "0.5 keeps half")),
    "budget 1.5": (prune(budget="--bytes 1.5"), ("--bytes", "between 0 and 1, not 1.5", "0.5 keeps half")),
    "budget negative": (prune(budget="--macs -1"), ("--macs", "between 0 and 1, not -1.0", "0.5 keeps half")),
    "budget NaN": (prune(budget="--macs nan"), ("--macs", "between 0 and 1, not nan", "0.5 keeps half")),
    "budget in words": (prune(budget="--macs half"), ("--macs", "'half'", "--help")),
    "budget twice": (prune(budget="--macs 0.5 --params 0.5"), ("--params", "--macs", "not allowed", "--help")),
    "budget missing": (prune(budget=""), ("--macs, --params, --bytes, --latency, --eps", "--macs 0.5 keeps half")),
    "output exists": (prune(out="other.onnx"), ("other.onnx exists", "--force")),
    "report exists": (prune("--report plan.json"), ("plan.json exists", "--force")),
    "output is the model": (prune("--force", out="m.onnx"), ("m.onnx is the input model", "choose another")),
    "output folder missing": (prune(out="no/new.onnx"), ("the folder no does not exist", "create it")),
    "output folder is a file": (prune(out="m.onnx/new.onnx"), ("m.onnx is not a folder", "choose another")),
    "method unknown": (prune("--method magic"), ("--method", "'magic'", "'pfp'")),
    "option unknown": (prune("--colour red"), ("--colour", "--help")),
    "command unknown": ("shrink m.onnx", ("'shrink'", "'prune'", "--help")),
    "freeze matches nothing": (prune("--freeze 'none*'"), ("--freeze none*", "matches no", "onnxprune inspect")),
    "align 0": (prune("--align 0"), ("--align", "at least 1, not 0")),
    "finetune 0": (prune("--finetune 0"), ("--finetune", "at least 1, not 0")),
    "samples 0": (prune("--samples 0"), ("--samples", "at least 1, not 0")),
    "config missing": (prune("--config no.toml"), ("no.toml", "No such file", "TOML file")),
    "config broken": (prune("--config broken.toml"), ("broken.toml is not TOML", "line 1", "for example")),
    "config with an unknown key": (prune("--config unknown.toml"), ("unknown.toml", "'colour'", "onnxprune prune --help")),
    "provider unknown": (prune("--providers tpu"), ("'tpu'", "CPUExecutionProvider")),
    "calibration broken": (prune("--calibration cut.calib", data=""), ("cut.calib", "not a calibration", "calibrate`")),
    "calibration of another model": (prune("--calibration other.calib", data=""), ("another model", "calibrate this model")),
    "merge of two models": ("merge c.calib other.calib -o new.calib", ("differ in model digest", "merge shards of one")),
    "plan of another model": ("apply other.onnx plan.json -o new.onnx", ("another model", "apply it to the file")),
    "plan cuts a frozen group": ("apply m.onnx frozen.json -o new.onnx", ("Gemm_11", "frozen", "graph output 'scores'")),
    "plan keeps nothing": ("apply m.onnx hollow.json -o new.onnx", ("Conv_0", "at least one channel")),
    "plan is not JSON": ("apply m.onnx text.json -o new.onnx", ("not a pruning plan", "JSON")),
}
UNEQUAL = {
    "pruned file changed": ("verify m.onnx changed.onnx", ("another pruned model", "changed since", "--report")),
    "report changed": ("verify m.onnx told.onnx", ("'scores'", "differs from the masked original", "one pruning wrote")),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD.keys())
def test_a_bad_input_gets_one_line_and_leaves_nothing_behind(given: Path, arguments: str, words: tuple[str, ...]) -> None:
    before = snapshot(given)
    done = shell(arguments, given)
    check_refusal((done.returncode, done.stdout, done.stderr), words)
    assert snapshot(given) == before


@pytest.mark.parametrize(("arguments", "words"), UNEQUAL.values(), ids=UNEQUAL.keys())
def test_a_pair_that_does_not_match_fails_the_verification(given: Path, arguments: str, words: tuple[str, ...]) -> None:
    before = snapshot(given)
    done = shell(arguments, given)
    check_refusal((done.returncode, done.stdout, done.stderr), words, code=3)
    assert snapshot(given) == before


# --------------------------------------------------------------------------------------- more of them, in this process

MORE_BAD = {
    "model is a TensorProto": ("inspect tensor.onnx", ("tensor.onnx", "not a readable ONNX model")),
    "model name too long": (f"inspect {'a' * 300}", ("aaa: File name too long",)),
    "no command": ("", ("COMMAND", "--help")),
    "no data": (prune(data=""), ("--method auto needs sample data", "--data")),
    "no data to calibrate": ("calibrate m.onnx -o new.calib", ("needs --data", "give images")),
    "eps 0": (prune(budget="--eps 0"), ("--eps", "positive", "not 0.0")),
    "eps by elimination": (prune("--method obs", budget="--eps 0.5"), ("--eps", "--method obs has none", "--macs")),
    "eps of recovered weights": (prune("--recover lsq", budget="--eps 0.5"), ("--eps", "--recover lsq would replace")),
    "eps without a bound": (prune("--method l1", budget="--eps 0.5"), ("--eps", "--method l1 has none", "--macs")),
    "bytes out of reach": (prune(budget="--bytes 0.01"), ("--bytes 0.01", "of the bytes", "ask for")),
    "params out of reach": (prune("--method l1", budget="--params 1e-4"), ("--params 0.0001", "parameters", "ask for")),
    "min-channels 0": (prune("--min-channels 0"), ("--min-channels", "at least 1")),
    "batch 0": (prune("--batch 0"), ("--batch", "at least 1")),
    "delta 0": (prune("--delta 0"), ("--delta", "between 0 and 1")),
    "seed negative": (prune("--seed -1"), ("--seed", "negative")),
    "samples in words": (prune("--samples many"), ("--samples", "'many'", "--help")),
    "recovery unknown": (prune("--recover magic"), ("--recover", "'magic'")),
    "model as output, no --force": (prune(out="m.onnx"), ("m.onnx is the input model", "choose another")),
    "report over the model": (prune("--force --report m.onnx"), ("m.onnx is the input model", "choose another")),
    "plan over the data": (prune("--force --save-plan d.npz"), ("d.npz is an input", "choose another")),
    "output over the weights": (prune("--force", model="outside.onnx", out="outside.bin"), ("outside.bin is an input",)),
    "report over the output": (prune("--report new.onnx"), ("two outputs", "new.onnx", "a name of its own")),
    "calibration over the model": ("calibrate m.onnx --data d.npz --force -o m.onnx", ("m.onnx is the input model",)),
    "applied over the plan": ("apply m.onnx plan.json --force -o plan.json", ("plan.json is an input",)),
    "output is a folder": (prune(out="empty"), ("empty is a folder", "name a file")),
    "output is a device": (prune("--force", out=os.devnull), ("not a regular file", "name a file")),
    "report folder missing": (prune("--report no/new.json"), ("the folder no does not exist", "create it")),
    "config is a folder": (prune("--config empty"), ("cannot read empty",)),
    "config is a picture": (prune("--config image.onnx"), ("image.onnx is not TOML",)),
    "config with a wrong value": (prune("--config kind.toml"), ("--align", "'four'")),
    "config without a name": (prune("--config"), ("--config", "expected one argument")),
    "calibration missing": (prune("--calibration no.calib", data=""), ("no.calib",)),
    "calibration is a model": (prune("--calibration m.onnx", data=""), ("m.onnx is not a calibration",)),
    "calibration is data": (prune("--calibration d.npz", data=""), ("d.npz is not a calibration",)),
    "calibration of another method": (prune("--calibration activation.calib", data=""), ("'activation'", "give activation")),
    "method of another calibration": (prune("--calibration c.calib --method l1", data=""), ("--method l1", "give auto or pfp")),
    "merge of two methods": ("merge c.calib activation.calib -o new.calib", ("differ in criterion", "shards")),
    "merge of nothing": ("merge -o new.calib", ("CALIB", "--help")),
    "plan missing": ("apply m.onnx no.json -o new.onnx", ("no.json", "No such file", "--save-plan")),
    "plan is a picture": ("apply m.onnx image.onnx -o new.onnx", ("image.onnx", "--save-plan")),
    "verify without a file": ("verify m.onnx no.onnx", ("no.onnx", "no such")),
    "verify without a report": ("verify m.onnx p.onnx --report no.json", ("no.json", "No such file", "onnxprune prune")),
    "verify with another's report": ("verify m.onnx p.onnx --report d.npz", ("d.npz is not a report", "onnxprune prune")),
    "demo unknown": ("demo nonsense", ("no demo model 'nonsense'", "there are")),
}


@pytest.mark.parametrize(("arguments", "words"), MORE_BAD.values(), ids=MORE_BAD.keys())
def test_more_bad_inputs(given: Path, run: Run, arguments: str, words: tuple[str, ...]) -> None:
    before = snapshot(given)
    check_refusal(run(arguments), words)
    assert snapshot(given) == before


def test_calibration_whose_scores_do_not_fit_is_refused(given: Path, run: Run, tmp_path: Path) -> None:
    with np.load(given / "c.calib") as archive:
        arrays = dict(archive)
    for number, change in enumerate((lambda s: s[:-1], lambda s: s * np.nan, lambda s: s - 2)):
        path = tmp_path / f"{number}.npz"
        np.savez(path, **{**arrays, "scores_0": change(arrays["scores_0"])})
        check_refusal(run(prune(f"--calibration {path}", data="")), ("'Conv_0'", "do not fit", "calibrate this model"))


@pytest.mark.parametrize(
    ("damage", "code", "words"),
    [
        ({"groups": 3}, 2, "not as onnxprune writes them"),
        ({"digests": 3}, 3, "another original model"),
        ({"certificate": {"groups": {"a": {}}}}, 3, "certificate is not as onnxprune writes them"),
    ],
)
def test_report_that_is_not_whole_is_refused(
    given: Path, run: Run, tmp_path: Path, damage: dict[str, Any], code: int, words: str
) -> None:
    report = json.loads((given / "p.onnx.report.json").read_text())
    (tmp_path / "r.json").write_text(json.dumps({**report, **damage}))
    check_refusal(run(f"verify m.onnx p.onnx --report {tmp_path / 'r.json'}"), ("report", words), code)


def test_the_budget_that_an_error_names_can_be_reached(run: Run, tmp_path: Path) -> None:
    for kind in ("macs", "params", "bytes"):
        _, _, err = run(prune("--method l1", data="", budget=f"--{kind} 0.001"))
        least = re.search(r"ask for ([0-9.]+)", err)
        assert least, err
        out = f"-o {tmp_path / kind}.onnx"
        assert run(f"prune m.onnx {out} --method l1 --{kind} {float(least[1]) - 0.002}")[0] == 2
        assert run(f"prune m.onnx {out} --method l1 --{kind} {least[1]}")[0] == 0


# ---------------------------------------------------------------------------------------------- exit codes, accidents


def raising(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_a_bug_is_one_line_and_a_traceback_only_on_demand(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "prune", raising(RuntimeError("two\nlines")))
    line = "onnxprune: internal error: RuntimeError: two lines (a bug; --debug shows where)\n"
    assert run(prune()) == (1, "", line)
    code, _, err = run(prune("--debug"))
    assert code == 1 and err.startswith("Traceback") and err.endswith(line)


def test_control_c_is_no_bug(given: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(given)
    monkeypatch.setattr(job, "validate", raising(KeyboardInterrupt()))
    code, out, err = run(prune("-q"))
    assert (code, out, err) == (130, "", "onnxprune: interrupted; nothing was written\n")
    assert snapshot(given) == before


def test_a_full_disk_is_no_bug(given: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(given)
    monkeypatch.setattr(Path, "write_bytes", raising(OSError(errno.ENOSPC, "No space left on device")))
    check_refusal(run(prune("-q --method l1", data="")), ("cannot write new.onnx", "No space left", "space"))
    assert snapshot(given) == before


def test_an_operating_system_error_anywhere_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "load", raising(OSError(errno.EIO, "Input/output error", "m.onnx")))
    check_refusal(run("inspect m.onnx"), ("m.onnx: Input/output error",))


def test_a_reader_that_goes_away_is_no_error(given: Path) -> None:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([*PROGRAM, "inspect", "m.onnx", "-v"], cwd=given, env=ENVIRONMENT, **pipes) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 0


def test_names_that_the_terminal_cannot_show_do_not_stop_the_work(given: Path, tmp_path: Path) -> None:
    name = "[b]модель[x].onnx"
    (tmp_path / name).write_bytes((given / "m.onnx").read_bytes())
    done = shell(f"prune '{name}' -o '[i]{name}' --macs 0.5 --method l1", tmp_path, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert "[b]\\u043c" in done.stdout and "written: [i][b]" in done.stdout  # brackets are no markup
    assert onnx.load(tmp_path / f"[i]{name}").graph.node


# ------------------------------------------------------------------------------------------------- --config, help, text


def kept(path: Path) -> list[int]:
    """The widths of a pruned chain."""
    weights = {t.name: t.dims for t in onnx.load(path).graph.initializer}
    return [weights[name][0] for name in ("w0", "w3", "w6")]


@pytest.fixture
def config(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "c.toml").write_text(text)
        return f"--config {tmp_path / 'c.toml'}"

    return write


def test_config_sets_every_option_by_its_long_name(run: Run, tmp_path: Path, config: Callable[[str], str]) -> None:
    out = tmp_path / "configured.onnx"
    text = f"""
        out = "{out}"
        macs = 0.4
        method = "l2"
        align = 4
        freeze = ["Conv_0"]
        quiet = true
        force = false
        size = [8, 8]
        mean = [0.5, 0.5, 0.5]
    """
    assert run(f"prune m.onnx {config(text)}") == (0, "", "")
    report = json.loads(Path(f"{out}.report.json").read_text())
    assert report["method"] == "l2" and report["budget"] == {"kind": "macs", "value": 0.4}
    assert kept(out)[0] == 16 and all(n % 4 == 0 for n in kept(out)[1:])


def test_the_command_line_wins_over_the_config(run: Run, tmp_path: Path, config: Callable[[str], str]) -> None:
    text = 'macs = 0.4\nmethod = "l2"\nalign = 4'
    assert run(f"prune m.onnx -q -o {tmp_path / 'a.onnx'} {config(text)} --method l1 --params 0.7")[0] == 0
    report = json.loads((tmp_path / "a.onnx.report.json").read_text())
    assert report["method"] == "l1" and report["budget"] == {"kind": "params", "value": 0.7}
    assert all(n % 4 == 0 for n in kept(tmp_path / "a.onnx"))
    assert run(f"prune m.onnx -q -o {tmp_path / 'b.onnx'} {config(text)} --align=1")[0] == 0
    assert any(n % 4 for n in kept(tmp_path / "b.onnx"))


def test_config_works_with_every_command(run: Run, config: Callable[[str], str]) -> None:
    code, out, _ = run(f"inspect m.onnx {config('json = true')}")
    assert code == 0 and json.loads(out)["model"] == "m.onnx"
    check_refusal(run(f"inspect m.onnx {config('macs = 0.5')}"), ("'macs'", "not an option of `onnxprune inspect`"))
    check_refusal(run(f"inspect m.onnx {config('help = true')}"), ("'help'", "not an option"))


@pytest.mark.parametrize(
    "command", ["", "prune", "inspect", "calibrate", "merge", "apply", "verify", "demo", "sweep", "report"]
)
def test_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"usage: onnxprune {command}".strip() in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"onnxprune {onnxprune.__version__}\n"


def test_inspect_prints_sizes_groups_and_reasons(run: Run) -> None:
    code, out, err = run("inspect m.onnx")
    assert (code, err) == (0, "")
    assert "m.onnx: 194 k MACs, 11.5 k parameters; 3 of 5 groups can be pruned" in out
    assert re.search(r"Gemm_11 .*frozen: it is graph output 'scores'", out)
    assert re.search(r"Conv_3 .*can be pruned", out)


def test_inspect_json_counts_as_shape_inference_does(run: Run) -> None:
    code, out, err = run("inspect other.onnx --json --freeze 'Conv_3'")
    found, model = json.loads(out), small.residual()
    assert (code, err) == (0, "")
    assert (found["macs"], found["params"]) == (small.count_macs(model), small.count_params(model))
    assert found["bytes"] == len(model.SerializeToString())
    frozen = {g["id"]: g["reason"] for g in found["groups"] if g["frozen"]}
    assert frozen.pop("Conv_3") == "--freeze Conv_3" and all(frozen.values())
    assert 0 < found["prunable"]["macs"] <= 1 and 0 < found["prunable"]["params"] <= 1


def test_verify_says_what_it_checked(run: Run, given: Path, tmp_path: Path) -> None:
    code, out, err = run("verify m.onnx p.onnx --data d.npz")
    assert code == 0 and "equals the masked original" in out and "on 16 samples" in out and "comparing outputs: 16/16" in err
    (tmp_path / "alone.onnx").write_bytes((given / "p.onnx").read_bytes())
    code, out, _ = run(f"verify m.onnx {tmp_path / 'alone.onnx'}")
    assert code == 0 and "masked equivalence was not checked" in out and "equals the masked" not in out
    code, out, err = run("verify m.onnx p.onnx --json")
    found = json.loads(out)
    assert (code, err) == (0, "") and (found["original"], found["pruned"]) == ("m.onnx", "p.onnx")
    assert found["validation"]["checker"] is True and found["validation"]["masked_max_relative_error"] <= 1e-4


def test_providers_may_be_spaced(run: Run, tmp_path: Path) -> None:
    assert run(prune("-q --providers 'cpu, cpu' --samples 4", out=str(tmp_path / "a.onnx"))) == (0, "", "")


@pytest.mark.parametrize(("name", "full"), [("cuda", "CUDA"), ("tensorrt", "Tensorrt"), ("tensorrt,cuda,cpu", "Tensorrt")])
@pytest.mark.parametrize(
    "command",
    ["verify m.onnx p.onnx --data d.npz", "bench m.onnx", "calibrate m.onnx --data d.npz -o new.calib", prune("--samples 4")],
)
def test_a_provider_that_does_not_start_is_an_error(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: str, name: str, full: str
) -> None:
    """ONNX Runtime has the providers built in, but without their libraries it goes on with the CPU and prints so."""
    real = runtime.ort.InferenceSession

    def session(*arguments: Any, providers: list[str], **more: Any) -> Any:
        if providers[0] != "CPUExecutionProvider":
            print("EP Error")
        return real(*arguments, providers=["CPUExecutionProvider"], **more)

    built_in = [f"{kind}ExecutionProvider" for kind in ("Tensorrt", "CUDA", "CPU")]
    monkeypatch.setattr(runtime.ort, "get_available_providers", lambda: built_in)
    monkeypatch.setattr(runtime.ort, "InferenceSession", session)
    code, out, err = run(f"{command} --providers {name}")
    assert (code, out) == (2, "") and f"'{full}ExecutionProvider' does not start here" in err.splitlines()[-1], err


def test_calibrate_and_merge_say_what_they_wrote(run: Run, tmp_path: Path) -> None:
    code, out, err = run(f"calibrate m.onnx --data d.npz --samples 5 -o {tmp_path / 'c'}")
    assert code == 0 and "(pfp, 5 samples)" in out and err.splitlines()[-1].startswith("calibrating: 5/5")
    code, out, err = run(f"merge c.calib {tmp_path / 'c'} -o {tmp_path / 'both'}")
    assert (code, err) == (0, "") and "(pfp, 21 samples of 2 calibrations)" in out.replace("\n", " ")
