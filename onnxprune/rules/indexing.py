"""Operators that look positions up, write to them or put them in order: the axes that they do not index pass through."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Freeze, Tie
from onnxprune.graph import Array
from onnxprune.rules.base import Fact, Resize, Rule, View
from onnxprune.rules.edits import Edit, SetInput

RUN_TIME = "export with constant indices"


def _axes(view: View, skip: set[int], output: int = 0) -> Iterator[Fact]:
    """Ties all axes of input 0 to those of an output but for the ones in `skip`."""
    for axis, size in enumerate(view.shape(0)):
        if axis not in skip and size > 1:
            yield Tie(view.x(0, axis), view.y(axis, output))


# --------------------------------------------------------------------------------------- tuples of indices, as constants


def _parts(indices: Array, sizes: tuple[int, ...]) -> list[tuple[int | None, Array] | None]:
    """For every component of the index tuples the axis of `indices` along which alone it varies, and its values there.

    sizes: those of the indexed axes. The axis is None for a constant component; components that vary along several axes
    give None.
    """
    found: list[tuple[int | None, Array] | None] = []
    for k, size in enumerate(sizes):
        part = indices[..., k] % size  # negative ones count from the end
        varies = [e for e in range(part.ndim) if not np.array_equal(part, np.broadcast_to(part.take([0], e), part.shape))]
        if len(varies) > 1 or part.size == 0:
            found.append(None)
        elif varies:
            found.append((varies[0], np.moveaxis(part, varies[0], -1).reshape(-1, part.shape[varies[0]])[0]))
        else:
            found.append((None, part.ravel()[:1]))
    return found


def _renumbered(indices: Array, first: int, resize: Resize, view: View, source: int) -> Array:
    """The tuples with new numbers for the positions that stay on the axes of input `source`, from axis `first` on."""
    new = indices.copy()
    for k in range(indices.shape[-1]):
        dim = view.x(source, first + k)
        number = np.zeros(resize.full(dim), indices.dtype)
        number[resize.kept(dim)] = np.arange(resize.size(dim))
        new[..., k] = number[indices[..., k] % resize.full(dim)]
    return new


def gather_nd(view: View) -> Iterator[Fact]:
    """out[b, i, ...] = data[b, indices[b, i], ...] with `batch_dims` axes b; the indices are tuples of k."""
    batch, k, lead = view.attr("batch_dims", 0), view.shape(1)[-1], len(view.shape(1)) - 1
    for axis in range(batch + k, len(view.shape(0))):
        yield Tie(view.x(0, axis), view.y(lead + axis - batch - k))
    indices = view.value(1)
    for axis in range(batch):
        yield Tie(view.x(0, axis), view.y(axis))
        if indices is None:
            yield Tie(view.x(1, axis), view.y(axis))
    if indices is None:
        for axis in range(batch, batch + k):
            yield Freeze(view.x(0, axis), f"{view} looks positions up at run time", remedy=RUN_TIME)
        return
    for axis, part in enumerate(_parts(indices, view.shape(0)[batch : batch + k]), start=batch):
        if part is None:
            yield Freeze(view.x(0, axis), f"{view} looks up other positions of it in every row")
        elif part[0] is None:
            yield Freeze(view.x(0, axis), f"{view} takes position {part[1][0]} of it", part[1])
        else:
            yield Tie(view.x(0, axis), view.y(part[0]), part[1], None)


def gather_nd_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """Rows for the positions that stay, with their new numbers."""
    indices = view.value(1)
    if indices is None:
        return
    new = _renumbered(indices, view.attr("batch_dims", 0), resize, view, 0)
    for axis in range(indices.ndim - 1):
        new = np.take(new, resize.kept(view.y(axis)), axis)
    if new.shape != indices.shape or not np.array_equal(new, indices):
        yield SetInput(1, new)


def scatter_nd(view: View) -> Iterator[Fact]:
    """out = data, but out[indices[i], ...] = updates[i, ...]; the indices are tuples of k."""
    k, lead = view.shape(1)[-1], len(view.shape(1)) - 1
    yield from _axes(view, set())
    for axis in range(k, len(view.shape(0))):
        yield Tie(view.y(axis), view.x(2, lead + axis - k))
    indices = view.value(1)
    if indices is None:
        for axis in range(k):
            yield Freeze(view.x(0, axis), f"{view} writes to positions found at run time", remedy=RUN_TIME)
        return
    for axis, part in enumerate(_parts(indices, view.shape(0)[:k])):
        if part is None:
            yield Freeze(view.x(0, axis), f"{view} writes to other positions of it in every row")
        elif part[0] is None:
            yield Freeze(view.x(0, axis), f"{view} writes to position {part[1][0]} of it", part[1])
        else:
            yield Tie(view.x(2, part[0]), view.y(axis), None, part[1])


def scatter_nd_fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """Rows for the updates that stay, with the new numbers of the positions that they are written to."""
    indices = view.value(1)
    if indices is None:
        return
    new = _renumbered(indices, 0, resize, view, 0)
    for axis in range(indices.ndim - 1):
        new = np.take(new, resize.kept(view.x(2, axis)), axis)
    if new.shape != indices.shape or not np.array_equal(new, indices):
        yield SetInput(1, new)


# ----------------------------------------------------------------------------------------------- one index per element


def gather_elements(view: View) -> Iterator[Fact]:
    """out[i, j] = data[i, indices[i, j]]: along the other axes `indices` covers the first positions of `data`."""
    indexed = view.attr("axis", 0) % len(view.shape(0))
    for axis, size in enumerate(view.shape(1)):
        if axis == indexed:
            yield Freeze(view.x(0, axis), f"{view} looks positions of it up one by one")
        else:
            yield Tie(view.x(0, axis), view.x(1, axis), np.arange(size), None)
        yield Tie(view.x(1, axis), view.y(axis))


def scatter_elements(view: View) -> Iterator[Fact]:
    """out = data, but out[i, indices[i, j]] = updates[i, j]: along the other axes the first positions are covered."""
    indexed = view.attr("axis", 0) % len(view.shape(0))
    yield from _axes(view, set())
    for axis, size in enumerate(view.shape(1)):
        if axis == indexed:
            yield Freeze(view.x(0, axis), f"{view} writes to positions of it one by one")
            for i in (1, 2):  # an update that goes would leave its place in the output as it was
                yield Freeze(view.x(i, axis), f"{view} writes it to other positions")
        else:
            yield Tie(view.x(0, axis), view.x(1, axis), np.arange(size), None)
            yield Tie(view.x(2, axis), view.x(1, axis))


def tensor_scatter(view: View) -> Iterator[Fact]:
    """Writes the update into the cache along `axis`, from where `write_indices` say for each entry of the batch."""
    indexed = view.attr("axis", -2) % len(view.shape(0))
    yield from _axes(view, {indexed})
    for axis, size in enumerate(view.shape(1)):
        if axis != indexed and size > 1:
            yield Tie(view.x(1, axis), view.y(axis))
    if view.has(2) and view.shape(0)[0] > 1:
        yield Tie(view.x(2, 0), view.y(0))
    for i in (0, 1):
        yield Freeze(view.x(i, indexed), f"{view} writes to positions of it one by one")


# --------------------------------------------------------------------------------------------------- order and choice


def top_k(view: View) -> Iterator[Fact]:
    """Values and their places along `axis`."""
    axis = view.attr("axis", -1) % len(view.shape(0))
    for output, tensor in enumerate(view.node.outputs):
        if tensor.name:
            yield from _axes(view, {axis}, output)
    yield Freeze(view.x(0, axis), f"{view} puts its positions in order of their values")


def arg_reduce(view: View) -> Iterator[Fact]:
    """The place of the largest value along `axis`."""
    chosen = view.attr("axis", 0) % len(view.shape(0))
    yield Freeze(view.x(0, chosen), f"{view} numbers its positions")
    out = 0
    for axis, size in enumerate(view.shape(0)):
        if axis != chosen and size > 1:
            yield Tie(view.x(0, axis), view.y(out))
        out += axis != chosen or bool(view.attr("keepdims", 1))


def compress(view: View) -> Iterator[Fact]:
    """The positions of `axis` whose condition holds; a constant condition follows them. Without an axis all is flattened."""
    if "axis" not in view.node.attrs:
        return
    axis = view.attr("axis") % len(view.shape(0))
    yield from _axes(view, {axis})
    condition = view.value(1)
    if condition is None:
        yield Freeze(view.x(0, axis), f"{view} chooses among its positions at run time")
        return
    covered = np.arange(min(len(condition), view.shape(0)[axis]))  # what the condition does not reach is not taken
    yield Tie(view.x(0, axis), view.x(1, 0), covered, covered)
    yield Tie(view.x(0, axis), view.y(axis), np.flatnonzero(condition[covered]), None)


def one_hot(view: View) -> Iterator[Fact]:
    """A new axis, at `axis` of the output, says which value an index has."""
    new = view.attr("axis", -1) % len(view.out_shape())
    for axis, size in enumerate(view.shape(0)):
        if size > 1:
            yield Tie(view.x(0, axis), view.y(axis + (axis >= new)))


def reverse_sequence(view: View) -> Iterator[Fact]:
    """Every entry of the batch is reversed in time, up to its own length."""
    time, batch = view.attr("time_axis", 0), view.attr("batch_axis", 1)
    yield from _axes(view, {time})
    yield Freeze(view.x(0, time), f"{view} reverses it up to lengths that are data")
    if view.shape(1)[0] > 1:
        yield Tie(view.x(1, 0), view.y(batch))


def trilu(view: View) -> Iterator[Fact]:
    """A triangle of the last two axes is kept, the rest is zero."""
    rank = len(view.shape(0))
    yield from _axes(view, {rank - 2, rank - 1})
    for axis in (rank - 2, rank - 1):
        yield Freeze(view.x(0, axis), f"{view} tells its positions apart by their numbers")


RULES = {
    "GatherND": Rule(gather_nd, gather_nd_fixup),
    "GatherElements": Rule(gather_elements),
    "ScatterND": Rule(scatter_nd, scatter_nd_fixup),
    "ScatterElements": Rule(scatter_elements),
    "Scatter": Rule(scatter_elements),
    "TensorScatter": Rule(tensor_scatter),
    "TopK": Rule(top_k),
    "ArgMax": Rule(arg_reduce),
    "ArgMin": Rule(arg_reduce),
    "Compress": Rule(compress),
    "OneHot": Rule(one_hot),
    "ReverseSequence": Rule(reverse_sequence),
    "Trilu": Rule(trilu),
}
CONTRIB = {"GatherND": Rule(gather_nd, gather_nd_fixup), "Trilu": Rule(trilu)}
