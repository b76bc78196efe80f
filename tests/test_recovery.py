"""Recovery: models run piece by piece, which layers can be solved for, and what the solutions are worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from single import build, ints, seeded, w

import onnxprune
from onnxprune import cli, runtime
from onnxprune.errors import ModelError
from onnxprune.groups import Groups
from onnxprune.passes.recover import recover
from onnxprune.passes.surgery import surgery
from onnxprune.plan import Kept, Plan
from onnxprune.recovery import rows, solver
from onnxprune.recovery.replay import Replay, Shelf
from onnxprune.recovery.rows import Rows
from onnxprune.recovery.sites import _Finder, sites
from onnxprune.recovery.targets import Targets

__all__ = ["seeded"]  # every test draws the same weights

Array = np.ndarray[Any, Any]
X = (4, 6, 8, 8)
PAD = {"pads": [1, 1, 1, 1]}


def batches(n: int = 6, shape: Sequence[int] = X, seed: int = 0) -> list[dict[str, Array]]:
    return [{"x": np.random.default_rng([seed, i]).standard_normal(shape).astype(np.float32)} for i in range(n)]


def plan_of(groups: Groups, drop: int) -> Plan:
    """Drops the last channels of every group."""
    return Plan({g.id: Kept(g.size, np.arange(max(1, g.size - drop))) for g in groups.prunable})


def outputs(model: onnx.ModelProto, data: Sequence[dict[str, Array]], name: str | None = None) -> Array:
    model = model if name is None else runtime.with_outputs(model, [name])
    session = runtime.session(model, threads=1)
    return np.concatenate([runtime.run(session, batch)[0] for batch in data])


def error(groups: Groups, model: onnx.ModelProto, data: Sequence[dict[str, Array]]) -> float:
    before, after = outputs(groups.net.source, data), outputs(model, data)
    return float(np.linalg.norm(before - after) / np.linalg.norm(before - before.mean()))


# --------------------------------------------------------------------------------------------------------- replay


def branches() -> Groups:
    nodes = [
        ("Conv", "a wb", "b"), ("Relu", "b", "r"), ("Conv", "r wc", "c"), ("Add", "c a", "s"), ("Relu", "s", "t"),
        ("Identity", "wd", "wi"), ("Conv", "t wi", "y"),
    ]  # fmt: skip
    return build(nodes, {"wb": w(8, 8, 1, 1), "wc": w(8, 8, 1, 1), "wd": w(3, 8, 1, 1)}, x=X)


def test_pieces_make_what_the_whole_makes() -> None:
    model = branches().net.source
    data = batches(3)
    replay = Replay(model, data)
    numbers = {n.output[0]: i for i, n in enumerate(model.graph.node)}
    assert replay.advance({numbers["c"], numbers["y"]})
    assert replay.available == {"a", "r"}  # what is left to run needs these, and the input no longer
    assert not replay.advance({numbers["c"], numbers["y"]})
    np.testing.assert_allclose(replay.batches[1]["a"], outputs(model, data[1:2], "a"), rtol=1e-4, atol=1e-4)
    assert replay.advance({numbers["y"]})
    assert replay.available == {"t"}
    assert replay.advance(())
    np.testing.assert_allclose(np.concatenate([b["y"] for b in replay.batches]), outputs(model, data), rtol=1e-4, atol=1e-3)


def test_weights_set_between_pieces_count() -> None:
    model = branches().net.source
    data = batches(1)
    replay = Replay(model, data)
    number = next(i for i, n in enumerate(model.graph.node) if n.output[0] == "b")
    replay.advance({number})
    proto = next(t for t in model.graph.initializer if t.name == "wb")
    proto.CopyFrom(numpy_helper.from_array(np.zeros((8, 8, 1, 1), np.float32), "wb"))
    replay.advance(())
    np.testing.assert_allclose(replay.batches[0]["y"], outputs(model, data), atol=1e-5)


def test_unsorted_models_and_bodies_replay() -> None:
    groups = branches()
    model = onnx.ModelProto()
    model.CopyFrom(groups.net.source)
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    replay = Replay(model, batches(1))
    replay.advance(())
    np.testing.assert_allclose(replay.batches[0]["y"], outputs(groups.net.source, batches(1)), rtol=1e-4, atol=1e-3)


def test_shelf_goes_to_files_beyond_its_limit_and_forgets() -> None:
    shelf = Shelf(limit=1 << 17)
    small, large = np.arange(1 << 14, dtype=np.float32), np.arange(1 << 16, dtype=np.float32)
    assert shelf.put(small) is small
    mapped = shelf.put(large)
    assert isinstance(mapped, np.memmap)
    np.testing.assert_array_equal(mapped, large)
    path = Path(str(mapped.filename))
    shelf.drop(mapped)
    assert not path.exists()
    shelf.drop(small)
    assert shelf.put(small) is small


# ---------------------------------------------------------------------------------------------------------- sites


def found(groups: Groups, drop: int = 2) -> tuple[dict[str, Any], dict[str, str]]:
    plan = plan_of(groups, drop)
    good, bad = sites(groups, plan, surgery(groups, plan))
    return {s.out: s for s in good}, bad


def test_paths_know_their_sum_and_what_clips_it() -> None:
    nodes = [
        ("Conv", "a wb bb", "b"), ("BatchNormalization", "b gamma beta mean var", "n"), ("Add", "n a", "s"),
        ("Clip", "s low high", "t"), ("Conv", "t wc", "c"), ("Add", "c shift", "d"), ("Relu", "d", "y"),
    ]  # fmt: skip
    weights = {"wb": w(8, 8, 1, 1), "bb": w(8), "gamma": w(8), "beta": w(8), "mean": w(8), "var": w(8) ** 2 + 0.1}
    more = {"low": np.float32(0), "high": np.float32(6), "wc": w(3, 8, 1, 1), "shift": w(3, 1, 1)}
    groups = build(nodes, weights | more, x=X)
    here, left = found(groups)
    assert not left
    b, c, a = here["b"], here["c"], here["a"]
    assert (b.path.sum, b.path.rest, b.path.low, b.path.high) == ("s", "a", 0.0, 6.0)
    gain = (weights["gamma"] / np.sqrt(weights["var"] + 1e-5))[:6]
    np.testing.assert_allclose(b.path.gain, gain, rtol=1e-5)
    np.testing.assert_allclose(b.path.shift, weights["beta"][:6] - weights["mean"][:6] * gain, rtol=1e-4, atol=1e-5)
    assert (b.home.tensor, b.home.factor) == ("bb", 1.0)
    assert (c.path.sum, c.path.rest, c.path.low, c.path.high) == ("d", None, 0.0, np.inf)
    assert c.home.tensor == "shift"
    assert (a.path.sum, a.path.rest, a.home) == ("a", None, None)  # two readers, and no bias anywhere


def test_a_bias_goes_to_the_mean_of_the_normalisation() -> None:
    nodes = [("Conv", "a wb", "b"), ("BatchNormalization", "b gamma beta mean var", "y")]
    groups = build(nodes, {"wb": w(4, 8, 1, 1), "gamma": w(4), "beta": w(4), "mean": w(4), "var": w(4) ** 2 + 0.1}, x=X)
    home = found(groups)[0]["b"].home
    assert (home.tensor, home.factor) == ("mean", -1.0)


@pytest.mark.parametrize(
    ("nodes", "weights", "layer", "why"),
    [
        ([("Conv", "a wb", "b"), ("Conv", "b wb", "y")], {"wb": w(8, 8, 1, 1)}, "b", "shared"),
        ([("Mul", "wb two", "wm"), ("Conv", "a wm", "y")], {"wb": w(3, 8, 1, 1), "two": np.float32(2)}, "y", "computed"),
        (
            [
                ("Reshape", "a s", "r"),
                ("Transpose", "r", "t", {"perm": [1, 0, 2]}),
                ("LSTM", "t wl rl", "y", {"hidden_size": 3}),
            ],
            {"s": ints(4, 8, -1), "wl": w(1, 12, 64), "rl": w(1, 12, 3)},
            "y",
            "not solved for",
        ),
    ],
    ids=["shared", "computed", "recurrent"],
)
def test_what_is_not_solved_for_has_a_reason(nodes: list[Any], weights: dict[str, Array], layer: str, why: str) -> None:
    left = found(build(nodes, weights, x=X))[1]
    assert any(why in reason for name, reason in left.items() if name.startswith(layer))


# ----------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("chunk", [1, 10_000])
def test_rows_read_and_make_what_the_layer_does(biased: bool, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that was not cut, behind a normalisation that turns some signs, a sum and a clip."""
    monkeypatch.setattr(rows, "CHUNK", chunk)
    nodes = [
        ("Conv", "a wb bb" if biased else "a wb", "b", PAD), ("BatchNormalization", "b gamma beta mean var", "n"),
        ("Add", "n a", "s"), ("Clip", "s low high", "t"), ("Conv", "t wc", "y"),
    ]  # fmt: skip
    weights = {"wb": w(8, 8, 3, 3), "bb": w(8), "gamma": w(8), "beta": w(8), "mean": w(8), "var": w(8) ** 2 + 0.1}
    groups = build(nodes, weights | {"low": np.float32(-1), "high": np.float32(1), "wc": w(3, 8, 1, 1)}, x=X)
    site = next(s for s in sites(groups, Plan({}), groups.net.source)[0] if s.out == "b")
    assert {-1.0, 1.0} == set(np.sign(site.path.gain))
    replay = Replay(groups.net.source, batches(3))
    targets = Targets.of(groups.net, [site], replay.batches, 0)
    replay.advance({site.node})
    found = Rows(site, replay, targets.by_node[site.node])
    matrix = site.linear.matrix(site.weight) * found.sign
    total = 0
    for block in found:
        made = (block.x + found.origin[:, None]) @ matrix + found.sign * site.bias
        np.testing.assert_allclose(block.t, made, atol=2e-3)
        assert block.low is not None and block.high is not None and block.low[0].any() and block.high[0].any()
        far = np.where(np.arange(8) % 2, 1e6, -1e6).astype(np.float32)
        aim = block.nearest(np.broadcast_to(far, block.t.shape).copy())
        free = np.where(far > 0, block.high[0], block.low[0])
        np.testing.assert_array_equal(aim == far, free)  # below and above the clip all is as good
        bound = np.where(far > 0, block.low[1], block.high[1])
        kept = ~block.low[0] & ~block.high[0]
        np.testing.assert_array_equal(aim[kept], block.t[kept])
        np.testing.assert_array_equal(aim[~free & ~kept], bound[~free & ~kept])  # on the wrong side the bound is nearest
        total += block.t.shape[1]
    assert total == sum(len(t.picks) for t in targets.by_node[site.node])


# -------------------------------------------------------------------------------------------------------- recover


def redundant(*shape: int) -> Array:
    """Filters of which the last two are mixtures of the others."""
    filters = w(*shape)
    filters[-1] = filters[0] - 2 * filters[1]
    filters[-2] = 0.5 * filters[2] + filters[0]
    return filters


LINEAR_NETS: dict[str, tuple[list[Any], dict[str, Any]]] = {
    "conv": ([("Conv", "a wb", "y", {"pads": [1, 1, 1, 1]})], {"wb": (4, 8, 3, 3)}),
    "strided with bias": ([("Conv", "a wb bb", "y", {"strides": [2, 2]})], {"wb": (4, 8, 3, 3), "bb": (4,)}),
    "transposed": ([("ConvTranspose", "a wb", "y", {"strides": [2, 2]})], {"wb": (8, 4, 2, 2)}),
    "gemm": ([("GlobalAveragePool", "a", "p"), ("Flatten", "p", "f"), ("Gemm", "f wb bb", "y")], {"wb": (8, 4), "bb": (4,)}),
    "matmul": ([("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}), ("MatMul", "t wb", "y")], {"wb": (8, 4)}),
    "two layers": ([("Conv", "a wb", "b"), ("Conv", "b wc", "y")], {"wb": (6, 8, 3, 3), "wc": (3, 6, 1, 1)}),
    "depthwise between": (
        [("AveragePool", "a", "p", {"kernel_shape": [2, 2]}), ("Conv", "p wb", "y", {"pads": [1, 1, 1, 1]})],
        {"wb": (4, 8, 3, 3)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", ["lsq", "linear"])
@pytest.mark.parametrize("name", LINEAR_NETS)
def test_what_was_redundant_is_recovered(name: str, how: Any) -> None:
    nodes, shapes = LINEAR_NETS[name]
    weights = {k: w(*s) for k, s in shapes.items()} | {"wa": redundant(8, 6, 1, 1)}
    if name == "two layers":
        weights["wb"] = redundant(6, 8, 3, 3)
    groups = build(nodes, weights, x=X)
    plan = plan_of(groups, 2)
    cut = surgery(groups, plan)
    result = recover(groups, plan, cut, batches(12), how=how)
    fresh = batches(3, seed=1)
    assert error(groups, cut, fresh) > 0.3
    assert error(groups, result.model, fresh) < 2e-2
    assert [(n.op_type, n.name, list(n.output)) for n in result.model.graph.node] == [
        (n.op_type, n.name, list(n.output)) for n in cut.graph.node
    ]
    assert [t.dims for t in result.model.graph.initializer] == [t.dims for t in cut.graph.initializer]


def residual(clip: bool = True) -> Groups:
    nodes = [
        ("Relu", "a", "r"), ("Conv", "r wb bb", "b", PAD), ("Relu", "b", "s"), ("Conv", "s wc bc", "c"), ("Add", "c r", "d"),
        ("Relu" if clip else "Identity", "d", "t"), ("Conv", "t wd bd", "e"), ("Relu", "e", "u"), ("Conv", "u we be", "y"),
    ]  # fmt: skip
    shapes = {"wb": (10, 8, 3, 3), "bb": (10,), "wc": (8, 10, 1, 1), "bc": (8,), "wd": (10, 8, 1, 1), "bd": (10,)}
    return build(nodes, {k: w(*s) for k, s in (shapes | {"we": (3, 10, 1, 1), "be": (3,)}).items()}, x=X)


def inner(groups: Groups, drop: int = 4) -> Plan:
    return Plan({g.id: Kept(g.size, np.arange(g.size - drop)) for g in groups.prunable if g.size == 10})


@pytest.mark.parametrize("how", ["bias", "rescale", "linear", "lsq"])
def test_every_way_beats_the_cut(how: Any) -> None:
    groups = residual()
    plan = inner(groups)
    cut = surgery(groups, plan)
    fresh = batches(4, seed=1)
    assert error(groups, recover(groups, plan, cut, batches(12), how=how).model, fresh) < 0.97 * error(groups, cut, fresh)


def test_least_squares_is_the_best_way() -> None:
    groups = residual()
    plan = inner(groups)
    cut = surgery(groups, plan)
    fresh = batches(4, seed=1)
    ways: list[Any] = [*solver.WAYS, "linear"]
    errors = {how: error(groups, recover(groups, plan, cut, batches(12), how=how).model, fresh) for how in ways}
    assert min(errors, key=lambda how: errors[how]) == "lsq"


def test_dropped_channels_are_folded_as_combinations_of_kept_ones() -> None:
    """By hand for a 1 x 1 layer: the A that gives dropped activations by kept ones, in the original."""
    groups = residual()
    plan = inner(groups)
    data = batches(40)
    model = recover(groups, plan, surgery(groups, plan), data, how="linear").model
    before, after = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer} for m in (groups.net.source, model))
    x = outputs(groups.net.source, data, "s").transpose(0, 2, 3, 1).reshape(-1, 10).astype(np.float64)
    kept, gone = (part - part.mean(0) for part in (x[:, :6], x[:, 6:]))
    w_all = before["wc"][:, :, 0, 0]
    combination = np.linalg.lstsq(kept, gone, rcond=None)[0]
    wanted = w_all[:, :6] + w_all[:, 6:] @ combination.T
    change = np.linalg.norm(wanted - w_all[:, :6])
    assert np.linalg.norm(after["wc"][:, :, 0, 0] - wanted) < 0.2 * change  # only some of the positions are looked at
    shift = w_all[:, 6:] @ (x[:, 6:].mean(0) - combination.T @ x[:, :6].mean(0))
    np.testing.assert_allclose(after["bc"], before["bc"] + shift, atol=0.2 * np.abs(shift).max())
    assert np.array_equal(after["wb"], before["wb"][:6])  # reads nothing that is gone


def test_only_least_squares_makes_up_for_what_went_wrong_before() -> None:
    """What is folded into the last layer does not depend on cuts elsewhere."""
    groups = residual()
    every, last = inner(groups), Plan({k: v for k, v in inner(groups).groups.items() if k.startswith("e")})
    assert len(every.groups) == 2 and len(last.groups) == 1
    ways: list[Any] = ["linear", "lsq"]
    differences = []
    for how in ways:
        models = [recover(groups, plan, surgery(groups, plan), batches(12), how=how).model for plan in (every, last)]
        first, second = ({t.name: numpy_helper.to_array(t) for t in m.graph.initializer}["we"] for m in models)
        differences.append(np.abs(first - second).max())
    assert differences[0] < 1e-5 and differences[1] > 1e-2


def test_bias_makes_the_means_equal() -> None:
    groups = residual()
    plan = inner(groups)
    data = batches(8)
    model = recover(groups, plan, surgery(groups, plan), data, how="bias").model
    before, after = outputs(groups.net.source, data), outputs(model, data)
    np.testing.assert_allclose(after.mean((0, 2, 3)), before.mean((0, 2, 3)), atol=1e-3 * np.abs(before).max())


def test_bn_makes_the_variances_equal() -> None:
    groups = residual()
    plan = inner(groups)
    data = batches(8)
    model = recover(groups, plan, surgery(groups, plan), data, how="bn").model
    before, after = outputs(groups.net.source, data), outputs(model, data)
    np.testing.assert_allclose(after.var((0, 2, 3)), before.var((0, 2, 3)), rtol=1e-3)


def test_a_branch_makes_up_for_the_stream_that_it_is_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the first block has made the stream wrong, the second one restores part of it."""
    nodes = [
        ("Conv", "a wb", "b", PAD), ("Relu", "b", "s"), ("Conv", "s wc", "c"), ("Add", "c a", "d"),
        ("Conv", "d we be", "e", PAD), ("Add", "e d", "y"),
    ]  # fmt: skip
    groups = build(nodes, {"wb": w(10, 8, 3, 3), "wc": w(8, 10, 1, 1), "we": w(8, 8, 3, 3), "be": w(8)}, x=X)
    plan = inner(groups)
    cut = surgery(groups, plan)
    data, fresh = batches(12), batches(4, seed=1)
    assert next(s for s in sites(groups, plan, cut)[0] if s.out == "e").path.rest == "d"
    made_up = error(groups, recover(groups, plan, cut, data).model, fresh)
    monkeypatch.setattr(_Finder, "_alike", lambda *_: False)
    assert made_up < error(groups, recover(groups, plan, cut, data).model, fresh)


def test_what_a_clip_hides_is_left_open(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = residual()
    plan = inner(groups, 6)
    cut = surgery(groups, plan)
    data = batches(12)

    def clipped() -> float:
        model = recover(groups, plan, cut, data).model
        before, after = outputs(groups.net.source, data, "t"), outputs(model, data, "t")
        return float(((before - after) ** 2).sum())

    swept = clipped()
    monkeypatch.setattr(solver, "SWEEPS", 0)
    assert swept < 0.995 * clipped()


def test_recovery_is_deterministic_and_leaves_its_arguments_alone() -> None:
    groups = residual()
    plan = inner(groups)
    cut = surgery(groups, plan)
    before = cut.SerializeToString()
    first, second = (recover(groups, plan, cut, batches()).model.SerializeToString() for _ in range(2))
    assert first == second
    assert cut.SerializeToString() == before != first


def test_rows_that_do_not_fit_in_memory_are_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    groups = residual()
    plan = inner(groups)
    cut = surgery(groups, plan)
    held = recover(groups, plan, cut, batches()).model.SerializeToString()
    monkeypatch.setattr(rows, "HELD", 1 << 16)
    assert recover(groups, plan, cut, batches()).model.SerializeToString() == held


def test_half_precision_weights_stay_half() -> None:
    groups = build(
        [("Cast", "a", "h", {"to": TensorProto.FLOAT16}), ("Conv", "h wb", "b"), ("Cast", "b", "y", {"to": TensorProto.FLOAT})],
        {"wb": w(4, 8, 1, 1).astype(np.float16), "wa": redundant(8, 6, 1, 1)},
        x=X,
    )
    plan = plan_of(groups, 2)
    model = recover(groups, plan, surgery(groups, plan), batches(12)).model
    assert next(t for t in model.graph.initializer if t.name == "wb").data_type == TensorProto.FLOAT16
    assert error(groups, model, batches(3, seed=1)) < 2e-2


# ------------------------------------------------------------------------------------------------------ the whole


def small_net() -> onnx.ModelProto:
    rng = np.random.default_rng(5)

    def weight(name: str, *shape: int) -> onnx.TensorProto:
        scale = np.sqrt(2 / np.prod(shape[1:]))
        return numpy_helper.from_array((scale * rng.standard_normal(shape)).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "wa", "ba"], ["a"], "a", pads=[1, 1, 1, 1]), helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "wb", "bb"], ["b"], "b", pads=[1, 1, 1, 1]), helper.make_node("Relu", ["b"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["p"]), helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "wc", "bc"], ["y"], "c", transB=1),
    ]  # fmt: skip
    weights = [weight("wa", 16, 3, 3, 3), weight("ba", 16), weight("wb", 24, 16, 3, 3), weight("bb", 24), weight("wc", 5, 24)]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
        [*weights, weight("bc", 5)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


DATA = {"x": np.random.default_rng(0).standard_normal((400, 3, 12, 12)).astype(np.float32)}


@pytest.fixture(scope="module")
def results() -> dict[str, onnxprune.Result]:
    options: dict[str, dict[str, Any]] = {
        "auto": {}, "obs": {"method": "obs"}, "obs none": {"method": "obs", "recover": "none"},
        "l2": {"method": "l2", "recover": "lsq"}, "l2 none": {"method": "l2", "recover": "none"},
    }  # fmt: skip
    return {k: onnxprune.prune(small_net(), DATA, budget={"macs": 0.5}, samples=96, **o) for k, o in options.items()}


def test_recovery_moves_outputs_less_on_samples_that_it_has_not_seen(results: dict[str, onnxprune.Result]) -> None:
    moved = {k: r.report["validation"]["relative_l2"] for k, r in results.items()}
    assert moved["obs"] < 0.8 * moved["obs none"]
    assert moved["l2"] < 0.8 * moved["l2 none"]
    assert moved["auto"] <= 1.05 * moved["obs"]
    for r in results.values():
        assert r.report["pruned"]["macs"] <= 0.5 * r.report["original"]["macs"]
        assert r.report["validation"]["masked_max_relative_error"] < 1e-4


def test_the_report_says_what_was_gained(results: dict[str, onnxprune.Result]) -> None:
    told = results["obs"].report
    assert told["recover"] == "lsq" and told["recovery"]["kept"] == "lsq" and told["recovery"]["asked"] == "auto"
    errors = told["recovery"]["held_out_relative_l2"]
    assert errors["lsq"] < errors["none"]
    assert told["recovery"]["layers"] == 3 and told["recovery"]["samples"] == 96
    assert any("before recovery" in note for note in told["validation"]["notes"])
    assert results["obs none"].report["recover"] == "none"


def test_recovery_that_does_not_help_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(*_: Any) -> tuple[Array, Array]:
        site = _[0]
        return np.zeros_like(site.weight), site.bias

    monkeypatch.setattr("onnxprune.passes.recover.recovered", harm)
    result = onnxprune.prune(small_net(), DATA, budget={"macs": 0.7}, samples=96, method="l2", recover="lsq")
    assert result.report["recover"] == "none"
    assert result.report["validation"]["masked_max_relative_error"] < 1e-4


def test_without_data_nothing_is_recovered() -> None:
    assert onnxprune.prune(small_net(), budget={"macs": 0.7}, method="l2").report["recover"] == "none"


def test_recovered_pairs_verify(results: dict[str, onnxprune.Result], tmp_path: Any) -> None:
    onnx.save(small_net(), tmp_path / "net.onnx")
    result = onnxprune.prune(tmp_path / "net.onnx", DATA, budget={"macs": 0.5}, samples=96, method="obs")
    result.save(tmp_path / "out.onnx")
    found = onnxprune.verify(tmp_path / "net.onnx", tmp_path / "out.onnx", result.report)
    assert found["validation"]["masked_max_relative_error"] < 1e-4
    assert result.stored == results["obs"].stored


def test_the_terminal_tells_what_recovery_was_worth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnx.save(small_net(), tmp_path / "net.onnx")
    np.savez(tmp_path / "d.npz", **DATA)
    command = f"prune {tmp_path}/net.onnx --data {tmp_path}/d.npz --samples 96 --macs 0.5 --method obs -o {tmp_path}/o.onnx"
    assert cli.main(command.split()) == 0
    out = capsys.readouterr().out
    assert "recovered by lsq, 3 layers from 96 samples" in out and "before recovery" in out
    assert cli.main([*command.split(), "--force", "--recover", "none"]) == 0
    assert "recovered by" not in capsys.readouterr().out


def test_what_cannot_be_run_in_pieces_is_cut_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ModelError("tensor 's' is no array")

    monkeypatch.setattr("onnxprune.finish.recover", refuse)
    told = onnxprune.prune(small_net(), DATA, budget={"macs": 0.7}, samples=96, method="l2").report["recovery"]
    assert told["kept"] == "none" and "is no array" in told["reason"]
    with pytest.raises(ModelError, match="--recover lsq does not work here: tensor 's'"):
        onnxprune.prune(small_net(), DATA, budget={"macs": 0.7}, samples=96, method="l2", recover="lsq")


def test_sequences_between_pieces_are_said_to_be_none_of_ours() -> None:
    """A sequence cannot be handed from one piece to the next."""
    nodes = [
        ("Conv", "a wb", "b"), ("SequenceConstruct", "a b", "s"), ("Conv", "b wc", "c"), ("SequenceInsert", "s c", "t"),
        ("SequenceAt", "t zero", "p"), ("Add", "p c", "y"),
    ]  # fmt: skip
    model = build(nodes, {"wb": w(8, 8, 1, 1), "wc": w(8, 8, 1, 1), "zero": np.int64(0)}, x=X).net.source
    with pytest.raises(ModelError, match="'s' is no array"):
        Replay(model, batches(2)).advance({next(i for i, n in enumerate(model.graph.node) if n.output[0] == "c")})
