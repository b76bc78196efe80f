"""Batch norm as in training: with the statistics of the batch, whose running means go back into the file."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from onnxprune.torchgraph.base import Node

Tensor: TypeAlias = Any
MOMENTUM = 0.1  # share of a new batch in the running statistics


class BatchStatistics:
    """Computes BatchNormalization; `training` says with which statistics. running: by the names of the constants.

    own: the names of constants that are read in one place only; other statistics stay as they are.
    """

    def __init__(self, own: Collection[str]) -> None:
        self._own = own
        self.training = False
        self.running: dict[str, Tensor] = {}

    def __call__(self, node: Node, x: Tensor, scale: Tensor, shift: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        epsilon = node.get("epsilon", 1e-5)
        if not all(name in self._own for name in node.reads[3:5]):
            return functional.batch_norm(x, mean, variance, scale, shift, False, 0.0, epsilon)
        for name, value in zip(node.reads[3:5], (mean, variance), strict=True):
            if name not in self.running:
                self.running[name] = value.clone()
        kept_mean, kept_variance = (self.running[name] for name in node.reads[3:5])
        return functional.batch_norm(x, kept_mean, kept_variance, scale, shift, self.training, MOMENTUM, epsilon)

    def state(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in self.running.items()}

    def restore(self, state: dict[str, Any]) -> None:
        self.running = {k: torch.as_tensor(v).clone() for k, v in state.items()}
