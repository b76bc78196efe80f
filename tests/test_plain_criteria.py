"""Norms of filters, mean activations and chance."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any
from unittest import mock

import nets
import numpy as np
import onnx
import pytest
from layers import Array, constant, draw

from onnxprune import runtime
from onnxprune.criteria import FPGM, L1, L2, Activation, Random
from onnxprune.passes.calibrate import calibrate


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Sessions as small as these spend most of their time on starting and stopping threads."""
    with mock.patch.object(runtime, "session", functools.partial(runtime.session, threads=1)):
        yield


# ---- the plain criteria


def norms(w: Array, name: str) -> Array:
    """Scores of filters [O, ...] straight from the definitions."""
    rows = [np.asarray(filter_, np.float64).ravel() for filter_ in w]
    if name == "fpgm":
        return np.array([sum(np.linalg.norm(a - b) for b in rows) for a in rows])
    return np.array([np.abs(a).sum() if name == "l1" else np.sqrt((a * a).sum()) for a in rows])


def plain(criterion: Any, net: onnx.ModelProto) -> dict[str, Array]:
    groups = nets.grouped(net)
    saliency = calibrate(groups, criterion)
    assert saliency.samples == 0 and saliency.data == () and not criterion.needs_data and not criterion.provable
    return {g.id: saliency.of(g) for g in groups.prunable}


@pytest.mark.parametrize("criterion", [L1(), L2(), FPGM()])
def test_filter_norms(criterion: Any) -> None:
    net = nets.convnet(np.random.default_rng(37))
    first, second = plain(criterion, net).values()
    np.testing.assert_allclose(first, norms(constant(net, "w1"), criterion.name), rtol=1e-6)
    np.testing.assert_allclose(second, norms(constant(net, "w2"), criterion.name), rtol=1e-6)


@pytest.mark.parametrize("criterion", [L1(), L2(), FPGM()])
def test_filter_norms_add_up_over_producers(criterion: Any) -> None:
    net = nets.residual(np.random.default_rng(38))
    (found,) = plain(criterion, net).values()
    want = norms(constant(net, "wa"), criterion.name) + norms(constant(net, "wb"), criterion.name)
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("criterion", [L1(), L2(), FPGM()])
@pytest.mark.parametrize("transposed", [False, True])
def test_filter_norms_of_matrices_and_transposed_convolutions(transposed: bool, criterion: Any) -> None:
    rng = np.random.default_rng(39)
    if transposed:
        w = rng.standard_normal((3, 5, 2)).astype(np.float32)  # [C, O, K]
        nodes = [("ConvTranspose", "in w", "a"), ("Conv", "a v", "out")]
        net = nets.model(nodes, {"in": ["N", 3, 4]}, "out", {"w": w, "v": rng.standard_normal((2, 5, 1))})
    else:
        w = rng.standard_normal((3, 5)).astype(np.float32)
        net = nets.model(
            [("MatMul", "in w", "a"), ("MatMul", "a v", "out")],
            {"in": ["N", 3]},
            "out",
            {"w": w, "v": rng.standard_normal((5, 2))},
        )
    (found,) = plain(criterion, net).values()
    np.testing.assert_allclose(found, norms(np.swapaxes(w, 0, 1), criterion.name), rtol=1e-6)


@pytest.mark.parametrize("criterion", [L1(), L2(), FPGM()])
def test_norm_of_a_channel_with_a_filter_in_every_group(criterion: Any) -> None:
    """A wide grouped convolution in front of another: channel j has the filters j and j + 4."""
    rng = np.random.default_rng(40)
    w = rng.standard_normal((8, 3, 1)).astype(np.float32)
    weights = {"w": w, "v": rng.standard_normal((6, 4, 1))}
    nodes = [("Conv", "in w", "a"), ("Conv", "a v", "out", {"group": 2})]
    (found,) = plain(criterion, nets.model(nodes, {"in": ["N", 3, 4]}, "out", weights)).values()
    np.testing.assert_allclose(found, norms(np.concatenate([w[:4], w[4:]], axis=1), criterion.name), rtol=1e-6)


def test_mean_activation() -> None:
    rng = np.random.default_rng(41)
    net, x = nets.convnet(rng), rng.standard_normal((7, 3, 6, 6)).astype(np.float32)
    groups = nets.grouped(net)
    saliency = calibrate(groups, Activation(), nets.samples(net, x), batch=3)
    a1, a2 = (a.astype(np.float64) for a in nets.run(net, x, "a1", "a2"))
    for group, a in zip(groups.prunable, (a1, a2), strict=True):
        np.testing.assert_allclose(saliency.of(group), np.abs(a).mean(axis=(0, 2, 3)), rtol=1e-5)
        assert saliency.events(group) == 1
    signed = nets.residual(rng)
    groups = nets.grouped(signed)
    x = rng.standard_normal((4, 3, 5, 5)).astype(np.float32)
    saliency = calibrate(groups, Activation(), nets.samples(signed, x))
    ra, rs = (np.abs(a).mean(axis=(0, 2, 3)) for a in nets.run(signed, x, "ra", "rs"))
    np.testing.assert_allclose(saliency.of(groups.prunable[0]), np.maximum(ra, rs), rtol=1e-5)


def test_mean_activation_of_signed_values_and_many_positions() -> None:
    rng = np.random.default_rng(42)
    x = draw(rng, (3, 4, 2, 3), True)
    nodes = [("Conv", "in unit", "a"), ("Flatten", "a", "f"), ("MatMul", "f w", "out")]
    net = nets.model(nodes, {"in": ["N", 4, 2, 3]}, "out", {"unit": nets.unit(4, 2), "w": rng.standard_normal((24, 2))})
    groups = nets.grouped(net)
    saliency = calibrate(groups, Activation(), nets.samples(net, x))
    np.testing.assert_allclose(saliency.of(groups.prunable[0]), np.abs(x).mean(axis=(0, 2, 3)), rtol=1e-6)


def test_chance_depends_on_the_seed_alone() -> None:
    net = nets.convnet(np.random.default_rng(43))
    again = nets.convnet(np.random.default_rng(44))  # other weights, the same groups
    first, other = plain(Random(1), net), plain(Random(2), net)
    assert first.keys() == other.keys()
    for name, s in first.items():
        np.testing.assert_array_equal(s, plain(Random(1), again)[name])
        assert not np.array_equal(s, other[name])
        assert s.min() >= 0 and s.max() < 1 and len(np.unique(s)) == len(s)
    a, b = first.values()
    assert not np.array_equal(a[: len(b)], b)
