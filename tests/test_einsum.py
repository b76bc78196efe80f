"""Products with named axes: Einsum, and the transposing matrix products of ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from axes import prunable, together, why
from onnx import numpy_helper
from single import FLAT, build, cut, holds, ints, seeded, shape, w

from onnxprune import runtime
from onnxprune.channels import Dim
from onnxprune.contraction import normal_form
from onnxprune.groups import Accounting, Groups
from onnxprune.passes.group import group
from onnxprune.rules.einsum import parse

Array = np.ndarray[Any, Any]
__all__ = ["seeded"]  # every test draws the same weights

SPACE = {"sf": ints(1, 8, 36)}
MS = {"domain": "com.microsoft"}


def einsum(text: str, reads: str = "f wl", makes: str = "y") -> tuple[str, str, str, dict[str, str]]:
    return ("Einsum", reads, makes, {"equation": text})


def test_equations() -> None:
    assert parse("bij, jk -> bik", [3, 2]).operands == (("b", "i", "j"), ("j", "k"))
    assert parse("ij,jk", [2, 2]).out == ("i", "k")
    assert parse("bA,Ca", [2, 2]).out == ("A", "C", "a", "b")  # upper case first
    assert parse("...ij,...jk->...ik", [4, 3]).operands == (("...2", "...1", "i", "j"), ("...1", "j", "k"))
    assert parse("...ij,...jk->...ik", [4, 3]).out == ("...2", "...1", "i", "k")
    assert parse("i...->...", [3]).out == ("...2", "...1")
    assert parse("...i,i", [3, 1]).out == ("...2", "...1")


@pytest.mark.parametrize(
    ("text", "reads", "shape", "axis"),
    [
        ("bcs,cd->bds", "f wl", (8, 4), 0),
        ("dc,bcs->bsd", "wl f", (4, 8), 1),
        ("...cs,dc->...ds", "f wl", (4, 8), 1),
        ("bcs,cd", "f wl", (8, 4), 0),
        ("bcs,c->bs", "f wl", (8,), 0),
        ("bcs,csd->bd", "f wl", (8, 36, 3), 0),
        ("bcs,scd->bds", "f wl", (36, 8, 3), 1),  # a weight for every place
    ],
)
def test_a_label_that_is_summed_over_a_weight_is_consumed(text: str, reads: str, shape: tuple[int, ...], axis: int) -> None:
    g = build([*FLAT, einsum(text, reads)], {**SPACE, "wl": w(*shape)})
    assert together(g, "a.1[5]", "f.1[5]", f"wl.{axis}[5]")
    assert next(role for d, role in g.roles.items() if d.tensor == "wl" and d.axis == axis) == "consumer"
    layer = next(x for x in g.layers if x.out.tensor == "y")
    assert (layer.x, layer.w) == (Dim("f", 1), Dim("wl", axis))
    holds(g)


def computes(g: Groups, name: str = "y", alpha: float = 1.0) -> None:
    """Asserts that the normal form of every layer of the node computes what the node does, up to `alpha`, in some order."""
    layers = [layer for layer in g.layers if layer.out.tensor == name]
    seconds = [layer.weight or (layer.other.tensor if layer.other else "") for layer in layers]
    wanted = sorted({name, *(x.x.tensor for x in layers), *seconds} - set(g.net.initializers))
    session = runtime.session(runtime.with_outputs(g.net.model, wanted), optimise=False)
    values = dict(zip(wanted, runtime.run(session, {"x": w(*g.net.shapes["x"])}), strict=True))
    values |= {t: numpy_helper.to_array(p) for t, p in g.net.initializers.items()}
    assert layers
    for layer, second in zip(layers, seconds, strict=True):
        made = []
        for c in normal_form(g, layer, values[layer.x.tensor], values[second]):
            taps = c.x.reshape(*c.x.shape[:2], -1, c.x.shape[-1])
            made.append(np.einsum("nitr,oit->nor", taps, c.w.reshape(*c.w.shape[:2], -1)).ravel())
        np.testing.assert_allclose(np.sort(alpha * np.concatenate(made)), np.sort(values[name].ravel()), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("text", "reads", "weight"),
    [
        ("bcs,cd->bds", "f wl", (8, 4)),
        ("bcs,c->bs", "f wl", (8,)),
        ("bcs,csd->bd", "f wl", (8, 36, 3)),
        ("bcs,cd->bd", "f wl", (8, 4)),  # the places are summed without weights
        ("bcs,scd->bds", "f wl", (36, 8, 3)),
        ("bcs,cdk->bds", "f wl", (8, 4, 2)),  # part of the weight is summed by itself
        ("cb,zcs->sb", "wl f", (8, 4)),
        ("bcs,Bcd->bds", "f wl", (1, 8, 4)),
        ("bcs,bcd->bds", "f wl", (1, 8, 4)),  # stretched
        ("bcs,bct->bst", "f f", (1,)),
        ("bcs,bcs->b", "f f", (1,)),
    ],
)
def test_the_normal_form_of_an_einsum_computes_it(text: str, reads: str, weight: tuple[int, ...]) -> None:
    weights = {**SPACE, "wl": w(*weight)} if "wl" in reads else SPACE
    computes(build([*FLAT, einsum(text, reads)], weights))


HEADS = [("Reshape", "a sh", "f")]  # [1, 4 heads, 2 places, 36]
FOUR = {"sh": ints(1, 4, 2, 36)}


def test_two_labels_that_are_summed_are_two_kinds_of_channels() -> None:
    """The projection behind attention: heads and places within a head."""
    nodes = [("Transpose", "a", "t", {"perm": [0, 2, 3, 1]}), einsum("bxyc,chd->bxyhd", "t wq", "q")]
    g = build([*nodes, einsum("bxyhd,hdm->bxym", "q wo")], {"wq": w(8, 4, 5), "wo": w(4, 5, 3)})
    assert together(g, "q.3[2]", "wq.1[2]", "wo.0[2]")
    assert together(g, "q.4[2]", "wq.2[2]", "wo.1[2]")
    assert (prunable(g, "q", 3), prunable(g, "q", 4), prunable(g, "a")) == (4, 5, 8)
    assert [(x.name, x.factor, len(x.macs_dims)) for x in g.layers if x.index == 3] == [("y (h)", 1, 5), ("y (d)", 0, 0)]
    assert shape(cut(g, "q.4", [1, 3]), "wo") == (4, 3, 3)
    computes(g)
    holds(g)


def test_labels_of_the_batch_that_a_weight_has_too_are_handed_on() -> None:
    g = build(
        [*HEADS, einsum("bhds,hde->bhes", "f wh", "e"), einsum("bhes,he->bs", "e wl")],
        {**FOUR, "wh": w(4, 2, 6), "wl": w(4, 6)},
    )
    assert together(g, "f.1[3]", "wh.0[3]", "e.1[3]", "wl.0[3]", "a.1[6]", "a.1[7]")
    assert together(g, "e.2[3]", "wh.2[3]", "wl.1[3]")
    computes(g)
    computes(g, "e")
    holds(g)


def test_two_activations_are_contracted_where_one_of_them_can_be_silenced() -> None:
    g = build([*FLAT, einsum("bcs,bct->bst", "f f", "s"), einsum("bst,tk->bsk", "s wl")], {**SPACE, "wl": w(36, 3)})
    assert prunable(g, "a") == 8
    computes(g, "s")
    holds(g)
    nodes = [("Exp", "f", "e"), einsum("bcs,bct->bst", "e e", "s"), einsum("bst,tk->bsk", "s wl")]
    g = build([*FLAT, *nodes], {**SPACE, "wl": w(36, 3)})
    assert why(g, "a").endswith("none of them can be silenced where it is made")


@pytest.mark.parametrize(
    ("text", "reads", "words"),
    [
        ("bcs->bs", "f", "sums over it without weights"),
        ("bcs,sd->bd", "f ws", "sums over it without weights"),
        ("bcs,cd,cd->bds", "f wl wl", "sums products of more than two tensors over it"),
        ("bcc->bc", "g", "takes a diagonal of it"),
    ],
)
def test_what_an_einsum_freezes(text: str, reads: str, words: str) -> None:
    nodes = [*FLAT, ("MatMul", "f sq", "g"), einsum(text, reads)]
    g = build(nodes, {**SPACE, "wl": w(8, 3), "ws": w(36, 3), "sq": w(36, 8)})
    assert why(g, "a") == f"Einsum 'y' {words}"


def test_an_einsum_of_constants_freezes_what_it_sums_over() -> None:
    g = build([*FLAT, einsum("cd,de->ce", "u v", "wl"), einsum("bcs,ce->bes")], {**SPACE, "u": w(8, 5), "v": w(5, 4)})
    assert "has a weight that no constant silences" in why(g, "a")
    assert prunable(g, "u", 1) == 0
    assert [(x.name, x.op) for x in g.layers] == [("a", "Conv"), ("wl", "Einsum"), ("y", "Einsum")]


# ---- FusedMatMul


@pytest.mark.parametrize("op", ["FusedMatMul", "TransposeMatMul"])
@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_a_fused_matmul_may_transpose_its_operands(op: str, trans_a: int, trans_b: int) -> None:
    nodes = FLAT if trans_a else [*FLAT, ("Transpose", "f", "g", {"perm": [0, 2, 1]})]
    attributes = {"transA": trans_a, "transB": trans_b, "alpha": 0.5, **MS}
    g = build([*nodes, (op, "f wl" if trans_a else "g wl", "y", attributes)], {**SPACE, "wl": w(3, 8) if trans_b else w(8, 3)})
    assert together(g, "a.1[5]", f"wl.{trans_b}[5]")
    if op == "FusedMatMul":
        computes(g, alpha=0.5)
    holds(g)


@pytest.mark.parametrize(
    ("side", "trans", "weight", "tied"),
    [
        ("A", 0, (6, 6, 5), "b.1[3]"),  # [M, batch, K]
        ("A", 1, (6, 8, 5), "wl.1[3]"),  # [K, batch, M]
        ("B", 0, (6, 5, 8), "wl.2[3]"),  # [K, batch, N]
        ("B", 1, (6, 5, 6), "b.2[3]"),  # [N, batch, K]
    ],
)
def test_a_fused_matmul_may_move_the_first_axis_inwards(side: str, trans: int, weight: tuple[int, ...], tied: str) -> None:
    attributes = {f"transBatch{side}": 1, f"trans{side}": trans, **MS}
    nodes = [("Reshape", "a s", "f"), ("FusedMatMul", "f wl" if side == "A" else "wl f", "b", attributes)]
    last = ("MatMul", "wo b" if tied == "b.1[3]" else "b wo", "y")
    wide = {"b.1[3]": (2, 8), "b.2[3]": (8, 2)}.get(tied, (6 if side == "B" else 5, 2))
    g = build([*nodes, last], {"s": ints(8, 6, 6), "wl": w(*weight), "wo": w(*wide)})
    assert together(g, "f.0[3]", "a.1[3]", tied)
    computes(g, "b")
    holds(g)


def test_a_fused_matmul_takes_vectors() -> None:
    """But for a transposed matrix times a vector, of which ONNX Runtime makes something else."""
    g = build([*FLAT, ("FusedMatMul", "wl f", "y", MS)], {**SPACE, "wl": w(8)})
    assert g.net.shapes["y"] == (1, 36)
    assert together(g, "a.1[5]", "wl.0[5]")
    computes(g)
    holds(g)
    g = build([*FLAT, ("FusedMatMul", "f wl", "y", {"transA": 1, **MS})], {**SPACE, "wl": w(8)})
    assert why(g, "a") == "FusedMatMul 'y' mixes its positions"


@pytest.mark.parametrize(
    "nodes",
    [
        [*FLAT, einsum("bcs,cd->bds", "f wl")],
        [*FLAT, ("Transpose", "f", "g", {"perm": [0, 2, 1]}), ("FusedMatMul", "g wl", "y", MS)],
        [*FLAT, einsum("bcs,bct->bst", "f f")],
    ],
)
def test_a_layer_that_sums_over_one_channel_is_still_a_layer(nodes: list[Any]) -> None:
    """What is predicted of a cut to one channel is what an analysis of the pruned file counts."""
    g = build(nodes, {**SPACE, "wl": w(8, 4)})
    (only,) = g.prunable
    accounting = Accounting(g, 0)
    pruned = group(runtime.probe(cut(g, "a.1", range(1, 8))))
    said = accounting.size(accounting.widths({only.id: np.array([0])}))
    after = Accounting(pruned, 0)
    assert after.size(after.full_widths).macs == said.macs
    assert [x.op for x in pruned.layers] == [x.op for x in g.layers]
