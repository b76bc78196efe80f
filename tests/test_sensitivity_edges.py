"""Sensitivities where denominators are next to zero, what counts as an event, and what the numbers promise."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from unittest import mock

import nets
import numpy as np
import onnx
import pytest
from layers import BOTH, EACH, Array, brute, constant, conv_net, conv_windows, draw, made_by, matmul_net, score, values
from onnx import numpy_helper

from onnxprune import runtime
from onnxprune.contraction import consumers
from onnxprune.criteria import Sensitivity
from onnxprune.criteria.base import Reduce
from onnxprune.passes.calibrate import calibrate
from onnxprune.passes.surgery import surgery
from onnxprune.plan import Kept, Plan


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sessions as small as these spend most of their time on starting and stopping threads."""
    with mock.patch.object(runtime, "session", functools.partial(runtime.session, threads=1)):
        yield


# ---- 1.8: denominators that are zero, or next to it


@BOTH
@pytest.mark.parametrize("taps", [(1,), (2,)])
def test_dead_channel_and_dead_layer(taps: tuple[int, ...], reduce: Reduce) -> None:
    rng = np.random.default_rng(24)
    x, w = draw(rng, (3, 5, 6), False), rng.standard_normal((4, 5, *taps))
    x[:, 2], w[:, 4] = 0, 0
    s = values(conv_net(w, (6,)), x, reduce)
    assert s[2] == s[4] == 0 and (s[[0, 1, 3]] > 0).all()
    np.testing.assert_array_equal(values(conv_net(w, (6,)), np.zeros_like(x), reduce), np.zeros(5))
    np.testing.assert_array_equal(values(conv_net(0 * w, (6,)), x, reduce), np.zeros(5))


@pytest.mark.parametrize(("size", "live"), [(0.0, False), (1e-7, False), (1e-5, True)])
@pytest.mark.parametrize("taps", [1, 2])
def test_tiny_denominators_give_no_share(taps: int, size: float, live: bool) -> None:
    """In the last patch only channel 1 is active; below a millionth of the largest denominator that is noise."""
    x = np.zeros((1, 2, 8), np.float32)
    x[0, :, :4] = 1
    x[0, 1, 7] = size
    s = values(conv_net(np.ones((1, 2, taps)), (8,)), x)
    np.testing.assert_allclose(s, [0.5, 1.0 if live else 0.5], rtol=1e-6)


@pytest.mark.parametrize("far", [1e-6, 4e-6, 1e-4])
@EACH
def test_filters_are_held_against_the_largest_of_their_layer(kernel: str, far: float) -> None:
    """The second filter sees channel 2 alone, and its denominator is much smaller than the first filter's."""
    net = matmul_net(np.array([[1, 0], [1, 0], [1, far]]))
    s = calibrate(nets.grouped(net), made_by(kernel), nets.samples(net, np.ones((2, 3), np.float32))).layers[0].values
    np.testing.assert_allclose(s, [1 / 3, 1 / 3, 1.0 if far > 3e-6 else 1 / 3], rtol=1e-6)


@BOTH
@pytest.mark.parametrize("taps", [(1,), (2,)])
def test_numbers_at_the_edge_of_float32(taps: tuple[int, ...], reduce: Reduce) -> None:
    """Squares, reciprocals and products stay within float32 whatever the scale of activations and weights."""
    rng = np.random.default_rng(25)
    x, w = draw(rng, (2, 4, 5), True), rng.uniform(1, 100, (3, 4, *taps))
    s = values(conv_net(w, (5,)), x, reduce)
    for of_x, of_w in itertools.product((1e-33, 1e-20, 1e33), (1e-30, 1.0)):
        np.testing.assert_allclose(values(conv_net(w * of_w, (5,)), x * of_x, reduce), s, rtol=1e-5)
    for faint in (1e-38, 1e-41, 1e-45):
        s = values(conv_net(w, (5,)), x * faint, reduce)
        assert np.isfinite(s).all() and s.min() >= 0 and s.max() <= 1


@EACH
@pytest.mark.parametrize("taps", [(1,), (2,)])
@pytest.mark.parametrize("far", [1e-8, 1e-14, 1e-25, 1e-40])
def test_weights_of_very_different_size(far: float, taps: tuple[int, ...], kernel: str) -> None:
    """Only the channel with the largest weights is dead, and those of another are smaller still than the rest."""
    rng = np.random.default_rng(45)
    x, w = rng.uniform(0.1, 1, (3, 4, 5)), rng.uniform(1, 2, (3, 4, *taps)).astype(np.float32)
    x[:, 0], w[:, 1:] = 0, w[:, 1:] * np.float32(far)
    w[:, 3] *= np.float32(far)
    want = brute(conv_windows(x, taps, {}, False), w, np.arange(4), "max" if kernel.endswith("max") else "sum")
    groups, x = nets.grouped(conv_net(w, (5,))), x.astype(np.float32)
    (group,), (layer,) = groups.prunable, consumers(groups)
    s = calibrate(groups, made_by(kernel), nets.samples(conv_net(w, (5,)), x), batch=1).layers[0].values
    assert np.isfinite(s).all() and s[0] == 0
    before = np.full(4, 0.3)
    (found,) = made_by(kernel).observe(groups, layer, x, w, {group.id: before})
    np.testing.assert_allclose(found.values, np.maximum(before, s), rtol=1e-5)
    if far > 1e-18:
        np.testing.assert_allclose(s[:3], want[:3], rtol=1e-5)
        np.testing.assert_allclose(s[3], want[3], rtol=1e-5, atol=1e-12)


# ---- events


@pytest.mark.parametrize(
    ("signed", "sign_w", "parts"), [(False, None, 2), (True, None, 4), (False, 1, 1), (False, -1, 1), (True, 1, 2)]
)
def test_events_are_live_parts_times_outputs(signed: bool, sign_w: int | None, parts: int) -> None:
    rng = np.random.default_rng(26)
    w = rng.standard_normal((3, 4, 2, 2))
    w = w if sign_w is None else sign_w * np.abs(w)
    net = conv_net(w, (4, 5))
    saliency = score(net, draw(rng, (5, 4, 4, 5), signed))
    (group,) = nets.grouped(net).prunable
    assert saliency.events(group) == saliency.layers[0].events == parts * 3 * 3 * 4


def test_events_of_samples_that_differ_in_sign() -> None:
    """However the samples are batched, all parts count."""
    rng = np.random.default_rng(27)
    net = conv_net(rng.standard_normal((3, 4, 2)), (4,))
    x = draw(rng, (2, 4, 4), False) * np.array([1, -1], np.float32)[:, None, None]
    assert score(net, x, batch=1).layers[0].events == score(net, x, batch=2).layers[0].events == 4 * 9


# ---- 1.9 (6): what the sensitivities promise, held against the pruned network itself


def test_bound_on_the_sample_set_holds_with_certainty() -> None:
    """Dropping channels changes no output of their consumer by more than the sum of their sensitivities, relative to |W||a|.

    With certainty for every sample of the set, filter and patch (K = 1), and for every sign part by itself.
    """
    rng = np.random.default_rng(28)
    net = nets.convnet(rng)
    groups, x = nets.grouped(net), rng.standard_normal((12, 3, 6, 6)).astype(np.float32)
    saliency = calibrate(groups, Sensitivity(), nets.samples(net, x))
    for group, consumer, weight in zip(groups.prunable, ["c2", "out"], ["w2", "w3"], strict=True):
        s = saliency.of(group)
        u, w = inputs_of(net, x, consumer), constant(net, weight).reshape(-1, group.size, 9).astype(np.float64)
        for _ in range(12):
            kept = np.sort(rng.choice(group.size, rng.integers(1, group.size), replace=False))
            dropped = np.setdiff1d(np.arange(group.size), kept)
            pruned = surgery(groups, Plan({group.id: Kept(group.size, kept)}))
            (before,), (after,) = nets.run(net, x, consumer), nets.run(pruned, x, consumer)
            change = np.abs(after.astype(np.float64) - before).reshape(12, len(w), -1)
            absolute = np.einsum("ock,ncka->noa", np.abs(w), np.abs(u))
            assert (change <= s[dropped].sum() * absolute + 1e-5 * absolute.max()).all()
            for sign in (1, -1):
                part = np.maximum(sign * w, 0)
                z, rest = np.einsum("ock,ncka->noa", part, u), np.einsum("ock,ncka->noa", part[:, kept], u[:, kept])
                assert (z - rest <= s[dropped].sum() * z + 1e-6 * z.max()).all()
        # And nothing smaller would do: each sensitivity is attained by some output.
        for j in range(group.size):
            share = 0.0
            for sign in (1, -1):
                part = np.maximum(sign * w, 0)
                z, mine = np.einsum("ock,ncka->noa", part, u), np.einsum("ok,nka->noa", part[:, j], u[:, j])
                share = max(share, (mine[z > 1e-6 * z.max()] / z[z > 1e-6 * z.max()]).max())
            assert s[j] == pytest.approx(share, rel=1e-4)


def inputs_of(net: onnx.ModelProto, x: Array, consumer: str) -> Array:
    """The windows [n, C, K, P] of a consumer of `nets.convnet`."""
    if consumer == "c2":
        (a,) = nets.run(net, x, "a1")
        return conv_windows(a, [3, 3], {"pads": [1, 1, 1, 1], "strides": [2, 2]}, False)
    (a,) = nets.run(net, x, "a2")
    return a.reshape(len(a), 6, 9, 1).astype(np.float64)


def test_normalisation_and_bias_matter_through_activations_only() -> None:
    """The sensitivities are those of what the consumer reads, behind BatchNormalization and Relu."""
    rng = np.random.default_rng(29)
    net, x = nets.convnet(rng), rng.standard_normal((4, 3, 6, 6)).astype(np.float32)
    w2, w3 = constant(net, "w2").reshape(6, 8, 9), constant(net, "w3").reshape(5, 6, 9)
    saliency = score(net, x)
    for layer, want in zip(
        saliency.layers,
        [brute(inputs_of(net, x, "c2"), w2, np.arange(8), "sum"), brute(inputs_of(net, x, "out"), w3, np.arange(6), "sum")],
        strict=True,
    ):
        np.testing.assert_allclose(layer.values, want, rtol=1e-4)
    # a factor on the normalised channel is a factor on its activation
    (tensor,) = (t for t in net.graph.initializer if t.name == "b2")
    tensor.CopyFrom(numpy_helper.from_array(np.zeros(6, np.float32), "b2"))
    np.testing.assert_array_equal(score(net, x).layers[0].values, saliency.layers[0].values)
    assert not np.array_equal(score(net, x).layers[1].values, saliency.layers[1].values)


@BOTH
def test_half_precision_model(reduce: Reduce) -> None:
    x = np.random.default_rng(30).standard_normal((5, 3, 6, 6)).astype(np.float32)
    full = score(nets.convnet(np.random.default_rng(31)), x, reduce)
    half = score(nets.convnet(np.random.default_rng(31), np.float16), x.astype(np.float16), reduce)
    for a, b in zip(full.layers, half.layers, strict=True):
        assert np.isfinite(b.values).all() and a.events == b.events
        np.testing.assert_allclose(b.values, a.values, rtol=0.02, atol=0.01)
