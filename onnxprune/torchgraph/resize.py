"""Interpolation, axis by axis, with the coordinates of ONNX (operators, Resize)."""

from __future__ import annotations

from collections.abc import Callable
from math import floor

import numpy as np
import torch

from onnxprune.graph import Array
from onnxprune.torchgraph.base import Node, Table, Tensor, numbers
from onnxprune.torchgraph.linear import text

_COORDINATES: dict[str, Callable[[Array, int, int, float], Array]] = {
    "half_pixel": lambda i, n, m, s: (i + 0.5) / s - 0.5,
    "half_pixel_symmetric": lambda i, n, m, s: n / 2 * (1 - m / (s * n)) + (i + 0.5) / s - 0.5,
    "pytorch_half_pixel": lambda i, n, m, s: (i + 0.5) / s - 0.5 if m > 1 else np.zeros_like(i),
    "align_corners": lambda i, n, m, s: i * (n - 1) / (m - 1) if m > 1 else np.zeros_like(i),
    "asymmetric": lambda i, n, m, s: i / s,
}
_NEAREST: dict[str, Callable[[Array], Array]] = {
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
    "floor": np.floor,
    "ceil": np.ceil,
}


def _resize(
    node: Node, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    if node.opset < 11:
        scales = roi
    kind = text(node.get("coordinate_transformation_mode", "asymmetric" if node.opset < 11 else "half_pixel"))
    if kind not in _COORDINATES or node.get("antialias", 0) or node.get("exclude_outside", 0):
        node.refuse(f"coordinates {kind}, antialias or exclude_outside")
    if text(node.get("keep_aspect_ratio_policy", "stretch")) != "stretch":
        node.refuse("a kept aspect ratio")
    axes = [a % x.ndim for a in node.get("axes", range(x.ndim))]
    by = numbers(scales) if scales is not None and scales.numel() else None
    to = [int(n) for n in numbers(sizes)] if by is None and sizes is not None else None
    for i, axis in enumerate(axes):
        n = x.shape[axis]
        m = to[i] if to is not None else floor(n * by[i]) if by is not None else n
        scale = by[i] if by is not None else m / n
        if m != n or scale != 1:
            mode = text(node.get("mode", "nearest"))
            x = _along(node, x, axis, mode, _COORDINATES[kind](np.arange(m, dtype=np.float64), n, m, scale))
    return x


def _along(node: Node, x: Tensor, axis: int, mode: str, at: Array) -> Tensor:
    n = x.shape[axis]
    if mode == "nearest":
        rounding = text(node.get("nearest_mode", "floor" if node.opset < 11 else "round_prefer_floor"))
        return _take(x, axis, _NEAREST[rounding](at))
    if mode == "linear":
        at = np.clip(at, 0, n - 1)
        taps, weights = [np.floor(at), np.floor(at) + 1], [1 - at % 1, at % 1]
    elif mode == "cubic":
        a, part = node.get("cubic_coeff_a", -0.75), at - np.floor(at)
        taps = [np.floor(at) + k for k in (-1, 0, 1, 2)]
        weights = [_cubic(a, np.abs(part - k)) for k in (-1, 0, 1, 2)]
    else:
        node.refuse(f"mode {mode}")
    around = [1] * x.ndim
    around[axis] = -1
    parts = (
        _take(x, axis, tap) * torch.from_numpy(weight).to(x).reshape(around)
        for tap, weight in zip(taps, weights, strict=True)
        if weight.any()
    )
    return sum(parts)


def _cubic(a: float, x: Array) -> Array:
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _take(x: Tensor, axis: int, places: Array) -> Tensor:
    return x.index_select(axis, torch.from_numpy(np.clip(places, 0, x.shape[axis] - 1).astype(np.int64)).to(x.device))


def _upsample(node: Node, x: Tensor, scales: Tensor | None = None) -> Tensor:
    by = torch.tensor(node.get("scales")) if scales is None else scales
    return _resize(node, x, by)


FUNCTIONS: Table = {"Resize": _resize, "Upsample": _upsample}
