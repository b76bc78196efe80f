#!/usr/bin/env python3
"""What `--recover lsq` and `--method obs` cost, as multiples of plain inference of the same images in ONNX Runtime.

    python tools/bench_recovery.py FILE.onnx --data IMAGES --size 224 224 [--images 128] [--macs 0.7] [--rounds 2] [--threads 2]

Recovery is that of a model cut to `--macs` by the L2 norm; obs is influence and elimination, all that comes before the cut.
Runs of the model surround every measurement, and the ratio is to the mean of the two. First with one thread by CPU time, which
says little of who else is busy; then with `--threads` by the clock, which is what a user waits for.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

THREADS = ("ONNXPRUNE_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--size", type=int, nargs=2, default=None, metavar=("H", "W"))
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--macs", type=float, default=0.7)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("lsq", "obs"))
    parser.add_argument("--here", type=int, help=argparse.SUPPRESS)  # with so many threads, in this process
    return parser.parse_args()


def works(args: argparse.Namespace) -> tuple[Callable[[], None], dict[str, Callable[[], Any]]]:
    """(inference of all images, what is measured beside it)."""
    from onnxprune import runtime
    from onnxprune.budget import Budget
    from onnxprune.contraction import consumers
    from onnxprune.criteria.plain import PLAIN
    from onnxprune.data import ImageOptions, choose, open_data
    from onnxprune.finish import batches
    from onnxprune.imported import load
    from onnxprune.influence import influences, samples_for
    from onnxprune.passes.allocate import allocate
    from onnxprune.passes.calibrate import calibrate
    from onnxprune.passes.eliminate import eliminate
    from onnxprune.passes.recover import recover
    from onnxprune.passes.sample import sample
    from onnxprune.passes.surgery import reweightable, surgery
    from onnxprune.selection import Selector

    images = ImageOptions(size=tuple(args.size)) if args.size else ImageOptions()
    imported = load(args.model, images=images)
    groups, prunable = imported.groups, imported.groups.prunable
    source = open_data(args.data, imported.specs, images)
    order = choose(len(source), None, 0)[: args.images]
    feeds = list(batches(groups, source, order, None))
    session = runtime.session(imported.model)

    weights = {g.id: reweightable(groups, g) for g in prunable}
    selector = Selector(prunable, calibrate(groups, PLAIN["l2"](), None, None), "top", rescalable=weights)
    chosen = allocate(imported.accounting, prunable, selector, Budget("macs", args.macs)).choices
    plan = sample(prunable, chosen, selector, groups.net.digest, True)[0]
    cut = surgery(groups, plan)

    def inference() -> None:
        for feed in feeds:
            runtime.run(session, feed)

    def obs() -> None:
        layers = consumers(groups)
        few = order[: samples_for(len(layers), len(order))]
        weight = influences(groups.net, layers, batches(groups, source, few, None))
        eliminate(groups, lambda: iter(feeds), len(order), influence=weight)

    def lsq() -> None:
        recover(imported.groups, plan, cut, feeds)  # as long as it is imported its temporary files are there

    return inference, {"lsq": lsq, "obs": obs}


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds of (CPU, clock)."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return time.process_time() - cpu, time.perf_counter() - wall


def measured(args: argparse.Namespace) -> Iterator[str]:
    inference, others = works(args)
    kind = "CPU" if args.here == 1 else "wall"
    which = 0 if args.here == 1 else 1
    inference()
    for round_ in range(args.rounds):
        before = timed(inference)[which]
        for name, work in others.items():
            if args.only in (None, name):
                cost, after = timed(work)[which], timed(inference)[which]
                ratio = cost / (0.5 * (before + after))
                told = (f"{before:.1f}, {after:.1f} s", f"{cost:.1f} s", f"{ratio:.2f}")
                yield f"| {' | '.join((name, str(args.here), str(round_ + 1), kind, *told))} |"
                before = after
    yield f"\nPeak with {args.here} threads: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB\n"


def main() -> None:
    args = arguments()
    if args.here:
        for line in measured(args):
            print(line, flush=True)
        return
    print(f"{args.images} images, {args.macs} of the MACs; load {os.getloadavg()[0]:.1f} at the start\n")
    print(
        "| what | threads | round | time | inference | cost | ratio |\n| --- | --- | --- | --- | --- | --- | --- |", flush=True
    )
    for threads in dict.fromkeys((1, args.threads)):
        # idle BLAS threads sleep, as they do on the command line
        own = {**os.environ, **dict.fromkeys(THREADS, str(threads)), "OPENBLAS_THREAD_TIMEOUT": "4"}
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--here", str(threads)], env=own, check=True)


if __name__ == "__main__":
    main()
