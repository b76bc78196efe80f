"""Criteria: how much each channel is worth keeping."""

from onnxprune.criteria.base import Criterion
from onnxprune.criteria.pfp import Sensitivity
from onnxprune.criteria.plain import FPGM, L1, L2, Activation, Random

__all__ = ["FPGM", "L1", "L2", "Activation", "Criterion", "Random", "Sensitivity"]
