"""Pass `validate`: nothing is handed over that ONNX Runtime has not run and the oracle has not passed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import runtime, wire
from onnxprune.certificate.population import Observed, Watch
from onnxprune.channels import Index
from onnxprune.control import every_graph
from onnxprune.data import Digest, Samples
from onnxprune.errors import ModelError, ValidationError
from onnxprune.graph import Array, graph_inputs
from onnxprune.rounding import quantises
from onnxprune.weights import references

QUANTISED = 5e-2  # a sum that rounds differently may land on the next step of an 8-bit activation
TOLERANCE = {"float64": 1e-4, "float32": 1e-4, "float16": 2e-2, "bfloat16": 1e-1}
BATCH = 16
HELD = 256 << 20  # bytes of samples and answers that wait for the other model's turn
UNREAD = (
    "onnx.checker saw the whole graph, with the type and shape of every tensor, but not the values of {count} large ones, "
    "which stay in files"
)
NOTHING = Observed()
RECOVERED = "equality with the masked original was checked before recovery gave the layers new weights"
APPROXIMATED = (
    "some cuts are approximate (--allow-approximate): equality with the masked original was checked for the others only"
)


@dataclass(frozen=True)
class Validation:
    """What re-validation found.

    checker: `onnx.checker` with full shape inference passes. runtime: ONNX Runtime loads and runs the pruned model.
    masked_max_relative_error: largest difference to the masked original, over the largest output; None where there was no
    masked original to compare with. agreement: share of
    samples with the same top-1 answer as the original. relative_l2: |pruned - original| / |original| over all outputs.
    top1: accuracy (before, after) where there are labels. samples: how many were compared. observed: what the certificate
    needs to know of each.
    """

    checker: bool
    runtime: bool
    masked_max_relative_error: float | None
    agreement: float | None = None
    relative_l2: float | None = None
    top1: tuple[float, float] | None = None
    samples: int = 0
    notes: tuple[str, ...] = ()
    observed: Observed = NOTHING

    def to_json(self) -> dict[str, Any]:
        return {
            "checker": self.checker,
            "runtime": self.runtime,
            "masked_max_relative_error": self.masked_max_relative_error,
            "agreement": self.agreement,
            "relative_l2": self.relative_l2,
            "top1": list(self.top1) if self.top1 else None,
            "samples": self.samples,
            "notes": list(self.notes),
        }


def validate(
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    masked: onnx.ModelProto | None,
    feeds: Sequence[Mapping[str, Array]],
    samples: Samples | None = None,
    indices: Index | None = None,
    *,
    providers: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
    exact: onnx.ModelProto | None = None,
    recovered: bool = False,
) -> Validation:
    """Checks the pruned model and compares its outputs.

    feeds: inputs for the oracle, which compares `pruned` with `masked` (skipped where that is None: recovered models
    compute something better). exact: what to compare with `masked` instead, where `pruned` also has cuts that are not
    exact: the model with the exact cuts only. recovered: what it lacks is the recovered weights. samples, indices: data on
    which pruned and original are compared.
    Raises ValidationError when the model is not valid, does not run, or differs from the masked original.
    """
    notes: list[str] = []
    if count := len(references(pruned)):
        notes.append(UNREAD.format(count=count))
    checked = _check(original, pruned, notes)
    _same_interface(original, pruned)
    try:
        _runs(runtime.session(pruned, providers=providers), feeds)  # with the optimisations that the oracle leaves out
        error = _oracle(original, exact or pruned, masked, feeds) if masked is not None else None
        if exact is not None:
            notes.append(RECOVERED if recovered else APPROXIMATED)
        observed = NOTHING
        compared = Comparison()
        if samples is not None and indices is not None:
            compared = compare(original, pruned, samples, indices, providers, progress)
            observed = compared.observed
    except ModelError as failure:
        raise ValidationError(f"the pruned model does not run: {failure.message}") from None
    return Validation(
        checked,
        True,
        error,
        compared.agreement,
        compared.relative_l2,
        compared.top1,
        compared.samples,
        tuple(notes),
        observed,
    )


def _check(original: onnx.ModelProto, pruned: onnx.ModelProto, notes: list[str]) -> bool:
    try:
        _full_check(pruned)
        return True
    except OSError:  # no space for the structure: says nothing of the model
        raise
    except Exception as error:  # the checker and shape inference raise several unrelated types
        first = " ".join(str(error).split())[:200]
        try:
            _full_check(original)
        except Exception:
            notes.append(f"onnx.checker refuses the original model too: {first}")
            return False
        raise ValidationError(f"onnx.checker refuses the pruned model: {first}") from None


def _full_check(model: onnx.ModelProto) -> None:
    """Raises what the checker raises. It does not look at values, and could not load a large model with them."""
    if not references(model):
        onnx.checker.check_model(model, full_check=True)
        return
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        onnx.checker.check_model(wire.hollow(model, Path(folder)), full_check=True)


def _same_interface(original: onnx.ModelProto, pruned: onnx.ModelProto) -> None:
    for what, a, b in (
        ("inputs", graph_inputs(original), graph_inputs(pruned)),
        ("outputs", list(original.graph.output), list(pruned.graph.output)),
    ):
        if [v.SerializeToString() for v in a] != [v.SerializeToString() for v in b]:
            raise ValidationError(f"the pruned model has other {what} than the original")


def _oracle(
    original: onnx.ModelProto, pruned: onnx.ModelProto, masked: onnx.ModelProto, feeds: Sequence[Mapping[str, Array]]
) -> float:
    """Largest relative difference between the pruned model and the original with the same channels silenced.

    Always on the CPU and without graph optimisations, so that both sides round alike. One model after another, so that
    no more than one is in memory.
    """
    answers = [_runs(runtime.session(m, optimise=False, reuse=False), feeds) for m in (original, masked, pruned)]
    steps = any(quantises(n) for g in every_graph(original.graph) for n in g.node)
    worst = 0.0
    for results in zip(*answers, strict=True):
        for output, full, mask, cut in zip(original.graph.output, *results, strict=True):
            error, limit = relative_error(full, mask, cut)
            if not error <= (max(limit, QUANTISED) if steps else limit):
                raise ValidationError(
                    f"output '{output.name}' of the pruned model differs from the masked original by {error:.2g} (relative)",
                    hint="this is a bug in onnxprune: please report it with the model",
                )
            worst = max(worst, error)
    return worst


def _runs(session: Any, feeds: Sequence[Mapping[str, Array]]) -> list[list[Array]]:
    return [runtime.run(session, feed) for feed in feeds]


def relative_error(original: Any, masked: Any, pruned: Any) -> tuple[float, float]:
    """(max |pruned - masked| over the larger of max |masked| and max |original|, what rounding explains)."""
    if not isinstance(masked, np.ndarray) or masked.dtype.kind not in "fV":
        return 0.0, 0.0  # indices and classes may flip on a tie; the floating-point outputs speak for them
    if masked.shape != pruned.shape:
        return float("inf"), 0.0
    limit = TOLERANCE.get(masked.dtype.name, 1e-4)
    a, b, o = (np.asarray(v, np.float64) for v in (masked, pruned, original))
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return float("inf"), limit
    scale = max(np.abs(a[finite]).max(initial=0.0), np.abs(o[np.isfinite(o)]).max(initial=0.0))
    return float(np.abs(a - b)[finite].max(initial=0.0) / scale) if scale else float(np.any(b[finite])), limit


def compare(
    original: onnx.ModelProto,
    pruned: onnx.ModelProto,
    samples: Samples,
    indices: Index,
    providers: Sequence[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Runs both models on the same samples. Raises ModelError when either does not run.

    Large models take turns: what the original answers is kept, up to 256 MB of it, until the pruned one is asked the same.
    """
    large = bool(references(original) or references(pruned))
    turns = _Turns(providers, together=not large)
    compared, digest = Comparison(), Digest(samples.inputs)
    waiting: list[tuple[Index, dict[str, Array], list[Array]]] = []

    def settle() -> None:
        for part, batch, before in waiting:
            labels = None if samples.labels is None else samples.labels[part]
            compared.add(before, runtime.run(turns.session(pruned), batch), labels, len(part))
        waiting.clear()

    for part, batch in _batches(original, samples, indices, progress):
        digest.add(batch, len(part))
        waiting.append((part, batch, runtime.run(turns.session(original), batch)))
        if not large or sum(v.nbytes for _, x, y in waiting for v in [*x.values(), *y] if isinstance(v, np.ndarray)) > HELD:
            settle()
    settle()
    compared.data = digest.hexdigest()
    return compared


class _Turns:
    """The sessions of several models: all of them at once, or only that of the model whose turn it is."""

    def __init__(self, providers: Sequence[str] | None, together: bool) -> None:
        self._providers, self._together = providers, together
        self._open: dict[int, Any] = {}

    def session(self, model: onnx.ModelProto) -> Any:
        if id(model) not in self._open:
            if not self._together:
                self._open.clear()
            self._open[id(model)] = runtime.session(model, providers=self._providers)
        return self._open[id(model)]


def _batches(
    model: onnx.ModelProto, samples: Samples, indices: Index, progress: Callable[[int, int], None] | None
) -> Iterator[tuple[Index, dict[str, Array]]]:
    fixed = next((s[0] for v in graph_inputs(model) if (s := runtime.input_shape(v))), None)
    size = fixed or BATCH
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        if fixed and len(part) < size:
            return  # an incomplete last batch of a fixed-batch model is left out
        yield part, samples.batch(part)
        if progress:
            progress(start + len(part), len(indices))


class Comparison:
    """Running comparison of two models' outputs."""

    def __init__(self) -> None:
        self.samples = 0
        self.data = ""  # digest of the samples
        self._difference = self._norm = 0.0
        self._same = self._answers = 0
        self._right = [0, 0]
        self._labelled = 0
        self._watch = Watch()

    def add(self, before: Sequence[Any], after: Sequence[Any], labels: Array | None, count: int) -> None:
        self.samples += count
        self._watch.add(before, after, count)
        answered = False
        for a, b in zip(before, after, strict=True):
            if not isinstance(a, np.ndarray) or a.dtype.kind != "f" or a.shape != b.shape:
                continue
            x, y = a.astype(np.float64), b.astype(np.float64)
            finite = np.isfinite(x) & np.isfinite(y)
            self._difference += float(((x - y)[finite] ** 2).sum())
            self._norm += float((x[finite] ** 2).sum())
            if not answered and (logits := _logits(x, y, count)) is not None:
                answered = True
                self._vote(*logits, labels)

    def _vote(self, x: Array, y: Array, labels: Array | None) -> None:
        first, second = x.argmax(1), y.argmax(1)
        self._same += int((first == second).sum())
        self._answers += len(first)
        known = labels is not None and len(labels) == len(first) and labels.max() < x.shape[1]
        self._watch.vote(first, second, labels if known else None)
        if labels is not None and known:
            self._right[0] += int((first == labels).sum())
            self._right[1] += int((second == labels).sum())
            self._labelled += len(labels)

    @property
    def observed(self) -> Observed:
        return replace(self._watch.observed, data=self.data)

    @property
    def relative_l2(self) -> float | None:
        return (self._difference / self._norm) ** 0.5 if self._norm else None

    @property
    def agreement(self) -> float | None:
        return self._same / self._answers if self._answers else None

    @property
    def top1(self) -> tuple[float, float] | None:
        if not self._labelled or self._labelled != self._answers:
            return None
        return self._right[0] / self._labelled, self._right[1] / self._labelled


def _logits(x: Array, y: Array, count: int) -> tuple[Array, Array] | None:
    """Both outputs as [samples, classes] where they are class scores: one vector of at least two entries a sample."""
    if x.ndim < 2 or x.shape[0] != count or x.size != count * max(x.shape[1:]) or max(x.shape[1:]) < 2:
        return None
    return x.reshape(count, -1), y.reshape(count, -1)
