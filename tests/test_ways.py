"""Channels that are split into heads and places in them can be followed along either axis: which one is taken, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import oracle
import pytest
from quirk import feeds, free, holds, net, sizes

import onnxprune
from onnxprune import runtime
from onnxprune.cli import main
from onnxprune.errors import OptionError
from onnxprune.groups import Accounting, Groups
from onnxprune.passes.group import Attention, group

X = "float[1,5,6] x"
ATTENTION = """
    q = MatMul (x, wq)
    k = MatMul (x, wk)
    v = MatMul (x, wv)
    qh = Reshape (q, parts)
    kh = Reshape (k, kparts)
    vh = Reshape (v, kparts)
    {between}
    qt = Transpose <perm = [0, 2, 1, 3]> (qn)
    kt = Transpose <perm = [0, 2, 3, 1]> (kn)
    vt = Transpose <perm = [0, 2, 1, 3]> (vh)
    {widen}
    s = MatMul (qt, kw)
    p = Softmax <axis = -1> (s)
    o = MatMul (p, vw)
    t = Transpose <perm = [0, 2, 1, 3]> (o)
    j = Reshape (t, whole)
    y = MatMul (j, wo)
"""
PLAIN = "qn = Identity (qh)\nkn = Identity (kh)"
NORMALISED = "qn = LpNormalization <axis = -1> (qh)\nkn = LpNormalization <axis = -1> (kh)"


def attending(heads: int, shared: int, places: int, between: str = PLAIN) -> onnx.ModelProto:
    """Attention of `heads` heads, of which as many share one of keys and values that `shared` of those are there."""
    times = heads // shared
    widen = "kw = Identity (kt)\nvw = Identity (vt)"
    if times > 1:
        lines = []
        for name in "kv":
            lines += [f"{name}1 = Unsqueeze ({name}t, two)", f"{name}2 = Expand ({name}1, {name}shape)"]
            lines += [f"{name}w = Reshape ({name}2, {name}all)"]
        widen = "\n".join(lines)
    weights: dict[str, Any] = {
        "wq": (6, heads * places),
        "wk": (6, shared * places),
        "wv": (6, shared * places),
        "wo": (heads * places, 3),
        "parts": [1, 5, heads, places],
        "kparts": [1, 5, shared, places],
        "whole": [1, 5, heads * places],
        "two": [2],
        "kshape": [1, shared, times, places, 5],
        "vshape": [1, shared, times, 5, places],
        "kall": [1, heads, places, 5],
        "vall": [1, heads, 5, places],
    }
    return net(ATTENTION.format(between=between, widen=widen), weights, x=X)


def grouped(model: onnx.ModelProto, attention: Attention | None = None) -> Groups:
    return group(runtime.probe(model, feeds(model)), attention=attention)


@pytest.mark.parametrize(("attention", "size"), [(None, 4), ("heads", 2), ("dims", 4)])
def test_the_user_chooses_between_heads_and_places(attention: Attention | None, size: int) -> None:
    """Two heads of four places: by themselves the places go, those of queries and keys and those of values apart."""
    groups = grouped(attending(2, 2, 4), attention)
    assert sizes(groups) == ([size] if attention == "heads" else [size, size])
    holds(groups)


@pytest.mark.parametrize("attention", [None, "heads", "dims"])
def test_where_the_places_are_normalised_whole_heads_go(attention: Attention | None) -> None:
    """The values alone could lose places; but then the heads of queries and keys could not go."""
    groups = grouped(attending(2, 2, 4, NORMALISED), attention)
    assert sizes(groups) == [2]
    holds(groups)


def test_where_queries_and_keys_would_be_followed_along_other_axes() -> None:
    """Four heads of queries share two of keys and values, of three places: what leaves most is heads here and places there."""
    groups = grouped(attending(4, 2, 3))
    assert free(groups, "q", 2) == 12 // 6
    holds(groups)


FOLDED = """
    q = MatMul (x, wq)
    h = Reshape (q, parts)
    f = Transpose <perm = [0, 2, 1, 3]> (h)
    n = LpNormalization <axis = -1> (f)
    b = Reshape (n, folded)
    a = Transpose <perm = [0, 2, 1]> (b)
    c = Reshape (a, unfolded)
    d = Transpose <perm = [0, 3, 1, 2]> (c)
    j = Reshape (d, whole)
    y = MatMul (j, wo)
"""


def test_heads_that_are_folded_into_the_batch_and_taken_apart_again() -> None:
    """Nine windows and two heads make eighteen: taking them apart, the windows are more, but no channels."""
    weights = {"parts": [9, 5, 2, 4], "folded": [18, 5, 4], "unfolded": [9, 2, 4, 5], "whole": [9, 5, 8]}
    groups = grouped(net(FOLDED, {**weights, "wq": (6, 8), "wo": (8, 3)}, x="float[9,5,6] x"))
    assert sizes(groups) == [2]
    holds(groups)


POOLED = """
    q = MatMul (x, wq)
    h = Reshape (q, parts)
    f = Transpose <perm = [0, 2, 3, 1]> (h)
    b = Reshape (f, folded)
    p = Conv <group = 4, pads = [1, 1]> (b, wp)
    c = Reshape (p, unfolded)
    d = Transpose <perm = [0, 3, 1, 2]> (c)
    n = LayerNormalization <axis = -1> (d, scale)
    j = Reshape (n, whole)
    y = MatMul (j, wo)
"""


def test_heads_in_the_batch_of_a_convolution() -> None:
    """Every head is a picture of its own to it, and costs as much."""
    weights = {"parts": [1, 5, 3, 4], "folded": [3, 4, 5], "unfolded": [1, 3, 4, 5], "whole": [1, 5, 12], "scale": (4,)}
    model = net(POOLED, {**weights, "wq": (6, 12), "wp": (4, 1, 3), "wo": (12, 3)}, x=X)
    groups = grouped(model)
    assert sizes(groups) == [3]
    holds(groups)
    accounting = Accounting(groups, 0)
    two = accounting.widths({groups.prunable[0].id: np.arange(2)})
    macs = dict(zip((layer.name for layer in groups.layers), accounting.layer_macs(two), strict=True))
    assert macs == {"q": 5 * 6 * 8, "p": 2 * 4 * 5 * 3, "y": 5 * 8 * 3}


TOGETHER = """
    m = MatMul (x, w)
    r = Reshape (m, parts)
    t = Transpose <perm = [2, 0, 3, 4, 1]> (r)
    q = Gather <axis = 0> (t, zero)
    k = Gather <axis = 0> (t, one)
    v = Gather <axis = 0> (t, two)
    kt = Transpose <perm = [0, 1, 3, 2]> (k)
    s = MatMul (q, kt)
    p = Softmax <axis = -1> (s)
    o = MatMul (p, v)
    u = Transpose <perm = [0, 3, 1, 2]> (o)
    j = Reshape (u, whole)
    y = MatMul (j, wo)
"""


def test_attention_among_channels_of_one_layer_for_queries_keys_and_values() -> None:
    """[3, heads, places]: the softmax is over places, and the three are more than the two heads, but cannot go."""
    weights = {"w": (6, 24), "parts": [1, 5, 3, 2, 4], "whole": [1, 5, 8], "wo": (8, 3)}
    places = {k: np.array(i) for i, k in enumerate(("zero", "one", "two"))}
    groups = grouped(net(TOGETHER, {**weights, **places}, x=X))
    assert sizes(groups) == [2]
    holds(groups)


def test_the_option(tmp_path: Path, capsys: Any) -> None:
    """It is in the report, so that `verify` knows of it."""
    model = attending(2, 2, 4)
    result = onnxprune.prune(model, budget={"macs": 0.8}, method="l2", attention="heads")
    assert result.report["attention"] == "heads"
    assert result.report["validation"]["masked_max_relative_error"] < oracle.TOLERANCE
    onnx.save(model, tmp_path / "m.onnx")
    file, out = str(tmp_path / "m.onnx"), str(tmp_path / "o.onnx")
    assert main(["prune", file, "-o", out, "--macs", "0.8", "--method", "l2", "--attention", "heads", "-q"]) == 0
    assert main(["verify", file, out, "--report", out + ".report.json"]) == 0
    capsys.readouterr()
    with pytest.raises(OptionError, match="heads or dims"):
        onnxprune.prune(model, budget={"macs": 0.8}, method="l2", attention="places")
