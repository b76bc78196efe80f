"""Operators that are no data movement and no ordinary layer: most have no rule, so that channels must end at them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from fuzzing.build import Builder, NoFitError, T
from fuzzing.elementwise import partner, positive
from fuzzing.layers import linear, signal
from fuzzing.movement import any_axis
from fuzzing.norms import axis_of, single
from fuzzing.weights import vector, weight

Maker = Callable[[Builder], object]


def arg(b: Builder, op: str) -> T:
    x = single(b)
    made = b.op(op, [x], axis=axis_of(b, x) % x.rank, keepdims=b.number(0, 1))
    return b.op("Cast", [made], to=TensorProto.FLOAT) if b.chance(0.5) and made.rank else made


def top_k(b: Builder) -> T:
    x = single(b)
    axis = axis_of(b, x) % x.rank
    k = b.number(1, min(x.sizes(axis)))
    outputs = [True, b.chance(0.5)]
    if b.opset < 10:
        return b.ops("TopK", [x], [True, True], k=k, axis=axis)[0]
    return b.ops("TopK", [x, b.ints(k)], outputs if b.opset >= 10 else [True, True], axis=axis)[0]


def einsum(b: Builder) -> T:
    x = single(b, (2, 3, 4))
    letters = "abcd"[: x.rank]
    axis = any_axis(b, x)
    if b.chance(0.3):
        return b.op("Einsum", [x], equation=f"{letters}->{letters[::-1]}")
    if not x.static(axis):
        raise NoFitError
    w = weight(b, (x.shape[axis], 3), x.shape[axis])
    return b.op("Einsum", [x, w], equation=f"{letters},{letters[axis]}z->{letters.replace(letters[axis], 'z')}")


def gather_elements(b: Builder) -> T:
    x = single(b)
    if not x.steady:
        raise NoFitError
    axis = any_axis(b, x)
    shape = [b.number(1, n) if a == axis else n for a, n in enumerate(x.shape)]
    return b.op("GatherElements", [x, b.const(b.rng.integers(0, x.shape[axis], shape))], axis=axis)


def gather_nd(b: Builder) -> T:
    x = single(b)
    depth = b.number(1, x.rank)
    rows = np.stack([b.rng.integers(0, min(x.sizes(a)), 3) for a in range(depth)], axis=1)
    return b.op("GatherND", [x, b.const(rows.astype(np.int64))])


def scatter_elements(b: Builder, op: str) -> T:
    x = single(b)
    if not x.steady:
        raise NoFitError
    axis = any_axis(b, x)
    shape = [1 if a == axis else n for a, n in enumerate(x.shape)]
    indices = b.const(b.rng.integers(0, x.shape[axis], shape))
    return b.op(op, [x, indices, vector(b, shape)], axis=axis)


def scatter_nd(b: Builder) -> T:
    x = single(b)
    if not x.steady:
        raise NoFitError
    indices = b.const(np.array([[b.number(0, x.shape[0] - 1)]], np.int64))
    return b.op("ScatterND", [x, indices, vector(b, (1, *x.shape[1:]))])


def one_hot(b: Builder) -> T:
    x = single(b)
    ids = b.op("Cast", [b.op("Mul", [positive(b, x), b.const(np.float32(2))])], to=TensorProto.INT64)
    return b.op("OneHot", [ids, b.ints(4), b.const(np.array([0, 1], np.float32))], axis=b.choose([-1, 0]))


def trilu(b: Builder) -> T:
    return b.op("Trilu", [single(b, (2, 3, 4))], upper=b.number(0, 1))


def eye_like(b: Builder) -> T:
    x = single(b, (2,))
    return b.op("Add", [x, b.op("EyeLike", [x])])


def reverse_sequence(b: Builder) -> T:
    x = single(b, (2, 3, 4))
    if not x.static(1):
        raise NoFitError
    lengths = b.ints(*(b.number(1, min(x.sizes(0))) for _ in range(x.shape[1])))
    return b.op("ReverseSequence", [x, lengths], batch_axis=1, time_axis=0)


def compress(b: Builder) -> T:
    x = single(b)
    axis = any_axis(b, x)
    taken = b.rng.random(min(x.sizes(axis))) < 0.6
    taken[0] = True
    return b.op("Compress", [x, b.const(taken)], axis=axis)


def mean_variance(b: Builder) -> T:
    x = single(b, (4,))
    y = b.op("Add", [x, b.const(np.linspace(0, 3, x.shape[1]).reshape(1, -1, 1, 1).astype(np.float32))]) if x.static(1) else x
    return b.op("MeanVarianceNormalization", [y], axes=b.choose([None, [2, 3], [0, 2, 3], [1, 2, 3]]) if b.opset >= 9 else None)


def grid_sample(b: Builder) -> T:
    x = signal(b, (4,))
    if not x.static(0):
        raise NoFitError
    grid = b.const(b.rng.uniform(-0.9, 0.9, (x.shape[0], 2, 3, 2)).astype(np.float32))
    return b.op("GridSample", [x, grid], channel=1)


def determinant(b: Builder) -> T:
    x = b.data("f", where=lambda t: t.rank == 3 and all(s[1] == s[2] for s in (v.shape for v in t.values)))
    return b.op("Det", [x])


def crop_or_pad(b: Builder) -> T:
    x = single(b)
    axis = any_axis(b, x)
    return b.op("CenterCropPad", [x, b.ints(b.number(1, 6))], axes=[axis])


def col2im(b: Builder) -> T:
    x = single(b, (3,))
    if not x.static(2) or not x.static(1):
        raise NoFitError
    return b.op("Col2Im", [x, b.ints(1, x.shape[2]), b.ints(1, 1)])


def max_unpool(b: Builder) -> T:
    x = signal(b, (4,))
    values, places = b.ops("MaxPool", [x], [True, True], kernel_shape=[1, 1])
    return b.op("MaxUnpool", [values, places], kernel_shape=[1, 1])


def softmax_attention(b: Builder) -> T:
    """softmax(q k') v of three projections of one tensor."""
    x = single(b, (3,))
    wide = b.number(2, 6)
    q, k, v = (linear(b, x, 2, wide) for _ in range(3))
    if {q.rank, k.rank, v.rank} != {3}:
        raise NoFitError
    scores = b.op("MatMul", [q, b.op("Transpose", [k], perm=[0, 2, 1])])
    if b.chance(0.5):
        scores = b.op("Mul", [scores, b.const(np.float32(0.5))])
    return b.op("MatMul", [b.op("Softmax", [scores], axis=2), v], channel=2)


def attention(b: Builder) -> T:
    x = single(b, (3,))
    heads, wide = b.choose([(1, 4), (2, 4), (2, 6)])
    q, k, v = (linear(b, x, 2, wide) for _ in range(3))
    return b.op("Attention", [q, k, v], q_num_heads=heads, kv_num_heads=heads, channel=2)


def rotary(b: Builder) -> T:
    x = single(b, (4,))
    size, half = x.shape[2], x.shape[3] // 2
    if x.shape[3] % 2 or not x.steady or not half:
        raise NoFitError
    angles = b.rng.uniform(0, 3, (x.shape[0], size, half))
    caches = [b.const(f(angles).astype(np.float32)) for f in (np.cos, np.sin)]
    return b.op("RotaryEmbedding", [x, *caches], channel=x.channel)


# ---- quantisation


def steps(b: Builder, x: T, kind: Any) -> tuple[T, T | None, int | None]:
    """(scale, zero point, axis) that suit x."""
    largest = max(float(np.abs(v).max()) for v in x.values) + 0.1
    middle = 128 if kind == np.uint8 else 0
    axis = any_axis(b, x) if x.rank and b.opset >= 13 and b.chance(0.4) else None
    if axis is None or not x.static(axis):
        point = b.const(np.array(middle, kind)) if kind == np.uint8 or b.chance(0.6) else None
        return b.const(np.array(largest / 120, np.float32)), point, None
    n = x.shape[axis]
    point = b.const(np.full(n, middle, kind))
    return b.const((largest / 120 * b.rng.uniform(1, 1.5, n)).astype(np.float32)), point, axis


def fake_quantised(b: Builder) -> T:
    """QuantizeLinear and DequantizeLinear in a row."""
    x = single(b)
    if b.opset < 10:
        raise NoFitError
    kind = b.choose([np.int8, np.uint8])
    scale, point, axis = steps(b, x, kind)
    point = b.const(np.zeros(scale.shape, kind)) if point is None and kind == np.int8 else point
    spelt = axis if axis is None or b.chance(0.7) else axis - x.rank
    y = b.op("QuantizeLinear", [x, scale, point], axis=spelt)
    if b.chance(0.3):
        y = b.op(b.choose(["Transpose", "Identity"]), [y])
    if y.shape != x.shape:
        raise NoFitError
    return b.op("DequantizeLinear", [y, scale, point], axis=spelt, channel=x.channel)


def integer_product(b: Builder, op: str) -> T:
    """DynamicQuantizeLinear, an integer product, and back to floating point."""
    x = single(b, (2, 3)) if op == "MatMulInteger" else signal(b, (4,))
    axis = x.rank - 1 if op == "MatMulInteger" else 1
    if not x.static(axis):
        raise NoFitError
    y, scale, point = b.ops("DynamicQuantizeLinear", [x], [True, True, True])
    n, wide = x.shape[axis], b.number(2, 6)
    shape = (n, wide) if op == "MatMulInteger" else (wide, n, 1, 1)
    w = b.const(b.rng.integers(-100, 100, shape).astype(np.int8), "w")
    small = b.op("Mul", [scale, b.const(np.float32(0.01))])
    total, cast, out = b.fresh("t"), b.fresh("t"), b.fresh("t")
    nodes = [
        helper.make_node(op, [y.name, w.name, point.name], [total], b.fresh(op)),
        helper.make_node("Cast", [total], [cast], b.fresh("Cast"), to=TensorProto.FLOAT),
        helper.make_node("Mul", [cast, small.name], [out], b.fresh("Mul")),
    ]
    return b.block(nodes, [y, w, point, small], [out])[0]


def quantised_product(b: Builder, op: str) -> T:
    """QLinearConv or QLinearMatMul between QuantizeLinear and DequantizeLinear."""
    x = single(b, (2, 3)) if op == "QLinearMatMul" else signal(b, (4,))
    axis = x.rank - 1 if op == "QLinearMatMul" else 1
    if not x.static(axis) or b.opset < 10:
        raise NoFitError
    one, point = b.const(np.float32(0.03)), b.const(np.uint8(128))
    y = b.op("QuantizeLinear", [x, one, point])
    n, wide = x.shape[axis], b.number(2, 6)
    shape = (n, wide) if op == "QLinearMatMul" else (wide, n, 1, 1)
    w = b.const(b.rng.integers(-100, 100, shape).astype(np.int8), "w")
    scale = b.const((b.rng.uniform(0.005, 0.01, wide if op == "QLinearConv" and b.chance(0.5) else ())).astype(np.float32))
    zero = b.const(np.zeros(scale.shape, np.int8))
    bias = [b.const(b.rng.integers(-50, 50, wide).astype(np.int32))] if op == "QLinearConv" and b.chance(0.5) else []
    made = b.op(op, [y, one, point, w, scale, zero, one, point, *bias], channel=axis)
    return b.op("DequantizeLinear", [made, one, point])


# ---- control flow and sequences


def tensor(name: str, t: T, shape: bool = False) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(t.dtype), list(t.shape) if shape else None)


def branch(b: Builder) -> T:
    """If, whose branches read tensors of the graph around it."""
    x = single(b)
    other = partner(b, x)
    test = b.op("Greater", [b.op("ReduceMax", [x], keepdims=0), b.const(np.float32(b.choose([-1e6, 1e6])))])
    out, yes, no = b.fresh("t"), b.fresh("inner"), b.fresh("inner")
    bodies = [
        helper.make_graph([helper.make_node(op, reads, [name])], name, [], [tensor(name, x)])
        for op, reads, name in (("Relu", [x.name], yes), ("Add", [x.name, other.name], no))
    ]
    node = helper.make_node("If", [test.name], [out], b.fresh("If"), then_branch=bodies[0], else_branch=bodies[1])
    return b.block([node], [test, x, other], [out])[0]


def loop(b: Builder) -> T:
    """Loop that works on a state with a weight from outside."""
    x = single(b)
    factor = vector(b, x.shape[-1:] if x.static(x.rank - 1) and b.chance(0.5) else (1,), 0.5)
    out, state, made, i, go, on = (b.fresh("inner") for _ in range(6))
    inner = [
        helper.make_node("Mul", [state, factor.name], [made]),
        helper.make_node("Identity", [go], [on]),
    ]
    counter = helper.make_tensor_value_info(i, TensorProto.INT64, [])
    flag = helper.make_tensor_value_info(go, TensorProto.BOOL, [])
    after = helper.make_tensor_value_info(on, TensorProto.BOOL, [])
    body = helper.make_graph(inner, "body", [counter, flag, tensor(state, x)], [after, tensor(made, x)])
    times, true = b.const(np.array(2, np.int64)), b.const(np.array(True))
    node = helper.make_node("Loop", [times.name, true.name, x.name], [out], b.fresh("Loop"), body=body)
    return b.block([node], [times, true, x, factor], [out])[0]


def scan(b: Builder) -> T:
    """A running sum over the first axis."""
    x = single(b, (2, 3))
    if not x.static(x.rank - 1):
        raise NoFitError
    start = b.const(np.zeros(x.shape[1:], np.float32))
    if not all(x.static(a) for a in range(1, x.rank)):
        raise NoFitError
    state, step, total, shown, out, last = (b.fresh("inner") for _ in range(6))
    inner = [helper.make_node("Add", [state, step], [total]), helper.make_node("Identity", [total], [shown])]
    reads, makes = [tensor(n, start, True) for n in (state, step)], [tensor(n, start) for n in (total, shown)]
    body = helper.make_graph(inner, "body", reads, makes)
    node = helper.make_node("Scan", [start.name, x.name], [last, out], b.fresh("Scan"), body=body, num_scan_inputs=1)
    return b.block([node], [start, x], [last, out])[1]


def sequence(b: Builder) -> T:
    """Split into a sequence, one taken out or all put together again."""
    x = single(b)
    axis = any_axis(b, x)
    parts, out = b.fresh("sequence"), b.fresh("t")
    first = helper.make_node("SplitToSequence", [x.name], [parts], b.fresh("Split"), axis=axis, keepdims=1)
    if b.chance(0.5):
        zero = b.const(np.array(0, np.int64))
        return b.block([first, helper.make_node("SequenceAt", [parts, zero.name], [out])], [x, zero], [out])[0]
    return b.block([first, helper.make_node("ConcatFromSequence", [parts], [out], axis=axis)], [x], [out])[0]


def non_zero(b: Builder) -> T:
    """Positions, as many as the data has: summed up, so that the number does not show."""
    x = single(b)
    places = b.op("Cast", [b.op("NonZero", [positive(b, x)])], to=TensorProto.FLOAT)
    return b.op("ReduceMax", [places], keepdims=0)


# ---- ONNX Runtime's own


def gelu(b: Builder, op: str) -> T:
    x = b.data("f", dtype=np.float32)
    if op == "BiasGelu" or (op == "FastGelu" and b.chance(0.4)):
        if not x.rank or not x.static(x.rank - 1):
            raise NoFitError
        return b.op(op, [x, vector(b, x.shape[-1:])], "com.microsoft")
    return b.op(op, [x], "com.microsoft")


def fused_matmul(b: Builder) -> T:
    x = single(b, (2, 3))
    turned = b.chance(0.5)
    summed = x.rank - (2 if turned else 1)
    if not x.static(summed):
        raise NoFitError
    w = weight(b, (x.shape[summed], 4), x.shape[summed])
    return b.op("FusedMatMul", [x, w], "com.microsoft", transA=int(turned), alpha=0.5, channel=x.rank - 1)


def skip_layer_norm(b: Builder) -> T:
    x = single(b, (3,))
    if not x.static(2):
        raise NoFitError
    reads = [x, partner(b, x), vector(b, x.shape[2:], 1.0), vector(b, x.shape[2:])]
    return b.op("SkipLayerNormalization", reads, "com.microsoft", epsilon=0.05)


OPS: dict[str, Maker] = {op: partial(arg, op=op) for op in ("ArgMax", "ArgMin")}
OPS |= {op: partial(scatter_elements, op=op) for op in ("Scatter", "ScatterElements")}
OPS |= {op: partial(integer_product, op=op) for op in ("ConvInteger", "MatMulInteger")}
OPS |= {op: partial(quantised_product, op=op) for op in ("QLinearConv", "QLinearMatMul")}
OPS |= dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), fake_quantised)
OPS |= {
    "Attention": attention,
    "CenterCropPad": crop_or_pad,
    "Col2Im": col2im,
    "Compress": compress,
    "Det": determinant,
    "DynamicQuantizeLinear": partial(integer_product, op="MatMulInteger"),
    "Einsum": einsum,
    "EyeLike": eye_like,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "GridSample": grid_sample,
    "If": branch,
    "Loop": loop,
    "MaxUnpool": max_unpool,
    "MeanVarianceNormalization": mean_variance,
    "NonZero": non_zero,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "RotaryEmbedding": rotary,
    "Scan": scan,
    "ScatterND": scatter_nd,
    "SplitToSequence": sequence,
    "TopK": top_k,
    "Trilu": trilu,
}
COMPOSED: dict[str, Maker] = {"softmax attention": softmax_attention}
CONTRIB: dict[str, Maker] = {op: partial(gelu, op=op) for op in ("BiasGelu", "FastGelu", "Gelu", "QuickGelu")}
CONTRIB |= {"FusedMatMul": fused_matmul, "SkipLayerNormalization": skip_layer_norm}
