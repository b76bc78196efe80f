"""Pooling over windows and over all of space."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.nn import functional

from onnxprune.torchgraph.base import Node, Table, Tensor
from onnxprune.torchgraph.linear import geometry, padded, padding

_MAXIMUM = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}


def _windows(node: Node, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int], list[int]]:
    """(kernel, strides, dilations, padding before, after, and what the last window of ceil_mode needs beyond that)."""
    rank = x.ndim - 2
    if rank not in _MAXIMUM:
        node.refuse(f"{rank} axes of space")
    kernel = list(node.get("kernel_shape"))
    strides, dilations = geometry(node, rank)
    before, after = padding(node, x.shape[2:], kernel, strides, dilations)
    beyond = [0] * rank
    if node.get("ceil_mode", 0):
        for i, n in enumerate(x.shape[2:]):
            rest = n + before[i] + after[i] - (kernel[i] - 1) * dilations[i] - 1
            last = -(-rest // strides[i]) * strides[i]
            if last >= n + before[i]:  # a window must not begin in the padding
                last -= strides[i]
            beyond[i] = max(0, last - rest)
    return kernel, strides, dilations, before, after, beyond


def _max_pool(node: Node, x: Tensor) -> Tensor:
    if len([m for m in node.makes if m]) > 1:
        node.refuse("it hands out the places of the maxima")
    kernel, strides, dilations, before, after, beyond = _windows(node, x)
    end = [a + b for a, b in zip(after, beyond, strict=True)]
    inside = all(p <= k // 2 for p, k in zip(before, kernel, strict=True))
    if before == end and inside:
        return _MAXIMUM[len(kernel)](x, kernel, strides, before, dilations)
    lowest = float("-inf") if x.dtype.is_floating_point else torch.iinfo(x.dtype).min
    return _MAXIMUM[len(kernel)](padded(x, before, end, lowest), kernel, strides, 0, dilations)


def _average_pool(node: Node, x: Tensor) -> Tensor:
    kernel, strides, dilations, before, after, beyond = _windows(node, x)
    if any(d > 1 for d in dilations):
        node.refuse("dilated windows")
    pool = _AVERAGE[len(kernel)]
    if not any(before + after + beyond):
        return pool(x, kernel, strides)
    end = [a + b for a, b in zip(after, beyond, strict=True)]
    sums = pool(padded(x, before, end), kernel, strides) * prod(kernel)
    return sums / _counts(node, x, (before, after, beyond), kernel, strides)


def _counts(
    node: Node, x: Tensor, around: tuple[list[int], list[int], list[int]], kernel: Sequence[int], strides: Sequence[int]
) -> Tensor:
    """How many entries each window averages over."""
    before, after, beyond = around
    ones = x.new_ones((1, 1, *x.shape[2:]))
    ones = padded(padded(ones, before, after, float(node.get("count_include_pad", 0))), [0] * len(kernel), beyond)
    return _AVERAGE[len(kernel)](ones, kernel, strides) * prod(kernel)


def _space(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


FUNCTIONS: Table = {
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": lambda node, x: x.mean(_space(x), keepdim=True),
    "GlobalMaxPool": lambda node, x: x.amax(_space(x), keepdim=True),
}
