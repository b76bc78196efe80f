"""Re-checks a certificate from the two files and, where they are given, the samples that it speaks of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx

from onnxprune import runtime, wire
from onnxprune.checker import bounds, numbers, shares, weights
from onnxprune.checker.numbers import demand, equal, same
from onnxprune.data import Samples
from onnxprune.errors import ValidationError
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.imported import Imported

BATCH = 16
MEASURED = 1e-3  # relative: what two processors may make of the same float32 network
ROUNDING = 3e-6  # of the output: differences that small are noise
PARTS = ("sampling", "calibration", "network", "population")


@dataclass(eq=False)
class Sources:
    """The samples by their place in a certificate: "data", "validation", "certify"; those not given are not re-checked."""

    given: Mapping[str, Samples] = field(default_factory=dict)

    def find(self, where: Mapping[str, Any], seed: int) -> tuple[Samples, Array] | None:
        """The samples that an entry names, in its order; None where they were not given. ValidationError: others were."""
        found = self._look(where, seed)
        if found is not None:
            demand(len(found[1]) == where["samples"], f"it speaks of {where['samples']} samples, and {len(found[1])} are there")
            demand(found[0].digest(found[1]) == where["data"], "the samples are not those that it was computed on")
        return found

    def _look(self, where: Mapping[str, Any], seed: int) -> tuple[Samples, Array] | None:
        name = {"calibration": "data", "held-out": "data"}.get(where["source"], where["source"])
        samples = self.given.get(name)
        if samples is not None and where["source"] == "held-out":
            samples = samples.held_out
        if samples is None:
            return None
        return samples, np.random.default_rng(seed).permutation(len(samples))[
            where["start"] : where["start"] + where["samples"]
        ]

    def known(self, told: Mapping[str, Any]) -> Sources:
        """These sources, without DATA where they are none of the certificate's, but somebody's own to compare outputs on.

        ValidationError where they are by what was chosen of them, but not by their name.
        """
        data = self.given.get("data")
        if data is None or told["data"] == {"samples": len(data), "first": data.digest(np.arange(min(4, len(data))))}:
            return self
        for part in ("network", "population"):
            if told[part]["applies"] and told[part]["source"] in ("data", "calibration", "held-out"):
                found = self._look(told[part], told["seed"])
                same_ones = found is not None and len(found[1]) > 0 and found[0].digest(found[1]) == told[part]["data"]
                demand(not same_ones, "its name of the data is not theirs")
        return Sources({k: v for k, v in self.given.items() if k != "data"})


def check(told: Mapping[str, Any], imported: Imported, pruned: onnx.ModelProto, sources: Sources) -> list[str]:
    """What was re-checked, in words, and what was not and why. Raises ValidationError where anything does not hold.

    told: the certificate. pruned: the model without it.
    """
    try:
        return list(_check(told, imported, pruned, sources))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError, OverflowError) as error:
        text = f"{type(error).__name__} {error}"
        raise ValidationError(
            f"the certificate is not as onnxprune writes them: {text}",
            hint=numbers.CHANGED,
        ) from None


def _check(told: Mapping[str, Any], imported: Imported, pruned: onnx.ModelProto, sources: Sources) -> Iterator[str]:
    groups, given = imported.groups, sources
    sources = given.known(told)
    equal(told["onnxprune_certificate"], 1, "its version")
    equal(told["digests"]["original"], groups.net.digest, "the digest of the original model")
    equal(told["digests"]["pruned"], wire.digest(pruned), "the digest of the pruned model")
    for part in PARTS:
        demand(isinstance(told[part]["applies"], bool) and (told[part]["applies"] or told[part]["vacuous"] is True), part)
    weights.plan(groups, told["plan"])
    yield _weights(told, groups, pruned)
    sizes = {g.id: g.size for g in groups.groups}
    if told["sampling"]["applies"]:
        numbers.sampling(told["sampling"], sizes, shares.readers(groups), len(groups.prunable))
    if told["sampling"]["applies"] and told["calibration"]["applies"]:
        equal(told["sampling"]["samples"], told["calibration"]["samples"], "sampling: samples")
    if (drop := told["population"].get("max_drop")) is not None:
        kept = {name: np.array(entry["kept"]) for name, entry in told["plan"].items()}
        full, left = imported.size.macs, imported.accounting.size(imported.accounting.widths(kept)).macs
        equal(drop["macs"], min(f for f in (1.0, *numbers.GRID) if left <= f * full), "population: the MACs of max_drop")
    for part in PARTS[1:]:
        if told[part]["applies"]:
            getattr(numbers, part)(told[part])
    yield "numbers: every bound follows from the counts and sums that it is made of"
    if len(sources.given) < len(given.given):
        yield "not re-checked: what was measured, as --data are other samples than those of the certificate"
    yield from _sensitivities(told, imported, sources)
    yield from _network(told, imported, pruned, sources)
    yield from _population(told, imported, pruned, sources)


def _weights(told: Mapping[str, Any], groups: Groups, pruned: onnx.ModelProto) -> str:
    if told["recover"] != "none":
        for part in PARTS[:3]:
            demand(not told[part]["applies"], f"{part} speaks of weights that were recovered")
        count = weights.sizes(groups, told["plan"], pruned)
        return f"plan: {count} constants have the sizes that it leaves; not re-checked: what recovery made of them"
    count = weights.check(groups, told["plan"], pruned)
    return f"plan and weights: {count} constants are the slices that the plan keeps"


# --------------------------------------------------------------------------------------------------- sensitivities


def _sensitivities(told: Mapping[str, Any], imported: Imported, sources: Sources) -> Iterator[str]:
    part, groups = told["calibration"], imported.groups
    if not part["applies"]:
        return
    data = sources.given.get("data")
    if data is None:
        yield "not re-checked: the sensitivities (give --data)"
        return
    chosen = np.random.default_rng(told["seed"]).permutation(len(data))[: part["samples"]]
    if list(part["data"]) != [data.digest(chosen)]:
        demand(part["source"] != "data", "the samples are not those that it was calibrated on")
        yield "not re-checked: the sensitivities, which were calibrated on other samples, or shards"
        return
    readers = shares.readers(groups)
    names = {n for n, read in readers.items() if set(read) & set(told["plan"])}
    try:
        wanted = shares.layers(groups, names)
    except shares.Unsupported as reason:
        yield f"not re-checked: the sensitivities, because of {reason}"
        return
    enough = min(len(chosen), shares.affordable(groups, wanted))
    if not enough:
        yield "not re-checked: the sensitivities, which would take minutes for a single sample of so large a network"
        return
    measured = shares.Measured(groups, wanted)
    fixed = next((s.shape[0] for s in imported.specs if s.shape and s.shape[0]), None)
    for start in range(0, enough, fixed or BATCH):
        batch = chosen[start : min(enough, start + (fixed or BATCH))]
        measured.see(data.batch(np.resize(batch, fixed) if fixed else batch))
    exactly = enough == len(chosen) and part["mode"] == "exact"
    _layer_sums(told, measured, readers, exactly)
    if told["sampling"]["applies"]:
        _draws(told, groups, measured, exactly)
    how = "equal to those measured anew" if exactly else f"at least those measured anew on {enough} samples"
    yield f"sensitivities: the sums of {len(part['layers'])} layers are {how}"


def _weight(told: Mapping[str, Any], group: str, size: int) -> Array:
    weight = np.zeros(size)
    entry = told["plan"][group]
    weight[entry["kept"]] = 1.0 if entry.get("scale") is None else entry["scale"]
    return weight


def _sum(told: Any, found: float, exactly: bool, what: str) -> None:
    if exactly:
        same(told, found, what, MEASURED)
    else:
        demand(told >= found * (1 - MEASURED), f"{what} is {told}, but is {found:.6g} at least")


def _layer_sums(told: Mapping[str, Any], measured: shares.Measured, readers: Mapping[str, Any], exactly: bool) -> None:
    entries = told["calibration"]["layers"]
    equal(sorted(entries), sorted({x.name for x in measured.wanted}), "calibration: layers")
    for name, entry in entries.items():
        dropped = bound = 0.0
        for group in (g for g in readers[name] if g in told["plan"]):
            s = measured.largest[name, group]
            weight = _weight(told, group, len(s))
            dropped += float(s[weight == 0].sum())
            bound += float((np.abs(weight - 1) * s).sum())
        _sum(entry["dropped_sensitivity"], dropped, exactly, f"calibration of layer '{name}': dropped_sensitivity")
        _sum(entry["bound"], bound, exactly, f"calibration of layer '{name}': bound")


def _draws(told: Mapping[str, Any], groups: Any, measured: shares.Measured, exactly: bool) -> None:
    """The weights of the plan give the draws back: weight = n/(m q) with q = s over the sum of what was sampled from."""
    part = told["sampling"]
    for name, g in part["groups"].items():
        where = f"sampling of group '{name}'"
        here = [layer for layer, group in measured.largest if group == name]
        s = np.max([measured.largest[layer, name] for layer in here], axis=0)
        rest = s.copy()
        rest[g["certain"]] = 0.0
        _sum(g["sensitivity_sum"], float(s.sum()), exactly, f"{where}: sensitivity_sum")
        _sum(g["sampled_sum"], float(rest.sum()), exactly, f"{where}: sampled_sum")
        if not exactly:
            continue
        outputs = {x.name: groups.outputs(x) for x in measured.wanted}
        equal(g["events"], sum(measured.parts[x] * outputs[x] for x in here), f"{where}: events")
        weight = _weight(told, name, len(s))
        times = weight * g["draws"] * rest / rest.sum()
        whole = np.rint(times)
        drawn = (np.abs(times - whole) <= 1e-2) & (whole >= 1)
        added = (weight == 1.0) & (rest > 0) & ~drawn
        demand(bool((drawn | added | (weight == 0) | (rest == 0)).all()), f"{where}: the weights are of other draws")
        equal(int(whole[drawn].sum()), g["draws"], f"{where}: draws")
        same(g["added_sum"], float(rest[added].sum()), f"{where}: added_sum", MEASURED)


# ------------------------------------------------------------------------------------------ what both networks answer


def _answers(
    imported: Imported, pruned: onnx.ModelProto, samples: Samples, chosen: Array, size: int
) -> Iterator[tuple[Array, list[Array], list[Array]]]:
    fixed = next((s.shape[0] for s in imported.specs if s.shape and s.shape[0]), None)
    both = [runtime.session(m) for m in (imported.model, pruned)]
    for start in range(0, len(chosen), fixed or size):
        at = chosen[start : start + (fixed or size)]
        feeds = samples.batch(np.resize(at, fixed) if fixed else at)
        before, after = (runtime.run(s, feeds) for s in both)
        yield at, before, after


def _network(told: Mapping[str, Any], imported: Imported, pruned: onnx.ModelProto, sources: Sources) -> Iterator[str]:
    part = told["network"]
    if not part["applies"]:
        return
    found = sources.find(part, told["seed"])
    if found is None:
        yield f"not re-checked: the network part (its samples are of --{part['source']})"
        return
    answers = list(_answers(imported, pruned, *found, len(found[1])))
    for k, (name, entry) in enumerate(part["outputs"].items()):
        if "absent" in entry:
            continue
        pairs = [(b[k].astype(np.float64), a[k].astype(np.float64)) for _, b, a in answers]
        slack = ROUNDING * max(float(np.abs(b).max()) for b, _ in pairs)
        largest = max(float(np.abs(a - b).max()) for b, a in pairs)
        same(entry["max_abs_measured"], largest, f"network: '{name}'", MEASURED, slack)
        moved = max(float(_relative(b, a - b).max()) for b, a in pairs)
        same(entry["relative_l2_measured"], moved, f"network: '{name}' (relative L2)", MEASURED, ROUNDING)
    yield from bounds.check(part, told, imported, found)


def _relative(y: Array, difference: Array) -> Array:
    rows = [v.reshape(len(v) if v.ndim else 1, -1) for v in (difference, y)]
    top, base = (np.sqrt((r**2).sum(axis=1)) for r in rows)
    return np.asarray(top / np.maximum(base, np.finfo(np.float64).tiny))


def _population(told: Mapping[str, Any], imported: Imported, pruned: onnx.ModelProto, sources: Sources) -> Iterator[str]:
    part = told["population"]
    if not part["applies"]:
        return
    found = sources.find(part, told["seed"])
    if found is None:
        yield f"not re-checked: the population part (its samples are of --{part['source']})"
        return
    samples, chosen = found
    moved, changed, lost, gained = [], 0, 0, 0
    for at, before, after in _answers(imported, pruned, samples, chosen, BATCH):
        floats = [(b, a) for b, a in zip(before, after, strict=True) if isinstance(b, np.ndarray) and b.dtype.kind == "f"]
        if any(s["kind"] == "relative_l2" for s in part["statements"]):
            moved.append(_moved(floats, len(at)))
        scores = [(b.reshape(len(at), -1), a.reshape(len(at), -1)) for b, a in floats if _is_scores(b, len(at))]
        if scores:
            first, second = (v.argmax(axis=1) for v in scores[0])
            right = None if samples.labels is None else samples.labels[at]
            changed += int((first != second).sum())
            lost += 0 if right is None else int(((first == right) & (second != right)).sum())
            gained += 0 if right is None else int(((first != right) & (second == right)).sum())
    for s in part["statements"]:
        if s["kind"] == "top1_changes":
            equal(s["changed"], changed, "population: changed")
        elif s["kind"] == "top1_drop":
            equal((s["lost"], s["gained"]), (lost, gained), "population: lost and gained")
        elif s["x"] is not None:
            same(s["x"], float(np.sort(np.concatenate(moved))[s["rank"] - 1]), "population: x", MEASURED, ROUNDING)
    yield f"population: the counts and distances are those of the {len(chosen)} held-out samples"


def _is_scores(value: Array, count: int) -> bool:
    sizes = value.shape[1:]
    return value.ndim >= 2 and len(value) == count and value.size == count * max(sizes) and max(sizes) >= 2


def _moved(outputs: list[tuple[Array, Array]], count: int) -> Array:
    y = np.concatenate([b.astype(np.float64).reshape(count, -1) for b, _ in outputs], axis=1)
    z = np.concatenate([a.astype(np.float64).reshape(count, -1) for _, a in outputs], axis=1)
    lost = (np.isfinite(y) != np.isfinite(z)).any(axis=1)
    y, z = np.where(np.isfinite(y), y, 0), np.where(np.isfinite(z), z, 0)
    return np.where(lost, np.inf, _relative(y, z - y))
