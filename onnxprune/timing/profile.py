"""Time by operator, from ONNX Runtime's own profiler."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune import runtime
from onnxprune.timing.models import Feeds, Model, Setting

LEAST, MOST = 5, 200  # runs of a profile
SKIP = 2  # the first runs, which allocate memory
BLOCKED = "_nchwc"  # how ONNX Runtime names convolutions that it has moved to its blocked channel layout
SPATIAL = ("Conv", "FusedConv", "ConvTranspose", "QLinearConv", "ConvInteger")


@dataclass(frozen=True)
class Kernel:
    """One node of the optimised graph: its name, operator and provider, and the seconds that each run spent in it.

    shapes: of its inputs, as far as the profile tells.
    """

    node: str
    op: str
    provider: str
    seconds: tuple[float, ...]
    shapes: tuple[tuple[int, ...], ...] = ()

    @property
    def median(self) -> float:
        return float(np.median(self.seconds))

    @property
    def undisturbed(self) -> float:
        """The mean of the fastest fifth of the runs: interruptions only lengthen one, and a clock of microseconds rounds."""
        return float(np.mean(np.sort(self.seconds)[: max(1, len(self.seconds) // 5)]))

    @property
    def kind(self) -> str:
        """The operator, of a convolution with its kernel size, whether it is depthwise and in the blocked layout."""
        if self.op not in SPATIAL or len(self.shapes) < 2:
            return self.op
        weight = max(self.shapes[1:], key=len)  # the quantised one has scales before it
        taps = "x".join(str(n) for n in weight[2:])
        depthwise = " depthwise" if self.op != "ConvTranspose" and weight[1:2] == (1,) and self.shapes[0][1:2] != (1,) else ""
        return f"{self.op} {taps}{depthwise}{' blocked' if self.blocked else ''}"

    @property
    def blocked(self) -> bool:
        return self.node.endswith(BLOCKED)


def profiled(model: Model, feeds: Feeds, setting: Setting, *, limit: float = 2.0, latency: float | None = None) -> list[Kernel]:
    """The kernels of a model over some runs, as many as `limit` seconds allow; the first runs do not count.

    latency: seconds of a run when it was timed, without the profiler. A run with it cannot be shorter: where it is, the machine
    has become faster since, and the kernels' times are those that they would have had before.
    The profiler's clock counts microseconds, and on a GPU it tells when kernels were launched, not how long they ran.
    """
    with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
        session = setting.session(model, profile=str(Path(folder) / "profile"))
        taken: list[float] = []
        start = time.perf_counter()
        while len(taken) < LEAST + SKIP or (len(taken) < MOST and time.perf_counter() - start < limit):
            before = time.perf_counter()
            runtime.run(session, feeds)
            taken.append(time.perf_counter() - before)
        return slowed(profile_of(session, skip=SKIP), float(np.median(taken[SKIP:])), latency)


def slowed(found: list[Kernel], taken: float, latency: float | None) -> list[Kernel]:
    """Kernels of runs that took so long, as they were when a run took `latency`, if that is longer."""
    factor = max(1.0, (latency or 0.0) / taken)
    return [replace(k, seconds=tuple(factor * s for s in k.seconds)) for k in found]


def profile_of(session: Any, skip: int = 0) -> list[Kernel]:
    """Ends the profile of a session; its kernels, without the first `skip` runs."""
    return kernels(json.loads(Path(session.end_profiling()).read_text()), skip=skip)


def kernels(events: Iterable[dict[str, Any]], skip: int = 0) -> list[Kernel]:
    """The kernels that a profile tells of, without the first `skip` runs."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
            args = event["args"]
            found.setdefault((str(args.get("node_index", event["name"])), str(args["op_name"])), []).append(event)
    return [_kernel(op, events, skip) for (_, op), events in found.items()]


def _kernel(op: str, events: list[dict[str, Any]], skip: int) -> Kernel:
    args = events[0]["args"]
    shapes = tuple(tuple(int(d) for d in shape) for typed in args.get("input_type_shape", ()) for shape in typed.values())
    seconds = tuple(e["dur"] * 1e-6 for e in events[skip:] or events)
    return Kernel(str(events[0]["name"]).removesuffix("_kernel_time"), op, str(args.get("provider", "")), seconds, shapes)
