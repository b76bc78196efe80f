#!/usr/bin/env python3
"""Prune a model above 2 GB and tell what memory that took.

    python tools/bench_large.py [--width 12000] [--layers 4] [--macs 0.7] [--method l2] [--folder DIR]

The model is a chain of linear layers with random weights, written straight to external data in a temporary folder (which
needs three times its size, TMPDIR about twice). Every step runs in a process of its own; its peak is the largest resident
set (`ru_maxrss`), which counts the pages of mapped files; `own` is the part that is not mapped from files, sampled, which
the system cannot simply drop. The first and last line are ONNX Runtime alone on the two files.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

MIB = 1 << 20
SAMPLING = 0.02  # seconds
RUN = """
import sys, numpy as np, onnxruntime as ort
options = ort.SessionOptions()
options.intra_op_num_threads = 1
session = ort.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
x = np.random.default_rng(0).standard_normal((1, session.get_inputs()[0].shape[1])).astype(np.float32)
assert np.isfinite(session.run(None, {"x": x})[0]).all()
"""


def build(path: Path, width: int, layers: int) -> int:
    """Writes Gemm-Relu layers of width x width float32 and a last one with 100 outputs; returns the bytes of both files."""
    rng = np.random.default_rng(0)
    nodes, weights, x, offset = [], [], "x", 0
    with (path.parent / "weights.bin").open("wb") as data:
        for i in range(layers + 1):
            rows = width if i < layers else 100
            for start in range(0, rows, 1000):  # no more than that in memory
                block = rng.standard_normal((min(1000, rows - start), width), np.float32)
                block *= rng.uniform(0.5, 1.5, (len(block), 1)).astype(np.float32) * np.float32((2 / width) ** 0.5)
                data.write(block.tobytes())
            weights.append(outside(f"w{i}", (rows, width), offset))
            offset += rows * width * 4
            y = f"y{i}" if i < layers else "scores"
            nodes.append(helper.make_node("Gemm", [x, f"w{i}"], [y], f"fc{i}", transB=1))
            if i < layers:
                nodes.append(helper.make_node("Relu", [y], [f"z{i}"], f"relu{i}"))
                x = f"z{i}"
    value = helper.make_tensor_value_info
    ends = [value("x", TensorProto.FLOAT, ["N", width])], [value("scores", TensorProto.FLOAT, ["N", 100])]
    graph = helper.make_graph(nodes, "large", *ends, weights)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString())
    return offset + path.stat().st_size


def outside(name: str, shape: tuple[int, ...], offset: int) -> onnx.TensorProto:
    tensor = TensorProto(name=name, dims=shape, data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "weights.bin"), ("offset", offset), ("length", int(np.prod(shape)) * 4)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


@dataclass
class Cost:
    """peak, own: MiB. seconds: of the whole process."""

    peak: float
    own: float
    seconds: float


def measured(command: list[str], folder: Path) -> Cost:
    """Runs a command to its end; SystemExit when it fails."""
    start, own, done = time.perf_counter(), 0.0, threading.Event()
    environment = os.environ | {"TMPDIR": str(folder)}
    with subprocess.Popen(command, env=environment) as process:

        def sample() -> None:
            nonlocal own
            while not done.wait(SAMPLING):
                own = max(own, anonymous(process.pid))

        watch = threading.Thread(target=sample)
        watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        done.set()
        watch.join()
    if process.returncode:
        raise SystemExit(f"failed: {' '.join(command)}")
    return Cost(usage.ru_maxrss * 1024 / MIB, own, time.perf_counter() - start)


def anonymous(pid: int) -> float:
    """MiB of a process that are not pages of files; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / MIB for line in lines if line.startswith("RssAnon")), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=12000)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--method", default="l2")
    parser.add_argument("--data", help="for methods that look at activations")
    parser.add_argument("--folder", type=Path, help="where to make the temporary folder")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-large-", dir=args.folder) as name:
        folder = Path(name)
        size = build(folder / "large.onnx", args.width, args.layers) / MIB
        print(f"{args.layers} layers of {args.width} x {args.width}: {size:.0f} MiB\n")
        print("| step | peak MiB | peak / file | own MiB | seconds |")
        print("| --- | --- | --- | --- | --- |")
        prune = ["prune", "large.onnx", "-o", "small.onnx", "--macs", f"{args.macs:g}", "--method", args.method, "-q"]
        prune += ["--data", str(Path(args.data).resolve())] if args.data else []
        steps = {
            "ONNX Runtime, original": [sys.executable, "-c", RUN, "large.onnx"],
            "onnxprune inspect": [sys.executable, "-m", "onnxprune", "inspect", "large.onnx", "--json"],
            "onnxprune prune": [sys.executable, "-m", "onnxprune", *prune],
            "onnxprune verify": [sys.executable, "-m", "onnxprune", "verify", "large.onnx", "small.onnx", "--json"],
            "ONNX Runtime, pruned": [sys.executable, "-c", RUN, "small.onnx"],
        }
        for step, command in steps.items():
            here = [str(folder / a) if a in ("large.onnx", "small.onnx") else a for a in command]
            cost = measured(here, folder)
            print(f"| {step} | {cost.peak:.0f} | {cost.peak / size:.2f} | {cost.own:.0f} | {cost.seconds:.1f} |", flush=True)
        small = sum((folder / n).stat().st_size for n in ("small.onnx", "small.onnx.data")) / MIB
        left = [p.name for p in folder.iterdir() if p.name.startswith(("onnxprune-", ".onnxprune-"))]
        print(f"\npruned: {small:.0f} MiB; temporary files left behind: {', '.join(left) or 'none'}")


if __name__ == "__main__":
    main()
