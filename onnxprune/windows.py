"""The geometry of convolutions: which position of the input every tap of every patch meets.

A transposed convolution is the convolution of its input, spread by its strides, with the mirrored kernel (ONNX ConvTranspose
clause), so that one geometry serves all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from onnxprune.channels import Index


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


def geometry(space: Sequence[int], taps: Sequence[int], attributes: Mapping[str, Any], transposed: bool = False) -> Windows:
    """The windows of a Conv over `space`; of a ConvTranspose those of the convolution that it is, over the spread input.

    attributes: the node's (ONNX Conv and ConvTranspose clauses), as far as they are set.
    """
    given = tuple((k, tuple(v) if isinstance(v, list | tuple | np.ndarray) else v) for k, v in attributes.items())
    return _geometry(tuple(space), tuple(taps), given, transposed)


@lru_cache(maxsize=1024)  # every batch asks again for every layer
def _geometry(space: tuple[int, ...], taps: tuple[int, ...], given: tuple[tuple[str, Any], ...], transposed: bool) -> Windows:
    attributes, rank = dict(given), len(space)
    strides, dilations = (tuple(int(v) for v in attributes.get(k, [1] * rank)) for k in ("strides", "dilations"))
    reach = [d * (t - 1) + 1 for d, t in zip(dilations, taps, strict=True)]
    if transposed:
        return _mirrored(space, taps, attributes, strides, dilations, reach)
    pads = _padding(attributes, space, strides, reach)
    out = [(n + a + b - k) // s + 1 for n, (a, b), k, s in zip(space, pads, reach, strides, strict=True)]
    return Windows(space, taps, tuple(out), strides, dilations, tuple(a for a, _ in pads))


def spread(space: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """The space of the input of a ConvTranspose with zeros in between."""
    return tuple(s * (n - 1) + 1 for n, s in zip(space, strides, strict=True))


def _mode(attributes: Mapping[str, Any]) -> str:
    mode = attributes.get("auto_pad", "NOTSET")
    return mode.decode() if isinstance(mode, bytes) else str(mode)


def _padding(
    attributes: Mapping[str, Any], space: Sequence[int], strides: Sequence[int], reach: Sequence[int]
) -> list[tuple[int, int]]:
    """(before, after) for every spatial axis, `auto_pad` resolved as the ONNX Conv clause has it."""
    mode, rank = _mode(attributes), len(space)
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        totals = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(space, strides, reach, strict=True)]
        return [_halves(t, mode) for t in totals]
    flat = list(attributes.get("pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    return [(flat[i], flat[i + rank]) for i in range(rank)]


def _halves(total: int, mode: str) -> tuple[int, int]:
    small, large = total // 2, total - total // 2
    return (small, large) if mode == "SAME_UPPER" else (large, small)


def _mirrored(
    space: tuple[int, ...],
    taps: tuple[int, ...],
    attributes: Mapping[str, Any],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
    reach: Sequence[int],
) -> Windows:
    rank = len(space)
    extra = attributes.get("output_padding", [0] * rank)
    mode, shape = _mode(attributes), attributes.get("output_shape")
    if mode in ("SAME_UPPER", "SAME_LOWER") and shape is None:
        shape = [n * s for n, s in zip(space, strides, strict=True)]
    before, out = [], []
    flat = list(attributes.get("pads", [0] * 2 * rank)) if mode == "NOTSET" else [0] * 2 * rank
    for a in range(rank):
        full = strides[a] * (space[a] - 1) + extra[a] + reach[a]
        if shape is None:
            first, size = flat[a], full - flat[a] - flat[rank + a]
        else:  # the clause: SAME_UPPER puts the odd one at the end, everything else at the beginning
            size = int(shape[len(shape) - rank + a])
            first = _halves(max(full - size, 0), mode)[0]
        before.append(reach[a] - 1 - first)
        out.append(size)
    return Windows(spread(space, strides), taps, tuple(out), (1,) * rank, dilations, tuple(before))
