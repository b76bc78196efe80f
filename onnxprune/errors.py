"""The one family of exceptions: what is wrong, where, and how to mend it."""

from __future__ import annotations


class OnnxPruneError(Exception):
    """Base of every error that onnxprune raises on purpose.

    The text is one line: what is wrong and where; `hint`, when there is one, says how to mend it.
    `exit_code` is what the command line returns for it.
    """

    exit_code = 2

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ModelError(OnnxPruneError):
    """The model file cannot be read, is not a valid ONNX model, or does not run in ONNX Runtime."""


class DataError(OnnxPruneError):
    """The sample data is missing, of the wrong shape, type or name, or not finite."""


class BudgetError(OnnxPruneError):
    """The budget is malformed or cannot be reached."""


class OptionError(OnnxPruneError):
    """An option has a value that makes no sense."""


class PlanError(OnnxPruneError):
    """A plan does not fit the model that it is applied to."""


class OutputError(OnnxPruneError):
    """The result cannot be written where it was asked for."""


class ValidationError(OnnxPruneError):
    """The pruned model failed its re-validation; nothing was written."""

    exit_code = 3
