"""The work grows with the network, not with its square; and deep networks are no trouble.

Work is counted, not timed: how many lines of the package run, loops and comprehensions included.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import nets
import numpy as np
import onnx
import pytest
from onnx import helper

import onnxprune
from onnxprune import runtime
from onnxprune.budget import Budget
from onnxprune.criteria.plain import PLAIN
from onnxprune.errors import ValidationError
from onnxprune.groups import Accounting
from onnxprune.imported import freeze_groups
from onnxprune.passes.allocate import allocate
from onnxprune.passes.calibrate import calibrate
from onnxprune.passes.group import group
from onnxprune.passes.sample import sample
from onnxprune.passes.surgery import mask, reweightable, surgery
from onnxprune.passes.validate import validate
from onnxprune.report import build
from onnxprune.selection import Method, Selector

HERE = (str(Path(onnxprune.__file__).parent), str(Path(onnxprune.__file__).resolve().parent.parent / "passes"))
BLOCKS = 12


def deep(blocks: int) -> onnx.ModelProto:
    """Convolutions that share one bias between them, shortcuts, depthwise, Concat and Split, and sizes computed at run time."""
    rng = np.random.default_rng(0)
    weights: dict[str, np.ndarray[Any, Any]] = {"w": rng.standard_normal((4, 3, 1, 1)), "bias": np.zeros(4)}
    weights |= {"one": np.array([1]), "rest": np.array([-1]), "back": np.array([0, 0, 2, 2]), "halves": np.array([2, 2])}
    nodes: list[nets.Node] = [("Conv", "x w bias", "t0")]
    for i in range(blocks):
        k = f"_{i}"
        weights |= {f"w{k}": rng.standard_normal((4, 4, 1, 1)) / 4, f"d{k}": rng.standard_normal((4, 1, 1, 1))}
        weights |= {f"v{k}": rng.standard_normal((4, 4, 1, 1)) / 4, f"s{k}": np.ones(4), f"m{k}": np.zeros(4)}
        nodes += [
            ("Conv", f"t{i} w{k} bias", f"a{k}"),
            ("BatchNormalization", f"a{k} s{k} m{k} m{k} s{k}", f"n{k}"),
            ("Conv", f"n{k} d{k} bias", f"dw{k}", {"group": 4}),
            ("Split", f"dw{k} halves", f"l{k} r{k}", {"axis": 1}),
            ("Concat", f"r{k} l{k}", f"c{k}", {"axis": 1}),
            ("Shape", f"c{k}", f"z{k}"),
            ("Gather", f"z{k} one", f"g{k}"),
            ("Concat", f"one g{k} rest", f"q{k}", {"axis": 0}),
            ("Reshape", f"c{k} q{k}", f"y{k}"),
            ("Reshape", f"y{k} back", f"e{k}"),
            ("Conv", f"e{k} v{k} bias", f"p{k}"),
            ("Add", f"t{i} p{k}", f"t{i + 1}"),
        ]
    nodes.append(("Flatten", f"t{blocks}", "f"))
    weights["fc"] = rng.standard_normal((16, 3))
    nodes.append(("Gemm", "f fc", "out"))
    return nets.model(nodes, {"x": [1, 3, 2, 2]}, "out", weights)


class Work:
    """Counts the lines of the package that run inside the `with` block."""

    def __init__(self) -> None:
        self.lines = 0

    def _trace(self, frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        if not frame.f_code.co_filename.startswith(HERE):
            return None
        self.lines += event == "line"
        return self._trace

    def __enter__(self) -> Work:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)


def work(blocks: int, method: Method) -> dict[str, int]:
    """Lines run by each step on a network of so many blocks."""
    model = deep(blocks)
    if method == "top":  # as old exporters write it: every constant is declared as an input too
        model.ir_version = 3
        inputs = [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in model.graph.initializer]
        model.graph.input.extend(inputs)
    counts: dict[str, int] = {}

    def step(name: str, function: Callable[[], Any]) -> Any:
        with Work() as counter:
            result = function()
        counts[name] = counter.lines
        return result

    net = step("probe", lambda: runtime.probe(model))
    groups = step("group", lambda: group(net))
    groups = step("freeze", lambda: freeze_groups(groups, ["out"]))
    accounting = step("accounting", lambda: Accounting(groups, model.ByteSize()))
    saliency = step("score", lambda: calibrate(groups, PLAIN["l2"](), None, None))
    able = step("reweightable", lambda: {g.id: reweightable(groups, g) for g in groups.prunable})
    selector = step("selector", lambda: Selector(groups.prunable, saliency, method, rescalable=able))
    allocation = step("allocate", lambda: allocate(accounting, groups.prunable, selector, Budget("params", 0.8)))
    plan, shares = step("sample", lambda: sample(groups.prunable, allocation.choices, selector, ""))
    step("surgery", lambda: surgery(groups, plan))
    step("mask", lambda: mask(groups, plan))
    step("report", lambda: (build.group_entries(groups, plan), build.layer_entries(groups, accounting, plan, shares)))
    step("shares", lambda: (build.prunable_share(groups, accounting), build.group_macs(groups, accounting)))
    return counts


@pytest.mark.parametrize("method", ["top", "pfp-deterministic"])
def test_work_is_linear_in_the_nodes(method: Method) -> None:
    small, large = work(BLOCKS, method), work(4 * BLOCKS, method)
    ratios = {name: large[name] / small[name] for name in small}
    assert max(ratios.values()) < 4.5, ratios  # 4 times the blocks; quadratic work would be 16 times as much


def test_a_number_doubled_a_hundred_times_is_left_alone() -> None:
    """Traced as a formula it would have two to the power of a hundred terms."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((6, 3, 1, 1)), "v": rng.standard_normal((2, 6, 1, 1)), "one": np.array(1)}
    nodes: list[nets.Node] = [("Conv", "x w", "a"), ("Shape", "a", "s"), ("Gather", "s one", "n0")]
    nodes += [("Add", f"n{i} n{i}", f"n{i + 1}") for i in range(100)]
    nodes += [("Cast", "n100", "f", {"to": 1}), ("Mul", "a f", "m"), ("Conv", "m v", "out")]
    groups = nets.grouped(nets.model(nodes, {"x": [1, 3, 2, 2]}, "out", weights))
    assert len(groups.layers) == 2


def test_products_at_the_end_of_a_deep_trunk() -> None:
    """The walk back to what silences a channel passes every one of the shortcuts."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.standard_normal((4, 3, 1, 1)), "flat": np.array([0, 0, -1])}
    nodes: list[nets.Node] = [("Conv", "x w", "t0")]
    for i in range(600):
        weights[f"w{i}"] = rng.standard_normal((4, 4, 1, 1)) / 100
        nodes += [("Conv", f"t{i} w{i}", f"c{i}"), ("Add", f"t{i} c{i}", f"t{i + 1}")]
    nodes += [
        ("Reshape", "t600 flat", "f"),
        ("Transpose", "f", "turned", {"perm": [0, 2, 1]}),
        ("MatMul", "turned f", "out"),  # [N, positions, positions]: sums over the channels
    ]
    groups = nets.grouped(nets.model(nodes, {"x": [1, 3, 2, 2]}, "out", weights))
    assert [g.size for g in groups.prunable] == [4]
    assert {d.tensor for d, role in groups.roles.items() if role == "silencer"} == {"w"} | {f"w{i}" for i in range(600)}


def test_shapes_that_contradict_the_declared_ones_are_refused() -> None:
    """The oracle would not notice, for it plans no reuse of buffers; the runtime that deploys the model does."""
    weights = {"three": np.array([3])}
    nodes: list[nets.Node] = [("Relu", "x", "a"), ("Exp", "a", "b"), ("Tile", "b three", "c"), ("ReduceSum", "b", "s")]
    nodes += [("Relu", "c", "d"), ("Exp", "d", "e"), ("Add", "e s", "out")]
    model = nets.model(nodes, {"x": ["K"]}, "out", weights)
    feeds = [{"x": np.ones(8, np.float32)}]
    assert validate(model, model, model, feeds).masked_max_relative_error == 0
    for name in "abcd":
        model.graph.value_info.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["K"]))
    with pytest.raises(ValidationError, match="re-use buffer"):
        validate(model, model, model, feeds)
