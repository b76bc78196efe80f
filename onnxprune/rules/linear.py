"""Gemm and MatMul."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Dim, Freeze, Tie
from onnxprune.rules.base import Consumer, Contracts, Fact, Layer, Rule, View


def _contraction(view: View, a: Dim, b: Dim) -> Iterator[Fact]:
    """Sums over `a` of input 0 and `b` of input 1."""
    yield Tie(a, b)
    if view.fixed(0) and view.fixed(1):
        why = f"{view} multiplies two constants: no weight to zero along the summed axis"
        yield Freeze(a, why, remedy="fold constants (onnxsim does)")
    elif view.fixed(0) or view.fixed(1):
        yield Consumer(a if view.fixed(0) else b)
    else:
        yield Contracts((a, b))


def _gemm_axes(view: View) -> tuple[tuple[int, int], tuple[int, int]]:
    """((free, summed) axis of A, (summed, free) axis of B)."""
    a = (1, 0) if view.attr("transA", 0) else (0, 1)
    b = (1, 0) if view.attr("transB", 0) else (0, 1)
    return a, b


def gemm_ties(view: View) -> Iterator[Fact]:
    """Y = alpha A' B' + beta C, C broadcast to [M, N]."""
    (a_free, a_sum), (b_sum, b_free) = _gemm_axes(view)
    yield from _contraction(view, view.x(0, a_sum), view.x(1, b_sum))
    yield Tie(view.x(0, a_free), view.y(0))
    yield Tie(view.x(1, b_free), view.y(1))
    if view.has(2):
        shape = view.shape(2)
        if shape and shape[-1] > 1:
            yield Tie(view.x(2, -1), view.y(1))
        if len(shape) == 2 and shape[0] > 1:
            yield Tie(view.x(2, 0), view.y(0))


def gemm_layers(view: View) -> list[Layer]:
    (_, a_sum), (b_sum, _) = _gemm_axes(view)
    a_is_weight = view.fixed(0) and not view.fixed(1)
    x, w = (view.x(1, b_sum), view.x(0, a_sum)) if a_is_weight else (view.x(0, a_sum), view.x(1, b_sum))
    weight = view.name(0) if a_is_weight else view.name(1) if view.fixed(1) else ""
    out = view.y(0) if a_is_weight else view.y(1)
    dims = (w, view.y(0), view.y(1))
    return [_layer(view, x, w, out, dims, weight)]


def _layer(view: View, x: Dim, w: Dim, out: Dim, dims: tuple[Dim, ...], weight: str) -> Layer:
    """A product with a weight, or of two activations."""
    other = None if weight or view.fixed(0) else w
    return Layer(view.index, view.label, view.op, x, w if weight else None, out, 1, dims, weight, other)


def matmul_ties(view: View) -> Iterator[Fact]:
    """NumPy matmul: the last two axes multiply, the leading ones broadcast. Vectors (rank 1) are left to freeze."""
    a, b, y = view.shape(0), view.shape(1), view.out_shape()
    if len(a) < 2 or len(b) < 2:
        return
    yield from _contraction(view, view.x(0, -1), view.x(1, -2))
    yield Tie(view.x(0, -2), view.y(-2))
    yield Tie(view.x(1, -1), view.y(-1))
    for i, shape in ((0, a), (1, b)):
        if view.fixed(i) and int(np.prod(shape[:-2])) > 1:
            yield Freeze(view.x(i, -2 if i else -1), f"{view} has a weight of its own for every batch entry")
        for axis, size in enumerate(shape[:-2]):
            if size > 1:
                yield Tie(view.x(i, axis), view.y(axis + len(y) - len(shape)))


def matmul_layers(view: View) -> list[Layer]:
    a, b, y = view.shape(0), view.shape(1), view.out_shape()
    if len(a) < 2 or len(b) < 2:
        return []
    a_is_weight = view.fixed(0) and not view.fixed(1)
    x, w = (view.x(1, -2), view.x(0, -1)) if a_is_weight else (view.x(0, -1), view.x(1, -2))
    out = view.y(-2) if a_is_weight else view.y(-1)
    weight = view.name(0) if a_is_weight else view.name(1) if view.fixed(1) else ""
    dims = (w, *(view.y(axis) for axis in range(len(y))))
    return [_layer(view, x, w, out, dims, weight)]


RULES = {
    "Gemm": Rule(gemm_ties, None, gemm_layers),
    "MatMul": Rule(matmul_ties, None, matmul_layers),
}
