"""All makers of operators by name, and which of them a version of the operator set has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import onnx.defs

from fuzzing import (
    attention,
    bodies,
    classical,
    contrib,
    elementwise,
    layers,
    movement,
    norms,
    quantised,
    recent,
    reshaping,
    strangers,
)
from fuzzing.build import Builder
from onnxprune.control import FLAT
from onnxprune.rules import STANDARD

Maker = Callable[[Builder], object]
Key = tuple[str, str]
OPSETS = tuple(range(7, 27))

MAKERS: dict[Key, Maker] = {
    ("", op): make
    for part in (
        elementwise.OPS, layers.OPS, norms.OPS, movement.OPS,
        movement.STRANGE, reshaping.OPS, strangers.OPS, attention.OPS, attention.COMPOSED, bodies.OPS, contrib.OPS,
        quantised.OPS, recent.OPS,
    )
    for op, make in part.items()
}  # fmt: skip
CONTRIB = (layers.CONTRIB, attention.CONTRIB, contrib.CONTRIB, quantised.CONTRIB)
MAKERS |= {("com.microsoft", op): make for part in CONTRIB for op, make in part.items()}
MAKERS |= {("ai.onnx.ml", op): make for op, make in classical.CLASSICAL.items()}
# No runtime here has an opset 27 or 28 that is not a preview.
OUT_OF_REACH = {("", op) for op in ("CausalConvWithState", "LinearAttention", "SwiGLU")}


def missing() -> list[Key]:
    """Operators that have a rule but no maker here; those of the flat graph stand for If, Loop and Scan."""
    return sorted({key for key in set(STANDARD) - set(MAKERS) - OUT_OF_REACH if key[0] != FLAT})


@cache
def available(key: Key, opset: int) -> bool:
    """Whether an operator exists in this version of the standard operator set; ONNX Runtime's own always do."""
    domain, op = key
    if domain or not onnx.defs.has(op):
        return True
    try:
        return not onnx.defs.get_schema(op, opset, "").deprecated
    except onnx.defs.SchemaError:
        return False


@cache
def choices(opset: int) -> list[Key]:
    """The operators to choose from in an operator set."""
    return [key for key in MAKERS if available(key, opset)]


@cache
def versions(key: Key) -> list[int]:
    """The operator sets that have an operator."""
    return [v for v in OPSETS if available(key, v)]
