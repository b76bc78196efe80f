"""All makers of operators by name, and which of them a version of the operator set has."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import onnx.defs

from fuzzing import elementwise, layers, movement, norms, reshaping, strangers
from fuzzing.build import Builder
from onnxprune.rules import STANDARD

Maker = Callable[[Builder], object]
Key = tuple[str, str]
OPSETS = tuple(range(7, 25))

MAKERS: dict[Key, Maker] = {
    ("", op): make
    for part in (
        elementwise.OPS, layers.OPS, norms.OPS, movement.OPS,
        movement.STRANGE, reshaping.OPS, strangers.OPS, strangers.COMPOSED,
    )
    for op, make in part.items()
}  # fmt: skip
MAKERS |= {("com.microsoft", op): make for part in (layers.CONTRIB, strangers.CONTRIB) for op, make in part.items()}


def missing() -> list[Key]:
    """Operators that have a rule but no maker here."""
    return sorted(set(STANDARD) - set(MAKERS))


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
