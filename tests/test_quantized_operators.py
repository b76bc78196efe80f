"""Operators on integers, spelt out one by one: those of ai.onnx and those of ONNX Runtime's own domain."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import oracle
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune import runtime
from onnxprune.contraction import weight_values
from onnxprune.groups import Groups
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, surgery

Array = np.ndarray[Any, Any]
MS = "com.microsoft"
WIDE = 12


class Chain:
    """Builds a model; quantised tensors are named alone, `q` puts their scale and zero point beside them."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, Array] = {}
        self.const("s", np.float32(0.04))
        self.const("z", np.uint8(120))

    def const(self, name: str, value: Any) -> str:
        self.weights[name] = np.asarray(value)
        return name

    def q(self, *tensors: str) -> list[str]:
        return [name for t in tensors for name in (t, "s", "z")]

    def node(self, op: str, reads: list[str], out: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, reads, [out], out, domain=domain, **attributes))
        return out

    def ms(self, op: str, reads: list[str], out: str, **attributes: Any) -> str:
        return self.node(op, reads, out, MS, **attributes)

    def weight(self, name: str, *shape: int, axis: int | None = None) -> list[str]:
        """An int8 weight with its scale and zero point, by channel where `axis` is given."""
        self.const(name, self.rng.integers(-127, 128, shape).astype(np.int8))
        count = () if axis is None else (shape[axis],)
        self.const(f"{name}s", self.rng.uniform(0.01, 0.02, count).astype(np.float32))
        self.const(f"{name}z", np.zeros(count, np.int8))
        return [name, f"{name}s", f"{name}z"]

    def conv(self, x: str, name: str, out: int, inner: int, domain: str = "", axis: int | None = 0, **attributes: Any) -> str:
        w = self.weight(f"w{name}", out, inner, 1, 1, axis=axis)
        bias = self.const(f"b{name}", self.rng.integers(-900, 900, out).astype(np.int32))
        return self.node("QLinearConv", [*self.q(x), *w, "s", "z", bias], name, domain, **attributes)

    def model(self, out: str, shape: list[int], *, integer: bool = True, inputs: list[int] | None = None) -> onnx.ModelProto:
        """x -> `QuantizeLinear` -> "in" ... `out` -> `DequantizeLinear` -> y, of `shape`."""
        front = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["in"])]
        back = [helper.make_node("DequantizeLinear" if integer else "Identity", self.q(out) if integer else [out], ["y"])]
        made = helper.make_graph(
            [*front, *self.nodes, *back],
            "chain",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs or [2, 3, 6, 6])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            [numpy_helper.from_array(v, k) for k, v in self.weights.items()],
        )
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
        return helper.make_model(made, opset_imports=opsets, ir_version=8)


def cut(model: onnx.ModelProto, size: int = WIDE, groups: Groups | None = None) -> Groups:
    """Asserts that there is one group of channels, of `size`, and that cutting it computes what masking does, to the bit."""
    groups = groups or group(runtime.probe(model))
    assert [g.size for g in groups.prunable] == [size], [(g.id, g.reason) for g in groups.groups]
    for seed, fraction in enumerate((0.2, 0.7)):
        plan = oracle.keep(groups, fraction, np.random.default_rng(seed))
        assert oracle.check(model, groups.net.feeds, plan, groups, 0.0).error == 0
        masked, original = (runtime.run(runtime.session(m), groups.net.feeds)[0] for m in (mask(groups, plan), model))
        assert not np.array_equal(masked, original), "nothing was cut that mattered"
    return groups


# ---------------------------------------------------------------------------------------------- between two convolutions


def add(c: Chain) -> str:
    return c.ms("QLinearAdd", [*c.q(c.conv("in", "a", WIDE, 3), c.conv("in", "b", WIDE, 3)), "s", "z"], "m")


def add_bias(c: Chain) -> str:
    value = c.const("v", c.rng.integers(0, 255, (WIDE, 1, 1)).astype(np.uint8))
    return c.ms("QLinearAdd", [*c.q(value, c.conv("in", "a", WIDE, 3)), "s", "z"], "m")


def multiply(c: Chain) -> str:
    return c.ms("QLinearMul", [*c.q(c.conv("in", "a", WIDE, 3), c.conv("in", "b", WIDE, 3)), "s", "z"], "m")


def leaky(c: Chain) -> str:
    return c.ms("QLinearLeakyRelu", [*c.q(c.conv("in", "a", WIDE, 3)), "s", "z"], "m", alpha=0.2)


def sigmoid(c: Chain) -> str:
    return c.ms("QLinearSigmoid", [*c.q(c.conv("in", "a", WIDE, 3)), "s", "z"], "m")


def average(c: Chain) -> str:
    x = c.conv("in", "a", WIDE, 3)
    return c.ms("QLinearAveragePool", [*c.q(x), "s", "z"], "m", kernel_shape=[3, 3], pads=[1, 1, 1, 1], channels_last=0)


def everywhere(c: Chain) -> str:
    return c.ms("QLinearGlobalAveragePool", [*c.q(c.conv("in", "a", WIDE, 3)), "s", "z"], "m", channels_last=0)


def where(c: Chain) -> str:
    condition = c.const("c", c.rng.integers(0, 2, (WIDE, 1, 6)).astype(bool))
    return c.ms("QLinearWhere", [condition, *c.q(c.conv("in", "a", WIDE, 3), c.conv("in", "b", WIDE, 3)), "s", "z"], "m")


def softmax(c: Chain) -> str:
    x = c.conv("in", "a", WIDE, 3)
    return c.ms("QLinearSoftmax", [*c.q(x), "s", "z"], "m", axis=3, opset=13)


def there_and_back(c: Chain) -> str:
    """By channel, in the domain of ONNX Runtime."""
    scale = c.const("ps", c.rng.uniform(0.02, 0.05, WIDE).astype(np.float32))
    zero = c.const("pz", c.rng.integers(90, 130, WIDE).astype(np.uint8))
    x = c.ms("DequantizeLinear", [c.conv("in", "a", WIDE, 3), scale, zero], "f", axis=1)
    return c.node("QuantizeLinear", [c.node("Relu", [x], "r"), "s", "z"], "m")


def depthwise(c: Chain) -> str:
    x = c.conv("in", "a", WIDE, 3)
    return c.conv(x, "m", WIDE, 1, group=WIDE)


def one_scale(c: Chain) -> str:
    return c.conv("in", "m", WIDE, 3, axis=None)


MIDDLES = [
    add,
    add_bias,
    multiply,
    leaky,
    sigmoid,
    average,
    everywhere,
    where,
    softmax,
    there_and_back,
    depthwise,
    one_scale,
]


@pytest.mark.parametrize("middle", MIDDLES, ids=lambda m: m.__name__)
def test_channels_pass(middle: Any) -> None:
    c = Chain()
    out = c.conv(middle(c), "out", 4, WIDE)
    pooled = middle is everywhere
    cut(c.model(out, [2, 4, 1, 1] if pooled else [2, 4, 6, 6]))


def test_concatenation_keeps_the_channels_of_its_parts_apart() -> None:
    c = Chain()
    parts = c.q(c.conv("in", "a", 5, 3), c.conv("in", "b", 7, 3))
    joined = c.ms("QLinearConcat", ["s", "z", *parts], "m", axis=1)
    model = c.model(c.conv(joined, "out", 4, 12), [2, 4, 6, 6])
    groups = group(runtime.probe(model))
    assert sorted(g.size for g in groups.prunable) == [5, 7]
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    assert oracle.check(model, groups.net.feeds, plan, groups, 0.0).error == 0


@pytest.mark.parametrize(("axis", "opset"), [(1, 13), (1, 12), (0, 12)])
def test_softmax_over_channels_freezes_them(axis: int, opset: int) -> None:
    c = Chain()
    x = c.ms("QLinearSoftmax", [*c.q(c.conv("in", "a", WIDE, 3)), "s", "z"], "m", axis=axis, opset=opset)
    groups = group(runtime.probe(c.model(c.conv(x, "out", 4, WIDE), [2, 4, 6, 6])))
    assert not groups.prunable
    assert any("normalises" in (g.reason or "") for g in groups.groups)


def test_older_softmax_lets_channels_before_its_axis_pass() -> None:
    """Compared without optimisations: with them ONNX Runtime 1.31 computes another softmax of the model as it was."""
    c = Chain()
    x = c.ms("QLinearSoftmax", [*c.q(c.conv("in", "a", WIDE, 3)), "s", "z"], "m", axis=2, opset=12)
    model = c.model(c.conv(x, "out", 4, WIDE), [2, 4, 6, 6])
    groups = group(runtime.probe(model))
    assert [g.size for g in groups.prunable] == [WIDE]
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    models = (mask(groups, plan), surgery(groups, plan), model)
    masked, pruned, original = (runtime.run(runtime.session(m, optimise=False), groups.net.feeds)[0] for m in models)
    assert np.array_equal(masked, pruned)
    assert not np.array_equal(masked, original)


@pytest.mark.parametrize("grouped", [False, True])
def test_channels_last(grouped: bool) -> None:
    """As ONNX Runtime rewrites integer convolutions and poolings for speed."""
    c = Chain()
    x = c.node("Transpose", ["in"], "t", perm=[0, 2, 3, 1])
    x = c.conv(x, "a", WIDE, 3, MS, channels_last=1)
    if grouped:
        x = c.conv(x, "g", WIDE, 1, MS, channels_last=1, group=WIDE)
    x = c.ms("NhwcMaxPool", [x], "p", kernel_shape=[2, 2], strides=[2, 2])
    x = c.ms("QLinearAveragePool", [*c.q(x), "s", "z"], "v", kernel_shape=[1, 1], channels_last=1)
    x = c.ms("QLinearGlobalAveragePool", [*c.q(x), "s", "z"], "w", channels_last=1)
    out = c.conv(x, "out", 4, WIDE, MS, channels_last=1)
    groups = cut(c.model(out, [2, 1, 1, 4]))
    macs = {layer.name: layer.factor for layer in groups.layers}
    assert macs["a"] == 2 * 36
    assert macs["out"] == 2


# -------------------------------------------------------------------------------------------------------- matrix products


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("by_column", [False, True])
def test_qgemm(transposed: bool, by_column: bool) -> None:
    """The first makes 8 bits, the second floats; biases are int32."""
    c = Chain()
    axis = 1 - transposed if by_column else None
    flat = c.node("Flatten", ["in"], "flat")
    for name, inner, out in (("a", 108, WIDE), ("b", WIDE, 4)):
        w = c.weight(f"w{name}", *((out, inner) if transposed else (inner, out)), axis=axis)
        bias = c.const(f"bias{name}", c.rng.integers(-900, 900, out).astype(np.int32))
        made = ["s", "z"] if name == "a" else []
        flat = c.ms("QGemm", [*c.q(flat), *w, bias, *made], name, transB=int(transposed), alpha=0.5)
    cut(c.model(flat, [2, 4], integer=False))


@pytest.mark.parametrize("by_column", [False, True])
def test_qlinear_matmul(by_column: bool) -> None:
    c = Chain()
    axis = 1 if by_column else None
    x = c.node("QLinearMatMul", [*c.q("in"), *c.weight("a", 6, WIDE, axis=axis), "s", "z"], "m")
    x = c.node("QLinearMatMul", [*c.q(x), *c.weight("b", WIDE, 4, axis=axis), "s", "z"], "n")
    cut(c.model(x, [2, 3, 6, 4]))


def test_qlinear_matmul_with_the_weight_first() -> None:
    c = Chain()
    c.const("zero", np.uint8(0))
    a, b = (
        [c.const(k, c.rng.integers(0, 255, v).astype(np.uint8)), "s", "zero"] for k, v in (("a", (WIDE, 6)), ("b", (4, WIDE)))
    )
    x = c.node("QLinearMatMul", [*a, *c.q("in"), "s", "z"], "m")
    x = c.node("QLinearMatMul", [*b, *c.q(x), "s", "z"], "n")
    groups = cut(c.model(x, [2, 3, 4, 6]))
    assert [layer.weight for layer in groups.layers] == ["a", "b"]


@pytest.mark.parametrize("by_column", [False, True])
def test_dynamic_matmul(by_column: bool) -> None:
    c = Chain()
    axis, x = (1 if by_column else None), "x"
    for name, inner, out in (("a", 6, WIDE), ("b", WIDE, 4)):
        bias = c.const(f"bias{name}", c.rng.standard_normal(out).astype(np.float32))
        x = c.ms("DynamicQuantizeMatMul", [x, *c.weight(f"w{name}", inner, out, axis=axis), bias], name)
        x = c.node("Tanh", [x], f"t{name}")
    groups = cut(c.model(x, [2, 3, 6, 4], integer=False))
    assert not groups.prunable[0].exact


@pytest.mark.parametrize("by_column", [False, True])
def test_integers_to_float(by_column: bool) -> None:
    c = Chain()
    axis, x = (1 if by_column else None), "x"
    for name, inner, out in (("a", 6, WIDE), ("b", WIDE, 4)):
        names = [f"q{name}", f"s{name}", f"z{name}"]
        c.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], names))
        w, ws, wz = c.weight(f"w{name}", inner, out, axis=axis)
        bias = c.const(f"bias{name}", c.rng.standard_normal(out).astype(np.float32))
        x = c.ms("MatMulIntegerToFloat", [names[0], w, names[1], ws, names[2], wz, bias], name)
    groups = cut(c.model(x, [2, 3, 6, 4], integer=False))
    assert not groups.prunable[0].exact


def test_a_product_of_two_quantised_activations_freezes_what_it_sums_over() -> None:
    """A silent channel has the zero point in every place of the tensor: zeros, written anywhere, would not do."""
    c = Chain()
    a = c.node("QLinearMatMul", [*c.q("in"), *c.weight("a", 6, WIDE), "s", "z"], "m")
    b = c.node("QLinearMatMul", [*c.q("in"), *c.weight("b", 6, WIDE), "s", "z"], "n")
    turned = c.node("Transpose", [b], "t", perm=[0, 1, 3, 2])
    out = c.node("QLinearMatMul", [*c.q(a, turned), "s", "z"], "o")
    groups = group(runtime.probe(c.model(out, [2, 3, 6, 6])))
    assert not groups.prunable
    assert any("silenced where it is made" in (g.reason or "") for g in groups.groups)


def test_attention_reads_fewer_channels_but_keeps_its_heads() -> None:
    c = Chain()
    flat = c.node("Reshape", ["in", c.const("shape", np.array([2, 18, 6]))], "flat")
    x = c.node("QLinearMatMul", [*c.q(flat), *c.weight("a", 6, WIDE), "s", "z"], "m")
    w, ws, wz = c.weight("w", WIDE, 24, axis=1)
    bias = c.const("bias", c.rng.standard_normal(24).astype(np.float32))
    y = c.ms("QAttention", [x, w, bias, "s", ws, "", "z", wz], "t", num_heads=2)
    out = c.node("MatMul", [y, c.const("o", c.rng.standard_normal((8, 3)).astype(np.float32))], "n")
    model = c.model(out, [2, 18, 3], integer=False)
    groups = group(runtime.probe(model))
    assert [g.size for g in groups.prunable] == [WIDE]
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    verdict = oracle.check(model, groups.net.feeds, plan, groups)
    shapes = {t.name: tuple(t.dims) for t in verdict.pruned.graph.initializer}
    assert (shapes["w"], shapes["ws"]) == ((WIDE // 2, 24), (24,))


# ----------------------------------------------------------------------------------------------------------- packed weights


def packed(c: Chain, name: str, n: int, k: int, bits: int, block: int, zeros: str) -> list[str]:
    """B [N, blocks, bytes], scales and zero points (none, packed, in floating point), as MatMulNBits takes them."""
    blocks = -(-k // block)
    c.const(name, c.rng.integers(0, 256, (n, blocks, block * bits // 8)).astype(np.uint8))
    c.const(f"{name}s", c.rng.uniform(0.01, 0.05, n * blocks).astype(np.float32))
    if zeros == "packed":
        c.const(f"{name}z", c.rng.integers(0, 256, n * -(-blocks * bits // 8)).astype(np.uint8))
    elif zeros == "float":
        c.const(f"{name}z", c.rng.uniform(5, 9, n * blocks).astype(np.float32))
    return [name, f"{name}s", f"{name}z" if zeros else ""]


PACKINGS = [(4, 16, ""), (4, 16, "packed"), (4, 32, "float"), (8, 16, "packed"), (8, 32, "")]


def nbits(bits: int, block: int, zeros: str) -> onnx.ModelProto:
    """MatMulNBits(48 -> 12), Relu, MatMul(-> 4)."""
    c = Chain()
    b = packed(c, "b", WIDE, 48, bits, block, zeros)
    bias = c.const("bias", c.rng.standard_normal(WIDE).astype(np.float32))
    x = c.ms("MatMulNBits", ["x", *b, "", bias], "m", N=WIDE, K=48, bits=bits, block_size=block)
    x = c.node("Relu", [x], "r")
    out = c.node("MatMul", [x, c.const("w", c.rng.standard_normal((WIDE, 4)).astype(np.float32))], "n")
    return c.model(out, [5, 4], integer=False, inputs=[5, 48])


@pytest.mark.parametrize(("bits", "block", "zeros"), PACKINGS)
def test_outputs_of_a_packed_weight_can_go(bits: int, block: int, zeros: str) -> None:
    model = nbits(bits, block, zeros)
    groups = group(runtime.probe(model))
    assert [g.size for g in groups.prunable] == [WIDE]
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    verdict = oracle.check(model, groups.net.feeds, plan, groups)
    node = next(n for n in verdict.pruned.graph.node if n.op_type == "MatMulNBits")
    assert {a.name: a.i for a in node.attribute}["N"] == WIDE // 2
    assert {layer.op: layer.factor for layer in groups.layers}["MatMulNBits"] == 48


@pytest.mark.parametrize(("bits", "block", "zeros"), PACKINGS)
def test_a_packed_weight_is_unpacked_as_the_runtime_does(bits: int, block: int, zeros: str) -> None:
    model = nbits(bits, block, zeros)
    groups = group(runtime.probe(model))
    (w,) = (v for layer, v in weight_values(groups.net, groups.layers).items() if layer.op == "MatMulNBits")
    x = np.eye(48, dtype=np.float32)
    session = runtime.session(runtime.with_outputs(model, ["m"]))
    unit = [runtime.run(session, {"x": x[i : i + 5]})[0] for i in (0, 5, 43)]
    bias = next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == "bias")
    for i, rows in zip((0, 5, 43), unit, strict=True):
        assert rows - bias == pytest.approx(w.T[i : i + 5], abs=1e-5)


def test_blocks_freeze_the_axis_that_they_lie_on() -> None:
    c = Chain()
    x = c.node("MatMul", ["x", c.const("w", c.rng.standard_normal((6, 32)).astype(np.float32))], "m")
    out = c.ms("MatMulNBits", [x, *packed(c, "b", 4, 32, 4, 16, "")[:2]], "n", N=4, K=32, bits=4, block_size=16)
    groups = group(runtime.probe(c.model(out, [2, 3, 6, 4], integer=False)))
    assert not groups.prunable
    assert any("in blocks along the summed axis" in (g.reason or "") for g in groups.groups)
