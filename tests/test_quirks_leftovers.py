"""Quirks beyond the zoo's list: optimisers of ONNX Runtime and onnxsim, odd constants, odd outputs, names that clash."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from quirk import (
    analysed,
    cut,
    dims,
    free,
    holds,
    maker,
    net,
    norm,
    operand,
    right_or_frozen,
    sizes,
    stored,
    why,
)

TAIL = "y = Conv (last, wl)"


# ---- optimisers


def network() -> onnx.ModelProto:
    body = """
        c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
        n1 = BatchNormalization (c1, n_s, n_b, n_m, n_v)
        r1 = Relu (n1)
        c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, b2)
        s = Add (c2, r1)
        r2 = Relu (s)
        g = GlobalAveragePool (r2)
        f = Flatten (g)
        h = Gemm <transB = 1> (f, w3, b3)
        q = Relu (h)
        y = Gemm <transB = 1> (q, w4, b4)
    """
    weights = {
        "w1": (16, 3, 3, 3),
        "b1": (16,),
        **norm("n", 16),
        "w2": (16, 16, 3, 3),
        "b2": (16,),
        "w3": (12, 16),
        "b3": (12,),
    }
    return net(body, {**weights, "w4": (5, 12), "b4": (5,)})


@pytest.mark.parametrize("level", ["BASIC", "EXTENDED", "LAYOUT", "ALL"])
def test_saved_by_the_runtimes_optimiser(level: str, tmp_path: Path) -> None:
    """Up to EXTENDED it fuses (FusedConv with a sum, FusedGemm); then it blocks layouts for this machine: frozen by name."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{level}")
    options.optimized_model_filepath = str(tmp_path / "o.onnx")
    onnxruntime.InferenceSession(network().SerializeToString(), options, providers=["CPUExecutionProvider"])
    groups = analysed(onnx.load(tmp_path / "o.onnx"))
    blocked = any(n.domain == "com.microsoft.nchwc" for n in groups.net.source.graph.node)  # not on every processor
    assert not blocked or level in ("LAYOUT", "ALL")
    if not blocked:
        assert sizes(groups) == [16, 12]
    else:
        assert sizes(groups) == [12]
        assert why(groups, "w3", 1).startswith("ReorderOutput 'ReorderOutput' keeps channels in blocks")
    holds(groups)


def test_fused_matrix_products_freeze_by_name() -> None:
    body = """
        a = MatMul (x, w)
        m = com.microsoft.FusedMatMul <alpha = 0.5, transB = 1> (a, wm)
        g = MatMul (m, wg)
        y = MatMul (g, wl)
    """
    weights = {"w": (3, 8), "wm": (6, 8), "wg": (6, 8), "wl": (8, 2)}
    model = net(body, weights, x="float[2,5,3] x", domains='"com.microsoft" : 1')
    right_or_frozen(model, "a", 2, "com.microsoft::FusedMatMul")
    assert free(analysed(model), "g", 2) == 8


def test_onnxsim_bakes_every_shape_in() -> None:
    """Dynamic shape arithmetic becomes constants with the batch of 1 in them; equal shapes are one initializer."""
    body = """
        a = Conv (x, w1)
        u = Reshape (a, apart)
        t = Transpose <perm = [0, 2, 1, 3, 4]> (u)
        v = Reshape (t, whole)
        b = Conv (v, w2)
        m = Reshape (b, apart)
        n = Transpose <perm = [0, 2, 1, 3, 4]> (m)
        last = Reshape (n, whole)
    """
    weights = {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "apart": [1, 2, 4, 6, 6], "whole": [1, 8, 6, 6], "wl": (2, 8, 1, 1)}
    groups = analysed(net(body + TAIL, weights))
    assert sizes(groups) == [4, 4]
    pruned = cut(groups, "b", [1, 5])
    assert [operand(pruned, k, 1).tolist()[2] for k in "um"] == [4, 3]
    assert [operand(pruned, k, 1).tolist()[1] for k in ("v", "last")] == [8, 6]
    holds(groups)


def test_optional_operands_spelt_as_empty_names() -> None:
    """onnx-mlir and others write `no bias` as an empty name at the end of the operands."""
    body = """
        c = Conv (x, w)
        k = Clip (c, low)
        last = Resize <mode = "nearest"> (k, , scales)
    """
    weights = {"w": (8, 3, 1, 1), "low": 0.0, "scales": np.array([1, 1, 2, 2], np.float32), "wl": (2, 8, 1, 1)}
    model = net(body + TAIL, weights)
    for node in model.graph.node[:3]:
        node.input.append("")
    groups = analysed(model)
    assert sizes(groups) == [8]
    holds(groups)


# ---- constants and outputs of odd kinds


def test_a_sparse_weight_freezes() -> None:
    model = net("a = Conv (x, w)\nlast = Mul (a, s)\n" + TAIL, {"w": (8, 3, 1, 1), "s": (1, 8, 1, 1), "wl": (2, 8, 1, 1)})
    values = helper.make_tensor("s", TensorProto.FLOAT, [2], [1.0, 2.0])
    indices = helper.make_tensor("s_indices", TensorProto.INT64, [2], [1, 5])
    dense = next(t for t in model.graph.initializer if t.name == "s")
    model.graph.initializer.remove(dense)
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [1, 8, 1, 1]))
    groups = analysed(model)
    assert not free(groups, "a")
    assert "s" in why(groups, "a")


def test_features_that_are_outputs_too_stay_whole() -> None:
    """A feature extractor: intermediate activations are outputs and are read on; a weight is an output as well."""
    body = "a = Conv (x, w)\nb = Conv (a, wb)\nc = Conv (b, wc)\nlast = Mul (c, vec)\nv = Identity (vec)\ny = Conv (last, wl)"
    weights = {"w": (8, 3, 1, 1), "wb": (8, 8, 1, 1), "wc": (8, 8, 1, 1), "wl": (2, 8, 1, 1), "vec": (8, 1, 1)}
    groups = analysed(net(body, weights, y="y b v"))
    assert why(groups, "b") == "it is graph output 'b'"
    assert free(groups, "a") == 8
    assert free(groups, "c") == 8  # by a copy of `vec`
    assert stored(cut(groups, "c", [0]))["vec"].shape == (8, 1, 1)
    holds(groups)


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
def test_weights_of_other_types_behind_casts(dtype: int) -> None:
    """Weights are stored in one type and computed with in another, as float16 converters and quantisers of storage do it."""
    model = net("w = Cast <to = 1> (v)\nb = Cast <to = 1> (u)\na = Conv (x, w, b)\nlast = Relu (a)\n" + TAIL,
                {"v": (8, 3, 1, 1), "u": (8,), "wl": (2, 8, 1, 1)})  # fmt: skip
    for t in model.graph.initializer:
        if t.name in "uv":
            value = numpy_helper.to_array(t).astype(helper.tensor_dtype_to_np_dtype(dtype))
            t.CopyFrom(numpy_helper.from_array(value, t.name))
    groups = analysed(model)
    assert sizes(groups) == [8]
    pruned = holds(groups)
    assert {t.name: t.data_type for t in pruned.graph.initializer if t.name in "uv"} == {"u": dtype, "v": dtype}


def test_channels_along_which_a_convolution_runs() -> None:
    """ECA: pooled channels become the length of a one-dimensional convolution, which mixes neighbours."""
    body = """
        a = Conv (x, w)
        g = GlobalAveragePool (a)
        q = Squeeze (g, last2)
        t = Transpose <perm = [0, 2, 1]> (q)
        k = Conv <pads = [1, 1]> (t, wk)
        u = Transpose <perm = [0, 2, 1]> (k)
        v = Unsqueeze (u, last2)
        s = Sigmoid (v)
        m = Mul (a, s)
        e = Conv (m, we)
        y = Conv (e, wl)
    """
    weights = {"w": (8, 3, 1, 1), "last2": [3], "wk": (1, 1, 3), "we": (8, 8, 1, 1), "wl": (2, 8, 1, 1)}
    groups = analysed(net(body, weights))
    assert why(groups, "a") == "Conv 'k' mixes channels into it"
    assert free(groups, "e") == 8
    holds(groups)


def test_a_softmax_between_branches_keeps_the_channels_apart() -> None:
    """SKNet: two branches stacked on an axis of their own, weighted by a softmax over that axis."""
    body = """
        a = Conv (x, wa)
        b = Conv (x, wb)
        s = Add (a, b)
        g = GlobalAveragePool (s)
        z = Conv (g, wz)
        c = Conv (z, wc)
        r = Reshape (c, apart)
        p = Softmax <axis = 1> (r)
        ua = Unsqueeze (a, one)
        ub = Unsqueeze (b, one)
        k = Concat <axis = 1> (ua, ub)
        m = Mul (k, p)
        last = ReduceSum <keepdims = 0> (m, one)
    """
    weights = {
        "wa": (8, 3, 1, 1),
        "wb": (8, 3, 1, 1),
        "wz": (4, 8, 1, 1),
        "wc": (16, 4, 1, 1),
        "apart": [1, 2, 8, 1, 1],
        "one": [1],
    }
    groups = analysed(net(body + TAIL, {**weights, "wl": (2, 8, 1, 1)}))
    assert sorted(sizes(groups)) == [4, 8]
    pruned = cut(groups, "a", [3])
    assert operand(pruned, "r", 1).tolist() == [1, 2, 7, 1, 1] and stored(pruned)["wc"].shape == (14, 4, 1, 1)
    holds(groups)


# ---- names that surgery makes


def test_a_new_constant_takes_no_name_that_a_subgraph_uses() -> None:
    """`one` is un-shared: the copy cannot be called `one.1`, as a branch uses that; a tool's stale declaration is put right."""
    body = """
        c1 = Conv (x, w1)
        n1 = BatchNormalization (c1, one, b, m, v)
        c2 = Conv (n1, w2)
        n2 = BatchNormalization (c2, one, b, m, v)
        last = Conv (n2, w3)
        total = ReduceSum <keepdims = 0> (x)
        positive = Greater (total, zero)
        z = If (positive) <
            then_branch = then () => (float t) { inner = Neg (total)  t = Identity (inner) },
            else_branch = other () => (float u) { u = Identity (total) }
        >
    """
    vectors = {"one": np.ones(8, np.float32), "b": (8,), "m": (8,), "v": np.full(8, 2, np.float32), "zero": 0.0}
    weights = {"w1": (8, 3, 1, 1), "w2": (8, 8, 1, 1), "w3": (4, 8, 1, 1), "wl": (2, 4, 1, 1), **vectors}
    model = net(body + TAIL, weights, y="y z")
    branch = next(a.g for a in maker(model, "z").attribute if a.name == "then_branch")
    branch.node[0].output[0] = branch.node[1].input[0] = "one.1"
    model.graph.value_info.append(helper.make_tensor_value_info("one.2", TensorProto.FLOAT, [3]))
    groups = analysed(model)
    pruned = cut(groups, "c1", [0])
    new = maker(pruned, "n1").input[1]
    assert new not in ("one", "one.1") and stored(pruned)[new].shape == (7,)
    assert [dims(v) for v in pruned.graph.value_info if v.name == new] in ([], [[7]])
    holds(groups)


def test_a_number_that_a_branch_reads_too_is_copied_outside() -> None:
    """Edited in place, the 8 would be wrong for the branch, which builds an array of that length."""
    body = """
        s = Shape (x)
        n = Slice (s, i0, i1)
        a = Conv (x, w)
        t = Concat <axis = 0> (n, eight, minus)
        f = Reshape (a, t)
        y = MatMul (wl, f)
        total = ReduceSum <keepdims = 0> (x)
        positive = Greater (total, zero)
        z = If (positive) <
            then_branch = then () => (float[8] p) { p = ConstantOfShape (eight) },
            else_branch = other () => (float[8] q) { q = ConstantOfShape <value = float[1] {1.0}> (eight) }
        >
    """
    numbers = {"i0": [0], "i1": [1], "eight": [8], "minus": [-1], "zero": 0.0}
    model = net(body, {"w": (8, 3, 1, 1), **numbers, "wl": (2, 8)}, x="float[N,3,6,6] x", y="y z")
    groups = analysed(model)
    assert sizes(groups) == [8]
    assert stored(cut(groups, "a", [1, 2]))["eight"].tolist() == [8]
    holds(groups)
