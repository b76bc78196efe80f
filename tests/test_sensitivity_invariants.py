"""What every sensitivity satisfies: its range, invariances, and that how it is computed does not matter."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import nets
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import (
    BOTH,
    CONVS,
    EACH,
    TRANSPOSED,
    constant,
    conv_case,
    conv_net,
    draw,
    made_by,
    matmul_net,
    score,
    values,
    weigh,
)

from onnxprune import runtime
from onnxprune.contraction import consumers, normal_form
from onnxprune.criteria import Activation, Sensitivity, fast, shares
from onnxprune.criteria.base import Reduce
from onnxprune.passes.calibrate import calibrate


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sessions as small as these spend most of their time on starting and stopping threads."""
    with mock.patch.object(runtime, "session", functools.partial(runtime.session, threads=1)):
        yield


# ---- 1.9 (1): what every sensitivity satisfies


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_range_and_order_of_the_two_readings(seed: int, signed: bool) -> None:
    rng = np.random.default_rng(seed)
    x, net = draw(rng, (3, 8, 6, 6), signed), conv_net(weigh(rng, (5, 8, 3, 3)), (6, 6), pads=[1, 1, 1, 1])
    by_sum, by_max = values(net, x), values(net, x, "max")
    for s in (by_sum, by_max):
        assert s.min() >= 0 and s.max() <= 1
    assert (by_sum >= by_max * (1 - 1e-6)).all() and (by_max * 9 >= by_sum * (1 - 1e-6)).all()
    assert (by_sum > by_max).any()
    assert by_sum.sum() >= 1


@pytest.mark.parametrize("sign_w", [1, -1])
@pytest.mark.parametrize("sign_x", [1, -1])
@pytest.mark.parametrize("taps", [(3, 2), (1, 1), ()])
def test_shares_of_one_event_add_up_to_one(taps: tuple[int, ...], sign_x: int, sign_w: int) -> None:
    """One sample, one filter, one patch, one sign part: the sensitivities are the shares."""
    rng = np.random.default_rng(13)
    w, x = rng.uniform(0.01, 1, (1, 7, *taps)), rng.uniform(0.01, 1, (1, 7, *taps)).astype(np.float32)
    s = values(conv_net(sign_w * w, taps) if taps else matmul_net(sign_w * w.T), sign_x * x)
    terms = (w * x).reshape(7, -1).sum(axis=1)
    np.testing.assert_allclose(s, terms / terms.sum(), rtol=1e-5)
    assert s.sum() == pytest.approx(1, abs=1e-6)


# ---- 1.9 (3, 4): invariances and monotony


def test_scale_of_filters_and_activations_and_bias_do_not_matter() -> None:
    rng = np.random.default_rng(14)
    x, w = draw(rng, (3, 8, 5, 5), True), weigh(rng, (4, 8, 3, 3))
    s = values(conv_net(w, (5, 5)), x)
    scaled = w * np.array([8, 1, 0.25, 3])[:, None, None, None]
    np.testing.assert_allclose(values(conv_net(scaled, (5, 5)), x), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w, (5, 5)), 64 * x), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w, (5, 5)), 1e-4 * x), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w, (5, 5)), x * 10 ** rng.uniform(-4, 4, (3, 1, 1, 1))), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w, (5, 5), 100 * rng.standard_normal(4)), x), s, rtol=1e-5)
    # A negative factor swaps the signs of a filter's parts, all of which count.
    np.testing.assert_allclose(values(conv_net(-w, (5, 5)), x), s, rtol=1e-5)


@BOTH
def test_permutations(reduce: Reduce) -> None:
    """Samples and filters may come in any order; a permutation of channels permutes their sensitivities."""
    rng = np.random.default_rng(15)
    x, w = draw(rng, (6, 8, 5, 5), True), weigh(rng, (4, 8, 3, 2))
    s = values(conv_net(w, (5, 5)), x, reduce)
    order = rng.permutation(8)
    np.testing.assert_allclose(values(conv_net(w, (5, 5)), x[rng.permutation(6)], reduce), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w[rng.permutation(4)], (5, 5)), x, reduce), s, rtol=1e-5)
    np.testing.assert_allclose(values(conv_net(w[:, order], (5, 5)), x[:, order], reduce), s[order], rtol=1e-5)
    assert len(np.unique(s)) == 8


@BOTH
@pytest.mark.parametrize("taps", [(2, 3), (1, 1)])
def test_duplicated_channel_halves_its_sensitivity(taps: tuple[int, ...], reduce: Reduce) -> None:
    rng = np.random.default_rng(16)
    x, w = draw(rng, (3, 16, 4, 4), True), weigh(rng, (4, 16, *taps))
    s = values(conv_net(w, (4, 4)), x, reduce)
    half = w * np.where(np.arange(16) == 2, 0.5, 1)[:, None, None]
    two = values(conv_net(np.concatenate([half, half[:, 2:3]], 1), (4, 4)), np.concatenate([x, x[:, 2:3]], 1), reduce)
    np.testing.assert_allclose(two, [*s[:2], s[2] / 2, *s[3:], s[2] / 2], rtol=1e-5)
    assert s[2] < 0.99


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 6), st.integers(1, 6), st.sampled_from(["sum", "graph sum"]))
def test_more_samples_never_lower_a_sensitivity(seed: int, few: int, more: int, kernel: str) -> None:
    """Samples of very different magnitudes, too: a faint one counts as much as a strong one."""
    rng = np.random.default_rng(seed)
    x = draw(rng, (few + more, 8, 5), True) * 10 ** rng.uniform(-9, 9, (few + more, 1, 1))
    net = conv_net(weigh(rng, (3, 8, 2)), (5,))
    groups, criterion = nets.grouped(net), made_by(kernel)
    all_of, some = (
        calibrate(groups, criterion, nets.samples(net, a.astype(np.float32))).layers[0].values for a in (x, x[:few])
    )
    assert (all_of >= some * (1 - 1e-5)).all()


@EACH
def test_batches_do_not_matter(kernel: str) -> None:
    """Not even when one sample is a hundred million times as strong as the others."""
    rng = np.random.default_rng(17)
    net = nets.convnet(rng)
    x = rng.standard_normal((33, 3, 6, 6)).astype(np.float32)
    x[5] *= 1e8
    found = {b: calibrate(nets.grouped(net), made_by(kernel), nets.samples(net, x), batch=b) for b in (1, 7, 32)}
    assert found[1].samples == 33 and len(found[1].layers) == 2
    assert len({f.data for f in found.values()}) == 1
    for other in (7, 32):
        for a, b in zip(found[1].layers, found[other].layers, strict=True):
            assert (a.layer, a.group, a.events) == (b.layer, b.group, b.events)
            np.testing.assert_allclose(a.values, b.values, rtol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_of_a_matrix_product_are_samples_of_their_own(transposed: bool) -> None:
    rng = np.random.default_rng(18)
    net = matmul_net(weigh(rng, (16, 3), 0))
    if transposed:
        nodes = [("Gemm", "unit in", "a", {"transB": 1}), ("Gemm", "a w", "out", {"transA": 1})]
        net = nets.model(nodes, {"in": ["N", 16]}, "out", {"unit": np.eye(16), "w": constant(net, "w")})
    x = draw(rng, (6, 16), True) * np.array([[1e9], [1], [1], [1e-9], [1], [1]])
    np.testing.assert_allclose(values(net, x, batch=6), values(net, x, batch=1), rtol=1e-5)


@pytest.mark.parametrize("count", [3, 8, 10, 11])
@pytest.mark.parametrize("criterion", [Sensitivity(), Activation()])
def test_fixed_batch(criterion: Any, count: int) -> None:
    """A model of static batch 4 gets its samples in fours, and the last few count no more than the others."""
    net = nets.convnet(np.random.default_rng(19))
    static = onnx.ModelProto.FromString(net.SerializeToString())
    static.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    x = np.random.default_rng(20).standard_normal((count, 3, 6, 6)).astype(np.float32)
    seen: list[tuple[int, int]] = []
    got = calibrate(nets.grouped(static), criterion, nets.samples(static, x), progress=lambda *a: seen.append(a))
    want = calibrate(nets.grouped(net), criterion, nets.samples(net, x))
    assert got.samples == want.samples == count
    assert seen[-1] == (count, count)
    for a, b in zip(got.layers, want.layers, strict=True):
        np.testing.assert_allclose(a.values, b.values, rtol=1e-5)


def test_chosen_samples_only() -> None:
    net = nets.convnet(np.random.default_rng(21))
    x = np.random.default_rng(22).standard_normal((9, 3, 6, 6)).astype(np.float32)
    some = np.array([7, 2, 4])
    a, b = score(net, x, indices=some), score(net, x[some])
    assert a.samples == 3 and a.data == b.data != score(net, x).data
    for m, n in zip(a.layers, b.layers, strict=True):
        np.testing.assert_array_equal(m.values, n.values)


@EACH
@pytest.mark.parametrize("chunk", [1, 40, 3000])
@pytest.mark.parametrize("kind", ["conv", "1x1", "groups", "transposed", "flatten"])
def test_chunks_do_not_matter(kind: str, chunk: int, kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(23)
    if kind == "flatten":
        net, x = nets.convnet(rng), rng.standard_normal((3, 3, 6, 6)).astype(np.float32)
    else:
        options = {"conv": CONVS["asymmetric"], "1x1": CONVS["1x1"], "groups": CONVS["groups 2"]}
        chosen = options.get(kind, TRANSPOSED["output_padding"])
        case = conv_case(rng, **chosen, transposed=kind == "transposed")
        net, x = case.net, case.x
    whole = calibrate(nets.grouped(net), made_by(kernel), nets.samples(net, x))
    monkeypatch.setattr(shares, "CHUNK", chunk)
    for name in ("PIECE", "FEWEST", "MOST", "HELD", "WEIGHTS", "KEPT"):
        monkeypatch.setattr(fast, name, chunk)
    for a, b in zip(whole.layers, calibrate(nets.grouped(net), made_by(kernel), nets.samples(net, x)).layers, strict=True):
        np.testing.assert_allclose(a.values, b.values, rtol=2e-6)


@BOTH
@pytest.mark.parametrize("kind", ["conv", "groups", "flatten"])
def test_scores_known_from_before_only_grow(kind: str, reduce: Reduce) -> None:
    """Whatever is known of some channels already: the result is the larger of that and what the batch shows."""
    rng = np.random.default_rng(44)
    if kind == "flatten":
        net, x = nets.convnet(rng), rng.standard_normal((3, 3, 6, 6)).astype(np.float32)
    else:
        case = conv_case(rng, **CONVS["asymmetric" if kind == "conv" else "groups 2"])
        net, x = case.net, case.x
    groups = nets.grouped(net)
    layer = consumers(groups)[-1]
    w, (a,) = constant(net, layer.weight), nets.run(net, x, layer.x.tensor)
    (fresh,) = Sensitivity(reduce).observe(groups, layer, a, w)
    for known in (0 * fresh.values, rng.random(len(fresh.values)), fresh.values, np.ones(len(fresh.values))):
        before = known.copy()
        (found,) = Sensitivity(reduce).observe(groups, layer, a, w, {fresh.group: known, "another": known})
        np.testing.assert_allclose(found.values, np.maximum(known, fresh.values), rtol=1e-6)
        np.testing.assert_array_equal(known, before)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(st.integers(0, 9999), st.sampled_from([(), (3,), (2, 3)]), st.integers(6, 20), st.integers(1, 40))
def test_saving_work_costs_no_exactness(seed: int, taps: tuple[int, ...], channels: int, filters: int) -> None:
    """Heavy-tailed weights and activations, many patches: the fast kernel against the one that evaluates everything."""
    rng = np.random.default_rng(seed)
    x = np.abs(rng.standard_t(1.5, (3, channels, *(9 for _ in taps))))
    w = rng.standard_t(1.5, (filters, channels, *taps)) * rng.choice([1, 1e-3], (filters, 1, *(1 for _ in taps)))
    net = conv_net(w, x.shape[2:], pads=[1] * 2 * len(taps)) if taps else matmul_net(w.T)
    groups = nets.grouped(net)
    (layer,) = consumers(groups)
    x, w = x.astype(np.float32), constant(net, "w")
    (found,) = Sensitivity().observe(groups, layer, x, w)
    kernel, nothing = shares.Shares("sum"), np.zeros(channels)
    whole = [kernel.largest(c, np.arange(channels)[:, None], nothing)[0] for c in normal_form(groups, layer, x, w)]
    np.testing.assert_allclose(found.values, np.max(whole, axis=0), rtol=1e-5)
