"""From a plan to a model: the cut, then recovery, of which a step is kept only where it brings held-out outputs nearer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxprune import tuning
from onnxprune.channels import Index
from onnxprune.data import Samples
from onnxprune.errors import ModelError
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.imported import Imported
from onnxprune.options import Options
from onnxprune.passes.calibrate import batch_size, fill
from onnxprune.passes.recover import Recovery, recover
from onnxprune.passes.surgery import surgery
from onnxprune.passes.validate import compare
from onnxprune.plan import Plan
from onnxprune.recovery.solver import How
from onnxprune.splits import Split

if TYPE_CHECKING:
    from onnxprune.training.tune import Tuned


@dataclass(frozen=True, eq=False)
class Finished:
    """A pruned model with or without recovered weights.

    cut: as surgery leaves it. model: what is kept, `cut` itself where nothing was recovered. how: the recovery that was
    kept, or "none". errors: relative L2 on the samples that decide, by recovery. samples: how many were learnt from.
    why: why a recovery that was tried was not kept. impartial: whether no weight was learnt from the samples that decide.
    gradient: what `--recover tune` has to tell. tuned: what fine-tuning made of it, where that was asked for.
    """

    cut: onnx.ModelProto
    model: onnx.ModelProto
    how: str = "none"
    errors: Mapping[str, float | None] = field(default_factory=dict)
    samples: int = 0
    recovery: Recovery | None = None
    why: str | None = None
    impartial: bool = True
    gradient: Mapping[str, Any] | None = None
    tuned: Tuned | None = None

    @property
    def means(self) -> str:
        """By what means the layers have their weights: "none", a recovery, fine-tuning, or both."""
        tuned = ["finetune"] if self.tuned is not None and self.tuned.best else []
        return "+".join([how for how in (self.how,) if how != "none" or not tuned] + tuned)

    @property
    def error(self) -> float:
        """That of the model that is kept; infinite where it was not measured."""
        error = self.errors.get(self.how)
        return float("inf") if error is None else error

    def to_json(self, asked: str) -> dict[str, Any]:
        """The entry in the report."""
        made = self.recovery
        return {
            "asked": asked,
            "kept": self.how,
            "reason": self.why,
            "samples": self.samples,
            "held_out": self.impartial,
            "held_out_relative_l2": dict(self.errors),
            "layers": 0 if made is None or self.how == "none" else made.layers,
            "left": {} if made is None else dict(made.left),
            "tuned": None if self.gradient is None else dict(self.gradient),
        }


@dataclass(frozen=True, eq=False)
class Finisher:
    """Cuts and recovers by plan, as the options say. progress(stage, done, total): layers of a recovery, steps of a tuning."""

    imported: Imported
    settings: Options
    split: Split
    providers: list[str]
    progress: Callable[[str, int, int], None] | None = None

    def __call__(self, plan: Plan, *, recovers: bool = True, measure: bool = False) -> Finished:
        """measure: whether the error has to be known even where there is nothing to decide. Nothing is `tuned` yet."""
        cut = surgery(self.imported.groups, plan)
        samples, indices = self.split.calibration, self.split.learnt_from
        if samples is None or indices is None or plan.empty:
            return Finished(cut, cut)
        if not recovers or self.settings.recover == "none":
            return Finished(cut, cut, errors={"none": self._error(cut)} if measure else {})
        made = self._recovered(plan, cut, samples, indices)
        if isinstance(made, str):
            measure = measure or self.settings.recover == tuning.NAME
            return Finished(cut, cut, errors={"none": self._error(cut)} if measure else {}, why=made)
        how = self._how
        errors = {"none": self._error(cut), how: self._error(made.model)}
        finished = Finished(cut, made.model, how, errors, len(indices), made, impartial=self.split.impartial)
        if finished.error >= (float("inf") if errors["none"] is None else errors["none"]):
            self.imported.groups.net.scratch.drop(made.model, keep=(cut,))
            return replace(finished, model=cut, how="none", why="it would have moved held-out outputs further")
        return finished

    def tuned(self, finished: Finished) -> Finished:
        """The same with weights that were tuned together, if the options ask for it and it brings outputs nearer.

        Apart from the rest because of what it costs: only the plan that was chosen is tuned.
        """
        if self.settings.recover != tuning.NAME or not finished.errors:
            return finished
        found = tuning.tuned(self.imported, finished.model, self.split, self.settings, self.progress)
        if isinstance(found, str):
            return _without(finished, found)
        finished = replace(finished, gradient=tuning.told(found))
        if not found.best:
            return _without(finished, "no epoch brought held-out outputs nearer")
        error = self._error(found.model)
        errors = {**finished.errors, tuning.NAME: error}
        scratch = self.imported.groups.net.scratch
        if error is None or error >= finished.error:
            scratch.drop(found.model, keep=(finished.cut, finished.model))
            return _without(replace(finished, errors=errors), "it would have moved held-out outputs further")
        scratch.drop(finished.model, keep=(finished.cut, found.model))
        count = finished.samples or found.samples
        return replace(finished, model=found.model, how=tuning.NAME, errors=errors, samples=count, why=None)

    @property
    def _how(self) -> How:
        asked = self.settings.recover
        return "lsq" if asked in ("auto", tuning.NAME) else asked  # type: ignore[return-value]  # `Options` knows the names

    def _recovered(self, plan: Plan, cut: onnx.ModelProto, samples: Samples, indices: Index) -> Recovery | str:
        """The recovery, or why there is none: a model that cannot be run in pieces is still one that can be cut."""
        try:
            return recover(
                self.imported.groups,
                plan,
                cut,
                batches(self.imported.groups, samples, indices, self.settings.batch),
                how=self._how,
                seed=self.settings.seed,
                providers=self.providers,
                progress=self._layers,
            )
        except ModelError as error:
            if self.settings.recover not in ("auto", tuning.NAME):
                hint = error.hint or "--recover auto goes on without recovery"
                raise ModelError(f"--recover {self.settings.recover} does not work here: {error.message}", hint=hint) from None
            return error.message

    def _layers(self, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress("recover", done, total)

    def _error(self, model: onnx.ModelProto) -> float | None:
        assert self.split.calibration is not None
        source, indices = self.split.calibration, self.split.choice_indices
        return compare(self.imported.model, model, source, indices, self.providers).relative_l2

    def drop(self, finished: Finished) -> None:
        """Deletes the temporary files of what is not kept."""
        self.imported.groups.net.scratch.drop(finished.cut, finished.model)


def _without(finished: Finished, why: str) -> Finished:
    """What least squares made, with the reason why no tuning followed."""
    return replace(finished, why="; ".join([*([finished.why] if finished.why else []), f"not tuned: {why}"]))


def batches(groups: Groups, samples: Samples, indices: Index, wanted: int | None) -> Iterator[Mapping[str, Array]]:
    """Samples in batches as the model takes them, so small that the outputs of all layers fit in memory."""
    size = batch_size(groups, [layer.out.tensor for layer in groups.layers], wanted, share=2)
    for part in np.array_split(indices, -(-len(indices) // size)):
        yield samples.batch(fill(part, size, groups))
