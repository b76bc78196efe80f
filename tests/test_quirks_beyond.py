"""Quirks beyond the zoo's list, by who writes them: TensorFlow, Keras, Paddle, MXNet, Caffe2, CoreML, scikit-learn."""

from __future__ import annotations

import numpy as np
import onnx
import oracle
from onnx import TensorProto, helper, numpy_helper
from quirk import (
    analysed,
    attribute,
    cut,
    filled,
    holds,
    maker,
    mentioned,
    net,
    norm,
    operand,
    sizes,
    stored,
    why,
)

from onnxprune import runtime
from onnxprune.passes.surgery import mask, surgery

TAIL = "y = Conv (last, wl)"


# ---- tf2onnx, keras2onnx


def test_tensorflow_kernels_are_turned_in_the_graph() -> None:
    """HWIO kernels are transposed to OIHW; a depthwise one [3, 3, C, 1] is reshaped too, with the width in the shape."""
    body = """
        k1 = Transpose <perm = [3, 2, 0, 1]> (w1)
        a = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, k1)
        t = Transpose <perm = [2, 3, 0, 1]> (w2)
        k2 = Reshape (t, shape)
        last = Conv <auto_pad = "SAME_LOWER", group = 8> (a, k2)
    """
    weights = {"w1": (3, 3, 3, 8), "w2": (3, 3, 8, 1), "shape": [8, 1, 3, 3], "wl": (2, 8, 1, 1)}
    groups = analysed(net(body + TAIL, weights))
    assert sizes(groups) == [8]
    pruned = cut(groups, "a", [0, 2])
    assert {k: v.shape for k, v in stored(pruned).items() if k in ["w1", "w2"]} == {"w1": (3, 3, 3, 6), "w2": (3, 3, 6, 1)}
    assert operand(pruned, "k2", 1).tolist() == [6, 1, 3, 3] and attribute(pruned, "last", "group") == 6
    holds(groups)


def test_tensorflow_flattens_channels_last_into_a_dense_layer() -> None:
    """Transposed back to NHWC, reshaped to [-1, H * W * C]; names end in :0 as in TensorFlow."""
    body = """
        c = Conv (x, w)
        p = Pad (c, pads)
        h = Transpose <perm = [0, 2, 3, 1]> (p)
        f = Reshape (h, shape)
        m = MatMul (f, wd)
        y = Add (m, b)
    """
    weights = {"w": (8, 3, 3, 3), "pads": [0, 0, 0, 0, 0, 0, 1, 1], "shape": [-1, 200], "wd": (200, 5), "b": (5,)}
    model = net(body, weights)
    for node in model.graph.node:
        node.input[:] = [f"{n}:0" if n in "cphfm" else n for n in node.input]
        node.output[:] = [f"{n}:0" if n in "cphfm" else n for n in node.output]
    groups = analysed(model)
    assert sizes(groups) == [8]
    pruned = cut(groups, "c:0", [3])
    assert operand(pruned, "f:0", 1).tolist() == [-1, 175]
    holds(groups)


def test_a_one_dimensional_convolution_as_a_flat_two_dimensional_one() -> None:
    body = """
        u = Unsqueeze (x, two)
        c = Conv (u, w, b)
        s = Squeeze (c, two)
        r = Relu (s)
        v = Unsqueeze (r, two)
        d = Conv (v, wl)
        y = Squeeze (d, two)
    """
    weights = {"w": (8, 3, 1, 3), "b": (8,), "two": [2], "wl": (2, 8, 1, 1)}
    groups = analysed(net(body, weights, x="float[N,3,9] x"))
    assert sizes(groups) == [8]
    holds(groups)


def test_keras_writes_both_directions_of_an_lstm_apart() -> None:
    """Two layers, one on the reversed sequence, whose outputs are concatenated: their units go apart."""
    body = """
        f, fh, fc = LSTM <hidden_size = 4> (x, Wf, Rf)
        g = Slice (x, last, first, zero, last)
        b, bh, bc = LSTM <hidden_size = 6> (g, Wb, Rb)
        h = Slice (b, last, first, zero, last)
        j = Concat <axis = 3> (f, h)
        q = Squeeze (j, one)
        y = MatMul (q, wl)
    """
    weights = {"Wf": (1, 16, 3), "Rf": (1, 16, 4), "Wb": (1, 24, 3), "Rb": (1, 24, 6), "zero": [0], "one": [1], "wl": (10, 2)}
    groups = analysed(net(body, {**weights, "last": [-1], "first": [-(2**31)]}, x="float[5,2,3] x"))
    assert sizes(groups) == [4, 6]
    holds(groups)


# ---- paddle2onnx


def test_paddle_spells_activations_and_attention_out() -> None:
    """HardSwish as Add, Clip, Mul, Div; a bias reshaped to [1, C, 1, 1]; squeeze and excitation; all in Constant nodes."""
    body = """
        c = Conv <pads = [1, 1, 1, 1]> (x, w)
        k = Reshape (b, whole)
        a = Add (c, k)
        p = Add (a, three)
        q = Clip (p, low, high)
        m = Mul (a, q)
        h = Div (m, high)
        g = GlobalAveragePool (h)
        s = Conv (g, ws, bs)
        r = Relu (s)
        e = Conv (r, we, be)
        z = HardSigmoid <alpha = 0.2> (e)
        last = Mul (h, z)
    """
    scalars = {"three": 3.0, "low": 0.0, "high": 6.0, "whole": [1, -1, 1, 1]}
    weights = {"w": (8, 3, 3, 3), "b": (8,), "ws": (4, 8, 1, 1), "bs": (4,), "we": (8, 4, 1, 1), "be": (8,), "wl": (2, 8, 1, 1)}
    groups = analysed(net(body + TAIL, {**weights, **scalars}))
    assert sizes(groups) == [8, 4]
    holds(groups)


def test_paddle_resizes_to_the_shape_of_another_tensor() -> None:
    """Resize to [batch and channels of this one, height and width of that one], put together at run time."""
    body = """
        a = Conv (x, w)
        d = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
        s = Shape (d)
        s1 = Cast <to = 7> (s)
        nc = Slice (s1, i0, i2)
        t = Shape (x)
        hw = Slice (t, i2, i4)
        size = Concat <axis = 0> (nc, hw)
        u = Resize <mode = "nearest"> (d, , , size)
        last = Concat <axis = 1> (a, u)
    """
    groups = analysed(net(body + TAIL, {"w": (8, 3, 1, 1), "i0": [0], "i2": [2], "i4": [4], "wl": (2, 16, 1, 1)}))
    assert sizes(groups) == [8]
    holds(groups)


# ---- MXNet, Caffe2, old PyTorch


def test_mxnet_fixes_every_gamma() -> None:
    """fix_gamma: one vector of ones for all norms; PRelu with a slope [C]; Flatten, Gemm and a norm behind it."""
    body = """
        n0 = BatchNormalization (x, p_s, p_b, p_m, p_v)
        c1 = Conv <pads = [1, 1, 1, 1]> (n0, w1)
        n1 = BatchNormalization (c1, ones, n_b, n_m, n_v)
        r1 = PRelu (n1, slope)
        c2 = Conv (r1, w2)
        n2 = BatchNormalization (c2, ones, k_b, k_m, k_v)
        d = Dropout (n2)
        f = Flatten (d)
        g = Gemm <transB = 1> (f, w3, b3)
        n3 = BatchNormalization (g, ones, q_b, q_m, q_v)
        y = Gemm (n3, wl)
    """
    vectors = {
        **norm("p", 3),
        **norm("n", 8),
        **norm("k", 8),
        **norm("q", 8),
        "ones": np.ones(8, np.float32),
        "slope": (8, 1, 1),
    }
    weights = {"w1": (8, 3, 3, 3), "w2": (8, 8, 1, 1), "w3": (8, 288), "b3": (8,), "wl": (8, 2)}
    groups = analysed(net(body, mentioned(body, {**vectors, **weights})))
    assert sizes(groups) == [8, 8, 8]
    pruned = cut(groups, "c2", [1])
    assert stored(pruned)["ones"].shape == (8,) and stored(pruned)[maker(pruned, "n2").input[1]].shape == (7,)
    holds(groups)


def test_caffe2_and_pytorch_1_2_at_opset_9() -> None:
    """Attributes instead of operands: Upsample, Slice, Squeeze, Clip, Dropout with a mask, axes of a ReduceMean."""
    body = """
        c = Conv (x, w, b)
        d, mask = Dropout <ratio = 0.5> (c)
        k = Clip <min = 0.0, max = 6.0> (d)
        u = Upsample <mode = "nearest"> (k, scales)
        s = Slice <axes = [2, 3], ends = [9223372036854775807, -1], starts = [1, 0]> (u)
        e = Conv (s, we)
        m = ReduceMean <axes = [2, 3], keepdims = 1> (e)
        q = Squeeze <axes = [2, 3]> (m)
        y = Gemm <transB = 1> (q, wl, bl)
    """
    weights = {"w": (8, 3, 1, 1), "b": (8,), "scales": np.array([1, 1, 2, 2], np.float32), "we": (6, 8, 1, 1)}
    groups = analysed(net(body, {**weights, "wl": (3, 6), "bl": (3,)}, opset=9, ir=4))
    assert sizes(groups) == [8, 6]
    holds(groups)


def test_a_norm_exported_in_training_mode_takes_statistics_of_every_channel_by_itself() -> None:
    """Old torch exports of a model in training mode: five outputs, `batch_norm-dead` among them."""
    body = "c = Conv (x, w)\nlast, m1, v1 = BatchNormalization <training_mode = 1> (c, n_s, n_b, n_m, n_v)\n"
    groups = analysed(net(body + TAIL, {"w": (8, 3, 1, 1), **norm("n", 8), "wl": (2, 8, 1, 1)}))
    assert sizes(groups) == [8]
    holds(groups)


# ---- CoreML, scikit-learn


def test_coreml_scales_the_pixels_and_ends_in_a_softmax_over_an_image() -> None:
    body = """
        i = Mul (x, scale)
        j = Add (i, shift)
        c = Conv (j, w)
        b = Add (c, bias)
        r = Relu (b)
        g = GlobalAveragePool (r)
        d = Conv (g, wl)
        s = Softmax <axis = 1> (d)
        y = Reshape (s, flat)
    """
    weights = {"scale": 0.01, "shift": (3, 1, 1), "w": (8, 3, 3, 3), "bias": (8, 1, 1), "wl": (5, 8, 1, 1), "flat": [1, 5]}
    groups = analysed(net(body, weights))
    assert sizes(groups) == [8]
    assert why(groups, "d") == "Softmax 's' normalises over it"
    holds(groups)


def test_scikit_learn_ends_in_classes_and_in_a_map() -> None:
    """MLPClassifier: MatMul and Add, probabilities by class in a ZipMap, the class by ArrayFeatureExtractor of an ArgMax."""
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["m1"]),
        helper.make_node("Add", ["m1", "b1"], ["a1"]),
        helper.make_node("Relu", ["a1"], ["r1"]),
        helper.make_node("MatMul", ["r1", "w2"], ["m2"]),
        helper.make_node("Add", ["m2", "b2"], ["a2"]),
        helper.make_node("Softmax", ["a2"], ["p"], axis=1),
        helper.make_node("ArgMax", ["p"], ["k"], axis=1),
        helper.make_node("ArrayFeatureExtractor", ["classes", "k"], ["c"], domain="ai.onnx.ml"),
        helper.make_node("Reshape", ["c", "flat"], ["label"]),
        helper.make_node("ZipMap", ["p"], ["probabilities"], domain="ai.onnx.ml", classlabels_int64s=[3, 5, 9]),
    ]
    weights = {k: filled(k, s) for k, s in {"w1": (6, 8), "b1": (8,), "w2": (8, 3), "b2": (3,)}.items()}
    integers = {"classes": np.array([3, 5, 9]), "flat": np.array([-1])}
    kind = helper.make_map_type_proto(TensorProto.INT64, helper.make_tensor_type_proto(TensorProto.FLOAT, []))
    graph = helper.make_graph(
        nodes, "mlp", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6])],
        [helper.make_tensor_value_info("label", TensorProto.INT64, ["N"]),
         helper.make_value_info("probabilities", helper.make_sequence_type_proto(kind))],
        [numpy_helper.from_array(v, k) for k, v in {**weights, **integers}.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    groups = analysed(model)
    assert sizes(groups) == [8]
    x = {"x": filled("data", (5, 6)) * 3}
    plan = oracle.keep(groups, 0.5, np.random.default_rng(0))
    pruned = surgery(groups, plan)
    onnx.checker.check_model(pruned, full_check=True)
    assert oracle.used(pruned) < oracle.used(model)
    for optimise in (False, True):
        sessions = [runtime.session(m, threads=1, optimise=optimise) for m in (mask(groups, plan), pruned)]
        (a, pa), (b, pb) = (runtime.run(s, x) for s in sessions)
        assert np.array_equal(a, b)
        assert all(abs(u[k] - v[k]) < 1e-5 for u, v in zip(pa, pb, strict=True) for k in (3, 5, 9))
