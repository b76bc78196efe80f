"""What a command that makes a model hands over, and the files that it goes to."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx

from onnxprune import files, large, weights
from onnxprune.plan import Plan


@dataclass(frozen=True, eq=False)
class Result:
    """What a pruning yields. `report` and `certificate` are JSON-ready.

    stored: the pruned model, of which large tensors may be references into the files of the original and temporary ones,
    which last as long as this. `save` writes it whole, and `model` is it as a ModelProto.
    """

    stored: onnx.ModelProto
    plan: Plan
    report: dict[str, Any]
    certificate: dict[str, Any] | None
    external_data: bool = False
    sources: tuple[Path, ...] = ()
    scratches: tuple[weights.Scratch, ...] = ()

    @cached_property
    def model(self) -> onnx.ModelProto:
        """The pruned model, with its weights unless they are more than 1 GiB.

        Those of a larger one are external data with absolute paths, for as long as this result lives: `prune` and `load`
        take such a model, but `onnx.save` would write no more than the references.
        """
        return large.whole(self.stored)

    def save(self, path: str | os.PathLike[str], report: str | os.PathLike[str] | None = None, *, force: bool = False) -> None:
        """Writes the model, beside it the certificate and, there or at `report`, the report; each whole or not at all.

        Raises OutputError when that fails, also when it would replace a file that the original model is in.
        """
        where = Path(report) if report is not None else report_path(path)
        targets = outputs(Path(path), where, external=self.external_data)
        files.apart(targets, self.sources)
        files.writable(*targets, force=force)
        files.save(self.stored, path, external=self.external_data)
        for target, told in ((where, self.report), (certificate_path(path), self.certificate)):
            if told is not None:
                with files.whole_file(target) as temporary:
                    temporary.write_text(json.dumps(told, indent=1) + "\n")


def report_path(out: str | os.PathLike[str]) -> Path:
    """Where the report of OUT goes unless told otherwise: OUT.report.json."""
    return Path(out).with_name(Path(out).name + ".report.json")


def certificate_path(out: str | os.PathLike[str]) -> Path:
    """Where the certificate of OUT goes: OUT.certificate.json."""
    return Path(out).with_name(Path(out).name + ".certificate.json")


def outputs(out: Path, report: Path, *, external: bool) -> list[Path]:
    """Every file that `Result.save` writes."""
    return [out, report, certificate_path(out), *([files.data_file(out)] if external else [])]
