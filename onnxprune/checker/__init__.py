"""The independent checker of certificates: shares no code with what makes them, only the readers of models and data."""

from onnxprune.checker.check import Sources, check

__all__ = ["Sources", "check"]
