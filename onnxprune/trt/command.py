"""The commands that hand a model over: trtexec builds and times an engine, Polygraphy compares it with ONNX Runtime.

Facts from public text (read, never executed against TensorRT here): trtexec's options from its source, samples/common of
github.com/NVIDIA/TensorRT, and from "Migrating trtexec Usage from TensorRT 10.x to 11.x", which removes --fp16, --int8 and
--best; the three for steady times from "Performance Benchmarking using trtexec"; Polygraphy's from `polygraphy run --help` of
0.53.6, which did parse these commands.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxprune.trt.profiles import Profile

PRECISIONS = ("model", "fp32", "fp16", "int8", "best")
# Absolute and relative: TF32 and FP16 have 10 bits of fraction, int8 has steps of 1/127. Choices, not measurements.
TOLERANCES = {"model": 1e-3, "fp32": 1e-3, "fp16": 1e-2, "int8": 1e-1, "best": 1e-1}
_STEADY = ("--noDataTransfers", "--useSpinWait")
_FLAGS = {"model": ("--stronglyTyped",), "fp32": (), "fp16": ("--fp16",), "int8": ("--int8",), "best": ("--best",)}


@dataclass(frozen=True)
class Setting:
    """How the engine is built and compared. major: of TensorRT's version. quantised: by QDQ pairs. graphs: whether CUDA graphs
    can record it. values: range of random inputs for the comparison."""

    major: int
    precision: str
    quantised: bool
    graphs: bool
    plugins: tuple[str, ...] = ()
    values: tuple[float, float] = (0.0, 1.0)
    atol: float = 1e-3
    rtol: float = 1e-3

    @property
    def comparable(self) -> bool:
        """Whether outputs mean anything: with --best trtexec may take int8 with made-up scales where the model has none."""
        return self.precision != "best" or self.quantised


@dataclass(frozen=True)
class Step:
    """One command and what it is for. kind: "convert", "build" or "compare"; makes: the file that it writes, if any."""

    kind: str
    purpose: str
    words: tuple[str, ...]
    makes: str = ""


def steps(model: str, engine: str, profiles: Sequence[Profile], setting: Setting, what: str = "the engine") -> list[Step]:
    """Where the precision needs it a conversion, then the build, then the comparison; `model` and `engine` are paths."""
    made, source = [], model
    if converts(setting):
        source = model.removesuffix(".onnx") + ".fp16.onnx"
        options = ("--onnx_path", model, "--output_path", source, "--low_precision_type", "fp16", "--keep_io_types")
        purpose = "convert to mixed precision, as TensorRT 11 has no --fp16 (pip install 'nvidia-modelopt[onnx]')"
        made.append(Step("convert", purpose, ("python3", "-m", "modelopt.onnx.autocast", *options), source))
    made.append(Step("build", f"build {what} and time it", build(source, engine, profiles, setting), engine))
    if setting.comparable:
        made.append(Step("compare", "compare TensorRT with ONNX Runtime on random inputs", compare(source, profiles, setting)))
    return made


def converts(setting: Setting) -> bool:
    """Whether the file has to be converted before it is built."""
    return setting.major >= 11 and setting.precision == "fp16"


def build(model: str, engine: str, profiles: Sequence[Profile], setting: Setting) -> tuple[str, ...]:
    """trtexec."""
    words = ["trtexec", f"--onnx={model}", f"--saveEngine={engine}"]
    for option, k in (("minShapes", 0), ("optShapes", 1), ("maxShapes", 2), ("shapes", 1)):
        if profiles:
            words.append(f"--{option}=" + ",".join(f"{p.name}:{_by_x(p.shapes[k])}" for p in profiles))
    words += _precision(setting, _FLAGS)
    words += [f"--staticPlugins={p}" for p in setting.plugins]
    return (*words, *_STEADY, *(["--useCudaGraph"] if setting.graphs else []))


def compare(model: str, profiles: Sequence[Profile], setting: Setting) -> tuple[str, ...]:
    """polygraphy run: it builds an engine of its own with the same settings."""
    words = ["polygraphy", "run", model, "--trt", "--onnxrt"]
    for option, k in (("trt-min-shapes", 0), ("trt-opt-shapes", 1), ("trt-max-shapes", 2), ("input-shapes", 1)):
        if profiles:
            words += [f"--{option}", *(f"{p.name}:[{','.join(map(str, p.shapes[k]))}]" for p in profiles)]
    words.append("--tf32")  # trtexec allows TF32 unless told otherwise, Polygraphy does not
    words += _precision(setting, {**_FLAGS, "model": ("--strongly-typed",), "best": ("--fp16", "--int8")})
    words += ["--plugins", *setting.plugins] if setting.plugins else []
    low, high = setting.values
    return (*words, "--val-range", f"[{low:g},{high:g}]", "--atol", f"{setting.atol:g}", "--rtol", f"{setting.rtol:g}")


def _precision(setting: Setting, flags: dict[str, tuple[str, ...]]) -> list[str]:
    """TensorRT 10 with flags takes QDQ pairs with --int8 only; TensorRT 11 goes by the types in the file."""
    if setting.major >= 11:
        return []
    found = list(flags[setting.precision])
    return [*found, "--int8"] if setting.quantised and setting.precision in ("fp32", "fp16") else found


def _by_x(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes)) if sizes else "scalar"


def script(parts: Sequence[Step]) -> str:
    """A shell script of the steps. It runs in its own folder, so that it can be moved together with the files."""
    lines = [
        "#!/bin/sh",
        "# Made by `onnxprune export-trt`. Its authors had no TensorRT at hand and never ran these commands.",
        "set -eu",
        'cd -- "$(dirname -- "$0")"',
    ]
    for step in parts:
        lines += ["", f"# {step.purpose}", _wrapped(step.words)]
    return "\n".join(lines) + "\n"


def _wrapped(words: Sequence[str]) -> str:
    """The words quoted for a POSIX shell, an option a line."""
    quoted = [shlex.quote(w) for w in words]
    text = quoted[0]
    for word, plain in zip(quoted[1:], words[1:], strict=True):
        text += f" \\\n    {word}" if plain.startswith("--") else f" {word}"
    return text


def relative(path: Path, folder: Path) -> str:
    """The path as a script in `folder` would write it, whatever links lead to either.

    It starts with a dot: trtexec takes a tilde for the home folder.
    """
    found = os.path.relpath(path.parent.resolve() / path.name, folder.resolve())
    return found if found.startswith("..") else f"./{found}"
