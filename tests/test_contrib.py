"""Operators of ONNX Runtime's own domain."""

from __future__ import annotations

from typing import Any

import numpy as np
import oracle
import pytest
from axes import prunable, together, why
from onnx import TensorProto
from single import build, cut, holds, ints, operand, seeded, shape, w

from onnxprune.groups import Groups
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, surgery

__all__ = ["seeded"]  # every test draws the same weights

MS = {"domain": "com.microsoft"}
LAST = ("Conv", "b wl", "y")
TOKENS = [("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}), ("Reshape", "t st", "f")]  # [1, 36, 8]
ROWS = {"st": ints(1, 36, 8), "wm": w(8, 4)}
END = ("MatMul", "b wm", "y")


def tokens(nodes: list[Any], weights: dict[str, Any], last: tuple[Any, ...] = END, opset: int = 18) -> Groups:
    return build([*TOKENS, *nodes, last], {**ROWS, **weights}, opset=opset)


# ---- element by element


@pytest.mark.parametrize(
    ("op", "reads"),
    [
        ("BiasGelu", "f v"),
        ("FastGelu", "f v"),
        ("FastGelu", "f"),
        ("Gelu", "f"),
        ("QuickGelu", "f"),
        ("SampleOp", "f"),
        ("ScaledSiLU", "f"),
    ],
)
def test_activations(op: str, reads: str) -> None:
    g = tokens([(op, reads, "b", MS)], {"v": w(8)})
    assert together(g, "a.1[3]", "f.2[3]", "b.2[3]", "wm.0[3]", *(["v.0[3]"] if "v" in reads else []))
    holds(g)


def test_a_gated_addition() -> None:
    g = tokens(
        [("MatMul", "f wg", "g"), ("MatMul", "f w2", "h"), ("GatedAdd", "f h g", "b", MS)], {"wg": w(8, 1), "w2": w(8, 8)}
    )
    assert together(g, "f.2[3]", "h.2[3]", "b.2[3]", "wg.0[3]")
    holds(g)


def test_a_hash_freezes() -> None:
    nodes = [("MurmurHash3", "f", "h", {"positive": 0, **MS}), ("Cast", "h", "b", {"to": TensorProto.FLOAT})]
    assert why(tokens(nodes, {}), "a") == "MurmurHash3 'h' hashes its input, and the least rounding changes all of it"


def test_the_gates_of_linear_attention() -> None:
    nodes = [("MatMul", "f w2", "g"), ("LinearAttentionGate", "f v u g", "d e", MS), ("Mul", "d e", "b")]
    g = tokens(nodes, {"w2": w(8, 8), "v": w(8), "u": w(8)})
    assert together(g, "f.2[3]", "v.0[3]", "u.0[3]", "d.2[3]", "e.2[3]", "g.2[3]")
    holds(g)


@pytest.mark.parametrize("read", ["d", "e"])
def test_the_gates_of_linear_attention_have_one_shape_even_where_one_is_read(read: str) -> None:
    nodes = [("MatMul", "f w2", "g"), ("LinearAttentionGate", "f v u g", "d e", MS), ("Relu", read, "b")]
    g = tokens(nodes, {"w2": w(8, 8), "v": w(8), "u": w(8)})
    assert together(g, "f.2[3]", "d.2[3]", "e.2[3]", "g.2[3]")
    holds(g)


# ---- convolution


@pytest.mark.parametrize("past", [False, True])
def test_a_causal_convolution(past: bool) -> None:
    attributes = {"activation": "silu", **MS}
    nodes = [("Reshape", "a s", "f"), ("CausalConvWithState", f"f w1 b1{' p' * past}", "b st", attributes), LAST]
    weights = {"s": ints(1, 8, 36), "w1": w(8, 1, 3), "b1": w(8), "p": w(1, 8, 2), "wl": w(4, 8, 1)}
    g = build(nodes, weights)
    assert together(g, "a.1[3]", "w1.0[3]", "b1.0[3]", "b.1[3]", "st.1[3]", "wl.1[3]", *(["p.1[3]"] if past else []))
    layer = next(x for x in g.layers if x.op == "CausalConvWithState")
    assert layer.factor == 36 * 3
    holds(g)


def test_a_causal_convolution_with_the_channels_last() -> None:
    nodes = [("CausalConvWithState", "f w1 b1", "b state", {"channels_last": 1, **MS})]
    g = tokens(nodes, {"w1": w(8, 1, 3), "b1": w(8)})
    assert together(g, "f.2[3]", "w1.0[3]", "b1.0[3]", "b.2[3]", "state.2[3]", "wm.0[3]")
    holds(g)


# ---- normalisation


def approximate(nodes: list[Any], weights: dict[str, Any], last: tuple[Any, ...] = END) -> Groups:
    """The groups when approximate cuts are allowed; asserts that they are frozen, or flawed, otherwise."""
    g = tokens(nodes, weights, last)
    assert why(g, "a").endswith("sums over the channels")
    return group(g.net, approximate=True)


@pytest.mark.parametrize(
    ("op", "reads", "weights"),
    [
        ("SkipLayerNormalization", "f h v u q", "vuq"),
        ("SkipLayerNormalization", "f h v", "v"),
        ("SkipSimplifiedLayerNormalization", "f h v q", "vq"),
    ],
)
def test_a_normalised_sum(op: str, reads: str, weights: str) -> None:
    nodes = [("MatMul", "f w2", "h"), (op, reads, "n - - s", MS), ("Add", "n s", "b")]
    g = approximate(nodes, {"w2": w(8, 8), **{k: w(8) for k in "vuq"}})
    assert together(g, "f.2[3]", "h.2[3]", "n.2[3]", "s.2[3]", *(f"{k}.0[3]" for k in weights))
    runs(g)


def runs(g: Groups) -> None:
    """Asserts that half of every group can go, and that the model runs."""
    pruned = surgery(g, oracle.keep(g, 0.5, np.random.default_rng(0)))
    oracle.compare(pruned, pruned, pruned, {"x": w(1, 3, 6, 6)})


def test_a_normalised_sum_that_puts_out_its_statistics_freezes() -> None:
    g = tokens([("SkipLayerNormalization", "f f v", "b m", MS)], {"v": w(8)})
    assert why(group(g.net, approximate=True), "a") == "SkipLayerNormalization 'b' also outputs its statistics"


def test_looked_up_tables_that_are_added_and_normalised() -> None:
    ids = [
        ("ArgMax", "x", "i0", {"axis": 1, "keepdims": 0}),
        ("Cast", "i0", "i1", {"to": TensorProto.INT32}),
        ("Reshape", "i1 si", "i"),
    ]
    tables = {"word": w(3, 8), "place": w(40, 8), "part": w(3, 8), "v": w(8), "u": w(8), "si": ints(1, 36)}
    nodes = [
        *ids,
        ("EmbedLayerNormalization", "i i word place part v u", "n k s", {**MS}),
        ("Add", "n s", "e"),
        ("Add", "e f", "b"),
    ]
    g = approximate(nodes, tables)
    assert together(g, "word.1[3]", "place.1[3]", "part.1[3]", "v.0[3]", "u.0[3]", "n.2[3]", "s.2[3]", "a.1[3]")
    runs(g)


def test_the_simplified_normalisation_of_the_standard_domain() -> None:
    """ONNX Runtime has it there, though ONNX has not: the checker refuses such models."""
    g = tokens([("SimplifiedLayerNormalization", "f v", "b", {"axis": -1, "epsilon": 1e-5, "stash_type": 1})], {"v": w(8)})
    assert why(g, "a") == "SimplifiedLayerNormalization 'b' sums over the channels"
    runs(group(g.net, approximate=True))
    nodes = [
        ("MatMul", "f w1", "h"),
        ("Transpose", "h", "p", {"perm": [0, 2, 1]}),
        ("SimplifiedLayerNormalization", "p v", "q", {"axis": -1}),
    ]
    g = tokens([*nodes, ("Transpose", "q", "b", {"perm": [0, 2, 1]})], {"w1": w(8, 8), "v": w(36)})
    assert prunable(g, "q", 1) == 8
    plan = oracle.keep(g, 0.5, np.random.default_rng(0))
    oracle.compare(g.net.model, mask(g, plan), surgery(g, plan), {"x": w(1, 3, 6, 6)})


@pytest.mark.parametrize("width", [4, 8])
def test_a_gated_rms_of_every_head(width: int) -> None:
    nodes = [("MatMul", "f w2", "z"), ("GatedRMSNorm", "f v z", "b", MS)]
    weights = {"w2": w(8, 8), "v": w(width)}
    if width == 8:
        g = approximate(nodes, weights)
        assert together(g, "f.2[3]", "v.0[3]", "z.2[3]")
        runs(g)
        return
    g = tokens(nodes, weights)
    assert together(g, "f.2[0]", "f.2[3]", "z.2[1]", "b.2[2]", "wm.0[3]")
    assert prunable(g, "f", 2) == 2
    assert shape(cut(g, "b.2", [0]), "v") == (4,)
    holds(g)


def test_distances() -> None:
    nodes = [
        ("GlobalAveragePool", "a", "p"),
        ("Flatten", "p", "q", {"axis": 2}),
        ("CDist", "q k", "d", {"metric": "euclidean", **MS}),
    ]
    g = build([*nodes, ("MatMul", "wl d", "y")], {"k": w(3, 1), "wl": w(2, 8)})
    assert together(g, "a.1[3]", "d.0[3]", "wl.1[3]")
    holds(g)
    nodes = [("GlobalAveragePool", "a", "p"), ("Flatten", "p", "q"), ("CDist", "q k", "y", {"metric": "sqeuclidean", **MS})]
    g = build(nodes, {"k": w(3, 8)})
    assert why(g, "a") == "CDist 'y' measures distances over it"


def test_pooling_with_the_channels_last() -> None:
    nodes = [
        ("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}),
        ("QuantizeLinear", "t s z", "q"),
        ("NhwcMaxPool", "q", "p", {"kernel_shape": [2, 2], **MS}),
    ]
    nodes += [("DequantizeLinear", "p s z", "b"), ("MatMul", "b wl", "y")]
    g = build(nodes, {"s": np.float32(0.05), "z": np.uint8(100), "wl": w(8, 2)})
    assert together(g, "a.1[3]", "q.3[3]", "p.3[3]", "wl.0[3]")
    plan = oracle.keep(g, 0.5, np.random.default_rng(0))
    oracle.compare(g.net.model, mask(g, plan), surgery(g, plan), {"x": w(1, 3, 6, 6)})


# ---- data movement


def test_a_new_axis() -> None:
    nodes = [("ExpandDims", "a ax", "u", MS), ("Transpose", "u", "v", {"perm": [1, 0, 2, 3, 4]}), ("Squeeze", "v z", "b"), LAST]
    g = build(nodes, {"ax": np.array(1, np.int32), "z": ints(0), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "u.2[3]", "wl.1[3]")
    holds(g)


def test_the_pad_of_onnx_runtime() -> None:
    g = build(
        [("Pad", "a p k", "b", MS), LAST], {"p": ints(0, 3, 0, 0, 0, 1, 0, 0), "k": np.float32(0.5), "wl": w(4, 12, 1, 1)}
    )
    assert together(g, "a.1[0]", "b.1[3]", "wl.1[3]")
    assert operand(cut(g, "b.1", [0, 1, 5, 11]), "b", 1) == [0, 1, 0, 0, 0, 0, 0, 0]
    holds(g)
