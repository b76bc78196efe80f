"""What the table of operators says beside yes and no: attributes, ranks, outputs, and inputs that have to be constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import onnx

from onnxprune.control import bodies
from onnxprune.trt.facts import Facts, Finding, attributes, label

Attributes: TypeAlias = Mapping[str, Any]
Rule: TypeAlias = Callable[[Facts, onnx.NodeProto, Attributes], Iterator[str]]

RESIZE = {
    "coordinate_transformation_mode": (
        "half_pixel",
        "pytorch_half_pixel",
        "tf_half_pixel_for_nn",
        "asymmetric",
        "align_corners",
    ),
    "mode": ("nearest", "linear"),
    "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
    "keep_aspect_ratio_policy": ("stretch",),
    "antialias": (0,),
}
TOP_K_BELOW = 3840
STATIC = ("EyeLike", "Hardmax")


def findings(facts: Facts, node: onnx.NodeProto) -> Iterator[Finding]:
    """Where a node that the table takes breaks a restriction of it, or may: some depend on values made at run time."""
    found = attributes(node)
    for why in _refusals(facts, node, found):
        yield Finding("refused", f"{node.op_type} {why}", label(node))
    for position in CONSTANT.get(node.op_type, ()):
        name = node.input[position] if position < len(node.input) else ""
        if name and name not in facts.fixed:
            what = f"{node.op_type} takes input {position} as a constant only, and it seems to be computed from the inputs"
            yield Finding(
                "unknown", what, label(node), "fold constants first, e.g. polygraphy surgeon sanitize --fold-constants"
            )
    if node.op_type in STATIC and None in (facts.sizes(node.input[0]) or [None]):
        yield Finding("unknown", f"{node.op_type} takes an input of declared sizes only, as listed", label(node))
    if node.op_type == "Loop" and len(bodies(node)) == 1 and _scans(node) > 0:
        yield Finding("unknown", "Loop may not make outputs whose length depends on the data", label(node))


def _refusals(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    for rule in RULES.get(node.op_type, ()):
        yield from rule(facts, node, found)


def _scans(node: onnx.NodeProto) -> int:
    """How many outputs of a Loop gather what its body makes in every step (ONNX, Loop: K of N + K)."""
    return len(node.output) - max(0, len(node.input) - 2)


def _given(node: onnx.NodeProto, position: int) -> bool:
    return len(node.output) > position and bool(node.output[position])


def _pooling(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    kernel = len(found.get("kernel_shape", (1, 1)))
    if kernel > 3:  # the list says 2 or 3; the parser's source adds an axis where there is 1
        yield f"is over {kernel} spatial axes, and only 2 or 3 are listed"
    yield from _undilated(facts, node, found)


def _undilated(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    if any(d != 1 for d in found.get("dilations", ())):
        yield f"has dilations {list(found['dilations'])}, and only 1 is listed"


def _no_indices(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    if _given(node, 1):
        yield "hands out its indices"


def _one_output(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    if _given(node, 1) or _given(node, 2):
        yield "hands out more than its first output"


def _same_activations(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    given = [a.decode() if isinstance(a, bytes) else a for a in found.get("activations", ())]
    if found.get("direction") == "bidirectional" and given[: len(given) // 2] != given[len(given) // 2 :]:
        yield f"has other activations forward than back ({', '.join(given)})"


def _plain_layout(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    for name in ("input_forget", "layout"):
        if found.get(name, 0):
            yield f"has {name} = {found[name]}, and only 0 is listed"


def _resize(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    for name, known in RESIZE.items():
        if name == "nearest_mode" and found.get("mode", "nearest") != "nearest":
            continue
        if name in found and found[name] not in known:
            yield f"has {name} '{found[name]}', which is not listed"


def _grid(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    sizes = facts.sizes(node.input[0])
    if sizes is not None and len(sizes) not in ((4, 5) if facts.version >= (11, 2) else (4,)):
        yield f"of {len(sizes)} axes is not listed"


def _deformable(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    sizes = facts.sizes(node.input[0])
    if sizes is not None and len(sizes) not in (3, 4):
        yield f"has {len(sizes) - 2} spatial axes, and only 1 or 2 are listed"
    pads = list(found.get("pads", ()))
    if pads[: len(pads) // 2] != pads[len(pads) // 2 :]:
        yield "pads the two ends of an axis differently"


def _no_reduction(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    if found.get("reduction", "none") != "none":
        yield f"has reduction '{found['reduction']}', and only none is listed"


def _top(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    if found.get("sorted", 1) != 1:
        yield "has sorted = 0, and only 1 is listed"
    value = facts.array(node.input[1]) if len(node.input) > 1 else None
    count = found.get("k") if value is None else int(value.reshape(-1)[0])
    if count is not None and count >= TOP_K_BELOW:
        yield f"takes the first {count}, and only less than {TOP_K_BELOW} are listed"


def _attention(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    for position, name in enumerate(node.input[:4]):
        sizes = facts.sizes(name) if name else None
        if sizes is not None and len(sizes) != 4:
            yield f"has input {position} of {len(sizes)} axes, and only 4 are listed"
    if any(node.input[4:]):
        yield "has a cache or lengths as inputs"
    if any(node.output[1:]):
        yield "hands out more than its first output"
    for name in ("qk_matmul_output_mode", "softcap"):
        if found.get(name, 0):
            yield f"has {name}"


def _tensor_scatter(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    for position in (0, 1):
        sizes = facts.sizes(node.input[position])
        if sizes is not None and len(sizes) != 4:
            yield f"has input {position} of {len(sizes)} axes, and only 4 are listed"
    if found.get("axis", -2) != -2:
        yield f"has axis {found['axis']}, and only -2 is listed"


def _constant(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    for name in ("sparse_value", "value_string", "value_strings"):
        if name in found:
            yield f"has {name}"


def _branches(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    inside = bodies(node)
    for number in range(len(node.output) if len(inside) == 2 else 0):
        first, second = (body.output[number] for body in inside)
        if first.name == second.name:
            yield f"has an output '{first.name}' in both branches, and names have to differ"
        ranks = [len(v.type.tensor_type.shape.dim) for v in (first, second) if v.type.tensor_type.HasField("shape")]
        if len(set(ranks)) > 1:
            yield f"has {ranks[0]} axes in output {number} of one branch and {ranks[1]} in that of the other"


def _inference(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    value = facts.array(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if value is not None and bool(value.reshape(-1)[0]):
        yield "is in training mode"


def _positions(facts: Facts, node: onnx.NodeProto, found: Attributes) -> Iterator[str]:
    if len(node.input) > 3 and node.input[3] and facts.kind(node.input[3]) not in (None, "int64"):
        yield f"has position ids of {facts.kind(node.input[3])}, and only int64 is listed"


RULES: Mapping[str, tuple[Rule, ...]] = {
    "Attention": (_attention,),
    "AveragePool": (_pooling,),
    "Constant": (_constant,),
    "DeformConv": (_deformable,),
    "Dropout": (_inference,),
    "GRU": (_same_activations,),
    "GridSample": (_grid,),
    "If": (_branches,),
    "LSTM": (_same_activations, _plain_layout),
    "LayerNormalization": (_one_output,),
    "LpPool": (_undilated,),
    "MaxPool": (_pooling, _no_indices),
    "RNN": (_same_activations,),
    "Resize": (_resize,),
    "RotaryEmbedding": (_positions,),
    "ScatterND": (_no_reduction,),
    "TensorScatter": (_tensor_scatter,),
    "TopK": (_top,),
}
"""What the table refuses of operators that it takes, in words that follow the operator's name."""

CONSTANT: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(
        (
            *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
            *("ReduceProd", "ReduceSum", "ReduceSumSquare", "CumSum", "OneHot", "Squeeze", "Unsqueeze"),
        ),
        (1,),
    ),
    "Dropout": (2,),
    "STFT": (1, 2),
}
"""Inputs that have to be known when the engine is built."""
