"""`export_trt`: a model checked for TensorRT, with the commands that build, time and compare it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxprune import files
from onnxprune.errors import ModelError, OptionError, OutputError, ValidationError
from onnxprune.trt import check, command, profiles, quantised, run, widths
from onnxprune.trt.facts import Facts, Finding
from onnxprune.trt.operators import SOURCE, SYMMETRIC

NEWEST = {10: (10, 16), 11: (11, 5)}  # the last of each major version that the table knows of
LATEST = 11
_UNRECORDED = {"If", "Loop", "NonMaxSuppression", "NonZero", "Scan"}  # left out of CUDA graphs: data decide what is run


@dataclass(frozen=True)
class HandOver:
    """What `export_trt` found. report: JSON-ready; script: the commands as a POSIX shell script, which runs in its folder."""

    report: dict[str, Any]
    script: str
    folder: Path
    steps: tuple[command.Step, ...]
    profiles: tuple[profiles.Profile, ...]
    values: tuple[float, float]

    @property
    def refused(self) -> list[dict[str, Any]]:
        """The findings for which TensorRT would not take the model, or would compute something else."""
        return [f for f in self.report["findings"] if f["severity"] == "refused"]

    def require_taken(self) -> None:
        """Raises ValidationError if anything is refused."""
        if self.refused:
            first, more = self.refused[0], len(self.refused) - 1
            also = f", and {more} more finding{'s' if more > 1 else ''}" if more else ""
            what = f"TensorRT would not take {self.report['model']}: {first['what']} ({first['where'][0]}){also}"
            raise ValidationError(what, hint=first["hint"])

    def save(self, path: str | os.PathLike[str], *, force: bool = False) -> None:
        """Writes the script, executable, whole or not at all; `path` has to be in the folder that it was made for.

        Raises ValidationError where anything is refused, OutputError when it cannot be written or exists (unless `force`).
        """
        self.require_taken()
        files.writable(Path(path), force=force)
        if Path(path).parent.resolve() != self.folder.resolve():
            hint = "give export_trt the folder of the script"
            raise OutputError(f"the commands were made for a script in {self.folder}, not for {path}", hint=hint)
        with files.whole_file(Path(path), 0o777) as temporary:
            temporary.write_text(self.script, encoding="utf-8", errors="surrogateescape")

    def run(self, *, force: bool = False) -> HandOver:
        """Runs the commands here; the result's report has the times, and what the comparison said, as "run".

        Raises OptionError where TensorRT is not installed or is of another version, ValidationError where it refuses the model
        or its outputs differ (no engine is written then), OutputError for engines that exist already (unless `force`).
        """
        self.require_taken()
        program = run.require()
        said = self.report["tensorrt"] | {"found": installed(program, self.report["tensorrt"]["major"]), "executed": True}
        ran = run.execute(program, self.steps, self.folder, self.profiles, self.values, force=force)
        return replace(self, report=self.report | {"tensorrt": said, "run": ran})


def installed(program: str, wanted: int | None = None) -> str | None:
    """The version of TensorRT that trtexec says it is of; None if it says none. OptionError if it is not a `wanted` one."""
    found = run.version(program)
    if found is None:
        return None
    text = ".".join(map(str, found))
    if found[0] not in NEWEST or (wanted is not None and found[0] != wanted):
        covered = " or ".join(map(str, [wanted] if found[0] in NEWEST else NEWEST))
        raise OptionError(f"{program} is of TensorRT {text}, not of {covered}", hint="see --tensorrt")
    return text


def export_trt(
    model: str | os.PathLike[str],
    *,
    original: str | os.PathLike[str] | None = None,
    engine: str | os.PathLike[str] | None = None,
    folder: str | os.PathLike[str] = ".",
    shapes: Sequence[str] = (),
    batch: Sequence[int] | None = None,
    precision: str = "model",
    tensorrt: int = LATEST,
    plugins: Sequence[str | os.PathLike[str]] = (),
    values: Sequence[float] = (0.0, 1.0),
    atol: float | None = None,
    rtol: float | None = None,
) -> HandOver:
    """Checks a model file for TensorRT and makes the commands that build an engine of it. It runs none of them.

    original: what the model was pruned from; its engine is built and timed too, and only widths that differ from it count.
    engine: the file to build, by default beside the model. folder: where the script will be. shapes: NAME=MIN:OPT:MAX for
    inputs with open sizes. batch: smallest, usual, largest first axis of the others (default 1, 8, 32). precision: "model"
    (the types of the file), "fp32", "fp16", "int8" or "best". tensorrt: the major version, 10 or 11. plugins: libraries for
    what is no operator of ONNX. values, atol, rtol: the range of random inputs and the tolerances of the comparison.

    Raises ModelError and OptionError for what cannot be read, is left open or does not exist in that version.
    """
    if tensorrt not in NEWEST:
        raise OptionError(f"TensorRT {tensorrt} is not covered", hint=f"it is one of {', '.join(map(str, NEWEST))}")
    path, base = Path(model), Path(folder)
    facts = Facts.of(files.read(path), NEWEST[tensorrt])
    before = None if original is None else Facts.of(files.read(original), NEWEST[tensorrt])
    pairs = quantised.present(facts)
    _offered(precision, tensorrt, pairs)
    usual = command.TOLERANCES["int8" if pairs else precision] if precision in command.TOLERANCES else 0.0
    setting = command.Setting(
        major=tensorrt,
        precision=precision,
        quantised=pairs,
        graphs=not any(n.op_type in _UNRECORDED for n in facts.nodes()),
        plugins=tuple(command.relative(Path(p), base) for p in plugins),
        values=_range(values),
        atol=_tolerance("--atol", usual if atol is None else atol),
        rtol=_tolerance("--rtol", usual if rtol is None else rtol),
    )
    job = _Job(path, None if original is None else Path(original), Path(engine or path.with_suffix(".engine")), base, setting)
    return _handed(job, facts, before, profiles.profiles(facts.model, shapes, batch))


@dataclass(frozen=True)
class _Job:
    model: Path
    original: Path | None
    engine: Path
    folder: Path
    setting: command.Setting

    def steps(self, found: Sequence[profiles.Profile]) -> tuple[command.Step, ...]:
        made = command.steps(self._at(self.model), self._at(self.engine), found, self.setting)
        if self.original is None:
            return tuple(made)
        other = self.original.with_suffix(".engine")
        if other.absolute() == self.engine.absolute():
            raise OptionError(f"both engines would be {self.engine}", hint="name the pruned model's with --engine")
        theirs = command.steps(self._at(self.original), self._at(other), found, self.setting, "the original's engine")
        return (*made, *(s for s in theirs if s.kind != "compare"))

    def _at(self, path: Path) -> str:
        return command.relative(path, self.folder)


def _handed(job: _Job, facts: Facts, before: Facts | None, found: list[profiles.Profile]) -> HandOver:
    if before is not None and _declared(facts) != _declared(before):
        raise ModelError(
            f"{job.original} has other inputs than {job.model}", hint="--original names what the model was pruned from"
        )
    parts = job.steps(found)
    findings = [
        *check.check(facts, plugins=bool(job.setting.plugins)),
        *_about_precision(facts, job.setting),
        *widths.findings(facts, before, quantised=job.setting.quantised),
    ]
    report = {
        "model": str(job.model),
        "original": None if job.original is None else str(job.original),
        "engine": str(job.engine),
        "tensorrt": {"major": job.setting.major, "table": SOURCE, "found": None, "executed": False},
        "precision": job.setting.precision,
        "quantised": job.setting.quantised,
        "opset": facts.opset,
        "operators": check.counted(facts),
        "findings": check.summary(findings),
        "external_data": [str(p) for p in files.external_files(job.model)],
        "profiles": [{"input": p.name, "min": list(p.least), "opt": list(p.usual), "max": list(p.most)} for p in found],
        "tolerance": {"atol": job.setting.atol, "rtol": job.setting.rtol},
        "commands": [{"kind": s.kind, "purpose": s.purpose, "words": list(s.words)} for s in parts],
        "run": None,
    }
    return HandOver(report, command.script(parts), job.folder, parts, tuple(found), job.setting.values)


def _declared(facts: Facts) -> dict[str, bytes]:
    return {v.name: v.type.SerializeToString(deterministic=True) for v in facts.inputs}


def _offered(precision: str, major: int, pairs: bool) -> None:
    """Raises OptionError for a precision that does not exist, or that would make an engine whose outputs mean nothing."""
    if precision not in command.PRECISIONS:
        raise OptionError(f"unknown precision '{precision}'", hint=f"it is one of {', '.join(command.PRECISIONS)}")
    if precision == "int8" and not pairs:
        raise OptionError("--precision int8 needs a quantised model: trtexec has no data to calibrate with", hint=SYMMETRIC)
    if precision == "best" and major >= 11:
        raise OptionError(
            "--precision best does not exist in TensorRT 11, which goes by the types in the file", hint="fp16 does"
        )


def _about_precision(facts: Facts, setting: command.Setting) -> Iterator[Finding]:
    halves = any(facts.kind(name) in ("float16", "bfloat16") for name in facts.constants)
    if setting.precision == "fp32" and halves and setting.major >= 11:
        yield Finding(
            "warning", "the file has weights in half precision, and TensorRT 11 goes by the types in the file", "the model"
        )
    if not setting.comparable:
        what = "best allows int8 without calibration: such an engine tells times, its outputs mean nothing"
        yield Finding("warning", what, "the model", "use fp16, or quantise the model first")
    if command.converts(setting) and setting.quantised:
        yield Finding("unknown", "whether AutoCast takes quantised models was not found out", "the model")
    for name in profiles.shape_values(facts.model):
        what = "an integer input of at most one axis may hold sizes; then the profile has to hold its values, not its shape"
        yield Finding("unknown", what, name)


def _tolerance(name: str, value: float) -> float:
    if not math.isfinite(value) or value < 0:
        raise OptionError(f"{name} must be a number of at least 0, not {value:g}")
    return value


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = values
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise OptionError(f"--val-range {low:g} {high:g} is no range", hint="the smaller number comes first")
    return low, high
