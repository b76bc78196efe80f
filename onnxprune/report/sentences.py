"""What a report says, in plain sentences; the terminal and the page escape them, each in its way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def recovery(recovery: Mapping[str, Any]) -> Iterator[str]:
    """What recovery was worth, and what it left alone."""
    errors = {k: "-" if v is None else f"{v:.3g}" for k, v in recovery["held_out_relative_l2"].items()}
    if recovery["kept"] != "none":
        where = "held-out samples" if recovery["held_out"] else "these very samples"
        gain = f"on {where} outputs moved by {errors['none']} before, {errors[recovery['kept']]} after (relative L2)"
        yield f"recovered by {recovery['kept']}, {recovery['layers']} layers from {recovery['samples']} samples: {gain}"
        if recovery["kept"] == "tune":
            yield _gradient(recovery["tuned"], errors)
        elif recovery["reason"]:
            yield recovery["reason"]
    elif recovery["reason"]:
        yield f"not recovered: {recovery['reason']}"
    if recovery["left"]:
        yield (f"layers that recovery could not solve for: {len(recovery['left'])} (see the report)")


def _gradient(tuned: Mapping[str, Any], errors: Mapping[str, str]) -> str:
    """What tuning did, which is no more than gradient descent."""
    work = f"{tuned['epochs']} epochs of gradient descent on {tuned['samples']} samples, without labels (best: {tuned['best']})"
    return f"tuned by {work}" + (f"; by least squares alone outputs moved by {errors['lsq']}" if "lsq" in errors else "")


def validation(found: Mapping[str, Any]) -> Iterator[str]:
    """What re-validation found, in words."""
    error = found["masked_max_relative_error"]
    equal = "" if error is None else f", equals the masked original to {error:.1e}"
    yield f"checked: ONNX checker {'ok' if found['checker'] else 'refuses the original too'}, ONNX Runtime ok{equal}"
    parts = []
    if found["top1"]:
        parts.append("top-1 {:.2f} % -> {:.2f} %".format(*(100 * v for v in found["top1"])))
    if found["agreement"] is not None:
        parts.append(f"same answer {100 * found['agreement']:.1f} %")
    if found["relative_l2"] is not None:
        parts.append(f"outputs moved by {found['relative_l2']:.3g} (relative L2)")
    if parts:
        those = ", all of them set aside to calibrate" if found.get("source") == "calibration" else ""
        yield f"on {found['samples']} samples{those}: " + ", ".join(parts)
    for note in found["notes"]:
        yield f"note: {note}"


def certificate(told: Mapping[str, Any] | None) -> Iterator[str]:
    """The four parts of the certificate, vacuous or not."""
    if told is None:
        yield "certificate: none (no sample data, and a criterion without an error bound)"
        return
    if not told["plan"]:
        yield "certificate: nothing was cut, the outputs are the original's"
        return
    silent: dict[str, list[str]] = {}
    for name, words in PARTS.items():
        part = told[name]
        if not part["applies"]:
            silent.setdefault(part["reason"], []).append(name)
        for line in words(part) if part["applies"] else ():
            yield f"certificate, {name}: {line}"
    for reason, names in silent.items():
        yield f"certificate, {' and '.join(names)}: nothing, because {reason}"


def _sampling(part: Mapping[str, Any]) -> Iterator[str]:
    found = part["layers"].values()
    empty = sum(x["vacuous"] for x in found)
    worst = "infinity" if any(x["epsilon"] is None for x in found) else f"{max(x['epsilon'] for x in found):.3g}"
    if empty:
        yield f"vacuous (epsilon >= 1) in {empty} of {len(found)} layers, up to {worst}: there it guarantees nothing"
    else:
        yield f"epsilon <= {worst} in every layer, with probability {1 - part['delta'] - part['delta_calibration']:g}"


def _calibration(part: Mapping[str, Any]) -> Iterator[str]:
    found = part["layers"].values()
    empty, worst = sum(x["vacuous"] for x in found), max(x["bound"] for x in found)
    said = f", vacuous (>= 1) in {empty} of {len(found)} layers" if empty else ""
    said += " (by upper bounds of the sensitivities)" if part["mode"] == "bound" else ""
    yield f"on the {part['samples']} samples themselves pre-activations move by at most {worst:.3g} of the absolute sum{said}"


def _network(part: Mapping[str, Any]) -> Iterator[str]:
    for name, x in part["outputs"].items():
        if "absent" in x:
            yield f"no bound for output '{name}': {x['absent']}"
        else:
            bound = "without limit" if x["max_abs_bound"] is None else f"by at most {x['max_abs_bound']:.3g}"
            said = ", vacuous" if x["vacuous"] else ""
            yield (
                f"on {part['samples']} samples '{name}' moves {bound} (measured: {x['max_abs_measured']:.3g}; relative L2 "
                f"{x['relative_l2_measured']:.3g}){said}"
            )


def _population(part: Mapping[str, Any]) -> Iterator[str]:
    if (drop := part.get("max_drop")) is not None:
        what = f"drops by at most {100 * drop['value']:g} points with confidence {1 - drop['delta']:g}"
        yield f"{what} (limit found: {100 * drop['limit']:.3g}), certified down to {drop['macs']:g} of the MACs"
    yield f"with confidence {1 - part['delta']:g}, from {part['samples']} held-out samples:"
    for s in part["statements"]:
        if s["kind"] == "top1_changes":
            yield f"at most {100 * s['alpha']:.3g} % of inputs change their top-1 answer (seen: {s['changed']})"
        elif s["kind"] == "top1_drop":
            yield f"the top-1 accuracy falls by at most {100 * s['drop']:.3g} points (lost {s['lost']}, gained {s['gained']})"
        elif s["x"] is None:
            few = part["samples"] < s["samples_needed"]
            why = f"that takes {s['samples_needed']} samples" if few else "too many outputs are not finite"
            yield f"nothing can be said of {100 * s['alpha']:g} % of inputs: {why}"
        else:
            yield f"at most {100 * s['alpha']:g} % of inputs move their outputs by more than {s['x']:.3g} (relative L2)"


PARTS = {"sampling": _sampling, "calibration": _calibration, "network": _network, "population": _population}
"""What each part of a certificate says, in order of its strength for whoever deploys the file, weakest first."""


def sweep(told: Mapping[str, Any]) -> Iterator[str]:
    """What the table of a sweep does not say."""
    points = told["points"]
    first = points[0]["validation"]
    if first["samples"]:
        before = "" if not first["top1"] else f"; top-1 of the original {100 * first['top1'][0]:.2f} %"
        yield f"on {first['samples']} samples{before}; * marks what no other beats in size and quality"
    if any(p["population"]["changes"] is not None for p in points):
        yield (
            "change <= is certified: at most so many of all inputs change their answer, in all of these networks at once; so "
            "any of them may be picked by this table"
        )
