"""What the distance of a student's outputs from its teacher's is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch.nn import functional

from onnxprune.training.settings import Training

Tensor: TypeAlias = Any


@dataclass(frozen=True)
class Targets:
    """The tensors that are compared, by name. scores: class scores before any softmax, [samples, classes]; others: outputs
    of any other kind; features: intermediate tensors."""

    scores: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    features: tuple[str, ...] = ()

    @property
    def all(self) -> list[str]:
        return [*self.scores, *self.others, *self.features]


def loss(
    targets: Targets,
    settings: Training,
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    labels: Tensor | None,
) -> Tensor:
    """The mean over the batch; each output counts alike.

    Class scores: T^2 KL(teacher || student) at temperature T (Hinton, Vinyals, Dean 2015), mixed with the cross-entropy of
    true classes. Others: |student - teacher|^2 / |teacher|^2. Features: the same, times their weight.
    """
    total = torch.zeros(())
    for name in targets.scores:
        total = total + _divergence(student[name].float(), teacher[name], settings.temperature) * (1 - settings.labels)
        if settings.labels and labels is not None:
            total = total + settings.labels * functional.cross_entropy(student[name].float(), labels)
    for name in targets.others:
        total = total + relative(student[name].float(), teacher[name])
    for name in targets.features:
        total = total + settings.features / len(targets.features) * relative(student[name].float(), teacher[name])
    return total


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    a, b = functional.log_softmax(student / temperature, -1), functional.log_softmax(teacher / temperature, -1)
    return functional.kl_div(a, b, reduction="batchmean", log_target=True) * temperature**2


def relative(student: Tensor, teacher: Tensor) -> Tensor:
    """|student - teacher|^2 / |teacher|^2 over the whole batch."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)
