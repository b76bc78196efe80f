"""Timing: rounds in turn on an injected clock, profiles, memory, and what `onnxprune bench` prints and refuses."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small
from rich.console import Console

from onnxprune import cli, runtime
from onnxprune.bench import bench
from onnxprune.errors import OptionError
from onnxprune.report.bench import bench as show
from onnxprune.timing.memory import peak_memory
from onnxprune.timing.models import Setting, batched
from onnxprune.timing.profile import Kernel, kernels, slowed
from onnxprune.timing.rounds import Rounds, Spread, fastest, interleaved, interval
from onnxprune.timing.shortfall import OUTSIDE, by_kind, shortfall


class World:
    """A clock that only calls move on; `pace` says how many times as slow everything is by now."""

    def __init__(self, pace: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now, self.pace, self.calls = 0.0, pace, []  # type: ignore[var-annotated]

    def call(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds * self.pace(self.now)

        return run

    def clock(self) -> float:
        return self.now


def test_rounds_take_turns_and_every_second_one_goes_backwards() -> None:
    world = World()
    found = interleaved([world.call("a", 0.01), world.call("b", 0.02)], least=4, limit=0.1, clock=world.clock)
    assert len(found) == 4
    assert world.calls == [*"aaa", *"bbb", *"abba", *"abba"]  # three warm-up runs each, then the rounds
    assert found.seconds == pytest.approx(np.array([[0.01, 0.02]] * 4))


def test_a_machine_that_gets_slower_changes_seconds_but_no_ratio() -> None:
    world = World(lambda now: 1 + now)
    found = interleaved([world.call("a", 1e-3), world.call("b", 2e-3)], limit=10, precision=1e-9, clock=world.clock)
    assert found.spreads[0].high > 2 * found.spreads[0].low
    assert found.ratio(1).median == pytest.approx(2, rel=1e-2)


def test_rounds_stop_once_the_ratio_is_known_or_time_is_up() -> None:
    calm = World()
    found = interleaved([calm.call("a", 1e-3), calm.call("b", 2e-3)], limit=1e9, clock=calm.clock)
    assert len(found) == 15
    rng = np.random.default_rng(0)
    wild = World(lambda now: float(rng.uniform(1, 10)))
    found = interleaved([wild.call("a", 1e-2), wild.call("b", 2e-2)], limit=20, clock=wild.clock)
    assert found.precision() > 0.005
    assert wild.now == pytest.approx(20, abs=1)


def test_a_model_that_takes_longer_than_ten_limits_ends_before_the_least_number_of_rounds() -> None:
    world = World()
    found = interleaved([world.call("slow", 100.0)], limit=20, clock=world.clock)
    assert 1 <= len(found) < 15
    assert found.spreads[0].median == pytest.approx(100)


def test_short_calls_are_repeated_within_a_sample() -> None:
    world = World()
    found = interleaved([world.call("a", 1e-5)], least=2, limit=1e-3, clock=world.clock)
    assert found.spreads[0].median == pytest.approx(1e-5)
    assert len(world.calls) == 3 + 100 * 2


def test_the_median_lies_in_its_interval_as_often_as_it_says() -> None:
    rng = np.random.default_rng(3)
    hits = [low <= 0 <= high for low, high in (interval(rng.standard_cauchy(25)) for _ in range(2000))]
    assert 0.94 < np.mean(hits) < 0.99


def test_quartiles_and_ratios() -> None:
    rounds = Rounds(np.array([[1.0, 2.0], [2.0, 2.0], [4.0, 2.0]]))
    assert rounds.spreads == [Spread(2.0, 1.5, 3.0), Spread(2.0, 2.0, 2.0)]
    assert rounds.ratio(1) == Spread(1.0, 0.75, 1.5)
    assert rounds.ratio(0) == Spread(1.0, 1.0, 1.0)


def test_the_fastest_run_is_found_among_interruptions() -> None:
    rng = np.random.default_rng(0)
    world = World(lambda now: float(rng.choice([1.0, 3.0, 8.0])))
    assert fastest(world.call("a", 1e-3), clock=world.clock) == pytest.approx(1e-3)


def test_the_fastest_run_stops_at_its_limit() -> None:
    world = World(lambda now: 1 + now)  # never twice the same
    fastest(world.call("a", 0.01), limit=0.3, agree=1e-6, clock=world.clock)
    assert world.now == pytest.approx(0.3, abs=0.05)


def event(node: str, op: str, dur: int, index: int, *shapes: list[int]) -> dict[str, Any]:
    args = {"op_name": op, "node_index": str(index), "provider": "P", "input_type_shape": [{"float": s} for s in shapes]}
    return {"cat": "Node", "name": f"{node}_kernel_time", "dur": dur, "args": args}


def test_kernels_of_a_profile() -> None:
    image, weight = [1, 32, 7, 7], [32, 1, 3, 3]
    events = [
        {"cat": "Session", "name": "model_run", "dur": 99, "args": {}},
        *(event("c_nchwc", "Conv", d, 0, image, weight) for d in (900, 3, 5, 4)),
        *(event("c2", "Conv", d, 1, image, [8, 32, 1, 1]) for d in (900, 1, 1, 1)),
        *(event("r", "Relu", 2, 2, image) for _ in range(4)),
    ]
    found = kernels(events, skip=1)
    assert [(k.node, k.kind) for k in found] == [
        ("c_nchwc", "Conv 3x3 depthwise blocked"),
        ("c2", "Conv 1x1"),
        ("r", "Relu"),
    ]
    assert found[0].median == pytest.approx(4e-6)
    assert by_kind([*found, found[0]]) == pytest.approx({"Conv 3x3 depthwise blocked": 8e-6, "Relu": 2e-6, "Conv 1x1": 1e-6})


def test_a_profile_of_a_machine_that_became_faster_is_brought_to_the_latency() -> None:
    kernel = Kernel("c", "Conv", "P", (2.0, 4.0, 3.0))
    for taken, latency, want in ((5.0, 10.0, 6.0), (5.0, 4.0, 3.0), (5.0, None, 3.0)):
        (found,) = slowed([kernel], taken, latency)
        assert found.median == pytest.approx(want)


def test_what_did_not_shrink_with_the_macs_is_named_with_its_reason() -> None:
    def kernel(node: str, op: str, seconds: float, weight: tuple[int, ...] = (8, 8, 3, 3)) -> Kernel:
        shapes = ((1, 8, 4, 4), weight) if op == "Conv" else ()
        return Kernel(node, op, "P", (seconds,), shapes)

    first = [kernel("a_nchwc", "Conv", 10.0), kernel("b_nchwc", "Conv", 4.0, (8, 1, 5, 5)), kernel("p", "MaxPool", 2.0)]
    other = [kernel("a", "Conv", 9.0), kernel("b_nchwc", "Conv", 2.0, (8, 1, 5, 5)), kernel("p", "MaxPool", 2.0)]
    changes = {c.kind: c for c in shortfall(first, other, 0.5, (17.0, 14.0))}
    assert sum(c.excess for c in changes.values()) == pytest.approx(14 - 0.5 * 17)
    assert changes["Conv 3x3"].excess == 9.0
    assert "multiples of 4" in changes["Conv 3x3"].why
    assert changes["Conv 3x3 blocked"].excess == -5.0
    assert changes["Conv 5x5 depthwise blocked"].why == ""  # it took half of the time with half of the MACs
    assert "moves data" in changes["MaxPool"].why
    assert changes[OUTSIDE].excess == pytest.approx(0.5)


def test_batch_fills_what_the_model_leaves_open_and_nothing_else() -> None:
    open_one, fixed = small.chain(), small.chain(batch=2)
    x = np.zeros((1, 3, 8, 8), np.float32)
    assert batched(open_one, {"x": x}, 5)["x"].shape == (5, 3, 8, 8)
    assert batched(open_one, {"x": x}, None)["x"].shape == (1, 3, 8, 8)
    with pytest.raises(OptionError, match="fixed first axis of 2"):
        batched(fixed, {"x": np.zeros((2, 3, 8, 8), np.float32)}, 5)


def test_a_provider_that_does_not_start_is_not_timed_as_another(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ONNX Runtime falls back to the CPU, and prints so on standard output."""

    class Fallen:
        def __init__(self, *_: Any, **__: Any) -> None:
            print("EP Error")

        def get_providers(self) -> list[str]:
            return ["CPUExecutionProvider"]

    monkeypatch.setattr(runtime.ort, "InferenceSession", Fallen)
    with pytest.raises(OptionError, match="'CUDAExecutionProvider' does not start here"):
        Setting(1, ("CUDAExecutionProvider", "CPUExecutionProvider")).session(small.chain())
    assert capsys.readouterr().out == ""


def test_peak_memory_counts_the_weights(tmp_path: Path) -> None:
    """A weight of 64 MB takes that much; a model of a few kilobytes takes far less."""
    wide = np.ones((4096, 4096), np.float32)
    node = onnx.helper.make_node("MatMul", ["x", "w"], ["y"])
    value = onnx.helper.make_tensor_value_info
    ends = [value("x", 1, ["N", 4096])], [value("y", 1, ["N", 4096])]
    graph = onnx.helper.make_graph([node], "g", *ends, [onnx.numpy_helper.from_array(wide, "w")])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), tmp_path / "w.onnx"
    )
    small.write(small.chain(), tmp_path / "s.onnx")
    setting = Setting.of(1)
    large = peak_memory(tmp_path / "w.onnx", {"x": np.ones((1, 4096), np.float32)}, setting)
    little = peak_memory(tmp_path / "s.onnx", {"x": small.images(1)}, setting)
    if large is None or little is None:
        pytest.skip("this system does not tell how much memory a process takes")
    assert large > wide.nbytes
    assert little < wide.nbytes / 2
    assert peak_memory(tmp_path / "absent.onnx", {}, setting) is None


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    here = tmp_path_factory.mktemp("bench")
    small.write(small.chain(), here / "big.onnx")
    assert (
        cli.main(["prune", str(here / "big.onnx"), "--method", "l1", "--macs", "0.5", "-o", str(here / "half.onnx"), "-q"]) == 0
    )
    return str(here / "big.onnx"), str(here / "half.onnx")


def test_bench_tells_everything_side_by_side(pair: tuple[str, str]) -> None:
    report = bench(pair, batch=3, threads=1, profile=True, limit=0.05)
    first, other = report["models"]
    assert (report["batch"], report["threads"], report["providers"]) == (3, 1, ["CPUExecutionProvider"])
    assert first["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert other["speedup"] == pytest.approx(1 / other["ratio"]["median"])
    assert other["throughput"] == pytest.approx(3 / other["latency"]["median"])
    assert other["macs_ratio"] == pytest.approx(other["macs"] / first["macs"])
    assert other["macs"] == small.count_macs(onnx.load(pair[1]))
    assert (first["params"], first["bytes"]) == (small.count_params(onnx.load(pair[0])), Path(pair[0]).stat().st_size)
    for told in report["profile"]:
        assert sum(k["seconds"] for k in told["kinds"]) > 0
    assert "shortfall" in report["profile"][1]
    json.dumps(report)


@pytest.mark.parametrize("width", [60, 80, 200])
def test_bench_fits_the_terminal(pair: tuple[str, str], width: int) -> None:
    report = bench(pair, threads=1, profile=True, limit=0.05)
    out = io.StringIO()
    show(Console(file=out, width=width), report, verbose=True)
    text = out.getvalue()
    assert max(len(line) for line in text.splitlines()) <= width
    assert "…" not in text
    for word in ("big.onnx", "half.onnx", "latency", "samples/s", "memory", "MACs", "parameters", "time by operator"):
        assert word in text


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("absent.onnx", "no such model file"),
        ("MODEL --providers quantum", "'quantum' is not available"),
        ("MODEL --batch 0", "--batch must be at least 1"),
        ("MODEL --threads 0", "--threads must be at least 1"),
        ("MODEL --seconds 0", "--seconds must be positive"),
        ("MODEL --data absent.npz", "absent.npz"),
        ("FIXED --batch 3", "fixed first axis of 2"),
        ("BROKEN", "ONNX Runtime"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, words: str
) -> None:
    small.write(small.chain(batch=2), tmp_path / "fixed.onnx")
    broken = small.chain()
    broken.graph.node[0].op_type = "NoSuchOperator"
    (tmp_path / "broken.onnx").write_bytes(broken.SerializeToString())
    files = {"MODEL": pair[0], "FIXED": str(tmp_path / "fixed.onnx"), "BROKEN": str(tmp_path / "broken.onnx")}
    assert cli.main(["bench", *(files.get(word, word) for word in more.split())]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = [line for line in told.err.splitlines() if not line.startswith("reading models")]
    assert len(lines) == 1
    assert words in lines[0]


def test_bench_prints_json_and_reads_data(pair: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "x.npy", small.images(4))
    line = ["bench", *pair, "--data", str(tmp_path / "x.npy"), "--batch", "2", "--seconds", "0.05", "--json", "-q"]
    assert cli.main(line) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["inputs"], report["batch"], len(report["models"])) == ("data", 2, 2)
