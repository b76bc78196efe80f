"""Layers with weights: convolutions, matrix products, einsum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from onnxprune.torchgraph.base import Node, Table, Tensor

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_TRANSPOSED = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}


def padding(
    node: Node, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """(zeros before, zeros after) along every axis of space (ONNX operators, Conv: auto_pad)."""
    rank, kind = len(sizes), text(node.get("auto_pad", "NOTSET"))
    if kind in ("NOTSET", ""):
        pads = list(node.get("pads", [0] * 2 * rank))
        return pads[:rank], pads[rank:]
    if kind == "VALID":
        return [0] * rank, [0] * rank
    total = [
        max(0, (-(-n // s) - 1) * s + (k - 1) * d + 1 - n) for n, k, s, d in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    short, long = [t // 2 for t in total], [t - t // 2 for t in total]
    return (short, long) if kind == "SAME_UPPER" else (long, short)


def text(value: Any) -> str:
    """An attribute that is text."""
    return value.decode() if isinstance(value, bytes) else str(value)


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """The tensor with `value` around its last axes; negative numbers cut entries off."""
    if not any(before) and not any(after):
        return x
    return functional.pad(x, [n for pair in zip(reversed(before), reversed(after), strict=True) for n in pair], value=value)


def geometry(node: Node, rank: int) -> tuple[list[int], list[int]]:
    """(strides, dilations)."""
    return list(node.get("strides", [1] * rank)), list(node.get("dilations", [1] * rank))


def _conv(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    if rank not in _CONV:
        node.refuse(f"{rank} axes of space")
    strides, dilations = geometry(node, rank)
    before, after = padding(node, x.shape[2:], w.shape[2:], strides, dilations)
    if before != after:
        x, before = padded(x, before, after), [0] * rank
    return _CONV[rank](x, w, b, strides, before, dilations, node.get("group", 1))


def _conv_transpose(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """Computed without padding, then cut (ONNX operators, ConvTranspose: output_shape, output_padding, pads)."""
    rank = x.ndim - 2
    if rank not in _TRANSPOSED:
        node.refuse(f"{rank} axes of space")
    strides, dilations = geometry(node, rank)
    more = list(node.get("output_padding", [0] * rank))
    full = [
        (n - 1) * s + (k - 1) * d + 1 + o
        for n, k, s, d, o in zip(x.shape[2:], w.shape[2:], strides, dilations, more, strict=True)
    ]
    before, after = _cropping(node, x.shape[2:], full, strides)
    whole = all(a == z for a, z in zip(before, after, strict=True)) and min(before) >= 0
    if whole:
        return _TRANSPOSED[rank](x, w, b, strides, before, more, node.get("group", 1), dilations)
    made = _TRANSPOSED[rank](x, w, b, strides, 0, more, node.get("group", 1), dilations)
    return padded(made, [-n for n in before], [-n for n in after])


def _cropping(node: Node, sizes: Sequence[int], full: list[int], strides: list[int]) -> tuple[list[int], list[int]]:
    rank, kind = len(full), text(node.get("auto_pad", "NOTSET"))
    wanted = node.get("output_shape")
    if wanted is None and kind in ("NOTSET", ""):
        pads = list(node.get("pads", [0] * 2 * rank))
        return pads[:rank], pads[rank:]
    if kind == "VALID":
        return [0] * rank, [0] * rank
    target = list(wanted)[-rank:] if wanted is not None else [n * s for n, s in zip(sizes, strides, strict=True)]
    total = [f - t for f, t in zip(full, target, strict=True)]
    short, long = [t // 2 for t in total], [t - t // 2 for t in total]
    return (short, long) if kind == "SAME_UPPER" else (long, short)


def _gemm(node: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = node.get("alpha", 1.0), node.get("beta", 1.0)
    a = a.T if node.get("transA", 0) else a
    if alpha == 1 and c is None:
        return a @ (b.T if node.get("transB", 0) else b)
    if alpha == 1 and beta == 1 and c is not None and c.ndim == 1 and node.get("transB", 0) and len(c) == len(b):
        return functional.linear(a, b, c)
    product = alpha * (a @ (b.T if node.get("transB", 0) else b))
    return product if c is None else product + beta * c


def _einsum(node: Node, *operands: Tensor) -> Tensor:
    return torch.einsum(text(node.get("equation")), *operands)


def _fused_conv(node: Node, x: Tensor, w: Tensor, b: Tensor | None = None, z: Tensor | None = None) -> Tensor:
    """ONNX Runtime's contrib operator FusedConv: a convolution, a sum, an activation."""
    made = _conv(node, x, w, b)
    made = made if z is None else made + z
    kind, given = text(node.get("activation", "")), list(node.get("activation_params", []))
    if kind == "Relu":
        return torch.relu(made)
    if kind == "Clip":
        return torch.clamp(made, *given)
    if kind == "LeakyRelu":
        return functional.leaky_relu(made, *given)
    return node.refuse(f"the activation {kind}")


def _matmul(node: Node, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


FUNCTIONS: Table = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Einsum": _einsum,
    "com.microsoft:FusedConv": _fused_conv,
    "com.microsoft:FusedMatMul": lambda node, a, b: (
        node.get("alpha", 1.0) * torch.matmul(a.mT if node.get("transA", 0) else a, b.mT if node.get("transB", 0) else b)
    ),
}
