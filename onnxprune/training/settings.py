"""Everything that a fine-tuning can be told."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from onnxprune.errors import OptionError

OPTIMISERS = ("muon", "adamw", "sgd")
AUGMENTATIONS = ("auto", "none", "shift", "flip+shift")
PRECISIONS = ("auto", "float32", "bfloat16")
STATISTICS = ("frozen", "batch")
LABELS = 0.3  # share of the loss that true classes have where they are to be used
CHECKPOINT = ".checkpoint"  # is added to the name of the file that is to be made


@dataclass(frozen=True)
class Training:
    """How weights are trained; the defaults are argued in docs/finetune.md. Raises OptionError for nonsense.

    epochs: passes over the samples. batch: samples a step. optimiser: see OPTIMISERS. rate: the highest learning rate; None:
    `RATES`. decay: of weights of at least two axes. warm_up: share of all steps in which the rate rises. clip: of the norm
    of all gradients. temperature: at which class scores are compared. features: weight of intermediate tensors in
    the loss. labels: share of the loss that true classes have, where there are any. augment: of images; `auto` mirrors and
    shifts pictures that come from files. mix: adds to every sample up to half of another one, and asks the teacher about
    that; only where all inputs are floating-point, and without labels. batch_norm: `frozen` statistics or those of the
    `batch`. patience: epochs without an improvement on held-out samples after which it ends; None: never. judge: by which
    measure epochs are compared there. device: None is CUDA where there is any.
    """

    epochs: int = 10
    batch: int = 128
    optimiser: Literal["muon", "adamw", "sgd"] = "muon"
    rate: float | None = None
    decay: float = 1e-4
    warm_up: float = 0.1
    clip: float = 5.0
    temperature: float = 4.0
    features: float = 0.0
    labels: float = 0.0
    augment: Literal["auto", "none", "shift", "flip+shift"] = "auto"
    mix: bool = False
    batch_norm: Literal["frozen", "batch"] = "frozen"
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    patience: int | None = None
    judge: Literal["agreement", "distance"] = "agreement"
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("optimiser", OPTIMISERS), ("augment", AUGMENTATIONS), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise OptionError(f"--{name} is one of {', '.join(known)}, not '{getattr(self, name)}'")
        if self.batch_norm not in STATISTICS:
            raise OptionError(f"--batch-norm is one of {', '.join(STATISTICS)}, not '{self.batch_norm}'")
        for name in ("epochs", "batch", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name} must be at least 1, not {value}")
        for name in ("rate", "clip", "temperature"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise OptionError(f"--{name} must be above 0, not {value}")
        if not 0 <= self.labels <= 1:
            raise OptionError(f"the share of the labels must lie between 0 and 1, not {self.labels}")
        if self.seed < 0:
            raise OptionError(f"--seed must not be negative, not {self.seed}")

    @property
    def highest_rate(self) -> float:
        return RATES[self.optimiser] if self.rate is None else self.rate

    def to_json(self) -> dict[str, Any]:
        """The settings as the report has them."""
        return {**asdict(self), "rate": self.highest_rate}


RATES = {"sgd": 5e-3, "adamw": 1e-3, "muon": 1e-3}
