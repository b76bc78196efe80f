"""The innermost loop of the sensitivities, vector by vector: what numba's own loops lose to checks of overlapping arrays."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32  # numbers of 16 bits in a vector, which LLVM takes apart where the processor's are narrower
TOGETHER = 4  # vectors that share a row's weight: their maxima stay in registers


@intrinsic  # type: ignore[untyped-decorator]
def peaks(_: Any, r: Any, order: Any, light: Any, count: Any, least: Any, out: Any) -> Any:
    """out [B]: the maximum of r[order[t]] + light[t] over t < count, or `least` if that is larger. For compiled functions.

    r [R, B] int16, B a multiple of LANES; order [*] uint32; light [*] int16; count: intp; least: int16. All C-contiguous.
    """
    return types.void(r, order, light, types.intp, types.int16, out), _build


def _build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    given = dict(zip(("r", "order", "light", "count", "least", "out"), zip(signature.args, args, strict=True), strict=True))
    r, order, light, out = (
        context.make_array(given[name][0])(context, builder, given[name][1]) for name in ("r", "order", "light", "out")
    )
    (width,) = cgutils.unpack_tuple(builder, out.shape)
    loop = _Loop(builder, r.data, width, order.data, light.data, given["count"][1], given["least"][1], out.data)
    bulk = builder.and_(width, ir.Constant(width.type, -LANES * TOGETHER))
    loop.strips(ir.Constant(width.type, 0), bulk, TOGETHER)
    loop.strips(bulk, width, 1)
    return context.get_dummy_value()


class _Loop:
    """Emits the loops over strips of columns and, within, over rows."""

    def __init__(self, builder: Any, r: Any, width: Any, order: Any, light: Any, count: Any, least: Any, out: Any) -> None:
        self.builder, self.r, self.width, self.order, self.light = builder, r, width, order, light
        self.count, self.least, self.out = count, least, out
        self.kind = ir.VectorType(ir.IntType(16), LANES)

    def strips(self, start: Any, stop: Any, vectors: int) -> None:
        """The columns from start to stop, so many vectors of them at a time."""
        b = self.builder
        step = ir.Constant(self.width.type, vectors * LANES)
        with cgutils.for_range_slice(b, start, stop, step, self.width.type) as (column, _):
            best = [cgutils.alloca_once(b, self.kind) for _ in range(vectors)]
            floor = self._everywhere(self.least)
            for place in best:
                b.store(floor, place)
            with cgutils.for_range(b, self.count) as rows:
                self._row(rows.index, column, best)
            for k, place in enumerate(best):
                b.store(b.load(place), self._vector(self.out, column, k), align=2)

    def _row(self, t: Any, column: Any, best: list[Any]) -> None:
        b = self.builder
        row = b.zext(b.load(b.gep(self.order, [t])), self.width.type)
        weight = self._everywhere(b.load(b.gep(self.light, [t])))
        begin = b.add(b.mul(row, self.width), column)
        for k, place in enumerate(best):
            found, known = b.add(b.load(self._vector(self.r, begin, k), align=2), weight), b.load(place)
            b.store(b.select(b.icmp_signed(">", found, known), found, known), place)

    def _vector(self, base: Any, start: Any, k: int) -> Any:
        """Where the k-th vector from an element on lies."""
        b = self.builder
        return b.bitcast(b.gep(base, [b.add(start, ir.Constant(self.width.type, k * LANES))]), self.kind.as_pointer())

    def _everywhere(self, value: Any) -> Any:
        """A vector of one number."""
        b, none = self.builder, ir.Constant(self.kind, ir.Undefined)
        lane = b.insert_element(none, value, ir.Constant(ir.IntType(32), 0))
        return b.shuffle_vector(lane, none, ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES))
