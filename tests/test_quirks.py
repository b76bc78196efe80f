"""Quirks of exporters, 1 to 3 and 8 of the zoo's list: where weights stand, how they are shared, how Linear is spelt."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import spellings
from quirk import (
    analysed,
    at,
    cut,
    dims,
    feeds,
    filled,
    free,
    holds,
    maker,
    net,
    norm,
    right_or_frozen,
    sizes,
    stored,
    why,
)

from onnxprune import runtime

TAIL = "y = Conv (last, wl)"


def plain() -> onnx.ModelProto:
    """Conv BatchNormalization Relu Conv: 8 channels that can go."""
    body = """
        c = Conv <pads = [1, 1, 1, 1]> (x, w, b)
        n = BatchNormalization (c, n_s, n_b, n_m, n_v)
        last = Relu (n)
    """
    return net(body + TAIL, {"w": (8, 3, 3, 3), "b": (8,), **norm("n", 8), "wl": (4, 8, 1, 1)})


# ---- 1. where the weights stand


def test_weights_as_constant_nodes_without_any_initializer() -> None:
    model = spellings.constants(plain())
    assert not model.graph.initializer
    groups = analysed(model)
    assert sizes(groups) == [8]
    pruned = holds(groups)
    assert not pruned.graph.initializer
    assert {n: v.shape for n, v in stored(pruned).items()} == {
        "w": (4, 3, 3, 3), "b": (4,), "n_s": (4,), "n_b": (4,), "n_m": (4,), "n_v": (4,), "wl": (4, 4, 1, 1),
    }  # fmt: skip


def test_a_bias_as_a_list_of_floats_in_a_constant_node() -> None:
    """`value_floats` holds no tensor: ONNX lets a Constant say a vector that way since opset 12."""
    model = net(
        "b = Constant <value_floats = [1.0, -2.0, 3.0, 4.0]> ()\nlast = Conv (x, w, b)\n" + TAIL,
        {"w": (4, 3, 1, 1), "wl": (2, 4, 1, 1)},
    )
    groups = analysed(model)
    assert sizes(groups) == [4]
    holds(groups)


def test_weights_behind_chains_of_identities() -> None:
    groups = analysed(spellings.identities(plain()))
    assert sizes(groups) == [8]
    pruned = holds(groups)
    assert [n.op_type for n in pruned.graph.node] == [n.op_type for n in groups.net.source.graph.node]
    assert stored(pruned)["w"].shape == (4, 3, 3, 3)


@pytest.mark.parametrize("ir", [3, 4])
def test_initializers_that_are_graph_inputs_too(ir: int) -> None:
    model = spellings.inputs(plain(), ir)
    groups = analysed(model)
    assert sizes(groups) == [8]
    pruned = holds(groups)
    values = stored(pruned)
    assert [v.name for v in pruned.graph.input] == [v.name for v in model.graph.input]
    assert all(dims(v) == list(values[v.name].shape) for v in pruned.graph.input if v.name != "x")


# ---- 2. equal-valued tensors of unrelated layers, merged by value


def merged(sixth: str = "one") -> onnx.ModelProto:
    """`one` fills nine slots of three norms: scales, shifts, means, variances; `zero` is the bias of three convolutions."""
    body, at_ = "", "x"
    slots = [("one", "b1", "m1", "one"), ("one", "one", "one", "one"), ("one", "one", "m3", sixth)]
    for i, (s, b, m, v) in enumerate(slots, start=1):
        body += f"""
            c{i} = Conv ({at_}, w{i}, zero)
            n{i} = BatchNormalization (c{i}, {s}, {b}, {m}, {v})
            r{i} = Relu (n{i})
        """
        at_ = f"r{i}"
    weights = {f"w{i}": (8, 3 if i == 1 else 8, 1, 1) for i in (1, 2, 3)}
    vectors = {
        "one": np.ones(8, np.float32),
        "zero": np.zeros(8, np.float32),
        "b1": (8,),
        "m1": (8,),
        "m3": (8,),
        "wl": (4, 8, 1, 1),
    }
    return net(body + "y = Conv (r3, wl)", {**weights, **vectors})


def test_one_vector_in_nine_slots_of_three_norms_ties_no_two_layers() -> None:
    groups = analysed(merged())
    assert sum(list(n.input).count("one") for n in groups.net.source.graph.node) == 9
    assert sizes(groups) == [8, 8, 8]
    assert len({g.id for i in (1, 2, 3) for g in at(groups, f"c{i}")}) == 3
    holds(groups)


def test_cutting_one_layer_leaves_the_vector_of_the_others_alone() -> None:
    pruned = cut(analysed(merged()), "c2", [0, 5])
    values = stored(pruned)
    read = {f"n{i}": [values[name].shape for name in maker(pruned, f"n{i}").input[1:]] for i in (1, 2, 3)}
    assert read == {"n1": [(8,)] * 4, "n2": [(6,)] * 4, "n3": [(8,)] * 4}
    assert maker(pruned, "c1").input[2] == maker(pruned, "c3").input[2] == "zero"
    assert values["zero"].shape == (8,) and values[maker(pruned, "c2").input[2]].shape == (6,)


def test_the_checker_alone_would_pass_what_the_runtime_refuses() -> None:
    """Why un-sharing is tested in the runtime: with `zero` cut for one layer only, the file is wrong for the other two."""
    groups = analysed(merged())
    pruned = cut(groups, "c2", [0, 5])
    maker(pruned, "c2").input[2] = "zero"
    onnx.checker.check_model(pruned)
    with pytest.raises(Exception, match=r"bias"):
        runtime.run(runtime.session(pruned, threads=1), feeds(pruned))


def test_merged_vectors_behind_one_identity_each() -> None:
    """The legacy torch exporter since 1.11 merges equal tensors as Identity nodes: the first owner keeps the initializer."""
    body = """
        s2 = Identity (s1)
        v2 = Identity (s1)
        c1 = Conv (x, w1)
        n1 = BatchNormalization (c1, s1, b, m, s1)
        c2 = Conv (n1, w2)
        n2 = BatchNormalization (c2, s2, b, m, v2)
        last = Relu (n2)
    """
    vectors = {"s1": np.ones(8, np.float32), "b": np.zeros(8, np.float32), "m": np.zeros(8, np.float32)}
    groups = analysed(net(body + TAIL, {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "wl": (2, 8, 1, 1), **vectors}))
    assert sizes(groups) == [8, 8]
    holds(groups)
    values = stored(cut(groups, "c2", [7]))
    assert sorted(v.shape for n, v in values.items() if n.startswith("s1")) == [(7,), (8,)]


def test_equal_kernels_of_two_layers_merged_into_one_tie_them() -> None:
    """Equal blur kernels of two depthwise convolutions: one tensor with three axes cannot be told from a shared weight."""
    kernel = np.full((8, 1, 3, 3), 1 / 9, np.float32)
    body = """
        c1 = Conv (x, w1)
        d1 = Conv <group = 8, pads = [1, 1, 1, 1]> (c1, blur)
        c2 = Conv (d1, w2)
        last = Conv <group = 8, pads = [1, 1, 1, 1]> (c2, blur)
    """
    groups = analysed(net(body + TAIL, {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "blur": kernel, "wl": (2, 8, 1, 1)}))
    assert sizes(groups) == [8]
    holds(groups)


# ---- 3. weights that are shared in truth


def test_one_head_over_five_levels() -> None:
    """RetinaNet: the same convolutions and the same norm run on every level of the pyramid."""
    body = "c = Conv <pads = [1, 1, 1, 1]> (x, w, b)\np0 = Relu (c)\n"
    for i in range(5):
        body += f"p{i + 1} = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (p{i})\n" if i < 4 else ""
        body += f"""
            h{i} = Conv <pads = [1, 1, 1, 1]> (p{i}, wh, bh)
            n{i} = BatchNormalization (h{i}, n_s, n_b, n_m, n_v)
            r{i} = Relu (n{i})
            y{i} = Conv (r{i}, wo, bo)
        """
    weights = {"w": (6, 3, 3, 3), "b": (6,), "wh": (8, 6, 3, 3), "bh": (8,), **norm("n", 8), "wo": (4, 8, 1, 1), "bo": (4,)}
    groups = analysed(net(body, weights, x="float[1,3,32,32] x", y="y0 y1 y2 y3 y4"))
    assert sizes(groups) == [6, 8]
    pruned = holds(groups)
    assert set(stored(pruned)) == set(stored(groups.net.source))  # still one tensor for all five
    assert stored(pruned)["wh"].shape == (4, 3, 3, 3)


def test_siamese_branches() -> None:
    """Two inputs, one network, the difference of the two embeddings."""
    body = ""
    for side in "pq":
        body += f"""
            a{side} = Conv ({side}, w1, b1)
            r{side} = Relu (a{side})
            e{side} = Conv (r{side}, w2, b2)
        """
    body += "d = Sub (ep, eq)\ny = Conv (d, w3)"
    weights = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (6, 8, 1, 1), "b2": (6,), "w3": (2, 6, 1, 1)}
    groups = analysed(net(body, weights, x="float[1,3,6,6] p, float[1,3,6,6] q"))
    assert sizes(groups) == [8, 6]
    assert at(groups, "ap") == at(groups, "aq")
    holds(groups)


def test_a_convolution_and_a_transposed_one_with_the_same_weight() -> None:
    """A tied autoencoder: axis 0 is what the one makes and what the other sums over."""
    body = """
        e = Conv <pads = [1, 1, 1, 1]> (a, w, b)
        r = Relu (e)
        d = ConvTranspose <pads = [1, 1, 1, 1]> (r, w, c)
        y = Conv (d, wl)
        a = Conv (x, wa)
    """
    groups = analysed(net(body, {"wa": (6, 3, 1, 1), "w": (8, 6, 3, 3), "b": (8,), "c": (6,), "wl": (2, 6, 1, 1)}))
    assert free(groups, "e") == free(groups, "w", 0) == 8
    assert free(groups, "a") == free(groups, "d") == free(groups, "w", 1) == 6
    assert at(groups, "a") == at(groups, "d")
    holds(groups)


@pytest.mark.parametrize("tied", ["MatMul (h, t)", "Gemm <transB = 1> (h, emb)"])
def test_an_embedding_that_is_also_the_last_layer(tied: str) -> None:
    """Gather makes the embedding's axis 1, the last layer sums over it: the width in between can go, the vocabulary cannot."""
    body = f"""
        v = Gather (emb, ids)
        g = Gemm (v, w1, b1)
        r = Relu (g)
        h = Gemm (r, w2)
        t = Transpose <perm = [1, 0]> (emb)
        y = {tied}
    """
    weights = {"emb": (11, 6), "w1": (6, 8), "b1": (8,), "w2": (8, 6)}
    groups = analysed(net(body, weights, x="int64[4] ids"))
    assert free(groups, "g") == 8
    assert free(groups, "emb", 1) == free(groups, "v") == free(groups, "h") == 6
    assert at(groups, "v") == at(groups, "h")
    assert why(groups, "emb", 0) == "Gather 'v' looks positions up at run time"
    assert stored(holds(groups))["emb"].shape == (11, 3)


# ---- 8. spellings of Linear


LINEAR = {
    "Gemm": ("h = Gemm <transB = 1> (x, w, b)", (8, 6)),
    "Gemm, weight as it is": ("h = Gemm (x, w, b)", (6, 8)),
    "Gemm, scaled": ("h = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, w, b)", (8, 6)),
    "MatMul + bias": ("p = MatMul (x, w)\nh = Add (p, b)", (6, 8)),
    "bias + MatMul": ("p = MatMul (x, w)\nh = Add (b, p)", (6, 8)),
    "MatMul, weight transposed in the graph": ("t = Transpose <perm = [1, 0]> (w)\np = MatMul (x, t)\nh = Add (p, b)", (8, 6)),
    "weight on the left": ("t = Transpose (x)\np = MatMul (w, t)\nq = Transpose (p)\nh = Add (q, b)", (8, 6)),
}


@pytest.mark.parametrize("how", LINEAR)
def test_linear(how: str) -> None:
    nodes, shape = LINEAR[how]
    groups = analysed(
        net(f"{nodes}\nr = Relu (h)\ny = MatMul (r, wl)", {"w": shape, "b": (8,), "wl": (8, 3)}, x="float[N,6] x")
    )
    assert sizes(groups) == [8]
    pruned = cut(groups, "h", [0, 6])
    assert np.array_equal(stored(pruned)["w"], np.delete(stored(groups.net.source)["w"], [0, 6], axis=shape.index(8)))
    holds(groups)


QKV = {
    "split": ("q, k, v = Split <axis = 2> (h)", {}),
    "slices": (
        "q = Slice (h, n0, n8, two)\nk = Slice (h, n8, n16, two)\nv = Slice (h, n16, n24, two)",
        {"n0": [0], "n8": [8], "n16": [16], "n24": [24], "two": [2]},
    ),
    "gathered": (
        """
        u = Reshape (h, apart)
        q = Gather <axis = 2> (u, i0)
        k = Gather <axis = 2> (u, i1)
        v = Gather <axis = 2> (u, i2)
        """,
        {"apart": [1, 3, 3, 8], "i0": np.int64(0), "i1": np.int64(1), "i2": np.int64(2)},
    ),
}


@pytest.mark.parametrize("how", QKV)
def test_one_weight_for_query_key_and_value(how: str) -> None:
    """The product of queries and keys is of two activations: what it sums over is frozen with that reason, or cut rightly."""
    nodes, extra = QKV[how]
    body = f"""
        e = MatMul (x, we)
        h = MatMul (e, w)
        {nodes}
        kt = Transpose <perm = [0, 2, 1]> (k)
        s = MatMul (q, kt)
        p = Softmax (s)
        o = MatMul (p, v)
        y = MatMul (o, wo)
    """
    model = net(body, {"we": (5, 6), "w": (6, 24), "wo": (8, 4), **extra}, x="float[1,3,5] x")
    groups = analysed(model)
    assert free(groups, "e", 2) == 6
    right_or_frozen(model, "h", 2, "two activations", "positions", "one of", "Gather", "frozen", "softmax")
    if how != "gathered":
        assert sizes(groups)[-1] == 8 or len(sizes(groups)) >= 2
        assert free(groups, "v", 2) == 8


def test_one_projection_used_three_times() -> None:
    """Query, key and value by the very same weight: its outputs are what the scores sum over, and the values too."""
    body = """
        q = MatMul (x, w)
        k = MatMul (x, w)
        v = MatMul (x, w)
        kt = Transpose <perm = [0, 2, 1]> (k)
        s = MatMul (q, kt)
        o = MatMul (s, v)
        y = MatMul (o, wo)
    """
    model = net(body, {"w": (6, 8), "wo": (8, 4)}, x="float[1,3,6] x")
    right_or_frozen(model, "w", 1, "two activations")
    assert filled("w", (6, 8)).shape == stored(model)["w"].shape
