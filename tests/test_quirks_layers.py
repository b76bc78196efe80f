"""Quirks of exporters, 9, 10 and 12 of the zoo's list: batch normalisation, biases, recurrent layers."""

from __future__ import annotations

import numpy as np
import pytest
from quirk import (
    analysed,
    attribute,
    cut,
    filled,
    free,
    holds,
    mentioned,
    net,
    norm,
    operand,
    sizes,
    stored,
    why,
)

TAIL = "y = Conv (last, wl)"
BATCH_NORM = "BatchNormalization ({}, n_s, n_b, n_m, n_v)"


# ---- 9. batch normalisation


NORMED = {
    "folded": ("last = Conv (x, w, b)", {}),
    "kept": (f"c = Conv (x, w, b)\nn = {BATCH_NORM.format('c')}\nlast = Relu (n)", {}),
    "before the convolution": (f"c = Conv (x, w, b)\nr = Relu (c)\nlast = {BATCH_NORM.format('r')}", {}),
    "after a transposed convolution": (f"t = ConvTranspose <strides = [2, 2]> (x, wt)\nlast = {BATCH_NORM.format('t')}",
                                       {"wt": (3, 8, 2, 2)}),
    "as Mul and Add": ("c = Conv (x, w, b)\nm = Mul (c, scale)\nlast = Add (m, shift)",
                       {"scale": (1, 8, 1, 1), "shift": (8, 1, 1)}),
    "as Mul and Add, constants first": ("c = Conv (x, w, b)\nm = Mul (scale, c)\nlast = Add (shift, m)",
                                        {"scale": (8, 1, 1), "shift": (1, 8, 1, 1)}),
    "spelt out": ("""
        c = Conv (x, w, b)
        d = Sub (c, m)
        e = Add (v, t)
        s = Sqrt (e)
        q = Div (d, s)
        p = Mul (q, g)
        last = Add (p, h)
    """, {"m": (8, 1, 1), "v": np.abs(filled("v", (8, 1, 1))), "t": 1e-5, "g": (8, 1, 1), "h": (8, 1, 1)}),
}  # fmt: skip


@pytest.mark.parametrize("how", NORMED)
def test_batch_norm(how: str) -> None:
    nodes, extra = NORMED[how]
    weights = {"w": (8, 3, 1, 1), "b": (8,), **norm("n", 8), "wl": (2, 8, 1, 1), **extra}
    groups = analysed(net(f"{nodes}\n{TAIL}", mentioned(f"{nodes}\n{TAIL}", weights)))
    assert sizes(groups) == [8]
    pruned = cut(groups, "last", [4])
    assert all(v.shape.count(7) == 1 for k, v in stored(pruned).items() if k != "t")
    holds(groups)


def test_batch_norm_on_the_input_keeps_its_channels() -> None:
    """MXNet normalises the pixels: the input's channels are not the network's to cut."""
    body = "n = BatchNormalization (x, n_s, n_b, n_m, n_v)\nlast = Conv (n, w)\n" + TAIL
    groups = analysed(net(body, {**norm("n", 3), "w": (8, 3, 1, 1), "wl": (2, 8, 1, 1)}))
    assert sizes(groups) == [8]
    assert "graph input 'x'" in why(groups, "n")
    holds(groups)


def test_batch_norms_that_are_kept_because_their_convolution_is_shared() -> None:
    """RetinaNet-like: one convolution, a norm of its own for each level; all of them lose the same channels."""
    body = """
        p = MaxPool <kernel_shape = [2, 2]> (x)
        c0 = Conv (x, w)
        n0 = BatchNormalization (c0, n_s, n_b, n_m, n_v)
        y0 = Conv (n0, wl)
        c1 = Conv (p, w)
        n1 = BatchNormalization (c1, k_s, k_b, k_m, k_v)
        y1 = Conv (n1, wl)
    """
    weights = {"w": (8, 3, 1, 1), **norm("n", 8), **norm("k", 8), "wl": (2, 8, 1, 1)}
    groups = analysed(net(body, weights, y="y0 y1"))
    assert sizes(groups) == [8]
    pruned = holds(groups)
    assert {stored(pruned)[f"{name}_{k}"].shape for name in "nk" for k in "sbmv"} == {(4,)}


@pytest.mark.parametrize("linear", ["Gemm <transB = 1> (x, w, b)", "MatMul (x, wt)"])
def test_batch_norm_after_a_linear_layer(linear: str) -> None:
    body = f"h = {linear}\nn = {BATCH_NORM.format('h')}\nr = Relu (n)\ny = MatMul (r, wl)"
    weights = {"w": (8, 6), "b": (8,), "wt": (6, 8), **norm("n", 8), "wl": (8, 2)}
    groups = analysed(net(body, mentioned(body, weights), x="float[5,6] x"))
    assert sizes(groups) == [8]
    holds(groups)


NHWC = {
    "Mul and Add": "m = Mul (h, n_s)\nn = Add (m, n_b)",
    "transposed for it": f"""
        i = Transpose <perm = [0, 3, 1, 2]> (h)
        j = {BATCH_NORM.format("i")}
        n = Transpose <perm = [0, 2, 3, 1]> (j)
    """,
    "flattened for it": f"i = Reshape (h, rows)\nj = {BATCH_NORM.format('i')}\nn = Reshape (j, back)",
}


@pytest.mark.parametrize("how", NHWC)
def test_batch_norm_on_channels_last(how: str) -> None:
    """Keras: the tensors are NHWC, each convolution stands between two Transposes."""
    body = f"""
        a = Transpose <perm = [0, 3, 1, 2]> (x)
        c = Conv (a, w)
        h = Transpose <perm = [0, 2, 3, 1]> (c)
        {NHWC[how]}
        r = Relu (n)
        last = Transpose <perm = [0, 3, 1, 2]> (r)
    """
    weights = {"w": (8, 3, 1, 1), **norm("n", 8), "rows": [-1, 8], "back": [1, 6, 6, 8], "wl": (2, 8, 1, 1)}
    groups = analysed(net(body + TAIL, mentioned(body + TAIL, weights), x="float[1,6,6,3] x"))
    assert sizes(groups) == [8]
    pruned = holds(groups)
    if how == "flattened for it":
        assert operand(pruned, "i", 1).tolist() == [-1, 4] and operand(pruned, "n", 1).tolist() == [1, 6, 6, 4]


# The weight is normalised over its inputs: each filter has numbers of its own, so the filters can go.
ON_WEIGHTS = {
    "BatchNormalization": f"u = Reshape (w, flat)\nv = {BATCH_NORM.format('u')}\nk = Reshape (v, s)",
    "Mul": "k = Mul (w, scale)",
    "Sub and Mul": "v = Sub (w, scale)\nk = Mul (v, scale)",
    "weight norm": "q = ReduceL2 <axes = [1, 2, 3]> (w)\nv = Div (w, q)\nk = Mul (v, scale)",
    "standardised": "q = ReduceMean <axes = [1, 2, 3]> (w)\nv = Sub (w, q)\nk = Mul (v, scale)",
}


@pytest.mark.parametrize("how", ON_WEIGHTS)
def test_batch_norm_on_the_weights(how: str) -> None:
    """The second convolution's weight is computed. Its filters go; what it sums over goes where zeros stay zeros."""
    body = f"""
        a = Conv (x, wa)
        {ON_WEIGHTS[how]}
        last = Conv (a, k)
    """
    weights = {
        "wa": (6, 3, 1, 1),
        "w": (8, 6, 3, 3),
        "flat": [1, 8, -1],
        "s": [8, 6, 3, 3],
        **norm("n", 8),
        "scale": (8, 1, 1, 1),
    }
    groups = analysed(net(body + TAIL, {**mentioned(body, weights), "wl": (2, 8, 1, 1)}))
    assert free(groups, "last") == 8
    if how == "Mul":
        assert free(groups, "a") == 6
    else:
        assert not free(groups, "a")
        assert any(word in why(groups, "a") for word in ("no constant silences", "mixes its positions", "sums over it"))
    pruned = holds(groups)
    assert stored(pruned)["w"].shape[0] == 4


def test_after_folding_the_weight_keeps_its_old_name() -> None:
    """Tools fold the norm into `w` and leave the norm's vectors behind, unused: nothing hangs on names or on leftovers."""
    model = net("last = Conv (x, w, b)\n" + TAIL, {"w": (8, 3, 1, 1), "b": (8,), "wl": (2, 8, 1, 1), **norm("n", 8)})
    groups = analysed(model)
    assert sizes(groups) == [8]
    values = stored(holds(groups))
    assert values["w"].shape == (4, 3, 1, 1)
    assert {k: v.tobytes() for k, v in norm("n", 8).items()} == {k: values[k].tobytes() for k in norm("n", 8)}


# ---- 10. biases and layouts


BIASES = {
    "Add of a reshaped constant": ("r = Reshape (b, shape)\nlast = Add (c, r)", {"b": (8,), "shape": [1, 8, 1, 1]}),
    "Add of one reshaped to -1": ("r = Reshape (b, shape)\nlast = Add (c, r)", {"b": (8,), "shape": [1, -1, 1, 1]}),
    "Add of an unsqueezed constant": ("r = Unsqueeze (b, axes)\nlast = Add (r, c)", {"b": (8,), "axes": [1, 2]}),
    "Sum": ("last = Sum (c, b, c)", {"b": (8, 1, 1)}),
    "filled": (
        "s = Shape <start = 0, end = 1> (w)\nr = Expand (zero, s)\nd = Conv (x, w, r)\nlast = Add (c, d)",
        {"zero": 0.0},
    ),
    "filled to the width": (
        "r = ConstantOfShape <value = float[1] {0.5}> (s)\nd = Conv (x, w, r)\nlast = Add (c, d)",
        {"s": [8]},
    ),
}


@pytest.mark.parametrize("how", BIASES)
def test_bias(how: str) -> None:
    nodes, extra = BIASES[how]
    groups = analysed(net(f"c = Conv (x, w)\n{nodes}\n{TAIL}", {"w": (8, 3, 1, 1), **extra, "wl": (2, 8, 1, 1)}))
    assert sizes(groups) == [8]
    pruned = cut(groups, "c", [1, 2, 3])
    if "reshaped" in how:
        assert stored(pruned)["b"].shape == (5,)
        assert operand(pruned, "r", 1).tolist() == [1, -1 if "-1" in how else 5, 1, 1]
    holds(groups)


def test_each_convolution_between_two_transposes() -> None:
    body = "l0 = Identity (x)\n"
    for i, (w, stride) in enumerate([("w1", 1), ("w2", 2), ("w3", 1)]):
        body += f"""
            t{i} = Transpose <perm = [0, 3, 1, 2]> (l{i})
            c{i} = Conv <strides = [{stride}, {stride}]> (t{i}, {w})
            l{i + 1} = Transpose <perm = [0, 2, 3, 1]> (c{i})
        """
    body += "y = ReduceMean <axes = [1, 2], keepdims = 0> (l3)"
    groups = analysed(net(body, {"w1": (8, 3, 3, 3), "w2": (6, 8, 1, 1), "w3": (4, 6, 1, 1)}, x="float[N,8,8,3] x"))
    assert sizes(groups) == [8, 6]
    assert "graph output" in why(groups, "c2")
    holds(groups)


def test_no_op_casts_everywhere() -> None:
    body = """
        x1 = Cast <to = 1> (x)
        w1 = Cast <to = 1> (w)
        b1 = Cast <to = 1> (b)
        c = Conv (x1, w1, b1)
        c1 = Cast <to = 1> (c)
        s = Shape (c1)
        s1 = Cast <to = 7> (s)
        f = Reshape (c1, s1)
        last = Cast <to = 1> (f)
    """
    groups = analysed(net(body + TAIL, {"w": (8, 3, 1, 1), "b": (8,), "wl": (2, 8, 1, 1)}))
    assert sizes(groups) == [8]
    holds(groups)


# ---- 12. recurrent layers


def test_gates_reordered_in_the_graph() -> None:
    """torch's gates come as i f g o, ONNX wants i o f c: the legacy exporter leaves Slices and a Concat on the weights."""
    body = ""
    for name in "WRB":
        cuts = [f"{name}{k} = Slice ({name}t, n{4 * k}, n{4 * k + 4}, zero)" for k in range(4)]
        body += "\n".join(cuts) + f"\n{name}i = Concat <axis = 0> ({name}0, {name}3, {name}1, {name}2)\n"
    body += """
        Wu = Unsqueeze (Wi, zero)
        Ru = Unsqueeze (Ri, zero)
        zeros = ConstantOfShape (n16)
        Bc = Concat <axis = 0> (Bi, zeros)
        Bu = Unsqueeze (Bc, zero)
        s, last_h, last_c = LSTM <hidden_size = 4> (x, Wu, Ru, Bu)
        q = Squeeze (s, one)
        y = MatMul (q, wl)
    """
    weights = {"Wt": (16, 3), "Rt": (16, 4), "Bt": (16,), "zero": [0], "one": [1], "wl": (4, 2)}
    numbers = {f"n{4 * k}": [4 * k] for k in range(5)}
    groups = analysed(net(body, {**weights, **numbers}, x="float[5,1,3] x"))
    assert free(groups, "q", 2) == 4
    pruned = cut(groups, "q", [2], axis=2)
    rows = np.delete(np.arange(16), [2, 6, 10, 14])
    assert np.array_equal(stored(pruned)["Wt"], stored(groups.net.source)["Wt"][rows])
    assert attribute(pruned, "s", "hidden_size") == 3
    holds(groups)


def test_gates_of_a_gru_reordered_in_the_graph() -> None:
    """torch's r z n become ONNX's z r h by Split and Concat; the recurrent weight stands transposed."""
    body = """
        r, z, n = Split <axis = 0> (W)
        Wi = Concat <axis = 0> (z, r, n)
        Wu = Unsqueeze (Wi, zero)
        Rt = Transpose <perm = [1, 0]> (R)
        rr, rz, rn = Split <axis = 0> (Rt)
        Ri = Concat <axis = 0> (rz, rr, rn)
        Ru = Unsqueeze (Ri, zero)
        s, h = GRU <hidden_size = 4, linear_before_reset = 1> (x, Wu, Ru)
        q = Squeeze (h, zero)
        y = MatMul (q, wl)
    """
    groups = analysed(net(body, {"W": (12, 3), "R": (4, 12), "zero": [0], "wl": (4, 2)}, x="float[5,2,3] x"))
    assert free(groups, "q", 1) == 4
    holds(groups)


STATES = {
    "constant": ("", {"h": (1, 2, 4), "c": (1, 2, 4)}),
    "filled": ("h = ConstantOfShape (shape)\nc = ConstantOfShape (shape)", {"shape": [1, 2, 4]}),
    "expanded": ("h = Expand (zero, shape)\nc = Expand (zero, shape)", {"zero": (1, 1, 1), "shape": [1, 2, 4]}),
    "filled to the batch": (
        "d = Shape (x)\nn = Slice (d, i1, i2)\nt = Concat <axis = 0> (i1, n, i4)\nh = Expand (zero, t)\nc = Expand (zero, t)",
        {"zero": (1, 1, 1), "i1": [1], "i2": [2], "i4": [4]},
    ),
    "learnt, expanded to the batch": (
        "d = Shape (x)\nn = Slice (d, i1, i2)\nt = Concat <axis = 0> (i1, n, i4)\nh = Expand (first, t)\nc = Expand (first, t)",
        {"first": (1, 1, 4), "i1": [1], "i2": [2], "i4": [4]},
    ),
}


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
@pytest.mark.parametrize("how", STATES)
def test_initial_states_carry_the_hidden_size(how: str, op: str) -> None:
    nodes, extra = STATES[how]
    lstm = op == "LSTM"
    if not lstm:
        nodes = nodes.split("\nc = ")[0]
    body = f"""
        {nodes}
        s{", last_h, last_c" if lstm else ", last_h"} = {op} <hidden_size = 4> (x, W, R, , , h{", c" if lstm else ""})
        q = Squeeze (s, one)
        y = MatMul (q, wl)
    """
    gates = 16 if lstm else 12
    weights = {"W": (1, gates, 3), "R": (1, gates, 4), "one": [1], "wl": (4, 2)}
    groups = analysed(net(body, mentioned(body, {**weights, **extra}), x="float[5,2,3] x"))
    assert free(groups, "q", 2) == 4
    pruned = cut(groups, "q", [0, 3], axis=2)
    assert attribute(pruned, "s", "hidden_size") == 2
    holds(groups)


def test_states_that_the_caller_feeds_and_reads_keep_their_size() -> None:
    body = """
        s, last_h, last_c = LSTM <hidden_size = 4> (x, W, R, , , h, c)
        q = Squeeze (s, one)
        y = MatMul (q, wl)
    """
    weights = {"W": (1, 16, 3), "R": (1, 16, 4), "one": [1], "wl": (4, 2)}
    states = "float[5,2,3] x, float[1,2,4] h, float[1,2,4] c"
    groups = analysed(net(body, weights, x=states, y="y last_h last_c"))
    assert not groups.prunable
    assert any(word in why(groups, "q", 2) for word in ("graph input", "graph output"))
