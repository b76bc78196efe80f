"""ai.onnx.ml behind a network: features that are scaled, mended, picked and joined one by one."""

from __future__ import annotations

from typing import Any

import pytest
from test_rules import attribute, build, cut, holds, ints, operand, seeded, together, w, why

from onnxprune.groups import Groups

__all__ = ["seeded"]  # every test draws the same weights

ML = {"domain": "ai.onnx.ml"}
START = [("GlobalAveragePool", "a", "p"), ("Flatten", "p", "f")]  # [1, 8]


def features(*nodes: tuple[Any, ...], size: int = 8, **weights: Any) -> Groups:
    return build([*START, *nodes, ("MatMul", "b wl", "y")], {"wl": w(size, 2), **weights})


@pytest.mark.parametrize("single", [False, True])
def test_a_scaler_has_numbers_for_every_feature(single: bool) -> None:
    count = 1 if single else 8
    g = features(("Scaler", "f", "b", {"offset": w(count).tolist(), "scale": w(count).tolist(), **ML}))
    assert together(g, "a.1[3]", "f.1[3]", "b.1[3]", "wl.0[3]")
    pruned = cut(g, "a.1", [3, 4])
    assert len(attribute(pruned, "b", "scale")) == len(attribute(pruned, "b", "offset")) == (1 if single else 6)
    holds(g)


def test_an_imputer_and_a_binarizer() -> None:
    g = features(("Imputer", "f", "b", {"imputed_value_floats": w(8).tolist(), "replaced_value_float": float("nan"), **ML}))
    assert len(attribute(cut(g, "a.1", [3]), "b", "imputed_value_floats")) == 7
    holds(g)
    holds(features(("Binarizer", "f", "b", {"threshold": 0.1, **ML})))


@pytest.mark.parametrize("norm", ["L1", "L2", "MAX"])
def test_a_normalizer_is_approximate(norm: str) -> None:
    g = features(("Normalizer", "f", "b", {"norm": norm, **ML}))
    assert why(g, "a") == "Normalizer 'b' normalises over it"


def test_features_that_are_picked() -> None:
    g = features(("ArrayFeatureExtractor", "f i", "b", ML), size=4, i=ints(6, 2, 6, 5)[None])
    assert together(g, "a.1[6]", "b.1[0]", "b.1[2]", "wl.0[2]")
    assert operand(cut(g, "a.1", [1, 2]), "b", 1) == [[4, 4, 3]]
    holds(g)


def test_features_that_are_joined() -> None:
    nodes = [("MatMul", "f w2", "h"), ("FeatureVectorizer", "f h", "b", {"inputdimensions": [8, 3], **ML})]
    g = features(*nodes, size=11, w2=w(8, 3))
    assert together(g, "h.1[1]", "b.1[9]", "wl.0[9]")
    assert attribute(cut(g, "b.1", [0, 9]), "b", "inputdimensions") == [7, 2]
    holds(g)


def test_what_keeps_its_weights_in_attributes_freezes() -> None:
    g = build([*START, ("LinearRegressor", "f", "y", {"coefficients": w(8).tolist(), "intercepts": [0.5], "targets": 1, **ML})])
    assert why(g, "a") == "LinearRegressor 'y' keeps its weights in attributes"
