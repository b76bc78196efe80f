"""Optimisers: torch's own, and Muon for matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod, sqrt
from typing import Any, TypeAlias

import torch

from onnxprune.training.settings import Training

Tensor: TypeAlias = Any
WIDEST = 512  # the smaller side of a matrix that is orthogonalised: beyond that it would cost more than the gradient
# Coefficients of the quintic iteration that brings singular values near one in five rounds (Jordan et al. 2024, "Muon").
_QUINTIC, _ROUNDS = (3.4445, -4.7750, 2.0315), 5


def optimiser(parameters: Sequence[Tensor], settings: Training) -> Any:
    """What steps along gradients: it has param_groups with a rate "lr", zero_grad, step, state_dict and load_state_dict.

    Weights of two or more axes decay, others do not.
    """
    if settings.optimiser == "muon":
        return Muon(parameters, settings)
    groups = _groups(parameters, settings)
    if settings.optimiser == "sgd":
        return torch.optim.SGD(groups, lr=settings.highest_rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=settings.highest_rate)


def _groups(parameters: Sequence[Tensor], settings: Training) -> list[dict[str, Any]]:
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]


class Muon:
    """Momentum whose matrices are made orthogonal before the step; what is no matrix goes by AdamW.

    Matrices are weights of two axes, and of convolutions over two or three axes of space [filters, everything else], depthwise
    ones apart. A step has the size that one of AdamW at the same rate has: 0.2 sqrt(max(rows, columns)) times an orthogonal
    matrix (Liu et al. 2025, "Muon is scalable for LLM training").
    """

    momentum = 0.95

    def __init__(self, parameters: Sequence[Tensor], settings: Training) -> None:
        self.matrices = [p for p in parameters if is_matrix(tuple(p.shape))]
        chosen = {id(p) for p in self.matrices}
        others = [p for p in parameters if id(p) not in chosen]
        self._moved = [torch.zeros_like(p) for p in self.matrices]
        self._adam = torch.optim.AdamW(_groups(others, settings), lr=settings.highest_rate)
        self._own: dict[str, Any] = {"params": self.matrices, "lr": settings.highest_rate, "weight_decay": settings.decay}

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One of the matrices, and those of AdamW."""
        return [self._own, *self._adam.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients."""
        for value in self.matrices:
            value.grad = None
        self._adam.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """Moves every weight."""
        rate = self._own["lr"]
        with torch.no_grad():
            for value, moved in zip(self.matrices, self._moved, strict=True):
                if value.grad is None:
                    continue
                moved.lerp_(value.grad, 1 - self.momentum)
                ahead = value.grad.lerp(moved, self.momentum)
                turned = orthogonal(ahead.reshape(len(value), -1))
                value.mul_(1 - rate * self._own["weight_decay"])
                value.add_(turned.reshape(value.shape), alpha=-rate * 0.2 * sqrt(max(turned.shape)))
        self._adam.step()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` goes on from."""
        return {"moved": [m.clone() for m in self._moved], "adam": self._adam.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where another left off."""
        for moved, value in zip(self._moved, state["moved"], strict=True):
            moved.copy_(value)
        self._adam.load_state_dict(state["adam"])


def is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a weight of this shape is one for Muon. Of three axes it may be a recurrent layer's, which is several."""
    if len(shape) not in (2, 4, 5) or (len(shape) > 2 and shape[1] == 1):
        return False
    return 1 < min(shape[0], prod(shape[1:])) <= WIDEST


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with singular values near one, its singular vectors kept (Newton-Schulz)."""
    a, b, c = _QUINTIC
    x = matrix / (matrix.norm() + 1e-7)
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(_ROUNDS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x.T if tall else x
