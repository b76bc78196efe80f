"""What was measured once is kept on disk: one file for every machine and setting, in the user's cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from onnxprune import files
from onnxprune.errors import OnnxPruneError

FORMAT = 1


def folder() -> Path:
    """$XDG_CACHE_HOME/onnxprune/timing, by default under ~/.cache (XDG Base Directory Specification)."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(home) if Path(home).is_absolute() else Path.home() / ".cache") / "onnxprune" / "timing"


class Store:
    """Measurements by section and key, of one machine. What cannot be read or written is only measured again."""

    def __init__(self, machine: dict[str, Any], where: Path | None = None) -> None:
        self.machine = {"format": FORMAT, **machine}
        name = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (where or folder()) / f"{name}.json"
        self._held = self._read()

    def get(self, section: str, key: str) -> Any:
        """What is kept, None where there is nothing."""
        return self._held.get(section, {}).get(key)

    def put(self, section: str, key: str, value: Any) -> None:
        """Keeps a JSON value until `save`."""
        self._held.setdefault(section, {})[key] = value

    def save(self) -> None:
        """Writes the file whole, with what other processes have put there since."""
        for section, values in self._read().items():
            self._held[section] = {**values, **self._held.get(section, {})}
        with contextlib.suppress(OSError, OnnxPruneError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with files.whole_file(self.path) as temporary:
                temporary.write_text(json.dumps({"machine": self.machine, **self._held}) + "\n")

    def _read(self) -> dict[str, dict[str, Any]]:
        try:
            stored = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        if not isinstance(stored, dict) or stored.get("machine") != self.machine:
            return {}
        return {k: v for k, v in stored.items() if k != "machine" and isinstance(v, dict)}
