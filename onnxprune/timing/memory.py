"""Peak memory of one model, measured in a process of its own: `python -m onnxprune.timing.memory`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from onnxprune import runtime
from onnxprune.timing.models import Feeds, Setting

RUNS = 3  # the memory pattern of the first run serves the second


def peak_memory(model: Path, feeds: Feeds, setting: Setting) -> int | None:
    """Bytes of main memory that loading and running a model file takes, at most, beyond what an idle process has.

    None where the system does not tell, or the process dies (of too little memory, for instance).
    """
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        for i, array in enumerate(feeds.values()):
            np.save(Path(folder) / f"{i}.npy", array)
        asked = {"model": str(model), "names": list(feeds), "folder": folder, **setting.to_json()}
        package = str(Path(runtime.__file__).resolve().parent.parent)
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        made = subprocess.run(
            [sys.executable, "-m", "onnxprune.timing.memory"],
            input=json.dumps(asked),
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    if made.returncode != 0:
        return None
    found = json.loads(made.stdout)
    return None if found is None else int(found)


def _status(field: str) -> int | None:
    """A number of bytes that Linux tells of this process; `ru_maxrss` would include what the parent had."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return 1024 * int(found[0]) if found else None


def _main() -> None:
    asked = json.loads(sys.stdin.read())
    feeds = {name: np.load(Path(asked["folder"]) / f"{i}.npy") for i, name in enumerate(asked["names"])}
    before = _status("VmRSS")
    session = runtime.session(Path(asked["model"]), providers=asked["providers"], threads=asked["threads"])
    for _ in range(RUNS):
        runtime.run(session, feeds)
    after = _status("VmHWM")
    print(json.dumps(None if before is None or after is None else max(0, after - before)))


if __name__ == "__main__":
    _main()
