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

    Nothing is learnt from those that decide, unless there are fewer than SHARE samples.
    """

    calibration: Samples | None
    calibration_indices: Index | None
    validation: Samples | None
    validation_indices: Index | None
    choice_indices: Index
    origin: Origin = Origin("none")
    set_aside: Index | None = None  # what calibrates, and of few samples those of them that decide

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
        if len(rest) >= (CHOICE if other is not None else 2 * CHOICE):
            learn, decide, rest = first, rest[:CHOICE], rest[CHOICE:]
        else:
            learn, decide = _decided_within(first, settings)
        if other is not None:
            origin = Origin("held-out" if held_out is None else "validation")
            return Split(samples, learn, other, choose(len(other), most, settings.seed), decide, origin, first)
        if not len(rest):
            return Split(samples, learn, samples, first[:most], decide, Origin("calibration"), first)
        return Split(samples, learn, samples, rest[:most], decide, Origin("data", len(order) - len(rest)), first)

    @property
    def count(self) -> int | None:
        """How many samples are set aside; None where there are none."""
        return None if self.set_aside is None else len(self.set_aside)

    @property
    def impartial(self) -> bool:
        """Whether nothing is learnt from the samples that decide."""
        return self.calibration_indices is None or not np.isin(self.choice_indices, self.calibration_indices).any()

    def oracle_feeds(self, imported: Imported) -> list[Mapping[str, Any]]:
        """A few real samples where there are any, else the input of the probe run."""
        source = self.calibration or self.validation
        indices = self.calibration_indices if self.calibration is not None else self.validation_indices
        if source is None or indices is None:
            return [imported.groups.net.feeds]
        fixed = next((s.shape[0] for s in imported.specs if s.shape and s.shape[0]), None)
        return [source.batch(np.resize(indices[:ORACLE_SAMPLES], fixed) if fixed else indices[:ORACLE_SAMPLES])]


def _decided_within(first: Index, settings: Options) -> tuple[Index, Index]:
    """(those of few samples that calibrate, those that decide): one in SHARE decides, where there is anything to decide."""
    decides = settings.recover != "none" or settings.method == "auto"
    count = min(CHOICE, len(first) // SHARE) if decides else 0
    return (first[:-count], first[-count:]) if count else (first, first[-CHOICE:])


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
