"""Every contraction as matrix products over its patches: which position of the input every tap of every patch meets.

A transposed convolution is the convolution of its input, spread by its strides, with the mirrored kernel (ONNX ConvTranspose
clause), so that one geometry serves all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from onnxprune.channels import Index
from onnxprune.contraction import Contraction
from onnxprune.graph import Array


@dataclass(frozen=True, eq=False)
class Windows:
    """The patches of a convolution of x [n, I, *space], by last axis ("rows") and all others.

    taps: shape of the kernel. out: patches by axis. pads: before every axis; negative ones crop.
    """

    space: tuple[int, ...]
    taps: tuple[int, ...]
    out: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]

    @property
    def patches(self) -> int:
        return int(np.prod(self.out))

    @property
    def width(self) -> int:
        """Patches of a row."""
        return self.out[-1]

    @property
    def plain(self) -> bool:
        """Whether patches are positions, in the same order."""
        return all(t == 1 for t in self.taps) and self.out == self.space and not any(self.pads)

    @cached_property
    def base(self) -> Index:
        """[taps, rows of patches]: where the row of x that a tap meets begins in the flat space; -1 outside."""
        rank, rows = len(self.space), int(np.prod(self.out[:-1]))
        kernel = np.indices(self.taps).reshape(rank, -1)
        patch = np.indices(self.out[:-1]).reshape(rank - 1, rows)
        found, outside = np.zeros((kernel.shape[1], rows), np.int64), np.zeros((kernel.shape[1], rows), bool)
        for a in range(rank - 1):
            at = patch[a] * self.strides[a] - self.pads[a] + kernel[a][:, None] * self.dilations[a]
            outside |= (at < 0) | (at >= self.space[a])
            found += at * int(np.prod(self.space[a + 1 :]))
        return np.where(outside, -1, found)

    @cached_property
    def shift(self) -> Index:
        """[taps]: the position along the last axis where a tap meets the first patch of a row; it may lie outside."""
        return np.asarray(np.indices(self.taps)[-1].ravel() * self.dilations[-1] - self.pads[-1], np.int64)

    @cached_property
    def inside(self) -> Index:
        """[taps, 2]: the patches of a row whose tap lies inside."""
        step = self.strides[-1]
        first, end = -(-np.maximum(-self.shift, 0) // step), -((self.shift - self.space[-1]) // step)
        return np.asarray(np.clip(np.stack([first, end], axis=1), 0, self.width), np.int64)


def convolution(c: Contraction) -> tuple[Array, Array, Windows]:
    """(x [n, I, *space], w [O, I, *taps], the windows) of a convolution without bias that is the contraction."""
    rank = c.x.ndim - 2
    taps = c.w.shape[2:]
    strides, dilations = (tuple(c.attributes.get(k, [1] * rank)) for k in ("strides", "dilations"))
    reach = [d * (t - 1) + 1 for d, t in zip(dilations, taps, strict=True)]
    if c.transposed:
        return _mirrored(c, strides, dilations, reach)
    space = c.x.shape[2:]
    pads = _padding(c, space, strides, reach)
    out = [(n + a + b - k) // s + 1 for n, (a, b), k, s in zip(space, pads, reach, strides, strict=True)]
    return c.x, c.w, Windows(space, taps, tuple(out), strides, dilations, tuple(a for a, _ in pads))


def _padding(c: Contraction, space: Sequence[int], strides: Sequence[int], reach: Sequence[int]) -> list[tuple[int, int]]:
    """(before, after) for every spatial axis, `auto_pad` resolved as the ONNX Conv clause has it."""
    mode, rank = c.attributes.get("auto_pad", "NOTSET"), len(space)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(space, strides, reach, strict=True)]
        return [_halves(t, mode) for t in totals]
    flat = list(c.attributes.get("pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    return [(flat[i], flat[i + rank]) for i in range(rank)]


def _halves(total: int, mode: str) -> tuple[int, int]:
    small, large = total // 2, total - total // 2
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def _mirrored(
    c: Contraction, strides: tuple[int, ...], dilations: tuple[int, ...], reach: Sequence[int]
) -> tuple[Array, Array, Windows]:
    rank, space, taps = c.x.ndim - 2, c.x.shape[2:], c.w.shape[2:]
    spread = tuple(s * (n - 1) + 1 for n, s in zip(space, strides, strict=True))
    x = np.zeros((*c.x.shape[:2], *spread), np.float32)
    x[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = c.x
    w = np.ascontiguousarray(np.flip(np.swapaxes(c.w, 0, 1), axis=tuple(range(2, 2 + rank))))
    extra = c.attributes.get("output_padding", [0] * rank)
    mode, shape = c.attributes.get("auto_pad", "NOTSET"), c.attributes.get("output_shape")
    if mode in ("SAME_UPPER", "SAME_LOWER") and shape is None:
        shape = [n * s for n, s in zip(space, strides, strict=True)]
    before, out = [], []
    flat = list(c.attributes.get("pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    for a in range(rank):
        full = strides[a] * (space[a] - 1) + extra[a] + reach[a]
        if shape is None:
            first, size = flat[a], full - flat[a] - flat[rank + a]
        else:  # the clause: SAME_UPPER puts the odd one at the end, everything else at the beginning
            size = int(shape[len(shape) - rank + a])
            first = _halves(max(full - size, 0), mode)[0]
        before.append(reach[a] - 1 - first)
        out.append(size)
    return x, w, Windows(spread, taps, tuple(out), (1,) * rank, dilations, tuple(before))


def entries(units: Index, taps: int, together: bool) -> Array:
    """[U, K], the terms that a unit owns, as numbers channel * taps + tap. units: [U, m], the channels of each.

    together: a unit's terms add up in a share; else each is a unit of its own, one with K = 1 after another: [U * K, 1].
    """
    owned: Any = (units[:, :, None] * taps + np.arange(taps)).reshape(len(units), -1)
    return np.ascontiguousarray(owned if together else owned.reshape(-1, 1), np.int32)
