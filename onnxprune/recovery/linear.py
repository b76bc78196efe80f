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
from onnxprune.windows import Windows, geometry

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
        """Whether rows can be gathered: a convolution, or a product with a matrix on the right."""
        if self.op == "MatMul":
            return len(self.shape) == 2
        if self.op == "Gemm":
            return not self.attributes.get("transA", 0) and bool(self.attributes.get("alpha", 1.0))
        return self.convolution

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
        offsets = self._offsets(at[1:], x.shape[2:])
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
        """The spatial shape of a convolution's output for that of its input."""
        return self._windows(size).out

    def _windows(self, size: tuple[int, ...]) -> Windows:
        return geometry(size, self.taps, self.attributes, self.op == "ConvTranspose")

    def _offsets(self, at: tuple[Index, ...], size: tuple[int, ...]) -> list[list[Index]]:
        """For every axis and tap of it the input position that each picked output reads; outside where it reads none."""
        windows, found = self._windows(size), []
        for axis, o in enumerate(at):
            first = o * windows.strides[axis] - windows.pads[axis]
            taps = [first + t * windows.dilations[axis] for t in range(self.taps[axis])]
            found.append([_unspread(p, self._stride(axis)) for p in reversed(taps)] if self.op == "ConvTranspose" else taps)
        return found

    def _stride(self, axis: int) -> int:
        return int(self.attributes.get("strides", [1] * len(self.taps))[axis])


def _unspread(position: Index, stride: int) -> Index:
    """The positions of the input behind those of the input with zeros in between; -1 at the zeros."""
    there, rest = np.divmod(position, stride)
    return np.where(rest == 0, there, -1)
