"""What is said of a model before TensorRT takes it: the table of operators, the checks and the shape profiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
import small
from onnx import TensorProto, defs, helper, numpy_helper

import onnxprune
from onnxprune.errors import ModelError, OptionError
from onnxprune.trt import check
from onnxprune.trt.export import export_trt
from onnxprune.trt.facts import Facts
from onnxprune.trt.operators import REFUSED, TAKEN, verdict
from onnxprune.trt.profiles import Profile, profiles

ROOT = Path(__file__).resolve().parent.parent
NEWEST = (11, 5)


def parsed(body: str, *, x: str = "float[N, 4, 8, 8] x", y: str = "y", opset: int = 17, more: str = "") -> onnx.ModelProto:
    outputs = ", ".join(f"float {name}" for name in y.split())
    domains = f'"" : {opset}, "com.microsoft" : 1, "local" : 1, "trt.plugins" : 1'
    return onnx.parser.parse_model(f"<ir_version: 8, opset_import: [{domains}]>\ng ({x}) => ({outputs}) {{\n{body}\n}}\n{more}")


def found(model: onnx.ModelProto, version: tuple[int, int] = NEWEST, **more: Any) -> list[dict[str, Any]]:
    return check.summary(check.check(Facts.of(model, version), **more))


def said(model: onnx.ModelProto, severity: str = "refused", version: tuple[int, int] = NEWEST) -> str:
    return "\n".join(f["what"] for f in found(model, version) if f["severity"] == severity)


# ------------------------------------------------------------------------------------------------------- operators


def test_the_table_covers_onnx_and_says_one_thing_of_each_operator() -> None:
    known = {s.name for s in defs.get_all_schemas() if s.domain == ""}
    assert not set(TAKEN) & REFUSED
    assert (set(TAKEN) | REFUSED) - known == {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # ONNX dropped them
    missing = known - set(TAKEN) - REFUSED
    assert missing <= {"BitCast", "CausalConvWithState", "CumProd", "LinearAttention", "SwiGLU"}
    assert all(verdict("", name, NEWEST).status == "unknown" for name in missing)


@pytest.mark.parametrize(
    ("domain", "op", "version", "status", "words"),
    [
        ("", "Conv", (10, 15), "taken", ""),
        ("ai.onnx", "Conv", (10, 15), "taken", ""),
        ("", "QLinearConv", (10, 15), "refused", "not supported"),
        ("", "NoSuchOperator", (10, 15), "unknown", "not in the table"),
        ("", "Swish", (10, 16), "refused", "came with TensorRT 11.0"),
        ("", "Swish", (11, 5), "taken", ""),
        ("com.microsoft", "FusedConv", (11, 5), "refused", "ONNX Runtime's own"),
        ("trt.plugins", "Mine", (11, 5), "unknown", "'trt.plugins'"),
    ],
)
def test_verdicts(domain: str, op: str, version: tuple[int, int], status: str, words: str) -> None:
    got = verdict(domain, op, version)
    assert got.status == status and words in got.why


def test_operators_in_bodies_and_in_local_functions_are_checked() -> None:
    branch = parsed("c = Constant<value = bool {1}>()\n y = If(c) <then_branch = t () => (a) { a = Det(x) }, "
                    "else_branch = e () => (b) { b = Identity(x) }>")  # fmt: skip
    assert "Det is listed as not supported" in said(branch)
    inside = '<domain: "local", opset_import: ["" : 17]>\nTwice (a) => (b) { b = BitShift<direction = "LEFT">(a, a) }'
    called = parsed("y = local.Twice(x)", more=inside)
    assert "BitShift is listed as not supported" in said(called)


def test_nodes_that_cannot_be_are_a_bad_file() -> None:
    model = parsed("y = Relu(x)")
    del model.graph.node[0].input[:]
    with pytest.raises(ModelError, match="Relu 'y' lacks inputs"):
        found(model)
    with pytest.raises(ModelError, match="GridSample 'y' is no operator of set 13"):
        found(parsed("y = GridSample(x, x)", opset=13))


def test_a_plugin_turns_what_is_not_of_onnx_into_unknown() -> None:
    model = parsed("a = com.microsoft.FusedConv(x, x)\n y = Det(a)")
    assert {(f["severity"], f["what"].split(" ", 1)[0]) for f in found(model)} == {
        ("refused", "com.microsoft::FusedConv"),
        ("refused", "Det"),
    }
    assert {(f["severity"], f["what"].split(" ", 1)[0]) for f in found(model, plugins=True)} == {
        ("unknown", "com.microsoft::FusedConv"),
        ("refused", "Det"),
    }


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ("y = MaxPool<kernel_shape = [2, 2]>(x)", "y, i = MaxPool<kernel_shape = [2, 2]>(x)", "indices"),
        ("y = Resize<mode = \"linear\">(x, , s)", "y = Resize<mode = \"cubic\">(x, , s)", "mode 'cubic'"),
        ("y = Resize<mode = \"nearest\">(x, , s)", "y = Resize<mode = \"nearest\", antialias = 1>(x, , s)", "antialias '1'"),
        ("y = ScatterND(x, i, u)", "y = ScatterND<reduction = \"add\">(x, i, u)", "reduction 'add'"),
        ("y = LayerNormalization(x, w)", "y, m = LayerNormalization(x, w)", "first output"),
        ("y, i = TopK(x, k)", "y, i = TopK<sorted = 0>(x, k)", "sorted = 0"),
        ("y, i = TopK(x, k)", "y, i = TopK(x, many)", "the first 4000"),
        ("y = LSTM<hidden_size = 2>(x, w, w)", "y = LSTM<hidden_size = 2, layout = 1>(x, w, w)", "layout = 1"),
        (
            'y = GRU<hidden_size = 2, direction = "bidirectional", activations = ["Tanh", "Relu", "Tanh", "Relu"]>(x, w, w)',
            'y = GRU<hidden_size = 2, direction = "bidirectional", activations = ["Tanh", "Relu", "Relu", "Tanh"]>(x, w, w)',
            "other activations",
        ),
        ("y = Dropout(x)", "y = Dropout(x, , yes)", "training"),
    ],
)  # fmt: skip
def test_restrictions(good: str, bad: str, words: str) -> None:
    constants = {"s": np.ones(4, np.float32), "w": np.ones((1, 8, 8), np.float32), "k": np.array([2]), "many": np.array([4000])}
    constants |= {"i": np.zeros((1, 4), np.int64), "u": np.ones(1, np.float32), "yes": np.array(True)}
    for body, expected in ((good, False), (bad, True)):
        model = parsed(body, opset=18)
        model.graph.initializer.extend(numpy_helper.from_array(v, k) for k, v in constants.items())
        assert bool(said(model)) is expected
        assert words in said(model) or not expected


def test_an_input_that_has_to_be_constant_is_not_guessed_at() -> None:
    body = "y = ReduceSum(x, a)"
    assert "input 1 as a constant only" in said(parsed(body, x="float[N, 4] x, int64[1] a"), "unknown")
    constant = parsed(f"b = Constant<value_ints = [1]>()\n a = Identity(b)\n{body}")
    assert found(constant) == []


def test_types() -> None:
    assert found(parsed("y = Relu(x)", x="float16[N, 4] x")) == []
    assert "computed as float32" in said(parsed("y = Relu(x)", x="double[N, 4] x"), "warning")
    assert "uint16 is not a type" in said(parsed("z = Cast<to = 1>(x)\n y = Relu(z)", x="uint16[N, 4] x"))
    assert "NonZero of bool is not listed" in said(parsed("z = NonZero(x)\n y = Cast<to = 1>(z)", x="bool[4] x"), "unknown")
    assert said(parsed("y = Cast<to = 1>(x)", x="uint8[N, 4] x"), "unknown") == ""


@pytest.mark.parametrize(
    ("opset", "version", "words"), [(8, NEWEST, "older than 9"), (25, (10, 16), "newer than 24"), (25, NEWEST, "")]
)
def test_operator_sets_outside_of_what_is_listed_are_unknown(opset: int, version: tuple[int, int], words: str) -> None:
    told = said(parsed("y = Relu(x)", opset=opset), "unknown", version)
    assert words in told and bool(told) is bool(words)


# ------------------------------------------------------------------------------------------- explicit quantisation


def quantised(
    *,
    scale: Any = 0.5,
    zero: Any = None,
    weight_scales: Any = (0.1, 0.2, 0.3, 0.4),
    bias: Any = None,
    axis: int = 0,
) -> onnx.ModelProto:
    """x -> Q -> DQ -> Conv(DQ(int8 weight)), [N, 4, 8, 8] -> [N, 4, 8, 8]."""
    weights = {
        "s": np.asarray(scale, np.float32),
        "z": np.asarray(np.int8(0) if zero is None else zero),
        "w": np.ones((4, 4, 1, 1), np.int8),
        "ws": np.asarray(weight_scales, np.float32),
        "wz": np.zeros(len(weight_scales), np.int8),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantise"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "back"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "weight", axis=axis),
    ]
    if bias is not None:
        weights |= {"b": np.asarray(bias), "bs": np.float32(0.05), "bz": np.asarray(bias).dtype.type(0)}
        nodes.append(helper.make_node("DequantizeLinear", ["b", "bs", "bz"], ["bd"], "bias"))
    nodes.append(helper.make_node("Conv", ["d", "wd", *(["bd"] if bias is not None else [])], ["y"], "conv"))
    value = helper.make_tensor_value_info
    ends = value("x", TensorProto.FLOAT, ["N", 4, 8, 8]), value("y", TensorProto.FLOAT, ["N", 4, 8, 8])
    constants = [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()]
    graph = helper.make_graph(nodes, "quantised", [ends[0]], [ends[1]], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(
    ("broken", "words"),
    [
        ({}, ""),
        ({"scale": 0.0}, "1 scales that are not positive and finite"),
        ({"scale": np.inf}, "not positive and finite"),
        ({"scale": np.nan}, "not positive and finite"),
        ({"weight_scales": (0.1, -0.2, 0.3, 0.0)}, "2 scales that are not positive"),
        ({"weight_scales": (0.1, 0.2, 0.3)}, "3 scales for an axis of 4"),
        ({"axis": 5}, "axis 5 of a tensor of 4"),
        ({"zero": np.int8(3)}, "zero point other than 0"),
        ({"zero": np.uint8(0)}, "uint8, which TensorRT reads as int8"),
        ({"zero": np.int16(0)}, "is of int16"),
        ({"bias": np.arange(4, dtype=np.int32)}, "bias of int32"),
    ],
)
def test_pairs_have_to_be_symmetric_signed_and_positive(broken: dict[str, Any], words: str) -> None:
    told = said(quantised(**broken))
    assert words in told and bool(told) is bool(words)


def test_what_onnx_runtime_quantises_symmetrically_stays_valid_when_it_is_pruned(tmp_path: Path) -> None:
    """With float biases and zero points of 0, per channel: every scale follows its channel, and none is refused."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Samples(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches = iter([{"x": small.images(8)}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    small.write(small.chain(), tmp_path / "m.onnx")
    common = {
        "quant_format": QuantFormat.QDQ,
        "activation_type": QuantType.QInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
    }
    symmetric = {"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False}
    quantize_static(tmp_path / "m.onnx", tmp_path / "default.onnx", Samples(), **common)
    quantize_static(tmp_path / "m.onnx", tmp_path / "fit.onnx", Samples(), **common, extra_options=symmetric)
    assert "bias of int32" in said(onnx.load(tmp_path / "default.onnx"))
    onnxprune.prune(tmp_path / "fit.onnx", budget={"macs": 0.6}, method="l1").save(tmp_path / "cut.onnx")
    told = export_trt(tmp_path / "cut.onnx", original=tmp_path / "fit.onnx", precision="int8", tensorrt=10)
    assert told.report["quantised"] is True and told.refused == []
    assert "--int8" in told.script


# -------------------------------------------------------------------------------------------------------- profiles


def inputs(**shapes: Sequence[int | str] | None) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    graph = helper.make_graph(
        [helper.make_node("Relu", [values[0].name], ["y"])], "g", values, [helper.make_empty_tensor_value_info("y")]
    )
    return helper.make_model(graph)


def test_profiles_of_batches_of_given_shapes_and_of_sizes_by_name() -> None:
    assert profiles(inputs(x=[2, 3])) == []
    assert profiles(inputs(x=["N", 3])) == [Profile("x", (1, 3), (8, 3), (32, 3))]
    assert profiles(inputs(x=["N", 3]), batch=(2, 4, 4)) == [Profile("x", (2, 3), (4, 3), (4, 3))]
    assert profiles(inputs(x=["N", "s"], m=["N", "s"]), ["x=1x8:2x16:4x64"]) == [
        Profile("x", (1, 8), (2, 16), (4, 64)),
        Profile("m", (1, 8), (2, 16), (4, 64)),
    ]
    assert profiles(inputs(x=["?", 3, "?", "?"]), ["3,3,8,16"]) == [Profile("x", *[(3, 3, 8, 16)] * 3)]
    assert profiles(inputs(x=None), ["1x2:1x2:1x3"]) == [Profile("x", (1, 2), (1, 2), (1, 3))]
    assert profiles(inputs(**{"a:0": ["N"], "b": [3]})) == [Profile("a:0", (1,), (8,), (32,))]


@pytest.mark.parametrize(
    ("shapes", "given", "batch", "words"),
    [
        ({"x": ["N", 3, "h", "w"]}, [], None, "axis 2 ('h') open"),
        ({"x": ["N", 3, "", ""]}, [], None, "axis 2 open"),
        ({"x": None}, [], None, "declares no shape"),
        ({"x": ["N", 3]}, ["z=1x3"], None, "no input of the model"),
        ({"x": ["N", 3], "z": [1]}, ["1x3"], None, "no input of the model"),
        ({"x": ["N", 3]}, ["x=1x3:2x3"], None, "is not MIN:OPT:MAX"),
        ({"x": ["N", 3]}, ["x=one"], None, "is not MIN:OPT:MAX"),
        ({"x": ["N", 3]}, ["x=1:2:3"], None, "another number of axes"),
        ({"x": ["N", 3]}, ["x=1x4:1x4:1x4"], None, "does not fit"),
        ({"x": ["N", 3]}, ["x=4x3:2x3:8x3"], None, "no range of sizes"),
        ({"x": ["N", 3]}, ["x=0x3:2x3:8x3"], None, "no range of sizes"),
        ({"x": ["N", 3]}, ["x=1x3:2x3:3000000000x3"], None, "no range of sizes"),
        ({"x": ["N", 3]}, ["x=1x3", "x=2x3"], None, "twice"),
        ({"x": ["N"], "z": ["N"]}, ["x=1", "z=2"], None, "two ranges"),
        ({"x": ["N", 3]}, [], (3, 2, 1), "no range of sizes"),
        ({"x": [2, 3]}, [], (1, 2, 3), "no input leaves its first axis open"),
        ({"x,z": ["N", 3]}, [], None, "cannot be told"),
        ({"it's": ["N", 3]}, [], None, "cannot be told"),
        ({"-x": ["N", 3]}, [], None, "cannot be told"),
    ],
)
def test_profiles_that_cannot_be(shapes: dict[str, Any], given: list[str], batch: Any, words: str) -> None:
    with pytest.raises((OptionError, ModelError), match=words.replace("(", r"\(").replace(")", r"\)")):
        profiles(inputs(**shapes), given, batch)
