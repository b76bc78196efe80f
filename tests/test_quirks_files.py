"""Quirks of exporters, 11 and 13 to 15 of the zoo's list: declarations, files, functions, subgraphs, integers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import spellings
from onnx import TensorProto, helper
from quirk import (
    analysed,
    cut,
    dims,
    filled,
    free,
    holds,
    mentioned,
    net,
    right_or_frozen,
    sizes,
    stored,
)

from onnxprune import api, runtime
from onnxprune.errors import ModelError
from onnxprune.files import load

TAIL = "y = Conv (last, wl)"


# ---- 11. stale declarations


def two_layers() -> onnx.ModelProto:
    body = "c = Conv (x, w, b)\nlast = Relu (c)\n" + TAIL
    model = net(body, {"w": (8, 3, 1, 1), "b": (8,), "wl": (2, 8, 1, 1)})
    return onnx.shape_inference.infer_shapes(model)


def test_declared_shapes_follow_the_cut() -> None:
    model = two_layers()
    assert {v.name: dims(v) for v in model.graph.value_info} == {"c": [1, 8, 6, 6], "last": [1, 8, 6, 6]}
    pruned = holds(analysed(model))
    assert {v.name: dims(v) for v in pruned.graph.value_info} == {"c": [1, 4, 6, 6], "last": [1, 4, 6, 6]}
    assert pruned.graph.output == model.graph.output


def strict(model: onnx.ModelProto) -> None:
    """Loads a model in a runtime that refuses declarations that its own shape inference contradicts."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.strict_shape_type_inference", "1")
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_no_entry_is_left_that_a_strict_runtime_refuses() -> None:
    pruned = holds(analysed(two_layers()))
    strict(pruned)
    pruned.graph.value_info[0].type.tensor_type.shape.dim[1].dim_value = 8
    with pytest.raises(Exception, match="ShapeInferenceError"):
        strict(pruned)


STALE = {
    "w": [9, 3, 1, 1],
    "b": [1, 8],
    "c": [1, "channels", 6, 6],
    "last": [1, 9, 6, 6],
    "c in rank": [8],
    "gone": [1, 8, 6, 6],
}


@pytest.mark.parametrize("what", STALE)
def test_entries_that_were_stale_before_the_cut(what: str) -> None:
    """A tool left declarations behind: of another width or rank, or of a tensor that is gone. They go or are put right."""
    model, stale, name = two_layers(), STALE[what], what.split(maxsplit=1)[0]
    kept = [v for v in model.graph.value_info if v.name != name]
    del model.graph.value_info[:]
    model.graph.value_info.extend([*kept, helper.make_tensor_value_info(name, TensorProto.FLOAT, stale)])
    groups = analysed(model)
    assert sizes(groups) == [8]
    pruned = holds(groups)
    strict(pruned)
    found = {v.name: dims(v) for v in pruned.graph.value_info}
    right = {"w": [4, 3, 1, 1], "c": [1, "channels", 6, 6], "last": [1, 4, 6, 6], "gone": [1, 8, 6, 6]}
    assert found.get(name) == (None if what in ("b", "c in rank") else right[name])


# ---- 13. files


def residual() -> onnx.ModelProto:
    body = """
        a = Conv <pads = [1, 1, 1, 1]> (x, wa, ba)
        r = Relu (a)
        b = Conv <pads = [1, 1, 1, 1]> (r, wb, bb)
        s = Add (a, b)
        last = Relu (s)
    """
    return net(body + TAIL, {"wa": (16, 3, 3, 3), "ba": (16,), "wb": (16, 16, 3, 3), "bb": (16,), "wl": (2, 16, 1, 1)})


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.mark.parametrize("one_file", [True, False])
def test_external_data_of_the_source_stay_as_they_are(tmp_path: Path, one_file: bool) -> None:
    source = tmp_path / "in"
    source.mkdir()
    onnx.save_model(residual(), source / "m.onnx", save_as_external_data=True, all_tensors_to_one_file=one_file,
                    location="m.onnx.data" if one_file else None, size_threshold=0)  # fmt: skip
    assert len(list(source.iterdir())) == (2 if one_file else 6)
    before = digests(source)
    x = {"x": filled("x", (16, 3, 6, 6))}
    result = api.prune(source / "m.onnx", x, budget={"params": 0.6})
    result.save(source / "out.onnx")
    assert {k: v for k, v in digests(source).items() if k in before} == before
    assert not {k for k in digests(source) if k not in before} - {
        "out.onnx",
        "out.onnx.data",
        "out.onnx.report.json",
        "out.onnx.certificate.json",
    }
    assert holds(analysed(load(source / "out.onnx")), 1).graph.node


def test_unsorted_nodes() -> None:
    model = spellings.unsorted(residual())
    groups = analysed(model)
    assert sizes(groups) == [16]
    pruned = holds(groups)
    assert [n.output[0] for n in pruned.graph.node] == [n.output[0] for n in model.graph.node]


@pytest.mark.parametrize("spell", [spellings.unnamed, spellings.renamed])
def test_names_do_not_matter_and_stay(spell: spellings.Spell) -> None:
    model = spell(residual())
    groups = analysed(model)
    assert sizes(groups) == [16]
    pruned = holds(groups)
    assert [n.name for n in pruned.graph.node] == [n.name for n in model.graph.node]
    assert sorted(stored(pruned)) == sorted(stored(model))
    # A group is called by something that is unique.
    assert len({layer.name for layer in groups.layers}) == 3


def test_names_that_stand_twice_are_refused_in_the_words_of_the_runtime() -> None:
    """ONNX (IR.md, `Names within a graph`) forbids it and ONNX Runtime loads no such file: it has to be mended first."""
    with pytest.raises(ModelError, match="two nodes with same node name \\(layer\\)"):
        analysed(spellings.same_name(residual()))


@pytest.mark.parametrize("declaration", ["named", "minus one", "absent"])
def test_sizes_that_are_names_or_minus_one(declaration: str) -> None:
    """Names like `floor(height/2)` are formulas to nobody; -1 is what some converters write for `unknown`."""
    model = residual()
    sides = {"named": ["floor(height/2)", "floor(width/2) - 1"], "minus one": [-1, -1], "absent": [None, None]}[declaration]
    batch = {"named": "batch size", "minus one": -1, "absent": None}[declaration]
    shape = [batch, 3, *sides]
    for value, n in ((model.graph.input[0], 3), (model.graph.output[0], 2)):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [shape[0], n, *shape[2:]]))
    model.graph.value_info.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, [shape[0], 16, *shape[2:]]))
    groups = analysed(model)
    assert sizes(groups) == [16]
    pruned = holds(groups)
    assert pruned.graph.input == model.graph.input and pruned.graph.output == model.graph.output
    (info,) = pruned.graph.value_info
    assert dims(info)[1] == 8 and dims(info)[2:] == dims(model.graph.value_info[0])[2:]
    for size in ((1, 3, 4, 5), (3, 3, 7, 6)):  # still works for sizes that the analysis did not see
        runtime.run(runtime.session(pruned, threads=1), {"x": np.ones(size, np.float32)})


# ---- 14. functions and subgraphs


BLOCK = """
<domain: "mine", opset_import: ["" : 17]>
Block {attributes} (a, w, b) => (d) {{
    {nodes}
    d = Relu (c)
}}
"""


def inlined(model: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    path = folder / "functions.onnx"
    path.write_bytes(model.SerializeToString())
    return load(path)


def test_a_function_called_with_several_widths(tmp_path: Path) -> None:
    """No convolution stands at the top level; each call has a width of its own."""
    body = "a = mine.Block (x, w1, b1)\nc = mine.Block (a, w2, b2)\ny = mine.Block (c, w3, b3)"
    weights = {"w1": (8, 3, 1, 1), "b1": (8,), "w2": (6, 8, 1, 1), "b2": (6,), "w3": (4, 6, 1, 1), "b3": (4,)}
    model = net(body, weights, domains='"mine" : 1', functions=BLOCK.format(attributes="", nodes="c = Conv (a, w, b)"))
    assert {n.op_type for n in model.graph.node} == {"Block"}
    groups = analysed(inlined(model, tmp_path))
    assert sizes(groups) == [8, 6]
    holds(groups)


def test_attributes_that_count_channels_at_the_call(tmp_path: Path) -> None:
    """The number of groups of a depthwise convolution is an attribute of the call, another one for each width."""
    nodes = "e = Conv (a, w, b)\nc = Conv <group: int = @groups> (e, k)"
    functions = BLOCK.format(attributes="<groups>", nodes=nodes).replace("(a, w, b)", "(a, w, b, k)", 1)
    body = """
        a = mine.Block <groups = 8> (x, w1, b1, k1)
        c = mine.Block <groups = 6> (a, w2, b2, k2)
        y = Conv (c, wl)
    """
    weights = {"w1": (8, 3, 1, 1), "b1": (8,), "k1": (8, 1, 1, 1), "w2": (6, 8, 1, 1), "b2": (6,), "k2": (6, 1, 1, 1)}
    model = net(body, {**weights, "wl": (2, 6, 1, 1)}, domains='"mine" : 1', functions=functions)
    groups = analysed(inlined(model, tmp_path))
    assert sizes(groups) == [8, 6]
    pruned = holds(groups)
    assert [a.i for n in pruned.graph.node for a in n.attribute if a.name == "group"] == [4, 3]


CAPTURED = {
    "weight": ("", "t = Conv (a, wt)", "t = Conv (a, wt)", {"wt": (8, 8, 1, 1)}),
    "vector": ("", "t = Mul (a, vt)", "t = Add (a, vt)", {"vt": (8, 1, 1)}),
    "activation": ("", "t = Relu (a)", "t = Neg (a)", {}),
}


@pytest.mark.parametrize("what", CAPTURED)
def test_a_subgraph_that_captures_from_outside(what: str) -> None:
    """The branches of an If read the outer activation and weight: the border is frozen with a reason, or followed rightly."""
    _, then, other, extra = CAPTURED[what]
    body = f"""
        a = Conv (x, w)
        total = ReduceSum <keepdims = 0> (x)
        positive = Greater (total, zero)
        last = If (positive) <
            then_branch = then () => (float[1,8,6,6] t) {{ {then} }},
            else_branch = other () => (float[1,8,6,6] u) {{ {other.replace("t =", "u =")} }}
        >
        e = Conv (last, we)
        y = Conv (e, wl)
    """
    model = net(body, {"w": (8, 3, 1, 1), "zero": 0.0, **extra, "we": (8, 8, 1, 1), "wl": (2, 8, 1, 1)})
    right_or_frozen(model, "a", 1, "subgraph", "If", "branch")
    assert free(analysed(model), "e") == 8


@pytest.mark.parametrize("op", ["Loop", "Scan"])
def test_a_loop_that_captures_a_weight(op: str) -> None:
    if op == "Loop":
        loop = """
            last = Loop (three, , a) <body = step (int64 i, bool going, float[2,8] h) => (bool on, float[2,8] t) {
                on = Identity (going)
                u = MatMul (h, wt)
                t = Tanh (u)
            }>
        """
    else:
        loop = """
            last, all = Scan <num_scan_inputs = 1, body = step (float[2,8] h, float[2,8] v) => (float[2,8] t, float[2,8] o) {
                u = MatMul (h, wt)
                s = Add (u, v)
                t = Tanh (s)
                o = Identity (t)
            }> (a, steps)
        """
    body = f"a = MatMul (x, w)\n{loop}\ne = MatMul (last, we)\ny = MatMul (e, wl)"
    extra = {"three": np.int64(3)} if op == "Loop" else {"steps": (3, 2, 8)}
    weights = {"w": (6, 8), "wt": (8, 8), "we": (8, 8), "wl": (8, 2), **extra}
    model = net(body, weights, x="float[2,6] x")
    right_or_frozen(model, "a", 1, "subgraph", op)
    assert free(analysed(model), "e") == 8


# ---- 15. integers and other domains


def qdq(zero_points: bool) -> onnx.ModelProto:
    """Conv with a per-channel quantised weight and a 32-bit bias, activations quantised as a whole."""
    body = """
        qx = QuantizeLinear (x, sx, zx)
        dx = DequantizeLinear (qx, sx, zx)
        dw = DequantizeLinear <axis = 0> (qw, sw, zw)
        db = DequantizeLinear <axis = 0> (qb, sb)
        c = Conv (dx, dw, db)
        qc = QuantizeLinear (c, sc, zx)
        last = DequantizeLinear (qc, sc, zx)
    """
    rng = np.random.default_rng(0)
    weights = {
        "sx": 0.05, "zx": np.uint8(128), "sc": 0.05,
        "qw": rng.integers(-127, 128, (8, 3, 1, 1)).astype(np.int8), "sw": rng.uniform(0.005, 0.02, 8).astype(np.float32),
        "zw": (rng.integers(-3, 4, 8) * zero_points).astype(np.int8),
        "qb": rng.integers(-99, 99, 8).astype(np.int32), "sb": rng.uniform(0.001, 0.002, 8).astype(np.float32),
    }  # fmt: skip
    return net(body + TAIL, {**weights, "wl": (2, 8, 1, 1)})


@pytest.mark.parametrize("zero_points", [False, True])
def test_scales_and_zero_points_follow_their_channel(zero_points: bool) -> None:
    groups = analysed(qdq(zero_points))
    assert sizes(groups) == [8]
    pruned = cut(groups, "c", [0, 7])
    assert {k: stored(pruned)[k].shape for k in ("qw", "sw", "zw", "qb", "sb")} == {
        "qw": (6, 3, 1, 1), "sw": (6,), "zw": (6,), "qb": (6,), "sb": (6,),
    }  # fmt: skip
    holds(groups)


INTEGER = {
    "ConvInteger": """
        qx, sx, zx = DynamicQuantizeLinear (a)
        i = ConvInteger (qx, qw, zx, zero)
        f = Cast <to = 1> (i)
        last = Mul (f, sw)
    """,
    "QLinearConv": """
        qx = QuantizeLinear (a, sa, za)
        q = QLinearConv (qx, sa, za, qw, sv, zw, sa, za)
        last = DequantizeLinear (q, sa, za)
    """,
}


@pytest.mark.parametrize("op", INTEGER)
def test_integer_operators_are_followed_or_refused_by_name(op: str) -> None:
    rng = np.random.default_rng(0)
    weights = {
        "wa": (6, 3, 1, 1), "qw": rng.integers(-127, 128, (8, 6, 1, 1)).astype(np.int8), "zero": np.int8(0),
        "sw": rng.uniform(0.01, 0.02, (8, 1, 1)).astype(np.float32), "sa": 0.05, "za": np.uint8(128),
        "sv": rng.uniform(0.01, 0.02, 8).astype(np.float32), "zw": np.zeros(8, np.int8), "we": (8, 8, 1, 1), "wl": (2, 8, 1, 1),
    }  # fmt: skip
    nodes = INTEGER[op]
    body = f"a = Conv (x, wa)\n{nodes}\ne = Conv (last, we)\ny = Conv (e, wl)"
    model = net(body, mentioned(body, weights))
    right_or_frozen(model, "a", 1, op, "DynamicQuantizeLinear")
    assert free(analysed(model), "e") == 8


def test_dynamically_quantised_lstm_is_followed_or_refused_by_name() -> None:
    body = """
        a = MatMul (x, wa)
        s = com.microsoft.DynamicQuantizeLSTM <hidden_size = 4> (a, W, R, , , , , , sw, zw, sr, zr)
        q = Squeeze (s, one)
        e = MatMul (q, we)
        y = MatMul (e, wl)
    """
    rng = np.random.default_rng(0)
    weights = {
        "W": rng.integers(-99, 99, (1, 6, 16)).astype(np.int8), "R": rng.integers(-99, 99, (1, 4, 16)).astype(np.int8),
        "sw": np.full((1, 16), 0.005, np.float32), "zw": np.zeros((1, 16), np.int8),
        "sr": np.full((1, 16), 0.005, np.float32), "zr": np.zeros((1, 16), np.int8),
    }  # fmt: skip
    model = net(body, {"wa": (3, 6), **weights, "one": [1], "we": (4, 8), "wl": (8, 2)}, x="float[5,2,3] x",
                domains='"com.microsoft" : 1')  # fmt: skip
    right_or_frozen(model, "a", 2, "DynamicQuantizeLSTM")
    assert free(analysed(model), "e", 2) == 8
