"""Why a pruned model is not as much faster as it has fewer multiply-accumulates: which kernels did not shrink with them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from onnxprune.timing.profile import Kernel

OUTSIDE = "outside of kernels"
MULTIPLY = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "QLinearConv", "QLinearMatMul")
MULTIPLY_MORE = (
    "ConvInteger",
    "MatMulInteger",
    "MatMulNBits",
    "LSTM",
    "GRU",
    "RNN",
    "Einsum",
    "Attention",
    "MultiHeadAttention",
)
NOTICEABLE = 0.02  # of the model's time


@dataclass(frozen=True)
class Change:
    """Seconds for one run in all kernels of one kind, in the first model and in the other; `why` it is more than its share.

    excess: seconds above `macs` (the ratio of the multiply-accumulates) times what they took in the first.
    """

    kind: str
    before: float
    after: float
    excess: float
    why: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "before": self.before, "after": self.after, "excess": self.excess, "why": self.why}


def shortfall(
    first: Sequence[Kernel], other: Sequence[Kernel], macs: float, latencies: tuple[float, float] | None = None
) -> list[Change]:
    """Every kind of kernel, the largest excess first. macs: MACs of the other model over those of the first.

    latencies: seconds of a whole run of both, to tell what passes outside of kernels.
    """
    before, after = by_kind(first), by_kind(other)
    if latencies is not None:
        for kinds, total in zip((before, after), latencies, strict=True):
            kinds[OUTSIDE] = max(0.0, total - sum(kinds.values()))
    unblocked = _plain(other) > _plain(first)
    total = sum(after.values())
    changes = []
    for kind in dict.fromkeys([*before, *after]):
        then, now = before.get(kind, 0.0), after.get(kind, 0.0)
        excess = now - macs * then
        why = _why(kind, then, unblocked) if excess > NOTICEABLE * total else ""
        changes.append(Change(kind, then, now, excess, why))
    return sorted(changes, key=lambda c: -c.excess)


def by_kind(kernels: Sequence[Kernel]) -> dict[str, float]:
    """Seconds for one run by kind of kernel, the longest first."""
    found: dict[str, float] = {}
    for kernel in kernels:
        found[kernel.kind] = found.get(kernel.kind, 0.0) + kernel.median
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _plain(kernels: Sequence[Kernel]) -> int:
    """How many convolutions are not in the blocked layout, where others are."""
    convolutions = [k for k in kernels if k.op in ("Conv", "FusedConv")]
    return sum(not k.blocked for k in convolutions)


def _why(kind: str, before: float, unblocked: bool) -> str:
    op = kind.split(maxsplit=1)[0]
    if kind == OUTSIDE:
        return "the runtime's own work for every node and call: it does not depend on widths"
    if op.startswith("Reorder"):
        return "converts between plain and blocked layout; widths that are multiples of 16 need the fewest conversions"
    if "depthwise" in kind:
        return "few multiply-adds for every byte: bound by memory, and by blocks of 16 channels"
    if op in ("Conv", "FusedConv") and unblocked and "blocked" not in kind:
        return "fell out of the blocked layout, which takes input channels in multiples of 4: --align 16 mends it"
    if op in (*MULTIPLY, *MULTIPLY_MORE):
        partly = "partly filled blocks of channels, weights to be read, or too little work for all threads"
        return partly if before else f"the first model has none; {partly}"
    return "moves data: its time follows the size of tensors, not the multiply-adds"
