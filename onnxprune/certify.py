"""The certificate of a pruning: its four parts, put together from what the passes found and from held-out samples."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from onnxprune import wire
from onnxprune.certificate import layers, network
from onnxprune.certificate.population import GRID, Observed, population
from onnxprune.certificate.words import CALIBRATION, NETWORK, POPULATION, PROPERTY, SAMPLING, VERSION, absent, present
from onnxprune.channels import Index
from onnxprune.data import Samples, choose
from onnxprune.decide import Decision
from onnxprune.imported import Imported
from onnxprune.options import Options
from onnxprune.passes.validate import Validation, compare
from onnxprune.saliency import Saliency
from onnxprune.splits import Split, most_compared

REUSED = {
    "calibration": "every sample was needed to calibrate, so that none is held out: give more, or --certify DATA",
    "none": "no sample data: give --data, or --certify DATA",
}
ELSEWHERE = "the calibration was made elsewhere, and may have used these samples too: give others with --certify DATA"
NAMED = 4  # samples by whose digest a source of data is known again


@dataclass(frozen=True, eq=False)
class Held:
    """Samples that were used for nothing, with what finds them again."""

    samples: Samples
    indices: Index
    source: str
    start: int = 0

    def told(self, count: int, digest: str = "") -> dict[str, Any]:
        """How the certificate names the first `count` of them. digest: theirs, where somebody has it already."""
        where = {"source": self.source, "start": self.start, "samples": count}
        return where | {"data": digest or self.samples.digest(self.indices[:count])}


def held_out(
    imported: Imported, split: Split, certify: Samples | None, saliency: Saliency, settings: Options, measured: bool
) -> Held | str:
    """The samples of the part `population`, or why there are none. measured: whether the calibration was made in this run."""
    if certify is not None:
        return Held(certify, choose(len(certify), most_compared(imported), settings.seed), "certify")
    source = split.origin.source
    if split.validation is None or split.validation_indices is None or source in REUSED:
        return REUSED.get(source, REUSED["none"])
    if source == "data" and not measured and saliency.data and not _same_samples(split, saliency):
        return ELSEWHERE
    return Held(split.validation, split.validation_indices, source, split.origin.start)


def _same_samples(split: Split, saliency: Saliency) -> bool:
    """Whether a calibration that was handed over saw exactly the samples that this run sets aside for calibrating."""
    assert split.calibration is not None and split.calibration_indices is not None
    seen = split.calibration_indices
    return saliency.samples == len(seen) and saliency.data == (split.calibration.digest(seen),)


def certificate(
    imported: Imported,
    split: Split,
    held: Held | str,
    saliency: Saliency,
    decision: Decision,
    settings: Options,
    models: tuple[onnx.ModelProto, onnx.ModelProto],
    found: Validation,
    providers: list[str],
    measured: bool = True,
    drop: Mapping[str, Any] | None = None,
    candidates: int = 1,
) -> dict[str, Any] | None:
    """The certificate, JSON-ready; None where nothing could be said: no sensitivities and no samples.

    models: (pruned, masked). found: the validation, which ran on the samples of `held` unless these are --certify's.
    measured: whether the calibration was made in this run. drop: what --max-drop found on the samples of
    `held`, which then have chosen the network. candidates: among how many networks they will be used to choose.
    """
    groups, plan = imported.groups, decision.plan
    if saliency.criterion != "pfp" and split.validation is None and isinstance(held, str):
        return None
    seen = _observed(imported, held, models[0], found, providers)
    if isinstance(held, str):
        people = absent(POPULATION, held)
    else:
        people = population(seen, settings.delta, candidates if drop is None else len(GRID))
        if people["applies"]:
            people |= held.told(seen.samples, seen.data) | ({} if drop is None else {"max_drop": dict(drop)})
    return {
        "onnxprune_certificate": VERSION,
        "method": decision.method,
        "seed": settings.seed,
        "options": {
            "freeze": list(settings.freeze),
            "shape": list(settings.shape),
            "approximate": settings.allow_approximate,
            "attention": settings.attention,
        },
        "data": None if split.calibration is None else name_of(split.calibration),
        "digests": {"original": groups.net.digest, "pruned": wire.digest(without(models[0]))},
        "plan": json.loads(plan.to_json())["groups"],
        "recover": decision.finished.means,
        **_bounds(imported, split, saliency, decision, settings, models, measured),
        "population": people,
    }


def _bounds(
    imported: Imported,
    split: Split,
    saliency: Saliency,
    decision: Decision,
    settings: Options,
    models: tuple[onnx.ModelProto, onnx.ModelProto],
    measured: bool,
) -> dict[str, Any]:
    """The parts that follow from the weights; they say nothing of weights that recovery has changed."""
    if (means := decision.finished.means) != "none":
        return silent(means)
    groups = imported.groups
    return {
        "sampling": layers.sampling(groups, decision.shares, saliency, settings.delta),
        "calibration": layers.calibration(groups, decision.plan, saliency, measured),
        "network": _network(imported, split, decision, models),
    }


def silent(means: str) -> dict[str, Any]:
    """The parts that follow from the weights, of a model whose weights come by other means than a cut."""
    by = {"finetune": "fine-tuning"}.get(means, f"--recover {means.removesuffix('+finetune')}")
    by += " and fine-tuning" if means.endswith("+finetune") else ""
    why = f"{by} gave the layers new weights, which only held-out samples can judge"
    return {"sampling": absent(SAMPLING, why), "calibration": absent(CALIBRATION, why), "network": absent(NETWORK, why)}


def name_of(samples: Samples) -> dict[str, Any]:
    """What tells whether other data are these, whatever was chosen of them."""
    return {"samples": len(samples), "first": samples.digest(np.arange(min(NAMED, len(samples))))}


def _observed(
    imported: Imported, held: Held | str, pruned: onnx.ModelProto, found: Validation, providers: list[str]
) -> Observed:
    if isinstance(held, str) or held.source != "certify":
        return found.observed
    return compare(imported.model, pruned, held.samples, held.indices, providers).observed


def _network(
    imported: Imported, split: Split, decision: Decision, models: tuple[onnx.ModelProto, onnx.ModelProto]
) -> dict[str, Any]:
    groups = imported.groups
    exact = all(groups.by_id[name].exact for name in decision.plan.groups)
    if (reason := network.obstacle(groups.net, exact)) is not None:
        return absent(NETWORK, reason)
    if split.validation is None or split.validation_indices is None:
        return absent(NETWORK, REUSED["none"])
    chosen = split.validation_indices[: network.affordable(imported.size.macs)]
    held = Held(split.validation, chosen, split.origin.source, split.origin.start)
    found = network.outputs(groups.net, models[1], models[0], feeds(imported, split.validation, chosen))
    known = [e for e in found.values() if "absent" not in e]
    if not known:
        return absent(NETWORK, "; ".join(dict.fromkeys(e["absent"] for e in found.values())))
    return present(NETWORK, all(e["vacuous"] for e in known), **held.told(len(chosen)), outputs=found)


def feeds(imported: Imported, samples: Samples, chosen: Index) -> list[Mapping[str, Any]]:
    """The samples in batches as the model takes them; a prescribed batch that is not full repeats its samples."""
    fixed = next((s.shape[0] for s in imported.specs if s.shape and s.shape[0]), None)
    if not fixed:
        return [samples.batch(chosen)]
    return [samples.batch(np.resize(chosen[i : i + fixed], fixed)) for i in range(0, len(chosen), fixed)]


def attach(model: onnx.ModelProto, told: Mapping[str, Any] | None) -> onnx.ModelProto:
    """The model with the certificate in its metadata, in place of an older one; the same model where there is none."""
    if told is None or not told["plan"]:  # nothing was cut: the file stays as it was
        return model
    copy = without(model)
    if copy is model:
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
    copy.metadata_props.add(key=PROPERTY, value=json.dumps(told, separators=(",", ":"), sort_keys=True))
    return copy


def without(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without a certificate in its metadata; the same model where there is none."""
    kept = [p for p in model.metadata_props if p.key != PROPERTY]
    if len(kept) == len(model.metadata_props):
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.metadata_props[:]
    copy.metadata_props.extend(kept)
    return copy


def attached(model: onnx.ModelProto) -> str | None:
    """The text of the certificate in a model's metadata."""
    return next((p.value for p in model.metadata_props if p.key == PROPERTY), None)
