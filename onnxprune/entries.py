"""What a number in a shape tensor is made of: an entry, and what can be told of it whatever is cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from onnxprune.channels import Dim


@dataclass(frozen=True)
class Const:
    """A literal; `source` names the constant tensor and the flat index in it, None when it cannot be edited.

    use: the (node, input position) that took it from that tensor; None as long as it stands in the tensor itself.
    """

    value: int
    source: tuple[str, int] | None = None
    use: tuple[int, int] | None = None


@dataclass(frozen=True)
class Size:
    """The size of an axis at run time."""

    dim: Dim


@dataclass(frozen=True)
class Arith:
    """`op` of two entries, with ONNX's integer semantics."""

    op: str
    a: Entry
    b: Entry


@dataclass(frozen=True)
class Unknown:
    """A number that cannot be traced, beside others that can, e.g. a height scaled in floating point."""


Entry: TypeAlias = Const | Size | Arith | Unknown


def _truncated(a: int, b: int) -> int:
    return int(a / b) if b else 0  # ONNX Div on integers truncates towards zero


ARITHMETIC: dict[str, Callable[[int, int], int]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": _truncated,
    "Max": max,
    "Min": min,
    "Mod": lambda a, b: a % b if b else 0,
}


def evaluate(entry: Entry, size: Callable[[Dim], int]) -> int:
    """The entry's value when axis `d` has `size(d)` elements. ValueError for what is not known."""
    if isinstance(entry, Unknown):
        raise ValueError("an unknown number has no value")
    if isinstance(entry, Const):
        return entry.value
    if isinstance(entry, Size):
        return size(entry.dim)
    return ARITHMETIC[entry.op](evaluate(entry.a, size), evaluate(entry.b, size))


def sizes(entry: Entry) -> Iterator[Dim]:
    """The axes that an entry depends on."""
    if isinstance(entry, Size):
        yield entry.dim
    elif isinstance(entry, Arith):
        yield from sizes(entry.a)
        yield from sizes(entry.b)


def combined(op: str, a: Entry, b: Entry) -> Entry:
    """`op` of two entries; a literal that comes of two literals cannot be edited."""
    if isinstance(a, Unknown) or isinstance(b, Unknown):
        return Unknown()
    return Const(ARITHMETIC[op](a.value, b.value)) if isinstance(a, Const) and isinstance(b, Const) else Arith(op, a, b)


def operations(entry: Entry) -> int:
    """How many operations an entry takes."""
    return 1 + operations(entry.a) + operations(entry.b) if isinstance(entry, Arith) else 0


def same(a: Entry, b: Entry) -> bool | None:
    """Whether two entries are equal, whatever is cut; None where that cannot be told."""
    if isinstance(a, Const) and isinstance(b, Const):
        return a.value == b.value
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Const) and one.value < 0 and counts(other):
            return False
    return None


def counts(entry: Entry) -> bool:
    """Whether an entry can be told never to be negative."""
    if isinstance(entry, Arith):
        return entry.op != "Sub" and counts(entry.a) and counts(entry.b)
    return isinstance(entry, Size) or (isinstance(entry, Const) and entry.value >= 0)
