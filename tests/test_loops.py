"""Loop and Scan: their bodies are cut like everything else."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from axes import prunable, why
from bodied import CELL, HIDDEN, TRIPS, YES, analysed, body, either, feeds, holds, ints, looped, model, protos, scanned, w
from onnx import TensorProto, helper, numpy_helper

from onnxprune import control, runtime
from onnxprune.channels import Dim
from onnxprune.passes.group import group
from onnxprune.passes.surgery import surgery

# ------------------------------------------------------------------------------------------------------------- Loop


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


def test_a_loop_in_a_loop_is_not_followed() -> None:
    """The channels that stay outside of it are cut."""
    inner = body([("Tanh", "k", "k2"), ("Identity", "d", "d2")], "d2 k2", "j d k")
    cell = [("Loop", "three yes h", "s", {"body": inner}), ("Identity", "s", "h2"), ("Identity", "c", "c2")]
    wide = [("MatMul", "u wide", "v"), ("Relu", "v", "v2"), ("MatMul", "v2 narrow", "h0")]
    net = looped(cell, start=wide, three=np.array(3), wide=w(HIDDEN, 6), narrow=w(6, HIDDEN))
    g = analysed(net, n=2)
    assert why(g, "h0").endswith("Loop 's' is not followed: it stands in the body of Loop 'hf'")
    assert prunable(g, "v") == 6
    holds(net, *TRIPS)


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
