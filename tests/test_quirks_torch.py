"""Quirks beyond the zoo's list of both torch exporters and of onnxscript."""

from __future__ import annotations

import numpy as np
import oracle
import pytest
from onnx import TensorProto, helper
from quirk import (
    analysed,
    attribute,
    cut,
    feeds,
    free,
    holds,
    net,
    norm,
    operand,
    right_or_frozen,
    sizes,
    stored,
    why,
)

from onnxprune import runtime
from onnxprune.channels import Dim
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, surgery

TAIL = "y = Conv (last, wl)"


# ---- the legacy exporter of torch


def test_pads_computed_from_constants() -> None:
    """torch turns its pads (last axis first) round in the graph; here zeros are added to the channels, as ResNets do."""
    body = """
        a = Conv <pads = [1, 1, 1, 1]> (x, w)
        rest = ConstantOfShape <value = int64[1] {0}> (two)
        flat = Concat <axis = 0> (given, rest)
        pairs = Reshape (flat, shape)
        turned = Slice (pairs, last, first, zero, last)
        swapped = Transpose <perm = [1, 0]> (turned)
        long = Reshape (swapped, all)
        pads = Cast <to = 7> (long)
        p = Pad (a, pads)
        b = Conv <pads = [1, 1, 1, 1]> (x, wb)
        last_ = Add (p, b)
        y = Conv (last_, wl)
    """
    numbers = {"two": [2], "given": [0, 0, 0, 0, 2, 2], "shape": [-1, 2], "last": [-1], "zero": [0], "all": [-1]}
    weights = {"first": [-(2**63) + 1], "w": (8, 3, 3, 3), "wb": (12, 3, 3, 3), "wl": (2, 12, 1, 1)}
    groups = analysed(net(body, {**weights, **numbers}))
    assert sum(sizes(groups)) == 12
    pruned = cut(groups, "p", [0, 2, 5])
    assert operand(pruned, "p", 1).tolist() == [0, 1, 0, 0, 0, 2, 0, 0]
    holds(groups)


def test_an_if_left_by_squeeze() -> None:
    """torch.squeeze(dim) of unknown sizes: If the axis is 1 squeeze it, else hand it on."""
    body = """
        a = Conv (x, w)
        s = Shape (a)
        n = Gather <axis = 0> (s, three)
        is = Equal (one, n)
        q = If (is) <
            then_branch = then () => (float[1,8,6] t) { t = Squeeze (a, axes) },
            else_branch = other () => (float[1,8,6,1] u) { u = Identity (a) }
        >
        m = ReduceMean <axes = [2], keepdims = 0> (q)
        e = MatMul (m, we)
        y = MatMul (e, wl)
    """
    weights = {"w": (8, 3, 1, 1), "three": np.int64(3), "one": np.int64(1), "axes": [3], "we": (8, 8), "wl": (8, 2)}
    model = net(body, weights, x="float[1,3,6,1] x")
    right_or_frozen(model, "a", 1, "subgraph", "If", "branch")
    assert free(analysed(model), "e") == 8


def test_pixel_shuffle_as_reshapes() -> None:
    body = """
        a = Conv (x, w)
        r = Reshape (a, apart)
        t = Transpose <perm = [0, 1, 4, 2, 5, 3]> (r)
        last = Reshape (t, whole)
    """
    weights = {"w": (16, 3, 1, 1), "apart": [1, 4, 2, 2, 6, 6], "whole": [1, 4, 12, 12], "wl": (2, 4, 1, 1)}
    groups = analysed(net(body + TAIL, weights))
    assert sizes(groups) == [4]
    pruned = cut(groups, "last", [1])
    assert stored(pruned)["w"].shape == (12, 3, 1, 1)
    holds(groups)


def test_interpolation_to_a_size_computed_in_floating_point() -> None:
    """Upsampling by a factor: Shape, Cast, Mul, Floor, Cast, and the channels' part of the size taken from the tensor."""
    body = """
        a = Conv (x, w)
        s = Shape (a)
        nc = Slice (s, i0, i2)
        hw = Slice (s, i2, i4)
        f = Cast <to = 1> (hw)
        g = Mul (f, factor)
        h = Floor (g)
        k = Cast <to = 7> (h)
        size = Concat <axis = 0> (nc, k)
        last = Resize <mode = "linear", coordinate_transformation_mode = "half_pixel"> (a, roi, scales, size)
    """
    empty = np.zeros(0, np.float32)
    numbers = {"i0": [0], "i2": [2], "i4": [4], "factor": 1.5, "roi": empty, "scales": empty}
    groups = analysed(net(body + TAIL, {"w": (8, 3, 1, 1), **numbers, "wl": (2, 8, 1, 1)}))
    assert sizes(groups) == [8]
    holds(groups)


def test_such_a_size_used_as_a_number_freezes() -> None:
    """The same mixture of a channel count and a height scaled in floating point, multiplied and read as data."""
    body = """
        a = Conv (x, w)
        s = Shape (a)
        c = Slice (s, i1, i2)
        h = Slice (s, i2, i3)
        f = Cast <to = 1> (h)
        g = Mul (f, factor)
        k = Cast <to = 7> (g)
        size = Concat <axis = 0> (c, k)
        twice = Mul (size, i2)
        d = Cast <to = 1> (twice)
        t = ReduceMax <keepdims = 0> (d)
        last = Div (a, t)
        e = Conv (last, we)
        y = Conv (e, wl)
    """
    numbers = {"i1": [1], "i2": [2], "i3": [3], "factor": 1.5}
    weights = {"w": (8, 3, 1, 1), "we": (8, 8, 1, 1), "wl": (2, 8, 1, 1)}
    groups = analysed(net(body, {**weights, **numbers}))
    assert why(groups, "a") == "Cast 'd' computes with its size"
    assert free(groups, "e") == 8
    holds(groups)


def test_spectral_norm_left_in_the_graph() -> None:
    """W / (u W v): the scale is a sum over the whole weight, so that a weight without some filters would be another one."""
    body = """
        f = Reshape (w, flat)
        p = MatMul (u, f)
        q = MatMul (p, v)
        k = Div (w, q)
        a = Conv (x, k)
        e = Conv (a, we)
        y = Conv (e, wl)
    """
    weights = {"w": (8, 3, 1, 1), "flat": [8, 3], "u": (1, 8), "v": (3, 1), "we": (8, 8, 1, 1), "wl": (2, 8, 1, 1)}
    groups = analysed(net(body, weights))
    assert free(groups, "e") == 8
    assert "two constants" in why(groups, "a")
    holds(groups)


def test_halves_whose_bounds_are_computed_from_a_shape() -> None:
    """torch.chunk on a tensor of open sizes: the end of the first half is (channels + 1) / 2."""
    body = """
        a = Conv (x, w)
        s = Shape (a)
        c = Gather <axis = 0> (s, one)
        more = Add (c, one)
        half = Div (more, two)
        last = Mul (half, two)
        p = Slice (a, zero, half, one)
        q = Slice (a, half, last, one)
        gate = Sigmoid (p)
        b = Mul (gate, q)
        y = Conv (b, wl)
    """
    numbers = {"zero": [0], "one": [1], "two": [2]}
    groups = analysed(net(body, {"w": (8, 3, 1, 1), "wl": (2, 4, 1, 1), **numbers}))
    assert sizes(groups) == [4]
    pruned = cut(groups, "a", [1, 5])
    assert stored(pruned)["w"].shape == (6, 3, 1, 1)
    assert [operand(pruned, "p", i).tolist() for i in (1, 2)] == [[0], [3]]
    assert [operand(pruned, "q", i).tolist() for i in (1, 2)] == [[3], [6]]
    holds(groups)


def test_parts_whose_sizes_are_computed_from_a_shape() -> None:
    body = """
        a = Conv (x, w)
        s = Shape (a)
        c = Gather <axis = 0> (s, one)
        half = Div (c, two)
        both = Concat <axis = 0> (half, half)
        p, q = Split <axis = 1> (a, both)
        b = Mul (p, q)
        y = Conv (b, wl)
    """
    groups = analysed(net(body, {"w": (8, 3, 1, 1), "wl": (2, 4, 1, 1), "one": [1], "two": [2]}))
    assert sizes(groups) == [4]
    assert operand(cut(groups, "a", [1, 5]), "p", 1).tolist() == [3, 3]
    holds(groups)


def test_bounds_taken_from_another_axis_that_is_cut() -> None:
    """As many channels are taken from `e` as `a` has: 6. Whatever goes from `a`, those 6 are meant."""
    body = """
        a = Conv (x, w)
        e = Conv (x, we)
        s = Shape (a)
        c = Slice (s, one, two)
        p = Slice (e, zero, c, one)
        f = Conv (a, wa)
        h = Conv (p, wp)
        y = Add (f, h)
    """
    weights = {"w": (6, 3, 1, 1), "we": (9, 3, 1, 1), "wa": (2, 6, 1, 1), "wp": (2, 6, 1, 1)}
    groups = analysed(net(body, {**weights, "zero": [0], "one": [1], "two": [2]}))
    assert (free(groups, "a"), free(groups, "e")) == (6, 9)
    assert operand(cut(groups, "a", [0, 1]), "p", 2).tolist() == [6]
    assert operand(cut(groups, "e", [0, 8]), "p", 2).tolist() == [5]
    holds(groups)


EXPANDED = """
    k = MatMul (x, wk)
    h = Reshape (k, apart)
    t = Transpose <perm = [0, 2, 1, 3]> (h)
    u = Unsqueeze (t, two)
    s = Shape (t)
    b = Gather <axis = 0> (s, at0)
    n = Gather <axis = 0> (s, at1)
    l = Gather <axis = 0> (s, at2)
    d = Gather <axis = 0> (s, at3)
    listed = Concat <axis = 0> (b, n, times, l, d)
    to = Reshape (listed, flat)
    r = Shape (to)
    ones = ConstantOfShape <value = int64[1] {1}> (r)
    less = Mul (ones, minus)
    is = Equal (to, less)
    shape = Where (is, ones, to)
    e = Expand (u, shape)
    m = Mul (n, times)
    joined = Concat <axis = 0> (b, m, l, d)
    g = Reshape (e, joined)
    q = MatMul (x, wq)
    i = Reshape (q, apart4)
    j = Transpose <perm = [0, 2, 3, 1]> (i)
    p = MatMul (g, j)
    z = MatMul (p, wz)
    back = Transpose <perm = [0, 2, 1, 3]> (z)
    all = Reshape (back, joint)
    y = MatMul (all, wo)
"""


def test_an_expand_whose_shape_might_hold_minus_one() -> None:
    """torch's repeat_kv: sizes equal to -1 would be replaced by 1. None ever is, but the comparison reads them all."""
    shapes = {"apart": [0, 0, 2, 2], "apart4": [0, 0, 4, 2], "two": [2], "times": [2], "flat": [-1], "minus": [-1]}
    places = {f"at{i}": [i] for i in range(4)}
    weights = {"wk": (5, 4), "wq": (5, 8), "wz": (7, 3), "wo": (12, 2), "joint": [0, 0, 12], **shapes, **places}
    model = net(EXPANDED, weights, x="float[1,7,5] x")
    groups = group(runtime.probe(model, feeds(model)), attention="heads")
    assert free(groups, "t") == 2
    pruned = cut(groups, "t", [1])
    assert {name: stored(pruned)[name].shape for name in ("wk", "wq", "wo")} == {"wk": (5, 2), "wq": (5, 4), "wo": (6, 2)}
    holds(groups)


CELL = """
    zero = Expand (o, hidden)
    r = Gemm <transB = 1> (zero, wh, bh)
    i = Gemm <transB = 1> (x, wi)
    p = Add (r, i)
    h = Tanh (p)
    r2 = Gemm <transB = 1> (h, wh, bh)
    p2 = Add (r2, i)
    h2 = Tanh (p2)
    y = Gemm (h2, wo)
"""


def test_the_first_step_of_a_recurrent_cell_multiplies_two_constants() -> None:
    """The weight of the steps that follow is multiplied with a state of zeros first."""
    weights = {"o": np.zeros((1, 1), np.float32), "hidden": [1, 6], "wh": (6, 6), "bh": (6,), "wi": (6, 4), "wo": (6, 2)}
    groups = analysed(net(CELL, weights, x="float[1,4] x"))
    assert sizes(groups) == [6]
    assert groups.roles[Dim("wh", 1)] == "consumer"
    holds(groups)
    pruned = cut(groups, "h", [0, 3])
    assert stored(pruned)["wh"].shape == (4, 4)


def test_layers_of_a_table_alone_are_cut_too() -> None:
    """A small network that makes biases of a table of distances: what it reads is a constant, its hidden layer is not."""
    body = """
        h = MatMul (table, w1)
        r = Relu (h)
        p = MatMul (r, w2)
        t = Transpose <perm = [0, 3, 1, 2]> (p)
        y = Add (x, t)
    """
    groups = analysed(net(body, {"table": (1, 6, 6, 2), "w1": (2, 8), "w2": (8, 3)}))
    assert sizes(groups) == [2, 8]  # what the table tells of every distance is cut like what any layer reads
    holds(groups)


# ---- the dynamo exporter, onnxscript


def test_chunks_of_unequal_size_by_num_outputs() -> None:
    """Seven channels in two: 4 and 3, as the operator divides them; after a cut the sizes are written out."""
    body = """
        a = Conv (x, w)
        p, q = Split <axis = 1, num_outputs = 2> (a)
        r = Conv (p, wp)
        s = Conv (q, wq)
        y = Add (r, s)
    """
    groups = analysed(net(body, {"w": (7, 3, 1, 1), "wp": (2, 4, 1, 1), "wq": (2, 3, 1, 1)}, opset=18))
    assert sizes(groups) == [4, 3]
    pruned = cut(groups, "a", [0, 1, 2])
    assert operand(pruned, "p", 1).tolist() == [1, 3] and attribute(pruned, "p", "num_outputs") is None
    holds(groups)


def test_chunks_as_a_sequence_freeze_by_name() -> None:
    """Unoptimised exports write chunk as SplitToSequence and SequenceAt: no tensor, no channels to follow."""
    body = """
        a = Conv (x, w)
        s = SplitToSequence <axis = 1> (a, four)
        p = SequenceAt (s, i0)
        q = SequenceAt (s, i1)
        m = Mul (p, q)
        e = Conv (m, we)
        y = Conv (e, wl)
    """
    numbers = {"four": np.int64(4), "i0": np.int64(0), "i1": np.int64(1)}
    model = net(body, {"w": (8, 3, 1, 1), **numbers, "we": (8, 4, 1, 1), "wl": (2, 8, 1, 1)})
    right_or_frozen(model, "a", 1, "SplitToSequence")
    assert free(analysed(model), "e") == 8


def test_one_deduplicated_number_in_two_unrelated_shapes() -> None:
    """onnxscript stores equal numbers once: the 8 of one layer's Reshape is also that of another layer, and a slice's end."""
    body = """
        s = Shape (x)
        n = Slice (s, i0, i1)
        a = Conv (x, w1)
        ta = Concat <axis = 0> (n, eight, minus)
        fa = Reshape (a, ta)
        b = Conv (x, w2)
        tb = Concat <axis = 0> (n, eight, minus)
        fb = Reshape (b, tb)
        cb = Slice (fb, i0, eight, i2)
        ma = MatMul (wa, fa)
        mb = MatMul (wb, cb)
        g = MatMul (mb, wg)
        y = MatMul (ma, wh)
        z = Identity (g)
    """
    numbers = {"i0": [0], "i1": [1], "i2": [2], "eight": [8], "minus": [-1]}
    weights = {"w1": (8, 3, 1, 1), "w2": (8, 3, 1, 1), "wa": (2, 8), "wb": (2, 8), "wg": (8, 2), "wh": (36, 2)}
    groups = analysed(net(body, {**weights, **numbers}, x="float[N,3,6,6] x", y="y z"))
    assert sizes(groups) == [8, 8]
    pruned = cut(groups, "a", [0, 1])
    assert operand(pruned, "ta", 1).tolist() == [6]
    assert operand(pruned, "tb", 1).tolist() == [8] and operand(pruned, "cb", 2).tolist() == [8]
    holds(groups)


@pytest.mark.parametrize("equation", ["bij,jk->bik", "bij,kj->bik"])
def test_einsum_as_a_linear_layer(equation: str) -> None:
    body = f"""
        a = MatMul (x, w)
        e = Einsum <equation = "{equation}"> (a, we)
        g = MatMul (e, wg)
        y = MatMul (g, wl)
    """
    shape = (8, 6) if "jk" in equation else (6, 8)
    model = net(body, {"w": (3, 8), "we": shape, "wg": (6, 8), "wl": (8, 2)}, x="float[2,5,3] x")
    right_or_frozen(model, "a", 2, "Einsum")
    assert free(analysed(model), "g", 2) == 8


def test_metadata_and_leftovers_stay() -> None:
    """Properties of model, graph, nodes and values, unused initializers, dead nodes, an opset that no node needs."""
    weights = {"w": (8, 3, 1, 1), "wl": (2, 8, 1, 1), "gone": (8,)}
    model = net("last = Conv (x, w)\nunused = Sigmoid (last)\nsize = Shape (last)\n" + TAIL, weights)
    helper.set_model_props(model, {"author": "somebody"})
    model.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    model.graph.doc_string = "a graph"
    model.graph.node[0].doc_string = "a node"
    model.graph.initializer[0].doc_string = "a weight"
    model.graph.value_info.append(helper.make_tensor_value_info("last", TensorProto.FLOAT, [1, 8, 6, 6]))
    for owner in (model.graph, model.graph.node[0], model.graph.value_info[0]):
        entry = owner.metadata_props.add()
        entry.key, entry.value = "pkg.torch.onnx.stack_trace", "somewhere"
    groups = analysed(model)
    assert sizes(groups) == [8]
    pruned = holds(groups)
    assert [len(o.metadata_props) for o in (pruned, pruned.graph, pruned.graph.node[0], pruned.graph.value_info[0])] == [1] * 4
    assert (pruned.graph.doc_string, pruned.graph.node[0].doc_string) == ("a graph", "a node")
    assert {t.name: t.doc_string for t in pruned.graph.initializer}["w"] == "a weight"
    assert stored(pruned)["gone"].shape == (8,)
    assert pruned.opset_import == model.opset_import
    assert [n.op_type for n in pruned.graph.node] == [n.op_type for n in model.graph.node]


def test_operators_under_the_long_name_of_the_standard_domain() -> None:
    """ONNX Runtime takes `ai.onnx` for the empty domain; onnx.checker knows no operators under that name: it is not asked."""
    body = "c = Conv (x, w)\nn = BatchNormalization (c, n_s, n_b, n_m, n_v)\nlast = Relu (n)\n"
    model = net(body + TAIL, {"w": (8, 3, 1, 1), **norm("n", 8), "wl": (2, 8, 1, 1)})
    model.opset_import.append(helper.make_opsetid("ai.onnx", 17))
    for node in model.graph.node:
        node.domain = "ai.onnx"
    groups = analysed(model)
    assert sizes(groups) == [8]
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    pruned = surgery(groups, plan)
    oracle.compare(model, mask(groups, plan), pruned, feeds(model))
    assert stored(pruned)["w"].shape == (4, 3, 1, 1)
