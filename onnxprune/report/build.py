"""The JSON report and the certificate, as plain dictionaries; keys are a contract with programs that read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxprune.channels import ChannelGroup
from onnxprune.errors import PlanError, ValidationError
from onnxprune.groups import Accounting, Groups, is_parameter
from onnxprune.plan import Kept, Plan
from onnxprune.saliency import Saliency, Scores
from onnxprune.selection import Share

# Where activations are multiplied no weight sums over the channel: zeroing what makes it does what zeroing a consumer does.
ROLES = {"silencer": "consumer"}


NOTHING = Plan({})  # of a model as it is
LEVELS = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)  # quantiles of scores


def group_entries(groups: Groups, plan: Plan | None = None, saliency: Saliency | None = None) -> list[dict[str, Any]]:
    """One entry per channel group: what it is made of, what stays, why it is frozen if it is, and how its scores spread."""
    entries = [_group(groups, g, plan) for g in groups.groups]
    if saliency is not None:
        for group, entry in zip(groups.groups, entries, strict=True):
            entry["scores"] = None if group.frozen or group.id not in saliency.by_group else spread(saliency.of(group), entry)
    return entries


def spread(scores: Scores, entry: Mapping[str, Any]) -> dict[str, list[float] | None]:
    """Quantiles (`LEVELS`) of the scores of the channels that stay and of those that go; None of none."""
    parts = {"kept": scores[entry["kept"]], "removed": scores[entry["removed"]]}
    return {k: [float(f"{q:.4g}") for q in np.quantile(v, LEVELS)] if len(v) else None for k, v in parts.items()}


def _group(groups: Groups, group: ChannelGroup, plan: Plan | None) -> dict[str, Any]:
    kept = list(range(group.size))
    if plan is not None and group.id in plan.groups:
        kept = plan.groups[group.id].indices.tolist()
    gone = sorted(set(range(group.size)) - set(kept))
    lost = set(gone)
    members = []
    for slot in group.slots:
        if slot.dim.tensor in groups.net.initializers:
            removed = [int(p) for p, c in zip(slot.positions, slot.channels, strict=True) if int(c) in lost]
            members.append(
                {
                    "tensor": slot.dim.tensor,
                    "axis": slot.dim.axis,
                    "role": ROLES.get(role := groups.roles.get(slot.dim, "scale"), role),
                    "removed": sorted(removed),
                }
            )
    scale = plan.groups[group.id].scale if plan is not None and group.id in plan.groups else None
    return {
        "id": group.id,
        "size": group.size,
        "kept": kept,
        "scale": None if scale is None else scale.tolist(),
        "removed": gone,
        "frozen": group.frozen,
        "reason": group.reason,
        "remedy": group.remedy,
        "exact": group.exact,
        "flaw": group.flaw.reason if group.flaw else None,
        "members": members,
    }


def plan_of(report: Mapping[str, Any]) -> Plan:
    """The plan that a report tells of. Raises PlanError when the report is not whole."""
    try:
        groups = {
            g["id"]: Kept(g["size"], np.array(g["kept"], np.int64), None if g["scale"] is None else np.array(g["scale"]))
            for g in report["groups"]
            if g["removed"]
        }
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"the report's groups are not as onnxprune writes them: {error}") from None
    return Plan(groups)


def check_digests(report: Mapping[str, Any], original: str, pruned: str) -> None:
    """Raises ValidationError unless the report is of these two models, to the byte."""
    found = report.get("digests")
    digests = found if isinstance(found, Mapping) else {}
    for what, have in (("original", original), ("pruned", pruned)):
        if digests.get(what) != have:
            raise ValidationError(
                f"the report is of another {what} model, or the file was changed since",
                hint="name the two files of one pruning, and its report with --report",
            )


def layer_entries(groups: Groups, accounting: Accounting, plan: Plan, shares: Mapping[str, Share]) -> list[dict[str, Any]]:
    """One entry per linear layer: widths and MACs before and after, and its groups' shares of the certificate.

    The errors and failure probabilities of the groups that a layer reads add up (triangle inequality, union bound).
    """
    widths = accounting.widths({g: k.indices for g, k in plan.groups.items()})
    before, after = accounting.layer_macs(accounting.full_widths), accounting.layer_macs(widths)
    entries = []
    for i, layer in enumerate(groups.layers):
        read = [shares[g.id] for g, _ in groups.at.get(layer.x, []) if layer.sums and g.id in shares]
        entries.append(
            {
                "name": layer.name,
                "op": layer.op,
                "in": [groups.full(layer.x), accounting.axis_size(layer.x, widths)],
                "out": [groups.full(layer.out), accounting.axis_size(layer.out, widths)],
                "macs": [int(before[i]), int(after[i])],
                "sensitivity_sum": sum(s.sensitivity_sum for s in read),
                "dropped_sensitivity": sum(s.dropped_sum for s in read),
                "draws": sum(s.draws for s in read),
                "epsilon": sum(s.epsilon for s in read),
                "delta": sum(s.delta for s in read if s.epsilon > 0),
            }
        )
    return entries


def calibration(saliency: Saliency) -> dict[str, Any]:
    """What the scores are of: samples, data, criterion and its options."""
    return {
        "samples": saliency.samples,
        "data": list(saliency.data),
        "criterion": saliency.criterion,
        "options": dict(saliency.options),
        "quantiles": list(LEVELS),
    }


def prunable_share(groups: Groups, accounting: Accounting) -> tuple[float, float]:
    """(share of MACs, share of parameters) in layers of which a channel axis lies in a group that can be pruned."""
    macs = accounting.layer_macs(accounting.full_widths)

    def touched(dims: Any) -> bool:
        return any(not g.frozen for d in dims for g, _ in groups.at.get(d, []))

    total = sum(int(m) for m in macs)
    cut = sum(int(m) for layer, m in zip(groups.layers, macs, strict=True) if touched((layer.x, layer.out, *layer.macs_dims)))
    tensors = {d.tensor for d, found in groups.at.items() if any(not g.frozen for g, _ in found)}
    floats = {n: p for n, p in groups.net.initializers.items() if is_parameter(groups.net, n)}
    elements = {n: _elements(p.dims) for n, p in floats.items()}
    params = sum(elements.values())
    return cut / total if total else 0.0, sum(v for n, v in elements.items() if n in tensors) / params if params else 0.0


def group_macs(groups: Groups, accounting: Accounting) -> dict[str, int]:
    """For every group the MACs of the layers that have an axis in it; layers count in each of their groups."""
    macs = accounting.layer_macs(accounting.full_widths)
    total = {g.id: 0 for g in groups.groups}
    for layer, cost in zip(groups.layers, macs, strict=True):
        for name in {g.id for d in (layer.x, layer.out, *layer.macs_dims) for g, _ in groups.at.get(d, [])}:
            total[name] += int(cost)
    return total


def _elements(dims: Any) -> int:
    total = 1
    for n in dims:
        total *= int(n)
    return total
