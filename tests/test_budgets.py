"""Budgets are met: never exceeded, nothing left that would still fit, a larger one never smaller; alignment never adds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import onnx
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import onnxprune
from onnxprune.budget import Budget
from onnxprune.errors import BudgetError, OptionError
from onnxprune.finish import Finisher
from onnxprune.graph import Network
from onnxprune.imported import Imported, load
from onnxprune.options import Options
from onnxprune.passes.allocate import allocate
from onnxprune.passes.surgery import reweightable
from onnxprune.saliency import LayerScore, Saliency
from onnxprune.selection import Choice, Method, Selector, Widths
from onnxprune.targets import widths as target_widths

METHODS: tuple[Method, ...] = ("pfp", "pfp-random", "pfp-deterministic", "top", "elimination")
KINDS = ("macs", "params", "bytes")


@cache
def net(name: str) -> Imported:
    if name == "fine":  # one channel of any group is less than half a per cent of anything
        b = small.Net()
        x = b.block(b.block("x", 40), 56, stride=2)
        return load(b.model(b.classify(b.relu(b.add(x, b.norm(b.conv(b.block(b.block(x, 64), 64), 56)))))))
    return load(small.NETS[name]())


def selector(imported: Imported, method: Method, seed: int, widths: Widths) -> Selector:
    rng = np.random.default_rng(seed)
    groups = imported.groups.prunable
    scores = tuple(LayerScore("l", g.id, rng.random(g.size) ** 3, 100) for g in groups)
    able = {g.id: reweightable(imported.groups, g) for g in groups}
    return Selector(groups, Saliency("made up", "mean", 1, scores), method, widths=widths, rescalable=able, seed=seed)


def chosen(
    imported: Imported,
    method: Method,
    seed: int,
    budget: Budget,
    widths: Widths = Widths(),  # noqa: B008
) -> Mapping[str, Choice]:
    return allocate(imported.accounting, imported.groups.prunable, selector(imported, method, seed, widths), budget).choices


def used(imported: Imported, widths: Mapping[str, int], kind: str) -> float:
    """The fraction of the original that these widths leave."""
    full = imported.accounting.full_widths.copy()
    for name, n in widths.items():
        full[imported.accounting.column[name]] = n
    return float(getattr(imported.accounting.size(full), kind) / getattr(imported.size, kind))


budgets = st.floats(0.15, 0.97)
cases = {
    "name": st.sampled_from([*small.NETS, "fine"]),
    "method": st.sampled_from(METHODS),
    "kind": st.sampled_from(KINDS),
    "seed": st.integers(0, 10**6),
}


@settings(max_examples=120, deadline=None)
@given(value=budgets, align=st.sampled_from([1, 1, 2, 4]), minimum=st.sampled_from([1, 1, 3, 6]), **cases)
def test_never_exceeded_and_nothing_more_would_fit(
    name: str, method: Method, kind: str, seed: int, value: float, align: int, minimum: int
) -> None:
    imported, widths = net(name), Widths(minimum, align)
    try:
        found = chosen(imported, method, seed, Budget(kind, value), widths)  # type: ignore[arg-type]
    except BudgetError:
        least = {g.id: widths.smallest(g) for g in imported.groups.prunable}
        assert used(imported, least, kind) > value
        return
    kept = {g: len(c.indices) for g, c in found.items()}
    assert used(imported, kept, kind) <= value
    for group in imported.groups.prunable:
        n = kept[group.id]
        assert n == group.size or (n % align == 0 and n >= min(minimum, group.size))
        if (wider := widths.fit(n + 1, group)) > n:
            assert used(imported, kept | {group.id: wider}, kind) > value


@settings(max_examples=60, deadline=None)
@given(method=cases["method"], kind=cases["kind"], seed=cases["seed"], value=budgets)
def test_met_within_one_per_cent_where_single_channels_are_less(method: Method, kind: str, seed: int, value: float) -> None:
    imported = net("fine")
    kept = {g: len(c.indices) for g, c in chosen(imported, method, seed, Budget(kind, value)).items()}  # type: ignore[arg-type]
    assert 0.99 * value <= used(imported, kept, kind) <= value


@settings(max_examples=80, deadline=None)
@given(values=st.tuples(budgets, budgets), **cases)
def test_a_larger_budget_is_never_used_less(
    name: str, method: Method, kind: str, seed: int, values: tuple[float, float]
) -> None:
    imported = net(name)
    sizes = []
    for value in sorted(values):
        try:
            found = chosen(imported, method, seed, Budget(kind, value))  # type: ignore[arg-type]
        except BudgetError:
            sizes.append(0.0)
            continue
        sizes.append(used(imported, {g: len(c.indices) for g, c in found.items()}, kind))
    assert sizes == sorted(sizes)


@settings(max_examples=60, deadline=None)
@given(
    align=st.integers(1, 40), seed=st.integers(0, 10**6), value=st.floats(0.3, 0.95), name=cases["name"], method=cases["method"]
)
def test_alignment_never_makes_a_layer_larger(align: int, seed: int, value: float, name: str, method: Method) -> None:
    imported = net(name)
    try:
        found = chosen(imported, method, seed, Budget("macs", value), Widths(1, align))
    except BudgetError:
        return
    for group in imported.groups.prunable:
        n = len(found[group.id].indices)
        assert n <= group.size
        assert n == group.size or n % align == 0


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 64), align=st.integers(1, 24), minimum=st.integers(1, 24), data=st.data())
def test_widths_that_fit_are_the_nearest_allowed_ones(n: int, align: int, minimum: int, data: st.DataObject) -> None:
    group = next(g for g in net("fine").groups.prunable if g.size == 64)
    rungs = data.draw(st.none() | st.sets(st.integers(1, 63), max_size=6))
    ladder = {} if rungs is None else {group.id: (*sorted(rungs), 64)}
    widths = Widths(minimum, align, ladder)
    steps = range(1, 65) if rungs is None else ladder[group.id]
    allowed = sorted({min(64, -(-w // align) * align) for w in steps if -(-w // align) * align >= minimum or w == 64} | {64})
    assert widths.fit(n, group) == min(w for w in allowed if w >= min(n, 64))
    assert widths.smallest(group) == allowed[0]
    below = [w for w in allowed if w < n]
    assert widths.narrower(n, group) == (below[-1] if below else None)


def test_what_recovery_splits_comes_off_a_budget_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery that stores a shared vector twice adds numbers: then fewer channels are kept."""
    real = Finisher.__call__

    def wordy(self: Finisher, *arguments: object, **options: bool) -> object:
        finished = real(self, *arguments, **options)  # type: ignore[arg-type]
        more = numpy_helper.from_array(np.zeros(40, np.float32), "more")
        finished.model.graph.initializer.append(more)
        finished.model.graph.node.append(onnx.helper.make_node("Identity", ["more"], ["unused"]))
        return finished

    monkeypatch.setattr(Finisher, "__call__", wordy)
    whole = small.count_params(small.chain())
    result = onnxprune.prune(small.chain(), budget={"params": 0.5}, method="l1", recover="none")
    assert "more" in [t.name for t in result.model.graph.initializer]
    left = small.count_params(result.model)
    assert 0.47 * whole <= left <= 0.5 * whole
    assert result.report["pruned"]["params"] == left


@pytest.mark.parametrize(
    ("target", "model", "align"),
    [
        ("generic", "float", 1),
        ("onnxruntime-cpu", "float", 16),
        ("onnxruntime-cuda", "float", 8),
        ("tensorrt", "float", 8),
        ("generic", "int8", 1),
        ("onnxruntime-cuda", "int8", 16),
        ("tensorrt", "int8", 32),
    ],
)
def test_a_target_sets_the_alignment_and_align_overrides_it(target: str, model: str, align: int) -> None:
    imported = net("fine")
    if model == "int8":
        quantised = onnx.ModelProto()
        quantised.CopyFrom(imported.groups.net.model)
        quantised.graph.node.append(onnx.helper.make_node("DequantizeLinear", ["q", "s"], ["d"]))
        source = Network(quantised, {}, {})
    else:
        source = imported.groups.net
    assert target_widths(Options(target=target), source) == Widths(1, align)
    assert target_widths(Options(target=target, align=5, min_channels=7), source) == Widths(7, 5)


def test_what_is_cut_for_a_target_has_its_widths() -> None:
    result = onnxprune.prune(small.chain(), budget={"macs": 0.7}, method="l1", recover="none", target="onnxruntime-cuda")
    kept = [len(g["kept"]) for g in result.report["groups"] if g["removed"]]
    assert kept and all(n % 8 == 0 for n in kept)
    assert result.report["target"] == {"name": "onnxruntime-cuda", "align": 8}
    with pytest.raises(OptionError, match="unknown target 'toaster'") as caught:
        onnxprune.prune(small.chain(), budget={"macs": 0.7}, method="l1", target="toaster")
    assert "onnxruntime-cpu" in caught.value.hint
