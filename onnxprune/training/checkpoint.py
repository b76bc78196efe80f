"""What a training can go on from: written whole after every epoch, beside the file that is to be made."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from onnxprune import files
from onnxprune.errors import OptionError


def fingerprint(**parts: Any) -> str:
    """What must be the same for a checkpoint to be of use: models, data, settings."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def save(path: Path, state: dict[str, Any]) -> None:
    """Writes a checkpoint whole or not at all. Raises OutputError."""
    with files.whole_file(path) as temporary:
        torch.save(state, temporary)


def load(path: Path, wanted: str) -> dict[str, Any]:
    """The state of an interrupted training. Raises OptionError where there is none, or one of another training."""
    if not path.exists():
        raise OptionError(f"there is no checkpoint {path} to resume from", hint="leave --resume out")
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True)
        same = state["fingerprint"] == wanted
    except Exception as error:  # torch raises what its unpickler does
        text = " ".join(str(error).split())[:100]
        raise OptionError(
            f"{path} is not a checkpoint that can be read: {text}", hint="delete it, and leave --resume out"
        ) from None
    if not same:
        raise OptionError(
            f"{path} is of another training", hint="give the same models, data and options, or leave --resume out"
        )
    return state
