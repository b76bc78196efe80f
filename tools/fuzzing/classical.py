"""ai.onnx.ml: the operators of classical pipelines on rows of features."""

from __future__ import annotations

from collections.abc import Callable

from fuzzing.build import Builder, T
from fuzzing.layers import linear, of_rank

Maker = Callable[[Builder], object]
ML = "ai.onnx.ml"


def rows(b: Builder) -> T:
    return of_rank(b, (2,), lambda t: t.static(1))


def numbers(b: Builder, x: T, low: float, high: float) -> list[float]:
    """One for every feature, or one for all."""
    return [float(v) for v in b.rng.uniform(low, high, x.shape[1] if b.chance(0.7) else 1)]


def scaler(b: Builder) -> T:
    x = rows(b)
    return b.op("Scaler", [x], ML, x.channel, scale=numbers(b, x, 0.5, 1.5), offset=numbers(b, x, -1, 1))


def imputer(b: Builder) -> T:
    x = rows(b)
    values = numbers(b, x, -1, 1)
    return b.op("Imputer", [x], ML, x.channel, imputed_value_floats=values, replaced_value_float=b.choose([0.0, float("nan")]))


def normalizer(b: Builder) -> T:
    return b.op("Normalizer", [rows(b)], ML, norm=b.choose(["L1", "L2", "MAX"]))


def extract(b: Builder) -> T:
    x = of_rank(b, (2, 3), lambda t: t.static(t.rank - 1))
    taken = b.rng.integers(0, x.shape[-1], b.number(1, 5))
    return b.op("ArrayFeatureExtractor", [x, b.const(taken[None] if b.chance(0.5) else taken)], ML, x.rank - 1)


def vectorizer(b: Builder) -> T:
    x = rows(b)
    parts = [x, *(linear(b, x, 1, b.number(1, 4)) for _ in range(b.number(0, 2)))]
    return b.op("FeatureVectorizer", parts, ML, 1, inputdimensions=[t.shape[1] for t in parts])


CLASSICAL: dict[str, Maker] = {
    "ArrayFeatureExtractor": extract,
    "Binarizer": lambda b: b.op("Binarizer", [rows(b)], ML, threshold=0.1),
    "FeatureVectorizer": vectorizer,
    "Imputer": imputer,
    "Normalizer": normalizer,
    "Scaler": scaler,
}
