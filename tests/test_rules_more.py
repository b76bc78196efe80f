"""Rules of operators that are met less often: normalisations, accumulations, what trains, what draws at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import oracle
import pytest
from axes import owner, prunable, together, why
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from single import LAST, build, cut, holds, ints, seeded, shape, w

from onnxprune import runtime
from onnxprune.graph import Network
from onnxprune.groups import Groups
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, surgery
from onnxprune.plan import Kept, Plan

__all__ = ["seeded"]  # every test draws the same weights


# The checker of onnx 1.23 cannot read the function of version 13 without axes.
@pytest.mark.parametrize(("opset", "axes"), [(9, None), (9, [0, 2, 3]), (13, [0, 2, 3]), (13, [2, -1])])
def test_mean_and_variance_over_space_leave_the_channels(opset: int, axes: list[int] | None) -> None:
    g = build(
        [("MeanVarianceNormalization", "a", "b", {"axes": axes} if axes else {}), LAST], {"wl": w(4, 8, 1, 1)}, opset=opset
    )
    assert together(g, "a.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


def test_mean_and_variance_over_the_channels_are_approximate() -> None:
    g = build([("MeanVarianceNormalization", "a", "b", {"axes": [1, 2, 3]}), LAST], {"wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "MeanVarianceNormalization 'b' sums over it"
    assert {x.remedy for x in g.groups if x.reason and "sums over it" in x.reason} == {"--allow-approximate"}


@pytest.mark.parametrize(("axis", "frozen"), [(1, True), (-1, False)])
def test_cumulative_products(axis: int, frozen: bool) -> None:
    g = build([("CumProd", "a ax", "b"), LAST], {"ax": np.array(axis), "wl": w(4, 8, 1, 1)}, opset=26, ir=10)
    if frozen:
        assert why(g, "a") == "CumProd 'b' accumulates over it"
    else:
        holds(g)


def test_bits_that_are_read_as_another_type() -> None:
    nodes = [("BitCast", "a", "i", {"to": TensorProto.INT32}), ("BitCast", "i", "b", {"to": TensorProto.FLOAT}), LAST]
    g = build(nodes, {"wl": w(4, 8, 1, 1)}, opset=26, ir=10)
    assert together(g, "a.1[3]", "i.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


@pytest.mark.parametrize("training", [False, True])
def test_dropout_that_trains_drops_at_random(training: bool) -> None:
    nodes = [("Dropout", "a ratio train", "b"), LAST]
    g = build(nodes, {"ratio": np.float32(0.5), "train": np.array(training), "wl": w(4, 8, 1, 1)})
    if training:
        assert why(g, "a") == "Dropout 'b' drops at random"
    else:
        holds(g)


@pytest.mark.parametrize("opset", [7, 10, 12, 13, 22])
def test_dropout_that_does_not_train_hands_everything_on(opset: int) -> None:
    holds(build([("Dropout", "a", "b"), LAST], {"wl": w(4, 8, 1, 1)}, opset=opset), 1)


NOW = {"Gelu": 20, "Mish": 18, "HardSwish": 14, "Swish": 24, "Celu": 12, "Shrink": 9, "IsNaN": 9, "IsInf": 10, "Erf": 9}


@pytest.mark.parametrize("op", NOW)
def test_activations_at_their_oldest(op: str) -> None:
    nodes: list[Any] = (
        [(op, "a", "b")] if not op.startswith("Is") else [(op, "a", "q"), ("Cast", "q", "b", {"to": TensorProto.FLOAT})]
    )
    g = build([*nodes, LAST], {"wl": w(4, 8, 1, 1)}, opset=NOW[op], ir=10)
    assert together(g, "a.1[3]", "b.1[3]", "wl.1[3]")
    holds(g, 1)


@pytest.mark.parametrize(
    "op", ["Relu", "Sigmoid", "Tanh", "Elu", "LeakyRelu", "Selu", "Softplus", "Softsign", "HardSigmoid", "Abs", "Clip"]
)
@pytest.mark.parametrize("opset", [7, 22])
def test_activations_at_their_oldest_and_newest(op: str, opset: int) -> None:
    holds(build([(op, "a", "b"), LAST], {"wl": w(4, 8, 1, 1)}, opset=opset, ir=8 if opset < 22 else 10), 1)


def test_group_normalisation() -> None:
    nodes = [("GroupNormalization", "a s h", "b", {"num_groups": 4}), LAST]
    g = build(nodes, {"s": w(8), "h": w(8), "wl": w(4, 8, 1, 1)}, opset=21)
    assert together(g, "a.1[6]", "a.1[7]", "s.0[6]", "s.0[7]", "wl.1[6]")
    assert shape(cut(g, "a.1", [6]), "s") == (6,)
    holds(g)


def test_group_normalisation_as_it_was_first() -> None:
    """Version 18, one scale per group, is deprecated: the checker refuses it, ONNX Runtime does not."""
    nodes = [("GroupNormalization", "a s h", "b", {"num_groups": 4}), LAST]
    g = build(nodes, {"s": w(4), "h": w(4), "wl": w(4, 8, 1, 1)}, opset=18)
    assert together(g, "a.1[6]", "a.1[7]", "s.0[3]", "wl.1[6]")
    plan = oracle.only(g, {owner(g, "a.1[0]")[0].id: [0, 2]})
    oracle.compare(g.net.model, mask(g, plan), surgery(g, plan), {"x": w(1, 3, 6, 6)})


def test_rms_normalisation_over_space() -> None:
    nodes = [("RMSNormalization", "a s", "b", {"axis": 2}), LAST]
    holds(build(nodes, {"s": w(6, 6), "wl": w(4, 8, 1, 1)}, opset=23, ir=10))
    nodes = [("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}), ("RMSNormalization", "t s", "n"), ("MatMul", "n wm", "y")]
    g = build(nodes, {"s": w(8), "wm": w(8, 2)}, opset=23, ir=10)
    assert why(g, "a") == "RMSNormalization 'n' sums over the channels"


def test_a_scale_that_has_the_channels_too_follows_them() -> None:
    """The scale of a layer normalisation may be broadcast against all of its input."""
    g = build([("LayerNormalization", "a s h", "b", {"axis": 2}), LAST], {"s": w(8, 6, 6), "h": w(6, 6), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "s.0[3]", "b.1[3]")
    holds(g)


@pytest.mark.parametrize(
    ("op", "attributes"), [("Bernoulli", {}), ("RandomNormalLike", {"seed": 1.0}), ("RandomUniformLike", {"dtype": 1})]
)
def test_random_numbers_freeze_what_they_take_their_shape_from(op: str, attributes: dict[str, Any]) -> None:
    nodes = [("Sigmoid", "a", "p"), (op, "p", "r", attributes), ("Mul", "r a", "b"), LAST]
    g = build(nodes, {"wl": w(4, 8, 1, 1)})
    assert why(g, "a") == f"{op} 'r' draws numbers at random, and other ones for another shape"


def test_what_depends_on_the_data_freezes_with_the_reason() -> None:
    nodes = [
        ("ReduceMax", "a sp", "m", {"keepdims": 0}),
        ("NonZero", "m", "n"),
        ("Cast", "n", "f", {"to": 1}),
        ("ReduceSum", "f", "s"),
    ]
    g = build([*nodes, ("Add", "a s", "b"), LAST], {"sp": ints(2, 3), "wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "NonZero 'n' finds as many positions as the data have"
    assert prunable(g, "a") == 0


def test_a_causal_convolution_of_the_standard_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")  # ONNX Runtime 1.31 has opset 27, but as a preview
    nodes = [("Reshape", "a s", "f"), ("CausalConvWithState", "f w1 b1", "b st", {"activation": "swish"}), LAST]
    g = build(nodes, {"s": ints(1, 8, 36), "w1": w(8, 1, 3), "b1": w(8), "wl": w(4, 8, 1)}, opset=27, ir=10)
    assert together(g, "a.1[3]", "w1.0[3]", "b1.0[3]", "b.1[3]", "st.1[3]", "wl.1[3]")
    holds(g)


def unrun(nodes: list[onnx.NodeProto], tensors: dict[str, Any], shapes: dict[str, tuple[int, ...]], opset: int) -> Groups:
    """The groups of a model that no runtime runs yet, from the shapes that its tensors must have."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in "xy")
    graph = helper.make_graph(nodes, "net", [x], [y], [numpy_helper.from_array(v, k) for k, v in tensors.items()])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return group(Network(model, {**shapes, **{k: v.shape for k, v in tensors.items()}}, {}))


def test_a_gated_activation_that_no_runtime_has_yet() -> None:
    nodes = [helper.make_node("MatMul", ["x", n], [f"{n}x"]) for n in ("wa", "wb")]
    nodes += [helper.make_node("SwiGLU", ["wax", "wbx"], ["h"]), helper.make_node("MatMul", ["h", "wl"], ["y"])]
    shapes = {"x": (3, 4), "wax": (3, 6), "wbx": (3, 6), "h": (3, 6), "y": (3, 2)}
    g = unrun(nodes, {"wa": w(4, 6), "wb": w(4, 6), "wl": w(6, 2)}, shapes, 28)
    assert together(g, "wa.1[3]", "wb.1[3]", "wax.1[3]", "wbx.1[3]", "h.1[3]", "wl.0[3]")
    assert prunable(g, "h") == 6


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_both_orders_of_space_to_depth(mode: str) -> None:
    """Against the reference implementation: which channel does every output channel come from?"""
    moved = helper.make_node("SpaceToDepth", ["a"], ["b"], blocksize=2, mode=mode)
    nodes = [helper.make_node("Conv", ["x", "wa"], ["a"]), moved, helper.make_node("Conv", ["b", "wl"], ["y"])]
    shapes = {"x": (1, 3, 4, 4), "a": (1, 5, 4, 4), "b": (1, 20, 2, 2), "y": (1, 2, 2, 2)}
    g = unrun(nodes, {"wa": w(5, 3, 1, 1), "wl": w(2, 20, 1, 1)}, shapes, 28)
    labels = np.broadcast_to(np.arange(5, dtype=np.float32).reshape(1, 5, 1, 1), shapes["a"])
    made = ReferenceEvaluator(moved).run(None, {"a": labels})[0]
    for channel, source in enumerate(made[0, :, 0, 0]):
        assert together(g, f"b.1[{channel}]", f"a.1[{int(source)}]")


@pytest.mark.parametrize("cut", [False, True])
def test_a_group_norm_of_one_group_as_torch_writes_it(cut: bool) -> None:
    """[N, C, H, W] -> [N, 1, C * H * W], normalised as one instance: all channels together, like a layer normalisation."""
    nodes = [("Reshape", "a one", "r"), ("InstanceNormalization", "r s z", "n"), ("Shape", "a", "sh"), ("Reshape", "n sh", "m")]
    nodes += [("Mul", "m g", "b"), LAST]
    weights = {"one": ints(0, 1, -1), "s": np.ones(1, np.float32), "z": np.zeros(1, np.float32), "g": w(8, 1, 1)}
    g = build(nodes, {**weights, "wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "InstanceNormalization 'n' normalises over it"
    assert {x.remedy for x in g.groups if x.frozen and "normalises" in str(x.reason)} == {"--allow-approximate"}
    if cut:
        found = group(g.net, approximate=True)
        assert [x.size for x in found.prunable] == [8] and not found.prunable[0].exact
        pruned = surgery(found, Plan({found.prunable[0].id: Kept(8, np.array([1, 4, 6]))}))
        assert runtime.run(runtime.session(pruned), g.net.feeds)[0].shape == (1, 4, 6, 6)


@pytest.mark.parametrize(
    ("nodes", "words"),
    [
        ([("ReduceMean", "a", "m", {"axes": [1]}), ("Sub", "a m", "b")], "takes the mean over it for a layer normalisation"),
        (
            [
                ("Mul", "a a", "q"),
                ("ReduceMean", "q", "m", {"axes": [1]}),
                ("Add", "m e", "v"),
                ("Sqrt", "v", "r"),
                ("Div", "a r", "b"),
            ],
            "takes the mean square over it for a layer normalisation",
        ),
        ([("ReduceMean", "a", "m", {"axes": [1]}), ("Add", "a m", "b")], "sums over it without weights"),
    ],
)
def test_the_reason_says_that_it_is_a_layer_normalisation(nodes: list[Any], words: str) -> None:
    g = build([*nodes, LAST], {"e": np.float32(1e-5), "wl": w(4, 8, 1, 1)}, opset=17)
    assert why(g, "a") == f"ReduceMean 'm' {words}"
