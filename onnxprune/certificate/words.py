"""What every part of the certificate says of itself, and how its numbers are written."""

from __future__ import annotations

import math
from typing import Any

PROPERTY = "onnxprune.certificate"  # key of the certificate in the metadata_props of a pruned file
VERSION = 1

SAMPLING = {
    "bounds": "layer by layer, how far the pre-activations of the pruned weights lie from the original's on the same unpruned "
    "inputs: at most epsilon times the sum of the absolute terms, in all outputs of the layer at once",
    "for": "one fresh input of the distribution that the calibration samples come from, with probability 1 - delta over the "
    "draws of channels and 1 - delta_calibration over the choice of samples",
    "assumes": "independent calibration samples; a channel's share exceeds 1/K of its supremum in at least a fraction "
    "1 - exp(-1/K') of inputs (K = K' = 3), which nothing here checks; no change of weights after the cut",
}
CALIBRATION = {
    "bounds": "layer by layer, how far the pre-activations of the pruned weights lie from the original's on the same unpruned "
    "inputs: at most `bound` times the sum of the absolute terms, for either sign part",
    "for": "every calibration sample, with certainty (K = 1); sums below 1e-6 of a sample's largest are exempt",
    "assumes": "nothing but the samples themselves; it says nothing of other inputs",
}
NETWORK = {
    "bounds": "how far every output of the whole pruned network lies from the original's: the largest error of an entry, and "
    "the largest L2 norm of the errors of a sample relative to its output's",
    "for": "the samples that it was computed on, with certainty",
    "assumes": "the cuts are exact; floating-point rounding moves no output by more than 1e-5 of the largest; local terms are "
    "the exact |(W^ - W) a| of these samples",
}
POPULATION = {
    "bounds": "the share of inputs whose top-1 answer changes, the distance that an output moves (L2, relative to the original "
    "output), the fall of top-1 accuracy where there are labels; all statements jointly with confidence 1 - delta",
    "for": "fresh inputs from the source of the held-out samples; any network, by whatever means it was recovered",
    "assumes": "independent held-out samples of one distribution, used for nothing else: neither to calibrate nor to choose",
}


def absent(part: dict[str, str], reason: str) -> dict[str, Any]:
    """A part that says nothing, and why."""
    return {**part, "applies": False, "reason": reason, "vacuous": True}


def present(part: dict[str, str], vacuous: bool, **numbers: Any) -> dict[str, Any]:
    """A part with its numbers. vacuous: whether these say nothing."""
    return {**part, "applies": True, "reason": None, "vacuous": bool(vacuous), **numbers}


def rounded_up(value: float) -> float | None:
    """Six digits, never below the value, so that a bound stays one; None, JSON's null, for what is not finite."""
    if not math.isfinite(value) or value == 0.0:
        return 0.0 if value == 0.0 else None
    short = float(f"{value:.6g}")
    return short if short >= value else float(f"{value + abs(value) * 1e-5:.6g}")
