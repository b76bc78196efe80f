"""Shape arithmetic: sizes of axes at run time, as exporters compute the targets of Reshape, Expand, Slice and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fuzzing.build import Builder, NoFitError, T


@dataclass(frozen=True)
class Part:
    """A size: the product of some axes of a tensor, times one number, divided by another."""

    of: T | None = None
    axes: tuple[int, ...] = ()
    times: int = 1
    over: int = 1

    @property
    def values(self) -> tuple[int, ...]:
        """On each set of inputs."""
        shapes = [v.shape for v in self.of.values] if self.of is not None else [(), ()]
        return tuple(int(np.prod([s[a] for a in self.axes])) * self.times // self.over for s in shapes)

    @property
    def static(self) -> bool:
        return len(set(self.values)) == 1


def axis_size(b: Builder, t: T, axis: int) -> T:
    """The size of an axis, as a vector of one element."""
    how = b.choose(["gather", "gather", "scalar", "slice", "shape", "cast"])
    if how == "shape" and b.opset >= 15:
        return b.op("Shape", [t], start=axis, end=axis + 1 if axis + 1 < t.rank or b.chance(0.5) else None)
    whole = b.op("Shape", [t])
    if how == "slice" and b.opset >= 10:
        return b.op("Slice", [whole, b.ints(axis), b.ints(axis + 1), *([b.ints(0)] if b.chance(0.5) else [])])
    if how == "slice":
        return b.op("Slice", [whole], starts=[axis], ends=[axis + 1])
    if how == "scalar":
        return unsqueeze(b, b.op("Gather", [whole, b.const(np.array(axis, np.int64))], axis=0), [0])
    if how == "cast":
        whole = b.op("Cast", [b.op("Cast", [whole], to=6)], to=7)
    return b.op("Gather", [whole, b.ints(axis if b.chance(0.7) else axis - t.rank)])


def unsqueeze(b: Builder, t: T, axes: Sequence[int]) -> T:
    return by_axes(b, "Unsqueeze", t, axes, 13)


def by_axes(b: Builder, op: str, x: T, axes: Sequence[int] | None, since: int, **attributes: int | None) -> T:
    """An operator whose `axes` became an input in opset `since`."""
    if axes is None:
        return b.op(op, [x], **attributes)
    if b.opset >= since:
        return b.op(op, [x, b.ints(*axes)], **attributes)
    return b.op(op, [x], axes=[int(a) for a in axes], **attributes)


def one(b: Builder, part: Part) -> T:
    """The value of a part at run time, as a vector of one element."""
    if part.of is None or not part.axes:
        return b.ints(*part.values[:1])
    made = axis_size(b, part.of, part.axes[0])
    for axis in part.axes[1:]:
        made = b.op("Mul", [made, axis_size(b, part.of, axis)])
    if part.times != 1:
        pair = [made, b.ints(part.times)]
        made = b.op("Mul", pair if b.chance(0.5) else pair[::-1])
    if part.over != 1:
        made = b.op("Div", [made, b.ints(part.over)])
    if b.chance(0.1):
        made = b.op("Sub", [b.op("Add", [made, b.ints(3)]), b.ints(3)])
    return made


def vector_of(b: Builder, parts: Sequence[Part], literal: float = 0.7) -> T:
    """All parts in one vector; those that never change are written as numbers with probability `literal`."""
    if not parts:
        raise NoFitError
    if all(p.static for p in parts) and b.chance(literal):
        return b.ints(*(p.values[0] for p in parts))
    pieces = [b.ints(*p.values[:1]) if p.static and b.chance(literal) else one(b, p) for p in parts]
    return b.op("Concat", pieces, axis=0)


def another(b: Builder, part: Part) -> Part:
    """The same size read from another axis, of any tensor, that is as long on all sets of inputs."""
    found = [(t, a) for t in b.pool if t.dtype.kind == "f" for a in range(t.rank) if t.sizes(a) == part.values]
    if not found:
        return part
    t, axis = b.choose(found)
    return Part(t, (axis,))


def shape_parts(t: T) -> list[Part]:
    """The shape of a tensor, size by size."""
    return [Part(t, (a,)) for a in range(t.rank)]


def shape_like(b: Builder, t: T) -> T:
    """The shape of a tensor as a vector: a constant, Shape itself, or put together; some sizes from other tensors."""
    steady = t.steady
    if steady and b.chance(0.4):
        return b.ints(*t.shape)
    if b.chance(0.5):
        same = [o for o in b.pool if o.rank == t.rank and all(o.sizes(a) == t.sizes(a) for a in range(t.rank))]
        return b.op("Shape", [b.choose(same or [t])])
    return vector_of(b, [another(b, p) if b.chance(0.3) else p for p in shape_parts(t)])
