"""What takes the time of one layer by itself, or of networks beside each other; tests put a made-up machine in its place."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from onnxprune import runtime
from onnxprune.timing.layers import Spec
from onnxprune.timing.models import Feeds, Setting, runner
from onnxprune.timing.profile import profile_of
from onnxprune.timing.rounds import Rounds, fastest, interleaved

LAYOUT = ("ReorderInput", "ReorderOutput")  # at the ends of a small model; within a network layers hand the blocked layout on
SHORT, MANY = 5e-4, 60  # seconds of a run, and how many more of them it takes to see below the profiler's microseconds


@dataclass(frozen=True)
class Meter:
    """A machine: ONNX Runtime with stated threads and providers on this processor."""

    setting: Setting

    @property
    def key(self) -> dict[str, Any]:
        """What the times depend on, beside the models."""
        return {"onnxruntime": runtime.version(), "processor": processor(), **self.setting.to_json()}

    def layer(self, spec: Spec, inputs: int, outputs: int, limit: float) -> float:
        """Seconds of a layer of these widths when it is not interrupted, found within `limit` seconds.

        On the CPU by the profiler, without the conversions to and from the blocked layout at its ends.
        """
        model, feeds = spec.model(inputs, outputs)
        if not self.setting.on_cpu:
            return fastest(_bound(self.setting.session(model), feeds), limit=limit)
        with tempfile.TemporaryDirectory(prefix="onnxprune-") as folder:
            session = self.setting.session(model, profile=str(Path(folder) / "profile"))
            call = partial(session.run, None, feeds)
            if fastest(call, limit=limit) < SHORT:
                for _ in range(MANY):
                    call()
            return sum(k.undisturbed for k in profile_of(session) if k.op not in LAYOUT)

    def networks(self, models: Sequence[onnx.ModelProto], feeds: Feeds, limit: float) -> Rounds:
        """Whole networks in turn on the same inputs."""
        return interleaved([runner(m, feeds, self.setting) for m in models], limit=limit)


def _bound(session: Any, feeds: Feeds) -> Any:
    """A run on inputs and outputs that stay where the provider has them."""
    binding = session.io_binding()
    for name, array in feeds.items():
        binding.bind_cpu_input(name, array)
    device = "cuda" if any("CUDA" in p or "Tensorrt" in p for p in session.get_providers()) else "cpu"
    for output in session.get_outputs():
        binding.bind_output(output.name, device)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def processor() -> str:
    """The processor's name, as far as the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith(("model name", "flags"))]
    model = named[0] if named else platform.processor() or platform.machine()
    wide = [f for f in ("avx2", "avx512f", "avx512_vnni", "amx_tile") if len(named) > 1 and f in named[1].split()]
    return " ".join([model, *wide])
