"""Every contraction as matrix products over its patches."""

from __future__ import annotations

from typing import Any

import numpy as np

from onnxprune.channels import Index
from onnxprune.contraction import Contraction
from onnxprune.graph import Array
from onnxprune.windows import Windows, geometry


def convolution(c: Contraction) -> tuple[Array, Array, Windows]:
    """(x [n, I, *space], w [O, I, *taps], the windows) of a convolution without bias that is the contraction."""
    windows = geometry(c.x.shape[2:], c.w.shape[2:], c.attributes, c.transposed)
    if not c.transposed:
        return c.x, c.w, windows
    strides = c.attributes.get("strides", [1] * (c.x.ndim - 2))
    x = np.zeros((*c.x.shape[:2], *windows.space), np.float32)
    x[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = c.x
    w = np.ascontiguousarray(np.flip(np.swapaxes(c.w, 0, 1), axis=tuple(range(2, c.w.ndim))))
    return x, w, windows


def entries(units: Index, taps: int, together: bool) -> Array:
    """[U, K], the terms that a unit owns, as numbers channel * taps + tap. units: [U, m], the channels of each.

    together: a unit's terms add up in a share; else each is a unit of its own, one with K = 1 after another: [U * K, 1].
    """
    owned: Any = (units[:, :, None] * taps + np.arange(taps)).reshape(len(units), -1)
    return np.ascontiguousarray(owned if together else owned.reshape(-1, 1), np.uint32)
