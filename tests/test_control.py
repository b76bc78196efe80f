"""If, Loop and Scan: branches that are known to be taken go, the bodies of the others are cut like everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nets
import numpy as np
import onnx
import oracle
import pytest
from axes import prunable, why
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import control, runtime
from onnxprune.channels import Dim
from onnxprune.criteria import Sensitivity
from onnxprune.criteria.plain import Activation
from onnxprune.groups import Accounting, Groups
from onnxprune.inline import simplified
from onnxprune.passes.calibrate import calibrate
from onnxprune.passes.group import group
from onnxprune.passes.surgery import surgery

Array = np.ndarray[Any, Any]
Node = tuple[Any, ...]  # operator, "inputs", "outputs", {attributes}; the node is called like its first output
Feeds = Mapping[str, Array]

KINDS = {"cond": TensorProto.BOOL, "cond2": TensorProto.BOOL, "n": TensorProto.INT64}
YES, NO = np.array(True), np.array(False)


def w(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


def protos(nodes: Sequence[Node]) -> list[onnx.NodeProto]:
    made = []
    for op, reads, makes, *attributes in nodes:
        names = ["" if name == "-" else name for name in reads.split()]
        made.append(helper.make_node(op, names, makes.split(), makes.split()[0], **(attributes[0] if attributes else {})))
    return made


def body(
    nodes: Sequence[Node],
    outputs: str,
    inputs: str = "",
    weights: Mapping[str, Array] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> onnx.GraphProto:
    """A body. Inputs called i and c are the number of the iteration and the condition; shapes: what it declares."""
    kinds = {"i": TensorProto.INT64, "c": TensorProto.BOOL}
    declared = shapes or {}

    def info(name: str) -> onnx.ValueInfoProto:
        if name in declared or name in inputs.split():
            scalar = [] if name in kinds else None
            return helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), declared.get(name, scalar))
        return onnx.ValueInfoProto(name=name)

    made = helper.make_graph(
        protos(nodes),
        "body",
        [info(name) for name in inputs.split()],
        [info(name) for name in outputs.split()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()],
    )
    inner = {o for n in made.node for o in n.output} - {o.name for o in made.output}
    made.value_info.extend(info(name) for name in declared if name in inner)
    return made


def either(then: onnx.GraphProto, other: onnx.GraphProto) -> dict[str, onnx.GraphProto]:
    return {"then_branch": then, "else_branch": other}


def model(
    nodes: Sequence[Node],
    weights: Mapping[str, Array] | None = None,
    inputs: Mapping[str, Sequence[int | str]] | None = None,
    outputs: str = "y",
    ir: int = 8,
) -> onnx.ModelProto:
    """A model of opset 18 with input x [1, 3, 6, 6] and the inputs cond (BOOL) and n (INT64), where they are read."""
    declared = inputs if inputs is not None else {"x": (1, 3, 6, 6)}
    made_inside = {o for node in protos(nodes) for o in node.output}
    read = {x for node in protos(nodes) for x in [*node.input, *control.captured(node)]} - made_inside
    scalars = {name: [] for name in KINDS if name in read and name not in (weights or {})}
    made = helper.make_graph(
        protos(nodes),
        "net",
        [
            helper.make_tensor_value_info(name, KINDS.get(name, TensorProto.FLOAT), list(shape))
            for name, shape in {**declared, **scalars}.items()
        ],
        [onnx.ValueInfoProto(name=name) for name in outputs.split()],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in (weights or {}).items()],
    )
    built = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=ir)
    values = runtime.run(runtime.session(built, optimise=False, threads=1), feeds(built, n=1))
    for output, value in zip(built.graph.output, values, strict=True):  # the checker wants the types of outputs
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        output.CopyFrom(helper.make_tensor_value_info(output.name, kind, [None] * value.ndim))
    return built


def feeds(net: onnx.ModelProto, seed: int = 0, **fixed: Any) -> dict[str, Array]:
    """Random inputs; open sizes are 2."""
    found: dict[str, Array] = {}
    for value in runtime.graph_inputs(net):
        shape = [d or 2 for d in runtime.input_shape(value)]
        scalar = np.array(0, runtime.input_dtype(value))
        found[value.name] = np.asarray(fixed.get(value.name, w(*shape, seed=seed) if shape else scalar))
    return found


def analysed(net: onnx.ModelProto, **fixed: Any) -> Groups:
    return group(runtime.probe(net, feeds(net, **fixed)))


def run(net: onnx.ModelProto, x: Feeds) -> list[Array]:
    return runtime.run(runtime.session(net, threads=1), x)


def holds(net: onnx.ModelProto, *cases: Mapping[str, Any], probed: int = 0) -> Groups:
    """Asserts the oracle in every case (values of scalar inputs), whichever of them the analysis was made on; returns that."""
    found = [analysed(net, **case) for case in cases]
    for groups in found:
        assert groups.prunable
        assert [(g.id, g.size, g.frozen) for g in groups.groups] == [(g.id, g.size, g.frozen) for g in found[0].groups]
        for seed, fraction in enumerate((0.5, 0.0, 0.9)):
            plan = oracle.keep(groups, fraction, np.random.default_rng(seed), scaled=fraction == 0.5)
            for case in cases:
                oracle.check(net, feeds(net, seed, **case), plan, groups)
    return found[probed]


CASES = ({"cond": YES}, {"cond": NO})
FIRST = ("Conv", "x wa", "a")
LAST = ("Conv", "b wl", "y")
WA = {"wa": w(8, 3, 1, 1)}


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


def layers(**more: Any) -> onnx.ModelProto:
    """Layers in both branches, of which one has a tensor between two convolutions."""
    then = body([("Conv", "a wt", "t1"), ("Relu", "t1", "t2"), ("Conv", "t2 wu", "o1")], "o1", **more)
    other = body([("Conv", "a we", "o2")], "o2")
    weights = {"wt": w(10, 8, 3, 3), "wu": w(6, 10, 3, 3), "we": w(6, 8, 5, 5), "wl": w(4, 6, 1, 1)}
    return model([FIRST, ("If", "cond", "b", either(then, other)), LAST], WA | weights)


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


# ------------------------------------------------------------------------------------------------------------- Loop


HIDDEN = 8
CELL = [("MatMul", "h wh", "hh"), ("Add", "hh u", "s"), ("Tanh", "s", "h2"), ("Identity", "c", "c2")]
CELL_WEIGHTS = {"wx": w(5, HIDDEN), "wh": w(HIDDEN, HIDDEN), "wo": w(HIDDEN, 4)}
TRIPS = ({"n": 3}, {"n": 0}, {"n": 1})


def looped(
    cell: Sequence[Node] = CELL,
    outputs: str = "c2 h2",
    start: Sequence[Node] = (("Mul", "u zero", "h0"),),
    makes: str = "hf",
    last: Sequence[Node] = (("MatMul", "hf wo", "y"),),
    **weights: Array,
) -> onnx.ModelProto:
    """h <- tanh(h wh + x wx), n times, then a linear layer."""
    loop = ("Loop", "n yes h0", makes, {"body": body(cell, outputs, "i c h")})
    constants = CELL_WEIGHTS | {"zero": np.float32(0), "yes": YES} | weights
    used = {x for node in [*start, *cell, *last] for x in node[1].split()} | {"wx", "yes", "h0"}
    return model(
        [("MatMul", "x wx", "u"), *start, loop, *last], {k: v for k, v in constants.items() if k in used}, {"x": ("N", 5)}
    )


def test_the_state_of_a_loop_is_cut_in_its_body_and_around_it() -> None:
    g = holds(looped(), *TRIPS)
    assert prunable(g, "hf") == HIDDEN
    assert {str(s.dim) for s in g.prunable[0].slots if s.dim.tensor == "wh"} == {"wh[axis 0]", "wh[axis 1]"}


def test_the_state_may_start_from_a_constant_or_a_filled_tensor() -> None:
    holds(looped(start=[("Identity", "k", "h0")], k=w(2, HIDDEN)), {"n": 3})
    shared = looped(start=[("Add", "u k", "h0")], cell=[("MatMul", "h wh", "hh"), ("Add", "hh k", "s"), *CELL[2:]], k=w(HIDDEN))
    holds(shared, *TRIPS)
    filled = looped(start=[("Shape", "x", "sh"), ("Slice", "sh o one", "nn"), ("Concat", "nn wide", "to", {"axis": 0}),
                           ("ConstantOfShape", "to", "h0")], o=ints(0), one=ints(1), wide=ints(HIDDEN))  # fmt: skip
    assert prunable(holds(filled, *TRIPS), "hf") == HIDDEN


def test_a_constant_that_starts_the_state_itself() -> None:
    net = looped(start=[], last=[("Add", "hf u", "v"), ("MatMul", "v wo", "y")], h0=w(2, HIDDEN))
    assert prunable(holds(net, *TRIPS), "hf") == HIDDEN


def test_a_state_that_the_input_starts_is_frozen() -> None:
    net = looped(start=[("Concat", "x x2", "h0", {"axis": 1})], x2=w(2, 3))  # five channels of eight, that is
    g = holds(net, *TRIPS)
    assert prunable(g, "wh", 0) == 3
    assert {x.reason for x, _ in g.at[Dim("wh", 0)] if x.frozen} == {"it comes from graph input 'x'"}


def test_what_a_loop_stacks_has_one_axis_more() -> None:
    net = looped(
        [*CELL, ("Unsqueeze", "h2 two", "s3"), ("Conv", "s3 wv", "v")],
        "c2 h2 v",
        makes="hf all",
        last=[("ReduceSum", "all zero_axis", "t", {"keepdims": 0}), ("Conv", "t wy", "y")],
        two=ints(2),
        wv=w(6, HIDDEN, 1),
        wy=w(4, 6, 1),
        zero_axis=ints(0),
    )
    g = holds(net, {"n": 3}, {"n": 1})
    assert (prunable(g, "all", 2), prunable(g, "v"), prunable(g, "hf")) == (6, 6, HIDDEN)


def test_layers_in_a_body_that_never_ran_are_cut_right() -> None:
    """The analysis sees no iteration at all: nor does it need one."""
    net = looped(
        [("MatMul", "h wi", "m"), ("Relu", "m", "r"), ("MatMul", "r wj", "hh"), *CELL[1:]], wi=w(HIDDEN, 12), wj=w(12, HIDDEN)
    )
    g = analysed(net, n=0)
    assert (prunable(g, "m"), prunable(g, "hf")) == (12, HIDDEN)
    for trips in (0, 1, 4):
        oracle.check(net, feeds(net, 1, n=trips), oracle.keep(g, 0.5, np.random.default_rng(1)), g)


def test_shapes_that_the_body_of_a_loop_declares_follow() -> None:
    net = looped()
    inside = control.bodies(net.graph.node[2])[0]
    for info in (inside.input[2], inside.output[1]):
        info.CopyFrom(helper.make_tensor_value_info(info.name, TensorProto.FLOAT, [2, HIDDEN]))
    inside.value_info.append(helper.make_tensor_value_info("hh", TensorProto.FLOAT, ["N", HIDDEN]))
    g = holds(net, *TRIPS)
    inside = control.bodies(surgery(g, oracle.only(g, {g.prunable[0].id: [0, 1, 5]})).graph.node[2])[0]
    for info in (inside.input[2], inside.output[1], inside.value_info[0]):
        assert info.type.tensor_type.shape.dim[1].dim_value == 3


def test_a_loop_that_its_condition_ends() -> None:
    """while |h| < limit; the trip count is absent."""
    cell = [*CELL[:3], ("MatMul", "h2 wn", "q"), ("ReduceMax", "q", "top", {"keepdims": 0}), ("Less", "top limit", "c2")]
    net = looped(cell, wn=w(HIDDEN, 3), limit=np.float32(0.5))
    net.graph.node[2].input[0] = ""
    del net.graph.input[1:]
    assert prunable(holds(net, {}), "hf") == HIDDEN


def test_what_a_loop_makes_of_constants_is_no_constant() -> None:
    """The body reads constants only, so that its result could be a weight; it is not one that can be silenced."""
    start = [("Identity", "k", "h0")]
    cell = [("MatMul", "h wh", "h2"), ("Identity", "c", "c2")]
    net = looped(cell, start=start, last=[("MatMul", "u hf", "v"), ("MatMul", "v wo", "y")], k=w(HIDDEN, HIDDEN))
    g = analysed(net, n=2)
    assert "hf" not in g.net.fixed and not any(g.net.values.get(name) is not None for name in ("h", "h2"))
    for other in g.prunable:
        oracle.check(net, feeds(net, 1, n=2), oracle.only(g, {other.id: [0]}), g)


def test_a_trip_count_that_counts_channels_stays_what_it_was() -> None:
    nodes = [("Shape", "u", "sh"), ("Gather", "sh one", "n2"), ("Mul", "u zero", "h0")]
    net = looped(start=nodes, one=np.array(1))
    net.graph.node[4].input[0] = "n2"
    del net.graph.input[1:]
    net.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    g = group(runtime.probe_again(analysed(net).net))
    assert prunable(g, "hf") == HIDDEN
    oracle.check(net, feeds(net), oracle.keep(g, 0.5, np.random.default_rng(0)), g)


def test_a_state_that_grows_is_not_followed() -> None:
    cell = [("Concat", "h u", "h2", {"axis": 0}), ("Identity", "c", "c2")]
    g = analysed(looped(cell, start=[("Identity", "u", "h0")]), n=2)
    assert why(g, "u") == "Loop 'hf' is not followed: 'h' in its body changes size from one iteration to the next"


def test_a_tensor_that_grows_inside_is_not_followed() -> None:
    cell = [("Add", "i one", "i1"), ("Unsqueeze", "i1 o", "i2"), ("Slice", "long o i2", "part"), ("ReduceSum", "part", "t"),
            ("Add", "h t", "h2"), ("Identity", "c", "c2")]  # fmt: skip
    net = looped(cell, long=w(9, 1), o=ints(0), one=np.array(1))
    assert "'part' in its body changes size" in why(analysed(net, n=2), "u")


def test_an_if_in_a_loop_is_not_followed() -> None:
    branches = either(body([("Relu", "h", "o1")], "o1"), body([("Neg", "h", "o2")], "o2"))
    g = analysed(looped([("If", "cond", "h2", branches), ("Identity", "c", "c2")]), n=2, cond=YES)
    assert why(g, "u").endswith("If 'h2' is not followed: it stands in the body of Loop 'hf'")


def test_a_loop_over_a_sequence_is_not_followed() -> None:
    carried = helper.make_graph(
        protos([("SequenceInsert", "q u", "q2"), ("Identity", "c", "c2")]),
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []),
            helper.make_tensor_sequence_value_info("q", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, []),
            helper.make_tensor_sequence_value_info("q2", TensorProto.FLOAT, None),
        ],
    )
    nodes = [("MatMul", "x wx", "u"), ("SequenceEmpty", "", "q0"), ("Loop", "n yes q0", "qf", {"body": carried})]
    nodes += [("ConcatFromSequence", "qf", "v", {"axis": 0}), ("MatMul", "v wo", "y")]
    net = model(nodes, {"wx": w(5, 8), "wo": w(8, 4), "yes": YES}, {"x": ("N", 5)})
    assert why(analysed(net, n=2), "u") == (
        "a subgraph reads it, and Loop 'qf' is not followed: 'q0', which it reads, is no tensor"
    )


def test_a_sequence_map_is_not_followed() -> None:
    entry, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "ef")
    each = helper.make_graph(protos([("MatMul", "e wo", "f")]), "body", [entry], [made])
    nodes = [("MatMul", "x wx", "u"), ("SequenceConstruct", "u u", "q"), ("SequenceMap", "q", "r", {"body": each})]
    net = model([*nodes, ("ConcatFromSequence", "r", "y", {"axis": 0})], {"wx": w(5, 8), "wo": w(8, 4)}, {"x": ("N", 5)})
    net.graph.node[-1].output[0] = net.graph.node[-1].name = "v"
    net.graph.node.extend(protos([("MatMul", "v wo2", "y")]))
    net.graph.initializer.append(numpy_helper.from_array(w(4, 3), "wo2"))
    g = analysed(net)
    assert g.net.inside.opaque == {"r": "onnxprune does not follow SequenceMap"}
    assert "Sequence" in why(g, "u") and "Sequence" in why(g, "wo2", 0)


# ------------------------------------------------------------------------------------------------------------- Scan


def scanned(axis: int = 0, out: int = 0, backwards: bool = False) -> onnx.ModelProto:
    """A recurrent cell along `axis` of x, whose states are stacked along `out`; the input is widened first."""
    shape: list[int | str] = [2, 2]
    shape.insert(axis % 3, 4)
    shape[-1 if axis % 3 != 2 else 1] = 5
    cell = body([("MatMul", "h wh", "hh"), ("Add", "hh s", "t"), ("Tanh", "t", "h2"), ("MatMul", "h2 wv", "v")], "h2 v", "h s")
    attributes: dict[str, Any] = {"body": cell, "num_scan_inputs": 1}
    if axis:
        attributes["scan_input_axes"] = [axis]
    if out:
        attributes["scan_output_axes"] = [out]
    if backwards:
        attributes["scan_input_directions"] = [1]
    perms = {0: [1, 0, 2], 1: [0, 1, 2], -1: [0, 2, 1]}
    stacked = {0: [1, 0, 2], 1: [0, 1, 2], -1: [0, 2, 1]}[out]
    nodes = [
        ("MatMul", "x wx", "u0"),  # [batch, time, hidden]
        ("Transpose", "u0", "u", {"perm": perms[axis]}),
        ("Scan", "h0 u", "hf all", attributes),
        ("Transpose", "all", "a", {"perm": stacked}),
        ("MatMul", "a wy", "y1"),
        ("MatMul", "hf wo", "y2"),
    ]
    weights = {
        "wx": w(5, HIDDEN),
        "wh": w(HIDDEN, HIDDEN),
        "wv": w(HIDDEN, 6),
        "wy": w(6, 4),
        "wo": w(HIDDEN, 3),
        "h0": w(2, HIDDEN),
    }
    return model(nodes, weights, {"x": (2, 4, 5)}, "y1 y2")


@pytest.mark.parametrize(("axis", "out", "backwards"), [(0, 0, False), (1, 1, True), (-1, -1, False), (0, -1, True)])
def test_a_scan_is_cut_in_its_body_and_around_it(axis: int, out: int, backwards: bool) -> None:
    g = holds(scanned(axis, out, backwards), {})
    assert (prunable(g, "u0", 2), prunable(g, "hf"), prunable(g, "v")) == (HIDDEN, HIDDEN, 6)


def test_an_axis_that_is_scanned_is_frozen() -> None:
    cell = body([("Add", "h s", "h2")], "h2", "h s")
    nodes = [("MatMul", "x wx", "u"), ("Scan", "h0 u", "hf", {"body": cell, "num_scan_inputs": 1, "scan_input_axes": [1]})]
    g = analysed(
        model([*nodes, ("MatMul", "x wx", "v"), ("Add", "v v", "y")], {"wx": w(5, 8), "h0": w(2)}, {"x": (2, 5)}, "y hf")
    )
    assert "ScanBody" in why(g, "u")


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
