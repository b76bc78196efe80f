"""Everything that a pruning can be told beside the model, the data and the budget."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from onnxprune.criteria.base import Mode, Reduce
from onnxprune.criteria.plain import PLAIN
from onnxprune.data import ImageOptions
from onnxprune.elimination import NAME as OBS
from onnxprune.errors import OptionError
from onnxprune.recovery.solver import WAYS
from onnxprune.training.settings import Training

RECOVERIES = ("auto", "none", *WAYS, "linear", "tune")


def methods() -> tuple[str, ...]:
    """What `--method` may be, criteria of plug-ins included."""
    return ("auto", "pfp", "pfp-random", "pfp-deterministic", OBS, *PLAIN)


@dataclass(frozen=True)
class Options:
    """Everything `prune` can be told beside the model, the data and the budget. Raises OptionError for nonsense.

    method: see `methods`; `auto` is the best of pfp, pfp-deterministic and obs on held-out samples. recover: see
    `passes.recover`; `auto` is `lsq` where that is better than `none`. align: kept channels are multiples of it, by default of
    what `target` asks for (see `targets`). min_channels: no group becomes narrower. freeze: globs on layer and tensor names.
    samples: calibration samples, by default see `splits.calibration_samples`. delta: failure probability of the certificate.
    confidence: that the drop of a budget of that kind is kept. reduce, sensitivity: see `Sensitivity`.
    allow_approximate: cut also channels that a normalisation reckons with, which is not exact. shape: NAME=1,3,224,224 for
    inputs whose size the model leaves open. threads, latency_batch: how a budget of latency is measured; by default with
    the threads of all sessions, on one sample. attention: cut whole `heads`, or the same places of every head (`dims`),
    where both can go; by default what leaves more channels to choose from. finetune: how to train the weights after
    recovery; by default not at all.
    """

    method: str = "auto"
    recover: str = "auto"
    align: int | None = None
    target: str = "generic"
    min_channels: int = 1
    freeze: tuple[str, ...] = ()
    allow_approximate: bool = False
    shape: tuple[str, ...] = ()
    attention: Literal["heads", "dims"] | None = None
    samples: int | None = None
    batch: int | None = None
    providers: tuple[str, ...] = ("cpu",)
    threads: int | None = None
    latency_batch: int | None = None
    seed: int = 0
    delta: float = 0.01
    confidence: float = 0.95
    reduce: Reduce = "sum"
    sensitivity: Mode = "exact"
    images: ImageOptions = field(default_factory=ImageOptions)
    finetune: Training | None = None

    def __post_init__(self) -> None:
        if self.method not in methods():
            raise OptionError(f"unknown method '{self.method}'", hint=f"it is one of {', '.join(methods())}")
        if self.recover not in RECOVERIES:
            raise OptionError(f"unknown recovery '{self.recover}'", hint=f"it is one of {', '.join(RECOVERIES)}")
        if self.attention not in (None, "heads", "dims"):
            raise OptionError(f"--attention is heads or dims, not '{self.attention}'")
        for name in ("align", "min_channels", "samples", "batch", "threads", "latency_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"--{name.replace('_', '-')} must be at least 1, not {value}")
        if self.reduce not in ("sum", "max"):
            raise OptionError(f"--reduce is sum or max, not {self.reduce}")
        if self.sensitivity not in ("exact", "bound"):
            raise OptionError(f"--sensitivity is exact or bound, not {self.sensitivity}")
        if not 0 < self.delta < 1:
            raise OptionError(f"--delta must lie between 0 and 1, not {self.delta}")
        if not 0 < self.confidence < 1:
            raise OptionError(f"--confidence must lie between 0 and 1, not {self.confidence}", hint="0.95, for example")
        if self.seed < 0:
            raise OptionError(f"--seed must not be negative, not {self.seed}")

    def to_json(self) -> dict[str, Any]:
        """All options by name, for the report; lists for tuples, as JSON has it."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in _flat(asdict(self)).items()}


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """The options about images beside the others, by the names that the command line gives them."""
    return {**{k: v for k, v in options.items() if k != "images"}, **options["images"]}
