"""Widths of layers that leave TensorRT's vectors half empty."""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune.targets import TARGETS
from onnxprune.trt.facts import Facts, Finding, attributes, label
from onnxprune.trt.quantised import PAIR

HINT = "onnxprune prune ... --target tensorrt keeps multiples"
_LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def findings(facts: Facts, original: Facts | None, *, quantised: bool) -> Iterator[Finding]:
    """Layers whose outputs are no multiple of what the target aligns to.

    original: what was pruned; then only layers whose width differs from it count. Layers narrower than a multiple stay out, and
    so do those that make the outputs of the model.
    """
    target = TARGETS["tensorrt"]
    align = target.integer if quantised else target.align
    before = None if original is None else dict(_widths(original))
    last = _last(facts)
    for name, width in _widths(facts):
        cut = before is None or before.get(name, width) != width
        if cut and width > align and width % align and name not in last:
            kind = "int8" if quantised else "fp16"
            yield Finding(
                "warning", f"the layer's width is no multiple of {align}, the vector of {kind}", f"{name} ({width})", HINT
            )


def _widths(facts: Facts) -> Iterator[tuple[str, int]]:
    """Channels out of each layer with a constant weight, or with one behind a DequantizeLinear."""
    behind = {n.output[0]: n.input[0] for n in facts.nodes() if n.op_type in PAIR and n.input}
    for node in facts.nodes():
        if node.op_type not in _LAYERS or node.domain not in ("", "ai.onnx") or len(node.input) < 2:
            continue
        name = node.input[1]
        while name in behind:
            name = behind[name]
        if name in facts.constants and len(facts.constants[name].dims) >= 2:
            yield label(node), _outputs(node.op_type, list(facts.constants[name].dims), attributes(node))


def _last(facts: Facts) -> set[str]:
    """The layers between which and an output of the model there is no other layer: their width is the user's."""
    made = {o: n for n in facts.model.graph.node for o in n.output}
    found, seen, todo = set(), set(), [o.name for o in facts.model.graph.output]
    while todo:
        node = made.get(todo.pop())
        if node is None or node.output[0] in seen:
            continue
        seen.add(node.output[0])
        if node.op_type in _LAYERS:
            found.add(label(node))
        else:
            todo += node.input
    return found


def _outputs(op: str, sizes: list[int], found: dict[str, object]) -> int:
    """ONNX: Conv [M, C/group, ...], ConvTranspose [C, M/group, ...], Gemm [K, N] or, transposed, [N, K], MatMul [..., K, N]."""
    group = found.get("group", 1)
    if op == "ConvTranspose":
        return sizes[1] * int(str(group))
    return sizes[0] if op == "Conv" or (op == "Gemm" and found.get("transB", 0)) else sizes[-1]
