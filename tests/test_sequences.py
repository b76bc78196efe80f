"""Sequences of tensors: the parts of a split, and tensors that are listed and taken out again."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from axes import owner, prunable, together, why
from single import build, cut, holds, ints, operand, seeded, w

__all__ = ["seeded"]  # every test draws the same weights

LAST = ("Conv", "b wl", "y")


def taken(*places: int) -> list[tuple[Any, ...]]:
    """The sum of some parts of the sequence s, each behind a convolution of its own."""
    nodes: list[tuple[Any, ...]] = []
    for n, place in enumerate(places):
        nodes += [("SequenceAt", f"s i{place}", f"p{n}"), ("Conv", f"p{n} w{n}", f"q{n}")]
    return [*nodes, ("Sum", " ".join(f"q{n}" for n in range(len(places))), "y")]


PLACES = {f"i{place}": np.array(place) for place in (0, 1, 2, -1)}


@pytest.mark.parametrize(
    ("lengths", "starts"), [(ints(5, 3), [0, 5]), (np.array(3), [0, 3, 6]), (np.array([2, 2, 4], np.int32), [0, 2, 4])]
)
@pytest.mark.parametrize("opset", [11, 24])
def test_parts_of_a_split(lengths: Any, starts: list[int], opset: int) -> None:
    ends = [*starts[1:], 8]
    weights = {f"w{n}": w(2, end - start, 1, 1) for n, (start, end) in enumerate(zip(starts, ends, strict=True))}
    places = [*range(len(starts) - 1), -1]
    g = build(
        [("SplitToSequence", "a n", "s", {"axis": 1}), *taken(*places)], {**weights, **PLACES, "n": lengths}, opset=opset, ir=10
    )
    assert prunable(g, "a") == 8
    for n, start in enumerate(starts):
        assert together(g, f"a.1[{start + 1}]", f"p{n}.1[1]", f"w{n}.1[1]")
    pruned = cut(g, "a.1", [0, 7])
    sizes = [end - start for start, end in zip(starts, ends, strict=True)]
    assert operand(pruned, "s", 1) == [sizes[0] - 1, *sizes[1:-1], sizes[-1] - 1]
    holds(g)


def test_a_part_of_one_position_that_is_taken_keeps_it() -> None:
    nodes = [("SplitToSequence", "a n", "s", {"axis": 1}), ("SequenceAt", "s i0", "p"), ("Conv", "p wl", "y")]
    g = build(nodes, {**PLACES, "n": ints(1, 7), "wl": w(4, 1, 1, 1)})
    frozen, channel = owner(g, "a.1[0]")
    assert (frozen.size, channel) == (1, 0) and str(frozen.reason).startswith("SequenceAt 'p' ties it")
    assert prunable(g, "a") == 7
    holds(g)


@pytest.mark.parametrize("keep", [0, 1])
def test_a_split_into_single_positions(keep: int) -> None:
    """Along space; the channels pass."""
    last = ("Conv", "p wl", "y") if keep else ("MatMul", "wm p", "y")
    nodes = [("SplitToSequence", "a", "s", {"axis": 2, "keepdims": keep}), ("SequenceAt", "s i2", "p"), last]
    g = build(nodes, {**PLACES, "wl": w(4, 8, 1, 1), "wm": w(4, 8)})
    assert together(g, "a.1[3]", "p.1[3]")
    holds(g)
    g = build(
        [("SplitToSequence", "a", "s", {"axis": 1}), ("SequenceAt", "s i2", "p"), ("Conv", "p wl", "y")],
        {**PLACES, "wl": w(4, 1, 1, 1)},
    )
    assert why(g, "a") == "SplitToSequence 's' splits it into parts whose lengths are not constants"


def test_tensors_that_are_listed_and_taken_out_again() -> None:
    nodes = [("Conv", "x w2", "c"), ("SequenceConstruct", "a c", "s"), *taken(0, -1)]
    g = build(nodes, {**PLACES, "w2": w(5, 3, 1, 1), "w0": w(2, 8, 1, 1), "w1": w(2, 5, 1, 1)})
    assert together(g, "c.1[3]", "p1.1[3]", "w1.1[3]")
    assert together(g, "a.1[3]", "p0.1[3]", "w0.1[3]")
    holds(g)


def test_tensors_that_are_joined_again() -> None:
    nodes = [("Conv", "x w2", "c"), ("SequenceConstruct", "a c a", "s"), ("ConcatFromSequence", "s", "b", {"axis": 1}), LAST]
    g = build(nodes, {"w2": w(5, 3, 1, 1), "wl": w(4, 21, 1, 1)})
    assert together(g, "c.1[3]", "b.1[11]", "wl.1[11]")
    assert together(g, "a.1[3]", "b.1[3]", "b.1[16]")
    holds(g)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_tensors_that_are_stacked(axis: int) -> None:
    nodes = [
        ("Conv", "x w2", "c"),
        ("SequenceConstruct", "a c", "s"),
        ("ConcatFromSequence", "s", "k", {"axis": axis, "new_axis": 1}),
    ]
    nodes += [("ReduceMax", "k ax", "b", {"keepdims": 0}), LAST]
    g = build(nodes, {"w2": w(8, 3, 1, 1), "ax": ints(axis), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "c.1[3]", f"k.{1 if axis == -1 else 2}[3]", "wl.1[3]")
    holds(g)


def test_a_split_that_is_joined_along_another_axis() -> None:
    nodes = [("SplitToSequence", "a n", "s", {"axis": 1}), ("ConcatFromSequence", "s", "b", {"axis": 2}), LAST]
    g = build(nodes, {"n": ints(4, 4), "wl": w(3, 4, 1, 1)})
    assert together(g, "a.1[1]", "a.1[5]", "b.1[1]", "wl.1[1]")
    holds(g)


def test_a_sequence_that_is_read_otherwise_freezes() -> None:
    nodes = [("SplitToSequence", "a n", "s", {"axis": 1}), ("SequenceLength", "s", "l"), ("SequenceAt", "s i1", "b")]
    nodes += [("Cast", "l", "f", {"to": 1}), ("Conv", "b wl", "c"), ("Mul", "c f", "y")]
    g = build(nodes, {**PLACES, "n": ints(4, 4), "wl": w(3, 4, 1, 1)})
    assert why(g, "a") == "SplitToSequence 's' puts tensors into a sequence that is not followed"
    nodes = [("SequenceConstruct", "a", "e"), ("SequenceInsert", "e a", "s"), ("SequenceAt", "s i1", "b"), LAST]
    g = build(nodes, {**PLACES, "wl": w(3, 8, 1, 1)})
    assert why(g, "a") == "SequenceConstruct 'e' puts tensors into a sequence that is not followed"


@pytest.mark.parametrize("joined", [False, True])
def test_a_split_into_lengths_that_are_data_hands_on_the_other_axes(joined: bool) -> None:
    nodes: list[tuple[Any, ...]] = [
        ("ReduceMax", "x", "m", {"keepdims": 0}),
        ("Greater", "m far", "t"),
        ("Cast", "t", "z", {"to": 7}),
    ]
    nodes += [("Mul", "z four", "n"), ("SplitToSequence", "a n", "s", {"axis": 1 if joined else 2})]
    nodes += [("ConcatFromSequence", "s", "b", {"axis": 1}) if joined else ("SequenceAt", "s i0", "b"), LAST]
    weights = {**PLACES, "far": np.float32(-99), "four": ints(4, 4) if joined else ints(3, 3), "wl": w(3, 8, 1, 1)}
    g = build(nodes, weights)
    if joined:
        assert why(g, "a") == "SplitToSequence 's' splits it into parts whose lengths are not constants"
    else:
        assert together(g, "a.1[3]", "b.1[3]", "wl.1[3]")
        holds(g)
