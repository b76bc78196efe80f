"""Fine-tuning around the training itself: which samples it may see, what stays true of the file, what is reported."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

import onnxprune
from onnxprune import certify as certifying
from onnxprune import files, large, runtime, weights, wire
from onnxprune.budget import Budget
from onnxprune.certificate.population import population
from onnxprune.certificate.words import POPULATION, absent
from onnxprune.channels import Index
from onnxprune.checker.check import Sources
from onnxprune.data import Samples, choose, open_data
from onnxprune.errors import BudgetError, DataError, ModelError, ValidationError
from onnxprune.finish import Finished
from onnxprune.graph import graph_inputs
from onnxprune.imported import Imported
from onnxprune.options import Options
from onnxprune.pairs import load_as, oracle_pair
from onnxprune.passes.surgery import surgery
from onnxprune.passes.validate import Validation, compare, validate
from onnxprune.plan import Plan
from onnxprune.report import build
from onnxprune.result import Result
from onnxprune.splits import VALIDATION_MOST, Split
from onnxprune.training.late import trainer
from onnxprune.training.settings import Training

if TYPE_CHECKING:
    from onnxprune.training.trainer import Epoch
    from onnxprune.training.tune import Tuned

Progress = Callable[[str, int, int], None]
Said = Callable[["Epoch"], None]
APART = 10  # a tenth of the samples is compared on, where nothing else is given
MAYBE = "the samples that outputs are compared on may have served to prune the model: give others with --certify DATA"
CHOSEN = "the held-out samples have chosen the pruned network (--max-drop): give others with --certify DATA"


# ------------------------------------------------------------------------------------------------------ while pruning


def require_trainable(budget: Budget, data: Any) -> None:
    """Raises BudgetError for budgets that are promises about weights which training would change, DataError without data."""
    if budget.kind in ("eps", "max-drop"):
        raise BudgetError(
            f"--{budget.kind} promises something of the network that it finds, and --finetune would change its weights",
            hint="leave --finetune out, and use `onnxprune finetune` on the result",
        )
    if data is None:
        raise DataError("--finetune needs samples to train on", hint="give --data")
    trainer()


def tuned(
    imported: Imported, finished: Finished, settings: Options, split: Split, tell: Progress, said: Said | None
) -> Finished:
    """The pruned model with trained weights; the samples that outputs are compared on are not trained on."""
    assert settings.finetune is not None and split.calibration is not None
    found: Tuned = trainer().tune(
        finished.model,
        imported.model,
        split.calibration,
        _without(len(split.calibration), _compared(split)),
        settings.finetune,
        scratch=imported.groups.net.scratch,
        progress=tell,
        said=said,
    )
    return replace(finished, model=found.model, tuned=found)


def _compared(split: Split) -> Index:
    return split.validation_indices if split.origin.source == "data" and split.validation_indices is not None else NONE


NONE: Index = np.empty(0, np.int64)


def _without(count: int, some: Index) -> Index:
    """The numbers below `count` that are not among `some`."""
    return np.setdiff1d(np.arange(count, dtype=np.int64), some)


# -------------------------------------------------------------------------------------------------- of a pair of files


def finetune(
    pruned: str | os.PathLike[str],
    teacher: str | os.PathLike[str],
    data: Any,
    *,
    training: Training | None = None,
    validation: Any = None,
    certify: Any = None,
    report: Mapping[str, Any] | None = None,
    checkpoint: Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    said: Said | None = None,
    **options: Any,
) -> Result:
    """Trains the weights of a pruned file so that its outputs become the original's (the teacher's); the graph stays.

    data: samples to train on, labels are not needed. validation, certify: as in `prune`. report: that of the
    pruning, which is carried on. checkpoint: where to keep what a training can go on from; resume: go on. options: those
    of `Options` that are about data and runtime.
    Raises ModelError where the graph has operators that cannot be trained through, and OnnxPruneError's other children.
    """
    job = _Pair.of(pruned, teacher, report, Options(**options))
    specs = job.imported.specs
    samples, *others = (None if d is None else open_data(d, specs, job.settings.images) for d in (data, validation, certify))
    if samples is None:
        raise DataError("fine-tuning needs samples to train on", hint="give --data")
    held = job.held_out(samples, *others)
    found: Tuned = trainer().tune(
        job.model,
        job.imported.model,
        samples,
        _without(len(samples), held.indices if held.samples is samples else NONE),
        training or Training(seed=job.settings.seed),
        scratch=job.imported.groups.net.scratch,
        progress=progress,
        said=said,
        kept=checkpoint,
        resume=resume,
    )
    return job.result(found, samples, held)


@dataclass(frozen=True, eq=False)
class _Pair:
    """The two files of a pruning, with what is known of it. told: its certificate; why: why there is none that is true."""

    path: Path
    imported: Imported
    model: onnx.ModelProto
    report: Mapping[str, Any] | None
    told: dict[str, Any] | None
    why: str
    settings: Options
    external: bool
    scratch: weights.Scratch

    @staticmethod
    def of(
        pruned: str | os.PathLike[str], teacher: str | os.PathLike[str], report: Mapping[str, Any] | None, settings: Options
    ) -> _Pair:
        scratch = weights.Scratch()
        model = large.lean(files.load(pruned), scratch)
        text = certifying.attached(model)
        then = _options_of(text)
        settings = replace(settings, **{k: v for k, v in then.items() if v})
        imported = load_as(teacher, None, settings)
        bare = certifying.without(model)
        _require_same_inputs(model, imported.model)
        digests = {"original": imported.groups.net.digest, "pruned": wire.digest(bare)}
        told, why = _true(text, digests)
        if report is not None and report.get("digests") != digests:
            report = None
        external = bool(files.external_files(pruned))
        return _Pair(Path(pruned), imported, bare, report, told, why, settings, external, scratch)

    @property
    def seed(self) -> int:
        return self.settings.seed if self.told is None else int(self.told["seed"])

    def held_out(self, samples: Samples, validation: Samples | None, certify: Samples | None) -> certifying.Held:
        """Samples to compare on, which are not trained on: those of the certificate, others that are given, or a tenth."""
        given = {"data": samples, "validation": validation, "certify": certify}
        if self.told is not None and self.told["population"]["applies"]:
            part = self.told["population"]
            try:
                found = Sources({k: v for k, v in given.items() if v is not None}).find(part, self.seed)
            except ValidationError:  # the certificate is of other samples
                found = None
            if found is not None:
                return certifying.Held(*found, part["source"], part["start"])
        other = next(((s, n) for s, n in ((certify, "certify"), (validation, "validation")) if s is not None), None)
        if other is None and samples.held_out is not None:
            other = samples.held_out, "held-out"
        if other is not None:
            return certifying.Held(other[0], choose(len(other[0]), VALIDATION_MOST, self.seed), other[1])
        count = min(VALIDATION_MOST, len(samples) // APART)
        return certifying.Held(samples, choose(len(samples), None, self.seed)[:count], "data")

    # ---------------------------------------------------------------------------------------------------- afterwards

    def result(self, found: Tuned, samples: Samples, held: certifying.Held) -> Result:
        """What is handed over; where nothing was gained, the model as it was."""
        compared = len(held.indices) > 0
        chosen = (held.samples, held.indices) if compared else (None, None)
        plan = self._plan()
        exact = masked = None
        if plan is not None:
            exact, masked = oracle_pair(self.imported, plan)
            exact = surgery(self.imported.groups, plan) if exact is None else exact
        feeds = [samples.batch(np.arange(self._batch()))]
        checked = validate(self.imported.model, found.model, masked, feeds, *chosen, exact=exact, recovered=plan is not None)
        before = compare(self.imported.model, self.model, held.samples, held.indices, None) if compared else None
        told = self._certificate(found, samples, held, checked)
        report = self._report(found, checked, told)
        report["finetune"] |= {
            "held_out_before": None if before is None else _measured(before.agreement, before.relative_l2, before.top1)
        }
        model = certifying.attach(found.model, told)
        scratches = (*self.imported.scratches, self.scratch)
        return Result(model, plan or Plan({}), report, told, self.external, (self.path, *self.imported.sources), scratches)

    def _batch(self) -> int:
        return next((s.shape[0] for s in self.imported.specs if s.shape and s.shape[0]), 1)

    def _plan(self) -> Plan | None:
        if self.report is not None and "groups" in self.report:
            return build.plan_of(self.report)
        return None if self.told is None else Plan.from_json(json.dumps({"groups": self.told["plan"]}))

    def _certificate(self, found: Tuned, samples: Samples, held: certifying.Held, checked: Validation) -> dict[str, Any] | None:
        """The one that is true of the new weights: of the four parts only that of held-out samples is left."""
        if self.told is None or not found.best:
            return self.told
        means = _means(self.told["recover"])
        then = self.told["population"]
        if held.source == "data" and (not then["applies"] or then["source"] != "data"):
            people = absent(POPULATION, MAYBE)
        elif "max_drop" in then and held.source == then["source"]:
            people = absent(POPULATION, CHOSEN)
        else:
            people = population(checked.observed, then.get("delta", self.settings.delta))
        if people["applies"]:
            people |= held.told(checked.observed.samples, checked.observed.data)
        digests = self.told["digests"] | {"pruned": wire.digest(found.model)}
        named = {"data": certifying.name_of(samples), "recover": means, "digests": digests}
        return {**self.told, **named, **certifying.silent(means), "population": people}

    def _report(self, found: Tuned, checked: Validation, told: Mapping[str, Any] | None) -> dict[str, Any]:
        report = copy.deepcopy(dict(self.report)) if self.report is not None else self._bare_report()
        report["pruned"] = {**report["pruned"], "bytes": wire.size(found.model)}
        report["digests"] = {**report["digests"], "pruned": wire.digest(found.model)}
        if found.best:
            report["recover"] = _means(report["recover"])
        report["certificate"] = told
        report["finetune"] = {**found.to_json(), "certificate": self.why or None}
        report["validation"] = checked.to_json()
        report["seconds"] = {**report["seconds"], "finetune": round(found.seconds, 4)}
        return report

    def _bare_report(self) -> dict[str, Any]:
        """What can be said of a file whose pruning is not known."""
        return {
            "onnxprune": onnxprune.__version__,
            "model": Path(self.imported.path).name,
            "seed": self.settings.seed,
            "recover": "none" if self.told is None else self.told["recover"],
            "original": {"bytes": self.imported.size.bytes},
            "pruned": {},
            "digests": {"original": self.imported.groups.net.digest},
            "seconds": {},
        }


def _require_same_inputs(pruned: onnx.ModelProto, teacher: onnx.ModelProto) -> None:
    """Raises ModelError where one model cannot take what the other takes."""
    ours, theirs = ({v.name: runtime.input_shape(v) for v in graph_inputs(m)} for m in (pruned, teacher))
    alike = list(ours) == list(theirs) and all(
        len(ours[k]) == len(theirs[k]) and all(None in (a, b) or a == b for a, b in zip(ours[k], theirs[k], strict=True))
        for k in ours
    )
    if not alike:
        words = [", ".join(f"{k} {list(v)}".replace("None", "?") for k, v in e.items()) for e in (ours, theirs)]
        hint = "--teacher is the model that was pruned"
        raise ModelError(f"the pruned model has inputs {words[0]}, the teacher {words[1]}", hint=hint)


def _measured(agreement: float | None, distance: float | None, top1: tuple[float, float] | None) -> dict[str, Any]:
    return {"agreement": agreement, "relative_l2": distance, "top1": None if top1 is None else list(top1)}


def _means(before: str) -> str:
    """What is to be called the way of weights that were trained on top of another."""
    if before.endswith("finetune"):
        return before
    return "finetune" if before == "none" else f"{before}+finetune"


def _options_of(text: str | None) -> dict[str, Any]:
    """How the original was looked at when it was pruned, so that the plan's groups are found again."""
    try:
        then = json.loads(text or "{}")["options"]
        return {
            "freeze": tuple(then["freeze"]),
            "shape": tuple(then["shape"]),
            "allow_approximate": bool(then["approximate"]),
            "attention": then["attention"],
        }
    except (ValueError, KeyError, TypeError):
        return {}


def _true(text: str | None, digests: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """(the certificate in the pruned file, or None and why it cannot be carried on)."""
    if text is None:
        return None, "the pruned file has none"
    try:
        told = json.loads(text)
        same = all(told["digests"][k] == v for k, v in digests.items())
        whole = isinstance(told["plan"], dict) and isinstance(told["population"]["applies"], bool) and int(told["seed"]) >= 0
    except (ValueError, KeyError, TypeError):
        return None, "that in the pruned file is not as onnxprune writes them"
    return (told, "") if same and whole else (None, "that in the pruned file is of other models, or of other weights")
