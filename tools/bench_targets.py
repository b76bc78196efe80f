#!/usr/bin/env python3
"""Measure what widths are good for time in ONNX Runtime on this machine; prints the tables of docs/latency.md.

    python tools/bench_targets.py stairs [--threads 1]
    python tools/bench_targets.py speed [--threads 2] [--macs 0.5] [--batches 1 8] [--targets generic onnxruntime-cpu]
    python tools/bench_targets.py latency [--threads 2] [--keep 0.6]

Networks have random weights (`networks.py`); `--nets` chooses among them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import networks
import onnx

import onnxprune
from onnxprune.bench import bench
from onnxprune.timing.layers import Spec
from onnxprune.timing.meter import Meter
from onnxprune.timing.models import Setting

NETS = ("resnet50", "vgg16", "mobilenet_v2", "efficientnet_lite0")
WIDTHS = (64, 63, 62, 60, 56, 52, 50, 49, 48, 47, 40, 33, 32, 16)
HOW = {"method": "l1", "recover": "none"}


def stairs(threads: int) -> None:
    """Microseconds of convolutions on 28 x 28 pixels between 64 channels, and fewer in or out."""
    meter = Meter(Setting.of(threads))
    print("| convolution, 28x28 | varied | " + " | ".join(map(str, WIDTHS)) + " |")
    print("| --- " * (len(WIDTHS) + 2) + "|")
    for k in (1, 3):
        pads = onnx.helper.make_attribute("pads", [k // 2] * 4).SerializeToString().hex()
        spec = Spec("Conv", (pads,), (1, 64, 28, 28), (64, 64, k, k), True, "float32", 17, "pair")
        for varied in ("in", "out"):
            times = [meter.layer(spec, *((n, 64) if varied == "in" else (64, n)), 0.5) for n in WIDTHS]
            print(f"| {k}x{k} | {varied} | " + " | ".join(f"{1e6 * t:.0f}" for t in times) + " |", flush=True)


def speed(args: argparse.Namespace) -> None:
    """Speed-up at a budget of MACs, by target and batch, beside the original in turn."""
    print("| network | target | MACs kept | " + " | ".join(f"batch {b}" for b in args.batches) + " |")
    print("| --- " * (len(args.batches) + 3) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for name in args.nets:
            original = Path(folder) / f"{name}.onnx"
            onnx.save(networks.NETS[name](), original)
            for target in args.targets:
                pruned = Path(folder) / f"{name}.{target}.onnx"
                onnxprune.prune(original, budget={"macs": args.macs}, target=target, **HOW).save(pruned, force=True)
                cells = []
                for batch in args.batches:
                    report = bench([original, pruned], batch=batch, threads=args.threads, limit=args.seconds / 2)
                    m = report["models"][1]
                    low, high = 1 / m["ratio"]["high"], 1 / m["ratio"]["low"]
                    cells.append(f"{m['speedup']:.2f} ({low:.2f} - {high:.2f}, {report['rounds']} rounds)")
                print(f"| {name} | {target} | {m['macs_ratio']:.3f} | " + " | ".join(cells) + " |", flush=True)


def latency(args: argparse.Namespace) -> None:
    """What a budget of latency predicts and what is measured."""
    print("| network | asked | predicted | measured | quartiles | MACs kept | tables | trials |")
    print("| --- " * 8 + "|")
    for name in args.nets:
        model = networks.NETS[name]()
        report = onnxprune.prune(model, budget={"latency": args.keep}, threads=args.threads, **HOW).report
        told, part = report["latency"], report["latency"]["measured"]
        kept = report["pruned"]["macs"] / report["original"]["macs"]
        quartiles = f"{part['low']:.3f} - {part['high']:.3f}"
        print(
            f"| {name} | {args.keep:g} | {told['predicted']:.3f} | {part['median']:.3f} | {quartiles} "
            f"| {kept:.3f} | {report['seconds']['measure']:.0f} s | {report['seconds']['sample']:.0f} s |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("stairs", "speed", "latency"))
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--nets", nargs="+", choices=tuple(networks.NETS), default=list(NETS))
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--targets", nargs="+", default=["generic", "onnxruntime-cpu"])
    parser.add_argument("--seconds", type=float, default=20.0)
    args = parser.parse_args()
    if args.what == "stairs":
        stairs(args.threads or 1)
    else:
        args.threads = args.threads or 2
        (speed if args.what == "speed" else latency)(args)


if __name__ == "__main__":
    main()
