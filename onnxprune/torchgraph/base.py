"""What the functions of all operators share: a node as they see it, tables of them, and how they refuse."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch

from onnxprune.errors import ModelError

Tensor: TypeAlias = Any
"""A torch.Tensor; None as an operand that a node leaves out."""

Function: TypeAlias = Callable[..., Any]
"""function(node, *operands) -> the output, or a tuple of them."""

Table: TypeAlias = Mapping[str, Function]
"""Functions by operator; those of other domains are called domain:operator."""


@dataclass(frozen=True, eq=False)
class Node:
    """A node of the graph. opset: version of its domain. reads, makes: names of tensors, "" where one is left out."""

    op: str
    opset: int
    attributes: Mapping[str, Any]
    reads: tuple[str, ...]
    makes: tuple[str, ...]
    label: str

    def get(self, name: str, default: Any = None) -> Any:
        """The value of an attribute."""
        return self.attributes.get(name, default)

    def refuse(self, what: str) -> NoReturn:
        """Raises ModelError: this node cannot be run in torch, and why."""
        raise ModelError(f"node '{self.label}' ({self.op}) cannot be trained through: {what}")


def table(*parts: Table) -> dict[str, Function]:
    """One table of several. Raises ValueError where two know the same operator."""
    found: dict[str, Function] = {}
    for part in parts:
        if twice := found.keys() & part.keys():
            raise ValueError(f"two functions for {', '.join(sorted(twice))}")
        found.update(part)
    return found


def plain(function: Callable[..., Tensor]) -> Function:
    """The function of an operator without attributes."""
    return lambda node, *operands: function(*operands)


def numbers(value: Tensor) -> list[Any]:
    """The entries of a small tensor (a shape, axes, scales)."""
    return list(value.reshape(-1).tolist())


def given(node: Node, name: str, operand: Tensor | None) -> list[Any] | None:
    """A list of numbers that older opsets have as an attribute and newer ones as an operand; None where it is left out."""
    if operand is not None:
        return numbers(operand)
    found = node.get(name)
    return None if found is None else list(found)


def onto(operand: Tensor, other: Tensor) -> Tensor:
    """The operand on the device of another: sizes are reckoned on the CPU, tensors may be elsewhere."""
    return operand if operand.device == other.device else operand.to(other.device)


def together(operands: tuple[Tensor, ...]) -> list[Tensor]:
    """All operands on one device: that of the first which is not on the CPU."""
    where = next((x.device for x in operands if x.device.type != "cpu"), None)
    return list(operands) if where is None else [x.to(where) for x in operands]


def span(extent: int, positions: list[int], x: Tensor) -> Tensor:
    """Positions along an axis of `extent` as an index for `x`, negative ones from the end."""
    return torch.tensor([p % extent if extent else p for p in positions], dtype=torch.int64, device=x.device)
