"""`--recover tune`: after least squares all weights together, by gradient descent on the calibration samples alone.

The original's outputs are the aim, labels are not looked at. The recipe is argued in docs/recovery.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from onnxprune.channels import Index
from onnxprune.errors import DataError, ModelError
from onnxprune.imported import Imported
from onnxprune.options import Options
from onnxprune.splits import Split
from onnxprune.training.late import trainer
from onnxprune.training.settings import Training

if TYPE_CHECKING:
    from onnxprune.training.tune import Tuned

NAME = "tune"
PASSES = 40_960  # samples that are run in all: 80 epochs of 512
WORK = 2e12  # MACs of the original that these passes may come to, before epochs are saved
LEAST, MOST = 20, 200  # epochs
RECIPE = Training(batch=64, rate=5e-4, temperature=20.0, mix=True, judge="distance")

Progress = Callable[[str, int, int], None]


def require() -> None:
    """Raises OptionError, in one line, where PyTorch is not installed."""
    trainer("--recover tune")


def epochs_for(samples: int, macs: float) -> int:
    """How many epochs: as many as make PASSES, fewer where samples * MACs are many, LEAST to MOST."""
    passes = min(PASSES, WORK / max(1.0, macs))
    return int(np.clip(passes / max(1, samples), LEAST, MOST))


def tuned(
    imported: Imported, model: onnx.ModelProto, split: Split, settings: Options, tell: Progress | None = None
) -> Tuned | str:
    """The model with trained weights, or the reason why it cannot be trained.

    The samples that decide between methods also decide between epochs, and are not trained on.
    """
    assert split.calibration is not None and split.calibration_indices is not None
    held, rest = _apart(split)
    epochs, batch = epochs_for(len(rest), imported.size.macs), max(1, min(RECIPE.batch, len(rest) // 2))
    recipe = replace(RECIPE, epochs=epochs, batch=batch, seed=settings.seed)
    try:
        found: Tuned = trainer("--recover tune").tune(
            model,
            imported.model,
            split.calibration,
            rest,
            recipe,
            held=held,
            scratch=imported.groups.net.scratch,
            progress=None if tell is None else lambda stage, done, total: _told(tell, stage, done, total),
        )
    except (ModelError, DataError) as error:
        return error.message
    return found


def _told(tell: Progress, stage: str, done: int, total: int) -> None:
    if stage == "finetune":
        tell(NAME, done, total)


def _apart(split: Split) -> tuple[Index | None, Index]:
    """(samples that decide, or None where some of the others have to, samples to train on)."""
    assert split.learnt_from is not None
    return split.choice_indices if split.impartial else None, split.learnt_from


def told(found: Tuned) -> dict[str, Any]:
    """The entry in the report."""
    return {
        "epochs": found.epochs,
        "best": found.best,
        "samples": found.samples,
        "held_out": found.held,
        "held_out_relative_l2": [found.before.distance**0.5, found.after.distance**0.5],
        "weights": found.weights,
        "seconds": round(found.seconds, 3),
        "settings": found.settings.to_json(),
    }
