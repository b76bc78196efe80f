"""What every operator does to an elementwise bound on the error of what it reads, given the values themselves.

Operators that increase in all that they read: the output lies between that of a - e and that of a + e, which is tighter
than a Lipschitz constant, since it sees where an activation is cut off. Sums of moved or positively weighted entries act on
e itself. Products: |a^ b^ - a b| <= |a| e_b + |b| e_a + e_a e_b. What is not in RULES ends the recursion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from onnxprune.certificate.recursion import Recursion, UnknownError
from onnxprune.graph import Array

Errors: TypeAlias = list[str | None]
Rule: TypeAlias = Callable[[Recursion, int], Errors]

# Largest slopes: of x Phi(x) and its tanh form 1.129, of x tanh(softplus x) 1.0885, of x (x + 3)/6 between -3 and 3 1.5.
SLOPES = {"Abs": 1.0, "Sin": 1.0, "Cos": 1.0, "Gelu": 1.13, "HardSwish": 1.5, "Mish": 1.09, "Neg": 1.0}
INCREASING = (
    *("Relu", "LeakyRelu", "Sigmoid", "Tanh", "Clip", "HardSigmoid", "Exp", "Softplus", "Elu", "Selu", "Celu", "Softsign"),
    *("Erf", "Floor", "Ceil", "Round", "Sign", "Atan", "Sinh", "Asinh", "Max", "Min", "MaxPool", "GlobalMaxPool"),
    *("ReduceMax", "ReduceMin", "ReduceLogSumExp"),
)
POSITIVE = (
    *("Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Split", "Gather", "GatherND"),
    *("GatherElements", "Expand", "Tile", "DepthToSpace", "SpaceToDepth", "AveragePool", "GlobalAveragePool", "ReduceMean"),
    *("ReduceSum", "CumSum", "Trilu"),
)


def _node(r: Recursion, i: int) -> Any:
    return r.net.model.graph.node[i]


def _attributes(r: Recursion, i: int) -> dict[str, Any]:
    return dict(r.net.nodes[i].attrs)


def _only(r: Recursion, i: int, *allowed: int) -> None:
    """Raises UnknownError when any other input than these has an error."""
    for p, name in enumerate(_node(r, i).input):
        if name and p not in allowed and r.error(i, p) is not None:
            raise UnknownError(f"{_node(r, i).op_type} with input {p} changed by the cut")


def _first(r: Recursion, i: int) -> str:
    """The error of what a node reads, where all of its other inputs are as they were."""
    _only(r, i, 0)
    error = r.error(i, 0)
    assert error is not None, "a rule is asked only where something has an error"
    return error


def increasing(r: Recursion, i: int) -> Errors:
    """The output is that of a - e at least and that of a + e at most."""
    node = _node(r, i)
    if any(float(_attributes(r, i).get(k, 0.0)) < 0 for k in ("alpha", "gamma")):
        raise UnknownError(f"{node.op_type} that falls")
    errors = [r.error(i, p) if name else None for p, name in enumerate(node.input)]
    if node.op_type == "Clip":
        _only(r, i, 0)
    high = [a if e is None else r.emit("Add", [a, e]) for a, e in zip(node.input, errors, strict=True)]
    low = [a if e is None else r.emit("Sub", [a, e]) for a, e in zip(node.input, errors, strict=True)]
    if len([o for o in node.output if o]) > 1:
        raise UnknownError(f"{node.op_type} with {len(node.output)} outputs")
    out = node.output[0]
    above = r.emit("Sub", [r.again(i, high)[0], out])
    below = r.emit("Sub", [out, r.again(i, low)[0]])
    return [r.emit("Max", [above, below])]


def positive(r: Recursion, i: int) -> Errors:
    """Entries are moved or summed with weights that are not negative: the same happens to the error."""
    node = _node(r, i)
    return list(r.again(i, [_first(r, i), *node.input[1:]]))


def pad(r: Recursion, i: int) -> Errors:
    """What is padded with a constant has no error."""
    node = _node(r, i)
    inputs = [_first(r, i), *node.input[1:]]
    if len(inputs) > 2:
        inputs[2] = ""
    while not inputs[-1]:
        inputs.pop()
    return list(r.again(i, inputs, value=None))


def concat(r: Recursion, i: int) -> Errors:
    node = _node(r, i)
    errors = [(a, r.error(i, p)) for p, a in enumerate(node.input)]
    return list(r.again(i, [e if e is not None else r.emit("Sub", [a, a]) for a, e in errors]))


def resize(r: Recursion, i: int) -> Errors:
    attributes = _attributes(r, i)
    odd = attributes.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if attributes.get("mode", "nearest") == "cubic" or odd:
        raise UnknownError(f"{_node(r, i).op_type} with weights of both signs or padding")
    return positive(r, i)


def cast(r: Recursion, i: int) -> Errors:
    if _attributes(r, i).get("to") not in (1, 11, np.dtype(np.float32), np.dtype(np.float64), np.float32, np.float64):
        raise UnknownError("Cast to a type that rounds")
    return positive(r, i)


def added(r: Recursion, i: int) -> Errors:
    """Sums and differences: the errors add up."""
    node = _node(r, i)
    errors = [e for p in range(len(node.input)) if (e := r.error(i, p)) is not None]
    total = r.filled(r.total(errors), node.output[0])
    if node.op_type == "Mean":
        total = r.emit("Div", [total, r.scalar(len(node.input), node.output[0])])
    return [total]


def multiplied(r: Recursion, i: int) -> Errors:
    node = _node(r, i)
    (a, b), (ea, eb) = node.input, (r.error(i, 0), r.error(i, 1))
    parts = [r.emit("Mul", [r.emit("Abs", [x]), e]) for x, e in ((a, eb), (b, ea)) if e is not None]
    if ea is not None and eb is not None:
        parts.append(r.emit("Mul", [ea, eb]))
    return [r.filled(r.total(parts), node.output[0])]


def divided(r: Recursion, i: int) -> Errors:
    """|a^/b^ - a/b| <= (e_a + |a/b| e_b)/(|b| - e_b), without limit where b^ may be 0."""
    node = _node(r, i)
    (_, b), (ea, eb) = node.input, (r.error(i, 0), r.error(i, 1))
    size = r.emit("Abs", [b])
    if eb is None:
        assert ea is not None
        return [r.filled(r.emit("Div", [ea, size]), node.output[0])]
    parts = [r.emit("Mul", [r.emit("Abs", [node.output[0]]), eb]), *([ea] if ea is not None else [])]
    least = r.emit("Sub", [size, eb])
    safe = r.emit("Greater", [least, r.scalar(0.0, b)])
    return [r.emit("Where", [safe, r.emit("Div", [r.total(parts), least]), r.scalar(np.inf, b)])]


def power(r: Recursion, i: int) -> Errors:
    node, exponent = _node(r, i), r.value(i, 1)
    e = _first(r, i)
    if exponent is None or exponent.size != 1 or float(exponent.reshape(())) != 2.0:
        raise UnknownError("Pow with an exponent other than 2")
    twice = r.emit("Mul", [r.emit("Abs", [node.input[0]]), e])
    return [r.total([twice, twice, r.emit("Mul", [e, e])])]


def root(r: Recursion, i: int) -> Errors:
    """The square root of the masked network's value is one of a number that is not negative either."""
    node = _node(r, i)
    a, e = node.input[0], _first(r, i)
    low = r.emit("Max", [r.emit("Sub", [a, e]), r.scalar(0.0, a)])
    above = r.emit("Sub", [r.emit("Sqrt", [r.emit("Add", [a, e])]), node.output[0]])
    return [r.emit("Max", [above, r.emit("Sub", [node.output[0], r.emit("Sqrt", [low])])])]


def lipschitz(r: Recursion, i: int) -> Errors:
    node = _node(r, i)
    return [r.emit("Mul", [_first(r, i), r.scalar(SLOPES[node.op_type], node.input[0])])]


def prelu(r: Recursion, i: int) -> Errors:
    """Slopes of at least 0 increase; others are Lipschitz with the largest."""
    slope = r.value(i, 1)
    e = _first(r, i)
    if slope is None:
        raise UnknownError("PRelu with slopes that are computed")
    if (slope >= 0).all():
        return increasing(r, i)
    return [r.emit("Mul", [e, r.scalar(max(1.0, float(np.abs(slope).max())), _node(r, i).input[0])])]


def batch_norm(r: Recursion, i: int) -> Errors:
    """At inference it multiplies by scale/sqrt(var + epsilon)."""
    node, scale, shift, mean = _node(r, i), r.value(i, 1), r.value(i, 2), r.value(i, 3)
    e = _first(r, i)
    if scale is None or shift is None or mean is None or _attributes(r, i).get("training_mode", 0):
        raise UnknownError("BatchNormalization with statistics that are computed")
    constants = [r.constant(v) for v in (np.abs(scale), np.zeros_like(shift), np.zeros_like(mean))]
    return list(r.again(i, [e, *constants, node.input[4]])[:1])


def dropout(r: Recursion, i: int) -> Errors:
    """At inference it hands its input on."""
    training = r.value(i, 2) if len(_node(r, i).input) > 2 else None
    if training is not None and training.any():
        raise UnknownError("Dropout in training mode")
    return [_first(r, i)]


def where(r: Recursion, i: int) -> Errors:
    """Chosen by a condition that the cut does not touch."""
    node = _node(r, i)
    _only(r, i, 1, 2)
    errors = [r.error(i, p) for p in (1, 2)]
    sides = [e if e is not None else r.scalar(0.0, node.input[p]) for p, e in enumerate(errors, start=1)]
    return [r.filled(r.emit("Where", [node.input[0], *sides]), node.output[0])]


def softmax(r: Recursion, i: int) -> Errors:
    """Where all inputs move by e at most, the odds p/(1 - p) change by a factor of exp(2 e) at most."""
    node = _node(r, i)
    p, most = node.output[0], _largest(r, i)
    if node.op_type == "LogSoftmax":
        return [r.emit("Add", [_first(r, i), most])]
    one, cap = r.scalar(1.0, p), r.scalar(40.0, p)
    factor = r.emit("Exp", [r.emit("Mul", [r.emit("Min", [most, cap]), r.scalar(2.0, p)])])
    rest = r.emit("Sub", [one, p])
    change = r.emit("Mul", [r.emit("Mul", [p, rest]), r.emit("Sub", [factor, one])])
    up = r.emit("Add", [r.emit("Mul", [p, factor]), rest])
    down = r.emit("Add", [p, r.emit("Mul", [rest, factor])])
    moved = r.emit("Div", [change, r.emit("Min", [up, down])])
    return [r.emit("Where", [r.emit("Less", [most, cap]), moved, one])]


def _largest(r: Recursion, i: int) -> str:
    """The largest error among the entries that a softmax normalises."""
    rank = len(r.net.shapes[_node(r, i).output[0]])
    old = r.net.opset < 13
    axis = int(_attributes(r, i).get("axis", 1 if old else -1)) % rank
    axes = list(range(axis, rank)) if old else [axis]
    e = _first(r, i)
    if r.net.opset < 18:
        return r.emit("ReduceMax", [e], axes=axes, keepdims=1)
    return r.emit("ReduceMax", [e, r.constant(np.array(axes, np.int64))], keepdims=1)


def linear(r: Recursion, i: int) -> Errors:
    """Convolutions and matrix products: |(W^ - W) a| + |W^| e; of two activations |a| e_b + e_a |b| + e_a e_b."""
    node = _node(r, i)
    fixed = [r.value(i, p) for p in (0, 1)]
    parts = []
    if fixed[0] is None and fixed[1] is None:
        (a, b), (ea, eb) = node.input[:2], (r.error(i, 0), r.error(i, 1))
        pairs = ((r.emit("Abs", [a]), eb), (ea, r.emit("Abs", [b])), (ea, eb))
        parts = [_product(r, i, x, y) for x, y in pairs if x is not None and y is not None]
    else:
        w = 1 if fixed[1] is not None else 0
        before = fixed[w]
        assert before is not None
        _, after = r.changed.get((i, w), (before, before))
        a, ea = node.input[1 - w], r.error(i, 1 - w)
        if after is not before:
            parts.append(r.emit("Abs", [_product(r, i, *_ordered(a, r.constant(_float(after) - _float(before)), w))]))
        if ea is not None:
            parts.append(_product(r, i, *_ordered(ea, r.constant(np.abs(_float(after))), w)))
    scale = abs(float(_attributes(r, i).get("beta", 1.0)))
    if len(node.input) > 2 and node.input[2] and (extra := r.error(i, 2)) is not None:
        if node.op_type != "Gemm":  # one number a channel
            shape = [1, -1, *[1] * (len(r.net.shapes[node.output[0]]) - 2)]
            extra = r.emit("Reshape", [extra, r.constant(np.array(shape, np.int64))])
        parts.append(extra if scale == 1.0 else r.emit("Mul", [extra, r.scalar(scale, node.output[0])]))
    return [r.filled(r.total(parts), node.output[0])]


def _float(value: Array) -> Array:
    if value.dtype.kind != "f":
        raise UnknownError("integer weights")
    return value


def _ordered(a: str, w: str, position: int) -> tuple[str, str]:
    return (a, w) if position == 1 else (w, a)


def _product(r: Recursion, i: int, x: str, y: str) -> str:
    """The node on other factors and without what it adds."""
    node = _node(r, i)
    if node.op_type != "Gemm":
        return r.again(i, [x, y])[0]
    nothing = r.constant(np.zeros(1, np.float32))  # before opset 11 a Gemm has to add something
    return r.again(i, [x, y, nothing], alpha=abs(float(_attributes(r, i).get("alpha", 1.0))), beta=1.0)[0]


RULES: dict[str, Rule] = {
    **dict.fromkeys(INCREASING, increasing),
    **dict.fromkeys(POSITIVE, positive),
    **dict.fromkeys(SLOPES, lipschitz),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean"), added),
    **dict.fromkeys(("Softmax", "LogSoftmax"), softmax),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), linear),
    **dict.fromkeys(("Resize", "Upsample"), resize),
    "Dropout": dropout,
    "Where": where,
    "Pad": pad,
    "Concat": concat,
    "Cast": cast,
    "Mul": multiplied,
    "Div": divided,
    "Pow": power,
    "Sqrt": root,
    "PRelu": prelu,
    "BatchNormalization": batch_norm,
}
