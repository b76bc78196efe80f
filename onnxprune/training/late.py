"""The rest of this package, imported when something is to be trained and not before: it takes PyTorch."""

from __future__ import annotations

import importlib
from typing import Any

from onnxprune.errors import OptionError


def trainer(what: str = "fine-tuning") -> Any:
    """`training.tune`. Raises OptionError where there is no torch; what: that which needs it."""
    try:
        return importlib.import_module("onnxprune.training.tune")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "torch":
            raise
        raise OptionError(f"{what} needs PyTorch, which is not installed", hint="pip install 'onnxprune[torch]'") from None
