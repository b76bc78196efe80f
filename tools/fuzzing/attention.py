"""Attention as one operator, and what stands around it, in ONNX and in ONNX Runtime's own domain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import TensorProto

from fuzzing.build import Array, Builder, NoFitError, T
from fuzzing.layers import linear, of_rank
from fuzzing.weights import vector, weight

Maker = Callable[[Builder], object]
MS = "com.microsoft"


def tokens(b: Builder, fixed: bool = False) -> T:
    """[batch, sequence, features], of a constant number of features; fixed: all sizes are constant."""
    x = of_rank(b, (3,), lambda t: t.static(2) and t.shape[2] > 1)
    if fixed and not x.steady:
        raise NoFitError
    return x


def projections(b: Builder, x: T, *sizes: int) -> list[T]:
    return [linear(b, x, 2, n) for n in sizes]


def counts(b: Builder) -> tuple[int, int]:
    """Heads of queries, heads of keys and values."""
    return b.choose([(1, 1), (2, 2), (3, 3), (4, 4), (4, 2), (3, 1), (2, 1)])  # type: ignore[no-any-return]


def apart(b: Builder, x: T, heads: int, width: int) -> T:
    """[batch, heads, sequence, width]."""
    y = b.op("Reshape", [x, b.ints(0, 0, heads, width)])
    return b.op("Transpose", [y], perm=[0, 2, 1, 3], channel=b.choose([1, 3]))


def joined(b: Builder, x: T) -> T:
    y = b.op("Transpose", [x], perm=[0, 2, 1, 3])
    return b.op("Reshape", [y, b.ints(0, 0, -1)], channel=2)


def attention(b: Builder) -> T:
    """ai.onnx, on packed features or on four axes; with a mask, a past, and further outputs."""
    x = tokens(b)
    (q, kv), width, values = counts(b), b.number(1, 4), b.number(1, 4)
    reads: list[T | None] = list(projections(b, x, q * width, kv * width, kv * values))
    split = b.chance(0.4)
    if split:
        reads = [apart(b, t, n, wide) for t, n, wide in zip(reads, (q, kv, kv), (width, width, values), strict=True) if t]
    how: dict[str, object] = {} if split else {"q_num_heads": q, "kv_num_heads": kv}
    past = b.number(1, 2) if b.chance(0.2) and x.static(0) else 0
    if b.chance(0.25) and x.steady:
        shape = b.choose([(1, 1), (1, q), (x.shape[0], q), ()])
        reads.append(vector(b, (*shape, x.shape[1], x.shape[1] + past)))
    if past:
        reads += [None] * (4 - len(reads))
        reads += [vector(b, (x.shape[0], kv, past, wide), spread=1.0) for wide in (width, values)]
    if b.chance(0.2):
        how["is_causal"] = 1
    if b.chance(0.3):
        how["scale"] = 0.4
    if b.chance(0.15):
        how["softcap"] = 2.0
    more = [bool(past) or b.chance(0.1)] * 2
    made = b.ops("Attention", reads, [True, *more, b.chance(0.15)], channel=1 if split else 2, **how)
    return joined(b, made[0]) if split and b.chance(0.7) else made[0]


def angles(b: Builder, *shape: int) -> list[T]:
    drawn = b.rng.uniform(0, 3, shape)
    return [b.const(f(drawn).astype(np.float32)) for f in (np.cos, np.sin)]


def rotary(b: Builder) -> T:
    """ai.onnx: caches of the positions themselves, or of all positions with numbers of them."""
    x = tokens(b, fixed=True)
    heads, width = b.number(1, 4), b.choose([2, 4])
    (y,) = projections(b, x, heads * width)
    batch, length = x.shape[:2]
    how: dict[str, object] = {"interleaved": 1} if b.chance(0.3) else {}
    reads = [y, *angles(b, batch, length, width // 2)]
    if b.chance(0.4):
        reads = [y, *angles(b, 9, width // 2), b.const(b.rng.integers(0, 9, (batch, length)))]
    if b.chance(0.4):
        reads[0] = apart(b, y, heads, width)
        return joined(b, b.op("RotaryEmbedding", reads, channel=1, **how))
    return b.op("RotaryEmbedding", reads, channel=2, num_heads=heads, **how)


def softmax_attention(b: Builder) -> T:
    """softmax(q k') v of three projections of one tensor, perhaps in several heads."""
    x = tokens(b)
    heads = b.choose([1, 2, 3])
    q, k, v = projections(b, x, *[heads * b.number(1, 4)] * 2, heads * b.number(1, 4))
    if heads > 1:
        q, k, v = (apart(b, t, heads, t.shape[2] // heads) for t in (q, k, v))
    scores = b.op("MatMul", [q, b.op("Transpose", [k], perm=[*range(k.rank - 2), k.rank - 1, k.rank - 2])])
    if b.chance(0.5):
        scores = b.op("Mul", [scores, b.const(np.float32(0.5))])
    y = b.op("MatMul", [b.op("Softmax", [scores], axis=q.rank - 1), v], channel=q.rank - 1)
    return joined(b, y) if heads > 1 else y


# ---- ONNX Runtime's own


def own_projection(b: Builder) -> T:
    """com.microsoft Attention: one weight for queries, keys and values."""
    x = tokens(b)
    heads = b.number(1, 4)
    widths = [b.number(1, 4)] * 2 + [b.number(1, 4)]
    sizes = [heads * n for n in widths]
    if b.chance(0.5):
        sizes = sizes[:1] * 3
    how = {"qkv_hidden_sizes": sizes} if len(set(sizes)) > 1 or b.chance(0.3) else {}
    n = x.shape[2]
    reads = [x, weight(b, (n, sum(sizes)), n), vector(b, (sum(sizes),))]  # ONNX Runtime crashes without a bias
    if b.chance(0.3):
        how["unidirectional"] = 1  # type: ignore[assignment]
    return b.op("Attention", reads, MS, 2, num_heads=heads, **how)


def multi_head(b: Builder) -> T:
    """Queries, keys and values, a bias for all three, one for the scores; keys and values may have four axes."""
    x = tokens(b)
    heads, width, values = b.number(1, 4), b.number(1, 4), b.number(1, 4)
    reads: list[T | None] = list(projections(b, x, heads * width, heads * width, heads * values))
    q, k, v = reads
    assert k is not None and v is not None
    if b.chance(0.25):
        reads = [q, apart(b, k, heads, width), apart(b, v, heads, values)]
    elif b.chance(0.5):
        reads.append(vector(b, (heads * (2 * width + values),)))
    if b.chance(0.3) and x.steady:
        reads += [None] * (5 - len(reads))
        reads.append(vector(b, (b.choose([1, x.shape[0]]), b.choose([1, heads]), x.shape[1], x.shape[1])))
    how = {"unidirectional": 1} if b.chance(0.2) else {}
    return b.op("MultiHeadAttention", reads, MS, 2, num_heads=heads, **how)


def group_query(b: Builder) -> T:
    """Heads of queries that share heads of keys and values; all three may come in one tensor."""
    x = tokens(b, fixed=True)
    (q, kv), width = counts(b), b.choose([8, 16])
    lengths = b.const(np.full(x.shape[0], x.shape[1] - 1, np.int32))
    total = b.const(np.array(x.shape[1], np.int32))
    if b.chance(0.4):
        reads: list[T | None] = [*projections(b, x, (q + 2 * kv) * width), None, None]
    else:
        reads = list(projections(b, x, q * width, kv * width, kv * width))
    how: dict[str, object] = {"num_heads": q, "kv_num_heads": kv}
    reads += [None, None, lengths, total]
    if b.chance(0.4):
        reads += angles(b, 9, width // 2)
        how["do_rotary"] = 1
    return b.ops("GroupQueryAttention", reads, [True, True, True], MS, 2, **how)[0]


def linear_attention(b: Builder) -> T:
    """A state instead of a softmax; decays and learning rates come of projections too."""
    x = tokens(b)
    (q, kv), width, values = counts(b), b.number(1, 3), b.number(1, 3)
    reads: list[T | None] = list(projections(b, x, q * width, kv * width, kv * values))
    rule = b.choose(["linear", "gated", "delta", "gated_delta"])
    if rule != "linear":
        decay = b.op("Neg", [b.op("Sigmoid", projections(b, x, kv * (width if b.chance(0.5) else 1)))])
        rate = b.op("Sigmoid", projections(b, x, kv))
        reads += [None, decay if "gated" in rule else None, rate if "delta" in rule else None]
    how = {"q_num_heads": q, "kv_num_heads": kv, "update_rule": rule}
    return b.ops("LinearAttention", reads, [True, True], MS, 2, **how)[0]


def gate(b: Builder) -> T:
    """What makes decays and learning rates."""
    x = tokens(b)
    wide = b.number(1, 6)
    one, other = projections(b, x, wide, wide)
    reads = [one, vector(b, (wide,)), vector(b, (wide,), 0.5), other]
    made = b.ops("LinearAttentionGate", reads, [True, True], MS, 2)
    return b.op("Mul", made, channel=2)


def own_rotary(b: Builder) -> T:
    """By positions, or from one position on; of all places in a head or of the first ones."""
    x = tokens(b, fixed=True)
    heads, width = b.number(1, 4), b.choose([2, 4])
    (y,) = projections(b, x, heads * width)
    how: dict[str, object] = {"num_heads": heads} if b.chance(0.6) else {}
    half = width // 2
    if "num_heads" in how and width == 4 and b.chance(0.3):
        how["rotary_embedding_dim"], half = 2, 1
    places: Array = b.rng.integers(0, 9, x.shape[:2]) if b.chance(0.6) else np.array([2])
    if b.chance(0.3):
        how["interleaved"] = 1
    if b.chance(0.3):
        reads = [apart(b, y, heads, width), b.const(places), *angles(b, 9, half)]
        return joined(b, b.op("RotaryEmbedding", reads, MS, 1, **how))
    return b.op("RotaryEmbedding", [y, b.const(places), *angles(b, 9, half)], MS, 2, **how)


def three_positions(b: Builder) -> T:
    """MRotaryEmbedding: time, height and width."""
    x = tokens(b, fixed=True)
    heads = b.number(1, 4)
    (y,) = projections(b, x, heads * 4)
    places = b.const(b.rng.integers(0, 9, (3, *x.shape[:2])))
    how: dict[str, object] = {"num_heads": heads, "mrope_section": b.choose([[1, 1, 0], [2, 0, 0], [0, 1, 1]])}
    return b.op("MRotaryEmbedding", [y, places, *angles(b, 9, 2)], MS, 2, **how)


def quantised(b: Builder) -> T:
    """QAttention: the projection in integers."""
    x = tokens(b)
    inner = linear(b, x, 2, b.number(2, 6))
    heads, n = b.number(1, 3), inner.shape[2]
    sum_of = 3 * heads * b.number(1, 3)
    scale, point = b.const(np.float32(0.03)), b.const(np.uint8(128))
    y = b.op("QuantizeLinear", [inner, scale, point])
    w = b.const(b.rng.integers(-100, 100, (n, sum_of)).astype(np.int8), "w")
    by = () if b.chance(0.5) else (sum_of,)
    steps = b.const(b.rng.uniform(0.005, 0.01, by).astype(np.float32))
    reads = [y, w, vector(b, (sum_of,)), scale, steps, None, point, b.const(np.zeros(by, np.int8))]
    return b.op("QAttention", reads, MS, 2, num_heads=heads)


def ids_of(b: Builder, x: T) -> T:
    """[batch, sequence] int32, below the number of features."""
    largest = b.op(b.choose(["ArgMax", "ArgMin"]), [x], axis=2, keepdims=0)
    return b.op("Cast", [largest], to=TensorProto.INT32)


def embedding(b: Builder) -> T:
    """EmbedLayerNormalization: words, positions and segments, perhaps with their plain sum."""
    x = tokens(b)
    wide, words = b.number(2, 6), x.shape[2]
    ids = ids_of(b, x)
    tables = [weight(b, (n, wide), wide) for n in (words, max(x.sizes(1)) + b.number(0, 2))]
    segments = b.chance(0.5)
    reads = [ids, ids if segments else None, *tables, weight(b, (words, wide), wide) if segments else None]
    reads += [vector(b, (wide,), 1.0), vector(b, (wide,))]
    plain = b.chance(0.5)
    made = b.ops("EmbedLayerNormalization", reads, [True, True, plain], MS, 2, epsilon=0.05)
    b.pool.remove(made[1])
    return made[-1]


OPS: dict[str, Maker] = {"Attention": attention, "RotaryEmbedding": rotary}
COMPOSED: dict[str, Maker] = {"softmax attention": softmax_attention}
CONTRIB: dict[str, Maker] = {
    "Attention": own_projection,
    "EmbedLayerNormalization": embedding,
    "GroupQueryAttention": group_query,
    "LinearAttention": linear_attention,
    "LinearAttentionGate": gate,
    "MRotaryEmbedding": three_positions,
    "MultiHeadAttention": multi_head,
    "QAttention": quantised,
    "RotaryEmbedding": own_rotary,
}
