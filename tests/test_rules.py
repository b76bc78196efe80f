"""Every operator rule by itself: what it ties, what it freezes and in which words, and that the cut that follows is right."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from axes import owner, prunable, together, why
from onnx import TensorProto
from single import FLAT, LAST, attribute, build, cut, holds, ints, node, operand, seeded, shape, w

from onnxprune import runtime
from onnxprune.channels import Dim, Tie
from onnxprune.groups import Groups
from onnxprune.passes.group import group
from onnxprune.passes.surgery import surgery
from onnxprune.rules import STANDARD, Rule, table
from onnxprune.rules.reshape import axis_blocks

__all__ = ["seeded"]  # every test draws the same weights


# ---- convolutions


def test_conv_ties_filters_bias_and_the_next_layer() -> None:
    g = build([("Conv", "a w1 b1", "b"), ("Conv", "b wl", "y")], {"w1": w(6, 8, 3, 3), "b1": w(6), "wl": w(4, 6, 1, 1)})
    assert [(x.id, x.size, x.frozen) for x in g.groups] == [("wa", 3, True), ("a", 8, False), ("b", 6, False), ("y", 4, True)]
    assert together(g, "b.1[4]", "w1.0[4]", "b1.0[4]", "wl.1[4]")
    assert why(g, "wa") == "it comes from graph input 'x'"
    assert why(g, "y") == "it is graph output 'y'"
    assert {str(d): role for d, role in g.roles.items()} == {
        "wa[axis 0]": "producer",
        "wa[axis 1]": "consumer",
        "w1[axis 0]": "producer",
        "w1[axis 1]": "consumer",
        "b1[axis 0]": "producer",
        "wl[axis 0]": "producer",
        "wl[axis 1]": "consumer",
    }
    pruned = cut(g, "b.1", [0, 5])
    assert (shape(pruned, "w1"), shape(pruned, "b1"), shape(pruned, "wl")) == ((4, 8, 3, 3), (4,), (4, 4, 1, 1))
    holds(g)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("multiplier", [1, 3])
def test_depthwise_conv_goes_with_its_input_and_all_its_multiples(rank: int, multiplier: int) -> None:
    taps, x = [1] * rank, (1, 3, *[5] * rank)
    weights = {"wd": w(8 * multiplier, 1, *[3] * rank), "wl": w(4, 8 * multiplier, *taps)}
    g = build([("Conv", "a wd", "b", {"group": 8}), LAST], weights, x=x)
    assert together(g, "a.1[5]", "wa.0[5]", *(f"b.1[{5 * multiplier + m}]" for m in range(multiplier)))
    assert prunable(g, "b") == 8
    pruned = cut(g, "a.1", [1, 2, 7])
    assert attribute(pruned, "b", "group") == 5
    assert shape(pruned, "wd")[0] == 5 * multiplier
    holds(g)


def test_grouped_conv_with_narrow_groups_is_cut_by_whole_groups() -> None:
    g = build([("Conv", "a wg", "b", {"group": 4}), LAST], {"wg": w(12, 2, 3, 3), "wl": w(4, 12, 1, 1)})
    assert together(g, "a.1[2]", "a.1[3]", "b.1[3]", "b.1[4]", "b.1[5]")
    assert not together(g, "a.1[1]", "a.1[2]")
    pruned = cut(g, "a.1", [2])
    assert attribute(pruned, "b", "group") == 3
    assert shape(pruned, "wg") == (9, 2, 3, 3)
    holds(g)


def test_grouped_conv_with_wide_groups_is_cut_inside_every_group() -> None:
    g = build([("Conv", "a wg", "b", {"group": 2}), LAST], {"wg": w(6, 4, 3, 3), "wl": w(4, 6, 1, 1)})
    assert together(g, "a.1[1]", "a.1[5]", "wg.1[1]")
    assert together(g, "b.1[2]", "b.1[5]", "wg.0[2]", "wg.0[5]")
    assert not together(g, "a.1[1]", "b.1[1]")
    pruned = cut(g, "a.1", [0, 3])
    assert attribute(pruned, "b", "group") == 2
    assert shape(pruned, "wg") == (6, 2, 3, 3)
    holds(g)


def test_wide_groups_of_one_filter_each_keep_all_filters() -> None:
    g = build([("Conv", "a wg", "b", {"group": 2}), LAST], {"wg": w(2, 4, 1, 1), "wl": w(4, 2, 1, 1)})
    assert together(g, "b.1[0]", "b.1[1]")
    assert prunable(g, "a") == 4
    holds(g)


@pytest.mark.parametrize(
    ("groups", "width", "tied", "units"),
    [
        (1, 5, ["b.1[3]", "wt.1[3]", "bt.0[3]", "wl.1[3]"], 5),
        (2, 3, ["b.1[1]", "b.1[4]", "wt.1[1]", "wl.1[4]"], 3),  # inside the groups
        (4, 1, ["a.1[4]", "a.1[5]", "b.1[2]", "wt.0[4]", "wt.0[5]"], 4),  # whole groups
        (8, 2, ["a.1[6]", "b.1[12]", "b.1[13]", "wt.0[6]"], 8),  # depthwise
    ],
)
def test_conv_transpose(groups: int, width: int, tied: list[str], units: int) -> None:
    weights = {"wt": w(8, width, 2, 2), "bt": w(groups * width), "wl": w(3, groups * width, 1, 1)}
    g = build([("ConvTranspose", "a wt bt", "b", {"group": groups, "strides": [2, 2]}), LAST], weights)
    assert together(g, *tied)
    assert prunable(g, "b") == units
    assert attribute(holds(g), "b", "group") == (groups if groups < 4 else groups - 1)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_a_weight_that_is_computed_from_data_freezes_what_it_sums_over(op: str) -> None:
    nodes = [("ReduceMean", "x", "s"), ("Mul", "wr s", "wd"), (op, "a wd", "y")]
    g = build(nodes, {"wr": w(8, 8, 1, 1)})
    assert f"{op} 'y' has a weight that no constant silences" in why(g, "a")


@pytest.mark.parametrize(
    ("nodes", "exact"),
    [
        ([("Identity", "wr", "wi"), ("Identity", "wi", "wl")], True),
        ([("Mul", "wr k", "wl")], True),  # a folded normalisation
        ([("Cast", "wr", "wc", {"to": TensorProto.FLOAT}), ("Concat", "wc wc", "wl", {"axis": 0})], True),
        ([("Exp", "wr", "wl")], False),  # exp(0) = 1
        ([("Add", "wr k", "wl")], False),
        ([("Div", "wr d", "wl")], False),  # 0 / 0
    ],
)
def test_a_weight_that_is_computed_from_constants(nodes: list[tuple[Any, ...]], exact: bool) -> None:
    """Masking zeroes constants of the file, so what is made of them must turn zero as well."""
    weights = {"wr": w(4, 8, 1, 1), "k": w(4, 1, 1, 1), "d": 1 + w(1, 8, 1, 1) ** 2}
    g = build([("Relu", "a", "b"), *nodes, LAST], weights)
    if exact:
        assert prunable(g, "a") == 8
        assert [role for d, role in g.roles.items() if d.tensor == "wr" and d.axis == 1] == ["consumer"]
        holds(g)
    else:
        assert "Conv 'y' has a weight that no constant silences" in why(g, "a")


# ---- Gemm and MatMul


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("c", [None, (), (1,), (5,), (1, 5), (1, 1)])
def test_gemm_with_the_weight_on_the_right(trans: int, c: tuple[int, ...] | None) -> None:
    weights = {"wg": w(5, 8) if trans else w(8, 5), "wl": w(5, 2), **({} if c is None else {"c": w(*c)})}
    nodes = [
        ("GlobalAveragePool", "a", "p"),
        ("Flatten", "p", "f"),
        ("Gemm", "f wg" + ("" if c is None else " c"), "b", {"transB": trans, "alpha": 0.5, "beta": 2.0}),
        ("Gemm", "b wl", "y"),
    ]
    g = build(nodes, weights)
    assert together(g, "a.1[6]", f"wg.{trans}[6]")
    assert together(g, "b.1[2]", f"wg.{1 - trans}[2]", "wl.0[2]", *([f"c.{len(c) - 1}[2]"] if c and c[-1] == 5 else []))
    holds(g)


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("c", [(1,), (5, 1)])
def test_gemm_with_the_weight_on_the_left(trans: int, c: tuple[int, ...]) -> None:
    weights = {"wg": w(8, 5) if trans else w(5, 8), "c": w(*c), "wl": w(2, 5)}
    nodes = [
        ("GlobalAveragePool", "a", "p"),
        ("Flatten", "p", "f", {"axis": 2}),  # [C, 1]
        ("Gemm", "wg f c", "b", {"transA": trans}),
        ("Gemm", "wl b", "y"),
    ]
    g = build(nodes, weights)
    assert together(g, "a.1[6]", f"wg.{1 - trans}[6]")
    assert together(g, "b.0[2]", f"wg.{trans}[2]", "wl.1[2]", *(["c.0[2]"] if c[0] == 5 else []))
    holds(g)


def test_matmul_on_either_side_of_a_tensor_of_any_rank() -> None:
    nodes = [*FLAT, ("MatMul", "wl f", "b"), ("Transpose", "b", "t", {"perm": [0, 2, 1]}), ("MatMul", "t wr", "y")]
    g = build(nodes, {"sf": ints(1, 8, 36), "wl": w(5, 8), "wr": w(5, 2)})
    assert together(g, "a.1[3]", "f.1[3]", "wl.1[3]")
    assert together(g, "b.1[4]", "wl.0[4]", "t.2[4]", "wr.0[4]")
    assert cut(g, "b.1", [1])
    holds(g)


def test_a_bias_before_or_behind_a_matmul_follows() -> None:
    nodes = [
        ("GlobalAveragePool", "a", "p"),
        ("Flatten", "p", "f"),
        ("MatMul", "f w1", "m"),
        ("Add", "b1 m", "b"),
        ("MatMul", "b wl", "y"),
    ]
    g = build(nodes, {"w1": w(8, 5), "b1": w(5), "wl": w(5, 2)})
    assert together(g, "m.1[2]", "b1.0[2]", "wl.0[2]")
    holds(g)


def products(*between: tuple[Any, ...], last: str = "a") -> Groups:
    """The Gram matrix of the channels of `a`, after the nodes `between`, applied to those of `c`."""
    nodes = [
        *between,
        ("Reshape", f"{last} sf", "f"),
        ("Reshape", "c sf", "v"),
        ("Transpose", "f", "t", {"perm": [0, 2, 1]}),
        ("MatMul", "t f", "s"),  # sums over the channels of a
        ("MatMul", "v s", "b"),  # hands on those of c
        ("MatMul", "wl b", "y"),
    ]
    return build([("Conv", "x wc", "c"), *nodes], {"sf": ints(1, 8, 36), "wc": w(8, 3, 1, 1), "wl": w(2, 8)})


def test_a_product_of_activations_is_masked_where_one_of_them_is_made() -> None:
    for g in (products(), products(("Tanh", "a", "r"), last="r")):
        assert prunable(g, "a") == prunable(g, "c") == 8
        assert next(r for d, r in g.roles.items() if d == Dim("wa", 0)) == "silencer"
        assert all(x.exact for x in g.groups)
        holds(g)


def test_a_product_of_activations_that_nothing_silences_freezes_what_it_sums_over_only() -> None:
    g = products(("Sigmoid", "a", "r"), last="r")  # makes one half of zero
    assert why(g, "a") == "MatMul 's' sums products of activations over it, and none of them can be silenced where it is made"
    assert prunable(g, "c") == 8
    holds(g)


def test_matmul_with_a_weight_for_every_batch_entry_or_with_vectors_freezes() -> None:
    nodes = [*FLAT, ("Transpose", "f", "t", {"perm": [0, 2, 1]}), ("MatMul", "t wb", "y")]
    g = build(nodes, {"sf": ints(2, 8, 36), "wb": w(2, 8, 3)}, x=(2, 3, 6, 6))
    assert why(g, "a") == "MatMul 'y' has a weight of its own for every batch entry"
    nodes = [("ReduceMean", "a ax", "m", {"keepdims": 0}), ("MatMul", "m wv", "y")]
    g = build(nodes, {"ax": ints(0, 2, 3), "wv": w(8)})
    assert why(g, "a") == "MatMul 'y' mixes its positions"


# ---- normalisation


def test_batch_norm_vectors_follow_its_channels() -> None:
    weights = {"s": w(8), "h": w(8), "m": w(8), "v": w(8) ** 2, "wl": w(4, 8, 1, 1)}
    g = build([("BatchNormalization", "a s h m v", "b"), LAST], weights)
    assert together(g, "a.1[2]", "b.1[2]", *(f"{t}.0[2]" for t in "shmv"))
    assert g.roles[next(d for d in g.at if d.tensor == "s")] == "scale"
    assert shape(cut(g, "b.1", [2]), "v") == (7,)
    holds(g)


def test_batch_norm_in_training_mode_takes_statistics_over_the_other_axes() -> None:
    weights = {"s": w(8), "h": w(8), "m": w(8), "v": w(8) ** 2, "wl": w(4, 8, 1, 1)}
    g = build([("BatchNormalization", "a s h m v", "b m2 v2", {"training_mode": 1}), LAST], weights)
    assert prunable(g, "a") == 8
    holds(g)
    nodes = [("Reshape", "w2 long", "r"), ("BatchNormalization", "r s h m v", "n m2 v2", {"training_mode": 1})]
    nodes += [("Reshape", "n back", "k"), ("Conv", "a k", "b"), LAST]
    ones = {k: np.ones(8, np.float32) for k in "sv"} | {k: np.zeros(8, np.float32) for k in "hm"}
    g = build(nodes, {**ones, "w2": w(8, 8, 1, 1), "long": ints(1, 8, 8), "back": ints(8, 8, 1, 1), "wl": weights["wl"]})
    assert why(g, "a") == "BatchNormalization 'n' runs in training mode: it takes statistics over it"
    assert {x.remedy for x in g.groups if "training mode" in str(x.reason)} == {
        "fold the computation of the weight (onnxsim does)"
    }
    assert prunable(g, "b") == 8
    holds(g)


def test_vectors_that_layers_share_by_accident_are_unshared() -> None:
    nodes = [("BatchNormalization", "a ones zeros zeros ones", "b"), ("Conv", "b w2 zeros", "c"), ("Conv", "c wl", "y")]
    g = build(
        nodes, {"ones": np.ones(8, np.float32), "zeros": np.zeros(8, np.float32), "w2": w(8, 8, 1, 1), "wl": w(2, 8, 1, 1)}
    )
    assert not together(g, "a.1[3]", "c.1[3]")
    pruned = cut(g, "a.1", [0, 1, 2])
    reads = node(pruned, "b").input
    assert reads[2] == reads[3] != "zeros"  # one new vector for the two equal uses
    assert node(pruned, "c").input[2] == "zeros"
    assert shape(pruned, reads[2]) == (5,)
    assert shape(pruned, "zeros") == (8,)
    holds(g)


def test_a_shared_vector_that_is_cut_alike_everywhere_stays_shared() -> None:
    g = build([("BatchNormalization", "a v z z v", "b"), LAST], {"v": np.ones(8, np.float32), "z": w(8), "wl": w(2, 8, 1, 1)})
    pruned = cut(g, "a.1", [1])
    assert list(node(pruned, "b").input) == ["a", "v", "z", "z", "v"]
    assert len(pruned.graph.initializer) == len(g.net.model.graph.initializer)


def test_a_shared_vector_that_is_also_an_output_keeps_its_value() -> None:
    g = build([("Add", "a v", "b"), LAST], {"v": w(8, 1, 1), "wl": w(2, 8, 1, 1)}, outputs="y v")
    assert why(g, "a") == "it is graph output 'v'"
    g = build([("Add", "a v", "c"), ("Mul", "c v", "b"), LAST], {"v": w(8, 1, 1), "wl": w(2, 8, 1, 1)}, outputs="y v")
    assert shape(holds(g), "v") == (8, 1, 1)


def test_before_ir_version_4_a_new_initializer_is_listed_as_input_too() -> None:
    nodes = [("BatchNormalization", "a one z z one", "b"), ("Conv", "b w2 z", "c"), ("Conv", "c wl", "y")]
    weights = {"one": np.ones(8, np.float32), "z": np.zeros(8, np.float32), "w2": w(8, 8, 1, 1), "wl": w(2, 8, 1, 1)}
    g = build(nodes, weights, opset=9, ir=3)
    pruned = cut(g, "a.1", [0])
    declared = {i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in pruned.graph.input}
    assert declared["wa"] == [7, 3, 1, 1]
    assert declared[node(pruned, "b").input[2]] == [7]
    holds(g)


def test_instance_norm_follows_and_keeps_its_channels_apart() -> None:
    g = build([("InstanceNormalization", "a s h", "b"), LAST], {"s": w(8), "h": w(8), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[2]", "b.1[2]", "s.0[2]", "h.0[2]")
    holds(g)


@pytest.mark.parametrize(
    ("op", "opset", "attributes", "words"),
    [
        ("Softmax", 18, {"axis": 1}, "normalises over it"),
        ("LogSoftmax", 18, {"axis": -3}, "normalises over it"),
        ("Hardmax", 18, {"axis": 1}, "normalises over it"),
        ("Softmax", 12, {"axis": 1}, "normalises over it"),  # flattened from axis 1 on
        ("Softmax", 12, {}, "normalises over it"),
        ("LRN", 18, {"size": 3}, "normalises over neighbouring channels"),
        ("LpNormalization", 18, {"axis": 1}, "normalises over it"),
    ],
)
def test_what_normalises_over_the_channels_freezes_them(op: str, opset: int, attributes: dict[str, int], words: str) -> None:
    g = build([(op, "a", "b", attributes), LAST], {"wl": w(4, 8, 1, 1)}, opset=opset)
    assert why(g, "a") == f"{op} 'b' {words}"
    assert "b" in why(g, "wl")  # what follows has no channels to cut


@pytest.mark.parametrize(
    ("op", "opset", "attributes"),
    [("Softmax", 18, {"axis": 3}), ("Softmax", 18, {}), ("Softmax", 12, {"axis": 2}), ("LpNormalization", 18, {"axis": 2})],
)
def test_what_normalises_over_space_hands_the_channels_on(op: str, opset: int, attributes: dict[str, int]) -> None:
    g = build([(op, "a", "b", attributes), LAST], {"wl": w(4, 8, 1, 1)}, opset=opset)
    assert together(g, "a.1[7]", "b.1[7]", "wl.1[7]")
    holds(g)


def test_layer_norm() -> None:
    last = [("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}), ("LayerNormalization", "t s h", "n", {"axis": -1})]
    g = build([*last, ("Transpose", "n", "b", {"perm": [0, 3, 1, 2]}), LAST], {"s": w(8), "h": w(8), "wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "LayerNormalization 'n' sums over the channels"
    space = [("LayerNormalization", "a s", "b", {"axis": 2}), LAST]
    holds(build(space, {"s": w(6, 6), "wl": w(4, 8, 1, 1)}))
    stats = [("LayerNormalization", "a s", "b m", {"axis": 2}), ("ReduceSum", "m", "r", {"keepdims": 0}), ("Add", "b r", "c")]
    g = build([*stats, ("Conv", "c wl", "y")], {"s": w(6, 6), "wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "LayerNormalization 'b' also outputs its statistics"


@pytest.mark.parametrize(("axis", "frozen"), [(1, True), (3, False)])
def test_cum_sum(axis: int, frozen: bool) -> None:
    g = build([("CumSum", "a ax", "b"), LAST], {"ax": np.array(axis), "wl": w(4, 8, 1, 1)})
    if frozen:
        assert why(g, "a") == "CumSum 'b' accumulates over it"
    else:
        holds(g)


# ---- element by element


@pytest.mark.parametrize("op", ["Relu", "Sigmoid", "Tanh", "HardSwish", "Softplus", "Erf", "Abs", "Identity", "Neg", "Elu"])
def test_unary_operators_hand_all_axes_on(op: str) -> None:
    g = build([(op, "a", "b"), LAST], {"wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[1]", "b.1[1]", "wl.1[1]")
    holds(g, 1)


@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Max", "Min", "Pow", "PRelu", "Sum", "Mean"])
@pytest.mark.parametrize("const", [(8, 1, 1), (1, 8, 1, 1), (8, 6, 6)])
def test_a_constant_along_the_channels_follows_them(op: str, const: tuple[int, ...]) -> None:
    weights = {"k": w(*const), "wl": w(4, 8, 1, 1)}
    nodes = [("Sigmoid", "a", "s"), (op, "s k", "b"), LAST]
    g = build(nodes, weights)
    axis = const.index(8)
    assert together(g, "a.1[5]", f"k.{axis}[5]", "b.1[5]")
    assert shape(cut(g, "a.1", [5]), "k") == tuple(7 if n == 8 else n for n in const)
    holds(g, 1)


@pytest.mark.parametrize("const", [(), (1,), (6,), (6, 1), (1, 1, 6, 6)])
def test_a_constant_across_space_does_not(const: tuple[int, ...]) -> None:
    g = build([("Mul", "k a", "b"), LAST], {"k": w(*const), "wl": w(4, 8, 1, 1)})
    assert shape(holds(g), "k") == const
    assert not any(x.reason is None for d, gs in g.at.items() if d.tensor == "k" for x, _ in gs)


def test_channels_are_not_taken_for_space_of_the_same_size() -> None:
    g = build([("Add", "a k", "b"), LAST], {"k": w(8), "wl": w(4, 8, 1, 1)}, x=(1, 3, 6, 8))
    assert prunable(g, "a") == 8
    assert shape(cut(g, "a.1", [0]), "k") == (8,)


def test_addition_couples_branches_and_a_gate_of_one_channel_none() -> None:
    nodes = [
        ("Conv", "a wr", "r"),
        ("Add", "r a", "s"),
        ("Conv", "s wg", "g"),
        ("Sigmoid", "g", "h"),
        ("Mul", "s h", "b"),
        LAST,
    ]
    g = build(nodes, {"wr": w(8, 8, 1, 1), "wg": w(1, 8, 1, 1), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[4]", "r.1[4]", "wr.0[4]", "wr.1[4]", "wg.1[4]", "wl.1[4]")
    holds(g)


def test_adding_the_input_freezes() -> None:
    g = build([("Conv", "a w2", "c"), ("Add", "c x", "b"), LAST], {"w2": w(3, 8, 1, 1), "wl": w(4, 3, 1, 1)})
    assert why(g, "c") == "it comes from graph input 'x'"
    assert prunable(g, "a") == 8
    holds(g)


def test_where_ties_all_three() -> None:
    nodes = [("Conv", "x w2", "c"), ("Where", "k a c", "b"), LAST]
    g = build(nodes, {"k": w(8, 1, 1) > 0, "w2": w(8, 3, 1, 1), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "c.1[3]", "k.0[3]", "wl.1[3]")
    holds(g)


@pytest.mark.parametrize("slope", [(1,), (8, 1, 1)])
def test_prelu(slope: tuple[int, ...]) -> None:
    g = build([("PRelu", "a k", "b"), LAST], {"k": w(*slope), "wl": w(4, 8, 1, 1)})
    assert shape(cut(g, "a.1", [0, 1]), "k") == ((6, 1, 1) if len(slope) > 1 else (1,))
    holds(g)


def test_clip_and_dropout() -> None:
    nodes = [("Clip", "a lo hi", "c"), ("Dropout", "c", "b mask"), LAST]
    g = build(nodes, {"lo": np.float32(-1), "hi": np.float32(1), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[1]", "b.1[1]", "wl.1[1]")
    holds(g)


# ---- pooling and reductions


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("MaxPool", {"kernel_shape": [2, 2]}),
        ("AveragePool", {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}),
        ("LpPool", {"kernel_shape": [2, 2]}),
        ("GlobalAveragePool", {}),
        ("GlobalMaxPool", {}),
        ("GlobalLpPool", {}),
    ],
)
def test_pooling_hands_the_channels_on(op: str, attributes: dict[str, Any]) -> None:
    g = build([(op, "a", "b", attributes), LAST], {"wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[6]", "b.1[6]", "wl.1[6]")
    holds(g)


def test_max_pool_with_indices_freezes() -> None:
    g = build([("MaxPool", "a", "b i", {"kernel_shape": [2, 2]}), LAST], {"wl": w(4, 8, 1, 1)}, outputs="y i")
    assert why(g, "a") == "MaxPool 'b' also outputs indices, which count through the channels"


@pytest.mark.parametrize("op", ["ReduceMean", "ReduceSum", "ReduceMax", "ReduceL2", "ReduceLogSumExp"])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("opset", [11, 18])
def test_reductions_over_space(op: str, keep: int, opset: int) -> None:
    as_input = opset >= (13 if op == "ReduceSum" else 18)
    attributes = {"keepdims": keep, **({} if as_input else {"axes": [-1, 2]})}
    nodes = [
        (op, "a ax" if as_input else "a", "b", attributes),
        ("Conv", "b wl", "y") if keep else ("MatMul", "b wm", "y"),
    ]
    weights = {"wl": w(4, 8, 1, 1), "wm": w(8, 4), **({"ax": ints(-1, 2)} if as_input else {})}
    g = build(nodes, weights, opset=opset)
    assert together(g, "a.1[6]", "b.1[6]", "wl.1[6]" if keep else "wm.0[6]")
    holds(g)


@pytest.mark.parametrize("keep", [0, 1])
def test_reductions_in_front_of_the_channels(keep: int) -> None:
    nodes = [
        ("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}),
        ("ReduceMean", "t ax", "b", {"keepdims": keep}),
        ("MatMul", "b wm", "y"),
    ]
    g = build(nodes, {"ax": ints(1), "wm": w(8, 4)})
    assert together(g, "a.1[6]", f"b.{3 if keep else 2}[6]", "wm.0[6]")
    holds(g)


@pytest.mark.parametrize("axes", [[1], [1, 2, 3], [], [-3]])
def test_reductions_over_the_channels_freeze(axes: list[int]) -> None:
    nodes = [("ReduceMean", "a ax" if axes else "a", "r"), ("Sub", "a r", "b"), LAST]
    g = build(nodes, {"ax": ints(*axes), "wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "ReduceMean 'r' takes the mean over it for a layer normalisation"


def test_a_reduction_over_no_axes_hands_everything_on() -> None:
    holds(build([("ReduceSum", "a ax", "b", {"noop_with_empty_axes": 1}), LAST], {"ax": ints(), "wl": w(4, 8, 1, 1)}))


# ---- data movement


def test_concat_puts_positions_behind_each_other() -> None:
    nodes = [("Conv", "x w2", "c"), ("Concat", "c a c", "b", {"axis": -3}), LAST]
    g = build(nodes, {"w2": w(3, 3, 1, 1), "wl": w(4, 14, 1, 1)})
    assert together(g, "c.1[1]", "b.1[1]", "b.1[12]", "wl.1[12]")
    assert together(g, "a.1[0]", "b.1[3]")
    assert shape(cut(g, "c.1", [2]), "wl") == (4, 12, 1, 1)
    holds(g)


def test_concat_of_one_channel_keeps_it() -> None:
    g = build([("Conv", "x w2", "c"), ("Concat", "a c", "b", {"axis": 1}), LAST], {"w2": w(1, 3, 1, 1), "wl": w(4, 9, 1, 1)})
    found, channel = owner(g, "b.1[8]")
    assert found.frozen and channel == 0
    assert prunable(g, "b") == 8
    holds(g)


@pytest.mark.parametrize(
    ("opset", "reads", "attributes", "sizes"),
    [
        (11, "a", {}, [4, 4]),
        (11, "a", {"split": [5, 3]}, [5, 3]),
        (13, "a", {}, [4, 4]),
        (13, "a sz", {}, [5, 3]),
        (18, "a", {"num_outputs": 2}, [4, 4]),
        (18, "a sz", {}, [5, 3]),
    ],
)
def test_split(opset: int, reads: str, attributes: dict[str, Any], sizes: list[int]) -> None:
    """An even split would split evenly, and wrongly, after an uneven cut: the sizes are written out."""
    nodes = [
        ("Split", reads, "p q", {"axis": 1, **attributes}),
        ("Conv", "p wp", "r"),
        ("Conv", "q wq", "s"),
        ("Add", "r s", "y"),
    ]
    weights = {"wp": w(2, sizes[0], 1, 1), "wq": w(2, sizes[1], 1, 1), **({"sz": ints(*sizes)} if "sz" in reads else {})}
    g = build(nodes, weights, opset=opset)
    first = sizes[0]
    assert together(g, f"a.1[{first}]", "q.1[0]", "wq.1[0]")
    pruned = cut(g, "a.1", [0, 1, first])
    new = [first - 2, sizes[1] - 1]
    assert (attribute(pruned, "p", "split") if opset < 13 else operand(pruned, "p", 1)) == new
    assert attribute(pruned, "p", "num_outputs") is None
    holds(g)


def test_split_along_space_stays_as_it_is() -> None:
    nodes = [("Split", "a", "p q", {"axis": 3, "num_outputs": 2}), ("Add", "p q", "b"), LAST]
    g = build(nodes, {"wl": w(4, 8, 1, 1)})
    assert attribute(holds(g), "p", "num_outputs") == 2


RANGE = {"s": ints(2), "e": ints(6), "ax": ints(1), "one": ints(1), "wl": w(4, 4, 1, 1)}


@pytest.mark.parametrize(
    ("opset", "reads", "attributes"),
    [(9, "a", {"axes": [1], "starts": [2], "ends": [6]}), (18, "a s e ax", {}), (18, "a s e ax one", {})],
)
def test_slice_of_a_range(opset: int, reads: str, attributes: dict[str, Any]) -> None:
    g = build([("Slice", reads, "b", attributes), LAST], RANGE if opset > 9 else {"wl": RANGE["wl"]}, opset=opset)
    assert together(g, "a.1[2]", "b.1[0]", "wl.1[0]")
    assert prunable(g, "a") == 8  # those that are not taken can go as well
    pruned = cut(g, "a.1", [0, 4, 7])
    if opset == 9:
        assert (attribute(pruned, "b", "starts"), attribute(pruned, "b", "ends")) == ([1], [4])
    else:
        assert (operand(pruned, "b", 1), operand(pruned, "b", 2)) == ([1], [4])
    holds(g)


def test_slice_backwards() -> None:
    weights = {"s": ints(-1), "e": ints(-(2**31)), "ax": ints(-3), "st": ints(-1), "wl": w(4, 8, 1, 1)}
    g = build([("Slice", "a s e ax st", "b"), LAST], weights)
    assert together(g, "a.1[0]", "b.1[7]")
    holds(g)


def test_slice_with_32_bit_operands_gets_operands_of_one_type() -> None:
    weights = {"s": np.array([0, 2], np.int32), "e": np.array([1, 6], np.int32), "wl": RANGE["wl"]}
    g = build([("Slice", "a s e", "b"), LAST], weights)
    pruned = holds(g)
    kinds = {t.name: t.data_type for t in pruned.graph.initializer}
    assert {kinds[name] for name in node(pruned, "b").input[1:]} == {TensorProto.INT32}


def test_slice_with_bounds_made_at_run_time_freezes_channels() -> None:
    weights = {"z": ints(0, 0), "e": ints(2**31, 2**31), "ax": ints(2, 3), "two": ints(2, 2), "wl": w(4, 8, 1, 1)}
    holds(build([("Slice", "a z e ax two", "b"), LAST], weights))
    most = [("ReduceMax", "x", "m", {"keepdims": 0}), ("Cast", "m", "n", {"to": TensorProto.INT64}), ("Clip", "n six six", "k")]
    half = [*most, ("Reshape", "k one", "h"), ("Slice", "a z h ax", "b"), LAST]
    g = build(half, {"six": np.int64(6), "one": ints(1), "z": ints(0), "ax": ints(1), "wl": w(4, 6, 1, 1)})
    assert "Slice 'b' computes its bounds at run time" in {x.reason for x in g.groups}


def test_pad_of_channels_makes_channels_that_can_go() -> None:
    nodes = [("Pad", "a p", "q"), ("Conv", "x w2", "c"), ("Add", "c q", "b"), LAST]
    g = build(nodes, {"p": ints(0, 3, 0, 0, 0, 1, 0, 0), "w2": w(12, 3, 1, 1), "wl": w(4, 12, 1, 1)})
    assert together(g, "a.1[0]", "q.1[3]", "c.1[3]", "w2.0[3]")
    assert together(g, "q.1[11]", "w2.0[11]")
    assert prunable(g, "c") == 12
    pruned = cut(g, "c.1", [0, 1, 5, 11])
    assert operand(pruned, "q", 1) == [0, 1, 0, 0, 0, 0, 0, 0]
    holds(g)


def test_pad_by_attribute() -> None:
    g = build([("Pad", "a", "b", {"pads": [0, 1, 2, 2, 0, 2, 2, 2]}), LAST], {"wl": w(4, 11, 1, 1)}, opset=10)
    assert attribute(cut(g, "b.1", [0, 10, 4]), "b", "pads") == [0, 0, 2, 2, 0, 1, 2, 2]
    holds(g)


def test_pad_that_crops_another_axis_still_does() -> None:
    g = build([("Pad", "a p", "b"), LAST], {"p": ints(0, 1, -1, 0, 0, 1, 0, 2), "wl": w(4, 10, 1, 1)})
    assert operand(cut(g, "b.1", [0, 4]), "b", 1) == [0, 0, -1, 0, 0, 1, 0, 2]
    holds(g)


def test_pad_with_reflection_is_followed_in_space_only() -> None:
    g = build([("Pad", "a p", "b", {"mode": "reflect"}), LAST], {"p": ints(0, 0, 1, 1, 0, 0, 1, 1), "wl": w(4, 8, 1, 1)})
    holds(g)
    g = build([("Pad", "a p", "b", {"mode": "reflect"}), LAST], {"p": ints(0, 1, 0, 0, 0, 0, 0, 0), "wl": w(4, 9, 1, 1)})
    assert why(g, "a") == "Pad 'b' mixes its positions"


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_gather_permutes_repeats_and_drops(dtype: Any) -> None:
    g = build([("Gather", "a i", "b", {"axis": 1}), LAST], {"i": np.array([3, -1, 3, 0], dtype), "wl": w(4, 4, 1, 1)})
    assert together(g, "a.1[3]", "b.1[0]", "b.1[2]", "wl.1[2]")
    assert together(g, "a.1[7]", "b.1[1]")
    assert operand(cut(g, "a.1", [1, 7]), "b", 1) == [2, 2, 0]
    holds(g)


def test_gather_of_one_position_or_by_data_freezes() -> None:
    g = build([("Gather", "a i", "b", {"axis": 1}), ("MatMul", "b wl", "y")], {"i": np.array(2), "wl": w(6, 4)})
    assert why(g, "a") == "Gather 'b' mixes its positions"
    nodes = [("ArgMax", "x", "m", {"axis": 3, "keepdims": 0}), ("Reshape", "m flat", "i"), ("Gather", "a i", "b", {"axis": 1})]
    g = build(nodes, {"flat": ints(18)}, outputs="b")
    assert "Gather 'b' looks positions up at run time" in {x.reason for x in g.groups}


def test_transpose_moves_axes_with_and_without_a_permutation() -> None:
    nodes = [("Transpose", "a", "t"), ("Transpose", "t", "b", {"perm": [3, 2, 1, 0]}), LAST]
    g = build(nodes, {"wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "t.2[3]", "b.1[3]")
    holds(g)
    nodes = [("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}), ("Add", "t k", "u"), ("MatMul", "u wm", "y")]
    g = build(nodes, {"k": w(8), "wm": w(8, 3)})
    assert together(g, "a.1[3]", "t.3[3]", "k.0[3]", "wm.0[3]")
    holds(g)


@pytest.mark.parametrize(("mode", "inputs"), [("DCR", [1, 3, 5, 7]), ("CRD", [4, 5, 6, 7])])
def test_depth_to_space_takes_one_channel_out_of_four(mode: str, inputs: list[int]) -> None:
    g = build([("DepthToSpace", "a", "b", {"blocksize": 2, "mode": mode}), LAST], {"wl": w(4, 2, 1, 1)})
    assert together(g, "b.1[1]", "wl.1[1]", *(f"a.1[{i}]" for i in inputs))
    assert prunable(g, "a") == 2
    holds(g)


def test_space_to_depth_makes_four_channels_of_one() -> None:
    g = build([("SpaceToDepth", "a", "b", {"blocksize": 2}), LAST], {"wl": w(4, 32, 1, 1)})
    assert together(g, "a.1[1]", "b.1[1]", "b.1[9]", "b.1[17]", "b.1[25]")
    holds(g)


# ---- reshapes


def test_runs_of_axes_that_correspond() -> None:
    assert axis_blocks([1, 8, 6, 6], [1, 8, 36]) == [([1], [1]), ([2, 3], [2])]
    assert axis_blocks([2, 8, 6], [16, 6]) == [([0, 1], [0]), ([2], [1])]
    assert axis_blocks([8, 4], [4, 8]) == [([0, 1], [0, 1])]
    assert axis_blocks([6, 4], [2, 3, 4]) == [([0], [0, 1]), ([1], [2])]


@pytest.mark.parametrize("flat", [("Flatten", "a", "f"), ("Reshape", "a s0", "f"), ("Reshape", "a s1", "f")], ids=str)
def test_flattened_positions_go_with_their_channel(flat: tuple[str, str, str]) -> None:
    g = build([flat, ("Gemm", "f wl", "y")], {"s0": ints(0, -1), "s1": ints(-1, 288), "wl": w(288, 3)})
    assert together(g, "a.1[2]", "f.1[72]", "f.1[107]", "wl.0[72]")
    assert not together(g, "f.1[71]", "f.1[72]")
    pruned = cut(g, "a.1", [2])
    assert shape(pruned, "wl") == (252, 3)
    if flat[1] == "a s1":
        assert operand(pruned, "f", 1) == [-1, 252]
    holds(g)


def test_flatten_behind_the_channels() -> None:
    nodes = [("Flatten", "a", "f", {"axis": 2}), ("MatMul", "f wm", "m"), ("MatMul", "wl m", "y")]
    g = build(nodes, {"wm": w(36, 5), "wl": w(2, 8)})
    assert together(g, "a.1[3]", "f.0[3]", "wl.1[3]")
    holds(g)


SHUFFLE = [("Reshape", "a s1", "r"), ("Transpose", "r", "t", {"perm": [0, 2, 1, 3, 4]}), ("Reshape", "t s2", "b"), LAST]


@pytest.mark.parametrize(
    ("s1", "s2", "tied", "after"),
    [
        ([1, 2, 4, 6, 6], [1, 8, 6, 6], ["a.1[3]", "a.1[7]"], [1, 2, 3, 6, 6]),  # the same channel of both groups
        ([0, 2, -1, 6, 6], [1, -1, 6, 6], ["a.1[3]", "a.1[7]"], [0, 2, -1, 6, 6]),
        ([1, 4, 2, 6, 6], [1, 8, 6, 6], ["a.1[6]", "a.1[7]"], [1, 3, 2, 6, 6]),  # a whole group: that leaves more units
        ([0, 4, -1, 6, 6], [1, -1, 6, 6], ["a.1[6]", "a.1[7]"], [0, 3, -1, 6, 6]),
    ],
)
def test_channel_shuffle(s1: list[int], s2: list[int], tied: list[str], after: list[int]) -> None:
    g = build(SHUFFLE, {"s1": ints(*s1), "s2": ints(*s2), "wl": w(4, 8, 1, 1)})
    assert prunable(g, "a") == 4
    assert together(g, *tied)
    pruned = cut(g, "a.1", [7])
    assert operand(pruned, "r", 1) == after
    assert operand(pruned, "b", 1) == [6 if n == 8 else n for n in s2]
    holds(g)


@pytest.mark.parametrize("groups", [2, 4])
def test_channel_shuffle_with_the_width_computed_at_run_time(groups: int) -> None:
    size = [("Shape", "a", "sh"), ("Gather", "sh one", "c"), ("Div", "c g", "d"), ("Concat", "n k d hw", "s1", {"axis": 0})]
    weights = {"one": ints(1), "g": ints(groups), "k": ints(groups), "n": ints(1), "hw": ints(6, 6), "s2": ints(1, -1, 6, 6)}
    g = build([*size, *SHUFFLE], {**weights, "wl": w(4, 8, 1, 1)})
    assert [x.size for x in g.prunable] == [4]
    assert together(g, "a.1[0]", "a.1[4]" if groups == 2 else "a.1[1]")  # the same place in both, or a whole one of four
    holds(g)


def test_a_reshape_that_mixes_all_channels_freezes() -> None:
    g = build([("Reshape", "a s", "b"), ("Conv", "b wl", "y")], {"s": ints(1, 3, 96), "wl": w(2, 3, 1)})
    assert why(g, "a") == "Reshape 'b' mixes its positions"


def test_a_shape_constant_that_others_use_is_copied() -> None:
    nodes = [*FLAT, ("Reshape", "x2 sf", "v"), ("ReduceSum", "v", "r"), ("Add", "f r", "b"), ("MatMul", "wl b", "y")]
    g = build(nodes, {"sf": ints(1, 8, 36), "x2": w(1, 8, 6, 6), "wl": w(2, 8)})
    pruned = cut(g, "a.1", [1, 2])
    assert operand(pruned, "f", 1) == [1, 6, 36]
    assert operand(pruned, "v", 1) == [1, 8, 36]
    holds(g)


def computed_shape(*parts: str) -> list[tuple[Any, ...]]:
    """Reshape of 'a' to [1, 8, 36], the target joined at run time."""
    join = [
        ("Shape", "a", "sh"),
        ("Gather", "sh i0", "n"),
        ("Gather", "sh i1", "c"),
        ("Concat", " ".join(parts), "t", {"axis": 0}),
    ]
    return [*join, ("Reshape", "a t", "b"), ("MatMul", "wl b", "y")]


INDICES = {"i0": ints(0), "i1": ints(1), "wl": w(2, 8)}


def test_a_reshape_to_a_size_read_at_run_time_adapts_by_itself() -> None:
    g = build(computed_shape("n", "c", "hw"), {**INDICES, "hw": ints(36)})
    pruned = cut(g, "a.1", [0, 5])
    assert operand(pruned, "t", 2) == [36]
    holds(g)


def test_a_reshape_to_a_number_joined_at_run_time_has_the_number_edited() -> None:
    g = build(computed_shape("n", "k", "hw"), {**INDICES, "k": ints(8), "hw": ints(36)})
    assert operand(cut(g, "a.1", [0, 5]), "t", 1) == [6]
    holds(g)


def test_a_number_that_is_a_scalar_stays_one() -> None:
    nodes = computed_shape("n", "k", "hw")
    nodes.insert(0, ("Unsqueeze", "scalar i0", "k"))
    g = build(nodes, {**INDICES, "scalar": np.array(8), "hw": ints(36)})
    pruned = cut(g, "a.1", [0, 5])
    assert operand(pruned, "k", 0) == 6
    assert shape(pruned, "scalar") == ()
    holds(g)


def test_a_number_that_other_nodes_use_too_is_copied() -> None:
    """Exporters merge equal numbers: the 8 that is a size has nothing to do with the 8 that is a factor."""
    nodes = [
        *computed_shape("n", "k", "hw")[:-1],
        ("Cast", "k", "kf", {"to": 1}),
        ("Mul", "b kf", "q"),
        ("MatMul", "wl q", "y"),
    ]
    g = build(nodes, {**INDICES, "k": ints(8), "hw": ints(36)})
    pruned = cut(g, "a.1", [0, 5])
    assert operand(pruned, "t", 1) == [6] and operand(pruned, "kf", 0) == [8]
    holds(g)


def chosen(pruned: Any, tensor: str) -> list[int]:
    """The numbers that are written over those that the maker of `tensor` computes for its shape, 0 where none are."""
    where = next(n for n in pruned.graph.node if n.output[0] == node(pruned, tensor).input[1])
    assert where.op_type == "Where"
    return operand(pruned, where.output[0], 1)


def test_a_number_that_is_joined_and_then_used_otherwise_too_is_written_over() -> None:
    nodes = [
        *computed_shape("n", "k", "hw")[:-1],
        ("Cast", "t", "tf", {"to": 1}),
        ("ReduceMax", "tf", "top"),
        ("Mul", "b top", "q"),
        ("MatMul", "wl q", "y"),
    ]
    g = build(nodes, {**INDICES, "k": ints(8), "hw": ints(36)})
    pruned = cut(g, "a.1", [0, 5])
    assert operand(pruned, "t", 1) == [8]
    assert chosen(pruned, "b") == [0, 6, 0]
    holds(g)


@pytest.mark.parametrize("same", [True, False])
def test_one_computed_shape_for_two_reshapes(same: bool) -> None:
    """Where both tensors lose as many channels one number serves both; else each target has numbers of its own written in."""
    nodes = [*computed_shape("n", "k", "hw")[:-1], ("Relu" if same else "Conv", "a" if same else "x w2", "o")]
    nodes += [("Reshape", "o t", "d"), ("MatMul", "wl b", "m"), ("MatMul", "wd d", "p"), ("Add", "m p", "y")]
    g = build(nodes, {**INDICES, "k": ints(8), "hw": ints(36), "w2": w(8, 3, 1, 1), "wd": w(2, 8)})
    if same:
        assert operand(cut(g, "a.1", [0, 5]), "t", 1) == [6]
    else:
        assert (prunable(g, "a"), prunable(g, "o")) == (8, 8)
        assert chosen(cut(g, "a.1", [0, 5]), "b") == [0, 6, 0]
        assert chosen(cut(g, "o.1", [0]), "d") == [0, 7, 0]
    holds(g)


@pytest.mark.parametrize("channels", [2, 4, 8])
def test_a_size_computed_from_another_axis_is_written_over(channels: int) -> None:
    """The channels of 'c' are as many as those of 'a' by chance: the target of the Reshape follows the wrong ones."""
    nodes = [("Conv", "x w2", "c"), ("Conv", "x w3", "d"), ("Shape", "c", "sh"), ("Slice", "sh z two", "t0")]
    nodes += [("Concat", "t0 hw", "t", {"axis": 0}), ("Reshape", "d t", "b"), ("MatMul", "wl b", "m"), ("Conv", "c w4", "e")]
    nodes += [("Flatten", "e", "f"), ("Flatten", "m", "g"), ("Concat", "f g", "y", {"axis": 1})]
    weights = {"w2": w(channels, 3, 1, 1), "w3": w(channels, 3, 1, 1), "w4": w(2, channels, 1, 1), "wl": w(2, channels)}
    g = build(nodes, {**weights, "z": ints(0), "two": ints(2), "hw": ints(36)})
    assert (prunable(g, "c"), prunable(g, "d")) == (channels, channels)
    assert chosen(cut(g, "c.1", [0]), "b") == [0, channels, 0]
    holds(g)


def test_squeeze_and_unsqueeze() -> None:
    nodes = [("GlobalAveragePool", "a", "p"), ("Squeeze", "p hw", "s"), ("Unsqueeze", "s hw", "b"), LAST]
    g = build(nodes, {"hw": ints(2, 3), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "s.1[3]", "b.1[3]")
    holds(g)
    old = [
        ("GlobalAveragePool", "a", "p"),
        ("Squeeze", "p", "s", {"axes": [2, 3]}),
        ("Unsqueeze", "s", "b", {"axes": [2, 3]}),
        LAST,
    ]
    holds(build(old, {"wl": w(4, 8, 1, 1)}, opset=11))


def test_a_squeeze_that_names_no_axes_freezes() -> None:
    nodes = [("GlobalAveragePool", "a", "p"), ("Squeeze", "p", "s"), ("Unsqueeze", "s i", "t"), ("MatMul", "t wl", "y")]
    g = build(nodes, {"i": ints(0), "wl": w(8, 3)})
    assert why(g, "a") == "Squeeze 's' names no axes: it would drop an axis cut to one position"


@pytest.mark.parametrize("target", ["whole", "short", "ones", "computed"])
def test_expand(target: str) -> None:
    constants = {"whole": ints(1, 8, 6, 6), "short": ints(8, 6, 6), "ones": ints(1, 1, 6, 6)}
    nodes = [("GlobalAveragePool", "a", "p"), ("Expand", "p s", "b"), LAST]
    if target == "computed":
        nodes.insert(0, ("Shape", "a", "s"))
    weights = {"wl": w(4, 8, 1, 1), **({} if target == "computed" else {"s": constants[target]})}
    g = build(nodes, weights)
    assert together(g, "a.1[3]", "p.1[3]", "b.1[3]")
    pruned = cut(g, "a.1", [3])
    if target != "computed":
        assert operand(pruned, "b", 1) == {"whole": [1, 7, 6, 6], "short": [7, 6, 6], "ones": [1, 1, 6, 6]}[target]
    holds(g)


def test_an_axis_filled_with_one_value_is_as_long_as_what_it_meets() -> None:
    nodes = [("Conv", "a w1", "c"), ("Expand", "c s", "e"), ("Mul", "e a", "b"), LAST]
    g = build(nodes, {"w1": w(1, 8, 1, 1), "s": ints(1, 8, 6, 6), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "e.1[3]", "wl.1[3]")
    assert operand(cut(g, "a.1", [3]), "e", 1) == [1, 7, 6, 6]
    holds(g)
    nodes = [("Shape", "a", "sh"), ("ConstantOfShape", "sh", "e"), ("Concat", "e a", "b", {"axis": 1}), LAST]
    g = build(nodes, {"wl": w(4, 16, 1, 1)})
    assert together(g, "a.1[3]", "b.1[11]")
    holds(g)


def test_tile_repeats_the_channels() -> None:
    g = build([("Tile", "a t", "b"), LAST], {"t": ints(1, 3, 1, 2), "wl": w(4, 24, 1, 1)})
    assert together(g, "a.1[2]", "b.1[2]", "b.1[10]", "b.1[18]", "wl.1[18]")
    holds(g)


NEAREST = {"mode": "nearest"}


@pytest.mark.parametrize(
    ("opset", "op", "reads"),
    [(9, "Upsample", "a sc"), (10, "Resize", "a sc"), (11, "Resize", "a e sc"), (18, "Resize", "a - sc")],
)
def test_resize_by_scales(opset: int, op: str, reads: str) -> None:
    weights = {"sc": np.array([1, 1, 2, 2], np.float32), "e": np.zeros(0, np.float32), "wl": w(4, 8, 1, 1)}
    g = build([(op, reads, "b", NEAREST), LAST], weights, opset=opset)
    assert together(g, "a.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


@pytest.mark.parametrize(
    ("sizes", "axes", "after"), [([1, 8, 9, 9], None, [1, 7, 9, 9]), ([9, 8], [3, 1], [9, 7]), ([9], [2], [9])]
)
def test_resize_to_sizes(sizes: list[int], axes: list[int] | None, after: list[int]) -> None:
    attributes = {"mode": "linear", **({"axes": axes} if axes else {})}
    g = build([("Resize", "a - - sz", "b", attributes), LAST], {"sz": ints(*sizes), "wl": w(4, 8, 1, 1)})
    assert operand(cut(g, "a.1", [3]), "b", 3) == after
    holds(g)


def test_resize_to_sizes_joined_at_run_time() -> None:
    nodes = [("Shape", "a", "sh"), ("Slice", "sh z two", "front"), ("Concat", "front hw", "sz", {"axis": 0})]
    nodes += [("Resize", "a - - sz", "b", NEAREST), LAST]
    holds(build(nodes, {"z": ints(0), "two": ints(2), "hw": ints(12, 12), "wl": w(4, 8, 1, 1)}))


def test_resizing_the_channels_freezes_them() -> None:
    g = build([("Resize", "a - sc", "b", NEAREST), LAST], {"sc": np.array([1, 2, 1, 1], np.float32), "wl": w(4, 16, 1, 1)})
    assert why(g, "a") == "Resize 'b' mixes its positions"


# ---- sizes that are used as numbers


SIZE = [("Shape", "a", "sh"), ("Gather", "sh one", "s")]  # s = [8]
TOTAL = ("ReduceSum", "t", "v")
NUMBERS: dict[str, tuple[list[tuple[Any, ...]], str]] = {
    "cast": ([*SIZE, ("Cast", "s", "v", {"to": 1})], "Cast 'v'"),
    "elements": ([("Size", "a", "s"), ("Cast", "s", "v", {"to": 1})], "Cast 'v'"),
    "product": ([("Shape", "a", "sh"), ("ReduceProd", "sh", "p"), ("Cast", "p", "v", {"to": 1})], "ReduceProd 'p'"),
    "range": ([*SIZE, ("Squeeze", "s", "q"), ("Range", "o q i", "r"), ("Cast", "r", "t", {"to": 1}), TOTAL], "Range 'r'"),
    "constant": ([("Shape", "a", "sh"), ("ConstantOfShape", "sh", "o1"), ("Exp", "o1", "t"), TOTAL], "ReduceSum 'v'"),
    "index": ([*SIZE, ("Sub", "s one", "i1"), ("Gather", "k i1", "v")], "Gather 'v'"),
    "tile": ([*SIZE, ("Tile", "k s", "t"), TOTAL], "Tile 't'"),
    "bound": ([*SIZE, ("Slice", "k zero s", "t"), TOTAL], "Slice 't'"),
    "pad": ([*SIZE, ("Concat", "zero s", "p", {"axis": 0}), ("Pad", "k p f", "t"), TOTAL], "Pad 't'"),
    "no rule": ([*SIZE, ("TopK", "k s", "t ti", {"axis": 0}), TOTAL], "TopK 't'"),
}


def numbers(name: str) -> Groups:
    weights = {
        "one": ints(1),
        "zero": ints(0),
        "o": np.array(0),
        "i": np.array(1),
        "k": w(20),
        "f": np.float32(1),
        "wl": w(4, 8, 1, 1),
    }
    return build([*NUMBERS[name][0], ("Mul", "a v", "b"), LAST], weights)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_size_that_is_used_as_a_number_stays_that_number(name: str) -> None:
    g = numbers(name)
    if name == "constant":  # the tensor that is summed gets shorter
        assert why(g, "a") == "ReduceSum 'v' sums over it without weights"
        return
    if name == "range":  # may make as many elements as the data say: a second run, on other data, settles it
        assert why(g, "a") == "Range 'r' computes with its size"
        g = group(runtime.probe_again(g.net))
    assert prunable(g, "a") == 8
    holds(g)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_that_depends_on_open_sizes_freezes(name: str) -> None:
    net = numbers(name).net
    for dim in net.model.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "n"
    reader = NUMBERS[name][1]
    expected = (f"{reader} computes with its size", f"{reader} sums over it without weights")
    first = runtime.probe(net.model, net.feeds)
    assert why(group(first), "a") in expected
    again = runtime.probe_again(first)
    assert again.again is not None and again.again.shapes["x"][2:] != first.shapes["x"][2:]
    if name not in ("constant", "elements", "product"):  # these count the positions as well
        assert prunable(group(again), "a") == 8
        holds(group(again))
    else:
        assert why(group(again), "a") in expected


def test_a_size_that_is_an_output_freezes() -> None:
    g = build([("Shape", "a", "sh"), ("Relu", "a", "b"), LAST], {"wl": w(4, 8, 1, 1)}, outputs="y sh")
    assert why(g, "a") == "graph output 'sh' is its size"


def test_sizes_of_space_freeze_nothing() -> None:
    nodes = [("Shape", "a", "sh"), ("Gather", "sh three", "s"), ("Cast", "s", "v", {"to": 1}), ("Div", "a v", "b"), LAST]
    holds(build(nodes, {"three": ints(3), "wl": w(4, 8, 1, 1)}))


# ---- what cannot be cut


def test_inputs_and_outputs_are_frozen() -> None:
    g = build([("Relu", "a", "b"), LAST], {"wl": w(4, 8, 1, 1)}, outputs="y b")
    assert why(g, "a") == "it is graph output 'b'"
    assert not g.prunable


def test_an_operator_without_a_rule_is_frozen_and_named() -> None:
    g = build([("Relu", "a", "b"), LAST], {"wl": w(4, 8, 1, 1)})
    fewer = group(g.net, {key: rule for key, rule in STANDARD.items() if key != ("", "Relu")})
    assert why(fewer, "a") == "operator ai.onnx::Relu ('b') has no rule"
    g = build([("Bernoulli", "a", "b"), LAST], {"wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "Bernoulli 'b' draws numbers at random, and other ones for another shape"


def test_a_rule_of_ones_own_serves_an_operator_that_has_none() -> None:
    g = build([("Bernoulli", "a", "b"), LAST], {"wl": w(4, 8, 1, 1)})
    own = {**STANDARD, ("", "Bernoulli"): Rule(lambda view: [Tie(view.x(0, 1), view.y(1))])}
    mine = group(g.net, own)
    assert prunable(mine, "a") == 8
    plan = oracle.only(mine, {"a": [0, 3]})
    assert shape(surgery(mine, plan, own), "wl") == (4, 2, 1, 1)


def test_two_rules_for_one_operator_are_refused() -> None:
    rule = STANDARD["", "Relu"]
    with pytest.raises(ValueError, match="two rules for operator Relu"):
        table({"Relu": rule}, {"Relu": rule})
