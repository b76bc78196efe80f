"""Quantised operators of ai.onnx: QDQ pairs around ordinary operators, and those that compute on integers themselves.

A scale or zero point of one element is of the whole tensor and stays; a vector has an entry for every channel and follows it.
A slice of zeros silences a channel only where the weight's zero point is 0; elsewhere a slice of that does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import numpy as np

from onnxprune.channels import Dim, Freeze, Tie
from onnxprune.rules import conv
from onnxprune.rules import linear as products
from onnxprune.rules.base import OFFSET, Consumer, Contracts, Fact, Layer, Offset, Rounds, Rule, Steps, View
from onnxprune.rules.elementwise import broadcast


def linear(view: View) -> Iterator[Fact]:
    """Element by element; scales and zero points of one axis follow its channels. Blocked quantisation is left to freeze."""
    if view.attr("block_size", 0):
        return
    yield from broadcast(view, [0])
    rank = len(view.shape(0))
    for i in (1, 2):
        if view.has(i) and len(view.shape(i)) == 1 and view.shape(i)[0] > 1 and rank:
            yield Tie(view.y(view.attr("axis", 1) % rank), view.x(i, 0))


def dynamic(view: View) -> Iterator[Fact]:
    """Element by element, in steps that depend on the smallest and the largest element."""
    yield from broadcast(view, [0])
    yield from ranged(view, 0)


def ranged(view: View, i: int) -> Iterator[Fact]:
    """Input `i` is quantised by its own range: what is cut no longer widens it, and the rest may round otherwise."""
    for axis in range(len(view.shape(i))):
        yield Rounds(view.x(i, axis), f"{view} takes its steps from the range of the whole tensor")


# ------------------------------------------------------------------------------------------ scales and zero points


def whole(view: View, *inputs: int) -> bool:
    """Whether each of these scales and zero points is of one element, as for a whole tensor, or absent."""
    return all(not view.has(i) or int(np.prod(view.shape(i))) == 1 for i in inputs)


def at_most_vectors(view: View, *inputs: int) -> bool:
    """Whether each of these scales and zero points is of one element, or a vector with one for each channel, or absent."""
    return all(whole(view, i) or len(view.shape(i)) == 1 for i in inputs)


def follow(view: View, dim: Dim, *inputs: int) -> Iterator[Fact]:
    """Those of the scales and zero points that are vectors follow `dim`."""
    for i in inputs:
        if not whole(view, i):
            yield Tie(dim, view.x(i, 0))


def silenced(view: View, facts: Iterable[Fact], zeros: Mapping[int, int]) -> Iterator[Fact]:
    """`facts`, and what zero points other than 0 mean for them; zeros[i] is the input with the zero point of input i."""
    by_name = {view.name(i): zero for i, zero in zeros.items()}
    for fact in facts:
        yield fact
        if isinstance(fact, Consumer):
            yield from _offset(view, fact.dim, by_name[fact.dim.tensor])
        elif isinstance(fact, Contracts):
            for dim in fact.dims:
                if not _known(view, by_name[dim.tensor], zero=True):
                    yield Freeze(dim, f"{view} multiplies two activations, of which one has a zero point other than 0")


def _offset(view: View, dim: Dim, i: int) -> Iterator[Fact]:
    """The zero point of a weight, input `i`, has to be constant, and so does the weight where it is not 0."""
    if _known(view, i, zero=True):
        return
    if _known(view, i, zero=False) and dim.tensor in view.net.initializers:
        yield Offset(dim, f"{view} {OFFSET}")
    else:
        yield Freeze(dim, f"{view} has a weight with a zero point other than 0: no slice of zeros silences it")


def _known(view: View, i: int, *, zero: bool) -> bool:
    """Whether the zero point at input `i` is constant; with `zero` also whether it is 0, as it is by default."""
    value = view.value(i)
    return not view.has(i) or (value is not None and not (zero and np.any(value)))


def steps(view: View, scale: int | None, zero: int | None, axes: tuple[int, ...] = ()) -> Steps:
    """How to read the integers whose scale and zero point are these inputs."""
    names = [view.name(i) if i is not None and view.has(i) else "" for i in (scale, zero)]
    return Steps(names[0], names[1], axes)


def constant(view: View, made: Steps) -> Steps:
    """The same for a weight, of which only what is constant can be known beforehand."""
    fixed = view.net.fixed
    return Steps(made.scale if made.scale in fixed else "", made.zero if made.zero in fixed else "", made.axes)


# ---------------------------------------------------------------------------------------------------- convolutions

LINEAR_CONV = conv.Form(w=3, bias=8)


def conv_integer(view: View) -> Iterator[Fact]:
    """x, w, zero point of x, zero point of w (for all filters, or for each)."""
    if whole(view, 2) and at_most_vectors(view, 3):
        yield from silenced(view, conv.conv_ties(view, conv.Form(bias=view.count)), {1: 3})
        yield from follow(view, view.y(1), 3)


def conv_integer_layers(view: View) -> list[Layer]:
    made, read = constant(view, factor(view, 1, 3, (0,))), factor(view, 0, 2)
    return [replace(layer, steps=made, x_steps=read) for layer in conv.layers(view)]


def factor(view: View, i: int, zero: int, axes: tuple[int, ...] = ()) -> Steps:
    """How to read input `i` of an operator on integers, which knows zero points only.

    A constant's scale comes later in the graph; that of an activation was made together with its zero point.
    """
    made = steps(view, None, zero, axes)
    if view.fixed(i):
        return replace(made, scale=scale_behind(view))
    maker = view.net.producer.get(made.zero)
    node = None if maker is None else view.net.model.graph.node[maker]
    return replace(made, scale=node.output[1]) if node is not None and node.op_type == "DynamicQuantizeLinear" else made


def scale_behind(view: View) -> str:
    """The constant that the sums of an integer operator are multiplied by after their Cast: its weight's scale."""
    net, name = view.net, view.node.outputs[0].name
    channels = max(view.out_shape()[1 if view.op == "ConvInteger" else -1], 1)
    for op in ("Cast", "Mul"):
        users = [net.model.graph.node[i] for i, _ in net.uses.get(name, [])]
        if len(users) != 1 or users[0].op_type != op:
            return ""
        read, name = name, users[0].output[0]
    factors = [x for x in users[0].input if x != read]
    for factor in factors:
        if factor in net.producer and factor not in net.fixed:
            maker = net.model.graph.node[net.producer[factor]]
            factors += maker.input if maker.op_type == "Mul" else []
    fitting = (f for f in factors if f in net.fixed and int(np.prod(net.shapes[f])) in (1, channels))
    return next(fitting, "")


def qlinear_conv(view: View, form: conv.Form = LINEAR_CONV) -> Iterator[Fact]:
    """x, w and y, each with its scale and zero point, then B: those of w are for all filters, or for each."""
    if whole(view, 1, 2, 6, 7) and at_most_vectors(view, 4, 5):
        yield from silenced(view, conv.conv_ties(view, form), {3: 5})
        yield from follow(view, view.y(form.axis), 4, 5)


def qlinear_conv_layers(view: View, form: conv.Form = LINEAR_CONV) -> list[Layer]:
    made = constant(view, steps(view, 4, 5, (0,)))
    return [replace(layer, steps=made, x_steps=steps(view, 1, 2)) for layer in conv.layers(view, form)]


# -------------------------------------------------------------------------------------------------- matrix products

Parameters = tuple[int | None, int | None]
"""Which inputs are the scale and the zero point of a factor."""


def product(view: View, form: products.Form, a: Parameters, b: Parameters) -> Iterator[Fact]:
    """A product of two quantised matrices: vectors of A's scales and zero points follow its rows, B's its columns."""
    mine, theirs = ([i for i in p if i is not None] for p in (a, b))
    if not at_most_vectors(view, *mine, *theirs) or min(len(view.shape(form.a)), len(view.shape(form.b))) < 2:
        return
    zeros = {i: view.count if p[1] is None else p[1] for i, p in ((form.a, a), (form.b, b))}
    yield from silenced(view, products.matmul_ties(view, form), zeros)
    yield from follow(view, view.y(-2), *mine)
    yield from follow(view, view.y(-1), *theirs)


def product_layers(view: View, form: products.Form, a: Parameters, b: Parameters) -> list[Layer]:
    """The layer of such a product, with what its integers stand for."""
    rows = steps(view, *a, (len(view.shape(form.a)) - 2,))
    columns = steps(view, *b, (len(view.shape(form.b)) - 1,))
    return [quantised(view, layer, form, rows, columns) for layer in products.matmul_layers(view, form)]


def quantised(view: View, layer: Layer, form: products.Form, a: Steps, b: Steps) -> Layer:
    """The layer of a product, reading its weight (or other activation) and its activation by the steps of the two factors."""
    w, x = (a, b) if layer.weight == view.name(form.a) else (b, a)
    return replace(layer, steps=constant(view, w) if layer.weight else w, x_steps=x)


def matmul_integer_layers(view: View) -> list[Layer]:
    rows = factor(view, 0, 2, (len(view.shape(0)) - 2,))
    columns = factor(view, 1, 3, (len(view.shape(1)) - 1,))
    return [quantised(view, layer, products.PLAIN, rows, columns) for layer in products.matmul_layers(view)]


def qlinear_matmul(view: View) -> Iterator[Fact]:
    """a, b and y, each with its scale and zero point."""
    if whole(view, 6, 7):
        yield from product(view, products.Form(0, 3), (1, 2), (4, 5))


ELEMENTWISE = {
    "DequantizeLinear": Rule(linear),
    "QuantizeLinear": Rule(linear),
    "DynamicQuantizeLinear": Rule(dynamic),
}
LINEAR = {
    "ConvInteger": Rule(conv_integer, conv.fixup, conv_integer_layers),
    "QLinearConv": Rule(qlinear_conv, partial(conv.fixup, form=LINEAR_CONV), qlinear_conv_layers),
    "MatMulInteger": Rule(
        partial(product, form=products.PLAIN, a=(None, 2), b=(None, 3)),
        None,
        matmul_integer_layers,
    ),
    "QLinearMatMul": Rule(
        qlinear_matmul,
        None,
        partial(product_layers, form=products.Form(0, 3), a=(1, 2), b=(4, 5)),
    ),
}
