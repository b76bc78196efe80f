"""QuantizeLinear and DequantizeLinear as TensorRT takes them: symmetric, signed, with positive scales.

Facts from the source of the parser (onnx-tensorrt of TensorRT 10, QuantDequantLinearHelper; read, not run): scales have to be
positive, as many as the axis is long; zero points have to be 0; uint8 is read as int8, so that values above 127 steps would be
cut off; the type has to be int8, int4, float8e4m3fn or float4e2m1, so an int32 bias behind a DequantizeLinear is refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx

from onnxprune.trt.facts import Facts, Finding, attributes, label
from onnxprune.trt.operators import DOMAINS, FLOATS, QUANTISED, SYMMETRIC

PAIR = ("QuantizeLinear", "DequantizeLinear")
BIASES = "quantise without biases: extra_options={'QuantizeBias': False} of onnxruntime.quantization"


def present(facts: Facts) -> bool:
    """Whether the model is quantised by pairs of QuantizeLinear and DequantizeLinear."""
    return any(node.op_type in PAIR and node.domain in DOMAINS for node in facts.nodes())


def findings(facts: Facts, node: onnx.NodeProto) -> Iterator[Finding]:
    """What TensorRT would refuse in one of `PAIR`, or what cannot be told."""
    where = label(node)
    yield from (Finding("refused", f"{node.op_type} {what}", where, hint) for what, hint in _types(facts, node))
    yield from (Finding("refused", f"{node.op_type} {what}", where) for what in _scales(facts, node))
    for name, what in zip(node.input[1:3], ("scale", "zero point"), strict=False):
        if name and facts.array(name) is None:
            yield Finding("unknown", f"{node.op_type} has a {what} that is no constant of the file", where)


def _types(facts: Facts, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
    scale = facts.kind(node.input[1])
    if scale is not None and scale not in FLOATS:
        yield f"has a scale of {scale}", ""
    kind = _integers(facts, node)
    if kind == "uint8":
        yield "is of uint8, which TensorRT reads as int8: values above 127 steps would be cut off", SYMMETRIC
    elif kind == "int32" and node.op_type == "DequantizeLinear":
        yield "makes a bias of int32, which TensorRT has no such layer for", BIASES
    elif kind is not None and kind not in QUANTISED:
        yield f"is of {kind}", SYMMETRIC
    zero = facts.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero is not None and kind not in ("float8e4m3fn", "float4e2m1") and bool(np.any(np.asarray(zero, np.float64))):
        yield "has a zero point other than 0", SYMMETRIC


def _integers(facts: Facts, node: onnx.NodeProto) -> str | None:
    """The type of the quantised side: the zero point's, or that of what is dequantised, or output_dtype; uint8 by default."""
    if len(node.input) > 2 and node.input[2]:
        return facts.kind(node.input[2])
    if node.op_type == "DequantizeLinear":
        return facts.kind(node.input[0])
    dtype = attributes(node).get("output_dtype", 0)
    return facts.kind(node.output[0]) if dtype else "uint8"


def _scales(facts: Facts, node: onnx.NodeProto) -> Iterator[str]:
    found = facts.array(node.input[1])
    if found is None:
        return
    scale = np.asarray(found, np.float64)
    if not np.all(np.isfinite(scale)) or not np.all(scale > 0):
        yield f"has {int(np.sum(~(np.isfinite(scale) & (scale > 0))))} scales that are not positive and finite"
    zero = facts.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if zero is not None and zero.size != scale.size:
        yield f"has {scale.size} scales and {zero.size} zero points"
    sizes = facts.sizes(node.input[0])
    if scale.size == 1 or sizes is None:
        return
    if scale.ndim == 1:
        yield from _along(facts, node, scale.size, sizes)
    elif scale.ndim != len(sizes):
        yield f"has scales of {scale.ndim} axes for a tensor of {len(sizes)}"
    elif None not in sizes and sum(s != n for s, n in zip(scale.shape, sizes, strict=True)) != 1:
        yield "has scales in blocks along more than one axis"


def _along(facts: Facts, node: onnx.NodeProto, scales: int, sizes: list[int | None]) -> Iterator[str]:
    axis = attributes(node).get("axis", 1 if facts.opset >= 13 else 0)
    assert isinstance(axis, int)
    if not -len(sizes) <= axis < len(sizes):
        yield f"has axis {axis} of a tensor of {len(sizes)}"
    elif sizes[axis] not in (None, scales):
        yield f"has {scales} scales for an axis of {sizes[axis]}"
