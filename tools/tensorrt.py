#!/usr/bin/env python3
"""What `onnxprune export-trt` says of the models in some folders: the table in docs/tensorrt.md. No TensorRT is run.

    python tools/tensorrt.py FOLDER ...

Sizes that models leave open, beside the batch, are filled with 64.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import onnx

from onnxprune import files
from onnxprune.errors import OnnxPruneError, OptionError
from onnxprune.graph import graph_inputs
from onnxprune.trt.export import HandOver, export_trt

OPEN = 64
ORDER = ("refused", "unknown", "warning")


def shapes(model: onnx.ModelProto) -> list[str]:
    """A --shapes for every open input, with one size for each name."""
    known: dict[str, int] = {}
    made = []
    for axis in (0, 1):  # names of first axes are batches, wherever else they stand
        for value in graph_inputs(model):
            for dim in value.type.tensor_type.shape.dim[axis : None if axis else 1]:
                known.setdefault(dim.dim_param, OPEN if axis else 1)
    for value in graph_inputs(model):
        dims = value.type.tensor_type.shape.dim
        if any(d.dim_value <= 0 for d in dims):
            sizes = [d.dim_value if d.dim_value > 0 else known[d.dim_param] if d.dim_param else OPEN for d in dims]
            made.append(f"{value.name}={'x'.join(map(str, sizes))}")
    return made


def handed(path: Path) -> tuple[HandOver, bool]:
    """The hand-over, and whether sizes had to be filled in."""
    try:
        return export_trt(path), False
    except OptionError:
        return export_trt(path, shapes=shapes(files.read(path))), True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    paths = [p for folder in parser.parse_args().folders for p in sorted(folder.glob("*.onnx"))]
    verdicts: Counter[str] = Counter()
    reasons: Counter[tuple[str, str]] = Counter()
    filled = 0
    for path in paths:
        try:
            found, more = handed(path)
        except OnnxPruneError as error:
            verdicts[f"error: {error}"] += 1
            continue
        filled += more
        severities = {f["severity"] for f in found.report["findings"]}
        verdicts[next((s for s in ORDER if s in severities), "nothing")] += 1
        reasons.update({(f["severity"], f["what"]) for f in found.report["findings"]})
    print(f"{len(paths)} models, {filled} with open sizes filled in\n")
    print("\n".join(f"{count} {what}" for what, count in verdicts.most_common()), end="\n\n")
    print("| models | severity | finding |\n| --- | --- | --- |")
    for (severity, what), count in sorted(reasons.items(), key=lambda item: (ORDER.index(item[0][0]), -item[1], item[0])):
        print(f"| {count} | {severity} | {what} |")


if __name__ == "__main__":
    main()
