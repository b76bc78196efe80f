"""Quirks of exporters, 4 to 7 of the zoo's list: flattening, shapes that count channels, chunks, permutations."""

from __future__ import annotations

import numpy as np
import pytest
from quirk import (
    analysed,
    attribute,
    cut,
    holds,
    maker,
    net,
    operand,
    sizes,
    stored,
)

TAIL = "y = Conv (last, wl)"


# ---- 4. flattening


FLAT = {
    "pooled": ("p = GlobalAveragePool (r)\nf = Flatten (p)", (5, 8), {}),
    "pooled, reshaped to -1": ("p = GlobalAveragePool (r)\nf = Reshape (p, shape)", (5, 8), {"shape": [1, -1]}),
    "mean, sizes baked in": ("p = ReduceMean <axes = [2, 3]> (r)\nf = Reshape (p, shape)", (5, 8), {"shape": [1, 8]}),
    "mean, axes gone": ("p = ReduceMean <axes = [-1, -2], keepdims = 0> (r)\nf = Identity (p)", (5, 8), {}),
    "pooled by a kernel": ("p = AveragePool <kernel_shape = [4, 4]> (r)\nf = Squeeze (p, axes)", (5, 8), {"axes": [2, 3]}),
    "columns of all positions": ("f = Flatten (r)", (5, 128), {}),
    "columns, sizes baked in": ("f = Reshape (r, shape)", (5, 128), {"shape": [1, 128]}),
    "columns, batch read": ("s = Shape (r)\nn = Gather (s, zero)\nm = Unsqueeze (n, zeros)\nt = Concat <axis = 0> (m, rest)\n"
                            "f = Reshape (r, t)", (5, 128), {"zero": np.int64(0), "zeros": [0], "rest": [-1]}),
    "columns, batch read, width baked in": ("s = Shape (r)\nn = Slice (s, zeros, ones)\nt = Concat <axis = 0> (n, rest)\n"
                                            "f = Reshape (r, t)", (5, 128), {"zeros": [0], "ones": [1], "rest": [128]}),
    "NHWC columns": ("h = Transpose <perm = [0, 2, 3, 1]> (r)\nf = Flatten (h)", (5, 128), {}),
}  # fmt: skip


@pytest.mark.parametrize("how", FLAT)
def test_flattened_into_a_linear_layer(how: str) -> None:
    nodes, shape, extra = FLAT[how]
    body = f"c = Conv (x, w, b)\nr = Relu (c)\n{nodes}\ny = Gemm <transB = 1> (f, wl, bl)"
    groups = analysed(net(body, {"w": (8, 3, 3, 3), "b": (8,), "wl": shape, "bl": (5,), **extra}))
    assert sizes(groups) == [8]
    pruned = cut(groups, "c", [1, 6])
    columns = np.arange(shape[1]).reshape((4, 4, 8) if "NHWC" in how else (8, -1))
    left = np.delete(columns, [1, 6], axis=2 if "NHWC" in how else 0).ravel()
    assert np.array_equal(stored(pruned)["wl"], stored(groups.net.source)["wl"][:, left])
    holds(groups)


def test_columns_flattened_into_a_recurrent_layer() -> None:
    """A CRNN: [N, C, H, W] to a sequence over W of C*H features."""
    body = """
        c = Conv (x, w, b)
        r = Relu (c)
        t = Transpose <perm = [3, 0, 1, 2]> (r)
        f = Reshape (t, shape)
        s, last_h, last_c = LSTM <hidden_size = 5> (f, W, R)
        q = Squeeze (s, one)
        y = MatMul (q, wl)
    """
    weights = {"w": (8, 3, 3, 3), "b": (8,), "shape": [4, 1, 32], "W": (1, 20, 32), "R": (1, 20, 5), "one": [1], "wl": (5, 3)}
    groups = analysed(net(body, weights))
    assert sizes(groups) == [8, 5]
    pruned = cut(groups, "c", [0])
    assert np.array_equal(stored(pruned)["W"], stored(groups.net.source)["W"][:, :, 4:])
    assert stored(pruned)["shape"].tolist() == [4, 1, 28]
    holds(groups)


# ---- 5. channel counts in shapes


def shuffle(shapes: str) -> str:
    return f"""
        a = Conv (x, w)
        {shapes}
        t = Transpose <perm = [0, 2, 1, 3, 4]> (u)
        last = Reshape (t, whole)
    """


def test_channel_shuffle_with_the_width_in_the_constant() -> None:
    weights = {"w": (8, 3, 1, 1), "parts": [1, 2, 4, 6, 6], "whole": [1, 8, 6, 6], "wl": (4, 8, 1, 1)}
    groups = analysed(net(shuffle("u = Reshape (a, parts)") + TAIL, weights))
    assert sizes(groups) == [4]
    pruned = cut(groups, "a", [1, 5])
    assert operand(pruned, "u", 1).tolist() == [1, 2, 3, 6, 6] and operand(pruned, "last", 1).tolist() == [1, 6, 6, 6]
    holds(groups)


def test_channel_shuffle_with_the_width_computed_has_nothing_to_edit() -> None:
    shapes = """
        s = Shape <start = 1, end = 2> (a)
        half = Div (s, two)
        parts = Concat <axis = 0> (one, two, half, side, side)
        whole = Concat <axis = 0> (one, s, side, side)
        u = Reshape (a, parts)
    """
    constants = {"one": [1], "two": [2], "side": [6]}
    groups = analysed(net(shuffle(shapes) + TAIL, {"w": (8, 3, 1, 1), "wl": (4, 8, 1, 1), **constants}))
    assert sizes(groups) == [4]
    pruned = holds(groups)
    assert {name: stored(pruned)[name].tolist() for name in constants} == constants


def test_group_normalisation_decomposed() -> None:
    """torch before opset 18: Reshape to [N, groups, -1], InstanceNormalization, Reshape back, scale and shift."""
    body = """
        a = Conv (x, w)
        g = Reshape (a, groups)
        i = InstanceNormalization (g, ones, zeros)
        s = Shape (a)
        back = Reshape (i, s)
        m = Mul (back, gamma)
        last = Add (m, beta)
    """
    weights = {"w": (8, 3, 1, 1), "groups": [0, 4, -1], "ones": np.ones(4, np.float32), "zeros": np.zeros(4, np.float32)}
    groups = analysed(net(body + TAIL, {**weights, "gamma": (8, 1, 1), "beta": (8, 1, 1), "wl": (4, 8, 1, 1)}))
    assert sizes(groups) == [4]  # a group is normalised as a whole, so its two channels go together
    pruned = cut(groups, "a", [2, 3])
    assert operand(pruned, "g", 1).tolist() == [0, 3, -1] and stored(pruned)["ones"].shape == (3,)
    holds(groups)


def heads(split: str, merge: str) -> str:
    """A value path of four heads of width two: split, weighted over the sequence, merged."""
    return f"""
        v = MatMul (x, wv)
        {split}
        t = Transpose <perm = [0, 2, 1, 3]> (h)
        m = MatMul (mix, t)
        b = Transpose <perm = [0, 2, 1, 3]> (m)
        {merge}
        y = MatMul (o, wo)
    """


HEADS = {
    "constants": ("h = Reshape (v, parts)", "o = Reshape (b, whole)", {"parts": [1, 3, 4, 2], "whole": [1, 3, 8]}),
    "-1": ("h = Reshape (v, parts)", "o = Reshape (b, whole)", {"parts": [0, 0, -1, 2], "whole": [0, 0, -1]}),
    "computed": (
        "s = Shape <start = 2> (v)\nd = Div (s, four)\np = Concat <axis = 0> (rest, four, d)\nh = Reshape (v, p)",
        "q = Concat <axis = 0> (rest, s)\no = Reshape (b, q)",
        {"four": [4], "rest": [0, 0]},
    ),
}


@pytest.mark.parametrize("how", HEADS)
def test_attention_heads(how: str) -> None:
    split, merge, extra = HEADS[how]
    groups = analysed(net(heads(split, merge), {"wv": (6, 8), "wo": (8, 5), "mix": (1, 1, 3, 3), **extra}, x="float[1,3,6] x"))
    assert sizes(groups) == [4]
    holds(groups)


def test_expand_to_a_shape_that_counts_channels() -> None:
    """A constant stretched over the channels that it meets, to a number and by the legacy exporter's Where."""
    body = """
        a = Conv (x, w)
        e = Expand (one, shape)
        p = Add (a, e)
        n = Shape (wanted)
        fill = ConstantOfShape <value = int64[1] {1}> (n)
        minus = Mul (fill, less)
        is = Equal (wanted, minus)
        target = Where (is, fill, wanted)
        k = Expand (row, target)
        last = Mul (p, k)
    """
    weights = {"w": (8, 3, 1, 1), "one": (1, 1, 1, 1), "shape": [1, 8, 6, 6], "wanted": [1, 8, -1, -1], "less": [-1]}
    groups = analysed(net(body + TAIL, {**weights, "row": (1, 8, 1, 1), "wl": (4, 8, 1, 1)}))
    assert sizes(groups) == [8]
    pruned = holds(groups)
    assert operand(pruned, "e", 1).tolist() == [1, 4, 6, 6]


# ---- 6. chunk and split


CHUNKS = {
    "slices": (13, "p = Slice (a, c0, c4, axis)\nq = Slice (a, c4, c8, axis)", {"c0": [0], "c4": [4], "c8": [8], "axis": [1]}),
    "slices to the end": (13, "p = Slice (a, c0, c4, axis)\nq = Slice (a, c4, end, axis)",
                          {"c0": [0], "c4": [4], "end": [2**63 - 1], "axis": [-3]}),
    "slices by attributes": (9, "p = Slice <axes = [1], starts = [0], ends = [4]> (a)\n"
                             "q = Slice <axes = [1], starts = [-4], ends = [2147483647]> (a)", {}),
    "split by sizes": (13, "p, q = Split <axis = 1> (a, halves)", {"halves": [4, 4]}),
    "split by an attribute": (11, "p, q = Split <axis = 1, split = [4, 4]> (a)", {}),
    "split evenly": (13, "p, q = Split <axis = 1> (a)", {}),
    "num_outputs": (18, "p, q = Split <axis = 1, num_outputs = 2> (a)", {}),
}  # fmt: skip


@pytest.mark.parametrize("how", CHUNKS)
def test_halves_are_cut_apart(how: str) -> None:
    """Of the first half 1, of the second 3 channels go: an even re-split would load, run, and be wrong."""
    opset, nodes, extra = CHUNKS[how]
    body = f"a = Conv (x, w)\n{nodes}\nr = Conv (p, wp)\nlast = Conv (q, wq)\ny = Add (r, last)"
    groups = analysed(net(body, {"w": (8, 3, 1, 1), "wp": (2, 4, 1, 1), "wq": (2, 4, 1, 1), **extra}, opset=opset))
    assert sizes(groups) == [4, 4]
    pruned = cut(groups, "a", [2, 4, 5, 7])
    if how == "num_outputs":
        assert attribute(pruned, "p", "num_outputs") is None
    if opset >= 13 and "split" in how + maker(pruned, "p").op_type.lower():
        assert operand(pruned, "p", 1).tolist() == [3, 1]
    holds(groups)


@pytest.mark.parametrize("how", CHUNKS)
def test_halves_of_a_gate_stay_together(how: str) -> None:
    """GLU: the two halves are multiplied, so that they lose the same positions."""
    opset, nodes, extra = CHUNKS[how]
    body = f"a = Conv (x, w)\n{nodes}\ng = Sigmoid (q)\nlast = Mul (p, g)\n{TAIL}"
    groups = analysed(net(body, {"w": (8, 3, 1, 1), "wl": (2, 4, 1, 1), **extra}, opset=opset))
    assert sizes(groups) == [4]
    pruned = cut(groups, "a", [1])
    assert np.array_equal(stored(pruned)["w"], np.delete(stored(groups.net.source)["w"], [1, 5], axis=0))
    holds(groups)


# ---- 7. permutations


ORDER = [3, 0, 7, 5, 1, 2, 6, 4]
PERMUTED = {
    "Gather": ("last = Gather <axis = 1> (a, order)", {"order": ORDER}),
    "Gather from the end": ("last = Gather <axis = -3> (a, order)", {"order": [i - 8 for i in ORDER]}),
    "GatherND": (
        "t = Transpose <perm = [1, 0, 2, 3]> (a)\ng = GatherND (t, order)\nlast = Transpose <perm = [1, 0, 2, 3]> (g)",
        {"order": np.array(ORDER, np.int64).reshape(8, 1)},
    ),
    "Slice backwards": (
        "last = Slice (a, start, end, axis, step)",
        {"start": [-1], "end": [-(2**63)], "axis": [1], "step": [-1]},
    ),
}


@pytest.mark.parametrize("how", PERMUTED)
def test_a_permutation_of_the_channels(how: str) -> None:
    nodes, extra = PERMUTED[how]
    groups = analysed(net(f"a = Conv (x, w)\n{nodes}\n{TAIL}", {"w": (8, 3, 1, 1), "wl": (2, 8, 1, 1), **extra}))
    assert sizes(groups) == [8]
    pruned = cut(groups, "a", [3, 5])
    order = ORDER if "Gather" in how else list(range(8))[::-1]
    left = [k for k, source in enumerate(order) if source not in (3, 5)]
    assert np.array_equal(stored(pruned)["wl"], stored(groups.net.source)["wl"][:, left])
    holds(groups)


@pytest.mark.parametrize("times", [2, 3])
def test_a_tensor_concatenated_with_itself(times: int) -> None:
    body = f"a = Conv (x, w)\nlast = Concat <axis = 1> ({', '.join(['a'] * times)})\n{TAIL}"
    groups = analysed(net(body, {"w": (8, 3, 1, 1), "wl": (2, 8 * times, 1, 1)}))
    assert sizes(groups) == [8]
    pruned = cut(groups, "a", [2])
    gone = [2 + 8 * k for k in range(times)]
    assert np.array_equal(stored(pruned)["wl"], np.delete(stored(groups.net.source)["wl"], gone, axis=1))
    holds(groups)
