"""The interpreter of ONNX graphs in torch says what ONNX Runtime says, operator by operator and on whole networks."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import small
from onnx import TensorProto, helper, numpy_helper

from onnxprune import files, runtime
from onnxprune.errors import ModelError

torch = pytest.importorskip("torch")

from onnxprune.torchgraph import KNOWN, TorchGraph, unknown  # noqa: E402
from onnxprune.torchgraph.base import table  # noqa: E402
from onnxprune.torchgraph.graph import tensor  # noqa: E402

Array = np.ndarray[Any, Any]
MODELS = Path(__file__).resolve().parents[1] / "models"
ZOO = Path(os.environ.get("ONNXPRUNE_ZOO", "no zoo"))
RNG = np.random.default_rng(3)


@pytest.fixture(autouse=True)
def seeded() -> None:
    RNG.bit_generator.state = np.random.default_rng(3).bit_generator.state
    torch.set_num_threads(1)


def f(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def i(*values: int) -> Array:
    return np.array(values, np.int64)


def single(
    op: str, x: Array, constants: Sequence[Array | None], attributes: Mapping[str, Any], opset: int, outputs: int, domain: str
) -> onnx.ModelProto:
    """A model of one node, which reads input x and constants; None for an operand that is left out."""
    names = ["x", *("" if c is None else f"c{n}" for n, c in enumerate(constants))]
    made = [f"y{n}" for n in range(outputs)]
    node = helper.make_node(op, names, made, "only", domain=domain, **attributes)
    held = [numpy_helper.from_array(np.asarray(c), f"c{n}") for n, c in enumerate(constants) if c is not None]
    kind = helper.np_dtype_to_tensor_dtype(x.dtype)
    inputs = [helper.make_tensor_value_info("x", kind, [None] * x.ndim)]
    graph = helper.make_graph([node], "single", inputs, [onnx.ValueInfoProto(name=m) for m in made], held)
    opsets = [helper.make_opsetid("", opset), *([helper.make_opsetid(domain, 1)] if domain else [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def check(model: onnx.ModelProto, feeds: Mapping[str, Array], tolerance: float = 1e-5) -> None:
    """Torch and ONNX Runtime agree in shape, type and, relative to the largest entry, in value."""
    expected = runtime.run(runtime.session(model, optimise=False, threads=1), feeds)
    with torch.no_grad():
        got = TorchGraph(model).run({k: tensor(v) for k, v in feeds.items()})
    for output, want in zip(model.graph.output, expected, strict=True):
        have = got[output.name].numpy()
        assert have.shape == want.shape
        assert (have.dtype.kind == want.dtype.kind) or {have.dtype.kind, want.dtype.kind} <= set("iu")
        scale = max(1e-30, float(np.abs(want[np.isfinite(want)]).max(initial=0))) if want.dtype.kind == "f" else 1.0
        assert np.allclose(have, want, rtol=0, atol=tolerance * scale, equal_nan=True)


IMAGE = (2, 4, 9, 10)
EXACT = {"num_outputs": 2}
TWO, ASYMMETRIC, BEFORE = "bidirectional", "asymmetric", {"linear_before_reset": 1}
CASES: list[tuple[str, tuple[int, ...], list[Any], dict[str, Any], int]] = [
    ("Conv", IMAGE, [lambda: f(6, 4, 3, 3), lambda: f(6)], {"pads": [1, 0, 2, 1], "strides": [2, 1], "dilations": [1, 2]}, 18),
    ("Conv", IMAGE, [lambda: f(8, 2, 3, 3)], {"group": 2, "auto_pad": "SAME_UPPER", "strides": [2, 2]}, 18),
    ("Conv", IMAGE, [lambda: f(8, 4, 2, 2)], {"auto_pad": "SAME_LOWER"}, 18),
    ("Conv", (2, 4, 11), [lambda: f(5, 4, 3)], {"pads": [1, 1]}, 18),
    ("Conv", (1, 2, 5, 6, 4), [lambda: f(3, 2, 3, 3, 2)], {"pads": [1, 1, 0, 1, 1, 1]}, 18),
    ("ConvTranspose", IMAGE, [lambda: f(4, 3, 3, 3), lambda: f(6)], {"group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1]}, 18),
    ("ConvTranspose", IMAGE, [lambda: f(4, 3, 3, 3)], {"strides": [2, 2], "pads": [0, 1, 1, 0], "output_padding": [1, 1]}, 18),
    ("ConvTranspose", IMAGE, [lambda: f(4, 3, 3, 3)], {"strides": [2, 2], "output_shape": [18, 20]}, 18),
    ("ConvTranspose", IMAGE, [lambda: f(4, 3, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}, 18),
    ("ConvTranspose", (1, 2, 7), [lambda: f(2, 3, 4)], {"strides": [2], "dilations": [2]}, 18),
    ("Gemm", (5, 7), [lambda: f(3, 7), lambda: f(3)], {"transB": 1}, 18),
    ("Gemm", (7, 5), [lambda: f(7, 3), lambda: f(5, 1)], {"transA": 1, "alpha": 0.5, "beta": 2.0}, 18),
    ("Gemm", (5, 7), [lambda: f(7, 3)], {}, 18),
    ("MatMul", (2, 3, 5, 4), [lambda: f(4, 6)], {}, 18),
    ("MatMul", (2, 3, 4), [lambda: f(4)], {}, 18),
    ("FusedConv:com.microsoft", IMAGE, [lambda: f(6, 4, 3, 3), lambda: f(6)], {"activation": "Relu"}, 18),
    ("BatchNormalization", IMAGE, [lambda: f(4), lambda: f(4), lambda: f(4), lambda: f(4) ** 2], {"epsilon": 1e-3}, 15),
    ("LayerNormalization", (2, 3, 8), [lambda: f(8), lambda: f(8)], {}, 17),
    ("LayerNormalization", (2, 3, 8), [lambda: f(3, 8)], {"axis": 1}, 17),
    ("InstanceNormalization", IMAGE, [lambda: f(4), lambda: f(4)], {}, 17),
    ("LRN", IMAGE, [], {"size": 3, "alpha": 0.01, "beta": 0.7, "bias": 1.5}, 17),
    ("LpNormalization", IMAGE, [], {"axis": 1, "p": 2}, 17),
    ("MaxPool", IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, 17),
    ("MaxPool", IMAGE, [], {"kernel_shape": [3, 2], "strides": [2, 2], "ceil_mode": 1}, 17),
    ("MaxPool", IMAGE, [], {"kernel_shape": [3, 3], "strides": [3, 2], "pads": [0, 1, 2, 0], "dilations": [1, 2]}, 17),
    ("MaxPool", IMAGE, [], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}, 17),
    ("AveragePool", IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 0, 1]}, 17),
    ("AveragePool", IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}, 17),
    ("AveragePool", IMAGE, [], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, 19),
    ("GlobalAveragePool", IMAGE, [], {}, 17),
    ("GlobalMaxPool", IMAGE, [], {}, 17),
    ("Clip", IMAGE, [np.float32(-0.5), np.float32(0.7)], {}, 17),
    ("Clip", IMAGE, [None, np.float32(0.7)], {}, 17),
    ("Clip", IMAGE, [], {"min": -0.1, "max": 6.0}, 10),
    ("PRelu", IMAGE, [lambda: f(4, 1, 1)], {}, 17),
    ("Gelu", IMAGE, [], {"approximate": "tanh"}, 20),
    ("Gelu", IMAGE, [], {}, 20),
    ("Softmax", (2, 3, 4), [], {}, 13),
    ("Softmax", (2, 3, 4), [], {}, 11),
    ("LogSoftmax", (2, 3, 4), [], {"axis": 1}, 13),
    ("HardSigmoid", IMAGE, [], {"alpha": 0.3, "beta": 0.4}, 17),
    ("Pow", IMAGE, [np.float32(2)], {}, 17),
    ("Add", IMAGE, [lambda: f(4, 1, 1)], {}, 17),
    ("Max", IMAGE, [lambda: f(4, 1, 1), lambda: f(10)], {}, 17),
    ("Mean", IMAGE, [lambda: f(4, 1, 1)], {}, 17),
    ("Cast", IMAGE, [], {"to": TensorProto.INT32}, 17),
    ("Reshape", IMAGE, [i(0, -1, 5)], {}, 17),
    ("Flatten", IMAGE, [], {"axis": 2}, 17),
    ("Transpose", IMAGE, [], {}, 17),
    ("Squeeze", (1, 3, 1, 4), [i(0, -2)], {}, 17),
    ("Squeeze", (1, 3, 1, 4), [], {}, 17),
    ("Squeeze", (1, 3, 1, 4), [], {"axes": [2]}, 11),
    ("Unsqueeze", (3, 4), [i(0, -1)], {}, 17),
    ("Slice", IMAGE, [i(-1, 8), i(-100, 1), i(3, 2), i(-1, -2)], {}, 17),
    ("Slice", IMAGE, [i(1, 0), i(9, -1)], {}, 17),
    ("Slice", IMAGE, [], {"starts": [1, 2], "ends": [3, 100], "axes": [1, -1]}, 9),
    ("Gather", IMAGE, [i(-1, 0, 2)], {"axis": 1}, 17),
    ("Gather", IMAGE, [np.int64(-2)], {"axis": 2}, 17),
    ("Gather", IMAGE, [np.array([[1]], np.int64)], {"axis": 1}, 17),
    ("GatherElements", (3, 4), [np.array([[0, -1], [2, 1], [1, 0]], np.int64)], {"axis": 1}, 17),
    ("GatherND", (3, 4, 2), [np.array([[0, 1], [2, -1]], np.int64)], {}, 17),
    ("ScatterND", (4, 3), [np.array([[0], [2]], np.int64), lambda: f(2, 3)], {}, 17),
    ("Pad", IMAGE, [i(0, 1, 2, 0, 0, 0, 1, 3), np.float32(0.5)], {}, 17),
    ("Pad", IMAGE, [i(0, 0, 2, 1, 0, 0, 1, 3)], {"mode": "reflect"}, 17),
    ("Pad", IMAGE, [i(1, 2), None, i(-1)], {"mode": "edge"}, 18),
    ("Pad", IMAGE, [i(0, 0, -1, 1, 0, 0, -2, 3)], {}, 17),
    ("Expand", (4, 1), [i(2, 1, 3)], {}, 17),
    ("Tile", (2, 3), [i(2, 3)], {}, 17),
    ("Shape", IMAGE, [], {"start": 1, "end": -1}, 17),
    ("DepthToSpace", (1, 8, 2, 3), [], {"blocksize": 2}, 17),
    ("DepthToSpace", (1, 8, 2, 3), [], {"blocksize": 2, "mode": "CRD"}, 17),
    ("SpaceToDepth", (1, 2, 4, 6), [], {"blocksize": 2}, 17),
    ("Trilu", (4, 5), [np.int64(1)], {"upper": 0}, 17),
    ("ReduceMean", IMAGE, [], {"axes": [2, -1], "keepdims": 0}, 17),
    ("ReduceMean", IMAGE, [i(1)], {}, 18),
    ("ReduceSum", IMAGE, [], {}, 17),
    ("ReduceSum", IMAGE, [i()], {"noop_with_empty_axes": 1}, 17),
    ("ReduceMax", IMAGE, [i(1, 3)], {"keepdims": 0}, 18),
    ("ReduceProd", IMAGE, [i(1, 3)], {}, 18),
    ("ReduceL2", IMAGE, [i(1, 3)], {}, 18),
    ("ReduceLogSumExp", IMAGE, [i(-1)], {}, 18),
    ("ArgMax", (3, 4), [], {"axis": 1, "keepdims": 0}, 17),
    ("CumSum", (3, 4), [np.int64(1)], {"reverse": 1, "exclusive": 1}, 17),
    ("Resize", IMAGE, [None, np.float32([1, 1, 2, 2])], {"mode": "nearest", "coordinate_transformation_mode": ASYMMETRIC}, 17),
    ("Resize", IMAGE, [None, None, i(2, 4, 13, 7)], {"mode": "linear"}, 17),
    ("Resize", IMAGE, [None, None, i(2, 4, 17, 19)], {"mode": "linear", "coordinate_transformation_mode": "align_corners"}, 17),
    ("Resize", IMAGE, [None, None, i(18, 15)], {"mode": "linear", "axes": [2, 3]}, 18),
    ("Resize", IMAGE, [None, np.float32([1, 1, 0.6, 1.7])], {"coordinate_transformation_mode": "pytorch_half_pixel"}, 17),
    ("Resize", IMAGE, [None, np.float32([1, 1, 2, 1.5])], {"mode": "cubic"}, 17),
    ("Upsample", IMAGE, [np.float32([1, 1, 2, 3])], {"mode": "nearest"}, 9),
    ("LSTM", (5, 2, 4), [lambda: f(2, 12, 4), lambda: f(2, 12, 3), lambda: f(2, 24)], {"hidden_size": 3, "direction": TWO}, 17),
    ("LSTM", (5, 2, 4), [lambda: f(1, 12, 4), lambda: f(1, 12, 3)], {"hidden_size": 3, "direction": "reverse"}, 17),
    ("GRU", (5, 2, 4), [lambda: f(1, 9, 4), lambda: f(1, 9, 3), lambda: f(1, 18)], {"hidden_size": 3}, 17),
    ("GRU", (5, 2, 4), [lambda: f(1, 9, 4), lambda: f(1, 9, 3), lambda: f(1, 18)], {"hidden_size": 3, **BEFORE}, 17),
    ("RNN", (5, 2, 4), [lambda: f(1, 3, 4), lambda: f(1, 3, 3), lambda: f(1, 6)], {"hidden_size": 3}, 17),
]  # fmt: skip
OUTPUTS = {"LSTM": 3, "GRU": 2, "RNN": 2}


@pytest.mark.parametrize("case", CASES, ids=[f"{n}-{c[0]}" for n, c in enumerate(CASES)])
def test_an_operator_does_what_onnx_runtime_does(case: tuple[Any, ...]) -> None:
    op, shape, constants, attributes, opset = case
    name, _, domain = op.partition(":")
    arrays = [c() if callable(c) else c for c in constants]
    x = f(*shape)
    check(single(name, x, arrays, attributes, opset, OUTPUTS.get(name, 1), domain), {"x": x})


UNARY = ["Relu", "Sigmoid", "Tanh", "Softplus", "Softsign", "Mish", "HardSwish", "LeakyRelu", "Elu", "Celu", "Selu", "Abs"]
UNARY += ["Ceil", "Cos", "Erf", "Exp", "Floor", "IsNaN", "Neg", "Reciprocal", "Round", "Sign", "Sin", "Identity", "Dropout"]
UNARY += ["ThresholdedRelu", "Shrink", "IsInf", "Atan", "Sinh", "Cosh", "Tan"]


@pytest.mark.parametrize("op", UNARY)
def test_functions_of_one_number(op: str) -> None:
    x = f(3, 5)
    check(single(op, x, [], {}, 18, 1, ""), {"x": x})
    if op in ("Relu", "Abs", "Exp", "Erf", "Round"):
        check(single(op, 3 * x, [], {}, 18, 1, ""), {"x": 3 * x})


@pytest.mark.parametrize(("op", "scaled"), [("Sqrt", 1), ("Log", 1), ("Asin", 0), ("Acos", 0)])
def test_functions_that_are_not_defined_everywhere(op: str, scaled: int) -> None:
    x = np.abs(f(3, 5)) + 0.1 if scaled else np.tanh(f(3, 5)).astype(np.float32)
    check(single(op, x, [], {}, 18, 1, ""), {"x": x})


@pytest.mark.parametrize("op", ["Div", "Mod", "Mul", "Sub", "Less", "GreaterOrEqual", "Equal", "Max"])
def test_arithmetic_of_whole_numbers(op: str) -> None:
    x = np.array([[7, -7, 3], [0, 5, -9]], np.int64)
    check(single(op, x, [np.array([3, 2, -4], np.int64)], {}, 18, 1, ""), {"x": x})


@pytest.mark.parametrize(("opset", "size"), [(18, 2), (21, 6)])
def test_group_normalisation_has_scales_of_groups_then_of_channels(opset: int, size: int) -> None:
    x = f(2, 6, 4, 4)
    check(single("GroupNormalization", x, [f(size), f(size)], {"num_groups": 2}, opset, 1, ""), {"x": x}, 1e-4)


@pytest.mark.parametrize(
    ("opset", "constants", "attributes"), [(18, [], EXACT), (17, [i(3, 1)], {}), (11, [], {"split": [1, 3]})]
)
def test_split_by_count_by_operand_and_by_attribute(opset: int, constants: list[Any], attributes: dict[str, Any]) -> None:
    x = f(2, 4)
    check(single("Split", x, constants, {"axis": 1, **attributes}, opset, 2, ""), {"x": x})


def test_the_largest_entries() -> None:
    x = f(3, 7)
    check(single("TopK", x, [i(3)], {"axis": 1}, 17, 2, ""), {"x": x})


def test_einsum() -> None:
    x = f(2, 3, 4)
    check(single("Einsum", x, [f(2, 4, 5)], {"equation": "bij,bjk->bik"}, 17, 1, ""), {"x": x})


def test_where_and_one_hot() -> None:
    x = np.array([[True, False], [False, True]])
    check(single("Where", x, [f(2, 2), f(2)], {}, 17, 1, ""), {"x": x})
    places = np.array([0, 2, -1], np.int64)
    check(single("OneHot", places, [np.int64(4), f(2)], {"axis": 0}, 17, 1, ""), {"x": places})


@pytest.mark.parametrize("name", ["vgg8", "resnet20", "mobilenet"])
def test_the_models_that_ship(name: str) -> None:
    model = files.load(MODELS / f"{name}.onnx")
    x = np.load(MODELS / "fashion-mnist.npz")["x_test"][:8].astype(np.float32)
    check(model, {model.graph.input[0].name: x})


ZOO_NAMES = [
    "resnet18.Dfn",
    "vit_tiny",
    "unet",
    "yolov8n.L13",
    "shufflenet",
    "gru",
    "lstm",
    "convnext",
    "dcgan_g",
    "squeezenet",
]


def zoo(limit: int = 30 << 20) -> list[Path]:
    """One file of each of these networks, none of them large."""
    found = sorted(ZOO.glob("*/*.onnx")) if ZOO.exists() else []
    small_ones = [p for p in found if p.stat().st_size < limit]
    chosen = [next((p for p in small_ones if n in p.name), None) for n in ZOO_NAMES]
    return list(dict.fromkeys(p for p in chosen if p is not None))


@pytest.mark.parametrize("path", zoo() or [None], ids=lambda p: p.name if p else "absent")
def test_networks_of_the_zoo(path: Path | None) -> None:
    if path is None:
        pytest.skip("ONNXPRUNE_ZOO names no folder of models")
    model = files.load(path)
    net = runtime.probe(model)
    check(model, net.feeds, 1e-4)


def test_an_unknown_operator_is_named() -> None:
    x = f(2, 4)
    model = single("NonZero", x, [], {}, 17, 1, "")
    assert unknown(model) == ["NonZero"]
    with pytest.raises(ModelError, match="NonZero"):
        TorchGraph(model)


def test_a_variant_that_is_not_known_is_named_with_its_node() -> None:
    x = f(1, 1, 4, 4)
    model = single("MaxPool", x, [], {"kernel_shape": [2, 2]}, 17, 2, "")
    with pytest.raises(ModelError, match=r"'only' \(MaxPool\).*places of the maxima"):
        TorchGraph(model).run({"x": tensor(x)})


def test_tables_must_not_contradict_each_other() -> None:
    with pytest.raises(ValueError, match="Relu"):
        table({"Relu": KNOWN["Relu"]}, {"Relu": KNOWN["Tanh"]})


def test_gradients_are_those_of_a_finite_difference() -> None:
    """Through a whole network, for some entries of every weight."""
    model = small.residual()
    names = [t.name for t in model.graph.initializer if t.name.startswith(("w", "b", "scale", "shift", "fc"))]
    graph = TorchGraph(model, names)
    graph.parameters = {k: v.detach().double().requires_grad_() for k, v in graph.parameters.items()}
    graph._constants = {k: v.double() if v.dtype.is_floating_point else v for k, v in graph._constants.items()}
    x = torch.from_numpy(small.images(2)).double()
    graph.run({"x": x})["scores"].square().sum().backward()
    step = 1e-6
    for value in graph.parameters.values():
        place = int(value.grad.abs().argmax())
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                value.view(-1)[place] += sign * step
                ends.append(float(graph.run({"x": x})["scores"].square().sum()))
                value.view(-1)[place] -= sign * step
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(value.grad.view(-1)[place]), rel=1e-3)


def test_what_no_input_reaches_is_computed_once() -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["wt"]),
        helper.make_node("Transpose", ["v"], ["vt"]),
        helper.make_node("MatMul", ["x", "wt"], ["h"]),
        helper.make_node("MatMul", ["h", "vt"], ["y"]),
    ]
    held = [numpy_helper.from_array(f(4, 4), name) for name in "wv"]
    inputs, outputs = ([helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 4])] for n in "xy")
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, held), opset_imports=[helper.make_opsetid("", 17)])
    graph = TorchGraph(model, ["v"])
    assert [n.makes[0] for n in graph._nodes] == ["vt", "h", "y"]
    graph.run({"x": tensor(f(2, 4))})["y"].sum().backward()
    assert graph.parameters["v"].grad.abs().sum() > 0
