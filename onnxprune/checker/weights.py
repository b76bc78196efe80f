"""Whether a pruned file's weights are the slices of the original's that the plan keeps, reweighted as it says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import onnx

from onnxprune import weights as stored
from onnxprune.checker.numbers import demand
from onnxprune.graph import Array, Network
from onnxprune.groups import Groups

SCALED = 1e-6  # relative rounding of a multiplication in another order


def plan(groups: Groups, told: Mapping[str, Any]) -> None:
    """Raises ValidationError unless every entry names a group of the model and channels of it, each once, in order."""
    for name, kept in told.items():
        group = groups.by_id.get(name)
        demand(group is not None and not group.frozen, f"the plan cuts '{name}', which is no group that can be cut")
        assert group is not None
        indices, scale = kept["kept"], kept.get("scale")
        rising = all(type(i) is int for i in indices) and all(a < b for a, b in pairwise(indices))
        demand(kept["size"] == group.size and len(indices) > 0, f"the plan for '{name}' is of another size")
        demand(rising and indices[0] >= 0 and indices[-1] < group.size, f"the plan for '{name}' keeps impossible channels")
        demand(scale is None or (len(scale) == len(indices) and np.isfinite(scale).all()), f"the plan rescales '{name}' oddly")


def check(groups: Groups, told: Mapping[str, Any], pruned: onnx.ModelProto) -> int:
    """Raises ValidationError where a float or 8-bit constant is not as the plan makes it; returns how many were compared.

    Constants that several nodes share, of which a cut makes copies, are compared with what any of these has to be.
    """
    compared = 0
    for name, found, wanted in _pairs(groups, told, pruned):
        fits = any(w.shape == found.shape and _close(w, found) for w in wanted)
        demand(fits, f"the weights '{name}' of the pruned file are not what the plan keeps of the original's")
        compared += 1
    return compared


def sizes(groups: Groups, told: Mapping[str, Any], pruned: onnx.ModelProto) -> int:
    """The same of the sizes of the constants alone, whose values recovery has changed."""
    compared = 0
    for name, found, wanted in _pairs(groups, told, pruned):
        fits = any(w.shape == found.shape for w in wanted)
        demand(fits, f"the weights '{name}' of the pruned file have not the sizes that the plan leaves")
        compared += 1
    return compared


def _pairs(groups: Groups, told: Mapping[str, Any], pruned: onnx.ModelProto) -> Iterator[tuple[str, Array, list[Array]]]:
    """(name, the value in the pruned file, what it may be) for every float or 8-bit constant that is in both."""
    after = Network(pruned, {}, {}).initializers
    for name, proto in groups.net.initializers.items():
        kind = groups.net.kinds[name]
        if name in after and (kind.kind == "f" or kind.itemsize == 1):
            value = stored.array(proto)
            uses = dict.fromkeys(["", *_uses(groups, name)])
            yield name, stored.array(after[name]), [_cut(groups, told, name, value, use) for use in uses]


def _uses(groups: Groups, name: str) -> list[str]:
    return [d.use for d in groups.at if d.tensor == name]


def _cut(groups: Groups, told: Mapping[str, Any], name: str, value: Array, use: str) -> Array:
    result = np.array(value)
    for dim, found in groups.at.items():
        if dim.tensor != name or dim.use != use:
            continue
        keep = np.ones(groups.full(dim), bool)
        factor = np.ones(groups.full(dim))
        for group, slot in found:
            if group.id in told:
                entry = told[group.id]
                stays = np.zeros(group.size, bool)
                stays[entry["kept"]] = True
                keep[slot.positions] = stays[slot.channels]
                if entry.get("scale") is not None and groups.roles.get(dim) == "consumer":
                    weight = np.ones(group.size)
                    weight[entry["kept"]] = entry["scale"]
                    factor[slot.positions] = weight[slot.channels]
        if (factor != 1).any():
            shape = [1] * result.ndim
            shape[dim.axis] = -1
            result = (result.astype(np.float64) * factor.reshape(shape)).astype(value.dtype)
        result = np.compress(keep, result, axis=dim.axis)
    return result


def _close(wanted: Array, found: Array) -> bool:
    if wanted.dtype.kind == "f":
        return bool(np.allclose(wanted, found, rtol=SCALED, atol=0, equal_nan=True))
    return bool(np.array_equal(wanted, found))
