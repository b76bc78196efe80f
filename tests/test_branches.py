"""If: branches that are known to be taken go, those of the others are cut like everything else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import oracle
import pytest
from axes import prunable, why
from bodied import (
    CASES,
    FIRST,
    LAST,
    NO,
    WA,
    YES,
    Array,
    analysed,
    body,
    either,
    feeds,
    holds,
    ints,
    layers,
    model,
    protos,
    run,
    w,
)
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import control, runtime
from onnxprune.inline import simplified
from onnxprune.passes.surgery import surgery

# --------------------------------------------------------------------------------------- branches known to be taken


def same(net: onnx.ModelProto, **sizes: Sequence[int]) -> onnx.ModelProto:
    """The simplified model, which must compute the same."""
    before = net.SerializeToString(deterministic=True)
    simple = simplified(net)
    assert net.SerializeToString(deterministic=True) == before
    x = {v.name: w(*sizes.get(v.name, runtime.input_shape(v))) for v in runtime.graph_inputs(net)}
    oracle.accepted(simple)
    for want, got in zip(run(net, x), run(simple, x), strict=True):
        np.testing.assert_array_equal(want, got)
    return simple


def operators(net: onnx.ModelProto) -> list[str]:
    return [n.op_type for n in net.graph.node]


RELU_OR_NEG = either(body([("Relu", "a", "o1")], "o1"), body([("Neg", "a", "o2")], "o2"))


@pytest.mark.parametrize(("value", "op"), [(YES, "Relu"), (NO, "Neg")])
def test_a_constant_condition_leaves_one_branch(value: Array, op: str) -> None:
    simple = same(model([FIRST, ("If", "known", "y", RELU_OR_NEG)], WA | {"known": value}))
    assert operators(simple) == ["Conv", op]
    assert simple.graph.node[1].output == ["y"]


def test_a_model_without_an_if_stays_the_same_object() -> None:
    net = model([FIRST, ("Relu", "a", "y")], WA)
    assert simplified(net) is net


def test_a_condition_computed_from_constants_counts() -> None:
    nodes = [("Constant", "", "k", {"value_int": 3}), ("Add", "k two", "s"), ("Greater", "s four", "g")]
    net = model([FIRST, *nodes, ("If", "g", "y", RELU_OR_NEG)], WA | {"two": np.array(2), "four": np.array(4)})
    assert operators(same(net)) == ["Conv", "Constant", "Add", "Greater", "Relu"]


SQUEEZE = either(body([("Squeeze", "p two", "o1")], "o1"), body([("Identity", "p", "o2")], "o2"))
ASKS = [
    ("Shape", "p", "sh"),
    ("Gather", "sh two", "s"),
    ("Equal", "s one", "e"),
    ("Cast", "e", "e1", {"to": TensorProto.BOOL}),
    ("If", "e1", "y", SQUEEZE),
]


def test_a_size_that_follows_from_the_declared_ones_counts() -> None:
    """What exporters make of `squeeze`: here the axis is 1 whatever the open sizes are."""
    nodes = [FIRST, ("ReduceMean", "a two", "p"), *ASKS]
    net = model(nodes, WA | {"two": ints(2), "one": ints(1)}, {"x": ("N", 3, "H", "W")})
    assert operators(same(net, x=(2, 3, 5, 4))) == ["Conv", "ReduceMean", "Shape", "Gather", "Equal", "Cast", "Squeeze"]


def test_an_open_size_does_not() -> None:
    net = model([FIRST, ("Identity", "a", "p"), *ASKS], WA | {"two": ints(2), "one": ints(1)}, {"x": ("N", 3, "H", "W")})
    assert simplified(net) is net
    for height in (1, 4):
        same(net, x=(2, 3, height, 4))


def test_what_the_file_says_of_intermediate_tensors_does_not_count() -> None:
    net = model([FIRST, ("Identity", "a", "p"), *ASKS], WA | {"two": ints(2), "one": ints(1)}, {"x": ("N", 3, "H", "W")})
    net.graph.value_info.append(helper.make_tensor_value_info("p", TensorProto.FLOAT, ["N", 8, 1, "W"]))
    assert simplified(net) is net


def test_the_rank_counts() -> None:
    nodes = [("Shape", "a", "sh"), ("Size", "sh", "rank"), ("Equal", "rank four", "e"), ("If", "e", "y", RELU_OR_NEG)]
    net = model([FIRST, *nodes], WA | {"four": np.array(4)}, {"x": ("N", 3, "H", "W")})
    assert operators(same(net, x=(2, 3, 5, 4)))[-1] == "Relu"


def test_a_condition_that_a_caller_may_override_is_left() -> None:
    net = model([FIRST, ("If", "known", "y", RELU_OR_NEG)], WA | {"known": YES})
    net.graph.input.append(helper.make_tensor_value_info("known", TensorProto.BOOL, []))
    assert simplified(net) is net


def test_chance_is_no_constant() -> None:
    nodes = [("RandomNormal", "", "r", {"shape": [1]}), ("Greater", "r zero", "g"), ("If", "g", "y", RELU_OR_NEG)]
    net = model([FIRST, *nodes], WA | {"zero": np.zeros(1, np.float32)})
    assert simplified(net) is net


def test_branches_within_branches_constants_and_copies() -> None:
    """A branch with a constant of its own, which it uses and hands out, and a tensor that it only hands through."""
    inner = either(body([("Mul", "t k", "o5")], "o5"), body([("Neg", "t", "o6")], "o6"))
    then = body(
        [("Relu", "a", "t"), ("If", "known", "o1", inner), ("Identity", "a", "o3")], "o1 k o3", weights={"k": np.float32(2)}
    )
    other = body([("Neg", "a", "q"), ("Neg", "a", "q2"), ("Neg", "a", "q3")], "q q2 q3")
    nodes = [FIRST, ("If", "known", "u v z", either(then, other)), ("Sum", "u v z", "y")]
    simple = same(model(nodes, WA | {"known": YES}))
    assert not any(control.bodies(n) for n in simple.graph.node)
    assert sorted(operators(simple)) == sorted(["Conv", "Relu", "Mul", "Identity", "Identity", "Sum"])


def test_what_a_loop_makes_has_no_size_known_beforehand() -> None:
    """The body always makes five columns, but the body need not run."""
    cell = body([("MatMul", "x wn", "v2"), ("Identity", "c", "c2")], "c2 v2", "i c v")
    asks = [("Shape", "v1", "sh"), ("Gather", "sh one", "s"), ("Equal", "s five", "e")]
    branches = either(body([("Identity", "v1", "o1")], "o1"), body([("Neg", "v1", "o2")], "o2"))
    nodes = [("Loop", "n yes x", "v1", {"body": cell}), *asks, ("If", "e", "y", branches)]
    weights = {"wn": w(3, 5), "yes": YES, "one": np.array(1), "five": np.array(5)}
    net = model(nodes, weights, {"x": (2, 3)})
    simple = simplified(net)
    for trips in (0, 1):
        x = feeds(net, n=trips)
        np.testing.assert_array_equal(run(net, x)[0], run(simple, x)[0])


def test_names_used_twice_are_told_apart() -> None:
    """Both branches call their tensor t, and so does the graph around them."""
    branches = either(
        body([("Relu", "t", "s"), ("Mul", "s k", "o")], "o", weights={"k": np.float32(2)}),
        body([("Neg", "t", "s"), ("Mul", "s k", "o")], "o", weights={"k": np.float32(3)}),
    )
    net = model([("Conv", "x wa", "t"), ("If", "cond", "b", branches), LAST], WA | {"wl": w(4, 8, 1, 1)})
    simple = simplified(net)
    names = [name for g in control.every_graph(simple.graph) for name in control.defined(g)]
    assert len(set(names)) == len(names)
    for case in CASES:
        np.testing.assert_array_equal(run(net, feeds(net, **case))[0], run(simple, feeds(net, **case))[0])
    assert "names inside it are used elsewhere too" in why(analysed(net, cond=YES), "t")
    assert prunable(holds(simple, *CASES), "t") == 8


def test_a_model_given_as_such_is_simplified_too() -> None:
    nodes = [FIRST, ("If", "known", "b", RELU_OR_NEG), LAST]
    net = model(nodes, WA | {"known": YES, "wl": w(4, 8, 1, 1)})
    pruned = onnxprune.prune(net, budget={"macs": 0.6}, method="l2").model
    assert operators(pruned) == ["Conv", "Relu", "Conv"]


# --------------------------------------------------------------------------------------------------------------- If


def test_layers_in_branches_are_cut() -> None:
    g = holds(layers(), *CASES)
    assert (prunable(g, "a"), prunable(g, "t1"), prunable(g, "o1"), prunable(g, "b")) == (8, 10, 6, 6)
    assert {x.name for x in g.layers} == {"a", "t1", "o1", "o2", "y"}


def test_shapes_that_branches_declare_follow() -> None:
    shapes = {"t1": (1, 10, 4, 4), "t2": (1, 10, 4, 4), "o1": (1, 6, 2, 2)}
    net = layers(shapes=shapes)
    g = holds(net, *CASES)
    plan = oracle.only(g, {"t1": [0, 3], "a": list(range(8)), "o1": [1]})
    pruned = surgery(g, plan)
    branch = control.bodies(pruned.graph.node[1])[0]
    found = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*branch.value_info, *branch.output]}
    assert found == {"t1": [1, 2, 4, 4], "t2": [1, 2, 4, 4], "o1": [1, 1, 2, 2]}


def test_stale_shapes_are_put_right() -> None:
    net = layers(shapes={"t1": (1, 9, 4, 4), "o1": (1, 5, 2, 2)})  # nor did they before
    g = holds(net, *CASES)
    branch = control.bodies(surgery(g, oracle.only(g, {"t1": [2], "o1": [2]})).graph.node[1])[0]
    found = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in [*branch.value_info, *branch.output]}
    assert found == {"t1": [1, 1, 4, 4], "o1": [1, 1, 2, 2]}


def test_a_weight_inside_and_outside_follows_everywhere() -> None:
    """The two branches and the graph around them share one weight; the constants of the bodies are their own."""
    then = body([("Conv", "a ws bt", "o1")], "o1", weights={"bt": w(8)})
    other = body([("Constant", "", "be", {"value": numpy_helper.from_array(w(8, seed=1))}), ("Conv", "a ws be", "o2")], "o2")
    nodes = [FIRST, ("If", "cond", "u", either(then, other)), ("Conv", "u ws", "b"), LAST]
    g = holds(model(nodes, WA | {"ws": w(8, 8, 1, 1), "wl": w(4, 8, 1, 1)}), *CASES)
    assert prunable(g, "a") == 8


def test_vectors_that_bodies_share_by_accident_are_told_apart() -> None:
    then = body([("Conv", "a wt zeros", "t1"), ("Conv", "t1 wu zeros", "o1")], "o1")
    other = body([("Conv", "a we zeros", "o2")], "o2")
    weights = {"wt": w(6, 8, 1, 1), "wu": w(6, 6, 1, 1), "we": w(6, 8, 1, 1), "zeros": np.zeros(6, np.float32)}
    g = holds(model([FIRST, ("If", "cond", "b", either(then, other)), LAST], WA | weights | {"wl": w(4, 6, 1, 1)}), *CASES)
    assert (prunable(g, "t1"), prunable(g, "o1")) == (6, 6)


def test_branches_that_make_constants() -> None:
    then = body([("Constant", "", "o1", {"value": numpy_helper.from_array(w(1, 8, 1, 1))})], "o1")
    other = body([("GlobalAveragePool", "a", "o2")], "o2")
    g = holds(
        model([FIRST, ("If", "cond", "s", either(then, other)), ("Add", "a s", "b"), LAST], WA | {"wl": w(4, 8, 1, 1)}), *CASES
    )
    assert prunable(g, "a") == 8


def test_a_shared_constant_that_a_branch_hands_out_stays() -> None:
    shared = {"value": numpy_helper.from_array(w(8))}
    then = body([("Constant", "", "o1", shared), ("Relu", "o1", "r"), ("Identity", "r", "p")], "o1 p")
    other = body([("Neg", "k", "o2"), ("Neg", "k", "p2")], "o2 p2")
    nodes = [FIRST, ("If", "cond", "s q", either(then, other)), ("Transpose", "a", "t", {"perm": [0, 2, 3, 1]})]
    nodes += [("Add", "t s", "u"), ("Add", "u q", "v"), ("Transpose", "v", "b", {"perm": [0, 3, 1, 2]}), LAST]
    g = analysed(model(nodes, WA | {"k": w(8, seed=2), "wl": w(4, 8, 1, 1)}), cond=YES)
    assert why(g, "a") == "If 's' hands out a constant that other nodes use too"


def test_shape_constants_in_a_branch_follow() -> None:
    then = body(
        [("Reshape", "a k", "r"), ("ReduceMax", "r two", "m"), ("Reshape", "m k4", "o1")],
        "o1",
        weights={"k": ints(1, 8, 36), "two": ints(2), "k4": ints(1, 8, 1, 1)},
    )
    g = holds(
        model(
            [
                FIRST,
                ("If", "cond", "s", either(then, body([("GlobalAveragePool", "a", "o2")], "o2"))),
                ("Mul", "a s", "b"),
                LAST,
            ],
            WA | {"wl": w(4, 8, 1, 1)},
        ),
        *CASES,
    )
    assert prunable(g, "a") == 8


def test_shape_arithmetic_in_a_branch_reads_sizes_outside() -> None:
    """The branch reshapes by the size of a tensor outside; a constant of the graph outside counts channels in it."""
    then = body(
        [("Shape", "a", "sh"), ("Gather", "sh one", "ch"), ("Concat", "batch ch rest", "to", {"axis": 0}),
         ("Reshape", "a to", "r"), ("ReduceMean", "r two", "m"), ("Reshape", "m k4", "o1")],
        "o1",
    )  # fmt: skip
    weights = {"one": ints(1), "batch": ints(1), "rest": ints(-1), "two": ints(2), "k4": ints(1, 8, 1, 1), "wl": w(4, 8, 1, 1)}
    other = body([("GlobalAveragePool", "a", "o2")], "o2")
    g = holds(model([FIRST, ("If", "cond", "s", either(then, other)), ("Mul", "a s", "b"), LAST], WA | weights), *CASES)
    assert prunable(g, "a") == 8


def test_a_size_that_a_branch_uses_as_a_number_becomes_a_constant() -> None:
    branches = either(body([("Cast", "s", "o1", {"to": 1})], "o1"), body([("Cast", "t", "o2", {"to": 1})], "o2"))
    nodes = [FIRST, ("Shape", "a", "sh"), ("Gather", "sh one", "s"), ("Size", "a", "t"), ("If", "cond", "v", branches)]
    net = model([*nodes, ("Mul", "a v", "b"), LAST], WA | {"one": np.array(1), "wl": w(4, 8, 1, 1)})
    assert prunable(holds(net, *CASES), "a") == 8


def test_a_size_that_a_branch_hands_out_freezes() -> None:
    branches = either(
        body([("Shape", "a", "sh"), ("Gather", "sh one", "o1")], "o1"),
        body([("Constant", "", "o2", {"value_int": 7})], "o2"),
    )
    nodes = [FIRST, ("If", "cond", "s", branches), ("Cast", "s", "v", {"to": 1}), ("Mul", "a v", "b"), LAST]
    g = analysed(model(nodes, WA | {"one": np.array(1), "wl": w(4, 8, 1, 1)}), cond=YES)
    assert why(g, "a") == "If 's' hands out its size"


def test_what_a_condition_reckons_with_is_frozen() -> None:
    nodes = [
        FIRST,
        ("ReduceMean", "a", "m", {"keepdims": 0}),
        ("Greater", "m zero", "big"),
        ("If", "big", "b", RELU_OR_NEG),
        LAST,
    ]
    g = analysed(model(nodes, WA | {"zero": np.float32(0), "wl": w(4, 8, 1, 1)}))
    assert "ReduceMean 'm'" in why(g, "a")


def test_the_operator_inside_that_stops_channels_is_named() -> None:
    then = body([("TopK", "a one", "o1 k1", {"axis": 1})], "o1", weights={"one": ints(8)})
    nodes = [FIRST, ("If", "cond", "b", either(then, body([("Neg", "a", "o2")], "o2"))), LAST]
    g = analysed(model(nodes, WA | {"wl": w(4, 8, 1, 1)}), cond=NO)
    assert why(g, "a") == "TopK 'o1' puts its positions in order of their values"


def test_branches_may_differ_in_other_sizes_than_the_channels() -> None:
    then = body([("MaxPool", "a", "o1", {"kernel_shape": [2, 2], "strides": [2, 2]})], "o1")
    nodes = [FIRST, ("If", "cond", "b", either(then, body([("Neg", "a", "o2")], "o2"))), LAST]
    g = holds(model(nodes, WA | {"wl": w(4, 8, 1, 1)}), *CASES)
    assert prunable(g, "a") == 8
    assert not g.net.static and not g.net.steady("b", 2) and not g.net.steady("y", 2)


def test_axes_in_which_branches_differ_are_frozen() -> None:
    """The output has four or eight channels; one of the layers that read it sums over other axes only."""
    branches = either(body([("Neg", "a", "o1")], "o1"), body([("Conv", "a wn", "o2")], "o2"))
    nodes = [FIRST, ("If", "cond", "b", branches), ("Transpose", "b", "t", {"perm": [0, 3, 2, 1]}), ("Conv", "t wl", "y")]
    net = model(nodes, WA | {"wn": w(4, 8, 1, 1), "wl": w(4, 6, 1, 1)})
    for case in CASES:
        g = analysed(net, **case)
        assert why(g, "a") == why(g, "wn", 0) == "If 'b' hands it on in another size"


@pytest.mark.parametrize("value", [YES, NO])
def test_branches_of_other_ranks_or_with_an_axis_of_one_are_not_followed(value: Array) -> None:
    """Either branch may be the one that the probe run takes."""
    then = body([("GlobalMaxPool", "a", "o1")], "o1")
    g = analysed(
        model([FIRST, ("If", "cond", "b", either(then, body([("Neg", "a", "o2")], "o2"))), LAST], WA | {"wl": w(4, 8, 1, 1)}),
        cond=value,
    )
    assert why(g, "a") == (
        "a subgraph reads it, and If 'b' is not followed: its branches make [1, 8, 1, 1] and [1, 8, 6, 6] of 'o1' and 'o2'"
    )


def test_a_branch_that_does_not_run_is_not_followed_and_the_culprit_is_named() -> None:
    net = model([FIRST, ("Identity", "a", "p"), *ASKS], WA | {"two": ints(2), "one": ints(1)}, {"x": ("N", 3, "H", "W")})
    net.graph.node[-1].output[0] = net.graph.node[-1].name = "b"
    net.graph.node.extend(protos([LAST]))
    net.graph.initializer.append(numpy_helper.from_array(w(4, 8, 1, 1), "wl"))
    net.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
    assert why(analysed(net), "a").endswith("'body' in it does not run on the sizes of the probe run: Squeeze 'o1' fails")


def test_branches_in_branches() -> None:
    inner = either(body([("Conv", "t wi", "o3")], "o3"), body([("Relu", "t", "o4")], "o4"))
    then = body([("Conv", "a wt", "t"), ("If", "cond2", "o1", inner)], "o1")
    other = body([("Conv", "a we", "o2")], "o2")
    weights = {"wt": w(6, 8, 1, 1), "wi": w(6, 6, 1, 1), "we": w(6, 8, 1, 1), "wl": w(4, 6, 1, 1)}
    net = model([FIRST, ("If", "cond", "b", either(then, other)), LAST], WA | weights)
    cases = [{"cond": a, "cond2": b} for a in (YES, NO) for b in (YES, NO)]
    g = holds(net, *cases)
    assert (prunable(g, "a"), prunable(g, "t")) == (8, 6)


def test_a_condition_that_is_a_constant_after_the_cut_alone(tmp_path: Path) -> None:
    """Shape inference does not see the size that is asked for; surgery writes down what it was."""
    nodes = [FIRST, ("Gelu", "a", "g", {"domain": "com.microsoft"}), ("Shape", "g", "sh"), ("Gather", "sh one", "s")]
    branches = either(body([("Relu", "g", "o1")], "o1"), body([("Neg", "g", "o2")], "o2"))
    weights = WA | {"one": np.array(1), "eight": np.array(8), "wl": w(4, 8, 1, 1)}
    net = model([*nodes, ("Equal", "s eight", "e"), ("If", "e", "b", branches), LAST], weights)
    files = tmp_path / "net.onnx", tmp_path / "pruned.onnx"
    files[0].write_bytes(net.SerializeToString())
    result = onnxprune.prune(files[0], budget={"macs": 0.6}, method="l2")
    result.save(files[1])
    assert operators(result.model)[-2:] == ["Relu", "Conv"]
    onnxprune.api.verify(*files, result.report)
