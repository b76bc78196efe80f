"""Gemm and MatMul."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxprune.channels import Dim, Freeze, Tie
from onnxprune.rules.base import Consumer, Contracts, Fact, Layer, Rule, View


@dataclass(frozen=True)
class Form:
    """Which inputs of a product are its factors A and B, and which is the bias C (of a Gemm)."""

    a: int = 0
    b: int = 1
    c: int = 2


PLAIN = Form()


def _contraction(view: View, a: Dim, b: Dim, form: Form) -> Iterator[Fact]:
    """Sums over `a` of factor A and `b` of factor B."""
    yield Tie(a, b)
    if view.fixed(form.a) and view.fixed(form.b) and not _only_a_weight(view, form.b):
        why = f"{view} multiplies two constants: no weight to zero along the summed axis"
        yield Freeze(a, why, remedy="fold constants (onnxsim does)")
    elif view.fixed(form.a) or view.fixed(form.b):
        yield Consumer(b if view.fixed(form.b) else a)
    else:
        yield Contracts((a, b))


def _only_a_weight(view: View, i: int) -> bool:
    """Whether a constant is read by such products alone, all of which sum over the same axis of it.

    Then it is a weight, even if what it is multiplied with is a constant too (a first state, embeddings of positions).
    """
    net, name = view.net, view.name(i)
    alike = all(
        (net.nodes[index].op, position, net.nodes[index].attrs) == (view.op, i, view.node.attrs)
        for index, position in net.uses[name]
    )
    return alike and name in net.initializers and name not in net.read_elsewhere


def _gemm_axes(view: View) -> tuple[tuple[int, int], tuple[int, int]]:
    """((free, summed) axis of A, (summed, free) axis of B)."""
    a = (1, 0) if view.attr("transA", 0) else (0, 1)
    b = (1, 0) if view.attr("transB", 0) else (0, 1)
    return a, b


def gemm_ties(view: View, form: Form = PLAIN) -> Iterator[Fact]:
    """Y = alpha A' B' + beta C, C broadcast to [M, N]."""
    (a_free, a_sum), (b_sum, b_free) = _gemm_axes(view)
    yield from _contraction(view, view.x(form.a, a_sum), view.x(form.b, b_sum), form)
    yield Tie(view.x(form.a, a_free), view.y(0))
    yield Tie(view.x(form.b, b_free), view.y(1))
    if view.has(form.c):
        shape = view.shape(form.c)
        if shape and shape[-1] > 1:
            yield Tie(view.x(form.c, -1), view.y(1))
        if len(shape) == 2 and shape[0] > 1:
            yield Tie(view.x(form.c, 0), view.y(0))


def _weight(view: View, form: Form) -> int | None:
    """Which factor, A or B, is the weight: B where both are constant, None where neither is."""
    return form.b if view.fixed(form.b) else form.a if view.fixed(form.a) else None


def gemm_layers(view: View, form: Form = PLAIN) -> list[Layer]:
    (_, a_sum), (b_sum, _) = _gemm_axes(view)
    a, b, weight = view.x(form.a, a_sum), view.x(form.b, b_sum), _weight(view, form)
    x, w, out = (b, a, view.y(0)) if weight == form.a else (a, b, view.y(1))
    return [_layer(view, x, w, out, (w, view.y(0), view.y(1)), weight)]


def _layer(view: View, x: Dim, w: Dim, out: Dim, dims: tuple[Dim, ...], weight: int | None) -> Layer:
    """A product with a weight, or of two activations."""
    summed, other, name = (None, w, "") if weight is None else (w, None, view.name(weight))
    return Layer(view.index, view.label, view.op, x, summed, out, 1, dims, name, other)


def matmul_ties(view: View, form: Form = PLAIN) -> Iterator[Fact]:
    """NumPy matmul: the last two axes multiply, the leading ones broadcast. Vectors (rank 1) are left to freeze."""
    a, b, y = view.shape(form.a), view.shape(form.b), view.out_shape()
    if len(a) < 2 or len(b) < 2:
        return
    yield from _contraction(view, view.x(form.a, -1), view.x(form.b, -2), form)
    yield Tie(view.x(form.a, -2), view.y(-2))
    yield Tie(view.x(form.b, -1), view.y(-1))
    for i, shape in ((form.a, a), (form.b, b)):
        if i == _weight(view, form) and int(np.prod(shape[:-2])) > 1:
            yield Freeze(view.x(i, -1 if i == form.a else -2), f"{view} has a weight of its own for every batch entry")
        for axis, size in enumerate(shape[:-2]):
            if size > 1:
                yield Tie(view.x(i, axis), view.y(axis + len(y) - len(shape)))


def matmul_layers(view: View, form: Form = PLAIN) -> list[Layer]:
    if len(view.shape(form.a)) < 2 or len(view.shape(form.b)) < 2:
        return []
    a, b, weight = view.x(form.a, -1), view.x(form.b, -2), _weight(view, form)
    x, w, out = (b, a, view.y(-2)) if weight == form.a else (a, b, view.y(-1))
    return [_layer(view, x, w, out, (w, *(view.y(axis) for axis in range(len(view.out_shape())))), weight)]


RULES = {
    "Gemm": Rule(gemm_ties, None, gemm_layers),
    "MatMul": Rule(matmul_ties, None, matmul_layers),
}
