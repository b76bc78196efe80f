"""Sample data: one lazily read, random-access list of samples, whatever it comes from."""

from __future__ import annotations

from onnxprune.data.images import ImageOptions
from onnxprune.data.samples import Digest, InputSpec, Samples, choose
from onnxprune.data.sources import open_data

__all__ = ["Digest", "ImageOptions", "InputSpec", "Samples", "choose", "open_data"]
