"""What a rule may ask surgery to do at its node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from onnxprune.graph import Array


@dataclass(frozen=True)
class SetAttr:
    """Surgery sets an attribute of the node."""

    name: str
    value: Any


@dataclass(frozen=True)
class SetInput:
    """Surgery gives the node's input `position` this constant."""

    position: int
    value: Array


@dataclass(frozen=True)
class SetConst:
    """Surgery changes one element of a constant that reaches the node through shape arithmetic, for one use of it only.

    source: the constant and the flat index in it. use: the (node, input position) that reads it.
    """

    source: tuple[str, int]
    use: tuple[int, int]
    value: int


@dataclass(frozen=True)
class SetEntries:
    """Surgery writes numbers over some entries, by flat index, of the integers that the node computes for an input."""

    position: int
    values: Mapping[int, int]


@dataclass(frozen=True)
class Become:
    """Surgery turns the node into another operator with the same first input and output, new constants and attributes."""

    op: str
    constants: tuple[Array, ...]
    attributes: Mapping[str, Any]


Edit: TypeAlias = SetAttr | SetInput | SetConst | SetEntries | Become
