"""Sensitivities of channels that come more than once, and of groups that lie side by side, against the reference."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from unittest import mock

import nets
import numpy as np
import pytest
from layers import EACH_AND_BOUNDS, Case, brute, check, conv_windows, draw, score, weigh

from onnxprune import runtime


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sessions as small as these spend most of their time on starting and stopping threads."""
    with mock.patch.object(runtime, "session", functools.partial(runtime.session, threads=1)):
        yield


# ---- channels that come more than once, groups that lie side by side


@EACH_AND_BOUNDS
def test_channel_that_appears_twice(kernel: str) -> None:
    rng = np.random.default_rng(9)
    x, w = draw(rng, (2, 8, 4, 4), True), weigh(rng, (3, 16, 2, 2))
    nodes = [("Conv", "in unit", "a"), ("Concat", "a a", "aa", {"axis": 1}), ("Conv", "aa w", "out")]
    net = nets.model(nodes, {"in": ["N", 8, 4, 4]}, "out", {"unit": nets.unit(8, 2), "w": w})
    u = conv_windows(np.concatenate([x, x], axis=1), [2, 2], {}, False)
    check(Case(net, x, u, w.reshape(3, 16, 4), (np.tile(np.arange(8), 2),)), kernel)


@EACH_AND_BOUNDS
def test_groups_side_by_side(kernel: str) -> None:
    """Concat(a, b, a): two groups share the denominators; one of them comes twice."""
    rng = np.random.default_rng(10)
    x, w = draw(rng, (2, 8, 5), True), weigh(rng, (4, 20, 3))
    swap = rng.standard_normal((4, 8, 1)).astype(np.float32)
    nodes = [
        ("Conv", "in unit", "a"),
        ("Conv", "in swap", "b"),
        ("Concat", "a b a", "aba", {"axis": 1}),
        ("Conv", "aba w", "out"),
    ]
    net = nets.model(nodes, {"in": ["N", 8, 5]}, "out", {"unit": nets.unit(8, 1), "swap": swap, "w": w})
    (b,) = nets.run(net, x, "b")
    u = conv_windows(np.concatenate([x, b, x], axis=1), [3], {}, False)
    first, second = np.r_[np.arange(8), [-1] * 4, np.arange(8)], np.r_[[-1] * 8, np.arange(4), [-1] * 8]
    check(Case(net, x, u, w, (first, second)), kernel)


def test_depthwise_layer_is_no_evidence() -> None:
    """Every share of a depthwise layer is 1; the channels are scored where the next dense layer reads them."""
    rng = np.random.default_rng(11)
    weights = {"unit": nets.unit(8, 1), "d": rng.uniform(0.5, 1, (8, 1, 3)), "w": weigh(rng, (3, 8, 2))}
    nodes = [("Conv", "in unit", "a"), ("Conv", "a d", "m", {"group": 8}), ("Conv", "m w", "out")]
    net = nets.model(nodes, {"in": ["N", 8, 7]}, "out", weights)
    x = draw(rng, (2, 8, 7), True)
    saliency = score(net, x)
    assert [layer.layer for layer in saliency.layers] == ["out"]
    (m,) = nets.run(net, x, "m")
    want = brute(conv_windows(m, [2], {}, False), weights["w"], np.arange(8), "sum")
    assert want.min() < 0.99
    np.testing.assert_allclose(saliency.layers[0].values, want, rtol=1e-5)


def test_largest_over_several_consumers() -> None:
    rng = np.random.default_rng(12)
    weights = {"unit": nets.unit(8, 1), "v": weigh(rng, (3, 8, 2)), "w": weigh(rng, (4, 8, 3))}
    nodes = [("Conv", "in unit", "a"), ("Conv", "a v", "p"), ("Conv", "a w", "q", {"strides": [2]})]
    weights["w"][:, 2:4] *= 3
    net = nets.model(nodes, {"in": ["N", 8, 6]}, "p q", weights)
    x = draw(rng, (3, 8, 6), True)
    saliency = score(net, x)
    v, w = weights["v"], weights["w"]
    p = brute(conv_windows(x, [2], {}, False), v, np.arange(8), "sum")
    q = brute(conv_windows(x, [3], {"strides": [2]}, False), w, np.arange(8), "sum")
    (group,) = nets.grouped(net).prunable
    np.testing.assert_allclose(saliency.of(group), np.maximum(p, q), rtol=1e-5)
    assert (p > q).any() and (q > p).any()
    assert saliency.events(group) == 4 * 3 * 5 + 4 * 4 * 2
