#!/usr/bin/env python3
"""How the time of every step grows with the number of nodes, on one thread.

    python tools/bench_scaling.py [--nodes 125 250 500 1000 2500 5000] [--repeats 3] [--profile]
    python tools/bench_scaling.py --model FILE.onnx [--profile]

The networks are made up, of parts that real ones have: residual and bottleneck blocks with batch norms, Split and Concat, dense
blocks, squeeze-and-excitation gates, depthwise convolutions, channel shuffles with shape arithmetic as exporters write it.
`narrow` has a stage of few channels for every 60 nodes, hence many small groups; `wide` has four stages of many channels
however deep it is, hence a few groups that lie on very many axes; `tokens` is a chain of transformer blocks, attention and
all. Maps are 4 x 4, so that inference costs little.
Repeats are interleaved over the sizes and medians are printed: seconds, how many times those of the 500-node network, and
the slope of a line through all sizes on log-log axes (1 is linear). "analysis and surgery" is all that onnxprune does to decide
and to cut: reading the file, the probe run, the groups, the sizes, the choice of channels, surgery. Mask and validate check it.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import os
import pstats
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["ONNXPRUNE_THREADS"] = os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune import files, runtime, wire
from onnxprune.budget import Budget
from onnxprune.criteria.plain import PLAIN
from onnxprune.groups import Accounting
from onnxprune.imported import require_prunable
from onnxprune.passes.allocate import allocate
from onnxprune.passes.calibrate import calibrate
from onnxprune.passes.group import group
from onnxprune.passes.sample import sample
from onnxprune.passes.surgery import mask, reweightable, surgery
from onnxprune.passes.validate import validate
from onnxprune.selection import Selector
from onnxprune.symbolic import Symbols

KINDS = ("narrow", "wide", "tokens")
NODES = (125, 250, 500, 1000, 2500, 5000)
BASE = 500  # nodes of the network that the others are compared with
CHECKS = ("mask", "validate")
INSIDE = ("symbols",)  # measured by itself, but a part of another step too: not added up

# ------------------------------------------------------------------------------------------------------ the networks


class Builder:
    """Builds a network node by node; every method returns the name of the tensor that it makes. Maps are [N, C, 4, 4]."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.wide = {"x": 3}

    def const(self, value: Any) -> str:
        self.weights.append(numpy_helper.from_array(np.asarray(value), f"c{len(self.weights)}"))
        return str(self.weights[-1].name)

    def node(self, op: str, reads: list[str], channels: int = 0, **attributes: Any) -> str:
        out = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, reads, [out], f"/{op}_{len(self.nodes)}", **attributes))
        self.wide[out] = channels
        return out

    def conv(self, x: str, out: int, kernel: int = 1, groups: int = 1, gain: float = 2.0) -> str:
        inner = self.wide[x] // groups
        w = self.rng.standard_normal((out, inner, kernel, kernel), np.float32) * np.float32((gain / inner) ** 0.5 / kernel)
        pads = [kernel // 2] * 4
        bias = self.const(self.rng.standard_normal(out, np.float32) / 10)
        return self.node("Conv", [x, self.const(w), bias], out, pads=pads, kernel_shape=[kernel] * 2, group=groups)

    def norm(self, x: str, scale: float = 1.0) -> str:
        n = self.wide[x]
        ranges = ((0.9 * scale, 1.1 * scale), (-0.1, 0.1), (-0.1, 0.1), (0.9, 1.1))  # scale, shift, mean, variance
        statistics = [self.const(self.rng.uniform(a, b, n).astype(np.float32)) for a, b in ranges]
        return self.node("BatchNormalization", [x, *statistics], n)

    def relu(self, x: str) -> str:
        return self.node("Relu", [x], self.wide[x])

    def block(self, x: str, out: int, kernel: int = 1, groups: int = 1) -> str:
        return self.relu(self.norm(self.conv(x, out, kernel, groups)))

    def add(self, x: str, branch: str) -> str:
        return self.node("Add", [self.norm(branch, 0.2), x], self.wide[x])

    # ---- the parts: each keeps the number of channels

    def residual(self, x: str) -> str:
        return self.relu(self.add(x, self.conv(self.block(x, self.wide[x] // 2, 3), self.wide[x])))

    def inverted(self, x: str) -> str:
        inner = 2 * self.wide[x]
        return self.add(x, self.conv(self.block(self.block(x, inner), inner, 3, inner), self.wide[x]))

    def gated(self, x: str) -> str:
        inner = self.block(x, self.wide[x])
        pooled = self.node("GlobalAveragePool", [inner], self.wide[inner])
        gate = self.node("Sigmoid", [self.conv(self.relu(self.conv(pooled, self.wide[x] // 4)), self.wide[inner])])
        return self.add(x, self.conv(self.node("Mul", [inner, gate], self.wide[inner]), self.wide[x]))

    def branches(self, x: str) -> str:
        """Split in halves, one of them worked on, Concat, mixed (CSP)."""
        half = self.wide[x] // 2
        names = [f"t{len(self.nodes)}a", f"t{len(self.nodes)}b"]
        sizes = self.const(np.array([half, half]))
        self.nodes.append(helper.make_node("Split", [x, sizes], names, f"/Split_{len(self.nodes)}", axis=1))
        self.wide |= dict.fromkeys(names, half)
        both = self.node("Concat", [names[0], self.residual(names[1])], 2 * half, axis=1)
        return self.block(both, self.wide[x])

    def dense(self, x: str) -> str:
        features, width = x, self.wide[x]
        for _ in range(3):
            new = self.conv(self.relu(self.norm(features)), width // 2, 3)
            features = self.node("Concat", [features, new], self.wide[features] + width // 2, axis=1)
        return self.block(features, width)

    def shuffled(self, x: str) -> str:
        """A grouped convolution and a shuffle whose sizes are computed from Shape, as PyTorch's exporter writes it."""
        c, inner = self.wide[x], self.conv(x, self.wide[x], 3, 4)
        n, half, h, w = self.size(inner, 0), self.size(inner, 1, 4), self.size(inner, 2), self.size(inner, 3)
        four = self.node("Unsqueeze", [self.node("Constant", [], value_int=4), self.const(np.array([0]))])
        split = self.node("Reshape", [inner, self.node("Concat", [n, four, half, h, w], axis=0)], c)
        turned = self.node("Transpose", [split], c, perm=[0, 2, 1, 3, 4])
        flat = self.node("Reshape", [turned, self.node("Concat", [n, self.const(np.array([-1])), h, w], axis=0)], c)
        return self.add(x, flat)

    def size(self, x: str, axis: int, divisor: int = 1) -> str:
        """One size of `x` as a vector of length 1."""
        found = self.node("Gather", [self.node("Shape", [x]), self.node("Constant", [], value_int=axis)], axis=0)
        if divisor > 1:
            found = self.node("Div", [found, self.node("Constant", [], value_int=divisor)])
        return self.node("Unsqueeze", [found, self.const(np.array([0]))])

    def attention(self, x: str, heads: int = 4) -> str:
        """Multi-head self-attention on [N, T, C], the target of each Reshape computed from Shape."""
        c, y = self.wide[x], self.layer_norm(x)
        n, t = self.size(y, 0), self.size(y, 1)
        split = self.node("Concat", [n, t, self.const(np.array([heads])), self.const(np.array([c // heads]))], axis=0)
        q, k, v = (
            self.node("Transpose", [self.node("Reshape", [self.linear(y, c), split], c)], c, perm=perm)
            for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        )
        scores = self.node("Mul", [self.node("MatMul", [q, k]), self.const(np.float32((c / heads) ** -0.5))])
        read = self.node("MatMul", [self.node("Softmax", [scores], axis=-1), v], c)
        joined = self.node("Concat", [n, t, self.const(np.array([c]))], axis=0)
        flat = self.node("Reshape", [self.node("Transpose", [read], c, perm=[0, 2, 1, 3]), joined], c)
        return self.node("Add", [x, self.linear(flat, c)], c)

    def perceptron(self, x: str) -> str:
        """Linear, GELU as exporters decompose it, linear."""
        inner = self.linear(self.layer_norm(x), 2 * self.wide[x])
        erf = self.node("Erf", [self.node("Div", [inner, self.const(np.float32(2**0.5))], self.wide[inner])], self.wide[inner])
        half = self.node("Mul", [inner, self.node("Add", [erf, self.const(np.float32(1))], self.wide[inner])], self.wide[inner])
        gelu = self.node("Mul", [half, self.const(np.float32(0.5))], self.wide[inner])
        return self.node("Add", [x, self.linear(gelu, self.wide[x])], self.wide[x])

    def layer_norm(self, x: str) -> str:
        n = self.wide[x]
        scale, shift = self.const(np.ones(n, np.float32)), self.const(np.zeros(n, np.float32))
        return self.node("LayerNormalization", [x, scale, shift], n, axis=-1)

    def linear(self, x: str, out: int) -> str:
        w = self.rng.standard_normal((self.wide[x], out), np.float32) * np.float32(self.wide[x] ** -0.5)
        bias = self.const(self.rng.standard_normal(out, np.float32) / 10)
        return self.node("Add", [bias, self.node("MatMul", [x, self.const(w)], out)], out)

    def tokens(self, x: str) -> str:
        """[N, C, 4, 4] to [N, 16, C]."""
        flat = self.node("Reshape", [x, self.const(np.array([0, 0, -1]))], self.wide[x])
        return self.node("Transpose", [flat], self.wide[x], perm=[0, 2, 1])

    def maps(self, x: str) -> str:
        """[N, 16, C] to [N, C, 4, 4]."""
        turned = self.node("Transpose", [x], self.wide[x], perm=[0, 2, 1])
        return self.node("Reshape", [turned, self.const(np.array([0, 0, 4, 4]))], self.wide[x])

    def model(self, x: str) -> onnx.ModelProto:
        flat = self.node("Flatten", [self.node("GlobalAveragePool", [x], self.wide[x])], self.wide[x])
        w = self.rng.standard_normal((10, self.wide[x]), np.float32)
        self.nodes.append(helper.make_node("Gemm", [flat, self.const(w)], ["y"], "/fc", transB=1))
        value = helper.make_tensor_value_info
        inputs = [value("x", onnx.TensorProto.FLOAT, ["N", 3, 4, 4])]
        outputs = [value("y", onnx.TensorProto.FLOAT, ["N", 10])]
        made = helper.make_graph(self.nodes, "made", inputs, outputs, self.weights)
        return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def network(kind: str, nodes: int) -> onnx.ModelProto:
    """A network of about `nodes` nodes; kind: one of KINDS."""
    b = Builder(nodes)
    parts = (b.residual, b.shuffled, b.gated, b.inverted, b.branches, b.dense)
    widths, stage = ((16, 24, 32, 24), 60) if kind == "narrow" else ((64, 128, 128, 192), -(-nodes // 4))
    x, stages, part = "x", 0, 0
    if kind == "tokens":
        x, widths, parts = b.tokens(b.block(x, 64)), (), (b.attention, b.perceptron)
    while len(b.nodes) < nodes - 20:
        if widths and len(b.nodes) >= stage * stages:
            x = b.block(x, widths[stages % len(widths)], 3)
            stages += 1
        x = parts[part % len(parts)](x)
        part += 1
    return b.model(x if widths else b.maps(x))


# --------------------------------------------------------------------------------------------------------- the clock


class Clock:
    """Seconds by step; `profile` sums up where they went."""

    def __init__(self, profile: cProfile.Profile | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self.profile = profile

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        if self.profile:
            self.profile.enable()
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start
        if self.profile:
            self.profile.disable()


def steps(path: Path, clock: Clock, macs: float) -> None:
    """Runs every step on one file."""
    with clock.step("load"):
        model = files.load(path)
    with clock.step("probe"):
        net = runtime.probe(model)
        net = net if net.static else runtime.probe_again(net)
    with clock.step("IR"):
        _ = net.nodes, net.order, net.fixed, net.uses
    with clock.step("symbols"):
        Symbols(net)
    with clock.step("group"):
        groups = group(net)
        require_prunable(groups)
    with clock.step("accounting"):
        accounting = Accounting(groups, wire.size(model))
    with clock.step("score"):
        saliency = calibrate(groups, PLAIN["l2"](), None, None)
    with clock.step("allocate"):
        able = {g.id: reweightable(groups, g) for g in groups.prunable}
        selector = Selector(groups.prunable, saliency, "top", rescalable=able)
        allocation = allocate(accounting, groups.prunable, selector, Budget("macs", macs))
        plan, _ = sample(groups.prunable, allocation.choices, selector, "")
    with clock.step("surgery"):
        pruned = surgery(groups, plan)
    with clock.step("mask"):
        masked = mask(groups, plan)
    with clock.step("validate"):
        found = validate(model, pruned, masked, [net.feeds])
    assert found.checker and found.runtime


def measure(paths: list[Path], repeats: int, macs: float, profile: cProfile.Profile | None) -> list[dict[str, float]]:
    """Median seconds by step for every file; the files take turns."""
    found: list[list[dict[str, float]]] = [[] for _ in paths]
    for _ in range(repeats):
        for path, runs in zip(paths, found, strict=True):
            gc.collect()
            clock = Clock(profile)
            steps(path, clock, macs)
            runs.append(clock.seconds)
    return [{name: statistics.median(r[name] for r in runs) for name in runs[0]} for runs in found]


def totals(row: dict[str, float]) -> dict[str, float]:
    """The row with its sums."""
    main = sum(v for k, v in row.items() if k not in (*CHECKS, *INSIDE))
    return row | {"analysis and surgery": main, "everything": main + sum(row[k] for k in CHECKS)}


# --------------------------------------------------------------------------------------------------------- the table


def table(counts: list[int], rows: list[dict[str, float]]) -> Iterator[str]:
    """Markdown: one line a step, one column a network; ratios are to the network nearest to `BASE` nodes."""
    base = min(range(len(counts)), key=lambda i: abs(counts[i] - BASE))
    yield f"| step | {' | '.join(f'{n} nodes' for n in counts)} | slope |"
    yield f"| --- | {'--- | ' * len(counts)}--- |"
    for step in rows[0]:
        seconds = [r[step] for r in rows]
        cells = [f"{s:.3f}" if i == base else f"{s:.3f} (x{s / seconds[base]:.2f})" for i, s in enumerate(seconds)]
        slope = f"{np.polyfit(np.log(counts), np.log(seconds), 1)[0]:.2f}" if len(rows) > 1 else "-"
        yield f"| {step} | {' | '.join(cells)} | {slope} |"


def report(title: str, paths: list[Path], args: argparse.Namespace) -> None:
    counts = [len(files.load(p).graph.node) for p in paths]
    profile = cProfile.Profile() if args.profile else None
    rows = [totals(r) for r in measure(paths, args.repeats, args.macs, profile)]
    print(f"\n{title}, seconds (median of {args.repeats})\n", *table(counts, rows), sep="\n", flush=True)
    if profile:
        pstats.Stats(profile).sort_stats("tottime").print_stats(40)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES, help="sizes of the made-up networks")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--model", type=Path, help="measure this file instead of made-up networks")
    parser.add_argument("--macs", type=float, default=0.7, help="share of the MACs to keep")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="say in which functions the time went; distorts the times")
    args = parser.parse_args()
    if args.model:
        report(args.model.name, [args.model], args)
        return
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / f"{kind}{n}.onnx" for n in args.nodes]
            for path, n in zip(paths, args.nodes, strict=True):
                files.save(network(kind, n), path)
            report(kind, paths, args)


if __name__ == "__main__":
    main()
