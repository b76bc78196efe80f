"""`--latency` on a made-up machine: tables with staircases, predictions, the search for a target, what is kept on disk."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import small
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxprune
from onnxprune import cli, runtime, trials
from onnxprune.budget import Budget
from onnxprune.channels import Index
from onnxprune.errors import BudgetError
from onnxprune.groups import Accounting, Groups
from onnxprune.imported import load
from onnxprune.options import Options
from onnxprune.passes.allocate import allocate
from onnxprune.saliency import LayerScore, Saliency
from onnxprune.selection import Selector, Widths
from onnxprune.timing.costs import Costs, Fit, Priced, widths_of
from onnxprune.timing.layers import Spec, spec
from onnxprune.timing.meter import Meter
from onnxprune.timing.models import Feeds, Setting
from onnxprune.timing.rounds import Rounds
from onnxprune.timing.store import Store
from onnxprune.timing.tables import Table, agreed, measured
from onnxprune.trials import Latency, Machine

BLOCK = 16
PLAIN = Fit()


def blocks(n: int) -> int:
    return -(-n // BLOCK)


def staircase(inputs: int, outputs: int) -> float:
    """Seconds of a kernel that works on blocks of 16 channels in and out."""
    return 1e-6 * (3 + blocks(inputs) * blocks(outputs))


def wide(seed: int = 0) -> onnx.ModelProto:
    """x -> Conv 64 -> Conv 96 -> Conv 80 -> Gemm 10, with sizes that treads of 16 divide."""
    net = small.Net(seed)
    x = net.relu(net.conv("x", 64))
    x = net.relu(net.conv(x, 96))
    x = net.relu(net.conv(x, 80))
    return net.model(net.classify(x))


def deep(seed: int = 0) -> onnx.ModelProto:
    """Twelve convolutions of 64 channels: one step of one of them is less than five per cent of the time."""
    net = small.Net(seed)
    x = "x"
    for _ in range(12):
        x = net.relu(net.conv(x, 64))
    return net.model(net.classify(x))


class Fake:
    """A machine whose kernels take `staircase` for every convolution; whole networks take more, not in proportion."""

    setting = Setting(1)
    measured: ClassVar[list[tuple[int, int]]] = []
    key: ClassVar[dict[str, Any]] = {"processor": "made up", **Setting(1).to_json()}
    noise: ClassVar[Callable[[], float]] = staticmethod(lambda: 1.0)
    overhead = 1e-5

    def __init__(self, setting: Setting = setting) -> None:
        self.setting = setting

    def layer(self, one: Spec, inputs: int, outputs: int, limit: float) -> float:
        self.measured.append((inputs, outputs))
        return staircase(inputs, outputs) if one.op == "Conv" else 1e-9 * inputs * outputs

    def networks(self, models: Sequence[onnx.ModelProto], feeds: Feeds, limit: float) -> Rounds:
        return Rounds(np.array([[self.seconds(m) * self.noise() for m in models] for _ in range(15)]))

    def seconds(self, model: onnx.ModelProto) -> float:
        weights = [t.dims for t in model.graph.initializer if len(t.dims) == 4]
        kernels = sum(staircase(w[1], w[0]) for w in weights)
        return self.overhead + kernels + 0.3e-6 * max(0.0, kernels * 1e6 - 90)  # above 90 us the caches overflow


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[Fake]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trials, "Meter", Fake)
    monkeypatch.setattr(Fake, "measured", [])
    return Fake


# ---------------------------------------------------------------------------------------------------------------- tables


CONV = Spec("Conv", (), (1, 64, 8, 8), (96, 64, 3, 3), True, "float32", 17, "pair")


def test_a_table_knows_the_treads_and_what_lies_between_its_points() -> None:
    table = measured(replace(CONV, x=(1, 256, 8, 8), w=(320, 256, 3, 3)), lambda i, o, _: staircase(i, o))
    assert table.treads == (16, 16)
    assert (table.inputs[-1], table.outputs[-1]) == (256, 320)
    for i, o in ((1, 1), (16, 17), (33, 100), (250, 319), (256, 320)):
        assert table.at(i, o) == pytest.approx(staircase(i, o)), (i, o)  # bilinear, as staircase is, at the ends of treads


@pytest.mark.parametrize("tread", [1, 2, 4, 8, 16, 32])
def test_treads_of_any_width_are_found_despite_interruptions(tread: int) -> None:
    rng = np.random.default_rng(tread)

    def noisy(inputs: int, outputs: int, limit: float) -> float:
        slower = 1.5 if rng.random() < 0.02 else rng.uniform(1, 1 + 0.002 * tread)  # a step is 1.6 % of the time for each
        return float(slower * -(-inputs // tread) * tread * -(-outputs // tread) * tread)

    assert measured(CONV, noisy).treads == (tread, tread)


def test_widths_that_are_slower_than_wider_ones_cost_as_much_as_those() -> None:
    """As odd numbers of channels do, which a blocked layout does not take."""
    table = measured(CONV, lambda i, o, _: staircase(i, o) * (2.5 if i % 4 else 1))
    assert table.treads == (16, 16)
    assert table.at(33, 64) == table.at(48, 64)


def test_no_layer_is_faster_for_being_wider() -> None:
    rng = np.random.default_rng(0)
    table = measured(CONV, lambda i, o, _: staircase(i, o) * rng.uniform(1, 3))
    assert (np.diff(table.seconds, axis=0) >= 0).all() and (np.diff(table.seconds, axis=1) >= 0).all()


def test_a_depthwise_layer_has_one_axis() -> None:
    depthwise = measured(replace(CONV, w=(64, 1, 3, 3), by="channel"), lambda i, o, _: 1e-6 * blocks(i))
    assert depthwise.outputs == (64,) and depthwise.treads == (16, 1)
    assert depthwise.at(17, 17) == depthwise.at(32, 32) == pytest.approx(2e-6)


def test_layers_of_a_kind_agree_on_their_treads() -> None:
    def table(one: Spec, treads: tuple[int, int]) -> tuple[Spec, Table]:
        sizes = (one.inputs, one.outputs)
        return one, Table((1, sizes[0]), (1, sizes[1]), np.ones((2, 2)), treads)

    wider, narrow = replace(CONV, w=(256, 64, 3, 3)), replace(CONV, x=(1, 8, 8, 8), w=(64, 8, 3, 3))
    pointwise = replace(CONV, w=(96, 64, 1, 1))
    noisy = replace(CONV, w=(128, 64, 3, 3))
    given = [table(CONV, (16, 16)), table(wider, (16, 16)), table(noisy, (4, 1)), table(narrow, (2, 16))]
    found = agreed(dict([*given, table(pointwise, (8, 8))]))
    assert [found[s].treads for s in (CONV, wider, noisy, narrow)] == [(16, 16)] * 4
    assert found[pointwise].treads == (8, 8)  # another kernel


def test_tables_survive_json_and_nonsense_does_not_pass_for_one() -> None:
    table = measured(CONV, lambda i, o, _: staircase(i, o))
    again = Table.from_json(json.loads(json.dumps(table.to_json())))
    assert again.at(40, 40) == table.at(40, 40) and again.treads == table.treads
    good = table.to_json()
    for bad in ({}, good | {"inputs": [1]}, good | {"treads": [0, 1]}, good | {"outputs": good["outputs"][::-1]}):
        with pytest.raises((ValueError, KeyError, TypeError, IndexError)):
            Table.from_json(bad)


# ---------------------------------------------------------------------------------------------------------------- layers


def built(nodes: Callable[[small.Net], str]) -> tuple[Groups, list[Spec | None]]:
    net = small.Net()
    model = net.model(net.classify(nodes(net)))
    groups = load(model).groups
    return groups, [spec(groups.net, layer, groups.net.shapes) for layer in groups.layers]


def test_every_kind_of_layer_runs_at_any_width() -> None:
    def nodes(net: small.Net) -> str:
        x = net.relu(net.conv("x", 24, stride=2))
        return net.conv(net.conv(x, 24, groups=24), 12, groups=3)

    _, found = built(nodes)
    assert [s.by if s else None for s in found] == ["pair", "channel", None, "pair"]  # groups of several channels: no table
    products = [
        replace(CONV, op="MatMul", x=(2, 5, 20), w=(20, 12), bias=False),
        replace(CONV, op="ConvTranspose", x=(1, 20, 4, 4), w=(20, 12, 3, 3)),
    ]
    for one in [*(s for s in found if s), *products]:
        for i, o in ((one.inputs, one.outputs), (5, 7), (1, 1)):
            model, feeds = one.model(i, o)
            out = runtime.run(runtime.session(model), feeds)[0]
            wanted = i if one.by == "channel" else o
            assert out.shape[-1 if one.op in ("Gemm", "MatMul") else 1] == wanted


def test_the_key_of_a_spec_tells_layers_apart_but_not_their_names() -> None:
    _, found = built(lambda net: net.conv(net.conv(net.conv("x", 8), 8), 8))
    first, second, third, _ = (s.key if s else None for s in found)
    assert second == third != first


# ----------------------------------------------------------------------------------------------------------- predictions


def costs_of(model: onnx.ModelProto, fit: Fit = PLAIN) -> Costs:
    groups = load(model).groups
    priced = []
    for layer in groups.layers:
        one = spec(groups.net, layer, groups.net.shapes)
        assert one is not None
        priced.append(Priced(layer.x, layer.out, measured(one, partial(Fake().layer, one))))
    return Costs(groups, priced, (), fit)


def random_widths(costs: Costs, rng: np.random.Generator) -> Index:
    return widths_of(costs, {g.id: int(rng.integers(1, g.size + 1)) for g in costs.groups.prunable})


def test_a_running_account_is_the_sum_anew() -> None:
    costs = costs_of(wide(), Fit(1.1, 3e-5, 2e-5))
    rng = np.random.default_rng(0)
    tally = costs.tally(costs.full_widths)
    widths = costs.full_widths.copy()
    for _ in range(100):
        i = int(rng.choice([k for k, g in enumerate(costs.groups.groups) if not g.frozen]))
        widths[i] = rng.integers(1, costs.full_widths[i] + 1)
        assert tally.resize(i, int(widths[i])) == pytest.approx(costs.used(widths), abs=2)


def test_the_prediction_is_right_at_both_ends() -> None:
    costs = costs_of(wide())
    least = widths_of(costs, {g.id: 16 for g in costs.groups.prunable})
    sums = costs.tables(costs.full_widths), costs.tables(least)
    fitted = costs.fitted(sums[0] + 5e-5, sums[1] + 2e-5, least)
    assert fitted.used(fitted.full_widths) == pytest.approx(1e9 * (sums[0] + 5e-5), rel=1e-6)
    assert fitted.used(least) == pytest.approx(1e9 * (sums[1] + 2e-5), rel=1e-6)
    assert fitted.fit.constant >= 0 and fitted.fit.shrinking >= 0
    faster = costs.fitted(sums[0] / 2, sums[1] / 2, least)  # a network may be faster than its layers one by one
    assert faster.used(faster.full_widths) == pytest.approx(1e9 * sums[0] / 2, rel=1e-6)
    assert faster.ratio(least) < 1


def test_ladders_hold_the_widths_that_pay() -> None:
    costs = costs_of(wide())
    ladders = sorted(costs.ladder(g) for g in costs.groups.prunable)
    assert ladders == [(16, 32, 48, 64), (16, 32, 48, 64, 80), (16, 32, 48, 64, 80, 96)]


def test_layers_without_a_table_are_part_of_the_rest() -> None:
    groups = load(wide()).groups
    costs = Costs(groups, (), range(len(groups.layers))).fitted(1e-3, 2e-4, np.array([min(16, g.size) for g in groups.groups]))
    half = widths_of(costs, {g.id: g.size // 2 for g in groups.prunable})
    assert 0.2 < costs.ratio(half) < 0.5
    assert costs.ladder(groups.prunable[0]) == ()  # nothing is known of what pays: any width may


# ---------------------------------------------------------------------------------------------------------------- search


def prune(value: float, **options: Any) -> onnxprune.Result:
    return onnxprune.prune(deep(), budget={"latency": value}, method="l1", recover="none", **options)


@pytest.mark.parametrize("value", [0.9, 0.75, 0.6, 0.5])
def test_the_measured_latency_is_at_most_five_per_cent_under_what_was_asked_for(fake: type[Fake], value: float) -> None:
    result = prune(value)
    ratio = fake().seconds(result.model) / fake().seconds(deep())
    told = result.report["latency"]
    assert told["measured"]["median"] == pytest.approx(ratio)
    assert 0.95 * value <= ratio <= value
    assert told["asked"] == value and told["machine"] == fake.key
    assert result.report["budget"] == {"kind": "latency", "value": value}


def test_no_width_could_be_had_for_nothing(fake: type[Fake]) -> None:
    """What stays is at the end of its tread: a channel more would take time."""
    for value in (0.8, 0.6, 0.45):
        kept = [len(g["kept"]) for g in prune(value).report["groups"] if g["removed"]]
        assert kept and all(n % BLOCK == 0 for n in kept)


def test_alignment_and_minimum_hold_on_top_of_the_ladder(fake: type[Fake]) -> None:
    kept = [len(g["kept"]) for g in prune(0.6, align=32, min_channels=32).report["groups"] if g["removed"]]
    assert kept and all(n % 32 == 0 for n in kept)


@pytest.mark.parametrize("method", ["pfp", "pfp-random", "pfp-deterministic", "obs", "l2"])
def test_every_method_can_keep_a_budget_of_latency(fake: type[Fake], method: str) -> None:
    result = onnxprune.prune(deep(), small.images(48), budget={"latency": 0.6}, method=method, samples=24)
    assert 0.57 <= result.report["latency"]["measured"]["median"] <= 0.6
    assert result.report["latency"]["met"]


def test_a_network_without_tables_is_cut_by_its_multiply_adds(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a quantised one: the rest is all that there is, and the trials correct it."""
    monkeypatch.setattr(trials, "spec", lambda *_: None)
    told = prune(0.6).report["latency"]
    assert not fake.measured
    assert 0.55 <= told["measured"]["median"] <= 0.6  # all widths are cut alike, so that steps of this machine coincide


def test_out_of_reach_says_the_smallest(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake, "overhead", 1e-2)
    with pytest.raises(BudgetError, match=r"out of reach: the smallest network takes 0\.9\d\d") as caught:
        prune(0.5)
    assert "or more" in caught.value.hint
    with pytest.raises(BudgetError, match="between 0 and 1"):
        prune(1.5)


def test_noise_gives_the_same_file_again_and_no_layer_is_measured_twice(
    fake: type[Fake], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    monkeypatch.setattr(fake, "noise", staticmethod(lambda: float(rng.uniform(1, 1.02))))
    first = prune(0.6)
    assert fake.measured
    fake.measured.clear()
    second = prune(0.6)
    assert not fake.measured
    assert first.model.SerializeToString(deterministic=True) == second.model.SerializeToString(deterministic=True)
    assert first.report["latency"]["predicted"] == second.report["latency"]["predicted"]
    assert len(second.report["latency"]["trials"]) == 1


def test_a_confirmation_that_fails_leads_to_another_search(fake: type[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first confirmation finds the network much slower than the trials did: another one is looked for."""
    real, calls = Latency.confirm, []

    def confirm(self: Latency, plan: Any, pruned: onnx.ModelProto) -> bool:
        calls.append(plan)
        if len(calls) == 1:
            monkeypatch.setattr(fake, "overhead", fake.overhead * 10)  # the machine has changed since
        return real(self, plan, pruned)

    monkeypatch.setattr(Latency, "confirm", confirm)
    told = prune(0.5).report["latency"]
    assert len(calls) > 1
    assert told["met"] == (0.475 <= told["measured"]["median"] <= 0.525)
    assert len(told["trials"]) > 1


def test_the_plan_gives_the_same_file(fake: type[Fake], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small.write(deep(), tmp_path / "m.onnx")
    line = f"prune {tmp_path}/m.onnx --method l1 --latency 0.6 -o {tmp_path}/a.onnx --save-plan {tmp_path}/p.json"
    assert cli.main(line.split()) == 0
    assert cli.main(f"apply {tmp_path}/m.onnx {tmp_path}/p.json -o {tmp_path}/b.onnx -q".split()) == 0
    assert "of the original's (quartiles" in capsys.readouterr().out
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), value=st.floats(0.25, 0.95))
def test_predictions_within_the_target_and_nothing_more_fits(seed: int, value: float) -> None:
    """The allocation on a table: never above the target, and no group could take its next step."""
    costs, rng = COSTS, np.random.default_rng(seed)
    groups = costs.groups.prunable
    scores = tuple(LayerScore("l", g.id, rng.random(g.size)) for g in groups)
    widths = Widths(ladders={g.id: costs.ladder(g) for g in groups})
    saliency = Saliency("l1", "mean", 0, scores)
    selector = Selector(groups, saliency, "top", widths=widths)
    accounting = Accounting(costs.groups, 1)
    chosen = allocate(accounting, groups, selector, Budget("latency", value), costs=costs).choices
    kept = {name: len(c.indices) for name, c in chosen.items()}
    assert costs.ratio(widths_of(costs, kept)) <= value
    for g in groups:
        wider = widths.fit(kept[g.id] + 1, g)
        if wider > kept[g.id]:
            assert costs.ratio(widths_of(costs, kept | {g.id: wider})) > value


COSTS = costs_of(wide(), Fit(1.0, 5e-6, 5e-6))

# --------------------------------------------------------------------------------------------------------------- on disk


def test_the_store_keeps_what_is_put_and_forgives_everything(tmp_path: Path) -> None:
    store = Store({"cpu": "a"}, tmp_path)
    store.put("tables", "k", [1.5])
    store.save()
    other = Store({"cpu": "a"}, tmp_path)
    assert other.get("tables", "k") == [1.5]
    other.put("tables", "k2", 2)
    other.save()
    store.put("tables", "k3", 3)
    store.save()  # keeps what the other has written since
    assert [Store({"cpu": "a"}, tmp_path).get("tables", k) for k in ("k", "k2", "k3")] == [[1.5], 2, 3]
    assert Store({"cpu": "b"}, tmp_path).get("tables", "k") is None
    for text in ("", "{", "[]", '{"machine": {}}', json.dumps({"machine": store.machine, "tables": 3})):
        store.path.write_text(text)
        assert Store({"cpu": "a"}, tmp_path).get("tables", "k") is None
    blocked = tmp_path / "file"
    blocked.write_text("")
    Store({"cpu": "a"}, blocked / "below").save()  # nowhere to write: nothing is kept, nothing fails
    assert not (blocked / "below").exists()


def test_a_broken_table_is_measured_again(fake: type[Fake]) -> None:
    prune(0.6)
    machine = Machine.of(load(deep()), Options())
    stored = json.loads(machine.store.path.read_text())
    for key in stored["tables"]:
        stored["tables"][key] = {"inputs": "nonsense"}
    machine.store.path.write_text(json.dumps(stored))
    fake.measured.clear()
    prune(0.6)
    assert fake.measured


# -------------------------------------------------------------------------------------------------------- the real thing


def test_a_real_layer_and_real_networks_take_time() -> None:
    meter = Meter(Setting.of(1))
    assert meter.layer(CONV, 64, 96, 0.01) > 0
    feeds = {"x": small.images(1)}
    rounds = meter.networks([small.chain(), small.chain()], feeds, 0.01)
    assert (rounds.seconds > 0).all()
    assert meter.key["onnxruntime"] and meter.key["threads"] == 1


def test_a_real_pruning_to_a_latency_ends_well_or_says_why_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("TRIAL_SECONDS", "CONFIRM_SECONDS"):
        monkeypatch.setattr(trials, name, 0.2)
    small.write(wide(), tmp_path / "m.onnx")
    code = cli.main(f"prune {tmp_path}/m.onnx --method l1 --latency 0.7 --threads 1 -o {tmp_path}/o.onnx".split())
    told = capsys.readouterr()
    if code == 2:  # a busy machine may find no network within the budget
        assert "--latency 0.7" in told.err.splitlines()[-1]
        return
    assert code == 0
    report = json.loads((tmp_path / "o.onnx.report.json").read_text())
    assert {"asked", "predicted", "measured", "seconds", "machine", "trials"} <= set(report["latency"])
    assert "latency" in told.out
