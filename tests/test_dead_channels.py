"""Channels that are zero for every input: to cut exactly those must change no output.

Two statements are tested, and they differ. In exact arithmetic nothing changes, to the bit: with weights and inputs that are
small integers every sum is exact in float32, whatever the order of its terms, and the outputs are equal to the last bit.
With real weights ONNX Runtime's matrix kernels add the terms in blocks of so many channels, counted from the first one: after
a cut other terms share a block and round differently. Measured, relative to the output's range: 0 on the narrow network below
without the runtime's optimisations, up to 1.7e-7 with them; 3.4e-7 to 1.1e-6 on the zoo's nine networks, with or without. The
original with the dead channels' consumers zeroed keeps its shapes and so its blocks: it equals the original to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import oracle
import pytest
from onnx import numpy_helper
from quirk import Array, feeds, net, stored

from onnxprune import runtime
from onnxprune.files import load
from onnxprune.groups import Groups
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, surgery
from onnxprune.plan import Plan

WIDTHS = {"stem": 16, "one": 24, "two": 16, "wide": 32, "three": 20, "four": 32, "depth": 32}
ROUNDING = 2e-6  # of the output's range; see above


def small(seed: int, *, whole: bool) -> onnx.ModelProto:
    """A residual network of all that zeros pass through: shortcuts, a strided projection, a depthwise convolution, a Concat.

    A quarter of every norm's channels have scale and shift 0. whole: all numbers are integers and all divisions by powers of 2.
    """
    body = ""

    def block(name: str, x: str, *, kernel: int = 3, stride: int = 1, group: int = 1) -> None:
        nonlocal body
        window = f"kernel_shape = {[kernel] * 2}, pads = {[kernel // 2] * 4}, strides = {[stride] * 2}"
        body += f"""
            {name}_c = Conv <group = {group}, {window}> ({x}, {name}_w)
            {name}_n = BatchNormalization <epsilon = 0.0> ({name}_c, {name}_s, {name}_b, {name}_m, {name}_v)
            {name} = Relu ({name}_n)
        """

    block("stem", "x")
    block("one", "stem")
    block("two", "one")
    body += "first = Add (two, stem)\n"
    block("wide", "first", kernel=1, stride=2)
    block("three", "first", stride=2)
    block("four", "three")
    body += "second = Add (four_n, wide_n)\n"
    block("depth", "second", group=32)
    body += """
        both = Concat <axis = 1> (depth, wide)
        pooled = GlobalAveragePool (both)
        flat = Flatten (pooled)
        y = Gemm <transB = 1> (flat, out_w, out_b)
    """
    return net(body, weights(seed, whole), x="float[1,3,8,8] x")


def sparse(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Filters of nine ones and minus ones each, so that sums stay small."""
    inputs = int(np.prod(shape[1:]))
    order = rng.permuted(np.tile(np.arange(inputs), (shape[0], 1)), axis=1)
    return ((order < 9) * rng.choice([-1.0, 1.0], order.shape)).reshape(shape)


def largest_sum(model: onnx.ModelProto, x: Mapping[str, Array]) -> float:
    """A bound on every partial sum of every layer: the largest value when all terms count by their absolute value."""
    bound = onnx.ModelProto()
    bound.CopyFrom(model)
    values = stored(model)
    for t in bound.graph.initializer:
        layer, kind = t.name[:-2], t.name[-2:]
        value = np.abs(values[t.name])
        if kind == "_m":
            value = np.zeros_like(value)
        elif kind == "_b" and f"{layer}_m" in values:
            value = value + np.abs(values[f"{layer}_m"] * values[f"{layer}_s"])
        t.CopyFrom(numpy_helper.from_array(value, t.name))
    names = [o for n in bound.graph.node for o in n.output]
    every = runtime.run(
        runtime.session(runtime.with_outputs(bound, names), threads=1), {k: np.abs(v) for k, v in x.items()}, names
    )
    return max(float(np.abs(v).max()) for v in every)


def weights(seed: int, whole: bool) -> dict[str, Array]:
    rng = np.random.default_rng(seed)
    reads = {"stem": 3, "one": 16, "two": 24, "wide": 16, "three": 16, "four": 20, "depth": 1}
    shapes = {f"{k}_w": (n, reads[k], *([1, 1] if k == "wide" else [3, 3])) for k, n in WIDTHS.items()} | {"out_w": (10, 64)}
    values: dict[str, Array] = {"out_b": rng.integers(-9, 9, 10).astype(float)}
    for name, shape in shapes.items():
        values[name] = sparse(rng, shape) if whole else rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    for k, n in WIDTHS.items():
        for kind, low, high in (("s", 1, 1 if whole else 2), ("b", -2, 2), ("m", -2, 2), ("v", 1, 1 if whole else 2)):
            values[f"{k}_{kind}"] = rng.integers(low, high + 1, n).astype(float) if whole else rng.uniform(low, high, n)
    # Channels that meet in a sum are dead in all of it.
    lost = {k: rng.choice(n, n // 4, replace=False) for k, n in WIDTHS.items()}
    lost |= {"two": lost["stem"], "four": lost["wide"], "depth": lost["wide"]}
    for k, dead in lost.items():
        values[f"{k}_s"][dead] = values[f"{k}_b"][dead] = 0
    return {k: v.astype(np.float32) for k, v in values.items()}


def zeroed(model: onnx.ModelProto) -> dict[str, Array]:
    """Which channels of a tensor are made as zeros: by a norm with scale and shift 0, or by a filter with weight and bias 0."""
    values = stored(model)
    normed = {n.input[0] for n in model.graph.node if n.op_type == "BatchNormalization"}
    found: dict[str, Array] = {}
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            found[node.output[0]] = (values[node.input[1]] == 0) & (values[node.input[2]] == 0)
        elif node.op_type == "Conv" and node.output[0] not in normed:
            weight = values[node.input[1]]
            bias = values[node.input[2]] if len(node.input) > 2 else np.zeros(len(weight))
            found[node.output[0]] = ~weight.reshape(len(weight), -1).any(axis=1) & (bias == 0)
    return found


def dead(groups: Groups) -> Plan:
    """Keeps all but the channels that every layer of their group makes as zeros."""
    zeros = zeroed(groups.net.source)
    kept: dict[str, list[int]] = {}
    for g in groups.prunable:
        marks = [(s, zeros[s.dim.tensor]) for s in g.slots if s.dim.tensor in zeros and s.dim.axis == 1]
        alive = np.full(g.size, not marks)
        for slot, zero in marks:
            np.logical_or.at(alive, slot.channels, ~zero[slot.positions])
        if alive.any():
            kept[g.id] = np.flatnonzero(alive).tolist()
    return oracle.only(groups, kept)


def lost(plan: Plan) -> Mapping[str, int]:
    return {name: kept.size - len(kept.indices) for name, kept in plan.groups.items()}


def outputs(model: onnx.ModelProto, x: Mapping[str, Array], optimise: bool) -> list[Array]:
    return runtime.run(runtime.session(model, threads=1, optimise=optimise), x)


@pytest.mark.parametrize("optimise", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_whole_numbers_come_out_the_same_to_the_bit(seed: int, optimise: bool) -> None:
    model = small(seed, whole=True)
    groups = group(runtime.probe(model))
    plan = dead(groups)
    assert all(n == groups.by_id[name].size // 4 for name, n in lost(plan).items()) and len(plan.groups) == 4
    rng = np.random.default_rng(seed)
    x = {"x": rng.integers(-3, 4, (1, 3, 8, 8)).astype(np.float32)}
    (want,), (got,) = outputs(model, x, optimise), outputs(surgery(groups, plan), x, optimise)
    assert largest_sum(model, x) * 16 < 2**24  # sixteenths, from the pooling: float32 holds every sum without rounding
    assert np.abs(want).max() > 100
    assert want.tobytes() == got.tobytes()


@pytest.mark.parametrize("optimise", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_real_numbers_differ_by_the_order_of_their_sums_only(seed: int, optimise: bool) -> None:
    model = small(seed, whole=False)
    groups = group(runtime.probe(model))
    plan = dead(groups)
    assert len(plan.groups) == 4
    nothing_changed(groups, plan, feeds(model, seed), optimise)


def nothing_changed(groups: Groups, plan: Plan, x: Mapping[str, Array], optimise: bool) -> None:
    want, masked, got = (outputs(m, x, optimise) for m in (groups.net.source, mask(groups, plan), surgery(groups, plan)))
    assert [a.tobytes() for a in want] == [a.tobytes() for a in masked]
    assert max(oracle.difference(a, b, a) for a, b in zip(want, got, strict=True)) <= ROUNDING


def test_a_channel_too_many_is_noticed() -> None:
    """The bound is tight enough to see one living channel go."""
    model = small(0, whole=False)
    groups = group(runtime.probe(model))
    kept = {name: k.indices.tolist() for name, k in dead(groups).groups.items()}
    for name in kept:
        with pytest.raises(AssertionError):
            nothing_changed(groups, oracle.only(groups, kept | {name: kept[name][1:]}), feeds(model), optimise=False)


ZOO = Path(os.environ.get("ONNXPRUNE_ZOO", ""))
DEAD = sorted(ZOO.glob("**/*.dead*.onnx")) if os.environ.get("ONNXPRUNE_ZOO") else []


@pytest.mark.skipif(not DEAD, reason="ONNXPRUNE_ZOO names no folder with *.dead*.onnx in it")
@pytest.mark.parametrize("path", DEAD or [Path("none")], ids=lambda p: p.stem)
def test_dead_channels_of_the_zoo(path: Path) -> None:
    groups = group(runtime.probe(load(path)))
    plan = dead(groups)
    gone = lost(plan)
    assert all(n in (0, groups.by_id[name].size // 4) for name, n in gone.items())  # 0: a linear layer, without a norm
    assert sum(gone.values()) >= 0.15 * sum(g.size for g in groups.prunable)
    shapes = {v.name: groups.net.shapes[v.name] for v in groups.net.inputs}
    x = {name: np.random.default_rng(5).standard_normal(s).astype(np.float32) for name, s in shapes.items()}
    for optimise in (False, True):
        nothing_changed(groups, plan, x, optimise)
