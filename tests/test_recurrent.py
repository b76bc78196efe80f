"""Recurrent layers, group normalisation, fused and inlined operators: cut like everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxprune import files, runtime
from onnxprune.criteria import Sensitivity
from onnxprune.data import InputSpec, open_data
from onnxprune.passes.calibrate import calibrate
from onnxprune.passes.group import group
from onnxprune.plan import Kept, Plan

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
H, INPUTS, T, B = 6, 5, 4, 2


def model(nodes: list[Any], weights: dict[str, Any], inputs: dict[str, list[Any]], output: list[Any], opset: int = 17) -> Any:
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return onnx.shape_inference.infer_shapes(helper.make_model(made, opset_imports=opsets, ir_version=8))


def recurrent(op: str, *, both: bool = False, states: bool = True, peep: bool = False) -> Any:
    """Two recurrent layers in a row and a linear read-out of the second's last state."""
    rng = np.random.default_rng(3)
    d, g = (2 if both else 1), GATES[op]

    def weights(tag: str, size: int) -> dict[str, Any]:
        made: dict[str, Any] = {
            f"W{tag}": rng.normal(size=(d, g * H, size)).astype(np.float32),
            f"R{tag}": rng.normal(size=(d, g * H, H)).astype(np.float32),
            f"B{tag}": rng.normal(size=(d, 2 * g * H)).astype(np.float32),
        }
        if states:
            made[f"h{tag}"] = rng.normal(size=(d, B, H)).astype(np.float32)
            if op == "LSTM":
                made[f"c{tag}"] = rng.normal(size=(d, B, H)).astype(np.float32)
        if peep:
            made[f"P{tag}"] = rng.normal(size=(d, 3 * H)).astype(np.float32)
        return made

    def node(tag: str, x: str) -> Any:
        inputs = [x, f"W{tag}", f"R{tag}", f"B{tag}", "", f"h{tag}" if states else ""]
        if op == "LSTM":
            inputs += [f"c{tag}" if states else "", f"P{tag}" if peep else ""]
        direction = "bidirectional" if both else "forward"
        return helper.make_node(op, inputs, [f"Y{tag}", f"Yh{tag}"], hidden_size=H, direction=direction)

    nodes = [
        node("1", "x"),
        helper.make_node("Transpose", ["Y1"], ["t"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["t", "to"], ["m"]),
        node("2", "m"),
        helper.make_node("Transpose", ["Yh2"], ["s"], perm=[1, 0, 2]),
        helper.make_node("Flatten", ["s"], ["f"]),
        helper.make_node("Gemm", ["f", "V"], ["y"]),
    ]
    tensors = {**weights("1", INPUTS), **weights("2", d * H)}
    tensors |= {"to": np.array([0, 0, -1]), "V": rng.normal(size=(d * H, 3)).astype(np.float32)}
    return model(nodes, tensors, {"x": [T, B, INPUTS]}, [B, 3], opset=14)


def feeds(net: Any) -> dict[str, Any]:
    return runtime.example_feeds(net)


def some(groups: Any, seed: int = 0) -> Plan:
    rng = np.random.default_rng(seed)
    kept = {}
    for g in groups.prunable:
        count = int(rng.integers(1, g.size))
        kept[g.id] = Kept(g.size, np.sort(rng.choice(g.size, count, replace=False)))
    return Plan(kept)


@pytest.mark.parametrize("op", list(GATES))
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("states", [False, True])
def test_hidden_units_go_from_every_tensor(op: str, both: bool, states: bool) -> None:
    net = recurrent(op, both=both, states=states, peep=op == "LSTM" and states)
    groups = group(runtime.probe(net, feeds(net)))
    assert [g.size for g in groups.prunable] == [H, H]
    for seed in range(3):
        verdict = oracle.check(net, feeds(net), some(groups, seed), groups)
    sizes = [a.i for n in verdict.pruned.graph.node for a in n.attribute if a.name == "hidden_size"]
    assert all(s < H for s in sizes)


def test_recurrent_weights_are_consumers() -> None:
    net = recurrent("LSTM")
    groups = group(runtime.probe(net, feeds(net)))
    roles = {(d.tensor, d.axis): r for d, r in groups.roles.items()}
    assert roles["R1", 2] == roles["W2", 2] == "consumer"
    assert roles["W1", 1] == roles["R1", 1] == "producer"


def test_lstm_macs() -> None:
    net = recurrent("LSTM", both=True)
    groups = group(runtime.probe(net, feeds(net)))
    costs = [x.factor * int(np.prod([groups.full(d) for d in x.macs_dims])) for x in groups.layers]
    steps = T * B
    assert costs[:4] == [steps * 2 * 4 * H * INPUTS, steps * 2 * 4 * H * H, steps * 2 * 4 * H * 2 * H, steps * 2 * 4 * H * H]


def test_states_and_inputs_are_calibrated() -> None:
    net = recurrent("GRU", states=False)
    groups = group(runtime.probe(net, feeds(net)))
    x = np.random.default_rng(0).normal(size=(T, B, INPUTS)).astype(np.float32)
    samples = open_data({"x": x}, [InputSpec("x", np.dtype(np.float32), (T, B, INPUTS))])
    saliency = calibrate(groups, Sensitivity(), samples)
    for g in groups.prunable:
        scores = saliency.of(g)
        assert np.all((scores > 0) & (scores <= 1))
    assert {s.layer for s in saliency.layers} >= {"Y1 (recurrent)", "Y2"}


@pytest.mark.parametrize("opset", [21, 23])
def test_group_normalisation_goes_by_whole_groups(opset: int) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.normal(size=(12, 3, 3, 3)).astype(np.float32),
        "s": rng.normal(size=12).astype(np.float32),
        "b": rng.normal(size=12).astype(np.float32),
        "V": rng.normal(size=(5, 12, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Conv", ["x", "W"], ["a"]),
        helper.make_node("GroupNormalization", ["a", "s", "b"], ["n"], num_groups=4),
        helper.make_node("Conv", ["n", "V"], ["y"]),
    ]
    net = model(nodes, weights, {"x": ["N", 3, 6, 6]}, ["N", 5, 4, 4], opset)
    fed = {"x": rng.normal(size=(2, 3, 6, 6)).astype(np.float32)}
    groups = group(runtime.probe(net, fed))
    (found,) = groups.prunable
    assert found.size == 4
    verdict = oracle.check(net, fed, Plan({found.id: Kept(4, np.array([0, 2]))}), groups)
    assert [a.i for n in verdict.pruned.graph.node for a in n.attribute if a.name == "num_groups"] == [2]


def test_fused_conv_of_the_runtimes_optimiser() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "b": rng.normal(size=8).astype(np.float32),
        "V": rng.normal(size=(4, 8, 1, 1)).astype(np.float32),
    }
    nodes = [
        helper.make_node("FusedConv", ["x", "W", "b"], ["a"], domain="com.microsoft", activation="Relu"),
        helper.make_node("Conv", ["a", "V"], ["y"]),
    ]
    net = model(nodes, weights, {"x": [1, 3, 6, 6]}, [1, 4, 4, 4])
    groups = group(runtime.probe(net, feeds(net)))
    (found,) = groups.prunable
    assert found.size == 8
    oracle.check(net, feeds(net), some(groups), groups)


def test_bias_filled_to_the_size_of_the_weight() -> None:
    """Unoptimised exports write a zero bias as Expand(0, Shape(W)[0])."""
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "zero": np.float32(0.5),
        "V": rng.normal(size=(4, 8, 1, 1)).astype(np.float32),
        "one": np.array([1], np.int64),
    }
    nodes = [
        helper.make_node("Shape", ["W"], ["size"], start=0, end=1),
        helper.make_node("Expand", ["size", "one"], ["same"]),
        helper.make_node("CastLike", ["zero", "x"], ["z"]),
        helper.make_node("Expand", ["z", "same"], ["bias"]),
        helper.make_node("Conv", ["x", "W", "bias"], ["a"]),
        helper.make_node("Relu", ["a"], ["r"]),
        helper.make_node("Conv", ["r", "V"], ["y"]),
    ]
    net = model(nodes, weights, {"x": [1, 3, 6, 6]}, [1, 4, 4, 4])
    groups = group(runtime.probe(net, feeds(net)))
    assert [g.size for g in groups.prunable] == [8]
    oracle.check(net, feeds(net), some(groups), groups)


def test_bias_filled_to_a_constant_size() -> None:
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "n": np.array([8], np.int64),
        "V": rng.normal(size=(4, 8, 1, 1)).astype(np.float32),
    }
    fill = helper.make_tensor("value", TensorProto.FLOAT, [1], [0.25])
    nodes = [
        helper.make_node("ConstantOfShape", ["n"], ["bias"], value=fill),
        helper.make_node("Conv", ["x", "W", "bias"], ["a"]),
        helper.make_node("Conv", ["a", "V"], ["y"]),
    ]
    net = model(nodes, weights, {"x": [1, 3, 6, 6]}, [1, 4, 4, 4])
    groups = group(runtime.probe(net, feeds(net)))
    assert [g.size for g in groups.prunable] == [8]
    oracle.check(net, feeds(net), some(groups), groups)


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    body = [helper.make_node("Conv", ["a", "w"], ["c"]), helper.make_node("Relu", ["c"], ["d"])]
    opsets = [helper.make_opsetid("", 17)]
    function = helper.make_function("mine", "Block", ["a", "w"], ["d"], body, opsets)
    nodes = [
        helper.make_node("Block", ["x", "W"], ["a"], domain="mine"),
        helper.make_node("Block", ["a", "V"], ["y"], domain="mine"),
    ]
    weights = {
        "W": rng.normal(size=(8, 3, 3, 3)).astype(np.float32),
        "V": rng.normal(size=(4, 8, 1, 1)).astype(np.float32),
    }
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    net = helper.make_model(made, functions=[function], opset_imports=[*opsets, helper.make_opsetid("mine", 1)], ir_version=8)
    path = tmp_path / "f.onnx"
    path.write_bytes(net.SerializeToString())
    flat = files.load(path)
    groups = group(runtime.probe(flat, feeds(flat)))
    assert [g.size for g in groups.prunable] == [8]
    oracle.check(flat, feeds(flat), some(groups), groups)
