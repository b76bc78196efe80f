"""Attention: Q, K and V in the spellings of exporters; head dimensions and whole heads go, and the oracle holds."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
from onnx import TensorProto, helper, numpy_helper

import onnxprune
from onnxprune import runtime
from onnxprune.groups import Accounting, Groups
from onnxprune.passes.group import group
from onnxprune.report.build import prunable_share

Array = np.ndarray[Any, Any]
BATCH, TOKENS, WIDTH, HEADS, DIM = 2, 5, 12, 3, 4
INNER = HEADS * DIM


class Block:
    """One attention layer from [BATCH, TOKENS, WIDTH], written node by node."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def weight(self, *shape: int) -> str:
        return self.constant((self.rng.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32))

    def constant(self, value: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def op(self, kind: str, *reads: str, outputs: int = 1, **attributes: Any) -> Any:
        made = [f"{kind.lower()}{len(self.nodes)}.{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(reads), made, made[0], **attributes))
        return made[0] if outputs == 1 else made

    def linear(self, x: str, before: int, after: int, bias_first: bool = False) -> str:
        y = self.op("MatMul", x, self.weight(before, after))
        pair = (self.weight(after), y) if bias_first else (y, self.weight(after))
        return str(self.op("Add", *pair))

    def heads(self, x: str, perm: tuple[int, ...] = (0, 2, 1, 3), heads: int = HEADS) -> str:
        return str(self.op("Transpose", self.op("Reshape", x, self.ints(0, TOKENS, heads, DIM)), perm=perm))

    def model(self, y: str) -> onnx.ModelProto:
        constants = [numpy_helper.from_array(v, k) for k, v in self.constants.items()]
        shape = [BATCH, TOKENS, WIDTH]
        x, out = (helper.make_tensor_value_info(n, TensorProto.FLOAT, shape) for n in ("x", y))
        graph = helper.make_graph(self.nodes, "attention", [x], [out], constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def separate(b: Block) -> tuple[str, str, str]:
    q, k, v = (b.linear("x", WIDTH, INNER, bias_first=i == 1) for i in range(3))
    return b.heads(q), b.heads(k, (0, 2, 3, 1)), b.heads(v)


def split(b: Block) -> tuple[str, str, str]:
    q, k, v = b.op("Split", b.linear("x", WIDTH, 3 * INNER), axis=-1, outputs=3, num_outputs=3)
    return b.heads(q), b.heads(k, (0, 2, 3, 1)), b.heads(v)


def fused(b: Block) -> tuple[str, str, str]:
    """One Reshape to [batch, tokens, 3, heads, dim], one Transpose, three Gathers: timm's spelling."""
    five = b.op("Reshape", b.linear("x", WIDTH, 3 * INNER), b.ints(0, TOKENS, 3, HEADS, DIM))
    stacked = b.op("Transpose", five, perm=[2, 0, 3, 1, 4])
    q, k, v = (b.op("Gather", stacked, b.constant(np.array(i)), axis=0) for i in range(3))
    return q, b.op("Transpose", k, perm=[0, 1, 3, 2]), v


def shared_keys(b: Block) -> tuple[str, str, str]:
    """One pair of key and value heads, repeated for every query head by Expand: grouped-query attention."""
    q = b.heads(b.linear("x", WIDTH, INNER))
    k, v = (b.heads(b.linear("x", WIDTH, DIM), heads=1) for _ in range(2))
    k, v = (b.op("Expand", t, b.ints(BATCH, HEADS, TOKENS, DIM)) for t in (k, v))
    return q, b.op("Transpose", k, perm=[0, 1, 3, 2]), v


def rotary(b: Block) -> tuple[str, str, str]:
    """Positions turn pairs of query and key dimensions: x cos + rotate_half(x) sin."""
    q, k, v = (b.heads(b.linear("x", WIDTH, INNER)) for _ in range(3))
    cos, sin = (b.constant(f(b.rng.uniform(0, 3, (TOKENS, DIM))).astype(np.float32)) for f in (np.cos, np.sin))
    turned = []
    for t in (q, k):
        first, second = b.op("Split", t, b.ints(DIM // 2, DIM // 2), axis=-1, outputs=2)
        half = b.op("Concat", b.op("Neg", second), first, axis=-1)
        turned.append(b.op("Add", b.op("Mul", t, cos), b.op("Mul", half, sin)))
    return turned[0], b.op("Transpose", turned[1], perm=[0, 1, 3, 2]), v


def by_constant(b: Block, scores: str, q: str) -> str:
    return str(b.op("Div", scores, b.constant(np.float32(np.sqrt(DIM)))))


def by_shape(b: Block, scores: str, q: str) -> str:
    """The head dimension is read off Q at run time: it has to stay what it was."""
    size = b.op("Cast", b.op("Gather", b.op("Shape", q), b.constant(np.array(-1)), axis=0), to=TensorProto.FLOAT)
    return str(b.op("Mul", scores, b.op("Reciprocal", b.op("Sqrt", size))))


def unscaled(b: Block, scores: str, q: str) -> str:
    return scores


def attention(make: Any, scale: Any, *, softmax: bool = True) -> onnx.ModelProto:
    b = Block()
    q, k, v = make(b)
    scores = scale(b, b.op("MatMul", q, k), q)
    mixed = b.op("MatMul", b.op("Softmax", scores, axis=-1) if softmax else scores, v)
    joined = b.op("Reshape", b.op("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(0, TOKENS, -1))
    return b.model(b.linear(joined, INNER, WIDTH))


def analysed(model: onnx.ModelProto) -> Groups:
    return group(runtime.probe(model))


def feeds(seed: int = 5) -> dict[str, Array]:
    return {"x": np.random.default_rng(seed).standard_normal((BATCH, TOKENS, WIDTH)).astype(np.float32)}


SPELLINGS = (separate, split, fused, shared_keys, rotary)


@pytest.mark.parametrize(("make", "scale"), list(itertools.product(SPELLINGS, (by_constant, by_shape, unscaled))))
def test_head_dimensions_are_cut(make: Any, scale: Any) -> None:
    model = attention(make, scale)
    groups = analysed(model)
    sizes = sorted(g.size for g in groups.prunable)
    assert sizes == {fused: [DIM], rotary: [DIM // 2, DIM]}.get(make, [DIM, DIM])
    assert all(g.exact for g in groups.prunable)
    assert prunable_share(groups, Accounting(groups, model.ByteSize()))[0] == 1.0
    for seed, fraction in enumerate((0.5, 0.25, 0.75)):
        oracle.check(model, feeds(seed), oracle.keep(groups, fraction, np.random.default_rng(seed)), groups)


@pytest.mark.parametrize("make", SPELLINGS)
def test_zeroing_the_consumers_that_the_report_names_gives_the_pruned_outputs(make: Any, tmp_path: Any) -> None:
    """The contract with whoever reads the report, checked without any of this project's analyses."""
    model = attention(make, by_shape)
    result = onnxprune.prune(model, budget={"macs": 0.8}, method="l2", recover="none")
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    weights = {t.name: t for t in masked.graph.initializer}
    cut = 0
    for entry in result.report["groups"]:
        assert entry["exact"]
        for member in entry["members"]:
            if member["role"] == "consumer" and member["removed"]:
                value = numpy_helper.to_array(weights[member["tensor"]]).copy()
                np.moveaxis(value, member["axis"], 0)[member["removed"]] = 0
                weights[member["tensor"]].CopyFrom(numpy_helper.from_array(value, member["tensor"]))
                cut += 1
    assert cut
    want, have, before = (runtime.run(runtime.session(m, threads=1), feeds())[0] for m in (masked, result.model, model))
    np.testing.assert_allclose(have, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert np.abs(before - want).max() > 1e-2 * np.abs(want).max()  # something was cut


@pytest.mark.parametrize("make", (separate, fused))
def test_sensitivities_of_a_product_are_its_terms_shares(make: Any) -> None:
    """PFP on Q K': the share of every dimension among the positive, and among the negative, terms of every score."""
    model = attention(make, unscaled, softmax=False)
    data = {"x": np.concatenate([feeds(s)["x"] for s in range(3)])}
    found = onnxprune.calibrate(model, data)
    groups = analysed(model)
    product = next(layer for layer in groups.layers if layer.other is not None and DIM in (groups.full(layer.x),))
    session = runtime.session(runtime.with_outputs(model, [product.x.tensor, product.other.tensor]))
    expected = np.zeros(DIM)
    for s in range(3):
        q, k = runtime.run(session, feeds(s))
        terms = np.einsum("bhid,bhdj->bhijd", q.astype(np.float64), k.astype(np.float64))
        for a, b in itertools.product((1, -1), repeat=2):  # the sign of the activation, the sign of the weight
            part = np.where((np.sign(q)[:, :, :, None] == a) & (np.sign(k).swapaxes(2, 3)[:, :, None] == b), terms, 0)
            total = part.sum(-1, keepdims=True)
            shares = np.divide(part, total, out=np.zeros_like(part), where=total != 0)
            expected = np.maximum(expected, shares.max((0, 1, 2, 3)))
    score = next(x for x in found.layers if x.layer == product.name)
    np.testing.assert_allclose(score.values, expected, rtol=1e-5)


def test_normalised_queries_lose_whole_heads_or_approximately_places() -> None:
    b = Block()
    q, k, v = separate(b)
    q = b.op("LayerNormalization", q, b.weight(DIM), axis=-1)
    mixed = b.op("MatMul", b.op("Softmax", b.op("MatMul", q, k), axis=-1), v)
    joined = b.op("Reshape", b.op("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(0, TOKENS, -1))
    model = b.model(b.linear(joined, INNER, WIDTH))
    reasons = {g.reason for g in analysed(model).groups if g.size == DIM and g.frozen}
    assert any("splits channels, which are followed along the other axis" in str(reason) for reason in reasons), reasons
    result = onnxprune.prune(model, budget={"macs": 0.8}, method="l2", allow_approximate=True, attention="dims")
    assert any(e["removed"] and not e["exact"] and "sums over the channels" in e["flaw"] for e in result.report["groups"])
    assert any("approximate" in note for note in result.report["validation"]["notes"])
