"""Budgets: what to keep, as a fraction of the original's MACs, parameters, bytes or time, or an error or drop not to exceed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from onnxprune.errors import BudgetError
from onnxprune.groups import Size

Kind: TypeAlias = Literal["macs", "params", "bytes", "latency", "eps", "max-drop"]
KINDS: tuple[Kind, ...] = ("macs", "params", "bytes", "latency", "eps", "max-drop")
UNITS = {"macs": "MACs", "params": "parameters", "bytes": "bytes", "latency": "latency"}


@dataclass(frozen=True)
class Budget:
    """kind "macs", "params", "bytes", "latency": `value` is the fraction to keep, in (0, 1). kind "eps": the error, > 0.
    kind "max-drop": by how much the accuracy (without labels: the agreement) may fall, in (0, 1).

    Raises BudgetError for a value out of range.
    """

    kind: Kind
    value: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise BudgetError(f"unknown budget '{self.kind}'", hint=f"it is one of {', '.join(KINDS)}")
        if self.kind == "eps":
            if not 0 < self.value < float("inf"):
                raise BudgetError(f"--eps must be a positive number, not {self.value}")
        elif not 0 < self.value < 1:
            raise BudgetError(
                f"--{self.kind} must be a fraction between 0 and 1, not {self.value}",
                hint="0.02 allows two points" if self.kind == "max-drop" else "0.5 keeps half of the original",
            )

    def used(self, size: Size) -> int:
        """What this budget counts, of a network of this size."""
        return int(getattr(size, self.kind))

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "value": self.value}
