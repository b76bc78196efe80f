"""How far errors of layers move the outputs, against networks where it is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from single import build, seeded, w

from onnxprune import influence, runtime
from onnxprune.contraction import consumers
from onnxprune.groups import Groups
from onnxprune.influence import influences, samples_for

__all__ = ["seeded"]  # every test draws the same weights

Array = np.ndarray[Any, Any]
EYE = np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1)
HALF = np.array([0.5], np.float32)
X = (64, 16, 1, 1)


def batches(n: int = 4, shape: tuple[int, ...] = X, seed: int = 0) -> list[dict[str, Array]]:
    return [{"x": np.random.default_rng([seed, i]).standard_normal(shape).astype(np.float32)} for i in range(n)]


def measured(groups: Groups, data: list[dict[str, Array]] | None = None) -> dict[str, float]:
    found = influences(groups.net, consumers(groups), data or batches())
    return {layer.out.tensor: value for layer, value in found.items()}


def branch(share: float) -> Groups:
    """y = (a + share * b) E with a and b of the same size."""
    nodes = [
        ("Conv", "a wh", "h"), ("Conv", "h wb", "b"), ("Mul", "b share", "s"), ("Add", "a s", "t"), ("Conv", "t e", "y"),
    ]  # fmt: skip
    first = np.linalg.qr(np.random.default_rng(1).standard_normal((16, 16)))[0].astype(np.float32).reshape(EYE.shape)
    weights = {"wa": EYE, "wh": first, "wb": EYE[::-1].copy(), "e": EYE, "share": np.array([share], np.float32)}
    return build(nodes, weights, x=X)


def test_the_last_layer_hands_on_all_of_its_error() -> None:
    assert measured(branch(0.5))["y"] == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0, 3.0])
def test_a_branch_counts_as_much_as_its_share_of_the_sum(share: float) -> None:
    found = measured(branch(share))
    expected = share / np.sqrt(1 + share**2)
    assert found["b"] == pytest.approx(expected, rel=0.1)
    assert found["h"] == pytest.approx(expected, rel=0.1)


def test_errors_have_the_pattern_of_the_activations() -> None:
    """The mean over positions leaves white noise a quarter of its size; an error that is alike everywhere stays whole."""
    nodes = [("Conv", "a wb", "b"), ("GlobalAveragePool", "b", "p"), ("Conv", "p e", "y")]
    groups = build(nodes, {"wa": EYE, "wb": EYE[::-1].copy(), "e": EYE}, x=(64, 16, 4, 4))
    alike = [{"x": np.tile(b["x"], (1, 1, 4, 4))} for b in batches()]
    assert measured(groups, alike)["b"] == pytest.approx(1.0, rel=0.05)


def test_layers_that_nothing_reads_later_and_bodies_get_the_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = branch(0.5)
    layers = consumers(groups)
    error = influence._error

    def silent_for_b(value: Array, axis: int, rng: np.random.Generator) -> Array | None:
        found = error(value, axis, rng)
        return None if np.array_equal(value, b) else found

    data = batches(1)
    b = runtime.run(runtime.session(runtime.with_outputs(groups.net.source, ["b"]), threads=1), data[0])[0]
    monkeypatch.setattr(influence, "_error", silent_for_b)
    found = {layer.out.tensor: v for layer, v in influences(groups.net, layers, data).items()}
    assert found["b"] == pytest.approx(np.median([v for k, v in found.items() if k != "b"]))


def test_layers_that_make_integers_get_the_usual() -> None:
    """Their outputs have no room for small errors; the layers around them are measured all the same."""
    nodes = [
        ("Conv", "a wb", "b"), ("QuantizeLinear", "b s z", "q"), ("QLinearConv", "q s z v s z s z", "p"),
        ("DequantizeLinear", "p s z", "r"), ("Conv", "r e", "t"), ("Mul", "t half", "y"),
    ]  # fmt: skip
    scale, zero = np.array(0.05, np.float32), np.array(128, np.uint8)
    integers = np.random.default_rng(0).integers(100, 156, (16, 16, 1, 1)).astype(np.uint8)
    weights = {"wa": EYE, "wb": w(16, 16, 1, 1), "e": EYE, "s": scale, "z": zero, "v": integers, "half": HALF}
    found = measured(build(nodes, weights, x=X, opset=13))  # has no addition of uint8
    assert found["t"] == pytest.approx(1.0, rel=0.02)
    assert 0.1 < found["b"] < 10
    assert found["p"] == pytest.approx(np.median([found["b"], found["t"]]))


def test_an_answer_that_is_no_number_tells_nothing() -> None:
    nodes = [("Conv", "a wb", "b"), ("Conv", "b wc", "c"), ("ArgMax", "c", "y", {"axis": 1})]
    groups = build(nodes, {"wb": w(8, 8, 1, 1), "wc": w(8, 8, 1, 1)}, x=X)
    assert set(measured(groups).values()) == {1.0}


def test_it_is_deterministic() -> None:
    groups = branch(0.5)
    assert measured(groups) == measured(groups)


def test_samples_are_few_where_layers_are_many() -> None:
    assert samples_for(19, 512) == 107
    assert samples_for(1000, 512) == influence.FEWEST
    assert samples_for(2, 10_000) == influence.MOST
    assert samples_for(50, 4) == 4


CHOICE = [
    ("Conv", "a wb", "b"), ("Relu", "b", "r"), ("Conv", "r wc", "c"), ("Split", "c parts", "f g", {"axis": 1}),
    ("Constant", "", "two", {"value_float": 2.0}), ("Mul", "f two", "h"), ("Conv", "h wd", "d"), ("Add", "d g", "s"),
    ("Conv", "s we", "y"), ("GlobalAveragePool", "r", "q"), ("Conv", "q we", "z"),
]  # fmt: skip
CHOICE_WEIGHTS = {"wb": w(16, 8, 1, 1), "wc": w(16, 16, 1, 1), "wd": w(8, 8, 1, 1), "we": w(4, 8, 1, 1)}


@pytest.mark.parametrize("ir", [3, 8])
def test_what_an_error_cannot_reach_is_not_run_again_and_not_missed(monkeypatch: pytest.MonkeyPatch, ir: int) -> None:
    weights = CHOICE_WEIGHTS | {"we": w(4, 8, 1, 1), "wz": w(4, 16, 1, 1), "parts": np.array([8, 8])}
    nodes = [n if n[2] != "z" else ("Conv", "q wz", "z") for n in CHOICE]
    groups = build(nodes, weights, outputs="y z b", x=(8, 16, 3, 3), ir=ir)
    data = batches(2, (8, 16, 3, 3))
    counts: list[int] = []
    take = influence._Tail._take

    def counted(tail: influence._Tail, *args: Any) -> None:
        take(tail, *args)
        counts.append(len(tail._nodes))

    monkeypatch.setattr(influence._Tail, "_take", counted)
    monkeypatch.setattr(influence, "SHARING", 1)
    tails = measured(groups, data)
    first = list(counts)
    assert len(first) > 1 and first[-1] == 1 < first[0]
    monkeypatch.setattr(influence, "_reached", lambda graph, *_: set(range(len(graph.node))))
    whole = measured(groups, data)
    assert set(counts[len(first) :]) == {len(groups.net.source.graph.node)}
    assert tails == pytest.approx(whole, rel=1e-4)


def test_sequences_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not handed to the part that an error reaches: all of the model is run."""
    monkeypatch.setattr(influence, "SHARING", 1)
    nodes = [
        ("Conv", "a wb", "b"), ("SequenceConstruct", "a b", "s"), ("Conv", "b wc", "c"), ("SequenceInsert", "s c", "t"),
        ("SequenceAt", "t two", "p"), ("Conv", "p we", "y"),
    ]  # fmt: skip
    groups = build(nodes, {"wb": w(8, 8, 1, 1), "wc": w(8, 8, 1, 1), "we": EYE[:8, :8], "two": np.int64(2)}, x=X)
    found = {layer.out.tensor: v for layer, v in influences(groups.net, groups.layers, batches()).items()}
    assert found["y"] == pytest.approx(1.0, rel=0.02) and found["b"] > 0
