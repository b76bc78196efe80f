"""Which samples calibrate, which compare outputs, which feed the oracle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from onnxprune import theory
from onnxprune.channels import Index
from onnxprune.contraction import consumers
from onnxprune.data import Samples, choose
from onnxprune.elimination import NAME as OBS
from onnxprune.groups import Groups
from onnxprune.imported import Imported
from onnxprune.options import Options

VALIDATION_WORK = 1e12  # MACs that comparing the outputs may take, so that a big network is compared on fewer samples
VALIDATION_MOST = 2000
ORACLE_SAMPLES = 8
CHOICE = 64
SHARE = 5
LEARNING_MOST = 512  # samples that recovery and `obs` learn from, where there are so many
LEARNING_WORK = 6e11  # MACs that running the model on these may take, so that a big network learns from fewer


@dataclass(frozen=True)
class Origin:
    """Where the validation samples come from, so that somebody else can find them again.

    source: "data" (what calibration and choice leave of it), "held-out" (set apart by the source), "validation" (given as
    such), "calibration" (there were no others) or "none". start: which entry of `choose`'s order of all samples is the first.
    """

    source: Literal["data", "held-out", "validation", "calibration", "none"]
    start: int = 0


@dataclass(frozen=True, eq=False)
class Split:
    """Which samples calibrate, which decide between methods (of the calibration source), and which validate.

    Weights are learnt from `learnt_from`: of the samples that calibrate, those that do not decide as well, unless there are
    fewer than SHARE.
    """

    calibration: Samples | None
    calibration_indices: Index | None
    validation: Samples | None
    validation_indices: Index | None
    choice_indices: Index
    origin: Origin = Origin("none")

    @staticmethod
    def of(imported: Imported, samples: Samples | None, held_out: Samples | None, settings: Options) -> Split:
        """Held-out samples where the source has them, else those that calibration leaves, else the same ones again."""
        most = most_compared(imported)
        none = np.empty(0, np.int64)
        if samples is None:
            chosen = None if held_out is None else choose(len(held_out), most, settings.seed)
            return Split(None, None, held_out, chosen, none, Origin("none" if held_out is None else "validation"))
        order = choose(len(samples), None, settings.seed)
        other = held_out or samples.held_out
        count = calibration_samples(imported, settings, len(samples), compared=other is None)
        first, rest = order[:count], order[count:]
        apart = len(rest) >= (CHOICE if other is not None else 2 * CHOICE)  # else some of the calibration samples have to do
        decide, rest = (rest[:CHOICE], rest[CHOICE:]) if apart else (first[-_deciding(len(first)) :], rest)
        if other is not None:
            origin = Origin("held-out" if held_out is None else "validation")
            return Split(samples, first, other, choose(len(other), most, settings.seed), decide, origin)
        if not len(rest):
            return Split(samples, first, samples, first[:most], decide, Origin("calibration"))
        return Split(samples, first, samples, rest[:most], decide, Origin("data", len(order) - len(rest)))

    @property
    def count(self) -> int | None:
        """How many samples calibrate; None where there are none."""
        return None if self.calibration_indices is None else len(self.calibration_indices)

    @property
    def learnt_from(self) -> Index | None:
        """Which samples recovery learns from; None where there are none."""
        every = self.calibration_indices
        left = None if every is None else every[~np.isin(every, self.choice_indices)]
        return left if left is not None and len(left) else every

    @property
    def impartial(self) -> bool:
        """Whether no weight is learnt from the samples that decide."""
        return self.learnt_from is None or not np.isin(self.choice_indices, self.learnt_from).any()

    def oracle_feeds(self, imported: Imported) -> list[Mapping[str, Any]]:
        """A few real samples where there are any, else the input of the probe run."""
        source = self.calibration or self.validation
        indices = self.calibration_indices if self.calibration is not None else self.validation_indices
        if source is None or indices is None:
            return [imported.groups.net.feeds]
        fixed = next((s.shape[0] for s in imported.specs if s.shape and s.shape[0]), None)
        return [source.batch(np.resize(indices[:ORACLE_SAMPLES], fixed) if fixed else indices[:ORACLE_SAMPLES])]


def _deciding(count: int) -> int:
    """How many of few samples decide: one in SHARE, all where that is none."""
    return min(CHOICE, count // SHARE or count)


def most_compared(imported: Imported) -> int:
    """On how many samples outputs are compared: fewer of a big network."""
    return max(64, min(VALIDATION_MOST, int(VALIDATION_WORK / max(1, imported.size.macs))))


def calibration_samples(imported: Imported, settings: Options, total: int, *, compared: bool) -> int:
    """How many of `total` samples calibrate: `--samples`, else what the theory asks for, or more where weights are learnt.

    Sensitivities need few samples, recovery and `obs` gain from more: LEARNING_MOST, fewer of a big network. compared says that
    outputs are compared on the rest, which then keeps half of them.
    """
    if settings.samples:
        return settings.samples
    enough = enough_samples(imported.groups, settings.delta)
    if settings.recover == "none" and settings.method not in ("auto", OBS):
        return enough
    wanted = min(LEARNING_MOST, int(LEARNING_WORK / max(1, imported.size.macs)))
    left = total - CHOICE
    return max(enough, min(wanted, left // 2 if compared else left))


def enough_samples(groups: Groups, delta: float) -> int:
    """How many samples the theory asks for; a few hundred at most (`theory.calibration_samples`)."""
    outputs = [groups.outputs(layer) for layer in consumers(groups)] or [1]
    return theory.calibration_samples(sum(outputs), max(outputs), delta)
