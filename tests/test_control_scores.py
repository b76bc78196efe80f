"""Scores and costs of layers in the bodies of If and Loop; sizes of inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nets
import numpy as np
import onnx
from axes import prunable, why
from bodied import (
    CELL,
    CELL_WEIGHTS,
    FIRST,
    HIDDEN,
    LAST,
    NO,
    WA,
    YES,
    Array,
    Node,
    analysed,
    body,
    either,
    holds,
    layers,
    looped,
    model,
    scanned,
    w,
)
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import runtime
from onnxprune.channels import Dim
from onnxprune.criteria import Sensitivity
from onnxprune.criteria.plain import Activation
from onnxprune.groups import Accounting
from onnxprune.passes.calibrate import calibrate

# ------------------------------------------------------------------------------------------------ scores and costs


def test_scores_in_branches_are_those_of_the_samples_that_take_them() -> None:
    """The branch is chosen by the sample; the scores are those of each branch as a model of its own."""
    nodes = [("ReduceMean", "x", "m", {"keepdims": 0}), ("Greater", "m zero", "cond")]
    weights = {"zero": np.float32(0), "wt": w(10, 8, 3, 3), "wu": w(6, 10, 3, 3), "we": w(6, 8, 5, 5), "wl": w(4, 6, 1, 1)} | WA
    inner = [("Conv", "a wt", "t1"), ("Relu", "t1", "t2"), ("Conv", "t2 wu", "o1")]
    branches = either(body(inner, "o1"), body([("Conv", "a we", "o2")], "o2"))
    net = model([FIRST, *nodes, ("If", "cond", "b", branches), LAST], weights)
    alone = model([FIRST, *inner, ("Conv", "o1 wl", "y")], {k: v for k, v in weights.items() if k not in ("zero", "we")})
    x = np.concatenate([w(5, 3, 6, 6) + 1, w(4, 3, 6, 6, seed=1) - 1])
    g = analysed(net)
    for criterion in (Sensitivity(), Activation()):
        found = {(s.layer, s.group): s for s in calibrate(g, criterion, nets.samples(net, x)).layers}
        want = {s.layer: s for s in calibrate(nets.grouped(alone), criterion, nets.samples(alone, x[:5])).layers}
        scale = 5 / 9 if criterion.combine == "mean" else 1  # a mean over all samples: nothing for those that go elsewhere
        np.testing.assert_allclose(found["o1", "t1"].values, scale * want["o1"].values, rtol=1e-5)
        assert found["o1", "t1"].events == want["o1"].events


def test_a_branch_that_no_sample_takes_gives_no_right_to_cut() -> None:
    net = layers()
    g = analysed(net, cond=YES)
    x = w(4, 3, 6, 6)
    found = {(s.layer, s.group): s.values for s in calibrate(g, Sensitivity(), with_condition(net, x, NO)).layers}
    assert found["o1", "t1"].tolist() == [1] * 10 and found["t1", "a"].max() <= 1
    assert found["o2", "a"].max() < 1


def with_condition(net: onnx.ModelProto, x: Array, value: Array) -> Any:
    """Samples of x; the scalar condition is the same for all."""
    shape = runtime.input_shape(runtime.graph_inputs(net)[0])

    class Fed:
        def __init__(self) -> None:
            self.samples = nets.samples(nets.model([("Relu", "x", "r")], {"x": [d or 2 for d in shape]}, "r"), x)

        def __len__(self) -> int:
            return len(self.samples)

        def digest(self, indices: Array) -> str:
            return self.samples.digest(indices)

        def batch(self, indices: Array) -> dict[str, Array]:
            return {**self.samples.batch(indices), "cond": value}

    return Fed()


def unrolled(trips: int) -> onnx.ModelProto:
    nodes: list[Node] = [("MatMul", "x wx", "u"), ("Mul", "u zero", "h0")]
    for t in range(trips):
        nodes += [("MatMul", f"h{t} wh", f"m{t}"), ("Add", f"m{t} u", f"s{t}"), ("Tanh", f"s{t}", f"h{t + 1}")]
    return model([*nodes, ("MatMul", f"h{trips} wo", "y")], CELL_WEIGHTS | {"zero": np.float32(0)}, {"x": ("N", 5)})


def test_scores_in_a_loop_are_those_of_the_unrolled_network() -> None:
    net, flat = looped(), unrolled(3)
    net.graph.initializer.append(numpy_helper.from_array(np.array(3), "n"))
    del net.graph.input[1:]
    x = w(7, 5)
    for criterion in (Sensitivity(), Activation()):
        g, want = analysed(net), analysed(flat)
        found = calibrate(g, criterion, nets.samples(net, x))
        expected = calibrate(want, criterion, nets.samples(flat, x))
        inside = next(s for s in found.layers if s.layer == "hh")
        rounds = [s.values for s in expected.layers if s.layer.startswith("m")]
        values = np.max(rounds, axis=0) if criterion.combine == "max" else np.mean(rounds, axis=0)
        np.testing.assert_allclose(inside.values, values, rtol=1e-5, atol=1e-7)
        assert g.outputs(next(x for x in g.layers if x.name == "hh")) == 3 * 2 * HIDDEN


def quantised_cell(h: str, t: str, following: str) -> list[Node]:
    """h <- tanh(h wq + u) with integers, whose steps come from the range of h."""
    return [
        ("DynamicQuantizeLinear", h, f"q{t} s{t} z{t}"),
        ("MatMulInteger", f"q{t} wq z{t}", f"j{t}"),
        ("Cast", f"j{t}", f"f{t}", {"to": TensorProto.FLOAT}),
        ("Mul", f"s{t} ws", f"k{t}"),
        ("Mul", f"f{t} k{t}", f"hh{t}"),
        ("Add", f"hh{t} u", f"a{t}"),
        ("Tanh", f"a{t}", following),
    ]


def test_integers_in_a_loop_are_read_by_the_steps_of_their_iteration() -> None:
    levels = np.random.default_rng(3).integers(-60, 60, (HIDDEN, HIDDEN)).astype(np.int8)
    net = looped([*quantised_cell("h", "", "h2"), CELL[-1]], wq=levels, ws=np.float32(0.01))
    net.graph.initializer.append(numpy_helper.from_array(np.array(3), "n"))
    del net.graph.input[1:]
    weights = {k: CELL_WEIGHTS[k] for k in ("wx", "wo")} | {"wq": levels, "ws": np.float32(0.01), "zero": np.float32(0)}
    cells = [n for t in range(3) for n in quantised_cell(f"h{t}", str(t), f"h{t + 1}")]
    flat = model([("MatMul", "x wx", "u"), ("Mul", "u zero", "h0"), *cells, ("MatMul", "h3 wo", "y")], weights, {"x": ("N", 5)})
    g, x = analysed(net), w(7, 5)
    (group,) = g.prunable
    assert group.flaw is not None
    assert "from the range of the whole tensor" in group.flaw.reason
    found, want = (calibrate(analysed(m), Activation(), nets.samples(m, x)).layers for m in (net, flat))
    inside = next(s for s in found if s.layer == "j")
    rounds = [s.values for s in want if s.layer.startswith("j")]
    assert len(rounds) == 3
    np.testing.assert_allclose(inside.values, np.mean(rounds, axis=0), rtol=1e-5, atol=1e-7)


def test_the_range_of_what_a_loop_makes_cannot_be_silenced() -> None:
    """Nothing sets the state to 0 where the mask would have to: the steps of the cut and of the mask would be others."""
    last = [("Relu", "hf", "r"), ("DynamicQuantizeLinear", "r", "q step z"), ("MatMulInteger", "q wq z", "p")]
    last += [("Cast", "p", "f", {"to": 1}), ("Mul", "f step", "y")]
    net = looped(last=last, wq=np.ones((HIDDEN, 4), np.int8))
    assert why(analysed(net, n=2), "hf").endswith("takes its steps from the range of what control flow makes")


def test_a_sum_that_the_next_iteration_rounds_is_told() -> None:
    steps: dict[str, Array] = {"step": np.float32(0.01), "none": np.int8(0)}
    rounding: list[Node] = [("QuantizeLinear", "h step none", "q"), ("DequantizeLinear", "q step none", "d")]
    net = looped([*rounding, ("MatMul", "d wi", "m"), ("Relu", "m", "r"), ("MatMul", "r wj", "hh"), *CELL[1:]],
                 wi=w(HIDDEN, 12), wj=w(12, HIDDEN), **steps)  # fmt: skip
    g = analysed(net)
    ((group, _),) = g.at[Dim("r", 1)]
    assert group.flaw is not None
    assert group.flaw.reason == "QuantizeLinear 'q' rounds to 8 bits what MatMul 'hh' sums in floating point"


PRODUCT = "MatMul {h} wk {k}|Transpose {k} {k}t|MatMul q {k}t {p}|MatMul {p} {h} {next}"


def product(h: str, k: str, p: str, following: str) -> list[Node]:
    """An activation outside, q, times one that is made of h: h <- q (h wk)' h."""
    lines = PRODUCT.format(h=h, k=k, p=p, next=following).split("|")
    return [(op, " ".join(names[:-1]), names[-1]) for op, *names in (line.split() for line in lines)]


def test_products_of_activations_in_bodies_score_like_those_outside() -> None:
    weights = {"wx": w(5, HIDDEN), "wq": w(5, 6), "wk": w(HIDDEN, 6), "wo": w(HIDDEN, 4)}
    first: list[Node] = [("MatMul", "x wx", "h0"), ("MatMul", "x wq", "q")]
    rounds = [n for t in range(3) for n in product(f"h{t}", f"k{t}", f"p{t}", f"h{t + 1}")]
    flat = model([*first, *rounds, ("MatMul", "h3 wo", "y")], weights, {"x": (2, 5)})
    cell = body([*product("h", "k", "p", "h2"), ("Identity", "c", "c2")], "c2 h2", "i c h")
    loop: list[Node] = [*first, ("Loop", "three yes h0", "h3", {"body": cell}), ("MatMul", "h3 wo", "y")]
    net = model(loop, weights | {"three": np.array(3), "yes": YES}, {"x": (2, 5)})
    g = holds(net, {})
    assert prunable(g, "k") == prunable(g, "q") == 6
    x = w(8, 5)
    found, want = (calibrate(analysed(m), Sensitivity(), nets.samples(m, x)).layers for m in (net, flat))
    inside = next(s for s in found if s.layer == "p")
    rounds_of = [s.values for s in want if s.layer in ("p0", "p1", "p2")]
    assert len(rounds_of) == 3
    np.testing.assert_allclose(inside.values, np.max(rounds_of, axis=0), rtol=1e-5)
    branches = either(body(product("h0", "k", "p", "o1"), "o1"), body([("Relu", "h0", "o2")], "o2"))
    chosen = model([*first, ("If", "cond", "h3", branches), ("MatMul", "h3 wo", "y")], weights, {"x": (2, 5)})
    for value in (YES, NO):
        found = calibrate(analysed(chosen, cond=YES), Sensitivity(), with_condition(chosen, x, value)).layers
        scores = next(s for s in found if s.layer == "p").values
        np.testing.assert_allclose(scores, next(s for s in want if s.layer == "p0").values if value else 1, rtol=1e-5)


def test_the_body_of_a_loop_costs_as_often_as_it_runs() -> None:
    net = looped()
    for trips, times in ((5, 5), (0, 1)):
        g = analysed(net, n=trips)
        accounting = Accounting(g, 0)
        macs = dict(zip((x.name for x in g.layers), accounting.layer_macs(accounting.full_widths), strict=True))
        assert macs == {"u": 2 * 5 * HIDDEN, "hh": times * 2 * HIDDEN * HIDDEN, "y": 2 * HIDDEN * 4}
    g = analysed(scanned())
    accounting = Accounting(g, 0)
    macs = dict(zip((x.name for x in g.layers), accounting.layer_macs(accounting.full_widths), strict=True))
    assert macs["hh"] == 4 * 2 * HIDDEN * HIDDEN


def test_constants_that_only_bodies_read_are_parameters_too() -> None:
    """Stored inside a body that is not followed, made there by a node, or captured from outside."""
    half = helper.make_tensor("half", TensorProto.FLOAT, [3], [0.5] * 3)
    cell = [("Constant", "", "k", {"value": half}), ("ReduceSum", "k", "r"), ("Mul", "h r", "m"), ("Add", "m far", "a"),
            ("Add", "a inner", "b"), ("Concat", "b u", "h2", {"axis": 0}), ("Identity", "c", "c2")]  # fmt: skip
    net = looped(cell, start=[("Identity", "u", "h0")], far=w(1, HIDDEN), inner=w(HIDDEN))
    inside = net.graph.node[-2].attribute[0].g.initializer
    inside.extend([t for t in net.graph.initializer if t.name == "inner"])
    inside.append(numpy_helper.from_array(w(50), "unread"))
    del net.graph.initializer[[t.name for t in net.graph.initializer].index("inner")]
    g = analysed(net, n=2)
    assert "is not followed" in why(g, "u")
    accounting = Accounting(g, 0)
    stored = sum(int(np.prod(t.dims)) for t in net.graph.initializer if t.data_type == TensorProto.FLOAT)
    assert accounting.size(accounting.full_widths).params == stored + 3 + HIDDEN


def test_the_main_job_on_a_loop() -> None:
    net = looped()
    net.graph.initializer.append(numpy_helper.from_array(np.array(3), "n"))
    del net.graph.input[1:]
    result = onnxprune.prune(net, {"x": w(64, 5)}, budget={"macs": 0.6})
    assert result.report["pruned"]["macs"] <= 0.6 * result.report["original"]["macs"]
    assert result.report["validation"]["masked_max_relative_error"] <= 1e-6


# ------------------------------------------------------------------------------------------------------------ inputs


def test_axes_of_one_name_have_one_size() -> None:
    """A batch is 1 wherever it stands; in a second run it is another, and as large everywhere."""
    net = model([("Gather", "state zero", "s"), ("Concat", "x s", "y", {"axis": 1})], {"zero": np.array(0)}, STATE)
    first = runtime.probe(net)
    assert {k: v.shape for k, v in first.feeds.items()} == {"x": (1, 16), "state": (2, 1, 16)}
    again = runtime.probe_again(first).again
    assert again is not None
    assert again.shapes == {"x": (2, 32), "state": (2, 2, 32), "zero": (), "s": (2, 32), "y": (2, 64)}
    assert runtime.example_feeds(net, shapes={"state": (2, 3, 7)})["x"].shape == (3, 7)


STATE: dict[str, Sequence[int | str]] = {"x": ("N", "T"), "state": (2, "N", "T")}
