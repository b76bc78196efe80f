"""Sizes that a model leaves open: a cut has to be right on all of them, not only on those of the probe run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
from onnx import numpy_helper, parser

from onnxprune import runtime
from onnxprune.channels import Coupling, Dim, Frozen, Tie
from onnxprune.cli import main
from onnxprune.errors import ModelError
from onnxprune.imported import load
from onnxprune.passes.group import group

PICKED = """
<ir_version: 8, opset_import: ["" : 18]>
net (float[1,3,{size}] x) => (float[1,4] y)
<int64[2] flat = {{1, -1}}, int64[3] picked = {{0, 4, 5}},
 int64[1] zero = {{0}}, int64[1] three = {{3}}, int64[1] one = {{1}}>
{{
    a = Conv (x, wa)
    f = Reshape (a, flat)
    {pick}
    y = MatMul (p, wl)
}}
"""
PICKS = {
    "Gather": "p = Gather <axis = 1> (f, picked)",
    "Slice": "p = Slice (f, zero, three, one)",
}


def net(pick: str, size: str) -> onnx.ModelProto:
    model = parser.parse_model(PICKED.format(size=size, pick=PICKS[pick]))
    rng = np.random.default_rng(0)
    for name, shape in (("wa", (6, 3, 1)), ("wl", (3, 4))):
        value = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(value, name))
    return model


@pytest.mark.parametrize("pick", PICKS)
def test_positions_named_by_number_on_an_open_axis_freeze(pick: str) -> None:
    """Which channel position 4 of [channels x positions] belongs to depends on how many positions there are."""
    groups = load(net(pick, "n")).groups
    reasons = {g.reason for g in groups.groups if g.frozen}
    assert any("names positions of an axis with an open size" in str(r) for r in reasons)
    assert not any(s.dim == Dim("wa", 0) for g in groups.prunable for s in g.slots)


@pytest.mark.parametrize("pick", PICKS)
def test_positions_named_by_number_on_a_fixed_axis_are_followed(pick: str) -> None:
    model = net(pick, "2")
    groups = load(model).groups
    assert any(s.dim == Dim("wa", 0) for g in groups.prunable for s in g.slots)
    feeds: dict[str, Any] = {"x": np.random.default_rng(1).standard_normal((1, 3, 2)).astype(np.float32)}
    for seed in range(3):
        oracle.check(model, feeds, oracle.keep(groups, 0.5, np.random.default_rng(seed)), groups)


COMPUTED = """
<ir_version: 8, opset_import: ["" : 18]>
net (float[1,3,n] x) => (float[1,4,m] y) <int64[1] zero = {{0}}, int64[1] one = {{1}}, int64[1] two = {{2}}>
{{
    a = Conv (x, wa)
    s = Shape ({tensor})
    c = Gather <axis = 0> (s, {axis})
    half = Div (c, two)
    p = Slice (a, zero, half, one)
    y = Conv (p, wl)
}}
"""


@pytest.mark.parametrize(("tensor", "axis", "taken"), [("a", "one", 3), ("x", "two", 6)])
def test_bounds_computed_from_a_size_are_followed_where_that_is_steady(tensor: str, axis: str, taken: int) -> None:
    """Half of the channels, and as many channels as half of an open size; in the probe run that is all of them."""
    model = parser.parse_model(COMPUTED.format(tensor=tensor, axis=axis))
    rng = np.random.default_rng(0)
    for name, shape in (("wa", (6, 3, 1)), ("wl", (4, taken, 1))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    groups = load(model).groups
    cut = [g for g in groups.prunable if any(s.dim == Dim("wa", 0) for s in g.slots)]
    if tensor == "x":
        assert not cut
        assert any("computes its bounds at run time" in str(g.reason) for g in groups.groups)
        return
    assert sum(g.size for g in cut) == 6
    for size in (5, 12):
        feeds = {"x": rng.standard_normal((1, 3, size)).astype(np.float32)}
        oracle.check(model, feeds, oracle.keep(groups, 0.5, rng), groups)


FLATTENED = """
<ir_version: 8, opset_import: ["" : 18]>
net (float[1,3,n] x) => (float[1,k,m] y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}>
{
    a = Conv (x, wa)
    c = Conv (x, wc)
    s = Shape (c)
    n0 = Gather <axis = 0> (s, zero)
    n1 = Gather <axis = 0> (s, one)
    n2 = Gather <axis = 0> (s, two)
    flat = Mul (n1, n2)
    t = Concat <axis = 0> (n0, TARGET)
    b = Reshape (a, t)
    d = Conv (c, wd)
    e = Conv (a, we)
    h = Concat <axis = 2> (d, e)
    f = Reshape (b, same)
    g = Conv (f, we)
    y = Concat <axis = 2> (h, g)
}
"""


@pytest.mark.parametrize("product", [True, False])
def test_a_size_computed_from_another_tensor_is_written_over_where_it_is_steady(product: bool) -> None:
    """The channels of `c`, where those of `a` are meant: a number can stand for them, but not for channels times positions."""
    text = FLATTENED.replace("TARGET", "flat" if product else "n1, n2")
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("wa", (6, 3, 1)), ("wc", (6, 3, 1)), ("wd", (4, 6, 1)), ("we", (4, 6, 1))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    model.graph.initializer.append(numpy_helper.from_array(np.array([1, 6, -1] if product else [0, 0, 0]), "same"))
    groups = load(model).groups
    reasons = {g.reason for g in groups.groups if g.frozen}
    if product:
        assert "the size of b[axis 1] is computed in a way that a cut would break" in reasons
        return
    assert {s.dim.tensor for g in groups.prunable for s in g.slots} >= {"a", "c"}
    for size in (5, 12):
        feeds = {"x": rng.standard_normal((1, 3, size)).astype(np.float32)}
        oracle.check(model, feeds, oracle.keep(groups, 0.5, rng), groups)


def test_without_another_run_nothing_is_known_to_be_steady() -> None:
    first = runtime.probe(net("Gather", "n"))
    assert first.again is None and not first.steady("a", 1)
    assert first.certain("a", 1) and not first.certain("a", 2) and not first.certain("f", 1)
    again = runtime.probe_again(first)
    assert again.steady("a", 1) and not again.steady("f", 1)


CROSSED = """
<ir_version: 8, opset_import: ["" : 12]>
net (float[a,2,b,c] x) => (float[c,3] y)
{
    t = Conv (x, wa)
    f = {flatten}
    y = Gemm <transA = 1> (f, wl)
}
"""


def crossed(flatten: str) -> onnx.ModelProto:
    """Sums over a * channels * b rows, as many as the weight has: of 4 channels, only sizes with a * b = 4 run."""
    model = parser.parse_model(CROSSED.replace("{flatten}", flatten))
    rng = np.random.default_rng(0)
    for name, shape in (("wa", (4, 2, 1, 1)), ("wl", (16, 3))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    return model


@pytest.mark.parametrize("sizes", [(1, 4), (2, 2), (4, 1)])
def test_where_no_other_sizes_run_only_certain_sizes_count(sizes: tuple[int, int]) -> None:
    """Which rows of the weight belong to a channel depends on how a * b is shared out, also where each run is like no other."""
    model = crossed("Flatten <axis = 3> (t)")
    net = runtime.probe_again(runtime.probe(model, {"x": np.ones((sizes[0], 2, sizes[1], 5), np.float32)}))
    assert net.again is None
    groups = group(net)
    frozen = {g.reason for g in groups.groups if any(s.dim == Dim("wa", 0) for s in g.slots)}
    assert len(frozen) == 1 and "names positions of an axis with an open size" in str(frozen)


def test_where_no_other_sizes_run_channels_that_no_open_size_touches_are_cut() -> None:
    model = crossed("Flatten <axis = 3> (u)")
    model.graph.node.insert(1, parser.parse_node("u = Conv (t, wu)"))
    rng = np.random.default_rng(0)
    model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((4, 4, 1, 1)).astype(np.float32), "wu"))
    feeds = {"x": rng.standard_normal((2, 2, 2, 5)).astype(np.float32)}
    groups = group(runtime.probe_again(runtime.probe(model, feeds)))
    assert [g.size for g in groups.prunable] == [4]
    plan = oracle.only(groups, {groups.prunable[0].id: [0, 2]})
    oracle.check(model, feeds, plan, groups)
    oracle.check(model, {"x": rng.standard_normal((4, 2, 1, 3)).astype(np.float32)}, plan, groups)


def test_a_model_that_runs_with_its_declared_shapes_alone_is_probed_with_them() -> None:
    """A shape that a caller may override is no constant: without the declaration ONNX Runtime guesses the head size wrong."""
    text = """
    <ir_version: 10, opset_import: ["" : 24]>
    net (float[a,b,8] x, int64[2] shape) => (float[a,b,2] y)
    <int64[2] shape = {8, 4}, float[8,4] e>
    {
        e = Expand (wv, shape)
        v = MatMul (x, e)
        a = Attention <q_num_heads = 1, kv_num_heads = 1> (v, v, v)
        y = MatMul (a, wo)
    }
    """
    model = parser.parse_model(text)
    for name, shape in (("wv", (8, 1)), ("wo", (4, 2))):
        model.graph.initializer.append(numpy_helper.from_array(np.ones(shape, np.float32), name))
    assert runtime.probe(model).shapes["a"] == (1, 16, 4)
    del model.graph.value_info[:]
    with pytest.raises(ModelError, match="Incompatible dimensions"):
        runtime.probe(model)


def test_channels_that_consist_of_other_positions_elsewhere_freeze() -> None:
    """Positions 0 and 1 are one channel here, 1 and 2 there; position 3 is a channel of its own in both."""
    dim, apart = Dim("w", 0), Frozen("apart")
    found = []
    for pair in ((0, 1), (1, 2)):
        coupling = Coupling({dim: 4}, [Tie(dim, dim, np.array([pair[0]]), np.array([pair[1]]))])
        found.append(coupling.solve())
    here, there = found
    assert here.freeze_like(there, [dim], apart)
    assert [here.reasons.get(int(c)) for c in here.of(dim)] == [apart, apart, apart, None]
    assert not here.freeze_like(there, [dim], apart)


def test_a_second_run_takes_no_more_than_a_few_times_the_elements() -> None:
    """Five open axes: other sizes that models often take, in the hundreds, would need gigabytes."""
    text = '<ir_version: 8, opset_import: ["" : 18]> net (float[a,b,c,d,e] x) => (float[a,b,c,d,e] y) { y = Relu (x) }'
    first = runtime.probe(parser.parse_model(text), {"x": np.ones((2, 3, 4, 5, 6), np.float32)})
    again = runtime.probe_again(first).again
    assert again is not None
    assert again.shapes["x"] == (4, 4, 8, 6, 8)
    assert not any(n == m for n, m in zip(first.shapes["x"], again.shapes["x"], strict=True))


@pytest.mark.parametrize(("most", "size"), [(runtime.MOST, 224), (2 * 64 * 64, 64)])
def test_images_are_small_where_pixels_attend_to_pixels(most: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of 2 x 64 x 64 elements on images of 64 x 64 might be one of 2 x 224 x 224, or of 150 times as many elements."""
    monkeypatch.setattr(runtime, "MOST", most)
    text = '<ir_version: 8, opset_import: ["" : 18]> net (float[n,2,h,w] x) => (float[n,2,h,w] y) { y = Relu (x) }'
    assert runtime.probe(parser.parse_model(text)).feeds["x"].shape == (1, 2, size, size)
    monkeypatch.setattr(runtime, "MOST", 2 * 64 * 64)
    assert runtime.probe(parser.parse_model(text), shapes={"x": (1, 2, 96, 96)}).feeds["x"].shape == (1, 2, 96, 96)


def test_declared_sequences_of_cut_tensors_are_dropped() -> None:
    """An entry of value_info may say the shape of a sequence's tensors, which the checker holds against what it infers."""
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    net (float[1,3,4] x) => (float[1,2,4] y)
    <int64 zero = {0}, seq(float[1,6,4]) s>
    {
        a = Conv (x, wa)
        s = SplitToSequence <axis = 2> (a)
        b = ConcatFromSequence <axis = 2> (s)
        y = Conv (b, wl)
    }
    """
    model = parser.parse_model(text)
    rng = np.random.default_rng(0)
    for name, shape in (("wa", (6, 3, 1)), ("wl", (2, 6, 1))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    assert any(v.name == "s" for v in model.graph.value_info)
    groups = load(model).groups
    assert sum(g.size for g in groups.prunable) == 6
    feeds = {"x": rng.standard_normal((1, 3, 4)).astype(np.float32)}
    pruned = oracle.check(model, feeds, oracle.keep(groups, 0.5, rng), groups).pruned
    assert not any(v.name == "s" for v in pruned.graph.value_info)


def test_the_shape_that_the_user_gives_is_the_one_that_the_model_is_run_on() -> None:
    """A Reshape to 5 columns runs on no size that is tried by itself; without --shape the model is refused."""
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    net (float[a,b] x) => (float[5,c] y) <int64[2] flat = {5, 21}> { y = Reshape (x, flat) }
    """
    model = parser.parse_model(text)
    with pytest.raises(ModelError, match="--shape"):
        load(model)
    assert load(model, shape=["x=15,7"]).groups.net.shapes["x"] == (15, 7)
    assert load(model, shape=["7x15"]).groups.net.shapes["x"] == (7, 15)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("z=1,2", "--shape z=1,2 names no input of the model (the inputs are x)"),
        ("x=1,b", "--shape x=1,b is not a list of sizes (for example --shape x=1,4)"),
        ("0,4", "--shape 0,4 is not a list of sizes"),
        ("x=1,5", "--shape x=1,5 does not fit input 'x' (the model declares ?,4)"),
        ("1,4,1", "--shape 1,4,1 does not fit input 'x'"),
    ],
)
def test_a_shape_that_does_not_fit_is_refused_in_one_line(text: str, words: str, tmp_path: Path, capsys: Any) -> None:
    model = '<ir_version: 8, opset_import: ["" : 18]> net (float[a,4] x) => (float[a,4] y) { y = Relu (x) }'
    onnx.save(parser.parse_model(model), tmp_path / "m.onnx")
    assert main(["inspect", str(tmp_path / "m.onnx"), "--shape", text]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert words in said.err
