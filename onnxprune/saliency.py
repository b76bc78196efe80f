"""What calibration finds: a score for every channel of every group, consumer by consumer. Saves, loads, merges."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from onnxprune.channels import ChannelGroup
from onnxprune.errors import DataError
from onnxprune.files import whole_file

Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class LayerScore:
    """Scores of one group's channels as one consumer sees them.

    values: [group size]; for PFP the empirical sensitivities in [0, 1]. events: how many scalar outputs, over sign parts,
    the scores are maxima over, for one sample (the E of the sampling theorem); 0 where the notion does not apply.
    """

    layer: str
    group: str
    values: Scores
    events: int = 0


@dataclass(frozen=True, eq=False)
class Saliency:
    """Scores of a model's channels under one criterion.

    combine: how scores of two shards of data become one: "max" (sensitivities) or "mean" (weighted by `samples`); "order"
    where they do not, because each score depends on which channels went before.
    data: digests of the shards of data that went in, in the order in which they were merged.
    """

    criterion: str
    combine: Literal["max", "mean", "order"]
    samples: int
    layers: tuple[LayerScore, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    model_digest: str = ""
    data: tuple[str, ...] = ()

    @cached_property
    def by_group(self) -> dict[str, list[LayerScore]]:
        """The scores of each group, consumer by consumer."""
        found: dict[str, list[LayerScore]] = {}
        for score in self.layers:
            found.setdefault(score.group, []).append(score)
        return found

    @cached_property
    def by_layer(self) -> dict[str, dict[str, Scores]]:
        """The scores of each group as each layer sees it."""
        found: dict[str, dict[str, Scores]] = {}
        for score in self.layers:
            found.setdefault(score.layer, {})[score.group] = score.values
        return found

    def of(self, group: ChannelGroup) -> Scores:
        """Score of every channel of a group: the largest over its consumers; zeros where it has none."""
        found = [x.values for x in self.by_group.get(group.id, [])]
        return np.max(found, axis=0) if found else np.zeros(group.size)

    def events(self, group: ChannelGroup) -> int:
        """Events of one sample that the sensitivities of this group are shares of, over all consumers; at least 1."""
        return max(1, sum(x.events for x in self.by_group.get(group.id, [])))

    def merged(self, other: Saliency) -> Saliency:
        """The scores of both shards together. Raises DataError when they are of different models or criteria."""
        for name in ("criterion", "combine", "model_digest", "options"):
            if getattr(self, name) != getattr(other, name):
                raise DataError(f"the calibrations differ in {name.replace('_', ' ')}", hint="merge shards of one calibration")
        if self.combine == "order":
            raise DataError(f"calibrations by {self.criterion} do not merge", hint="calibrate on all of the data at once")
        mine, theirs = ({(x.layer, x.group): x for x in s.layers} for s in (self, other))
        if mine.keys() != theirs.keys():
            raise DataError("the calibrations are of different layers", hint="merge shards of one calibration")
        layers = tuple(
            LayerScore(x.layer, x.group, self._combined(x.values, theirs[k].values, other), max(x.events, theirs[k].events))
            for k, x in mine.items()
        )
        total = self.samples + other.samples
        return Saliency(self.criterion, self.combine, total, layers, self.options, self.model_digest, (*self.data, *other.data))

    def _combined(self, a: Scores, b: Scores, other: Saliency) -> Scores:
        if self.combine == "max":
            return np.maximum(a, b)
        total = self.samples + other.samples
        return (a * self.samples + b * other.samples) / total if total else a  # without data: from the weights alone

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one npz file, whole or not at all."""
        header = {
            "onnxprune_calibration": 1,
            "criterion": self.criterion,
            "combine": self.combine,
            "samples": self.samples,
            "options": dict(self.options),
            "model_digest": self.model_digest,
            "data": list(self.data),
            "layers": [[x.layer, x.group, x.events] for x in self.layers],
        }
        arrays = {f"scores_{i}": x.values for i, x in enumerate(self.layers)}
        with whole_file(Path(path)) as temporary, temporary.open("wb") as out:
            np.savez(out, header=np.array(json.dumps(header)), **arrays)  # type: ignore[arg-type]

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Saliency:
        """Raises DataError when the file is not a calibration."""
        try:
            with np.load(path, allow_pickle=False) as archive:
                header = json.loads(str(archive["header"]))
                layers = tuple(
                    LayerScore(str(layer), str(group), np.asarray(archive[f"scores_{i}"], np.float64), int(events))
                    for i, (layer, group, events) in enumerate(header["layers"])
                )
            return Saliency(
                header["criterion"],
                header["combine"],
                int(header["samples"]),
                layers,
                header["options"],
                header["model_digest"],
                tuple(header["data"]),
            )
        except FileNotFoundError:
            raise DataError(f"no such calibration file: {path}") from None
        except Exception:  # damaged zip and npy files raise a dozen unrelated types
            raise DataError(f"{path} is not a calibration file", hint="make one with `onnxprune calibrate`") from None
