"""What ONNX Runtime's own quantiser makes of small networks: pruned like the networks that they were made from."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import oracle
import pytest
import small
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

import onnxprune
from onnxprune import api, runtime
from onnxprune.channels import Dim
from onnxprune.contraction import weight_values
from onnxprune.criteria import Sensitivity
from onnxprune.criteria.plain import PLAIN
from onnxprune.groups import Accounting, Groups
from onnxprune.passes.calibrate import calibrate
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, reweightable, surgery
from onnxprune.plan import Kept, Plan
from onnxprune.report import build
from onnxprune.rules import Layer

Array = np.ndarray[Any, Any]
STEP = 5e-2  # as `validate` has it: float sums that land on another step of an 8-bit activation
LENGTH, FEATURES, UNITS = 5, 6, 8


# ------------------------------------------------------------------------------------------------------ float networks


def mlp() -> onnx.ModelProto:
    """Gemm(3 * 8 * 8 -> 20), MatMul + Add (-> 14), Gemm (-> 5)."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((20, 192)) / 14,
        "b1": rng.standard_normal(20),
        "w2": rng.standard_normal((20, 14)) / 5,
        "b2": rng.standard_normal(14),
        "w3": rng.standard_normal((14, 5)) / 4,
        "b3": rng.standard_normal(5),
    }
    nodes = [
        ("Flatten", "x", "flat"),
        ("Gemm", "flat w1 b1", "g1", {"transB": 1}),
        ("Relu", "g1", "r1"),
        ("MatMul", "r1 w2", "m"),
        ("Add", "m b2", "s"),
        ("Relu", "s", "r2"),
        ("Gemm", "r2 w3 b3", "scores"),
    ]
    return onnx.shape_inference.infer_shapes(nets.model(nodes, {"x": ["N", 3, 8, 8]}, "scores", weights))


def lstm(both: bool = True) -> onnx.ModelProto:
    """Two LSTMs, the first in both directions, and a read-out of all states."""
    rng = np.random.default_rng(0)
    d, h = (2 if both else 1), UNITS
    weights = {"v": rng.standard_normal((h, 3)), "shape": np.array([0, 0, -1])}
    for tag, directions, size in (("1", d, FEATURES), ("2", 1, d * h)):
        weights |= {
            "w" + tag: rng.standard_normal((directions, 4 * h, size)),
            "r" + tag: rng.standard_normal((directions, 4 * h, h)) / 2,
            "b" + tag: rng.standard_normal((directions, 8 * h)),
        }
    nodes = [
        ("LSTM", "x w1 r1 b1", "y1", {"hidden_size": h, "direction": "bidirectional" if both else "forward"}),
        ("Transpose", "y1", "t", {"perm": [0, 2, 1, 3]}),
        ("Reshape", "t shape", "f"),
        ("LSTM", "f w2 r2 b2", "y2", {"hidden_size": h}),
        ("Squeeze", "y2 one", "s"),
        ("MatMul", "s v", "scores"),
    ]
    weights["one"] = np.array([1])
    return onnx.shape_inference.infer_shapes(nets.model(nodes, {"x": [LENGTH, 1, FEATURES]}, "scores", weights))


FLOAT: dict[str, Callable[[], onnx.ModelProto]] = {
    "residual": small.residual,
    "depthwise": small.depthwise,
    "dense": small.dense,
    "mlp": mlp,
    "lstm": lstm,
}


# --------------------------------------------------------------------------------------------------------- quantisation


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    """Eight images, two at a time."""

    def __init__(self) -> None:
        self.batches: Iterator[dict[str, Array]] = iter([{"x": small.images(2, seed)} for seed in range(4)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)


@cache
def folded(net: str) -> onnx.ModelProto:
    """The float network as ONNX Runtime's quantiser prepares it: batch norms in the weights."""
    options = runtime.ort.SessionOptions()
    options.graph_optimization_level = runtime.ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    blob: list[onnx.ModelProto] = []
    with_file(lambda path: runtime.ort.InferenceSession(FLOAT[net]().SerializeToString(), saving(options, path)), blob)
    return blob[0]


def saving(options: Any, path: Path) -> Any:
    options.optimized_model_filepath = str(path)
    return options


def with_file(make: Callable[[Path], Any], into: list[onnx.ModelProto]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "made.onnx"
        make(path)
        into.append(onnx.load(path))


STATIC = {
    "qop": {"quant_format": QuantFormat.QOperator, "weight_type": QuantType.QInt8},
    "qop channel": {"quant_format": QuantFormat.QOperator, "weight_type": QuantType.QInt8, "per_channel": True},
    "qop unsigned": {"quant_format": QuantFormat.QOperator, "weight_type": QuantType.QUInt8},
    "qdq": {"quant_format": QuantFormat.QDQ, "weight_type": QuantType.QInt8},
    "qdq channel": {"quant_format": QuantFormat.QDQ, "weight_type": QuantType.QInt8, "per_channel": True},
    "qdq unsigned": {"quant_format": QuantFormat.QDQ, "weight_type": QuantType.QUInt8},
}
DYNAMIC = {
    "dynamic": {"weight_type": QuantType.QInt8},
    "dynamic channel": {"weight_type": QuantType.QInt8, "per_channel": True},
    "dynamic unsigned": {"weight_type": QuantType.QUInt8},
}


@cache
def quantised(net: str, way: str) -> onnx.ModelProto:
    """The network, quantised in one of the ways."""
    made: list[onnx.ModelProto] = []
    logging.disable(logging.WARNING)
    model = copy.deepcopy(folded(net))
    if way in DYNAMIC:
        with_file(lambda path: quantize_dynamic(model, path, **DYNAMIC[way]), made)
    else:
        options: dict[str, Any] = {"activation_type": QuantType.QUInt8, **STATIC[way]}
        with_file(lambda path: quantize_static(model, path, Reader(), **options), made)
    logging.disable(logging.NOTSET)
    return made[0]


CASES = [(net, way) for net in FLOAT for way in [*STATIC, *DYNAMIC] if not (net == "lstm" and way in STATIC)]


@cache
def analysed(net: str, way: str) -> Groups:
    return group(runtime.probe(quantised(net, way)))


def sizes(groups: Groups) -> list[int]:
    return sorted(g.size for g in groups.prunable)


def outputs(model: onnx.ModelProto, groups: Groups) -> Array:
    return runtime.run(runtime.session(model, optimise=False), groups.net.feeds)[0]


# -------------------------------------------------------------------------------------------------------------- the cut


@pytest.mark.parametrize(("net", "way"), CASES)
def test_the_channels_of_the_float_network_can_be_cut(net: str, way: str) -> None:
    assert sizes(analysed(net, way)) == sizes(group(runtime.probe(folded(net))))


@pytest.mark.parametrize("fraction", [0.4, 0.9])
@pytest.mark.parametrize(("net", "way"), CASES)
def test_oracle(net: str, way: str, fraction: float) -> None:
    """Integer sums are the same with fewer terms of zero: to the bit, but where a float sum is rounded afterwards."""
    model, groups = quantised(net, way), analysed(net, way)
    plan = oracle.keep(groups, fraction, np.random.default_rng(1))
    verdict = oracle.check(model, groups.net.feeds, plan, groups, STEP if way.startswith("qdq") else 0.0)
    if verdict.error:
        pruned, masked = (outputs_optimised(m(groups, plan), groups) for m in (surgery, mask))
        assert np.array_equal(pruned, masked), "where ONNX Runtime fuses QDQ pairs it sums integers"
    silenced, original = outputs(mask(groups, plan), groups), outputs(model, groups)
    assert oracle.difference(original, silenced, original) > 0.01, "the cut is too small to tell a wrong one from a right one"


def outputs_optimised(model: onnx.ModelProto, groups: Groups) -> Array:
    return runtime.run(runtime.session(model), groups.net.feeds)[0]


@pytest.mark.parametrize(("net", "way"), CASES)
def test_no_weight_can_be_rescaled(net: str, way: str) -> None:
    groups = analysed(net, way)
    assert not any(reweightable(groups, g) for g in groups.prunable)


def test_depthwise_vectors_and_attributes_follow() -> None:
    model, groups = quantised("depthwise", "qop channel"), analysed("depthwise", "qop channel")
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    pruned = surgery(groups, plan)
    shapes = {t.name: tuple(t.dims) for t in pruned.graph.initializer}
    before = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for node, old in zip(pruned.graph.node, model.graph.node, strict=True):
        if node.op_type != "QLinearConv":
            continue
        weight, scale, zero, bias = (shapes[node.input[i]] for i in (3, 4, 5, 8))
        assert scale == zero == bias == weight[:1] != before[old.input[3]][:1]
        assert all(shapes[node.input[i]] == () for i in (1, 2, 6, 7)), "a scale of the whole tensor is nobody's"
        count = next(a.i for a in node.attribute if a.name == "group")
        assert count in (1, weight[0])


# ------------------------------------------------------------------------------------------------- what the report says


@pytest.mark.parametrize("way", [*STATIC, *DYNAMIC])
def test_exact_means_that_zeroing_the_consumers_gives_the_same(way: str) -> None:
    """The contract with whoever reads the report: exact groups are silenced by zeros in their consumers, and by them alone."""
    model, groups = quantised("residual", way), analysed("residual", way)
    plan = oracle.keep(groups, 0.5, np.random.default_rng(2))
    entries = build.group_entries(groups, plan)
    cut = [e for e in entries if e["removed"]]
    assert {e["exact"] for e in cut} == {way in ("qop", "qop channel")}
    zeroed = onnx.ModelProto()
    zeroed.CopyFrom(model)
    stored = {t.name: t for t in zeroed.graph.initializer}
    for member in (m for e in cut for m in e["members"] if m["role"] == "consumer"):
        value = numpy_helper.to_array(stored[member["tensor"]]).copy()
        np.moveaxis(value, member["axis"], 0)[member["removed"]] = 0
        stored[member["tensor"]].CopyFrom(numpy_helper.from_array(value, member["tensor"]))
    want, got, original = (outputs(m, groups) for m in (zeroed, surgery(groups, plan), model))
    error = oracle.difference(want, got, original)
    if way.startswith("qop channel") or way == "qop":
        assert error == 0
    elif "unsigned" in way:
        assert error > STEP, "here zeros silence nothing: the report must not say that they do"
    else:
        assert error <= STEP


@pytest.mark.parametrize(
    ("net", "way", "words"),
    [
        ("residual", "dynamic", "takes its steps from the range of the whole tensor"),
        ("residual", "qop unsigned", "zero point other than 0"),
        ("residual", "qdq", "rounds to 8 bits what Conv"),
        ("mlp", "dynamic unsigned", "zero point other than 0"),
        ("lstm", "dynamic", "takes its steps from the range of the whole"),
    ],
)
def test_flaws_are_explained(net: str, way: str, words: str) -> None:
    reasons = [e["flaw"] for e in build.group_entries(analysed(net, way)) if not e["frozen"]]
    assert any(words in (r or "") for r in reasons), reasons


@pytest.mark.parametrize(("net", "way"), CASES)
def test_size_is_that_of_the_float_network(net: str, way: str) -> None:
    """MACs are the same; 8-bit weights count as parameters, int32 biases do not."""
    model, groups = quantised(net, way), analysed(net, way)
    accounting = Accounting(groups, model.ByteSize())
    found = accounting.size(accounting.full_widths)
    plain = Accounting(group(runtime.probe(folded(net))), 0)
    assert found.macs == plain.size(plain.full_widths).macs
    weights = [t for t in model.graph.initializer if t.data_type in (TensorProto.INT8, TensorProto.UINT8) and len(t.dims) > 1]
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    vectors = [t for t in weights if t.name.endswith("zero_point")]
    assert found.params == sum(int(np.prod(t.dims)) for t in [*weights, *floats])
    assert not vectors or net == "lstm"
    assert build.prunable_share(groups, accounting)[0] == 1.0


def test_size_after_a_cut_is_counted_exactly() -> None:
    groups = analysed("depthwise", "qop channel")
    accounting = Accounting(groups, groups.net.model.ByteSize())
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    pruned = surgery(groups, plan)
    after = accounting.size(accounting.widths({g: k.indices for g, k in plan.groups.items()}))
    again = group(runtime.probe(pruned))
    fresh = Accounting(again, pruned.ByteSize())
    assert (after.macs, after.params) == (fresh.size(fresh.full_widths).macs, fresh.size(fresh.full_widths).params)
    assert abs(after.bytes - pruned.ByteSize()) < 200, "shapes and lengths in the file take a few bytes less"


# ------------------------------------------------------------------------------------------------ the range of a tensor


def wide() -> tuple[onnx.ModelProto, Groups, Plan]:
    """A dynamic network, and the plan that drops the channel with the largest activations."""
    loud = copy.deepcopy(folded("mlp"))
    bias = next(t for t in loud.graph.initializer if t.name == "b1")
    value = numpy_helper.to_array(bias).copy()
    value[3] = 50
    bias.CopyFrom(numpy_helper.from_array(value, "b1"))
    made: list[onnx.ModelProto] = []
    with_file(lambda path: quantize_dynamic(loud, path, weight_type=QuantType.QInt8), made)
    groups = group(runtime.probe(made[0]))
    found = next(g for g in groups.prunable if g.size == 20)
    return made[0], groups, Plan({found.id: Kept(20, np.delete(np.arange(20), 3))})


def test_the_mask_keeps_a_dropped_channel_from_widening_the_range() -> None:
    """Silenced in its consumers alone it would: all others would be rounded to coarser steps than in the pruned network."""
    model, groups, plan = wide()
    assert oracle.check(model, groups.net.feeds, plan, groups, 0.0).error == 0
    bare = replace(groups, ranged=frozenset())
    assert not np.array_equal(outputs(mask(bare, plan), groups), outputs(surgery(groups, plan), groups))


@pytest.mark.parametrize(("exponent", "silenced"), [(3.0, True), (0.5, True), (0.0, False), (-1.0, False)])
def test_a_power_keeps_a_dropped_channel_from_widening_the_range_if_it_keeps_zeros(exponent: float, silenced: bool) -> None:
    model = integer_chain(None)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(exponent), "e"))
    cast = next(n for n in model.graph.node if n.output[0] == "f")
    cast.output[0] = "f0"
    model.graph.node.insert(3, helper.make_node("Pow", ["f0", "e"], ["f"], "Pow"))
    assert (Dim("w", 1) in group(runtime.probe(model)).ranged) == silenced


@pytest.mark.parametrize("bias", ["b", "computed"])
def test_heads_are_silenced_in_the_weight_and_bias_that_make_their_values(bias: str) -> None:
    """Behind the attention the whole range is taken: a masked head must not widen it."""
    rng = np.random.default_rng(3)
    weights = {
        "w": rng.standard_normal((6, 24)).astype(np.float32),
        "b": rng.standard_normal(24).astype(np.float32) + 3,
        "wq": rng.integers(-100, 100, (8, 5)).astype(np.int8),
        "s": np.float32(0.01),
        "z": np.int8(0),
    }
    made = helper.make_node("Identity", ["b"], ["computed"])
    heads = helper.make_node("Attention", ["x", "w", bias], ["h"], domain="com.microsoft", num_heads=4)
    read = helper.make_node("DynamicQuantizeMatMul", ["h", "wq", "s", "z"], ["y"], domain="com.microsoft")
    graph = helper.make_graph(
        [made, heads, read] if bias == "computed" else [heads, read],
        "heads",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 3, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 3, 5])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    groups = group(runtime.probe(model))
    found = next(g for g in groups.prunable if g.size == 4)
    assert {Dim("w", 1), Dim("b", 0)} <= groups.ranged
    for gone in range(4):
        plan = Plan({found.id: Kept(4, np.delete(np.arange(4), gone))})
        assert oracle.check(model, groups.net.feeds, plan, groups, 0.0).error < 1e-6


# ---------------------------------------------------------------------------------------------------- zero points of weights


@pytest.mark.parametrize("way", ["qop unsigned", "qdq unsigned", "dynamic unsigned"])
def test_the_mask_writes_zero_points_into_consumers(way: str) -> None:
    groups = analysed("mlp", way)
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    masked = {t.name: numpy_helper.to_array(t) for t in mask(groups, plan).graph.initializer}
    removed = groups.removed({g: k.indices for g, k in plan.groups.items()})
    consumers = [d for d in removed if groups.roles.get(d) == "consumer"]
    assert consumers
    for dim in consumers:
        zero = masked[dim.tensor.removesuffix("_quantized") + "_zero_point"]
        assert zero.ravel()[0] != 0
        assert (np.take(masked[dim.tensor], removed[dim], dim.axis) == zero).all()


def integer_chain(zero: Array | None, *, at_run_time: bool = False) -> onnx.ModelProto:
    """MatMulInteger (3 -> 12), Cast, DynamicQuantizeLinear, MatMulInteger (12 -> 2) with a zero point of its weight."""
    rng = np.random.default_rng(0)
    weights = {
        "w": rng.integers(-90, 90, (3, 12)).astype(np.int8),
        "v": rng.integers(0, 200, (12, 2)).astype(np.uint8),
    }
    if zero is not None and not at_run_time:
        weights["zv"] = zero
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["m"]),
        helper.make_node("Cast", ["m"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("DynamicQuantizeLinear", ["f"], ["q2", "s2", "z2"]),
        helper.make_node("MatMulInteger", ["q2", "v", "z2", *(["zv"] if zero is not None else [])], ["n"]),
        helper.make_node("Cast", ["n"], ["y"], to=TensorProto.FLOAT),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 3])]
    if at_run_time:
        inputs.append(helper.make_tensor_value_info("zv", TensorProto.UINT8, []))
    made = helper.make_graph(
        nodes,
        "g",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4, 2])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("zero", [None, np.uint8(0), np.uint8(7), np.array([7, 9], np.uint8), np.array([0, 9], np.uint8)])
def test_zero_points_by_column(zero: Array | None) -> None:
    model = integer_chain(zero)
    groups = group(runtime.probe(model))
    (found,) = groups.prunable
    offset = zero is not None and bool(np.any(zero))
    flaws = [groups.by_id[found.id].flaw]
    assert flaws[0] is not None
    plan = Plan({found.id: Kept(12, np.array([0, 5, 6, 9]))})
    assert oracle.check(model, groups.net.feeds, plan, groups, 0.0).error == 0
    masked = {t.name: numpy_helper.to_array(t) for t in mask(groups, plan).graph.initializer}
    assert (masked["v"][1] == (zero if offset else 0)).all()


def test_a_zero_point_that_comes_at_run_time_freezes() -> None:
    groups = group(runtime.probe(integer_chain(np.uint8(0), at_run_time=True)))
    assert not groups.prunable
    assert any("zero point" in (g.reason or "") for g in groups.groups)


# ---------------------------------------------------------------------------------------------------------- calibration


def scores(model: onnx.ModelProto, criterion: Any, data: Array) -> dict[str, Array]:
    """Scores by what all spellings of a network have in common: the name of the layer that makes the channels."""
    groups = group(runtime.probe(model))
    found = calibrate(groups, criterion, nets.samples(model, data))
    names = {layer.out: layer.name for layer in reversed(groups.layers)}

    def name(g: Any) -> str:
        return named(min(names[s.dim] for s in g.slots if s.dim in names))

    return {name(g): found.of(g) for g in groups.prunable}


CALIBRATED = [(net, way) for net, way in CASES if net in ("residual", "mlp", "lstm")]


@pytest.mark.parametrize(("net", "way"), CASES)
def test_weights_are_read_as_what_they_stand_for(net: str, way: str) -> None:
    plain, integer = group(runtime.probe(folded(net))), analysed(net, way)
    want, got = ({named(x.name): w for x, w in weight_values(g.net, g.layers).items()} for g in (plain, integer))
    assert want.keys() == got.keys()
    for name, a in want.items():
        b = np.swapaxes(got[name], 1, 2) if a.ndim == 3 else got[name]
        b = b if b.shape == a.shape else b.T  # a Gemm that became a MatMul
        assert np.abs(a - b).max() < 0.02 * np.abs(a).max(), name


def named(layer: str) -> str:
    """What the layer was called before it was quantised."""
    return layer.replace("_quant", "").replace("_MatMul", "")


def example(net: str) -> Array:
    if net == "lstm":
        return np.random.default_rng(1).standard_normal((4 * LENGTH, 1, FEATURES)).astype(np.float32)
    return small.images(16)


@pytest.mark.parametrize(("net", "way"), [case for case in CALIBRATED if case[0] != "lstm"])
def test_sensitivities_are_nearly_those_of_the_float_network(net: str, way: str) -> None:
    """Integers read without their zero points would give other shares altogether."""
    data = example(net)
    want, got = (scores(m, Sensitivity(), data) for m in (folded(net), quantised(net, way)))
    assert want.keys() == got.keys()
    for name, values in want.items():
        assert np.abs(values - got[name]).max() < 0.1, name
        assert np.abs(values - got[name]).mean() < 0.01, name
        assert np.corrcoef(values, got[name])[0, 1] > 0.99, name


@pytest.mark.parametrize("criterion", ["l1", "l2", "fpgm"])
@pytest.mark.parametrize(("net", "way"), CALIBRATED)
def test_norms_are_nearly_those_of_the_float_network(net: str, way: str, criterion: str) -> None:
    """A filter's norm is in the units of its scale: 127 steps of one filter are not 127 steps of another."""
    want, got = (scores(m, PLAIN[criterion](), example(net)) for m in (folded(net), quantised(net, way)))
    assert want.keys() == got.keys()
    for name, values in want.items():
        assert values.min() > 0
        assert got[name] == pytest.approx(values, rel=0.03), name


@pytest.mark.parametrize(("net", "way"), CALIBRATED)
def test_activations_are_nearly_those_of_the_float_network(net: str, way: str) -> None:
    want, got = (scores(m, PLAIN["activation"](), example(net)) for m in (folded(net), quantised(net, way)))
    for name, values in want.items():
        assert np.abs(values - got[name]).max() < 0.03 * values.max(), name


# --------------------------------------------------------------------------------------------------------------- in one go


@pytest.mark.parametrize("method", ["pfp", "obs"])
@pytest.mark.parametrize(("net", "way"), [("residual", "qop channel"), ("depthwise", "dynamic"), ("residual", "qdq")])
def test_prune_from_file_to_report(net: str, way: str, method: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(quantised(net, way), path)
    result = onnxprune.prune(path, small.images(24), budget={"macs": 0.7}, samples=16, method=method)
    assert 0.65 < result.report["pruned"]["macs"] / result.report["original"]["macs"] <= 0.7
    assert result.report["validation"]["masked_max_relative_error"] <= STEP
    result.save(tmp_path / "out.onnx")
    found = api.verify(path, tmp_path / "out.onnx", result.report, small.images(8))
    assert found["validation"]["runtime"]


def test_float_sums_before_a_quantiser_are_not_called_exact() -> None:
    """Convolutions in float, then a dynamic MatMul: what rounds later rounds the float sums of other layers."""
    made: list[onnx.ModelProto] = []
    with_file(
        lambda path: quantize_dynamic(copy.deepcopy(folded("residual")), path, op_types_to_quantize=["MatMul", "Gemm"]), made
    )
    groups = group(runtime.probe(made[0]))
    assert {layer.op for layer in groups.layers} == {"Conv", "MatMulInteger"}
    assert all(not g.exact for g in groups.prunable)
    last = [g for g in groups.prunable if "range" in (g.flaw.reason if g.flaw else "")]
    assert len(last) == 1, "only the channels that the quantiser reads set its range"
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    oracle.check(made[0], groups.net.feeds, plan, groups, STEP)


def test_integer_layers_know_how_to_read_their_weights() -> None:
    groups = analysed("mlp", "dynamic")
    layers: list[Layer] = [x for x in groups.layers if x.op == "MatMulInteger"]
    assert len(layers) == 3
    for layer in layers:
        assert layer.steps is not None and layer.x_steps is not None
        assert layer.steps.scale.endswith("_scale") and layer.x_steps.scale.endswith("_scale")
