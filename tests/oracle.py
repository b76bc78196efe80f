"""The oracle: cutting channels must compute what silencing them computes, on any graph, without labels or data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxprune import runtime
from onnxprune.control import bodies, every_graph, flatten, key
from onnxprune.graph import Network
from onnxprune.groups import Groups
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, reweightable, surgery
from onnxprune.plan import Kept, Plan

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
TOLERANCE = 1e-4
THREADS = 1


@dataclass(frozen=True, eq=False)
class Verdict:
    """What a check went by: the pruned model, and its largest error over all outputs, relative to the output's range."""

    pruned: onnx.ModelProto
    error: float


def check(
    model: onnx.ModelProto, feeds: Feeds, plan: Plan, groups: Groups | None = None, tolerance: float = TOLERANCE
) -> Verdict:
    """Asserts that `plan`, applied to `model`, gives a valid, smaller model that computes what the masked one computes.

    groups: when the model has been analysed already, perhaps on other feeds. tolerance: relative to the output's range.
    """
    groups = group(runtime.probe(model, feeds)) if groups is None else groups
    before = model.SerializeToString(deterministic=True)
    pruned, masked = surgery(groups, plan), mask(groups, plan)
    assert model.SerializeToString(deterministic=True) == before, "the input model was changed"
    accepted(pruned)
    error = compare(model, masked, pruned, feeds, tolerance)
    if any(len(k.indices) < k.size for k in plan.groups.values()):
        assert used(pruned) < used(model), "channels were removed, but no weight got smaller"
    return Verdict(pruned, error)


def compare(
    original: onnx.ModelProto, masked: onnx.ModelProto, pruned: onnx.ModelProto, feeds: Feeds, tolerance: float = TOLERANCE
) -> float:
    """Asserts that the pruned model's outputs are the masked one's; returns the largest relative error."""
    names = [o.name for o in original.graph.output]
    assert [o.name for o in pruned.graph.output] == names
    want, scale = _run(masked, feeds, False), _run(original, feeds, False)
    worst = 0.0
    for optimise in (False, True):
        for name, a, b, c in zip(names, want, _run(pruned, feeds, optimise), scale, strict=True):
            where = f"output '{name}' (optimisations {'on' if optimise else 'off'})"
            assert (b.shape, b.dtype) == (a.shape, a.dtype) == (c.shape, c.dtype), f"{where} has another shape or type"
            worst = max(worst, error := difference(a, b, c))
            assert error <= tolerance, f"{where} is off by {error:.3g} of its range"
    return worst


def difference(want: Array, got: Array, original: Array) -> float:
    """max |got - want| in units of the larger of max |want| and max |original|; infinite where only one is finite."""
    if want.size == 0:
        return 0.0
    if want.dtype.kind != "f":
        return 0.0 if np.array_equal(want, got) else float("inf")
    finite = np.isfinite(want)
    if not np.array_equal(finite, np.isfinite(got)):
        return float("inf")
    largest = max(float(np.abs(a[np.isfinite(a)]).max(initial=0)) for a in (want, original))
    worst = float(np.abs(np.where(finite, got, 0) - np.where(finite, want, 0)).max())
    return worst / largest if largest else worst


def accepted(model: onnx.ModelProto) -> None:
    """Asserts that the ONNX checker accepts the model, shape inference included; node order aside, which ORT mends."""
    onnx.checker.check_model(in_order(model), full_check=True)


def in_order(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with its nodes in topological order."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(model.graph.node[i] for i in Network(model, {}, {}).order)
    return copy


def used(model: onnx.ModelProto) -> int:
    """Elements of floating-point and 8-bit constants, in bodies too, once for every use: surgery may un-share a vector."""
    nodes = [n for g in every_graph(model.graph) for n in g.node if bodies(n)]
    net = Network(flatten(model, {key(n) for n in nodes}), {}, {})
    wanted = [name for name, kind in net.kinds.items() if kind.kind == "f" or kind.itemsize == 1]
    sizes = {name: int(np.prod(net.initializers[name].dims)) for name in wanted}
    return sum(sizes[name] * len(net.uses.get(name, ())) for name in sizes)


def _run(model: onnx.ModelProto, feeds: Feeds, optimise: bool) -> list[Array]:
    return runtime.run(runtime.session(model, threads=THREADS, optimise=optimise), feeds)


# ---- plans


def keep(groups: Groups, fractions: Mapping[str, float] | float, rng: np.random.Generator, scaled: bool = False) -> Plan:
    """A plan that keeps a random subset, at least one channel, of every group that can be pruned.

    fractions: the part to keep, one for all or by group id. scaled: reweights the survivors where that is possible.
    """
    chosen = {}
    for g in groups.prunable:
        fraction = fractions if isinstance(fractions, float) else fractions.get(g.id, 1.0)
        count = min(g.size, max(1, round(g.size * fraction)))
        indices = np.sort(rng.choice(g.size, count, replace=False)).astype(np.int64)
        scale = rng.uniform(0.5, 2.0, count) if scaled and reweightable(groups, g) else None
        chosen[g.id] = Kept(g.size, indices, scale)
    return Plan(chosen)


def only(groups: Groups, kept: Mapping[str, Sequence[int]]) -> Plan:
    """A plan that keeps exactly these channels of these groups."""
    return Plan({name: Kept(groups.by_id[name].size, np.array(list(i), np.int64)) for name, i in kept.items()})
