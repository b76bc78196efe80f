"""The sampling theory: bounds, calibration, streams, and how often the guarantee fails in a simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from onnxprune import theory
from onnxprune.errors import OptionError

EPS64 = float(np.finfo(np.float64).eps)

sensitivities = arrays(
    np.float64,
    st.integers(1, 40),
    elements=st.one_of(st.just(0.0), st.floats(1e-12, 1.0), st.floats(0.0, 1.0)),
)
positive = arrays(np.float64, st.integers(1, 30), elements=st.floats(1e-3, 1.0))
layer = {"sum_s": st.floats(1e-3, 1e4), "events": st.integers(1, 10**9), "delta": st.floats(1e-16, 0.5)}


def binomial_two_sided_tail(m: int, q: float, eps: float) -> float:
    """Pr[|X/(m q) - 1| > eps] for X ~ Binomial(m, q), exactly."""
    total = 0.0
    for x in range(m + 1):
        if abs(x / (m * q) - 1.0) > eps:
            log = math.lgamma(m + 1) - math.lgamma(x + 1) - math.lgamma(m - x + 1)
            total += math.exp(log + x * math.log(q) + (m - x) * math.log1p(-q))
    return total


# ---- the bound and its inverse


def test_epsilon_and_draws_have_the_stated_constants() -> None:
    log = math.log(2 * 100 / 0.01)
    assert theory.draws(0.5, 6.0, 100, 0.01, 3.0) == math.ceil(3 * 6.0 * 7.0 / 0.75 * log)
    a = 3 * 6.0 / 3 * log
    assert theory.epsilon(16, 6.0, 100, 0.01, 3.0) == pytest.approx((a + math.sqrt(a * a + 6 * a * 16)) / 16, rel=1e-13)
    assert theory.epsilon(16, 6.0, 100, 0.01) == theory.epsilon(16, 6.0, 100, 0.01, theory.K_DEFAULT)
    # a 16-channel layer of ResNet-20: 125 S draws for eps = 1 (two parts, 16 filters, 32 x 32 patches)
    assert theory.draws(1.0, 1.0, 2 * 16 * 1024, 0.01) == math.ceil(8 * math.log(2 * 32768 / 0.01))
    assert theory.draws(1.0, 1.0, 2 * 16 * 1024, 0.01) in {125, 126}


@pytest.mark.parametrize(
    ("channels", "sum_s", "patches", "expected"),
    [(16, 6, 1024, 15.3), (32, 10, 256, 12.2), (64, 20, 64, 11.3), (512, 40, 16, 3.7), (2048, 100, 49, 2.8)],
)
def test_epsilon_at_full_width_is_vacuous(channels: int, sum_s: float, patches: int, expected: float) -> None:
    assert theory.epsilon(channels, sum_s, 2 * 64 * patches, 0.01) == pytest.approx(expected, abs=0.06)


@given(st.lists(st.floats(1.0, 1e9), min_size=2, max_size=8, unique=True), st.fixed_dictionaries(layer))
def test_epsilon_strictly_decreases_with_the_draws(ms: list[float], args: dict[str, float]) -> None:
    ms = sorted(ms)
    ms = [m for m, after in itertools.pairwise(ms) if after > m * (1 + 1e-12)] + ms[-1:]
    values = [theory.epsilon(m, **args) for m in ms]  # type: ignore[arg-type]
    assert all(a > b > 0 for a, b in itertools.pairwise(values))
    assert theory.epsilon(0, **args) == math.inf  # type: ignore[arg-type]


@given(st.floats(1e-4, 1e4), st.floats(1.001, 10.0), st.fixed_dictionaries(layer))
def test_draws_decrease_with_eps_and_invert_epsilon(eps: float, factor: float, args: dict[str, float]) -> None:
    m = theory.draws(eps, **args)  # type: ignore[arg-type]
    assert m >= theory.draws(eps * factor, **args) >= 1  # type: ignore[arg-type]
    assert theory.epsilon(m, **args) <= eps  # type: ignore[arg-type]
    if 1 < m < 2**40:
        assert theory.epsilon(m - 1, **args) > eps * (1 - 1e-12)  # type: ignore[arg-type]


def test_draws_of_epsilon_is_the_same_number_in_spite_of_rounding() -> None:
    ms = [*range(1, 2000), 10**6, 10**9 + 7]
    assert [theory.draws(theory.epsilon(m, 3.7, 100, 0.01), 3.7, 100, 0.01) for m in ms] == ms
    for eps in np.linspace(1e-7, 3e-7, 500):  # beyond 2**53 draws the plain formula is some draws short now and then
        assert theory.epsilon(theory.draws(eps, 6.1, 100, 0.01), 6.1, 100, 0.01) <= eps


@pytest.mark.parametrize("eps", [1.0, 0.5, 0.1, 0.03])
def test_draws_strictly_decrease_with_eps(eps: float) -> None:
    assert theory.draws(eps, 6.0, 100, 0.01) > theory.draws(1.1 * eps, 6.0, 100, 0.01)


def test_draws_do_not_overflow() -> None:
    assert theory.draws(1e-300, 6.0, 100, 1e-16) == 2**62
    assert theory.draws(5e-324, 1e300, 10**30, 1e-300) == 2**62
    assert 2**53 < theory.draws(1e-7, 6.0, 100, 1e-16) < 2**62
    assert theory.draws(1e300, 1.0, 1, 0.5) == 1
    assert math.isfinite(theory.epsilon(1, 1e300, 10**30, 1e-300))


def test_nothing_to_estimate() -> None:
    assert theory.epsilon(0, 0.0, 10, 0.1) == 0.0
    assert theory.epsilon(7, 0.0, 10, 0.1) == 0.0
    assert theory.draws(0.1, 0.0, 10, 0.1) == 0
    assert theory.epsilon(math.inf, 1.0, 10, 0.1) == 0.0


@pytest.mark.parametrize(("eps", "delta", "sum_s"), [(0.5, 0.01, 20.0), (0.2, 0.1, 5.0), (1.0, 0.01, 50.0)])
def test_bound_holds_in_the_worst_case_and_is_not_wasteful(eps: float, delta: float, sum_s: float) -> None:
    """Events that read a single channel each: share 1, p_j = 1/S, so that the estimate is z Binomial(m, 1/S) S/m."""
    m = theory.draws(eps, sum_s, 1, delta, k=1.0)
    assert binomial_two_sided_tail(m, 1 / sum_s, eps) <= delta
    assert binomial_two_sided_tail(m // 3, 1 / sum_s, eps) > delta  # a formula three times smaller would be wrong


# ---- distribution and expected number of distinct channels


@given(sensitivities)
def test_probabilities(s: np.ndarray) -> None:
    p = theory.probabilities(s)
    assert p.dtype == np.float64
    assert p.shape == s.shape
    assert p.sum() == pytest.approx(1.0, abs=1e-12)
    if s.any():
        raw = s / s.sum()
        assert (p[s == 0.0] == 0.0).all()
        assert (p[raw < 0.99 * EPS64] == 0.0).all()
        assert (p[raw > 1.01 * EPS64] > 0.0).all()
        np.testing.assert_allclose(p[p > 0], raw[p > 0], rtol=1e-12)
    else:
        np.testing.assert_array_equal(p, np.full(s.size, 1 / s.size))


def test_probabilities_of_extreme_sizes() -> None:
    np.testing.assert_array_equal(theory.probabilities(np.array([1.0, 1e-17, 0.0])), [1.0, 0.0, 0.0])
    np.testing.assert_allclose(theory.probabilities(np.array([1e308, 1e308, 1e308])), 1 / 3)
    np.testing.assert_allclose(theory.probabilities(np.array([5e-324, 5e-324])), 0.5)


@given(sensitivities, st.lists(st.integers(0, 10**12), min_size=2, max_size=6))
def test_expected_distinct_increases_and_is_bounded(s: np.ndarray, ms: list[int]) -> None:
    p = theory.probabilities(s)
    live = np.count_nonzero(p)
    values = [theory.expected_distinct(p, m) for m in sorted(ms)]
    assert all(a <= b for a, b in itertools.pairwise(values))
    assert all(0.0 <= u <= min(live, m) for u, m in zip(values, sorted(ms), strict=True))
    assert theory.expected_distinct(p, 0) == 0.0
    assert theory.expected_distinct(p, 1) == pytest.approx(1.0)
    assert math.ceil(theory.expected_distinct(p, 1)) == 1
    if live > 1:
        assert theory.expected_distinct(p, 2) > 1.0
    assert theory.expected_distinct(p, math.inf) == live


def test_expected_distinct_against_enumeration_and_in_the_limits() -> None:
    p = np.array([0.5, 0.3, 0.2, 0.0])
    m = 4
    draws = itertools.product(range(4), repeat=m)
    exact = sum(math.prod(p[list(d)]) * len(set(d)) for d in draws)
    assert theory.expected_distinct(p, m) == pytest.approx(exact, rel=1e-13)
    assert theory.expected_distinct(np.array([1.0, 0.0]), 5) == 1.0
    tiny = np.array([1.0 - 1e-15, 1e-15])  # 1 - (1 - p)^m loses all digits without log1p and expm1
    assert theory.expected_distinct(tiny, 2) - 1.0 == pytest.approx(2e-15, rel=0.2)
    assert theory.expected_distinct(tiny, 1e15) == pytest.approx(2 - math.exp(-1), rel=1e-6)
    flat = np.full(10**5, 1e-5)
    assert theory.expected_distinct(flat, 3.0) == pytest.approx(3.0 - 3e-5 + 1e-10, rel=1e-12)


@given(sensitivities, st.data())
def test_draws_for_distinct_is_the_smallest(s: np.ndarray, data: st.DataObject) -> None:
    p = theory.probabilities(s)
    n = data.draw(st.integers(0, int(np.count_nonzero(p))))
    m = theory.draws_for_distinct(p, n)
    assert m >= n
    assert math.ceil(theory.expected_distinct(p, m)) >= n
    if 0 < m < 2**50:
        assert math.ceil(theory.expected_distinct(p, m - 1)) < n


def test_draws_for_distinct_values() -> None:
    assert [theory.draws_for_distinct(np.full(2, 0.5), n) for n in range(3)] == [0, 1, 2]
    assert theory.draws_for_distinct(np.full(1, 1.0), 1) == 1
    # of 16 equal channels 16, 15, 13 and 12 draws expect 10.30, 9.92, 9.09 and 8.62
    assert theory.draws_for_distinct(np.full(16, 1 / 16), 11) == 16
    assert theory.draws_for_distinct(np.full(16, 1 / 16), 10) == 13
    skewed = theory.probabilities(np.array([1.0, 1e-15, 1e-15, 1e-15]))
    assert theory.draws_for_distinct(skewed, 4) == pytest.approx(math.log(3) * 1e15, rel=1e-3)


# ---- hybrid


@given(sensitivities, st.data())
def test_hybrid_split(s: np.ndarray, data: st.DataObject) -> None:
    n = data.draw(st.integers(1, s.size))
    kept, m = theory.hybrid_split(s, n)
    k = kept.size
    live = int(np.count_nonzero(theory.probabilities(s))) if s.any() else 0
    np.testing.assert_array_equal(kept, np.argsort(-s, kind="stable")[:k])
    assert kept.dtype == np.int64
    assert k <= n
    if n >= live:
        assert (k, m) == (n, 0)
        return
    p = theory.probabilities(s)
    m_tilde = theory.draws_for_distinct(p, n)
    above = int(np.sum(p > (1 + 1e-9) / m_tilde))
    near = int(np.sum(p > (1 - 1e-9) / m_tilde))
    assert min(above, n) <= k <= min(near, n)
    rest = s.copy()
    rest[kept] = 0.0
    assert m == (theory.draws_for_distinct(theory.probabilities(rest), n - k) if k < n else 0)
    if 0 < m <= 10_000:  # the channels kept for certain and those drawn are disjoint
        counts = theory.DrawStream(theory.probabilities(rest), np.random.default_rng(1)).counts(m)
        assert not counts[kept].any()
        assert np.count_nonzero(counts) >= 1


def test_hybrid_with_nothing_certain_is_plain_sampling() -> None:
    s = np.full(100, 0.3)
    p = theory.probabilities(s)
    kept, m = theory.hybrid_split(s, 20)
    assert kept.size == 0
    assert m == theory.draws_for_distinct(p, 20)
    rest = s.copy()
    rest[kept] = 0.0
    plain = theory.DrawStream(p, np.random.default_rng(5)).counts(m)
    hybrid = theory.DrawStream(theory.probabilities(rest), np.random.default_rng(5)).counts(m)
    np.testing.assert_array_equal(hybrid, plain)
    np.testing.assert_array_equal(
        theory.weights(hybrid, theory.probabilities(rest)), theory.weights(plain, theory.probabilities(s))
    )


def test_hybrid_of_full_width_is_deterministic() -> None:
    s = np.array([0.2, 1e-9, 0.9, 0.2, 1e-9, 0.0])
    kept, m = theory.hybrid_split(s, 6)
    assert (kept.tolist(), m) == ([2, 0, 3, 1, 4, 5], 0)  # ties in the order of the channels
    kept, m = theory.hybrid_split(s, 5)
    assert (kept.tolist(), m) == ([2, 0, 3, 1, 4], 0)


def test_hybrid_keeps_the_head_and_samples_the_tail() -> None:
    s = np.concatenate([np.full(40, 0.01), np.full(5, 1.0)])
    kept, m = theory.hybrid_split(s, 15)
    assert kept.tolist() == [40, 41, 42, 43, 44]
    assert m == theory.draws_for_distinct(np.full(40, 1 / 40), 10)
    assert m > 10


def test_dead_layer() -> None:
    s = np.zeros(5)
    kept, m = theory.hybrid_split(s, 2)
    assert (kept.tolist(), m) == ([0, 1], 0)
    stream = theory.DrawStream(theory.probabilities(s), np.random.default_rng(0))
    assert stream.distinct(1000) == 5
    assert theory.draws(0.1, float(s.sum()), 10, 0.1) == 0


# ---- streams and weights


@settings(max_examples=60)
@given(positive, st.lists(st.integers(0, 20_000), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_stream_prefixes_do_not_depend_on_the_steps(s: np.ndarray, ms: list[int], seed: int) -> None:
    p = theory.probabilities(s)
    stream = theory.DrawStream(p, np.random.default_rng(seed))
    whole = theory.DrawStream(p, np.random.default_rng(seed)).first(max(ms))
    previous: dict[int, np.ndarray] = {}
    for m in ms:
        counts = stream.counts(m)
        assert counts.dtype == np.int64
        assert counts.shape == p.shape
        assert counts.sum() == m
        np.testing.assert_array_equal(stream.first(m), whole[:m])
        np.testing.assert_array_equal(counts, np.bincount(whole[:m], minlength=p.size))
        assert stream.distinct(m) == len(set(whole[:m].tolist()))
        for smaller, before in previous.items():
            assert ((counts >= before) if m >= smaller else (counts <= before)).all()
        previous[m] = counts


def test_streams_of_one_generator_grow_independently() -> None:
    p = np.full(50, 0.02)

    def pair(order: list[int]) -> list[list[int]]:
        rng = np.random.default_rng(3)
        streams = [theory.DrawStream(p, rng), theory.DrawStream(p, rng)]
        for which in order:
            streams[which].counts(5000)
        return [s.first(9000).tolist() for s in streams]

    first, second = pair([0, 1])
    assert pair([1, 0]) == [first, second]
    assert first != second
    other = theory.DrawStream(p, np.random.default_rng(4)).first(9000).tolist()
    assert other not in (first, second)


def test_stream_never_draws_a_channel_of_probability_zero() -> None:
    p = theory.probabilities(np.array([0.0, 0.0, 0.1, 0.0, 0.7, 0.1, 0.0, 1e-20, 0.0]))
    counts = theory.DrawStream(p, np.random.default_rng(0)).counts(200_000)
    assert (counts[p == 0.0] == 0).all()
    assert (counts[p > 0.0] > 0).all()


class Extremes:
    """A generator that returns the ends of [0, 1) only."""

    def random(self, size: int) -> np.ndarray:
        return np.resize([0.0, 1.0 - 2.0**-53], size)


@pytest.mark.parametrize("channels", [1, 3, 10, 49, 1000])
def test_stream_at_the_ends_of_the_unit_interval(channels: int) -> None:
    p = np.zeros(channels + 2)
    p[1:-1] = np.full(channels, 1 / channels) * (1 - 1e-9)  # sums to less than 1
    stream = theory.DrawStream(p, np.random.default_rng(0))
    stream._rng = Extremes()  # type: ignore[assignment]
    assert stream.first(2).tolist() == [1, channels]


def test_stream_frequencies_and_distinct_follow_the_theory() -> None:
    rng = np.random.default_rng(11)
    p = theory.probabilities(rng.uniform(0.01, 1.0, 40) ** 3)
    m = 200_000
    counts = theory.DrawStream(p, rng).counts(m)
    assert (np.abs(counts - m * p) <= 4 * np.sqrt(m * p * (1 - p))).all()
    distinct = np.array([theory.DrawStream(p, rng).distinct(30) for _ in range(400)])
    standard_error = distinct.std(ddof=1) / math.sqrt(distinct.size)
    assert abs(distinct.mean() - theory.expected_distinct(p, 30)) <= 4 * standard_error


def test_stream_refuses_to_store_gigabytes() -> None:
    stream = theory.DrawStream(np.full(4, 0.25), np.random.default_rng(0))
    with pytest.raises(OptionError, match="10000000"):
        stream.counts(theory.STREAM_CAP + 1)
    assert stream.counts(0).tolist() == [0, 0, 0, 0]
    assert stream.distinct(0) == 0


def test_weights() -> None:
    p = np.array([0.5, 0.25, 0.25, 0.0])
    np.testing.assert_allclose(theory.weights(np.array([3, 1, 0, 0]), p), [1.5, 1.0, 0.0, 0.0])
    np.testing.assert_array_equal(theory.weights(np.zeros(4, dtype=np.int64), p), np.zeros(4))


@given(positive, st.integers(1, 5000), st.integers(0, 2**32 - 1))
def test_weights_preserve_the_total_of_p(s: np.ndarray, m: int, seed: int) -> None:
    p = theory.probabilities(s)
    counts = theory.DrawStream(p, np.random.default_rng(seed)).counts(m)
    w = theory.weights(counts, p)
    assert (w * p).sum() == pytest.approx(1.0)
    assert ((w > 0) == (counts > 0)).all()


def replicate(p: np.ndarray, m: int, times: int, rng: np.random.Generator) -> np.ndarray:
    """`times` independent samples of m draws each, as counts [times, C]."""
    draws = theory.DrawStream(p, rng).first(times * m).reshape(times, m).astype(np.int64)
    flat = draws + p.size * np.arange(times)[:, None]
    return np.bincount(flat.ravel(), minlength=times * p.size).reshape(times, p.size)


def test_estimator_is_unbiased() -> None:
    rng = np.random.default_rng(21)
    s = rng.uniform(0.05, 1.0, 12)
    p, m, times = theory.probabilities(s), 16, 20_000
    counts = replicate(p, m, times, rng)
    w = counts / (m * p)
    np.testing.assert_allclose(w[0], theory.weights(counts[0], p), rtol=1e-13)
    np.testing.assert_allclose(w[-1], theory.weights(counts[-1], p), rtol=1e-13)
    standard_error = np.sqrt((1 - p) / (m * p * times))
    assert (np.abs(w.mean(axis=0) - 1.0) <= 4 * standard_error).all()

    contributions = rng.normal(size=(5, 12))
    z, z_hat = contributions.sum(axis=1), w @ contributions.T
    error = np.abs(z_hat.mean(axis=0) - z)
    spread = z_hat.std(axis=0, ddof=1) / math.sqrt(times)
    assert (error <= 4 * spread).all()
    unweighted = (counts > 0) @ contributions.T  # control: without the weights the mean is far off
    assert (np.abs(unweighted.mean(axis=0) - z) > 4 * spread).any()


# ---- the guarantee in simulation


def failure_rate(c: np.ndarray, w: np.ndarray, eps: float) -> float:
    """Share of the samples (weights w: [times, C]) in which some event (contributions c: [E, C]) is off by > eps z."""
    z = c.sum(axis=1)
    return float((np.abs(w @ c.T - z) > eps * z).any(axis=1).mean())


def test_failure_frequency_and_its_power_controls() -> None:
    rng = np.random.default_rng(7)
    channels, outputs, eps, delta, times = 2000, 4, 0.5, 0.1, 2000
    base = rng.uniform(0.5, 1.5, (outputs, channels)) * rng.uniform(0.5, 1.5, channels)

    # a flat layer; one input, which is the sample set, hence K = 1 holds for certain
    s = (base / base.sum(axis=1, keepdims=True)).max(axis=0)
    m = theory.draws(eps, float(s.sum()), outputs, delta, k=1.0)
    assert 50 <= m <= 58
    p = theory.probabilities(s)
    assert failure_rate(base, replicate(p, m, times, rng) / (m * p), eps) <= delta

    # the same layer with 20 channels that carry 200 times as much
    c = base.copy()
    c[:, :20] *= 200.0
    s = (c / c.sum(axis=1, keepdims=True)).max(axis=0)
    sum_s = float(s.sum())
    m = theory.draws(eps, sum_s, outputs, delta, k=1.0)
    p, uniform = theory.probabilities(s), np.full(channels, 1 / channels)
    counts = replicate(p, m, times, rng)
    assert failure_rate(c, counts / (m * p), eps) <= delta
    assert failure_rate(c, replicate(uniform, m, times, rng) / (m * uniform), eps) >= 0.5  # control: wrong p
    assert failure_rate(c, (counts > 0).astype(np.float64), eps) >= 0.05  # control: no reweighting
    assert ((counts > 0) @ c.T).mean() < 0.8 * c.sum(axis=1).mean()

    # hybrid: the heavy channels for certain, the rest sampled, S_R in place of S
    kept, m_rest = theory.hybrid_split(s, 45)
    assert sorted(kept.tolist()) == list(range(20))
    rest = s.copy()
    rest[kept] = 0.0
    q = theory.probabilities(rest)
    bound = theory.epsilon(m_rest, float(rest.sum()), outputs, delta, k=1.0)
    w = replicate(q, m_rest, times, rng) / np.where(q > 0, m_rest * q, 1.0)
    w[:, kept] = 1.0
    assert bound < theory.epsilon(m_rest, sum_s, outputs, delta, k=1.0)
    assert failure_rate(c, w, bound) <= delta
    w[:, kept] = 0.0
    assert failure_rate(c, w, bound) >= 0.05  # control: the kept channels matter


@pytest.mark.parametrize("stride", [1, 2])
def test_deterministic_bound_holds_on_the_samples_with_certainty(stride: int) -> None:
    """Without channels D: |z^ - z| <= (sum of s over D) z on S, per sign part; tight if D is a single channel."""
    rng = np.random.default_rng(stride)
    samples, c_in, c_out, size = 6, 8, 5, 7
    x = rng.normal(size=(samples, c_in, size + 2, size + 2))
    x[:, :, [0, -1]] = 0.0  # zero padding
    x[:, :, :, [0, -1]] = 0.0
    w = rng.normal(size=(c_out, c_in, 3, 3)) * rng.uniform(0.1, 2.0, (1, c_in, 1, 1))
    patches = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::stride, ::stride]
    parts = [
        np.einsum("ijkl,njyxkl->niyxj", np.maximum(sw * w, 0.0), np.maximum(sx * patches, 0.0)).reshape(-1, c_in)
        for sw in (1, -1)
        for sx in (1, -1)
    ]
    events = np.concatenate(parts)  # [parts x samples x outputs x patches, C]
    events = events[events.sum(axis=1) > 0.0]
    z = events.sum(axis=1)
    s = (events / z[:, None]).max(axis=0)
    assert 1.0 <= s.sum() <= c_in

    def worst_against_bound(kept: np.ndarray) -> float:
        dropped = np.setdiff1d(np.arange(c_in), kept)
        relative = (z - events[:, kept].sum(axis=1)) / z
        return float(relative.max() / s[dropped].sum())

    order = np.argsort(-s, kind="stable")
    for n in range(c_in):
        assert worst_against_bound(order[:n]) <= 1.0 + 1e-12
    assert worst_against_bound(order[:-1]) == pytest.approx(1.0)  # attained: any smaller s would break the bound
    kept, m = theory.hybrid_split(s, c_in)
    assert (sorted(kept.tolist()), m) == (list(range(c_in)), 0)


# ---- sample size and refusals


def test_calibration_samples() -> None:
    # ResNet-20 on CIFAR-10: 7 layers of 16 x 32 x 32 outputs, 6 of 32 x 16 x 16, 6 of 64 x 8 x 8, 10 logits
    total = 7 * 16 * 1024 + 6 * 32 * 256 + 6 * 64 * 64 + 10
    assert theory.calibration_samples(total, 16 * 1024, 1e-16) == 183
    assert theory.calibration_samples(total, 16 * 1024, 1e-16, 6.0) in {365, 366}
    assert theory.calibration_samples(1, 1, 0.5, 1.0) == math.ceil(math.log(16))
    assert theory.calibration_samples(10**15, 10**15, 1e-300) > theory.calibration_samples(10**15, 10**14, 1e-300)


NAN = math.nan
P4 = np.full(4, 0.25)


@pytest.mark.parametrize(
    "call",
    [
        *(lambda d=d: theory.epsilon(5, 1.0, 10, d) for d in (0.0, 1.0, -0.1, NAN)),
        *(lambda d=d: theory.draws(0.5, 1.0, 10, d) for d in (0.0, 1.0, 2.0, NAN)),
        *(lambda d=d: theory.calibration_samples(10, 10, d) for d in (0.0, 1.0, NAN)),
        *(lambda e=e: theory.draws(e, 1.0, 10, 0.1) for e in (0.0, -1.0, NAN, math.inf)),
        *(lambda s=s: theory.epsilon(5, s, 10, 0.1) for s in (-1.0, NAN, math.inf)),
        *(lambda k=k: theory.epsilon(5, 1.0, 10, 0.1, k) for k in (0.5, 0.0, NAN, math.inf)),
        lambda: theory.epsilon(-1, 1.0, 10, 0.1),
        lambda: theory.epsilon(NAN, 1.0, 10, 0.1),
        lambda: theory.epsilon(5, 1.0, 0, 0.1),
        lambda: theory.calibration_samples(0, 0, 0.1),
        lambda: theory.calibration_samples(10, 10, 0.1, 0.0),
        *(lambda s=s: theory.probabilities(np.array(s)) for s in ([0.5, -0.1], [NAN, 1.0], [math.inf], [], [[1.0]])),
        lambda: theory.expected_distinct(P4, -1),
        lambda: theory.expected_distinct(P4, NAN),
        lambda: theory.expected_distinct(2 * P4, 3),
        lambda: theory.draws_for_distinct(P4, 5),
        lambda: theory.draws_for_distinct(P4, -1),
        lambda: theory.draws_for_distinct(np.array([1.0, 0.0]), 2),
        lambda: theory.draws_for_distinct(np.array([1.0, 1e-30, 1e-30]), 3),
        lambda: theory.hybrid_split(P4, 0),
        lambda: theory.hybrid_split(P4, 5),
        lambda: theory.hybrid_split(-P4, 2),
        lambda: theory.DrawStream(np.zeros(4), np.random.default_rng(0)),
        lambda: theory.DrawStream(P4, np.random.default_rng(0)).counts(-1),
        lambda: theory.weights(np.array([1, 0]), P4),
        lambda: theory.weights(np.array([1, 0, 0, -1]), P4),
        lambda: theory.weights(np.array([1, 1]), np.array([1.0, 0.0])),
    ],
)
def test_values_that_make_no_sense_are_refused(call: object) -> None:
    with pytest.raises(OptionError):
        call()  # type: ignore[operator]
