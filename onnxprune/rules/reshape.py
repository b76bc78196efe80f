"""Operators that change how axes are cut up: Reshape, Flatten, Squeeze, Unsqueeze, Expand, Tile."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from onnxprune.channels import Dim, Freeze, Index, Tie, joined
from onnxprune.entries import Const, Entry, Size, Unknown, evaluate, sizes
from onnxprune.graph import Network
from onnxprune.rules.base import Fact, Fresh, MustEqual, Resize, Rule, View, Way, Ways, splittable
from onnxprune.rules.edits import Edit, SetAttr, SetConst, SetEntries, SetInput

# Operators whose rule looks after a shape operand, and where: it says what each entry must equal. Anywhere else a size is
# a number.
SHAPE_OPERANDS = {
    "AffineGrid": 1,
    "CenterCropPad": 1,
    "ConstantOfShape": 0,
    "Expand": 1,
    "MaxUnpool": 2,
    "Reshape": 1,
    "Resize": 3,
}
MEASURED = ("ConstantOfShape", "Expand", "Reshape", "Resize")  # entry k is the size of one output axis
MAX_BLOCK = 1 << 24  # positions; a block of merged axes larger than this is frozen rather than enumerated


# ------------------------------------------------------------------------------------------ which axes correspond


def axis_blocks(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Splits two shapes of equal size into the smallest runs of axes with equal products; axes of size 1 are left out."""
    a = [i for i, n in enumerate(before) if n != 1]
    b = [i for i, n in enumerate(after) if n != 1]
    result: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(a) and j < len(b):
        left, right = [a[i]], [b[j]]
        p, q = before[a[i]], after[b[j]]
        i, j = i + 1, j + 1
        while p != q:
            if p < q and i < len(a):
                p, i = p * before[a[i]], i + 1
                left.append(a[i - 1])
            elif q < p and j < len(b):
                q, j = q * after[b[j]], j + 1
                right.append(b[j - 1])
            else:
                return []
        result.append((left, right))
    return result


def pairs(before: Sequence[int], a: int, after: Sequence[int], b: int) -> tuple[Index, Index]:
    """The distinct (position on axis a, position on axis b) pairs under a reshape from `before` to `after`.

    Both positions are constant over runs of the common divisor of the two strides, and repeat with their common period.
    """
    inner_a, inner_b = int(np.prod(before[a + 1 :])), int(np.prod(after[b + 1 :]))
    period = math.lcm(inner_a * before[a], inner_b * after[b])
    flat = np.arange(0, min(int(np.prod(before)), period), math.gcd(inner_a, inner_b))
    code = np.unique((flat // inner_a) % before[a] * after[b] + (flat // inner_b) % after[b])
    return code // after[b], code % after[b]


@lru_cache(maxsize=4096)
def units(before: tuple[int, ...], a: int, after: tuple[int, ...], b: int) -> int:
    """How many channels the `pairs` of these axes leave, without enumerating them.

    While the axis of the larger stride stands at one position, the other runs through a row of neighbours: what counts is
    which neighbours are ever in one row, and which rows belong to one position.
    """
    axes = [(int(np.prod(before[a + 1 :])), before[a]), (int(np.prod(after[b + 1 :])), after[b])]
    (fine, n), (coarse, m) = sorted(axes)
    period = min(int(np.prod(before)), math.lcm(fine * n, coarse * m))
    rows = np.arange(period // coarse)
    first = rows * coarse // fine
    more = np.minimum(((rows + 1) * coarse - 1) // fine - first, n)  # neighbours in the row after the first
    change = np.bincount(first % n, minlength=2 * n + 1) - np.bincount(first % n + more, minlength=2 * n + 1)
    joined = np.cumsum(change)[: 2 * n].reshape(2, n).sum(axis=0) > 0  # whether position j ever shares a row with j + 1
    segment = np.concatenate([[0], np.cumsum(~joined[:-1])])
    if joined[-1]:
        segment %= max(1, segment[-1])  # the last position's neighbour is the first
    graph = coo_matrix((np.ones(len(rows), np.int8), (rows % m, m + segment[first % n])), shape=[m + segment.max() + 1] * 2)
    return int(connected_components(graph, directed=False)[0])


def reshape_ties(view: View) -> Iterator[Fact]:
    """Within each run of merged or split axes one pair of axes is tied, by default that which leaves most channels.

    Channels [C] split into [2, C/2] can be followed along either new axis, not along both: `View.way` says which.
    """
    before, after = view.shape(0), view.out_shape()
    live = view.live_axes(0)
    for left, right in axis_blocks(before, after):
        if len(left) == len(right) == 1:
            yield Tie(view.x(0, left[0]), view.y(right[0]))
            continue
        size = int(np.prod([before[i] for i in left]))
        if size > MAX_BLOCK:
            continue
        merged, split = tuple(before[i] for i in left), tuple(after[i] for i in right)
        choices = [(i, k) for i, axis in enumerate(left) if axis in live for k in range(len(right))]
        counts = {(i, k): _left(view, left[i], (merged, i, split, k)) for i, k in choices}
        ways = sorted((way for way in choices if counts[way] > 1), key=lambda way: -counts[way])
        if ways:
            yield Ways(len(ways))
            i, k = _chosen(ways, view.way)
            yield Tie(view.x(0, left[i]), view.y(right[k]), *pairs(merged, i, split, k))


def _left(view: View, axis: int, ends: tuple[tuple[int, ...], int, tuple[int, ...], int]) -> int:
    """How many channels a pair of axes leaves, with what is known to fall together on `axis` of the input."""
    labels = view.classes(view.x(0, axis))
    if labels is None:
        return units(*ends)
    return int(joined(labels, *pairs(*ends), ends[2][ends[3]]).max()) + 1


def _chosen(ways: Sequence[tuple[int, int]], way: Way) -> tuple[int, int]:
    """One of the pairs of axes, of which the first leaves most channels."""
    by_axis = sorted(ways)
    places = {"most": ways[0], "next": ways[1 % len(ways)], "outer": by_axis[0], "places": by_axis[-1]}
    return by_axis[-2 % len(ways)] if way == "heads" else places[way]


# --------------------------------------------------------------------------------- shape operands that count channels


def _meant(view: View, entry: Const) -> list[Dim] | None:
    """The axes whose sizes the number `entry` says, from the node on that took it; None where it reaches anything else."""
    if entry.source is None or entry.use is None:
        return None
    net, found = view.net, []
    names = [net.nodes[entry.use[0]].outputs[0].name]
    while names:
        name = names.pop()
        here = [isinstance(e, Const) and (e.source, e.use) == (entry.source, entry.use) for e in view.symbols.of(name) or []]
        if not any(here):
            continue
        if name in net.read_elsewhere:
            return None
        for index, position in net.uses.get(name, []):
            node, out = net.nodes[index], net.nodes[index].outputs[0].name
            if node.op in MEASURED and SHAPE_OPERANDS[node.op] == position and not node.domain and out in net.shapes:
                found += [Dim(out, axis) for axis, hit in zip(_measured(net, index), here, strict=True) if hit]
            elif view.symbols.hands_on(index, position):
                names.append(out)
            elif not view.symbols.indifferent(index):
                return None
    return found


def _measured(net: Network, index: int) -> list[int]:
    """The output axes whose sizes the entries of a node's shape operand say."""
    node = net.nodes[index]
    rank = len(net.shapes[node.outputs[0].name])
    if node.op == "Expand":
        return list(range(rank - int(np.prod(net.shapes[node.inputs[1].name])), rank))
    return [axis % rank for axis in node.attrs.get("axes", range(rank))]


def operand_facts(view: View, position: int, axes: Sequence[int]) -> Iterator[Fact]:
    """Facts about the shape operand at input `position`, whose entry k is the size of output axis `axes[k]`."""
    if view.fixed(position):
        return  # rewritten as a whole by `operand_edits`
    entries = view.symbols.of(view.name(position))
    for k, axis in enumerate(axes):
        entry = None if entries is None else _meaning(view, entries[k], axis)
        if entry is None or isinstance(entry, Unknown):
            yield Freeze(view.y(axis), f"{view} computes its size at run time")
        elif _writable(view, entry, axis) or (isinstance(entry, Const) and entry.value < 0):
            continue
        elif isinstance(entry, Const):
            meant = _meant(view, entry)
            if meant is None:
                yield Freeze(view.y(axis), f"{view} takes its size from a constant that other nodes use too")
            yield from (MustEqual(view.y(axis), Size(dim)) for dim in meant or [])
        else:
            yield MustEqual(view.y(axis), entry)


def _meaning(view: View, entry: Entry, axis: int) -> Entry:
    """What an entry says of output axis `axis`: 0 in a Reshape is the size of that axis of the input."""
    copied = isinstance(entry, Const) and entry.value == 0 and view.op == "Reshape" and not view.attr("allowzero", 0)
    return Size(view.x(0, axis)) if copied else entry


def _writable(view: View, entry: Entry, axis: int) -> bool:
    """Whether surgery may write a number for an entry that comes out wrong after a cut: it is the same in every run."""
    if isinstance(entry, Const) and entry.value < 0:
        return False
    return all(view.net.steady(d.tensor, d.axis) for d in (view.y(axis), *sizes(entry)))


def operand_edits(view: View, resize: Resize, position: int, axes: Sequence[int]) -> Iterator[Edit]:
    """Writes the new sizes into the shape operand at input `position`; what is computed and comes out right stays so."""
    old = view.value(position)
    if old is not None:
        new = [_entry(view, resize, int(v), axis) for v, axis in zip(old.ravel(), axes, strict=True)]
        if new != [int(v) for v in old.ravel()]:
            yield SetInput(position, np.array(new, old.dtype).reshape(old.shape))
        return
    wrong: dict[int, int] = {}
    for k, (given, axis) in enumerate(zip(view.symbols.of(view.name(position)) or [], axes, strict=False)):
        entry, size = _meaning(view, given, axis), resize.size(view.y(axis))
        stretched = view.op == "Expand" and isinstance(entry, Const) and entry.value == 1
        if isinstance(entry, Unknown) or stretched or evaluate(entry, resize.size) in (size, -1):
            continue
        if isinstance(entry, Const) and entry.source and entry.use and _agreed(view, resize, entry, size):
            yield SetConst(entry.source, entry.use, size)
        else:
            wrong[k] = size
    if wrong:
        yield SetEntries(position, wrong)


def _agreed(view: View, resize: Resize, entry: Const, size: int) -> bool:
    """Whether all axes whose sizes a constant says have the same size after the cut."""
    meant = _meant(view, entry)
    return meant is not None and all(resize.size(dim) == size for dim in meant)


def _entry(view: View, resize: Resize, value: int, axis: int) -> int:
    size = resize.size(view.y(axis))
    if value == 0 and view.op == "Reshape" and not view.attr("allowzero", 0):
        return 0 if resize.size(view.x(0, axis)) == size else size
    if value == -1 or (value == 1 and view.op == "Expand"):
        return value
    return size if resize.touches(view.y(axis)) else value


def reshape(view: View) -> Iterator[Fact]:
    yield from reshape_ties(view)
    if view.has(1):
        yield from operand_facts(view, 1, range(len(view.out_shape())))


def reshape_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    if "shape" in view.node.attrs:  # opset 1
        axes = range(len(view.out_shape()))
        yield SetAttr("shape", [_entry(view, resize, int(v), a) for v, a in zip(view.attr("shape"), axes, strict=True)])
    elif view.has(1):
        yield from operand_edits(view, resize, 1, range(len(view.out_shape())))


def expand(view: View) -> Iterator[Fact]:
    """Axes that are stretched from 1 are filled with one value; the others pass through."""
    out = view.out_shape()
    offset = len(out) - len(view.shape(0))
    for axis, size in enumerate(view.shape(0)):
        if size > 1:
            yield Tie(view.x(0, axis), view.y(axis + offset))
    short = int(np.prod(view.shape(1)))
    made = [axis for axis in range(len(out)) if axis < offset or view.shape(0)[axis - offset] == 1]
    yield from _filled(view, 1, range(len(out) - short, len(out)), made)


def _filled(view: View, position: int, axes: Sequence[int], made: Sequence[int]) -> Iterator[Fact]:
    """Axes in `made` hold one value throughout: as long as the axis that the operand measures, or as long as needed."""
    entries = view.symbols.of(view.name(position)) or []
    for entry, axis in zip(entries, axes, strict=False):
        if axis not in made or view.out_shape()[axis] < 2:
            continue
        if isinstance(entry, Size) and view.live(entry.dim) and not splittable(view.net, entry.dim.tensor):
            yield Tie(entry.dim, view.y(axis))
        elif view.fixed(position) or _writable(view, entry, axis) or (isinstance(entry, Const) and _meant(view, entry)):
            yield Fresh(view.y(axis))
    yield from operand_facts(view, position, axes)


def constant_of_shape(view: View) -> Iterator[Fact]:
    """One value everywhere, in the shape that the operand says."""
    axes = range(len(view.out_shape()))
    return _filled(view, 0, axes, axes)


def constant_of_shape_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    yield from operand_edits(view, resize, 0, range(len(view.out_shape())))


def expand_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    rank, short = len(view.out_shape()), int(np.prod(view.shape(1)))
    yield from operand_edits(view, resize, 1, range(rank - short, rank))


def tile(view: View) -> Iterator[Fact]:
    for axis, size in enumerate(view.shape(0)):
        times = view.out_shape()[axis] // max(size, 1)
        if size > 1:
            yield Tie(view.x(0, axis), view.y(axis), np.tile(np.arange(size), times), None)


def squeeze_ties(view: View) -> Iterator[Fact]:
    yield from reshape_ties(view)
    if view.op == "Squeeze" and not view.has(1) and "axes" not in view.node.attrs:
        # Without axes a channel axis that shrinks to one position would be squeezed away too.
        for axis in range(len(view.shape(0))):
            yield Freeze(view.x(0, axis), f"{view} names no axes: it would drop an axis cut to one position")


RULES = {
    "Reshape": Rule(reshape, reshape_fixup),
    "Flatten": Rule(reshape_ties),
    "Squeeze": Rule(squeeze_ties),
    "Unsqueeze": Rule(reshape_ties),
    "Expand": Rule(expand, expand_fixup),
    "Tile": Rule(tile),
    "ConstantOfShape": Rule(constant_of_shape, constant_of_shape_fixup),
}
