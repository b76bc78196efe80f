"""Deformable convolution, with one run of offsets or several, grouped and depthwise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from nets import samples
from test_rules import attribute, build, cut, holds, prunable, seeded, shape, together, w, why

from onnxprune.contraction import normal_form
from onnxprune.criteria import Sensitivity
from onnxprune.groups import Groups
from onnxprune.passes.calibrate import calibrate

__all__ = ["seeded"]  # every test draws the same weights

LAST = ("Conv", "b wl", "y")


def deformed(opset: int = 19, *, group: int = 1, runs: int = 1, reads: str = "a wd o bd m", out: int = 6) -> Groups:
    """A deformable 3x3 convolution of eight channels [1, 8, 6, 6] -> [1, out, 4, 4]."""
    attributes: dict[str, Any] = {"group": group, "offset_group": runs, "kernel_shape": [3, 3]}
    weights = {"wd": w(out, 8 // group, 3, 3), "bd": w(out), "wl": w(2, out, 1, 1)}
    places = {"o": 0.7 * w(1, runs * 18, 4, 4), "m": np.abs(w(1, runs * 9, 4, 4))}
    return build([("DeformConv", reads, "b", attributes), LAST], {**weights, **places}, opset=opset)


@pytest.mark.parametrize("opset", [19, 22])
@pytest.mark.parametrize("reads", ["a wd o", "a wd o bd", "a wd o - m", "a wd o bd m"])
def test_a_deformable_convolution(opset: int, reads: str) -> None:
    g = deformed(opset, reads=reads)
    assert together(g, "a.1[3]", "wd.1[3]")
    assert together(g, "b.1[3]", "wd.0[3]", "wl.1[3]", *(["bd.0[3]"] if "bd" in reads else []))
    assert (prunable(g, "a"), prunable(g, "b")) == (8, 6)
    assert shape(cut(g, "a.1", [0, 5]), "wd") == (6, 6, 3, 3)
    holds(g)


def test_runs_of_channels_with_offsets_of_their_own_keep_equally_many() -> None:
    g = deformed(runs=2)
    assert together(g, "a.1[1]", "a.1[5]")
    assert prunable(g, "a") == 4
    holds(g)


@pytest.mark.parametrize(("group", "runs", "out", "units"), [(2, 1, 6, 4), (8, 1, 8, 8), (8, 2, 8, 4), (4, 2, 8, 2)])
def test_a_grouped_deformable_convolution(group: int, runs: int, out: int, units: int) -> None:
    g = deformed(group=group, runs=runs, out=out)
    assert prunable(g, "a") == units
    pruned = holds(g)
    assert attribute(pruned, "b", "group") == (2 if group == 2 else group - group // units)


def test_offsets_made_by_channels_keep_them() -> None:
    nodes = [("Conv", "x wo", "o"), ("DeformConv", "a wd o", "b"), LAST]
    g = build(nodes, {"wo": w(18, 3, 3, 3), "wd": w(6, 8, 3, 3), "wl": w(2, 6, 1, 1)}, opset=19)
    assert why(g, "o") == "DeformConv 'b' mixes its positions"
    assert prunable(g, "a") == 8
    holds(g)


def test_the_sensitivity_bounds_every_share() -> None:
    """Against the largest share over the taps that the offsets select, computed one by one."""
    g = deformed(reads="a wd o bd m")
    layer = next(x for x in g.layers if x.op == "DeformConv")
    x, weight = np.abs(w(1, 8, 6, 6)), np.abs(w(6, 8, 3, 3))
    sampled = np.zeros((8, 3, 3))  # one patch: every tap reads a mean of four positions
    rng = np.random.default_rng(0)
    for i, j in np.ndindex(3, 3):
        at, share = rng.integers(0, 6, (4, 2)), rng.dirichlet(np.ones(4))
        sampled[:, i, j] = sum(s * x[0, :, p, q] for s, (p, q) in zip(share, at, strict=True))
    terms = (weight * sampled).sum(axis=(2, 3))
    shares = (terms / terms.sum(axis=1, keepdims=True)).max(axis=0)
    bound = np.zeros(8)
    for c in normal_form(g, layer, x, weight):
        parts = c.w[None, :, :, 0, None] * c.x[:, None]  # [n, O * taps, I, positions]
        bound = np.maximum(bound, (parts / parts.sum(axis=2, keepdims=True)).max(axis=(0, 1, 3)))
    assert (shares <= bound + 1e-6).all()
    assert bound.max() < 1


def test_its_channels_are_scored() -> None:
    g = deformed()
    feeds = np.random.default_rng(0).standard_normal((3, 3, 6, 6)).astype(np.float32)
    scores = calibrate(g, Sensitivity(), samples(g.net.model, feeds))
    found = next(x for x in scores.layers if x.layer == "b")
    assert found.values.shape == (8,)
    assert ((found.values > 0) & (found.values <= 1)).all()
