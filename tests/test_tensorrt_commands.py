"""The commands of the hand-over to TensorRT. None is here: small scripts stand in for trtexec and Polygraphy.

What is tested is the words of the commands and what a shell makes of them, and what is done with the output and exit codes of
programs that behave as the public logs of the real ones do. The table and the checks: `test_tensorrt`.
"""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import small
from onnx import TensorProto, helper
from test_tensorrt import parsed, quantised

from onnxprune import cli, files, runtime
from onnxprune.errors import OptionError, OutputError, ValidationError
from onnxprune.trt import run
from onnxprune.trt.export import export_trt

ROOT = Path(__file__).resolve().parent.parent


# -------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    small.write(small.chain(), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def words(model: Path, kind: str = "build", **options: Any) -> list[str]:
    """The words of the first command of this kind."""
    commands = export_trt(model, **options).report["commands"]
    return next((c["words"] for c in commands if c["kind"] == kind), [])


def test_the_words_of_the_build(model: Path) -> None:
    assert words(model) == [
        "trtexec",
        "--onnx=./m.onnx",
        "--saveEngine=./m.engine",
        "--minShapes=x:1x3x8x8",
        "--optShapes=x:8x3x8x8",
        "--maxShapes=x:32x3x8x8",
        "--shapes=x:8x3x8x8",
        "--noDataTransfers",
        "--useSpinWait",
        "--useCudaGraph",
    ]
    assert words(model, "compare")[:5] == ["polygraphy", "run", "./m.onnx", "--trt", "--onnxrt"]
    assert words(model, "compare", values=(-2, 2.5), atol=0.5)[-6:] == [
        "--val-range",
        "[-2,2.5]",
        "--atol",
        "0.5",
        "--rtol",
        "0.001",
    ]
    assert words(model, "compare")[5:7] == ["--trt-min-shapes", "x:[1,3,8,8]"]


def test_precision_is_flags_in_version_10_and_a_conversion_in_version_11(model: Path) -> None:
    flags = {p: [w for w in words(model, precision=p, tensorrt=10) if w in ("--stronglyTyped", "--fp16", "--int8", "--best")]
             for p in ("model", "fp32", "fp16", "best")}  # fmt: skip
    assert flags == {"model": ["--stronglyTyped"], "fp32": [], "fp16": ["--fp16"], "best": ["--best"]}
    assert words(model, "compare", precision="best", tensorrt=10) == []  # int8 with made-up scales: nothing to compare
    half = words(model, precision="fp16")
    assert "--onnx=./m.fp16.onnx" in half and "--fp16" not in half
    assert words(model, "convert", precision="fp16")[3:7] == ["--onnx_path", "./m.onnx", "--output_path", "./m.fp16.onnx"]
    assert words(model, "compare", precision="fp16")[2] == "./m.fp16.onnx"
    small.write(quantised(), model)
    assert "--int8" in words(model, precision="fp16", tensorrt=10) and "--int8" in words(model, precision="int8", tensorrt=10)
    assert words(model, precision="int8") == words(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int8"}, "needs a quantised model"),
        ({"precision": "best"}, "does not exist in TensorRT 11"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"tensorrt": 8}, "TensorRT 8 is not covered"),
        ({"values": (1, 1)}, "no range"),
        ({"atol": -1}, "--atol must be"),
        ({"rtol": np.nan}, "--rtol must be"),
    ],
)
def test_options_that_make_no_sense(model: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        export_trt(model, **options)


def test_graphs_that_data_decide_on_are_not_recorded(model: Path) -> None:
    small.write(parsed("z = NonZero(x)\n y = Cast<to = 1>(z)"), model)
    assert "--useCudaGraph" not in words(model)


def test_odd_widths_are_told_and_only_those_that_pruning_made(model: Path) -> None:
    def widths(**options: Any) -> list[str]:
        return [w for f in export_trt(model, **options).report["findings"] if "multiple" in f["what"] for w in f["where"]]

    net = small.Net()
    net.conv(net.relu(net.conv(net.relu(net.conv("x", 20)), 24)), 10)
    first, last = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", c, 8, 8]) for n, c in (("x", 3), ("t4", 10)))
    made = helper.make_model(
        helper.make_graph(net.nodes, "g", [first], [last], net.weights), opset_imports=[helper.make_opsetid("", 17)]
    )
    small.write(made, model)
    assert widths() == ["Conv_0 (20)"]  # 24 is a multiple of 8, and 10 is what the model hands out
    files.save(made, "same.onnx")
    assert widths(original="same.onnx") == []


# ------------------------------------------------------------------------------------------- scripts, and running them

FAKE = """#!{python}
# Stands in for {name} in the tests. It is not TensorRT: it writes its words to {log} and prints what it was told to.
import json, pathlib, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([pathlib.Path(sys.argv[0]).name, *sys.argv[1:]]) + "\\n")
for word in sys.argv[1:]:
    if word.startswith("--saveEngine=") and {code} == 0:
        pathlib.Path(word.split("=", 1)[1]).write_bytes(b"engine")
print({text!r})
sys.exit({code} if "--help" not in sys.argv else 0)
"""
TRTEXEC = """&&&& RUNNING TensorRT.trtexec [TensorRT v110400] [b106] # trtexec
[11/23/2026-20:00:00] [I] === Performance summary ===
[11/23/2026-20:00:00] [I] Throughput: 507.399 qps
[11/23/2026-20:00:00] [I] Latency: min = 1.96 ms, max = 2.25 ms, mean = 2.03 ms, median = 2.02 ms, percentile(90%) = 2.1 ms
[11/23/2026-20:00:00] [I] H2D Latency: min = 0 ms, max = 0 ms, mean = 0 ms, median = 0 ms, percentile(90%) = 0 ms
[11/23/2026-20:00:00] [I] GPU Compute Time: min = 1.90 ms, max = 2.2 ms, mean = 1.97 ms, median = 1.96 ms, percentile(90%) = 2
&&&& PASSED TensorRT.trtexec [TensorRT v110400] [b106] # trtexec"""
FAILED = """&&&& RUNNING TensorRT.trtexec [TensorRT v110400] [b106] # trtexec
[11/23/2026-20:00:00] [E] [TRT] ModelImporter.cpp:149: something about a node
[11/23/2026-20:00:00] [E] Failed to parse onnx file
&&&& FAILED TensorRT.trtexec [TensorRT v110400] [b106] # trtexec"""

Fake = Callable[..., Path]


@pytest.fixture
def fake(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """fake("trtexec", text, code): puts such a program into PATH; returns the log of what was called."""
    here = tmp_path_factory.mktemp("bin")
    monkeypatch.setenv("PATH", f"{here}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setattr(run, "PLACES", ())

    def put(name: str, text: str = "", code: int = 0) -> Path:
        program, log = here / name, here / "log"
        program.write_text(FAKE.format(python=sys.executable, name=name, log=str(log), text=text, code=code))
        program.chmod(0o755)
        return log

    return put


def calls(log: Path) -> list[list[str]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.parametrize("name", ["m.onnx", 'it\'s $(odd) `name`; "x" \\ & =é.onnx', "~.onnx", "-m.onnx"])
def test_a_shell_takes_the_script_as_it_was_meant(model: Path, fake: Fake, name: str) -> None:
    """From another folder too, and wherever it was moved to with its files."""
    place = model.parent / "a b"
    place.mkdir()
    model.rename(place / name)
    log = fake("trtexec")
    fake("polygraphy")
    made = export_trt(place / name, folder=place)
    made.save(place / "build me.sh")
    moved = model.parent / "c"
    place.rename(moved)
    subprocess.run([moved / "build me.sh"], cwd="/", check=True, stdout=subprocess.DEVNULL)
    assert calls(log) == [c["words"] for c in made.report["commands"]]
    assert (moved / name).with_suffix(".engine").read_bytes() == b"engine"


def test_the_script_ends_with_the_first_command_that_fails(model: Path, fake: Fake) -> None:
    log = fake("trtexec", FAILED, 1)
    fake("polygraphy")
    export_trt(model).save("go.sh")
    assert subprocess.run(["./go.sh"], check=False, stdout=subprocess.DEVNULL).returncode == 1
    assert [c[0] for c in calls(log)] == ["trtexec"]


def test_scripts_are_executable_and_never_replaced_unasked(model: Path) -> None:
    made = export_trt(model)
    made.save("go.sh")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(Path("go.sh").stat().st_mode) == 0o777 & ~umask
    with pytest.raises(OutputError, match="exists already"):
        made.save("go.sh")
    made.save("go.sh", force=True)
    (model.parent / "elsewhere").mkdir()
    with pytest.raises(OutputError, match=r"made for a script in \."):
        made.save("elsewhere/go.sh")


def test_links_do_not_lead_a_script_astray(model: Path, fake: Fake) -> None:
    log = fake("trtexec")
    fake("polygraphy")
    (model.parent / "deep" / "down").mkdir(parents=True)
    (model.parent / "link").symlink_to(model.parent / "deep" / "down")
    assert cli.main(["export-trt", "m.onnx", "-o", "link/go.sh", "-q"]) == 0
    subprocess.run(["link/go.sh"], check=True, stdout=subprocess.DEVNULL)
    assert calls(log)[0][1] == "--onnx=../../m.onnx"
    assert Path("m.engine").exists()


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v101303] [b9] # trtexec --help", (10, 13, 3)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v110400] [b106]", (11, 4, 0)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v8602] # trtexec", (8, 6, 2)),
        ("&&&& RUNNING TensorRT.trtexec [TensorRT v11.1.0.106] [b48]", (11, 1, 0)),
        ("usage: something else", None),
    ],
)
def test_versions(fake: Fake, text: str, version: Any) -> None:
    fake("trtexec", text)
    assert run.version(run.require()) == version


def test_a_run_builds_compares_and_tells_times(model: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    log = fake("trtexec", TRTEXEC)
    fake("polygraphy", "[I] PASSED")
    files.save(small.chain(seed=1), "before.onnx")
    assert cli.main(["export-trt", "m.onnx", "--original", "before.onnx", "--run", "--json", "-o", "go.sh"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [c[0] for c in calls(log)] == ["trtexec", "trtexec", "trtexec", "polygraphy", "trtexec"]  # twice for the version
    assert report["tensorrt"]["found"] == "11.4.0" and report["tensorrt"]["executed"] is True
    first, second = report["run"]["builds"]
    assert (first["engine"], second["engine"]) == ("./m.engine", "./before.engine")
    assert first["throughput"] == 507.399
    assert first["latency"] == pytest.approx({"min": 1.96e-3, "median": 2.02e-3, "mean": 2.03e-3, "max": 2.25e-3})
    assert first["compute"]["median"] == pytest.approx(1.96e-3)
    assert report["run"]["compared"] == {"by": "polygraphy", "relative_l2": None, "why": None}
    assert Path("m.engine").read_bytes() == Path("before.engine").read_bytes() == b"engine"
    assert sorted(p.name for p in Path().iterdir()) == ["before.engine", "before.onnx", "go.sh", "m.engine", "m.onnx"]
    assert cli.main(["export-trt", "m.onnx", "--run"]) == 2
    assert "m.engine exists already" in capsys.readouterr().err
    assert cli.main(["export-trt", "m.onnx", "--run", "--force"]) == 0
    told = capsys.readouterr().out
    assert "latency 2.02 ms, on the GPU 1.96 ms, 507.399 inferences/s" in told and "within atol 0.001" in told


@pytest.mark.parametrize(
    ("fakes", "code", "words"),
    [
        ({}, 2, "there is no trtexec on this machine"),
        ({"trtexec": (FAILED, 1)}, 3, "ModelImporter.cpp:149: something about a node"),
        ({"trtexec": (FAILED, 0)}, 3, "TensorRT does not build the model"),
        ({"trtexec": ("", 9)}, 3, "trtexec ended with code 9"),
        ({"trtexec": (TRTEXEC, 0), "polygraphy": ("[E] FAILED | y differs", 1)}, 3, "FAILED | y differs"),
        ({"trtexec": (TRTEXEC.replace("v110400", "v8602"), 0)}, 2, "is of TensorRT 8.6.2, not of 10 or 11"),
    ],
)
def test_a_run_that_fails_leaves_nothing(
    model: Path, fake: Fake, capsys: pytest.CaptureFixture[str], fakes: dict[str, Any], code: int, words: str
) -> None:
    for name, (text, status) in fakes.items():
        fake(name, text, status)
    assert cli.main(["export-trt", "m.onnx", "--run", "-o", "go.sh"]) == code
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
    assert [p.name for p in Path().iterdir()] == ["m.onnx"]


def test_the_version_that_is_found_decides_on_the_commands(model: Path, fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    log = fake("trtexec", TRTEXEC.replace("v110400", "v101303"))
    assert cli.main(["export-trt", "m.onnx", "--run", "--precision", "fp16"]) == 0
    assert any("--fp16" in c for c in calls(log))
    capsys.readouterr()
    assert cli.main(["export-trt", "m.onnx", "--run", "--tensorrt", "11", "--force"]) == 2
    assert "is of TensorRT 10.13.3, not of 11" in capsys.readouterr().err


def test_without_polygraphy_the_provider_of_onnx_runtime_compares(
    model: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here without TensorRT's libraries, which is said; and with another CPU session in the provider's place."""
    fake("trtexec", TRTEXEC)
    ran = export_trt(model).run().report["run"]["compared"]
    assert ran["by"] is None and "no polygraphy in PATH" in ran["why"]
    real = runtime.session
    monkeypatch.setattr(runtime, "providers", list)
    monkeypatch.setattr(runtime, "session", lambda made, providers: real(made))
    ran = export_trt(model).run(force=True).report["run"]["compared"]
    assert ran == {"by": "onnxruntime", "relative_l2": 0.0, "why": None}


def test_a_conversion_that_is_not_here_is_an_error(model: Path, fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    fake("trtexec", TRTEXEC)
    monkeypatch.setenv("PYTHONPATH", "")
    with pytest.raises(OptionError, match=r"conversion to fp16 fails.*modelopt"):
        export_trt(model, precision="fp16").run()
    assert [p.name for p in Path().iterdir()] == ["m.onnx"]


# ---------------------------------------------------------------------------------------------------- command line


def test_the_command_prints_what_it_found_and_the_commands(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["export-trt", "m.onnx", "--batch", "1", "2", "4"]) == 0
    out = capsys.readouterr().out
    for part in ("TensorRT takes all of it", "profile of x: 1x3x8x8 to 4x3x8x8, best at 2x3x8x8", "--onnx=./m.onnx", "not run"):
        assert part in out
    assert not list(Path().glob("*.engine"))


def test_what_would_be_refused_is_told_and_nothing_is_written(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write(parsed("a = Det(x)\n b = Det(x)\n c = com.microsoft.Gelu(x)\n y = Add(a, b)"), model)
    assert cli.main(["export-trt", "m.onnx", "-o", "go.sh"]) == 3
    out, err = capsys.readouterr()
    assert "refused: Det is listed as not supported: a, b" in out and "trtexec" not in out
    assert "TensorRT would not take m.onnx: Det is listed as not supported (a), and 1 more finding" in err
    assert not Path("go.sh").exists()
    assert cli.main(["export-trt", "m.onnx", "-o", "go.sh", "--json"]) == 3
    report = json.loads(capsys.readouterr().out)
    assert report["script"] is None and [f["severity"] for f in report["findings"]] == ["refused", "refused"]
    with pytest.raises(ValidationError):
        export_trt(model).save("go.sh")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("absent.onnx", "no such model file"),
        ("m.onnx -o m.onnx --force", "is the input model"),
        ("m.onnx -o there.sh", "exists already"),
        ("m.onnx --original other.onnx", "has other inputs"),
        ("m.onnx --original m.onnx", "both engines would be"),
        ("m.onnx --precision half", "invalid choice"),
        ("m.onnx --batch 1 2", "expected 3 arguments"),
        ("open.onnx", "leaves axis 2 ('h') open"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(model: Path, capsys: pytest.CaptureFixture[str], more: str, words: str) -> None:
    Path("there.sh").touch()
    small.write(parsed("y = Relu(x)", x="float[N, 4] x"), Path("other.onnx"))
    small.write(parsed("y = Relu(x)", x="float[N, 4, h, w] x"), Path("open.onnx"))
    assert cli.main(["export-trt", *more.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and words in err and err.count("\n") == 1
    assert Path("there.sh").read_bytes() == b""


def test_weights_beside_the_model_are_told(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(onnx.load("m.onnx"), "out.onnx", save_as_external_data=True, location="out.bin", size_threshold=64)
    assert cli.main(["export-trt", "out.onnx"]) == 0
    assert "weights are in out.bin: keep them beside the model" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted((ROOT / "models").glob("*.onnx")), ids=lambda p: p.name)
def test_the_models_that_ship_are_taken(path: Path) -> None:
    assert export_trt(path).report["findings"] == []
