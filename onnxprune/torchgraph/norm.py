"""Normalisations, in inference as the graph has them."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from onnxprune.torchgraph.base import Node, Table, Tensor


def _batch_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    if node.get("training_mode", 0) or len([m for m in node.makes if m]) > 1:
        node.refuse("it is in training mode")
    return functional.batch_norm(x, mean, variance, scale, shift, False, 0.0, node.get("epsilon", 1e-5))


def _layer_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor | None = None) -> Any:
    axis, epsilon = node.get("axis", -1), node.get("epsilon", 1e-5)
    if len([m for m in node.makes if m]) > 1:
        axes = tuple(range(axis % x.ndim, x.ndim))
        mean = x.mean(axes, keepdim=True)
        inverse = torch.rsqrt((x - mean).square().mean(axes, keepdim=True) + epsilon)
        made = (x - mean) * inverse * scale
        return (made if shift is None else made + shift), mean, inverse
    shape = x.shape[axis % x.ndim :]
    if scale.shape == shape and (shift is None or shift.shape == shape):
        return functional.layer_norm(x, shape, scale, shift, epsilon)
    made = functional.layer_norm(x, shape, None, None, epsilon) * scale
    return made if shift is None else made + shift


def _rms_norm(node: Node, x: Tensor, scale: Tensor) -> Tensor:
    axes = tuple(range(node.get("axis", -1) % x.ndim, x.ndim))
    return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + node.get("epsilon", 1e-5)) * scale


def _instance_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    axes, around = tuple(range(2, x.ndim)), (-1, *[1] * (x.ndim - 2))
    centred = x - x.mean(axes, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(axes, keepdim=True) + node.get("epsilon", 1e-5))
    return centred * inverse * scale.reshape(around) + shift.reshape(around)


def _group_norm(node: Node, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Scale and shift are of groups before opset 21, of channels since (ONNX operators, GroupNormalization-18, -21)."""
    count = node.get("num_groups")
    if len(scale) == count and count != x.shape[1]:
        scale, shift = (v.repeat_interleave(x.shape[1] // count) for v in (scale, shift))
    return functional.group_norm(x, count, scale, shift, node.get("epsilon", 1e-5))


def _lrn(node: Node, x: Tensor) -> Tensor:
    size, alpha, beta = node.get("size"), node.get("alpha", 1e-4), node.get("beta", 0.75)
    before = (size - 1) // 2
    squares = functional.pad(x.square().flatten(2), (0, 0, before, size - 1 - before)).unfold(1, size, 1).sum(-1)
    return x / (node.get("bias", 1.0) + alpha / size * squares.reshape(x.shape)) ** beta


def _lp_norm(node: Node, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, node.get("p", 2), dim=node.get("axis", -1), keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))


def _mean_variance(node: Node, x: Tensor) -> Tensor:
    axes = tuple(node.get("axes", (0, 2, 3)))
    centred = x - x.mean(axes, keepdim=True)
    return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)


FUNCTIONS: Table = {
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _rms_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "LRN": _lrn,
    "LpNormalization": _lp_norm,
    "MeanVarianceNormalization": _mean_variance,
}
