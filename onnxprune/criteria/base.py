"""The protocol of a criterion: what it needs to see and what it says about a group's channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias

from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.rules import Layer
from onnxprune.saliency import LayerScore, Scores

Reduce: TypeAlias = Literal["sum", "max"]
Mode: TypeAlias = Literal["exact", "bound"]


class Criterion(Protocol):
    """Scores channels, higher means more worth keeping.

    name: as in `--method`. needs_data: whether `observe` has to see activations. combine: how batches add up. provable:
    whether the scores are sensitivities in the sense of PFP, so that the sampling theorem applies. A criterion whose
    `observe` may be called for several layers at once can have `spread(work, items)` as well, a `map` on the threads for it.
    """

    name: str
    needs_data: bool
    combine: Literal["max", "mean"]
    provable: bool

    @property
    def options(self) -> Mapping[str, Any]:
        """What else determines the scores; shards merge only when these agree."""

    def observe(
        self, groups: Groups, layer: Layer, x: Array, w: Array, known: Mapping[str, Scores] | None = None
    ) -> list[LayerScore]:
        """Scores from one batch: x is the activation that `layer` reads, w the value of its weight.

        known: for `combine` "max" the scores so far, by group; what cannot exceed them need not be evaluated.
        """

    def inspect(self, groups: Groups) -> list[LayerScore]:
        """Scores from the weights alone, for criteria that need no data."""
