"""ai.onnx.ml: the operators of classical pipelines that treat every feature by itself, or move features."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Tie
from onnxprune.rules.base import Approximate, Fact, Resize, Rule, View
from onnxprune.rules.edits import Edit, SetAttr, SetInput
from onnxprune.rules.elementwise import unary
from onnxprune.rules.norm import same_axes

PER_FEATURE = ("imputed_value_floats", "imputed_value_int64s", "offset", "scale")


def per_feature_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """Attributes with a number for every feature lose those of the features that go; a single one serves all."""
    dim = view.x(0, -1)
    for name in PER_FEATURE:
        values = view.attr(name) or []
        if resize.touches(dim) and len(values) > 1:
            yield SetAttr(name, [values[int(i)] for i in resize.kept(dim)])


def normalizer(view: View) -> Iterator[Fact]:
    """Every row is divided by its norm."""
    yield from same_axes(view, set())
    yield Approximate(view.x(0, -1), f"{view} normalises over it")


def extract(view: View) -> Iterator[Fact]:
    """The features with the given numbers, in their order."""
    taken = view.value(1)
    for axis, size in enumerate(view.shape(0)[:-1]):
        if size > 1:
            yield Tie(view.x(0, axis), view.y(axis))
    if taken is not None:
        yield Tie(view.x(0, -1), view.y(-1), taken.ravel(), None)


def extract_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    taken, dim = view.value(1), view.x(0, -1)
    if taken is not None and resize.touches(dim):
        number = np.full(resize.full(dim), -1)
        number[resize.kept(dim)] = np.arange(resize.size(dim))
        moved = number[taken.ravel()]
        yield SetInput(1, moved[moved >= 0].astype(taken.dtype).reshape(*taken.shape[:-1], -1))


def vectorizer(view: View) -> Iterator[Fact]:
    """Features of several tensors [n, features], one behind the other."""
    start = 0
    for i in range(view.count):
        rows, size = view.shape(i)
        if rows > 1:
            yield Tie(view.x(i, 0), view.y(0))
        yield Tie(view.x(i, 1), view.y(1), None, np.arange(start, start + size))
        start += size


def vectorizer_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """The number of features of every input."""
    if resize.touches(view.y(1)):
        yield SetAttr("inputdimensions", [resize.size(view.x(i, 1)) for i in range(view.count)])


ELEMENTWISE = {
    "Binarizer": Rule(unary),
    "Imputer": Rule(unary, per_feature_fixup),
    "Scaler": Rule(unary, per_feature_fixup),
}
NORM = {"Normalizer": Rule(normalizer)}
MOVEMENT = {
    "ArrayFeatureExtractor": Rule(extract, extract_fixup),
    "FeatureVectorizer": Rule(vectorizer, vectorizer_fixup),
}
