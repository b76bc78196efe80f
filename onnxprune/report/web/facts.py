"""What a page is made from: the two files as they are, and what the JSON beside them tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class FileFacts:
    """A model file: its name, and what it consists of."""

    name: str
    macs: int
    params: int
    bytes: int


@dataclass(frozen=True)
class LayerFacts:
    """A layer of both files, (before, after): channels that it reads and makes, multiply-accumulates.

    reads, makes, macs: the second number is None where the pruned file has no such layer.
    """

    name: str
    op: str
    reads: tuple[int, int | None]
    makes: tuple[int, int | None]
    macs: tuple[int, int | None]


@dataclass(frozen=True)
class Facts:
    """Everything that a page tells. report, certificate, sweep, bench: JSON as it was read, None where there is none.

    layers: in topological order. frozen: (group, channels, reason, what would unfreeze it). notes: what the reader has to
    know about where all this comes from, such as JSON that is missing. scores: by group the quantiles of the scores of the
    channels that stay ("kept") and go ("removed"), its "size" and how many are "left". digest: of the pruned file.
    """

    original: FileFacts
    pruned: FileFacts
    layers: tuple[LayerFacts, ...]
    frozen: tuple[tuple[str, int, str, str], ...] = ()
    report: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] | None = None
    sweep: Mapping[str, Any] | None = None
    bench: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()
    scores: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    criterion: str | None = None
    digest: str = ""
