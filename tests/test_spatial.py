"""Sampling, folding, resizing and transforming: every channel by itself, and the sizes that count channels follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_rules import LAST, build, cut, holds, ints, operand, prunable, seeded, together, w, why

__all__ = ["seeded"]  # every test draws the same weights

MS = {"domain": "com.microsoft"}


def grid(*shape: int) -> Any:
    return np.random.default_rng(0).uniform(-1.2, 1.2, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("domain", "opset", "mode"),
    [("", 16, "bilinear"), ("", 20, "linear"), ("", 22, "cubic"), ("com.microsoft", 18, "bilinear")],
)
def test_grid_sample(domain: str, opset: int, mode: str) -> None:
    g = build(
        [("GridSample", "a k", "b", {"mode": mode, "domain": domain}), LAST],
        {"k": grid(1, 4, 5, 2), "wl": w(4, 8, 1, 1)},
        opset=opset,
    )
    assert together(g, "a.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


def test_a_grid_made_by_channels_keeps_them() -> None:
    nodes = [("Conv", "x wg", "c"), ("Transpose", "c", "k", {"perm": [0, 2, 3, 1]}), ("GridSample", "a k", "b"), LAST]
    g = build(nodes, {"wg": w(2, 3, 1, 1), "wl": w(4, 8, 1, 1)})
    assert why(g, "c") == "GridSample 'b' mixes its positions"
    assert prunable(g, "a") == 8
    holds(g)


def test_grid_sample_in_space() -> None:
    nodes = [("GridSample", "a k", "b", {"mode": "linear"}), ("Conv", "b wl", "y")]
    holds(build(nodes, {"k": grid(1, 3, 2, 4, 3), "wl": w(4, 8, 1, 1, 1)}, opset=20, x=(1, 3, 4, 4, 4)))


@pytest.mark.parametrize("opset", [10, 16])
def test_roi_align(opset: int) -> None:
    weights = {"r": np.array([[0, 0, 4, 4], [1, 2, 5, 5]], np.float32), "n": ints(0, 0), "wl": w(4, 8, 1, 1)}
    nodes = [("RoiAlign", "a r n", "b", {"output_height": 3, "output_width": 2, "sampling_ratio": 2}), LAST]
    g = build(nodes, weights, opset=opset)
    assert together(g, "a.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


def test_max_roi_pool() -> None:
    weights = {"r": np.array([[0, 0, 0, 4, 4], [0, 1, 2, 5, 5]], np.float32), "wl": w(4, 8, 1, 1)}
    g = build([("MaxRoiPool", "a r", "b", {"pooled_shape": [2, 2]}), LAST], weights)
    assert together(g, "a.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


def test_crop_and_resize() -> None:
    weights = {
        "r": np.array([[0, 0, 0.5, 0.5]], np.float32),
        "n": np.zeros(1, np.int32),
        "s": np.array([3, 4], np.int32),
        "wl": w(4, 8, 1, 1),
    }
    g = build([("CropAndResize", "a r n s", "b", MS), LAST], weights)
    assert together(g, "a.1[3]", "b.1[3]", "wl.1[3]")
    holds(g)


# ---- indices that count through the channels


POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}


@pytest.mark.parametrize("opset", [9, 11, 22])
@pytest.mark.parametrize("sized", [False, True])
def test_max_unpool_counts_like_the_pooling_whose_channels_it_has(opset: int, sized: bool) -> None:
    """An encoder and a decoder: the channels between them are others, but as many as the pooling has."""
    nodes = [("MaxPool", "a", "p i", POOL), ("Conv", "p w2", "c"), ("MaxUnpool", f"c i{' s' * sized}", "b", POOL), LAST]
    weights = {"w2": w(8, 8, 1, 1), "wl": w(4, 8, 1, 1), **({"s": ints(1, 8, 6, 6)} if sized else {})}
    g = build(nodes, weights, opset=opset)
    assert together(g, "a.1[3]", "p.1[3]", "i.1[3]", "w2.1[3]", "w2.0[3]", "b.1[3]", "wl.1[3]")
    pruned = cut(g, "a.1", [3, 5])
    if sized:
        assert operand(pruned, "b", 2) == [1, 6, 6, 6]
    holds(g)


def test_indices_of_a_pooling_that_something_else_reads_freeze() -> None:
    nodes = [("MaxPool", "a", "p i", POOL), ("Cast", "i", "f", {"to": 1}), ("Add", "p f", "b"), LAST]
    g = build(nodes, {"wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "MaxPool 'p' also outputs indices, which count through the channels"
    nodes = [("MaxPool", "a", "p i", POOL), ("MaxUnpool", "p i s", "b", POOL), LAST]
    g = build(nodes, {"s": ints(1, 8, 7, 7), "wl": w(4, 8, 1, 1)})  # counted in planes of another size
    assert why(g, "a") == "MaxUnpool 'b' writes to places that are counted through the channels"
    nodes = [("MaxUnpool", "a k", "b", POOL), LAST]
    places = np.arange(8 * 36).reshape(1, 8, 6, 6) * 4
    g = build(nodes, {"k": places, "wl": w(4, 8, 1, 1)})
    assert why(g, "a") == "MaxUnpool 'b' writes to places that are counted through the channels"


# ---- folding, cropping, transforms


def test_col2im_makes_a_channel_of_a_run() -> None:
    nodes = [("Reshape", "a s", "f"), ("Col2Im", "f image block", "b", {"strides": [2, 1]}), LAST]
    weights = {"s": ints(1, 8, 36), "image": ints(12, 6), "block": ints(2, 1), "wl": w(3, 4, 1, 1)}
    g = build(nodes, weights)
    assert together(g, "a.1[6]", "a.1[7]", "b.1[3]", "wl.1[3]")
    assert prunable(g, "b") == 4
    holds(g)


@pytest.mark.parametrize(
    ("target", "axes", "after"), [([4, 9], [2, 3], None), ([1, 8, 4, 9], None, [1, 7, 4, 9]), ([9, 8], [-1, 1], [9, 7])]
)
def test_center_crop_pad(target: list[int], axes: list[int] | None, after: list[int] | None) -> None:
    nodes = [("CenterCropPad", "a s", "b", {"axes": axes} if axes else {}), LAST]
    g = build(nodes, {"s": ints(*target), "wl": w(4, 8, 1, 1)})
    pruned = cut(g, "a.1", [2])
    assert operand(pruned, "b", 1) == (after or target)
    holds(g)


def test_center_crop_pad_of_the_channels_freezes_them() -> None:
    g = build([("CenterCropPad", "a s", "b", {"axes": [1]}), LAST], {"s": ints(6), "wl": w(4, 6, 1, 1)})
    assert why(g, "a") == "CenterCropPad 'b' mixes its positions"


def test_a_grid_for_a_size_does_not_mind_the_channels() -> None:
    nodes = [("Shape", "a", "s"), ("AffineGrid", "theta s", "k"), ("GridSample", "a k", "b"), LAST]
    g = build(nodes, {"theta": w(1, 2, 3), "wl": w(4, 8, 1, 1)}, opset=20)
    assert prunable(g, "a") == 8
    holds(g)
    nodes = [("Transpose", "a", "t", {"perm": [0, 2, 1, 3]}), ("Shape", "t", "s"), *nodes[1:]]
    g = build(nodes, {"theta": w(1, 2, 3), "wl": w(4, 8, 1, 1)}, opset=20)
    assert why(g, "a") == "AffineGrid 'k' makes a grid of its size"


@pytest.mark.parametrize(
    ("opset", "reads", "attributes"),
    [(17, "u", {"axis": 2}), (20, "u", {}), (20, "u - ax", {}), (20, "u n ax", {"onesided": 1})],
)
def test_the_discrete_fourier_transform(opset: int, reads: str, attributes: dict[str, Any]) -> None:
    last = 3 if opset == 20 and reads == "u" else 2
    nodes = [("Unsqueeze", "a end", "u"), ("DFT", reads, "d", attributes), ("ReduceSum", "d end", "b", {"keepdims": 0}), LAST]
    g = build(nodes, {"end": ints(4), "n": np.array(6), "ax": np.array(2), "wl": w(4, 8, 1, 1)}, opset=opset)
    assert together(g, "a.1[3]", "d.1[3]", "wl.1[3]")
    assert g.net.shapes["d"][last] in (6, 4)
    holds(g)


@pytest.mark.parametrize(("opset", "reads", "attributes"), [(17, "u", {}), (20, "u - ax", {})])
def test_a_transform_of_the_channels_freezes_them(opset: int, reads: str, attributes: dict[str, Any]) -> None:
    nodes = [("Unsqueeze", "a end", "u"), ("DFT", reads, "d", attributes), ("ReduceSum", "d end", "b", {"keepdims": 0}), LAST]
    g = build(nodes, {"end": ints(4), "ax": np.array(-4), "wl": w(4, 8, 1, 1)}, opset=opset)
    assert why(g, "a") == "DFT 'd' mixes its positions"


def test_the_short_time_fourier_transform_of_many_signals() -> None:
    nodes = [
        ("Reshape", "a s", "f"),
        ("STFT", "f step window", "d", {"onesided": 1}),
        ("Einsum", "d wl", "y", {"equation": "ctfz,cd->dtfz"}),
    ]
    weights = {"s": ints(8, 36, 1), "step": np.array(4), "window": w(8), "wl": w(8, 2)}
    g = build(nodes, weights)
    assert together(g, "a.1[3]", "d.0[3]", "wl.0[3]")
    holds(g)


@pytest.mark.parametrize(("op", "domain", "opset"), [("Det", "", 11), ("Det", "", 22), ("Inverse", "com.microsoft", 18)])
def test_a_matrix_for_every_channel(op: str, domain: str, opset: int) -> None:
    last = LAST if op == "Inverse" else ("MatMul", "b wm", "y")
    g = build([(op, "a", "b", {"domain": domain}), last], {"wl": w(4, 8, 1, 1), "wm": w(8, 2)}, opset=opset)
    assert together(g, "a.1[3]", "b.1[3]")
    holds(g)
    nodes = [
        ("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}),
        ("Slice", "t zero six end", "u"),
        (op, "u", "b", {"domain": domain}),
    ]
    g = build([*nodes, ("Identity", "b", "y")], {"zero": ints(0), "six": ints(6), "end": ints(3)}, opset=max(opset, 13))
    assert f"{op} 'b' mixes its positions" in {x.reason for x in g.groups}


def test_unfolding_space() -> None:
    nodes = [
        ("UnfoldTensor", "a", "u", {"dim": 2, "size": 3, "step": 1, **MS}),
        ("ReduceSum", "u end", "b", {"keepdims": 0}),
        LAST,
    ]
    g = build(nodes, {"end": ints(-1), "wl": w(4, 8, 1, 1)})
    assert together(g, "a.1[3]", "u.1[3]", "wl.1[3]")
    holds(g)
    nodes = [("UnfoldTensor", "a", "u", {"dim": 1, "size": 3, **MS}), ("ReduceSum", "u end", "b", {"keepdims": 0}), LAST]
    g = build(nodes, {"end": ints(-1), "wl": w(4, 6, 1, 1)})
    assert why(g, "a") == "UnfoldTensor 'u' mixes its positions"


# ---- Resize: what looks whole may not be


def resize(attributes: dict[str, Any], reads: str = "a - sc", **weights: Any) -> Any:
    return build([("Resize", reads, "b", attributes), LAST], {"wl": w(4, 8, 1, 1), **weights})


@pytest.mark.parametrize("scale", [1.05, 0.96])
def test_a_scale_that_leaves_the_size_still_moves_the_channels(scale: float) -> None:
    size = 8 if scale > 1 else 7
    weights = {"sc": np.array([1, scale, 1, 1], np.float32), "wl": w(4, size, 1, 1)}
    g = build([("Resize", "a - sc", "b", {"mode": "linear"}), LAST], weights)
    assert why(g, "a") == f"Resize 'b' {'does not keep its positions' if size == 8 else 'mixes its positions'}"


def test_scales_that_are_joined_of_constants_are_known() -> None:
    nodes = [("Cast", "one", "f", {"to": 1}), ("Concat", "f two", "sc", {"axis": 0}), ("Resize", "a - sc", "b"), LAST]
    holds(build(nodes, {"one": ints(1, 1), "two": np.full(2, 2, np.float32), "wl": w(4, 8, 1, 1)}))
    nodes = [("Concat", "one two", "sc", {"axis": 0}), ("Resize", "a - sc", "b", {"mode": "nearest"}), LAST]
    ones = np.ones(2, np.float32)
    holds(build(nodes, {"one": ones, "two": 2 * ones, "wl": w(4, 8, 1, 1)}))
    nodes = [
        ("ReduceMax", "x", "m", {"keepdims": 0}),
        ("Greater", "m far", "g"),
        ("Cast", "g", "h", {"to": 1}),
        ("Reshape", "h z", "i"),
        ("Concat", "one i two", "sc", {"axis": 0}),
        ("Resize", "a - sc", "b"),
        LAST,
    ]
    weights = {"one": ones[:1], "two": 2 * ones, "far": np.float32(-99), "z": ints(1), "wl": w(4, 8, 1, 1)}
    assert why(build(nodes, weights), "a") == "Resize 'b' computes its scales at run time"


@pytest.mark.parametrize(("roi", "frozen"), [([0, 0, 0, 0, 1, 1, 0.5, 0.5], False), ([0, 0.1, 0, 0, 1, 1, 1, 1], True)])
def test_cropping_a_region(roi: Sequence[float], frozen: bool) -> None:
    mode = {"coordinate_transformation_mode": "tf_crop_and_resize", "mode": "linear"}
    g = resize(mode, "a roi sc", roi=np.array(roi, np.float32), sc=np.array([1, 1, 0.5, 0.5], np.float32))
    if frozen:
        assert why(g, "a") == "Resize 'b' does not keep its positions"
    else:
        holds(g)


@pytest.mark.parametrize("policy", ["not_larger", "not_smaller"])
def test_an_aspect_ratio_that_is_kept_is_that_of_all_axes(policy: str) -> None:
    attributes = {"mode": "linear", "keep_aspect_ratio_policy": policy}
    g = resize({**attributes, "axes": [2, 3]}, "a - - sz", sz=ints(9, 12))
    holds(g)
    g = resize({**attributes, "axes": [1, 2, 3]}, "a - - sz", sz=ints(8, 6, 6))
    assert why(g, "a") == "Resize 'b' does not keep its positions"


@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
@pytest.mark.parametrize("where", ["half_pixel", "half_pixel_symmetric", "align_corners", "asymmetric", "pytorch_half_pixel"])
def test_every_way_to_interpolate(mode: str, where: str) -> None:
    if mode == "cubic" and where == "half_pixel_symmetric":
        mode = "linear"
    attributes = {"mode": mode, "coordinate_transformation_mode": where}
    nodes = [("Resize", "a - sc", "b", attributes), LAST]
    holds(build(nodes, {"sc": np.array([1, 1, 1.5, 2], np.float32), "wl": w(4, 8, 1, 1)}, opset=19), 1)


@pytest.mark.parametrize(("op", "opset"), [("Upsample", 7), ("Upsample", 9), ("Resize", 10), ("Resize", 11)])
def test_old_forms_of_resize(op: str, opset: int) -> None:
    scales = np.array([1, 1, 2, 2], np.float32)
    if opset == 7:
        g = build([(op, "a", "b", {"scales": scales.tolist()}), LAST], {"wl": w(4, 8, 1, 1)}, opset=7)
    else:
        g = build(
            [(op, "a sc" if opset < 11 else "a none sc", "b"), LAST],
            {"sc": scales, "none": np.empty(0, np.float32), "wl": w(4, 8, 1, 1)},
            opset=opset,
        )
    assert prunable(g, "a") == 8
    holds(g)
