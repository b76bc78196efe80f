"""Looking up, writing to, ordering and choosing positions: the axes that are not indexed pass, some that are pass as well."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto
from test_rules import LAST, attribute, build, cut, holds, ints, node, operand, prunable, seeded, together, w, why

__all__ = ["seeded"]  # every test draws the same weights

OUTER = ("Transpose", "a", "t", {"perm": [1, 0, 2, 3]})  # [8, 1, 6, 6]
INNER = ("Transpose", "g", "b", {"perm": [1, 0, 2, 3]})
# Indices that are the data's: the largest places of the input.
PLACES = [("TopK", "x two", "v p", {"axis": 2}), ("Slice", "p zero one axis1", "i")]  # [1, 1, 2, 6]
FOUND = {"two": ints(2), "zero": ints(0), "one": ints(1), "axis1": ints(1)}


# ---- Slice with a stride


@pytest.mark.parametrize("opset", [10, 11, 18])
@pytest.mark.parametrize("step", [2, -3])
def test_a_stride_over_channels_becomes_a_gather(opset: int, step: int) -> None:
    taken = np.arange(8)[1 if step > 0 else -1 :: step]
    weights = {"s": ints(1 if step > 0 else -1), "e": ints(99 if step > 0 else -99), "ax": ints(1), "st": ints(step)}
    g = build([("Slice", "a s e ax st", "b"), LAST], {**weights, "wl": w(4, len(taken), 1, 1)}, opset=opset)
    assert together(g, f"a.1[{taken[1]}]", "b.1[1]", "wl.1[1]")
    assert prunable(g, "a") == 8  # those that are not taken can go as well
    pruned = cut(g, "a.1", [0, int(taken[1])])
    assert (node(pruned, "b").op_type, attribute(pruned, "b", "axis")) == ("Gather", 1)
    kept = [c for c in range(8) if c not in (0, taken[1])]
    assert operand(pruned, "b", 1) == [kept.index(c) for c in taken if c != taken[1]]
    holds(g)


def test_a_stride_next_to_another_axis_freezes() -> None:
    weights = {"s": ints(0, 1), "e": ints(8, 6), "ax": ints(1, 2), "st": ints(2, 1), "wl": w(4, 4, 1, 1)}
    g = build([("Slice", "a s e ax st", "b"), LAST], weights)
    assert why(g, "a") == "Slice 'b' takes every 2th position of it, and slices another axis too"


# ---- GatherND


@pytest.mark.parametrize("opset", [11, 12, 18])
def test_a_gather_nd_of_whole_slices_permutes_channels(opset: int) -> None:
    g = build(
        [OUTER, ("GatherND", "t i", "g"), INNER, LAST], {"i": ints(3, -1, 3, 0)[:, None], "wl": w(4, 4, 1, 1)}, opset=opset
    )
    assert together(g, "a.1[3]", "g.0[0]", "g.0[2]", "wl.1[2]")
    assert together(g, "a.1[7]", "g.0[1]")
    assert operand(cut(g, "a.1", [1, 7]), "g", 1) == [[2], [2], [0]]
    holds(g)


def test_a_gather_nd_behind_the_channels_hands_them_on() -> None:
    places = np.stack(np.meshgrid([0], [1, 3], [5, 0, 2], indexing="ij"), -1)  # [1, 2, 3, 3]
    nodes = [("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}), ("GatherND", "t i", "b"), ("MatMul", "b wl", "y")]
    g = build(nodes, {"i": places.astype(np.int64), "wl": w(8, 3)})
    assert together(g, "a.1[3]", "b.3[3]", "wl.0[3]")
    holds(g)


def test_a_gather_nd_of_a_grid_that_runs_over_the_channels() -> None:
    """Every component of the tuples varies along one axis of the indices: what goes takes a row or a column with it."""
    grid = np.stack(np.meshgrid([7, 2, 5], [1, 4], indexing="ij"), -1)[None]  # channels and rows, for the one sample
    nodes = [("GatherND", "a i", "b", {"batch_dims": 1}), ("Einsum", "b wl", "y", {"equation": "bchw,cd->bdhw"})]
    g = build(nodes, {"i": grid.astype(np.int64), "wl": w(3, 2)})
    assert together(g, "a.1[2]", "b.1[1]", "wl.0[1]")
    assert np.array(operand(cut(g, "a.1", [2, 3]), "b", 1)).tolist() == [[[[5, 1], [5, 4]], [[3, 1], [3, 4]]]]
    holds(g)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        ([[3, 0], [3, 2]], "takes position 3 of it"),
        ([[[3, 0], [1, 0]], [[2, 1], [0, 1]]], "looks up other positions of it in every row"),
    ],
)
def test_a_gather_nd_that_freezes(indices: list[Any], words: str) -> None:
    nodes = [
        ("Transpose", "a", "t", {"perm": [1, 2, 0, 3]}),
        ("GatherND", "t i", "g"),
        ("ReduceSum", "g", "s"),
        ("Add", "a s", "b"),
        LAST,
    ]
    g = build(nodes, {"i": np.array(indices), "wl": w(4, 8, 1, 1)})
    reasons = {x.reason for x in g.groups if any(s.dim.tensor == "a" for s in x.slots)}
    assert reasons == ({f"GatherND 'g' {words}", None} if "position 3" in words else {f"GatherND 'g' {words}"})
    if "position 3" in words:
        holds(g)


def test_a_gather_nd_by_data_hands_on_what_it_does_not_index() -> None:
    nodes = [*PLACES, ("Reshape", "i col", "ci"), OUTER, ("Transpose", "t", "u", {"perm": [2, 0, 1, 3]})]
    nodes += [("GatherND", "u ci", "g"), ("Transpose", "g", "b", {"perm": [2, 1, 0, 3]}), LAST]
    g = build(nodes, {**FOUND, "col": ints(12, 1), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "g.1[3]", "wl.1[3]")
    holds(g)
    g = build(
        [*PLACES, ("Reshape", "i col", "ci"), OUTER, ("GatherND", "t ci", "g"), INNER, LAST],
        {**FOUND, "col": ints(12, 1), "wl": w(4, 12, 1, 1)},
    )
    assert why(g, "a") == "GatherND 'g' looks positions up at run time"


def test_the_gather_nd_of_onnx_runtime() -> None:
    nodes = [OUTER, ("GatherND", "t i", "g", {"domain": "com.microsoft"}), INNER, LAST]
    g = build(nodes, {"i": ints(3, 7, 0)[:, None], "wl": w(4, 3, 1, 1)})
    assert together(g, "a.1[7]", "g.0[1]", "wl.1[1]")
    holds(g)


# ---- ScatterND


@pytest.mark.parametrize("opset", [11, 13, 16, 18])
def test_a_scatter_nd_of_whole_slices_writes_channels(opset: int) -> None:
    nodes = [
        OUTER,
        ("Conv", "x wu", "u"),
        ("Transpose", "u", "v", {"perm": [1, 0, 2, 3]}),
        ("ScatterND", "t i v", "g"),
        INNER,
        LAST,
    ]
    weights = {"i": ints(6, 2, -8)[:, None], "wu": w(3, 3, 1, 1), "wl": w(4, 8, 1, 1)}
    g = build(nodes, weights, opset=opset)
    assert together(g, "a.1[2]", "g.0[2]", "u.1[1]", "wu.0[1]", "wl.1[2]")
    assert prunable(g, "a") == 8
    assert operand(cut(g, "a.1", [1, 2]), "g", 1) == [[4], [0]]
    holds(g)


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_a_scatter_nd_may_reduce(reduction: str) -> None:
    nodes = [OUTER, ("ScatterND", "t i u", "g", {"reduction": reduction}), INNER, LAST]
    g = build(nodes, {"i": ints(6, 2, 2)[:, None], "u": w(3, 1, 6, 6), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[2]", "u.0[1]", "u.0[2]")
    holds(g)


def test_a_scatter_nd_of_a_grid() -> None:
    """x[:, 2:5] = u as exporters write it: one tuple for every element."""
    grid = np.stack(np.meshgrid([0], [2, 3, 4], range(6), range(6), indexing="ij"), -1)
    nodes = [("Conv", "x wu", "u"), ("ScatterND", "a i u", "b"), LAST]
    g = build(nodes, {"i": grid.astype(np.int64), "wu": w(3, 3, 1, 1), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "u.1[1]", "b.1[3]", "wl.1[3]")
    pruned = cut(g, "a.1", [0, 3])
    assert np.array(operand(pruned, "b", 1))[0, :, 0, 0, 1].tolist() == [1, 2]
    holds(g)


def test_a_scatter_nd_to_one_channel_keeps_it() -> None:
    grid = np.stack(np.meshgrid([0], [5], range(6), range(6), indexing="ij"), -1)
    g = build([("Conv", "x wu", "u"), ("ScatterND", "a i u", "b"), LAST], {"i": grid, "wu": w(1, 3, 1, 1), "wl": w(4, 8, 1, 1)})
    kept = next(x for x in g.groups if x.frozen and x.size == 1)
    assert (kept.reason, kept.slots[0].positions.tolist()) == ("ScatterND 'b' writes to position 5 of it", [5])
    assert prunable(g, "b") == 7
    holds(g)


def test_a_scatter_nd_at_places_that_are_data() -> None:
    """A cache that is written in place: the axes behind the tuples pass."""
    nodes = [*PLACES, ("Reshape", "i col", "ci"), ("Transpose", "a", "t", {"perm": [2, 1, 0, 3]})]
    nodes += [("ScatterND", "t ci k", "g"), ("Transpose", "g", "b", {"perm": [2, 1, 0, 3]}), LAST]
    g = build(nodes, {**FOUND, "col": ints(12, 1), "k": w(12, 8, 1, 6), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "g.1[3]", "k.1[3]", "wl.1[3]")
    holds(g)


# ---- one index per element


@pytest.mark.parametrize("opset", [11, 18])
def test_gather_elements_hands_on_the_other_axes(opset: int) -> None:
    indices = np.random.default_rng(0).integers(-6, 6, (1, 8, 4, 6))
    g = build([("GatherElements", "a i", "b", {"axis": 2}), LAST], {"i": indices, "wl": w(4, 8, 1, 1)}, opset=opset)
    assert together(g, "a.1[3]", "i.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


def test_gather_elements_of_fewer_channels_and_along_them() -> None:
    indices = np.random.default_rng(0).integers(0, 6, (1, 5, 6, 6))
    g = build([("GatherElements", "a i", "b", {"axis": -1}), LAST], {"i": indices, "wl": w(4, 5, 1, 1)})
    assert together(g, "a.1[3]", "b.1[3]")
    assert prunable(g, "a") == 8  # the last three are not read
    holds(g)
    g = build([("GatherElements", "a i", "b", {"axis": 1}), LAST], {"i": indices, "wl": w(4, 5, 1, 1)})
    assert why(g, "a") == "GatherElements 'b' looks positions of it up one by one"
    g = build([("GatherElements", "a i", "b", {"axis": 2}), ("MatMul", "b wl", "y")], {"i": indices[:, :1], "wl": w(6, 2)})
    assert prunable(g, "a") == 7  # all but the first


@pytest.mark.parametrize(("op", "opset"), [("Scatter", 9), ("ScatterElements", 11), ("ScatterElements", 18)])
def test_scatter_elements_hands_on_the_other_axes(op: str, opset: int) -> None:
    indices = np.tile(np.array([4, 1, 0]), (1, 8, 6, 1))
    nodes = [(op, "a i u", "b", {"axis": 3}), LAST]
    g = build(nodes, {"i": indices, "u": w(1, 8, 6, 3), "wl": w(4, 8, 1, 1)}, opset=opset)
    assert together(g, "a.1[3]", "i.1[3]", "u.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


def test_scatter_elements_along_the_channels_freezes_both() -> None:
    indices = np.tile(np.arange(3).reshape(1, 3, 1, 1), (1, 1, 6, 6))
    nodes = [("Conv", "x wu", "u"), ("ScatterElements", "a i u", "b", {"axis": 1}), LAST]
    g = build(nodes, {"i": indices, "wu": w(3, 3, 1, 1), "wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "ScatterElements 'b' writes to positions of it one by one"
    assert why(g, "u") == "ScatterElements 'b' writes it to other positions"


@pytest.mark.parametrize("mode", ["linear", "circular"])
def test_tensor_scatter(mode: str) -> None:
    nodes = [("Slice", "a zero one axis2", "u"), ("TensorScatter", "k u i", "b", {"mode": mode, "axis": 2}), LAST]
    weights = {"k": w(1, 8, 6, 6), "i": ints(3), "zero": ints(0), "one": ints(1), "axis2": ints(2), "wl": w(4, 8, 1, 1)}
    g = build(nodes, weights, opset=24, ir=10)
    assert together(g, "a.1[3]", "k.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


# ---- order and choice


@pytest.mark.parametrize("opset", [9, 10, 11, 18])
def test_top_k_hands_on_the_other_axes(opset: int) -> None:
    attributes = {"axis": 3, **({"k": 2} if opset == 9 else {})}
    nodes = [("TopK", "a" if opset == 9 else "a k", "v i", attributes), ("Cast", "i", "c", {"to": TensorProto.FLOAT})]
    g = build([*nodes, ("Add", "v c", "b"), LAST], {"k": ints(2), "wl": w(4, 8, 1, 1)}, opset=opset)
    assert together(g, "a.1[3]", "v.1[3]", "i.1[3]", "wl.1[3]")
    holds(g)


def test_top_k_of_the_channels_freezes_them() -> None:
    g = build([("TopK", "a k", "b i", {"axis": 1}), LAST], {"k": ints(2), "wl": w(4, 2, 1, 1)})
    assert why(g, "a") == "TopK 'b' puts its positions in order of their values"


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("keep", [0, 1])
@pytest.mark.parametrize("opset", [10, 13])
def test_the_place_of_the_largest(op: str, keep: int, opset: int) -> None:
    nodes = [(op, "a", "i", {"axis": 2, "keepdims": keep}), ("Cast", "i", "b", {"to": TensorProto.FLOAT})]
    last = LAST if keep else ("Einsum", "b wl", "y", {"equation": "bcs,cd->bds"})
    if opset < 12 and not keep:
        last = ("MatMul", "wl b", "y")
    weights = {"wl": w(4, 8, 1, 1) if keep else w(8, 4) if opset > 11 else w(4, 8)}
    g = build([*nodes, last], weights, opset=opset)
    assert together(g, "a.1[3]", "i.1[3]", "b.1[3]")
    holds(g)


def test_the_channel_of_the_largest_freezes() -> None:
    g = build(
        [("ArgMax", "a", "i", {"axis": 1}), ("Cast", "i", "c", {"to": 1}), ("Add", "a c", "b"), LAST], {"wl": w(4, 8, 1, 1)}
    )
    assert why(g, "a") == "ArgMax 'i' numbers its positions"


@pytest.mark.parametrize("opset", [9, 11, 18])
def test_compress_by_a_constant_takes_channels(opset: int) -> None:
    condition = np.array([1, 0, 1, 1, 0, 1], bool)  # what is not covered is not taken
    g = build([("Compress", "a c", "b", {"axis": 1}), LAST], {"c": condition, "wl": w(4, 4, 1, 1)}, opset=opset)
    assert together(g, "a.1[3]", "c.0[3]", "b.1[2]", "wl.1[2]")
    assert prunable(g, "a") == 8
    assert operand(cut(g, "a.1", [1, 3, 7]), "b", 1) == [True, True, False, True]
    holds(g)


def test_compress_by_data_or_of_everything_freezes() -> None:
    nodes = [("ReduceMean", "x", "m", {"keepdims": 0}), ("Greater", "m far", "g"), ("Expand", "g six", "c")]
    weights = {"far": np.float32(-99), "six": ints(6), "wl": w(4, 8, 1, 1)}
    holds(build([*nodes, ("Compress", "a c", "b", {"axis": 3}), LAST], weights))
    g = build([*nodes, ("Compress", "a c", "b", {"axis": 1}), LAST], {**weights, "wl": w(4, 6, 1, 1)})
    assert why(g, "a") == "Compress 'b' chooses among its positions at run time"
    g = build(
        [("Compress", "a c", "b"), ("Unsqueeze", "b z", "u"), ("MatMul", "u wl", "y")],
        {"c": np.ones(9, bool), "z": ints(0), "wl": w(9, 2)},
    )
    assert why(g, "a") == "Compress 'b' mixes its positions"


@pytest.mark.parametrize("axis", [-1, 0, 1, 2])
def test_one_hot_hands_on_the_axes_of_its_indices(axis: int) -> None:
    nodes = [("ReduceMean", "a last", "m", {"keepdims": 0}), ("Cast", "m", "i", {"to": TensorProto.INT64})]
    nodes += [("OneHot", "i depth values", "b", {"axis": axis})]  # [1, 8, 6] -> one more axis
    place = 1 if axis in (-1, 2) else 2
    letters = ["p", "q", "r", "s"]
    letters[place] = "c"
    nodes += [("Einsum", "b wl", "y", {"equation": f"{''.join(letters)},cz->{''.join(letters).replace('c', 'z')}"})]
    weights = {"last": ints(3), "depth": ints(5), "values": np.array([-1, 2], np.float32), "wl": w(8, 2)}
    g = build(nodes, weights)
    assert together(g, "a.1[3]", f"b.{place}[3]", "wl.0[3]")
    holds(g)


def test_reverse_sequence() -> None:
    g = build(
        [("ReverseSequence", "a n", "b", {"time_axis": 0, "batch_axis": 1}), LAST], {"n": ints(*[1] * 8), "wl": w(4, 8, 1, 1)}
    )
    assert together(g, "a.1[3]", "n.0[3]", "b.1[3]", "wl.1[3]")
    holds(g)
    nodes = [OUTER, ("ReverseSequence", "t n", "g", {"time_axis": 0, "batch_axis": 1}), INNER, LAST]
    g = build(nodes, {"n": ints(5), "wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "ReverseSequence 'g' reverses it up to lengths that are data"
    nodes = [
        ("Transpose", "a", "t", {"perm": [2, 0, 1, 3]}),
        ("ReverseSequence", "t n", "g"),
        ("Transpose", "g", "b", {"perm": [1, 2, 0, 3]}),
    ]
    holds(build([*nodes, LAST], {"n": ints(5), "wl": w(4, 8, 1, 1)}))


@pytest.mark.parametrize("domain", ["", "com.microsoft"])
def test_trilu(domain: str) -> None:
    holds(build([("Trilu", "a", "b", {"domain": domain, "upper": 0}), LAST], {"wl": w(4, 8, 1, 1)}))
    nodes = [
        ("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}),
        ("Trilu", "t k", "u", {"domain": domain}),
        ("MatMul", "u wl", "y"),
    ]
    g = build(nodes, {"k": np.array(1), "wl": w(8, 2)})
    assert why(g, "a") == "Trilu 'u' tells its positions apart by their numbers"
