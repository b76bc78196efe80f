"""TensorRT where it is installed: which version, the build with its times, the comparison of outputs.

No TensorRT was at hand when this was written: the tests run it with small scripts in its place. What trtexec prints is
known from public logs: "[TensorRT v101303]" in its first line, "Throughput: 507.4 qps", "Latency: min = 1.2 ms, median = ...".
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from onnxprune import files, runtime
from onnxprune.errors import ModelError, OptionError, ValidationError
from onnxprune.graph import Array
from onnxprune.trt.command import Step
from onnxprune.trt.profiles import Profile

Values: TypeAlias = tuple[float, float]
Ran: TypeAlias = dict[str, Any]

# Where NVIDIA's containers and Debian packages put trtexec, neither of which is in PATH.
PLACES = ("/opt/tensorrt/bin", "/usr/src/tensorrt/bin")
WHERE = "it comes with TensorRT's tar and Debian packages and in the container nvcr.io/nvidia/tensorrt"
OLDEST = 10
_VERSION = re.compile(r"\[TensorRT v(\d+)(?:\.(\d+))?(?:\.(\d+))?")
_NUMBER = r"([0-9.eE+-]+)"


def trtexec() -> str | None:
    """The path of trtexec on this machine."""
    return shutil.which("trtexec") or next((found for p in PLACES if (found := shutil.which("trtexec", path=p))), None)


def version(program: str) -> tuple[int, int, int] | None:
    """TensorRT's, as trtexec prints it: v101303 is 10.13.3, v8602 is 8.6.2; None where it prints none."""
    said = _VERSION.search(_output(_done([program, "--help"], Path())))
    if said is None:
        return None
    if said[2] is not None:
        return int(said[1]), int(said[2]), int(said[3] or 0)
    whole = int(said[1])
    if whole >= 100000:
        return whole // 10000, whole // 100 % 100, whole % 100
    return whole // 1000, whole // 100 % 10, whole % 100


def require() -> str:
    """trtexec's path. Raises OptionError where there is none, and says what else there is of TensorRT."""
    found = trtexec()
    if found is None:
        python = "; its Python package is here, but --run needs the program" if importlib.util.find_spec("tensorrt") else ""
        raise OptionError(f"there is no trtexec on this machine{python}", hint=f"{WHERE}; or run the script on another machine")
    return found


def execute(
    program: str, parts: Sequence[Step], folder: Path, profiles: Sequence[Profile], values: Values, *, force: bool
) -> Ran:
    """Runs the steps in `folder`: JSON-ready times of each build and what the comparison said.

    Files are written only if all went well. Raises OutputError for files that exist (unless `force`), OptionError for a
    converter that is not here, ValidationError when TensorRT refuses or outputs differ.
    """
    files.writable(*(folder / s.makes for s in parts if s.makes), force=force)
    builds: list[dict[str, Any]] = []
    nothing = {"by": None, "relative_l2": None, "why": "its outputs mean nothing, see the warning"}
    found: Ran = {"trtexec": program, "builds": builds, "compared": nothing}
    with contextlib.ExitStack() as stack:
        places = {s.makes: str(stack.enter_context(files.whole_file((folder / s.makes).absolute()))) for s in parts if s.makes}
        for step in parts:
            words = [_placed(w, places) for w in step.words]
            if step.kind == "convert":
                _converted(words, folder)
            elif step.kind == "build":
                builds.append({"engine": step.makes, **built(program, words, folder)})
            else:
                found["compared"] = compared(words, folder, profiles, values)
    return found


def _placed(word: str, places: Mapping[str, str]) -> str:
    """The word with the temporary file in the place of one that a step makes, behind an option too (--onnx=FILE)."""
    option, sign, value = word.partition("=")
    if word.startswith("--") and sign:
        return f"{option}={places.get(value, value)}"
    return places.get(word, word)


def _converted(words: Sequence[str], folder: Path) -> None:
    done = _done([sys.executable, *words[1:]], folder)
    if done.returncode != 0:
        hint = "pip install 'nvidia-modelopt[onnx]'"
        raise OptionError(f"the conversion to fp16 fails: {_reason(_output(done), done.returncode)}", hint=hint)


def built(program: str, words: Sequence[str], folder: Path) -> dict[str, Any]:
    """Runs a build and gives its times: seconds, and inferences per second. Raises ValidationError when TensorRT refuses."""
    done = _done([program, *words[1:]], folder)
    text = _output(done)
    if done.returncode != 0 or "&&&& FAILED" in text:
        hint = "the commands by themselves show all that it prints"
        raise ValidationError(f"TensorRT does not build the model: {_reason(text, done.returncode)}", hint=hint)
    throughput = _found(rf"Throughput: {_NUMBER} qps", text)
    return {"throughput": throughput, "latency": _times("Latency", text), "compute": _times("GPU Compute Time", text)}


def compared(words: Sequence[str], folder: Path, profiles: Sequence[Profile], values: Values) -> dict[str, Any]:
    """The outputs beside ONNX Runtime's: by Polygraphy, or else by ONNX Runtime's own TensorRT provider, in the file's types.

    "by" names the tool, or is None where neither is here, and "why" says so. Raises ValidationError when Polygraphy finds that
    outputs differ.
    """
    polygraphy = shutil.which("polygraphy")
    if polygraphy is not None:
        done = _done([polygraphy, *words[1:]], folder)
        if done.returncode != 0:
            reason = _reason(_output(done), done.returncode)
            raise ValidationError(
                f"outputs differ from ONNX Runtime's, or Polygraphy fails: {reason}", hint="see --atol, --rtol"
            )
        return {"by": "polygraphy", "relative_l2": None, "why": None}
    try:
        return {"by": "onnxruntime", "relative_l2": _beside(folder / words[2], profiles, values), "why": None}
    except (ModelError, OptionError) as problem:
        why = f"no polygraphy in PATH (pip install polygraphy), and ONNX Runtime's TensorRT provider: {problem.message}"
        return {"by": None, "relative_l2": None, "why": why}


def _beside(model: Path, profiles: Sequence[Profile], values: Values) -> float:
    """The largest relative L2 difference of an output between ONNX Runtime's TensorRT provider and its CPU provider."""
    feeds = runtime.example_feeds(files.load(model), shapes={p.name: p.usual for p in profiles})
    rng = np.random.default_rng(0)
    drawn = {k: np.asarray(rng.uniform(*values, v.shape)).astype(v.dtype) for k, v in feeds.items() if v.dtype.kind == "f"}
    ran = [
        runtime.run(runtime.session(model, providers=runtime.providers([name])), feeds | drawn) for name in ("cpu", "tensorrt")
    ]
    return max((_apart(a, b) for a, b in zip(*ran, strict=True) if a.dtype.kind == "f"), default=0.0)


def _apart(a: Array, b: Array) -> float:
    """The relative L2 difference."""
    difference = np.asarray(b, np.float64) - np.asarray(a, np.float64)
    return float(np.linalg.norm(difference)) / max(float(np.linalg.norm(np.asarray(a, np.float64))), 1e-30)


def _times(what: str, text: str) -> dict[str, float] | None:
    line = next((x for x in text.splitlines() if re.search(rf"(?:^|\] ){what}: min = ", x)), "")
    found = {k: _found(rf"{k} = {_NUMBER} ms", line) for k in ("min", "median", "mean", "max")}
    return {k: v / 1e3 for k, v in found.items() if v is not None} or None


def _found(pattern: str, text: str) -> float | None:
    said = re.search(pattern, text)
    try:
        return float(said[1]) if said else None
    except ValueError:
        return None


def _reason(text: str, code: int) -> str:
    """The first line that trtexec marks as an error, without its time; else the last line, or the code alone."""
    errors = [x.split("[E]", 1)[1].strip() for x in text.splitlines() if "[E]" in x]
    lines = [x.strip() for x in text.splitlines() if x.strip()]
    return next(iter(errors), lines[-1] if lines else f"trtexec ended with code {code}")[:300]


def _done(words: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, errors="replace", check=False)


def _output(done: subprocess.CompletedProcess[str]) -> str:
    return f"{done.stdout}\n{done.stderr}"
