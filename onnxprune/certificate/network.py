"""Part `network`: the recursion through the whole graph, on a few samples, beside what was measured on the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx

from onnxprune import large, runtime
from onnxprune.certificate.recursion import Recursion
from onnxprune.certificate.rules import RULES
from onnxprune.certificate.words import rounded_up
from onnxprune.errors import ModelError
from onnxprune.graph import Array, Network
from onnxprune.weights import nbytes, references, tensors

ROUNDING = 1e-5  # of the largest output: what both networks' floating-point rounding may add
MOST_BYTES = 1 << 29  # of weights, of which the recursion needs three copies
MOST_SAMPLES = 8
WORK = 1.6e10  # MACs of inference that the part may take; the recursion is about four inferences

Feeds = Mapping[str, Array]


def affordable(macs: int) -> int:
    """On how many samples the recursion runs: 8, fewer where the network is large."""
    return int(np.clip(WORK / max(1, 4 * macs), 1, MOST_SAMPLES))


def obstacle(net: Network, exact: bool) -> str | None:
    """Why there can be no bound for any output; None where the recursion may be tried."""
    if not exact:
        return "some cuts are not exact, so that the pruned network does not compute what the masked original computes"
    if net.inside.followed:
        return "control flow: the recursion does not follow If, Loop or Scan"
    narrow = next((k for k, d in net.kinds.items() if d.kind == "V" or (d.kind == "f" and d.itemsize < 4)), None)
    if narrow is not None:
        return f"the weights are of a type narrower than float32 ('{narrow}'), whose rounding the recursion does not bound"
    if sum(nbytes(t) or 0 for t in tensors(net.source)) > MOST_BYTES:
        return f"more than {MOST_BYTES >> 20} MB of weights"
    return None


def outputs(
    net: Network, masked: onnx.ModelProto, pruned: onnx.ModelProto, feeds: Sequence[Feeds]
) -> dict[str, dict[str, Any]]:
    """For each floating-point output the bound and what was measured, over all samples; or why there is no bound.

    masked: what the pruned network is equal to, with the original's shapes. feeds: samples, in batches.
    """
    if references(net.model):
        net, masked, pruned = Network(large.whole(net.model), net.shapes, net.values), large.whole(masked), large.whole(pruned)
    recursion = Recursion(net, masked)
    recursion.run(RULES)
    model, errors = recursion.model()
    try:
        bounding, cut = runtime.session(model), runtime.session(pruned)
        found = [(runtime.run(bounding, f, [*net.outputs, *errors.values()]), runtime.run(cut, f)) for f in feeds]
    except ModelError as failure:
        return {o: {"absent": f"the bound does not run: {failure.message}"} for o in net.outputs}
    entries = {}
    for k, output in enumerate(net.outputs):
        at = len(net.outputs) + list(errors).index(output) if output in errors else None
        runs = [(b[k], c[k], None if at is None else b[at]) for b, c in found]
        if not isinstance(runs[0][0], np.ndarray) or runs[0][0].dtype.kind != "f":
            entries[output] = {"absent": "not a floating-point tensor"}
        elif output in recursion.ends:
            entries[output] = {"absent": recursion.ends[output]}
        else:
            entries[output] = _entry(runs)
    return entries


def _entry(runs: Sequence[tuple[Array, Array, Array | None]]) -> dict[str, Any]:
    """Largest bound and largest measured difference, absolute and relative to the L2 norm of a batch's output."""
    scale = max(float(np.abs(y).max(initial=0.0)) for y, _, _ in runs)
    allowance = ROUNDING * scale
    bound = relative = 0.0
    for y, z, e in runs:
        limit = (np.zeros(y.shape) if e is None else e.astype(np.float64)) + allowance
        difference = np.abs(z.astype(np.float64) - y)
        if not np.isfinite(limit).all():
            return {"max_abs_bound": None, "relative_l2_bound": None, "vacuous": True} | _measured(runs)
        if (difference > limit).any():
            worst = float((difference / limit).max())
            return {"absent": f"the outputs moved {worst:.3g} times as far as the bound allows: a bug, please report it"}
        bound = max(bound, float(limit.max(initial=0.0)))
        relative = max(relative, float((_norms(limit) / _norms(y)).max()))
    return {
        "max_abs_bound": rounded_up(bound),
        "relative_l2_bound": rounded_up(relative),
        "vacuous": relative >= 1,
    } | _measured(runs)


def _measured(runs: Sequence[tuple[Array, Array, Array | None]]) -> dict[str, float | None]:
    largest = max(float(np.abs(z.astype(np.float64) - y).max(initial=0.0)) for y, z, _ in runs)
    relative = max(float((_norms(z.astype(np.float64) - y) / _norms(y)).max()) for y, z, _ in runs)
    return {"max_abs_measured": rounded_up(largest), "relative_l2_measured": rounded_up(relative)}


def _norms(value: Array) -> Array:
    """The L2 norm of every row of axis 0, as float64; at least the smallest number, so that one can divide by it."""
    rows = value.astype(np.float64).reshape(len(value) if value.ndim else 1, -1)
    return np.asarray(np.maximum(np.sqrt((rows**2).sum(axis=1)), np.finfo(np.float64).tiny))
