"""Zeros that mask a channel must not be divided by: no masked original would be left to hold the cut against."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from axes import prunable, why
from single import build, holds, ints, seeded, w

from onnxprune.groups import Groups

__all__ = ["seeded"]  # every test draws the same weights

POLES: dict[str, list[Any]] = {
    "Reciprocal": [("Reciprocal", "wl", "q")],
    "Div": [("Div", "one wl", "q")],
    "Log": [("Log", "wl", "q")],
    "Acosh": [("Acosh", "wl", "q")],
    "Pow": [("Pow", "wl minus", "q")],
    "Mod": [("Mod", "one wl", "q", {"fmod": 1})],
    "ReduceLogSum": [("ReduceLogSum", "wl first", "s"), ("Expand", "s four", "q")],
    "Reciprocal of a sum": [("ReduceSum", "wl first", "s"), ("Reciprocal", "s", "r"), ("Mul", "wl r", "q")],
    "Reciprocal of a moved weight": [("Transpose", "wl", "t", {"perm": [1, 0, 2, 3]}), ("Reciprocal", "t", "u")],
}
HARMLESS: dict[str, list[Any]] = {
    "Exp": [("Exp", "wl", "q")],
    "Div by something else": [("Div", "wl scale", "q")],
    "Reciprocal of a sum with something": [("Add", "wl one", "r"), ("Reciprocal", "r", "q")],
    "Pow": [("Pow", "wl half", "q")],
    "norm of every filter": [("ReduceL2", "wl last", "n"), ("Div", "wl n", "q")],
}


def shared(nodes: list[Any]) -> Groups:
    """`wl` sums over the 8 channels of 'a' and, put through `nodes`, makes 8 channels that are added to them."""
    if nodes[-1][2] == "u":
        nodes = [*nodes, ("Transpose", "u", "q", {"perm": [1, 0, 2, 3]})]
    nodes = [("Conv", "a wl", "c"), *nodes, ("ConvTranspose", "c q", "d"), ("Add", "a d", "e"), ("Conv", "e wz", "y")]
    weights = {
        "wl": np.abs(w(4, 8, 1, 1)) + 1,
        "wz": w(2, 8, 1, 1),
        "one": np.float32(1),
        "half": np.float32(0.5),
        "minus": np.full(1, -1, np.float32),
        "scale": np.abs(w(8, 1, 1)) + 1,
        "first": ints(0),
        "last": ints(1, 2, 3),
        "four": ints(4, 8, 1, 1),
    }
    return build(nodes, weights)


@pytest.mark.parametrize("name", POLES)
def test_a_weight_without_a_value_at_zero_elsewhere_freezes(name: str) -> None:
    groups = shared(POLES[name])
    assert why(groups, "a").startswith(name.split(maxsplit=1)[0])
    assert "has no finite value where zeros mask a channel of" in why(groups, "a")


@pytest.mark.parametrize("name", [n for n in HARMLESS if not n.startswith("norm")])
def test_other_readers_of_a_weight_freeze_nothing(name: str) -> None:
    groups = shared(HARMLESS[name])
    assert prunable(groups, "a") == 8
    holds(groups)


def test_the_norm_of_a_filter_mixes_its_channels_and_says_so() -> None:
    """The pole at 0 is not what is wrong there: other weights come out of it."""
    assert "ReduceL2" in why(shared(HARMLESS["norm of every filter"]), "a")


def test_an_activation_that_is_silenced_must_not_be_divided_by() -> None:
    """Channels of 'a' are summed as products of activations, so that zeros in `wa` mask them; 1 / a would be infinite."""
    nodes = [
        ("Reshape", "a sf", "f"),
        ("Transpose", "f", "t", {"perm": [0, 2, 1]}),
        ("MatMul", "t f", "m"),
    ]
    weights = {"sf": ints(1, 8, 36), "wl": w(4, 8, 1, 1)}
    plain = build([*nodes, ("Conv", "a wl", "y")], weights, outputs="m y")
    assert prunable(plain, "a") == 8
    holds(plain)
    groups = build([*nodes, ("Reciprocal", "a", "r"), ("Conv", "r wl", "y")], weights, outputs="m y")
    assert why(groups, "a").startswith("Reciprocal 'r' has no finite value")
