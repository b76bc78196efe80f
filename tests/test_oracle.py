"""Cutting equals masking, on random networks with random plans; and the oracle itself notices what it should."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import nets
import numpy as np
import onnx
import oracle
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from strategies import BLOCKS, Case, networks

from onnxprune import runtime
from onnxprune.errors import PlanError
from onnxprune.groups import Groups
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, surgery
from onnxprune.plan import Kept, Plan

SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]
KINDS = ["random", "random", "one channel", "all but one", "one group", "scaled"]
plans = st.tuples(st.sampled_from(KINDS), st.integers(0, 2**16))


def profile(examples: int) -> settings:
    return settings(
        max_examples=examples, deadline=None, derandomize=True, print_blob=True, database=None, suppress_health_check=SLOW
    )


def analysed(case: Case) -> Groups:
    return group(runtime.probe(case.model, case.probe))


def planned(groups: Groups, style: tuple[str, int]) -> Plan:
    """A plan of one of the kinds: how much of each group goes, and whether the survivors are reweighted."""
    kind, seed = style
    rng = np.random.default_rng(seed)
    part = {g.id: float(rng.uniform(0.1, 1.0)) for g in groups.prunable}
    if kind == "one channel":
        part = dict.fromkeys(part, 0.0)
    elif kind == "all but one":
        part = {g.id: 1 - 1 / g.size for g in groups.prunable}
    elif kind == "one group" and part:
        part = {str(rng.choice(list(part))): 0.5}
    return oracle.keep(groups, part, rng, scaled=kind == "scaled")


# ---- the property, over some 600 networks


def prune_and_compare(
    networks: st.SearchStrategy[Case], plans: st.SearchStrategy[tuple[str, int]], examples: int
) -> Counter[str]:
    """Checks the property on `examples` networks with a plan each; returns how often it said something."""
    seen: Counter[str] = Counter()

    @profile(examples)
    @given(networks, plans)
    def run(case: Case, style: tuple[str, int]) -> None:
        oracle.accepted(case.model)
        groups = analysed(case)
        plan = planned(groups, style)
        for feeds in case.feeds:
            oracle.check(case.model, feeds, plan, groups)
        seen["networks"] += 1
        seen["prunable"] += bool(groups.prunable)
        seen["cut"] += any(len(k.indices) < k.size for k in plan.groups.values())
        seen["scaled"] += any(k.scale is not None for k in plan.groups.values())

    run()
    return seen


@pytest.mark.parametrize("opsets", [range(9, 13), range(13, 18), range(18, 23)], ids=str)
def test_cutting_equals_masking(opsets: Sequence[int]) -> None:
    seen = prune_and_compare(networks(opsets), plans, 70)
    # The property would hold, and say nothing, on networks in which everything is frozen.
    assert seen["networks"] >= 70
    assert seen["prunable"] >= 0.6 * seen["networks"]
    assert seen["cut"] >= 0.5 * seen["networks"]


def test_cutting_equals_masking_when_survivors_are_reweighted() -> None:
    seen = prune_and_compare(networks(), st.tuples(st.just("scaled"), st.integers(0, 2**16)), 40)
    assert seen["scaled"] >= 0.5 * seen["networks"]


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_cutting_equals_masking_around(block: str) -> None:
    seen = prune_and_compare(networks(most=2, block=block), plans, 12)
    assert seen["networks"] >= 12
    assert seen["cut"] >= 2


@profile(20)
@given(networks(), plans)
def test_a_pruned_network_can_be_pruned_again(case: Case, style: tuple[str, int]) -> None:
    groups = analysed(case)
    once = oracle.check(case.model, case.probe, planned(groups, style), groups).pruned
    again = group(runtime.probe(once, case.probe))
    oracle.check(once, case.probe, planned(again, style), again)


@profile(30)
@given(networks())
def test_an_empty_plan_changes_no_byte(case: Case) -> None:
    groups = analysed(case)
    whole = Plan({g.id: Kept(g.size, np.arange(g.size)) for g in groups.groups})
    assert whole.empty
    for plan in (Plan(), whole):
        assert surgery(groups, plan).SerializeToString() == case.model.SerializeToString()
        assert mask(groups, plan).SerializeToString() == case.model.SerializeToString()


@profile(30)
@given(networks(), plans)
def test_a_plan_gives_the_same_bytes_again_and_through_json(case: Case, style: tuple[str, int]) -> None:
    groups = analysed(case)
    plan = planned(groups, style)
    first = surgery(groups, plan).SerializeToString(deterministic=True)
    fresh = group(runtime.probe(case.model, case.probe))
    assert surgery(fresh, plan).SerializeToString(deterministic=True) == first
    read = Plan.from_json(plan.to_json())
    assert read.to_json() == plan.to_json()
    assert surgery(fresh, read).SerializeToString(deterministic=True) == first


@profile(30)
@given(networks())
def test_the_groups_of_a_network_cover_every_coupled_axis_once(case: Case) -> None:
    groups = analysed(case)
    covered: dict[object, list[int]] = {}
    for g in groups.groups:
        for slot in g.slots:
            covered.setdefault(slot.dim, []).extend(slot.positions.tolist())
            assert len(slot.positions) == len(slot.channels)
            # Every channel takes as many positions of an axis as any other: the unit that is counted and cut.
            assert len(set(np.bincount(slot.channels, minlength=g.size).tolist())) == 1
    for dim, positions in covered.items():
        assert sorted(positions) == list(range(groups.full(dim)))
    assert len({g.id for g in groups.groups}) == len(groups.groups)


# ---- the oracle notices


def fixed() -> tuple[onnx.ModelProto, Groups, dict[str, np.ndarray]]:
    rng = np.random.default_rng(5)
    model = onnx.shape_inference.infer_shapes(nets.convnet(rng))
    feeds = {"in": rng.standard_normal((2, 3, 6, 6)).astype(np.float32)}
    return model, group(runtime.probe(model)), feeds


def test_another_channel_than_the_masked_one_is_detected() -> None:
    model, groups, feeds = fixed()
    for name, size in (("c1", 8), ("c2", 6)):
        for gone in range(size):
            masked = mask(groups, oracle.only(groups, {name: [i for i in range(size) if i != gone]}))
            for other in range(size):
                pruned = surgery(groups, oracle.only(groups, {name: [i for i in range(size) if i != other]}))
                if gone == other:
                    assert oracle.compare(model, masked, pruned, feeds) < oracle.TOLERANCE
                else:
                    with pytest.raises(AssertionError, match=r"output 'out' .* is off by"):
                        oracle.compare(model, masked, pruned, feeds)


@pytest.mark.parametrize("weight", ["b1", "shift", "mean", "w2", "w3", "b3"])
def test_a_wrong_weight_in_the_pruned_model_is_detected(weight: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups, feeds = fixed()
    plan = oracle.only(groups, {"c1": [0, 2, 3, 5, 7], "c2": [1, 2, 4]})
    oracle.check(model, feeds, plan, groups)

    def wrong(groups: Groups, plan: Plan) -> onnx.ModelProto:
        pruned = surgery(groups, plan)
        proto = next(t for t in pruned.graph.initializer if t.name == weight)
        value = numpy_helper.to_array(proto).copy()
        value[0] += 0.5
        proto.CopyFrom(numpy_helper.from_array(value, weight))
        return pruned

    monkeypatch.setattr(oracle, "surgery", wrong)
    with pytest.raises(AssertionError, match="is off by"):
        oracle.check(model, feeds, plan, groups)


def test_a_model_that_is_only_masked_is_not_called_pruned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, groups, feeds = fixed()
    monkeypatch.setattr(oracle, "surgery", mask)
    with pytest.raises(AssertionError, match="no weight got smaller"):
        oracle.check(model, feeds, oracle.only(groups, {"c1": [0, 1]}), groups)


def test_a_scale_on_the_wrong_channels_is_detected() -> None:
    model, groups, feeds = fixed()
    kept, scale = np.array([1, 4, 6]), np.array([0.5, 1.5, 2.5])
    masked = mask(groups, Plan({"c1": Kept(8, kept, scale)}))
    assert oracle.compare(model, masked, surgery(groups, Plan({"c1": Kept(8, kept, scale)})), feeds) < oracle.TOLERANCE
    with pytest.raises(AssertionError, match="is off by"):
        oracle.compare(model, masked, surgery(groups, Plan({"c1": Kept(8, kept, scale[::-1])})), feeds)


@pytest.mark.parametrize(
    ("want", "got", "error"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0.0),
        ([1.0, -4.0], [1.0, -3.0], 0.125),  # in units of the original's 8
        ([1.0, 2.0], [1.0, np.nan], np.inf),
        ([1.0, np.inf], [1.0, 2.0], np.inf),
        ([np.inf, 2.0], [np.inf, 2.0], 0.0),
    ],
)
def test_differences(want: list[float], got: list[float], error: float) -> None:
    assert oracle.difference(np.array(want), np.array(got), np.array([8.0, 0.0])) == error


def test_integer_outputs_must_be_equal() -> None:
    assert oracle.difference(np.array([3, 4]), np.array([3, 4]), np.array([9, 9])) == 0
    assert oracle.difference(np.array([3, 4]), np.array([3, 5]), np.array([9, 9])) == np.inf


# ---- plans that do not fit


@pytest.mark.parametrize(
    ("name", "kept", "words"),
    [
        ("nothing", Kept(8, np.array([0])), "which this model does not have"),
        ("c1", Kept(7, np.array([0])), "channels that it does not have"),
        ("c1", Kept(8, np.array([8])), "channels that it does not have"),
        ("c1", Kept(8, np.array([-1])), "channels that it does not have"),
        ("c1", Kept(8, np.array([], np.int64)), "must keep at least one channel"),
        ("c1", Kept(8, np.array([3, 1])), "in rising order"),
        ("c1", Kept(8, np.array([1, 1])), "each once"),
        ("out", Kept(5, np.array([0])), "is frozen: it is graph output 'out'"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(name: str, kept: Kept, words: str) -> None:
    _, groups, _ = fixed()
    for function in (surgery, mask):
        with pytest.raises(PlanError, match=words):
            function(groups, Plan({name: kept}))


def test_a_group_whose_consumer_shares_its_weight_cannot_be_reweighted() -> None:
    rng = np.random.default_rng(0)
    weights = {"w1": rng.standard_normal((4, 3, 1, 1)), "w2": rng.standard_normal((5, 4, 1, 1))}
    nodes = [("Conv", "in w1", "a"), ("Relu", "a", "b"), ("Conv", "a w2", "c"), ("Conv", "b w2", "d"), ("Add", "c d", "out")]
    groups = nets.grouped(nets.model(nodes, {"in": [1, 3, 4, 4]}, "out", weights))
    plan = Plan({"a": Kept(4, np.array([0, 2]), np.array([2.0, 2.0]))})
    with pytest.raises(PlanError, match="a consumer's weight has other uses"):
        surgery(groups, plan)
