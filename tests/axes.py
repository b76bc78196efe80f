"""What the groups say of an axis, looked up by names that a reader knows."""

from __future__ import annotations

from typing import Any

from onnxprune.groups import Groups


def owner(groups: Groups, where: str) -> tuple[Any, int]:
    """Group and channel at "tensor.axis[position]"."""
    tensor, rest = where.rsplit(".", 1)
    axis, position = rest.rstrip("]").split("[")
    dim = next(d for d in groups.at if d.tensor == tensor and d.axis == int(axis))
    found, which, channel = groups.channel_ids(dim)
    return found[which[int(position)]], int(channel[int(position)])


def together(groups: Groups, *where: str) -> bool:
    return len({(g.id, channel) for g, channel in (owner(groups, p) for p in where)}) == 1


def why(groups: Groups, tensor: str, axis: int = 1) -> str:
    """Why an axis is frozen; asserts that all of it is, and for one reason."""
    found = next(gs for d, gs in groups.at.items() if d.tensor == tensor and d.axis == axis)
    reasons = {g.reason for g, _ in found}
    assert len(reasons) == 1 and None not in reasons, reasons
    return str(reasons.pop())


def prunable(groups: Groups, tensor: str, axis: int = 1) -> int:
    """How many channels can go from an axis, each by itself."""
    found = next((gs for d, gs in groups.at.items() if d.tensor == tensor and d.axis == axis), [])
    return sum(g.size for g, _ in found if not g.frozen)
