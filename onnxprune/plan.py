"""What a pruning decides: which channels of every group stay, and with which weight. JSON both ways."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels import Index
from onnxprune.errors import PlanError


@dataclass(frozen=True, eq=False)
class Kept:
    """The channels of one group that stay.

    size: channels before. indices: sorted numbers of those that stay. scale: by which every consumer multiplies the
    weights of each (importance sampling's reweighting), None for 1.
    """

    size: int
    indices: Index
    scale: NDArray[np.float64] | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """Kept channels by group id; groups that are not named stay whole. `model_digest` says which model it is for."""

    groups: Mapping[str, Kept] = field(default_factory=dict)
    model_digest: str = ""

    @property
    def empty(self) -> bool:
        """Whether applying the plan changes nothing."""
        return all(len(k.indices) == k.size and k.scale is None for k in self.groups.values())

    def only(self, names: Iterable[str]) -> Plan:
        """What the plan says of these groups."""
        return Plan({n: self.groups[n] for n in names if n in self.groups}, self.model_digest)

    def to_json(self) -> str:
        """Indented JSON; `from_json` reads it back without loss."""
        groups = {}
        for name, kept in self.groups.items():
            entry: dict[str, Any] = {"size": kept.size, "kept": kept.indices.tolist()}
            if kept.scale is not None:
                entry["scale"] = kept.scale.tolist()
            groups[name] = entry
        return json.dumps({"onnxprune_plan": 1, "model_digest": self.model_digest, "groups": groups}, indent=1)

    @staticmethod
    def from_json(text: str) -> Plan:
        """Raises PlanError when the text is not a plan."""
        try:
            data = json.loads(text)
            groups = {str(name): _kept(entry) for name, entry in data["groups"].items()}
            return Plan(groups, str(data.get("model_digest", "")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise PlanError(
                f"not a pruning plan: {error}", hint="a plan is JSON as written by `onnxprune prune --save-plan`"
            ) from None


def _kept(entry: Mapping[str, Any]) -> Kept:
    """One group of a plan file; ValueError for what no pruning writes."""
    indices, scale = entry["kept"], entry.get("scale")
    if not isinstance(indices, list) or not all(type(i) is int for i in indices) or type(entry["size"]) is not int:
        raise ValueError("'size' and 'kept' must be whole numbers")
    if scale is None:
        return Kept(entry["size"], np.array(indices, np.int64))
    factors = np.array(scale, np.float64)
    if factors.shape != (len(indices),) or not np.isfinite(factors).all():
        raise ValueError("'scale' must be one finite number for each kept channel")
    return Kept(entry["size"], np.array(indices, np.int64), factors)
