"""Attention as one operator, in ONNX and in ONNX Runtime: whole heads go, and what counts them follows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import run, samples
from test_rules import attribute, build, cut, holds, ints, prunable, seeded, shape, together, w, why

from onnxprune.contraction import normal_form
from onnxprune.criteria import Sensitivity
from onnxprune.groups import Groups
from onnxprune.passes.calibrate import calibrate

__all__ = ["seeded"]  # every test draws the same weights

MS = {"domain": "com.microsoft"}
TOKENS, WIDTH = 6, 18  # what a [1, 3, 6, 6] makes: six tokens of eighteen features
START = [("Transpose", "x", "xt", {"perm": [0, 2, 1, 3]}), ("Reshape", "xt sx", "tok")]


def net(nodes: list[Any], weights: dict[str, Any], opset: int = 23) -> Groups:
    """A network on six tokens [1, 6, 18]; the convolution that `build` starts with is of no concern."""
    return build([*START, *nodes], {"sx": ints(1, TOKENS, WIDTH), **weights}, opset=opset, ir=10)


def projections(q: int, k: int, v: int, out: int) -> tuple[list[Any], dict[str, Any]]:
    """MatMuls that make queries, keys and values of so many features, and the weight that reads `out` features."""
    nodes = [("MatMul", f"tok w{n}", n) for n in "qkv"]
    return nodes, {"wq": w(WIDTH, q) / 4, "wk": w(WIDTH, k) / 4, "wv": w(WIDTH, v) / 4, "wo": w(out, 5)}


LAST = ("MatMul", "b wo", "y")


# ---- ai.onnx Attention


@pytest.mark.parametrize("opset", [23, 24, 25])
def test_heads_of_attention_on_packed_features(opset: int) -> None:
    """Four heads of three; values have two places a head."""
    nodes, weights = projections(12, 12, 8, 8)
    g = net([*nodes, ("Attention", "q k v", "b", {"q_num_heads": 4, "kv_num_heads": 4}), LAST], weights, opset)
    assert together(g, "q.2[3]", "q.2[5]", "k.2[4]", "v.2[2]", "v.2[3]", "b.2[2]", "wo.0[3]", "wq.1[3]", "wv.1[2]")
    assert prunable(g, "b", 2) == 4
    pruned = cut(g, "b.2", [2])
    assert (attribute(pruned, "b", "q_num_heads"), attribute(pruned, "b", "kv_num_heads")) == (3, 3)
    assert (shape(pruned, "wk"), shape(pruned, "wv")) == ((WIDTH, 9), (WIDTH, 6))
    holds(g)


def test_query_heads_that_share_keys_go_together() -> None:
    nodes, weights = projections(12, 6, 4, 8)
    g = net([*nodes, ("Attention", "q k v", "b", {"q_num_heads": 4, "kv_num_heads": 2}), LAST], weights)
    assert together(g, "q.2[0]", "q.2[5]", "k.2[0]", "k.2[2]", "v.2[1]", "b.2[3]")
    assert prunable(g, "b", 2) == 2
    pruned = cut(g, "b.2", [0])
    assert (attribute(pruned, "b", "q_num_heads"), attribute(pruned, "b", "kv_num_heads")) == (2, 1)
    holds(g)


def test_query_heads_that_all_share_one_key_go_one_by_one() -> None:
    nodes, weights = projections(12, 3, 2, 8)
    g = net([*nodes, ("Attention", "q k v", "b", {"q_num_heads": 4, "kv_num_heads": 1}), LAST], weights)
    assert prunable(g, "q", 2) == 4
    assert why(g, "k", 2) == "Attention 'b' shares its only head of keys and values"
    pruned = cut(g, "b.2", [0])
    assert (attribute(pruned, "b", "q_num_heads"), attribute(pruned, "b", "kv_num_heads")) == (3, 1)
    holds(g)


def four_axes(q: int, kv: int, width: int, extra: str = "", **more: Any) -> Groups:
    nodes, weights = projections(q * width, kv * width, kv * width, q * width)
    for name in "qkv":
        nodes += [("Reshape", f"{name} s{name}", f"{name}r"), ("Transpose", f"{name}r", f"{name}t", {"perm": [0, 2, 1, 3]})]
        weights[f"s{name}"] = ints(1, TOKENS, q if name == "q" else kv, width)
    attributes = more.pop("attributes", {})
    nodes += [("Attention", f"qt kt vt{extra}", "at", attributes), ("Transpose", "at", "ar", {"perm": [0, 2, 1, 3]})]
    weights["so"] = ints(1, TOKENS, q * width)
    return net([*nodes, ("Reshape", "ar so", "b"), LAST], {**weights, **more})


@pytest.mark.parametrize(
    ("heads", "width", "attributes"), [(2, 5, {}), (2, 5, {"scale": 0.3, "softcap": 2.0}), (5, 2, {"is_causal": 1})]
)
def test_places_within_a_head_or_heads_on_four_axes(heads: int, width: int, attributes: dict[str, Any]) -> None:
    """A projection is followed along heads or along places, whichever are more."""
    g = four_axes(heads, heads, width, attributes=attributes)
    if width > heads:
        assert (prunable(g, "qt", 1), prunable(g, "qt", 3)) == (0, width)
        assert together(g, "qt.3[1]", "kt.3[1]")
        assert together(g, "vt.3[1]", "at.3[1]")
        assert not together(g, "vt.3[1]", "kt.3[1]")
        pruned = cut(g, "qt.3", [1])
        assert attribute(pruned, "at", "scale") == pytest.approx(attributes.get("scale", 1 / np.sqrt(width)))
        pruned = cut(g, "vt.3", [0, 4])
        assert (attribute(pruned, "at", "scale") is None) == ("scale" not in attributes)
    else:
        assert together(g, "qt.1[3]", "kt.1[3]", "vt.1[3]", "at.1[3]")
    holds(g)


@pytest.mark.parametrize("kv", [1, 2])
def test_a_shared_key_on_four_axes(kv: int) -> None:
    g = four_axes(4, kv, 5)
    assert together(g, "qt.3[1]", "kt.3[1]")
    assert together(g, "vt.3[1]", "at.3[1]")
    holds(g)


@pytest.mark.parametrize("mask", [(4, TOKENS, TOKENS), (1, 4, TOKENS, TOKENS), (TOKENS, TOKENS), (1, 1, TOKENS, TOKENS)])
def test_a_mask_of_its_own_for_every_head_follows(mask: tuple[int, ...]) -> None:
    nodes, weights = projections(12, 12, 12, 12)
    node = ("Attention", "q k v mask", "b", {"q_num_heads": 4, "kv_num_heads": 4})
    g = net([*nodes, node, LAST], {**weights, "mask": w(*mask)})
    if 4 in mask:
        assert together(g, f"mask.{mask.index(4)}[1]", "b.2[3]")
        assert shape(cut(g, "b.2", [3]), "mask") == tuple(3 if n == 4 else n for n in mask)
    holds(g)


def test_the_past_and_the_scores_have_heads_too() -> None:
    nodes, weights = projections(12, 12, 12, 12)
    node = ("Attention", "q k v - pk pv", "b nk nv sc", {"q_num_heads": 4, "kv_num_heads": 4})
    ends = [("Transpose", "nv", "nt", {"perm": [0, 2, 1, 3]}), ("Einsum", "nt wn", "t", {"equation": "bshd,hd->bs"})]
    ends += [("Einsum", "sc ws", "u", {"equation": "bhst,h->bst"}), ("Einsum", "nk wn", "r", {"equation": "bhsd,hd->bs"})]
    g = build(
        [*START, *nodes, node, LAST, *ends],
        {"sx": ints(1, TOKENS, WIDTH), **weights, "pk": w(1, 4, 2, 3), "pv": w(1, 4, 2, 3), "wn": w(4, 3), "ws": w(4)},
        outputs="y t u r",
        opset=23,
        ir=10,
    )
    assert together(g, "q.2[3]", "pk.1[1]", "pv.1[1]", "nk.1[1]", "nv.1[1]", "sc.1[1]", "b.2[3]")
    holds(g)


@pytest.mark.parametrize("axes", [3, 4])
def test_rotary_embedding(axes: int) -> None:
    nodes, weights = projections(16, 16, 16, 16)
    weights |= {"cos": w(1, TOKENS, 2), "sin": w(1, TOKENS, 2), "sh": ints(1, TOKENS, 4, 4), "so": ints(1, TOKENS, 16)}
    if axes == 3:
        nodes = [*nodes, ("RotaryEmbedding", "q cos sin", "b", {"num_heads": 4}), LAST]
    else:
        nodes += [
            ("Reshape", "q sh", "qr"),
            ("Transpose", "qr", "qt", {"perm": [0, 2, 1, 3]}),
            ("RotaryEmbedding", "qt cos sin", "r"),
        ]
        nodes += [("Transpose", "r", "rt", {"perm": [0, 2, 1, 3]}), ("Reshape", "rt so", "b"), LAST]
    g = net(nodes, weights)
    assert together(g, "wq.1[4]", "wq.1[7]", "wo.0[5]")
    assert prunable(g, "q", 2) == 4
    pruned = cut(g, "q.2", [4])
    if axes == 3:
        assert attribute(pruned, "b", "num_heads") == 3
    holds(g)


# ---- com.microsoft


@pytest.mark.parametrize("sizes", [None, [12, 12, 8]])
def test_attention_with_its_own_projection(sizes: list[int] | None) -> None:
    q, k, v = sizes or (12, 12, 12)
    attributes = {"num_heads": 4, **({"qkv_hidden_sizes": sizes} if sizes else {}), **MS}
    nodes = [("MatMul", "tok w1", "h"), ("Attention", "h wqkv bqkv", "b", attributes), LAST]
    g = net(nodes, {"w1": w(WIDTH, 10) / 4, "wqkv": w(10, q + k + v) / 3, "bqkv": w(q + k + v), "wo": w(v, 5)}, 18)
    assert together(g, "h.2[3]", "wqkv.0[3]", "w1.1[3]")
    place = v // 4
    assert together(g, "wqkv.1[3]", "wqkv.1[5]", f"wqkv.1[{q + 3}]", f"wqkv.1[{q + k + place}]", "bqkv.0[3]", f"b.2[{place}]")
    pruned = cut(g, "b.2", [0])
    assert attribute(pruned, "b", "num_heads") == 3
    assert attribute(pruned, "b", "qkv_hidden_sizes") == ([9, 9, 6] if sizes else None)
    assert next(x for x in g.layers if x.name == "b (projection)").macs_dims[1].tensor == "wqkv"
    holds(g)


@pytest.mark.parametrize("bias", [False, True])
def test_multi_head_attention(bias: bool) -> None:
    nodes, weights = projections(12, 12, 8, 8)
    weights |= {"bias": w(32), "rel": w(1, 4, TOKENS, TOKENS)}
    node = ("MultiHeadAttention", f"q k v {'bias' if bias else '-'} - rel", "b", {"num_heads": 4, **MS})
    g = net([*nodes, node, LAST], weights, 18)
    assert together(
        g, "q.2[3]", "k.2[5]", "v.2[2]", "b.2[3]", "rel.1[1]", *(["bias.0[4]", "bias.0[17]", "bias.0[26]"] if bias else [])
    )
    pruned = cut(g, "b.2", [0, 4])
    assert attribute(pruned, "b", "num_heads") == 2
    holds(g)


def test_multi_head_attention_on_keys_with_four_axes() -> None:
    nodes, weights = projections(12, 12, 12, 12)
    for n in "kv":
        nodes += [("Reshape", f"{n} sh", f"{n}r"), ("Transpose", f"{n}r", f"{n}t", {"perm": [0, 2, 1, 3]})]
    g = net(
        [*nodes, ("MultiHeadAttention", "q kt vt", "b", {"num_heads": 4, **MS}), LAST],
        {**weights, "sh": ints(1, TOKENS, 4, 3)},
        18,
    )
    assert together(g, "q.2[3]", "kt.1[1]", "vt.1[1]", "k.2[3]", "b.2[5]")
    holds(g)


@pytest.mark.parametrize(("q", "kv", "packed"), [(4, 4, False), (4, 2, False), (4, 2, True), (4, 1, False), (4, 1, True)])
def test_group_query_attention(q: int, kv: int, packed: bool) -> None:
    width = 16
    weights: dict[str, Any] = {
        "lens": np.array([TOKENS - 1], np.int32),
        "total": np.array(TOKENS, np.int32),
        "wo": w(q * width, 5),
    }
    attributes = {"num_heads": q, "kv_num_heads": kv, **MS}
    if packed:
        nodes: list[Any] = [("MatMul", "tok wall", "h"), ("GroupQueryAttention", "h - - - - lens total", "b pk pv", attributes)]
        weights["wall"] = w(WIDTH, (q + 2 * kv) * width) / 4
    else:
        made, more = projections(q * width, kv * width, kv * width, q * width)
        nodes, weights = [*made, ("GroupQueryAttention", "q k v - - lens total", "b pk pv", attributes)], {**weights, **more}
    g = net([*nodes, LAST], weights, 18)
    name = "h" if packed else "q"
    assert together(g, f"{name}.2[0]", f"{name}.2[15]", "b.2[3]")
    assert together(g, f"{name}.2[0]", f"{name}.2[{width}]") == (kv == 2)
    pruned = cut(g, "b.2", [0])
    assert (attribute(pruned, "b", "num_heads"), attribute(pruned, "b", "kv_num_heads")) == {4: (3, 3), 2: (2, 1), 1: (3, 1)}[
        kv
    ]
    holds(g)


@pytest.mark.parametrize("partial", [False, True])
def test_the_rotary_embedding_of_onnx_runtime(partial: bool) -> None:
    nodes, weights = projections(16, 16, 16, 16)
    weights |= {"pos": np.arange(TOKENS)[None], "cos": w(9, 1 if partial else 2), "sin": w(9, 1 if partial else 2)}
    attributes = {"num_heads": 4, "rotary_embedding_dim": 2} if partial else {}
    g = net([*nodes, ("RotaryEmbedding", "q pos cos sin", "b", {**attributes, **MS}), LAST], weights, 18)
    assert together(g, "q.2[4]", "q.2[7]", "b.2[5]")
    assert attribute(cut(g, "q.2", [4]), "b", "num_heads") == (3 if partial else None)
    holds(g)


def test_the_rotary_embedding_of_three_positions() -> None:
    nodes, weights = projections(16, 16, 16, 16)
    places = np.tile(np.arange(TOKENS), (3, 1, 1))
    node = ("MRotaryEmbedding", "q pos cos sin", "b", {"num_heads": 4, "mrope_section": [1, 1, 0], **MS})
    g = net([*nodes, node, LAST], {**weights, "pos": places, "cos": w(9, 2), "sin": w(9, 2)}, 18)
    assert together(g, "q.2[4]", "q.2[7]", "b.2[5]")
    assert attribute(cut(g, "q.2", [4]), "b", "num_heads") == 3
    holds(g)


@pytest.mark.parametrize(("q", "kv", "fine"), [(4, 4, True), (4, 4, False), (4, 2, False), (4, 1, False)])
def test_linear_attention(q: int, kv: int, fine: bool) -> None:
    nodes, weights = projections(q * 3, kv * 3, kv * 2, q * 2)
    weights |= {"wd": w(WIDTH, kv * (3 if fine else 1)) / 9, "we": w(WIDTH, kv) / 4}
    nodes += [
        ("MatMul", "tok wd", "dp"),
        ("Sigmoid", "dp", "dn"),
        ("Neg", "dn", "d"),
        ("MatMul", "tok we", "ep"),
        ("Sigmoid", "ep", "e"),
    ]
    g = net(
        [*nodes, ("LinearAttention", "q k v - d e", "b st", {"q_num_heads": q, "kv_num_heads": kv, **MS}), LAST], weights, 18
    )
    assert prunable(g, "b", 2) == (kv if kv > 1 else q)
    pruned = cut(g, "b.2", [0])
    assert attribute(pruned, "b", "q_num_heads") == {4: 3, 2: 2, 1: 3}[kv]
    holds(g)


@pytest.mark.parametrize("kv", [1, 2, 4])
def test_places_within_heads_are_scored_by_the_product(kv: int) -> None:
    """The normal form of the product of queries and keys is the one that the operator puts out."""
    g = four_axes(4, kv, 5)
    feeds = np.random.default_rng(0).standard_normal((1, 3, 6, 6)).astype(np.float32)
    scores = calibrate(g, Sensitivity(), samples(g.net.model, feeds))
    found = next(x.values for x in scores.layers if x.layer == "at (scores)")
    assert found.shape == (5,)
    assert (found > 0).all()
    layer = next(x for x in g.layers if x.name == "at (scores)")
    query, key = run(g.net.model, feeds, "qt", "kt")
    made = [np.einsum("nir,oi->nor", c.x, c.w[:, :, 0]) for c in normal_form(g, layer, query, key)]
    wanted = np.einsum("bhsd,bhtd->bhts", query, np.repeat(key, 4 // kv, axis=1))
    np.testing.assert_allclose(np.stack(made).reshape(wanted.shape), wanted, rtol=1e-4, atol=1e-5)


def test_linear_attention_of_the_standard_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_RELEASED_ONNX_OPSET_ONLY", "0")  # ONNX Runtime 1.31 has opset 27, but as a preview
    nodes, weights = projections(12, 12, 8, 8)
    attributes = {"q_num_heads": 4, "kv_num_heads": 4, "update_rule": "linear"}
    g = net([*nodes, ("LinearAttention", "q k v", "b st", attributes), LAST], weights, 27)
    assert together(g, "q.2[3]", "k.2[5]", "v.2[2]", "b.2[3]", "st.1[1]")
    assert attribute(cut(g, "b.2", [0, 2]), "b", "kv_num_heads") == 2
    holds(g)
