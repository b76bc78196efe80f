"""`--target`: which widths are good for time where the model will run, from a small table with its sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxprune.errors import OptionError
from onnxprune.graph import Network
from onnxprune.options import Options
from onnxprune.selection import Widths

QUANTISED = ("QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")


@dataclass(frozen=True)
class Target:
    """Kept channels are multiples of `align`, in models with 8-bit operators of `integer`; why: where that comes from."""

    align: int
    integer: int
    why: str


TARGETS: Mapping[str, Target] = {
    "generic": Target(1, 1, "any width"),
    # Measured for floating point, see docs/latency.md: convolutions run in blocks of 16 channels with AVX-512.
    "onnxruntime-cpu": Target(16, 16, "convolutions run in blocks of 16 channels; inputs that are no multiple of 4 leave them"),
    # NVIDIA, Convolutional Layers User's Guide: channels divisible by 8 (FP16) or 4 (TF32); Matrix Multiplication Background
    # User's Guide: 16 bytes, that is 8 numbers in FP16 and 16 in INT8.
    "onnxruntime-cuda": Target(8, 16, "tensor cores take 16 bytes at once: 8 numbers in FP16, 16 in INT8"),
    # TensorRT, TensorFormat: kHWC8 and kCHW16 for FP16, kCHW32 for INT8: channels are padded to the vector.
    "tensorrt": Target(8, 32, "formats hold vectors of 8 channels in FP16, of 32 in INT8, and are padded"),
}


def widths(settings: Options, net: Network) -> Widths:
    """The widths that a pruning may choose: --align and --min-channels, or else what the target says.

    Raises OptionError for an unknown target.
    """
    if settings.target not in TARGETS:
        raise OptionError(f"unknown target '{settings.target}'", hint=f"it is one of {', '.join(TARGETS)}")
    target = TARGETS[settings.target]
    integer = any(node.op_type in QUANTISED for node in net.model.graph.node)
    return Widths(settings.min_channels, settings.align or (target.integer if integer else target.align))
