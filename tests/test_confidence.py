"""Statements from held-out samples: exact limits, what a choice costs, and how often they fail in simulations."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binom

import onnxprune
from onnxprune import confidence
from onnxprune.certificate.population import LEVELS, Observed, Watch, population
from onnxprune.data import ImageOptions
from onnxprune.errors import OptionError
from onnxprune.report import sentences

spec = importlib.util.spec_from_file_location(
    "simulate_certificates", Path(__file__).resolve().parent.parent / "tools" / "simulate_certificates.py"
)
assert spec and spec.loader
simulate: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = simulate
spec.loader.exec_module(simulate)

counts = st.integers(1, 3000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
deltas = st.floats(1e-6, 0.5)
TRIALS = 2000


@given(counts, deltas)
def test_limits_are_where_the_binomial_tails_are_delta(seen: tuple[int, int], delta: float) -> None:
    k, n = seen
    above, below = confidence.upper(k, n, delta), confidence.lower(k, n, delta)
    assert 0 <= below <= k / n <= above <= 1
    assert binom.cdf(k, n, above) == pytest.approx(delta, rel=1e-6) or k == n
    assert binom.sf(k - 1, n, below) == pytest.approx(delta, rel=1e-6) or k == 0
    assert (above == 1) == (k == n) and (below == 0) == (k == 0)


def test_limits_known_from_elsewhere() -> None:
    assert confidence.upper(0, 100, 0.05) == pytest.approx(1 - 0.05 ** (1 / 100))  # the rule of three, exactly
    assert confidence.lower(100, 100, 0.05) == pytest.approx(0.05 ** (1 / 100))
    assert confidence.upper(0, 0, 0.1) == 1.0 and confidence.lower(0, 0, 0.1) == 0.0
    assert confidence.enough(0.05, 0.05) == 59 and confidence.enough(0.5, 0.5) == 1  # Wilks: 59 samples for 95 % and 95 %
    assert confidence.drop(5, 3, 1000, 0.01) == pytest.approx(
        confidence.upper(5, 1000, 0.005) - confidence.lower(3, 1000, 0.005)
    )


@example(123, 0.5, 0.5)
@given(st.integers(1, 2000), st.floats(0.005, 0.9), deltas)
def test_rank_is_the_smallest_that_suffices(n: int, alpha: float, delta: float) -> None:
    r, q = confidence.rank(n, alpha, delta), 1 - alpha
    assert (r is None) == (n < confidence.enough(alpha, delta))
    if r is not None:
        assert 1 <= r <= n and binom.sf(r - 1, n, q) <= delta * (1 + 1e-9)
        assert r == 1 or binom.sf(r - 2, n, q) > delta * (1 - 1e-9)  # a tie, rounded otherwise, may cost one more


def test_enough_samples_and_one_fewer() -> None:
    for alpha, delta in ((0.1, 0.01), (0.01, 0.0025), (0.3, 0.2)):
        n = confidence.enough(alpha, delta)
        values = np.arange(n)
        assert confidence.beyond(values, alpha, delta) == n - 1 and confidence.beyond(values[1:], alpha, delta) is None
        assert confidence.upper(0, n, delta) <= alpha < confidence.upper(0, n - 1, delta)


@pytest.mark.parametrize(
    "call",
    [
        lambda: confidence.upper(3, 2, 0.1),
        lambda: confidence.lower(-1, 2, 0.1),
        lambda: confidence.upper(1, 2, 0.0),
        lambda: confidence.rank(5, 1.0, 0.1),
        lambda: confidence.enough(0.1, 1.0),
        lambda: confidence.shared(0.1, 0),
    ],
)
def test_nonsense_is_refused(call: Any) -> None:
    with pytest.raises(OptionError):
        call()


def test_a_fixed_sequence_stops_at_the_first_failure() -> None:
    asked = []

    def passes(item: int) -> bool:
        asked.append(item)
        return item < 3 or item == 4

    assert confidence.fixed_sequence(range(10), passes) == (2, 4) and asked == [0, 1, 2, 3]
    assert confidence.fixed_sequence([5], passes) == (None, 1) and confidence.fixed_sequence([], passes) == (None, 0)


# ----------------------------------------------------------------------------------------------- the part `population`


def test_statements_share_delta_and_pay_for_a_choice() -> None:
    seen = Observed(1000, 40, 30, 5, tuple(np.linspace(0, 1, 1000)))
    one, five = population(seen, 0.04), population(seen, 0.04, candidates=5)
    assert [s["kind"] for s in one["statements"]] == ["top1_changes", "top1_drop", "relative_l2", "relative_l2"]
    assert all(s["delta"] == pytest.approx(0.01) for s in one["statements"]) and not one["vacuous"]
    assert all(s["delta"] == pytest.approx(0.002) for s in five["statements"]) and five["candidates"] == 5
    for cheap, dear, key in zip(one["statements"], five["statements"], ("alpha", "drop", "x", "x"), strict=True):
        assert dear[key] > cheap[key]
    assert one["statements"][0]["alpha"] == pytest.approx(confidence.upper(40, 1000, 0.01), rel=1e-5)
    assert one["statements"][0]["alpha"] >= confidence.upper(40, 1000, 0.01)  # rounded up
    assert [s["alpha"] for s in one["statements"][2:]] == list(LEVELS)


def test_too_few_samples_say_how_many_are_needed() -> None:
    part = population(Observed(30, 0, None, None, tuple(np.zeros(30))), 0.03)
    first, tenth, hundredth = part["statements"]
    assert first["alpha"] < 0.15 and not first["vacuous"] and not part["vacuous"]
    assert tenth["x"] is None and tenth["vacuous"] and tenth["samples_needed"] == confidence.enough(0.1, 0.01) == 44
    assert hundredth["samples_needed"] == 459
    nothing = population(Observed(), 0.01)
    assert not nothing["applies"] and nothing["vacuous"] and "44 would be enough" in nothing["reason"]
    everything = population(Observed(20, 20, 20, 0, None), 0.01)
    assert everything["vacuous"] and [s["alpha"] for s in everything["statements"][:1]] == [1.0]


def test_watch_counts_sample_by_sample() -> None:
    watch = Watch()
    before = np.array([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]], np.float32)
    after = np.array([[3.0, 4.5], [np.inf, 0.0], [0.0, 0.0], [0.0, 1.0]], np.float32)
    watch.add([before[:2], np.array([1, 2])], [after[:2], np.array([1, 3])], 2)
    watch.add([before[2:]], [after[2:]], 2)
    watch.vote(np.array([0, 1]), np.array([0, 0]), np.array([0, 1]))
    watch.vote(np.array([1, 1]), np.array([0, 1]), np.array([0, 0]))
    seen = watch.observed
    assert (seen.samples, seen.changed, seen.lost, seen.gained) == (4, 2, 1, 1)
    assert seen.moved is not None and seen.moved[0] == pytest.approx(0.1) and seen.moved[1:] == (np.inf, 0.0, np.inf)


def test_outputs_without_a_row_per_sample_have_no_distances() -> None:
    watch = Watch()
    watch.add([np.zeros((3, 2), np.float32)], [np.zeros((3, 2), np.float32)], 2)
    watch.add([np.zeros((2, 2), np.float32)], [np.zeros((2, 2), np.float32)], 2)
    assert watch.observed == Observed(4)
    assert "neither class scores" in population(watch.observed, 0.1)["reason"]
    single = Watch()
    single.add([np.full((5, 3), 2.0)], [np.full((5, 3), 1.0)], 1)  # one sample: all of it is its output
    assert single.observed.moved == (0.5,)


# -------------------------------------------------------------------------------------------------------- simulations


def test_population_statements_fail_no_more_often_than_they_say() -> None:
    rates = simulate.people(TRIALS)
    assert [str(r) for r in rates if not r.good] == []
    assert sum(r.control for r in rates) == 4 and all(r.trials == TRIALS for r in rates)
    assert any(r.failures > 0.3 * r.limit * r.trials for r in rates if not r.control)  # and are not always true either


def narrow(rng: np.random.Generator) -> Any:
    return simulate.sparse(rng, 200)


def test_the_sampling_theorem_fails_no_more_often_than_it_says() -> None:
    rate = simulate.sampling_rate("sparse", narrow, TRIALS)
    assert rate.good and rate.trials == TRIALS and rate.limit == 0.1


@pytest.mark.parametrize(
    ("source", "broken"), [("sparse", {"fewer": 32.0}), ("flat", {"reweight": False}), ("skewed", {"uniform": True})]
)
def test_broken_sampling_is_found_out(source: str, broken: dict[str, Any]) -> None:
    make = getattr(simulate, source)
    assert simulate.sampling_rate("control", make, 300, control=True, **broken).good
    assert simulate.sampling_rate("control", make, 300).good


@pytest.mark.parametrize("method", ["pfp-deterministic", "pfp", "pfp-random"])
def test_no_layer_of_a_shipped_network_leaves_its_calibration_bound(method: str) -> None:
    """On every calibration sample and in every event, with certainty; and half of the bound would not do."""
    models = Path(__file__).resolve().parent.parent / "models"
    with np.load(models / "fashion-mnist.npz") as archive:
        data = {"x": archive["x"][:40].astype(np.float32).reshape(-1, 1, 28, 28)}
    found = onnxprune.prune(models / "vgg8.onnx", data, budget={"macs": 0.8}, method=method, samples=12, recover="none")
    ratios = list(simulate.deviations(models / "vgg8.onnx", data, found, ImageOptions(), 12))
    assert len(ratios) >= 3 and sum(d.events for d in ratios) > 500_000
    assert max(d.ratio for d in ratios) <= 1.0
    assert method == "pfp-random" or max(d.ratio for d in ratios) > 0.5


@pytest.mark.parametrize(("samples", "why"), [(467, "that takes 528 samples"), (600, "too many outputs are not finite")])
def test_a_statement_that_cannot_be_made_says_why(samples: int, why: str) -> None:
    statement = {"kind": "relative_l2", "alpha": 0.01, "x": None, "samples_needed": 528}
    said = list(sentences.PARTS["population"]({"delta": 0.01, "samples": samples, "statements": [statement]}))
    assert said[-1] == f"nothing can be said of 1 % of inputs: {why}"
