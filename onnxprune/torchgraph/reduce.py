"""Reductions along axes, and what is like them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from onnxprune.torchgraph.base import Function, Node, Table, Tensor, given


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _reduction(function: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Function:
    """Axes are an attribute or an operand, by operator and opset (ONNX operators, ReduceSum-13 and others -18)."""

    def apply(node: Node, x: Tensor, axes: Tensor | None = None) -> Tensor:
        along = given(node, "axes", axes)
        if not along:
            along = [] if node.get("noop_with_empty_axes", 0) else list(range(x.ndim))
        places = tuple(sorted(int(a) % max(1, x.ndim) for a in along))
        if x.ndim == 0 or not places:
            return function(x.unsqueeze(0), (0,), False) if x.ndim == 0 else x
        return function(x, places, bool(node.get("keepdims", 1)))

    return apply


def _extreme(function: Callable[..., Tensor], node: Node, x: Tensor) -> Tensor:
    axis, keep = node.get("axis", 0), bool(node.get("keepdims", 1))
    if not node.get("select_last_index", 0):
        return function(x, dim=axis, keepdim=keep)
    return x.shape[axis] - 1 - function(x.flip(axis), dim=axis, keepdim=keep)


def _cumulative(node: Node, x: Tensor, axis: Tensor) -> Tensor:
    along = int(axis)
    turned = x.flip(along) if node.get("reverse", 0) else x
    made = turned.cumsum(along).to(x.dtype)
    made = made - turned if node.get("exclusive", 0) else made
    return made.flip(along) if node.get("reverse", 0) else made


def _top(node: Node, x: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    largest, ordered = bool(node.get("largest", 1)), bool(node.get("sorted", 1))
    values, places = torch.topk(x, int(count), node.get("axis", -1), largest, ordered)
    return values, places


FUNCTIONS: Table = {
    "ReduceSum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep).to(x.dtype)),
    "ReduceMean": _reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": _reduction(_product),
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep)),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "ReduceLogSum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep).log()),
    "ReduceLogSumExp": _reduction(torch.logsumexp),
    "ArgMax": partial(_extreme, torch.argmax),
    "ArgMin": partial(_extreme, torch.argmin),
    "CumSum": _cumulative,
    "TopK": _top,
}
