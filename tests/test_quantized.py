"""Explicitly quantised graphs: 8-bit weights, their scales and zero points follow their channels, or freeze."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import oracle
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune import runtime
from onnxprune.groups import Groups
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, reweightable
from onnxprune.plan import Kept, Plan


def quantised(zero_points: bool = False, *, activations: bool = False) -> onnx.ModelProto:
    """Conv(12) - Relu - Conv(4), weights per output channel in int8 (or uint8 with zero points)."""
    rng = np.random.default_rng(0)
    kind = np.uint8 if zero_points else np.int8
    tensors: dict[str, Any] = {}
    nodes = []
    for name, shape in (("W", (12, 3, 3, 3)), ("V", (4, 12, 1, 1))):
        low, high = (0, 255) if zero_points else (-127, 127)
        tensors[name] = rng.integers(low, high, shape).astype(kind)
        tensors[name + "s"] = rng.uniform(0.01, 0.02, shape[0]).astype(np.float32)
        tensors[name + "z"] = np.full(shape[0], 128 if zero_points else 0, kind)
        nodes.append(helper.make_node("DequantizeLinear", [name, name + "s", name + "z"], [name + "f"], axis=0))
    tensors["s"], tensors["z"] = np.float32(0.05), np.uint8(0)
    nodes += [helper.make_node("Conv", ["x", "Wf"], ["a"]), helper.make_node("Relu", ["a"], ["r"])]
    if activations:
        nodes.append(helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q"]))
        nodes.append(helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]))
    nodes.append(helper.make_node("Conv", ["d" if activations else "r", "Vf"], ["y"]))
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in tensors.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def grouped(model: onnx.ModelProto) -> Groups:
    return group(runtime.probe(model))


@pytest.mark.parametrize("activations", [False, True])
def test_weights_scales_and_zero_points_are_cut_together(activations: bool) -> None:
    model = quantised(activations=activations)
    groups = grouped(model)
    (found,) = groups.prunable
    plan = Plan({found.id: Kept(12, np.array([1, 4, 7]))})
    verdict = oracle.check(model, groups.net.feeds, plan, groups)
    shapes = {t.name: tuple(t.dims) for t in verdict.pruned.graph.initializer}
    assert shapes["W"] == (3, 3, 3, 3)
    assert shapes["Ws"] == shapes["Wz"] == (3,)
    assert shapes["V"] == (4, 3, 1, 1)
    assert shapes["Vs"] == (4,)
    roles = {(d.tensor, d.axis): r for d, r in groups.roles.items()}
    assert roles["V", 1] == "consumer"
    assert not reweightable(groups, found), "8-bit weights cannot be rescaled"


def test_a_zero_point_other_than_zero_silences_where_zeros_do_not() -> None:
    """Zeroing a uint8 weight with zero point 128 does not make it 0: the mask writes 128, and the report says so."""
    model = quantised(zero_points=True)
    groups = grouped(model)
    (found,) = groups.prunable
    assert not found.exact
    assert found.flaw is not None
    assert "zero point" in found.flaw.reason
    plan = Plan({found.id: Kept(12, np.array([1, 4, 7]))})
    oracle.check(model, groups.net.feeds, plan, groups)
    masked = {t.name: numpy_helper.to_array(t) for t in mask(groups, plan).graph.initializer}
    assert (masked["V"][:, [0, 2, 3, 5, 6, 8, 9, 10, 11]] == 128).all()


def test_a_quantised_weight_that_is_computed_is_frozen_where_its_zero_point_is_not_zero() -> None:
    """Nothing says which constant would have to take which value."""
    model = quantised(zero_points=True)
    dequantise = next(n for n in model.graph.node if n.input[0] == "V")
    turned = [
        helper.make_node("Transpose", ["V"], ["Vt"], perm=[0, 1, 3, 2]),
        helper.make_node("DequantizeLinear", ["Vt", *dequantise.input[1:]], list(dequantise.output), axis=0),
    ]
    rest = [n for n in model.graph.node if n.input[0] != "V"]
    del model.graph.node[:]
    model.graph.node.extend([*turned, *rest])
    groups = grouped(model)
    assert not groups.prunable
    assert any("silences" in (g.reason or "") for g in groups.groups)


@pytest.mark.parametrize("zero", [0, 3])
def test_weights_in_floating_point_behind_a_pair_of_quantisers(zero: int) -> None:
    """As frameworks export fake quantisation; with a zero point the pair is not followed."""
    model = quantised()
    stored = next(t for t in model.graph.initializer if t.name == "V")
    stored.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(stored).astype(np.float32) / 50, "V"))
    points = next(t for t in model.graph.initializer if t.name == "Vz")
    points.CopyFrom(numpy_helper.from_array(np.full(4, zero, np.int8), "Vz"))
    dequantise = next(n for n in model.graph.node if n.input[0] == "V")
    dequantise.input[0] = "Vq"
    nodes = [helper.make_node("QuantizeLinear", ["V", "Vs", "Vz"], ["Vq"], axis=0), *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    groups = grouped(model)
    assert len(groups.prunable) == (1 if zero == 0 else 0)
    for found in groups.prunable:
        oracle.check(model, groups.net.feeds, Plan({found.id: Kept(12, np.array([1, 4, 7]))}), groups)


def test_eight_bit_weights_count_as_parameters() -> None:
    from onnxprune.groups import Accounting

    groups = grouped(quantised())
    accounting = Accounting(groups, 10_000)
    assert accounting.size(accounting.full_widths).params == 12 * 27 + 4 * 12 + 12 + 4
