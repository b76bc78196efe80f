"""Parts `sampling` and `calibration`: what the sensitivities bound, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from onnxprune import theory
from onnxprune.certificate.words import CALIBRATION, SAMPLING, absent, present, rounded_up
from onnxprune.contraction import consumers
from onnxprune.groups import Groups
from onnxprune.plan import Plan
from onnxprune.saliency import LayerScore, Saliency
from onnxprune.selection import Share

K_PRIME = 3.0  # of assumption A(K, K') in `theory`
ROUNDING = 1e-5  # relative error of sensitivities in float32
ESTIMATED = ("DeformConv",)  # operators whose sensitivities may be estimates


def _obstacle(saliency: Saliency) -> str | None:
    if saliency.criterion != "pfp":
        return f"the channels were chosen by '{saliency.criterion}', which measures no sensitivity"
    if saliency.options.get("reduce", "sum") != "sum":
        return "--reduce max measures single entries of a channel; the theorem is about whole channels (--reduce sum)"
    return None


def sampling(groups: Groups, shares: Mapping[str, Share], saliency: Saliency, delta: float) -> dict[str, Any]:
    """What the theorem says of the groups of which channels were drawn; see `theory`."""
    if (reason := _obstacle(saliency)) is not None:
        return absent(SAMPLING, reason)
    drawn = {name: s for name, s in shares.items() if s.draws and s.epsilon > 0}
    fixed = sorted(name for name, s in shares.items() if not s.draws and s.epsilon > 0)
    if not drawn:
        why = "the channels were selected deterministically: no draw, no sampling error" if fixed else "nothing was cut"
        return absent(SAMPLING, why)
    channels = sum(groups.by_id[name].size for name in drawn)
    missed = min(1.0, channels * math.exp(-saliency.samples / K_PRIME))
    layers = {}
    for layer in consumers(groups):
        read = [name for name in dict.fromkeys(g.id for g, _ in groups.at.get(layer.x, [])) if name in drawn]
        if read:
            found = [drawn[name] for name in read]
            total = sum(s.epsilon for s in found)
            layers[layer.name] = {
                "groups": read,
                "sensitivity_sum": rounded_up(sum(s.sensitivity_sum for s in found)),
                "draws": sum(s.draws for s in found),
                "epsilon": rounded_up(total),
                "delta": rounded_up(sum(s.delta for s in found)),
                "vacuous": total >= 1 or missed >= 1,
            }
    entries = {name: _drawn(s) for name, s in drawn.items()}
    return present(
        SAMPLING,
        any(x["vacuous"] for x in layers.values()),
        K=theory.K_DEFAULT,
        samples=saliency.samples,
        mode=str(saliency.options.get("sensitivity", "exact")),
        delta=delta,
        delta_calibration=rounded_up(missed),
        deterministic=fixed,
        groups=entries,
        layers=layers,
    )


def _drawn(share: Share) -> dict[str, Any]:
    return {
        "draws": share.draws,
        "certain": list(share.certain),
        "sensitivity_sum": rounded_up(share.sensitivity_sum),
        "sampled_sum": rounded_up(share.sampled_sum),
        "added_sum": rounded_up(share.added_sum),
        "events": share.events,
        "searched": share.searched,
        "delta": rounded_up(share.delta),
        "epsilon": rounded_up(share.epsilon),
        "vacuous": share.vacuous,
    }


def calibration(groups: Groups, plan: Plan, saliency: Saliency, measured: bool = True) -> dict[str, Any]:
    """Sum over channels of |weight - 1| times the sensitivity: 0 is the weight of a dropped channel.

    measured: whether that was done in this run, on its own data.
    |z^ - z| = |sum_j (w_j - 1) c_j| <= sum_j |w_j - 1| s_j z in every event of a calibration sample, as c_j <= s_j z there.
    """
    if (reason := _obstacle(saliency)) is not None:
        return absent(CALIBRATION, reason)
    operators = {layer.name: layer.op for layer in groups.layers}
    layers: dict[str, dict[str, Any]] = {}
    for score in saliency.layers:
        if score.group in plan.groups and operators.get(score.layer) not in ESTIMATED:
            dropped, moved = _moved(score, plan)
            entry = layers.setdefault(score.layer, {"dropped_sensitivity": 0.0, "bound": 0.0})
            entry["dropped_sensitivity"] += dropped
            entry["bound"] += moved * (1 + ROUNDING)
    if not layers:
        return absent(CALIBRATION, "nothing was cut" if plan.empty else "no layer whose sensitivities are exact reads a cut")
    for entry in layers.values():
        entry["vacuous"] = entry["bound"] >= 1
        entry |= {k: rounded_up(entry[k]) for k in ("dropped_sensitivity", "bound")}
    return present(
        CALIBRATION,
        all(x["vacuous"] for x in layers.values()),
        K=1,
        samples=saliency.samples,
        source="data" if measured else "file",
        data=list(saliency.data),
        mode=str(saliency.options.get("sensitivity", "exact")),
        layers=layers,
    )


def _moved(score: LayerScore, plan: Plan) -> tuple[float, float]:
    """(sum of the dropped sensitivities, sum of |weight - 1| times the sensitivity over all channels)."""
    kept = plan.groups[score.group]
    weight = np.zeros(kept.size)
    weight[kept.indices] = 1.0 if kept.scale is None else kept.scale
    dropped = np.delete(score.values, kept.indices)
    return float(dropped.sum()), float((np.abs(weight - 1.0) * score.values).sum())
