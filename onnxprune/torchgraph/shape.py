"""Movement of data, and arithmetic of shapes."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import torch

from onnxprune.torchgraph.base import Node, Table, Tensor, given, numbers, onto, span
from onnxprune.torchgraph.linear import padded, text


def _reshape(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    sizes = [int(n) for n in numbers(shape)]
    if not node.get("allowzero", 0):
        sizes = [x.shape[i] if n == 0 else n for i, n in enumerate(sizes)]
    if -1 in sizes and 0 in x.shape:
        rest = prod(n for n in sizes if n != -1)
        sizes = [(x.numel() // rest if rest else 0) if n == -1 else n for n in sizes]
    return x.reshape(sizes)


def _flatten(node: Node, x: Tensor) -> Tensor:
    axis = node.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(prod(x.shape[:axis]), prod(x.shape[axis:]))


def _transpose(node: Node, x: Tensor) -> Tensor:
    return x.permute(list(node.get("perm", range(x.ndim - 1, -1, -1))))


def _squeeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    along = given(node, "axes", axes)
    gone = {i for i, n in enumerate(x.shape) if n == 1} if along is None else {int(a) % x.ndim for a in along}
    return x.reshape([n for i, n in enumerate(x.shape) if i not in gone])


def _unsqueeze(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
    along = given(node, "axes", axes) or []
    rank = x.ndim + len(along)
    for axis in sorted(int(a) % rank for a in along):
        x = x.unsqueeze(axis)
    return x


def _concat(node: Node, *parts: Tensor) -> Tensor:
    return torch.cat(parts, dim=node.get("axis", 1))


def _split(node: Node, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, count = node.get("axis", 0), len(node.makes)
    lengths = given(node, "split", sizes)
    if lengths is None:  # as even as can be, the last one smaller (ONNX operators, Split-18)
        each = -(-x.shape[axis] // count)
        lengths = [min(each, x.shape[axis] - each * i) for i in range(count)]
    return tuple(torch.split(x, [int(n) for n in lengths], dim=axis))


def _slice(
    node: Node,
    x: Tensor,
    starts: Tensor | None = None,
    ends: Tensor | None = None,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    first, last = given(node, "starts", starts) or [], given(node, "ends", ends) or []
    along = given(node, "axes", axes) or list(range(len(first)))
    by = numbers(steps) if steps is not None else [1] * len(first)
    for start, end, axis, step in zip(first, last, along, by, strict=True):
        low, high, stride = slice(int(start), int(end), int(step)).indices(x.shape[axis])
        if step < 0 and end < -x.shape[axis]:  # Python reads a negative end from the back
            high = -1
        if stride < 0:
            x = x.index_select(axis, span(x.shape[axis], list(range(low, high, stride)), x))
        else:
            place = [slice(None)] * x.ndim
            place[axis] = slice(low, max(low, high), stride)
            x = x[tuple(place)]
    return x


def _gather(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0) % x.ndim
    if indices.device.type == "cpu" and indices.numel() == 1:
        one = int(indices) % x.shape[axis]
        return (
            x.select(axis, one)
            if indices.ndim == 0
            else x.narrow(axis, one, 1).reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))
        )
    places = onto(indices.reshape(-1).long(), x)
    places = torch.where(places < 0, places + x.shape[axis], places)
    return x.index_select(axis, places).reshape((*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :]))


def _gather_elements(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    axis = node.get("axis", 0)
    places = onto(indices.long(), x)
    return torch.gather(x, axis, torch.where(places < 0, places + x.shape[axis], places))


def _gather_nd(node: Node, x: Tensor, indices: Tensor) -> Tensor:
    if node.get("batch_dims", 0):
        node.refuse("batch_dims")
    return x[tuple(onto(indices.long(), x).unbind(-1))]


def _scatter_nd(node: Node, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    if text(node.get("reduction", "none")) != "none":
        node.refuse("a reduction")
    return x.index_put(tuple(onto(indices.long(), x).unbind(-1)), onto(updates, x))


def _pad(node: Node, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    around, mode = [int(n) for n in given(node, "pads", pads) or []], text(node.get("mode", "constant"))
    along = [int(a) % x.ndim for a in numbers(axes)] if axes is not None else list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(along):
        before[axis], after[axis] = around[i], around[i + len(along)]
    if mode == "constant":
        return padded(x, before, after, node.get("value", 0.0) if value is None else float(value))
    for axis in range(x.ndim):
        if before[axis] or after[axis]:
            places = np.arange(x.shape[axis])[max(0, -before[axis]) : x.shape[axis] + min(0, after[axis])]
            wider = np.pad(places, (max(0, before[axis]), max(0, after[axis])), mode=mode)  # type: ignore[call-overload]
            x = x.index_select(axis, torch.from_numpy(wider).to(x.device))
    return x


def _expand(node: Node, x: Tensor, shape: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, tuple(int(n) for n in numbers(shape))))


def _tile(node: Node, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat([int(n) for n in numbers(repeats)])


def _shape(node: Node, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[node.get("start", 0) : node.get("end")], dtype=torch.int64)


def _constant_of_shape(node: Node, shape: Tensor) -> Tensor:
    value = node.get("value")
    fill = torch.zeros(1) if value is None else value
    return torch.full([int(n) for n in numbers(shape)], fill.reshape(-1)[0].item(), dtype=fill.dtype)


def _range(node: Node, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    count = max(0, int(np.ceil((limit.item() - start.item()) / step.item())))
    return start + step * torch.arange(count, device=start.device).to(start.dtype)


def _depth_to_space(node: Node, x: Tensor) -> Tensor:
    size, (n, c, h, w) = node.get("blocksize"), x.shape
    if text(node.get("mode", "DCR")) == "CRD":
        parts = x.reshape(n, c // size**2, size, size, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        parts = x.reshape(n, size, size, c // size**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // size**2, h * size, w * size)


def _space_to_depth(node: Node, x: Tensor) -> Tensor:
    size, (n, c, h, w) = node.get("blocksize"), x.shape
    parts = x.reshape(n, c, h // size, size, w // size, size).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(n, c * size**2, h // size, w // size)


def _triangle(node: Node, x: Tensor, offset: Tensor | None = None) -> Tensor:
    k = 0 if offset is None else int(offset)
    return torch.triu(x, k) if node.get("upper", 1) else torch.tril(x, k)


def _one_hot(node: Node, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, axis = int(depth), node.get("axis", -1)
    places = torch.remainder(indices.long(), count)
    hot = torch.nn.functional.one_hot(places, count).to(values.dtype)
    made = values[0] + hot * (values[1] - values[0])
    return made.movedim(-1, axis)


def _constant(node: Node) -> Any:
    return node.get("value")


FUNCTIONS: Table = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Transpose": _transpose,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Concat": _concat,
    "Split": _split,
    "Slice": _slice,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "ScatterND": _scatter_nd,
    "Pad": _pad,
    "Expand": _expand,
    "Tile": _tile,
    "Shape": _shape,
    "Size": lambda node, x: torch.tensor(x.numel(), dtype=torch.int64),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Range": _range,
    "DepthToSpace": _depth_to_space,
    "SpaceToDepth": _space_to_depth,
    "Trilu": _triangle,
    "OneHot": _one_hot,
}
