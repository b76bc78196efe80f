"""Linear operators as matrix products over sampled rows: Y = X M, with one M for each group of a grouped convolution.

A row of X holds what one output position reads, a row of Y what it makes; both are gathered at chosen positions only, so
that least squares over a layer needs neither all of its activations nor an im2col of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import numpy as np

from onnxprune.channels import Index
from onnxprune.graph import Array

SOLVABLE = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True, eq=False)
class Linear:
    """One Conv, ConvTranspose, Gemm or MatMul (ONNX operators of these names) without its bias.

    shape: of the weight. attributes: the node's. Only what `understood` says can be taken apart.
    """

    op: str
    shape: tuple[int, ...]
    attributes: Mapping[str, Any]

    @property
    def understood(self) -> bool:
        """Whether rows can be gathered: a matrix on the right, or a convolution with explicit geometry."""
        if self.op == "MatMul":
            return len(self.shape) == 2
        if self.op == "Gemm":
            return not self.attributes.get("transA", 0) and bool(self.attributes.get("alpha", 1.0))
        if self.op == "ConvTranspose":
            return self._auto == "NOTSET" and "output_shape" not in self.attributes
        return self.op == "Conv"

    @property
    def convolution(self) -> bool:
        return self.op in ("Conv", "ConvTranspose")

    @cached_property
    def groups(self) -> int:
        return int(self.attributes.get("group", 1)) if self.convolution else 1

    @cached_property
    def taps(self) -> tuple[int, ...]:
        return self.shape[2:] if self.convolution else ()

    @property
    def outs(self) -> int:
        """Number of output channels."""
        if self.op == "MatMul":
            return self.shape[1]
        if self.op == "Gemm":
            return self.shape[0 if self.attributes.get("transB", 0) else 1]
        return self.shape[1] * self.groups if self.op == "ConvTranspose" else self.shape[0]

    @property
    def _auto(self) -> str:
        auto = self.attributes.get("auto_pad", "NOTSET")
        return auto.decode() if isinstance(auto, bytes) else str(auto)

    # ---------------------------------------------------------------------------------------------- matrices

    def matrix(self, w: Array) -> Array:
        """The weight as [groups, inputs * taps, outputs], float64; columns of one input channel lie together."""
        w = np.asarray(w, np.float64)
        if self.op == "MatMul":
            return w[None]
        if self.op == "Gemm":
            alpha = float(self.attributes.get("alpha", 1.0))
            return alpha * (w.T if self.attributes.get("transB", 0) else w)[None]
        g = self.groups
        if self.op == "ConvTranspose":  # [inputs, outputs / groups, *taps]
            taps_last = w.reshape(g, w.shape[0] // g, w.shape[1], -1)
            return taps_last.transpose(0, 1, 3, 2).reshape(g, -1, w.shape[1])
        rows: Array = w.reshape(g, w.shape[0] // g, -1)  # [outputs, inputs / groups, *taps]
        return rows.transpose(0, 2, 1)

    def weight(self, matrix: Array) -> Array:
        """The inverse of `matrix`."""
        if self.op == "MatMul":
            return np.asarray(matrix[0])
        if self.op == "Gemm":
            plain: Array = matrix[0] / float(self.attributes.get("alpha", 1.0))
            return plain.T if self.attributes.get("transB", 0) else plain
        if self.op == "ConvTranspose":
            inputs = self.shape[0] // self.groups
            split = matrix.reshape(self.groups, inputs, -1, self.shape[1])
            return split.transpose(0, 1, 3, 2).reshape(self.shape)
        return matrix.transpose(0, 2, 1).reshape(self.shape)

    # -------------------------------------------------------------------------------------------------- rows

    def outputs(self, z: Array, picks: Index) -> Array:
        """What the layer makes at the picked rows, channels in their order. [len(picks), channels]"""
        if not self.convolution:
            return np.asarray(z.reshape(-1, z.shape[-1])[picks])
        at = np.unravel_index(picks, (z.shape[0], *z.shape[2:]))
        where: tuple[Any, ...] = (at[0], slice(None), *at[1:])
        return np.asarray(z[where])

    def inputs(self, x: Array, picks: Index, rows: tuple[int, ...]) -> Array:
        """What the picked rows read. [groups, len(picks), inputs * taps]

        rows: the shape that `picks` count in, that of the output without its channel axis.
        """
        if not self.convolution:
            return x.reshape(-1, x.shape[-1])[picks][None]
        at = np.unravel_index(picks, rows)
        read = self._transposed if self.op == "ConvTranspose" else self._direct
        offsets = [np.stack(axis) for axis in read(at[1:], x.shape[2:], rows[1:])]  # per axis [taps of it, picks]
        found = np.empty((len(picks), x.shape[1], int(np.prod(self.taps))), np.float32)
        for t, tap in enumerate(product(*(range(k) for k in self.taps))):
            where = [o[i] for o, i in zip(offsets, tap, strict=True)]
            inside = np.logical_and.reduce([(i >= 0) & (i < n) for i, n in zip(where, x.shape[2:], strict=True)])
            safe = [np.where(inside, i, 0) for i in where]
            place: tuple[Any, ...] = (at[0], slice(None), *safe)
            found[:, :, t] = x[place]
            found[~inside, :, t] = 0
        return found.reshape(len(picks), self.groups, -1).transpose(1, 0, 2)

    def space(self, size: tuple[int, ...]) -> tuple[int, ...]:
        """The spatial shape of a convolution's output for that of its input (ONNX Conv, ConvTranspose)."""
        found = []
        for axis, n in enumerate(size):
            stride = self._step("strides", axis)
            reach = (self.taps[axis] - 1) * self._step("dilations", axis) + 1
            if self._auto in ("SAME_UPPER", "SAME_LOWER"):
                found.append(-(-n // stride))
                continue
            pads = 0 if self._auto == "VALID" else self._pads()[axis] + self._pads()[axis + len(self.taps)]
            if self.op == "ConvTranspose":
                more = int(self.attributes.get("output_padding", [0] * len(self.taps))[axis])
                found.append(stride * (n - 1) + more + reach - pads)
            else:
                found.append((n + pads - reach) // stride + 1)
        return tuple(found)

    def _direct(self, at: tuple[Index, ...], space: tuple[int, ...], out: tuple[int, ...]) -> list[list[Index]]:
        """For every axis and tap of it the input position that each picked output reads (ONNX Conv)."""
        found = []
        for axis, (o, n) in enumerate(zip(at, space, strict=True)):
            stride, dilation, k = self._step("strides", axis), self._step("dilations", axis), self.taps[axis]
            begin = self._begin(axis, n, out[axis], stride, (k - 1) * dilation + 1)
            found.append([o * stride - begin + t * dilation for t in range(k)])
        return found

    def _transposed(self, at: tuple[Index, ...], space: tuple[int, ...], out: tuple[int, ...]) -> list[list[Index]]:
        """The same for ConvTranspose: position o reads i where o + pad = i * stride + tap * dilation; -1 where none does."""
        found = []
        for axis, o in enumerate(at):
            stride, dilation = self._step("strides", axis), self._step("dilations", axis)
            begin = self._pads()[axis]
            taps = []
            for t in range(self.taps[axis]):
                i, rest = np.divmod(o + begin - t * dilation, stride)
                taps.append(np.where(rest == 0, i, -1))
            found.append(taps)
        return found

    def _step(self, name: str, axis: int) -> int:
        return int(self.attributes.get(name, [1] * len(self.taps))[axis])

    def _pads(self) -> list[int]:
        return [int(p) for p in self.attributes.get("pads", [0] * 2 * len(self.taps))]

    def _begin(self, axis: int, size: int, out: int, stride: int, reach: int) -> int:
        """Padding in front of an axis (ONNX Conv, auto_pad)."""
        if self._auto == "NOTSET":
            return self._pads()[axis]
        if self._auto == "VALID":
            return 0
        total = max((out - 1) * stride + reach - size, 0)
        return total // 2 if self._auto == "SAME_UPPER" else total - total // 2
