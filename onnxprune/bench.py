"""`onnxprune bench`: models side by side in ONNX Runtime, their time, memory and size, and why time and MACs differ."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import files
from onnxprune.data import ImageOptions, open_data
from onnxprune.errors import ModelError, OptionError
from onnxprune.graph import Array
from onnxprune.imported import Imported, load
from onnxprune.timing.memory import peak_memory
from onnxprune.timing.models import Setting, batched, runner, runs
from onnxprune.timing.profile import Kernel, profiled
from onnxprune.timing.rounds import Rounds, interleaved
from onnxprune.timing.shortfall import by_kind, shortfall

SLOWEST = 12  # nodes of a profile that are listed


@dataclass(frozen=True, eq=False)
class Entry:
    """One model to be timed: its file, what it consists of, the inputs that it is run on."""

    path: Path
    imported: Imported
    feeds: dict[str, Array]

    @property
    def samples(self) -> int:
        """How many samples one run takes: the length of the first axis of its inputs."""
        return next((a.shape[0] for a in self.feeds.values() if a.ndim), 1)

    @property
    def bytes(self) -> int:
        """Of the file, with those of its external data."""
        return sum(p.stat().st_size for p in (self.path, *files.external_files(self.path)))


def bench(
    models: Sequence[str | os.PathLike[str]],
    *,
    batch: int | None = None,
    threads: int | None = None,
    providers: Sequence[str] = ("cpu",),
    data: Any = None,
    images: ImageOptions | None = None,
    shape: Sequence[str] = (),
    profile: bool = False,
    limit: float = 10.0,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Times model files in turn on the same inputs, and says what each is made of. JSON-ready, times in seconds.

    batch: samples for one run, where the models leave it open. data: what to run on, by default pseudo-random inputs.
    limit: seconds for every model. Raises ModelError, OptionError and DataError for what cannot be run so.
    """
    tell = progress or (lambda stage, done, total: None)
    setting = Setting.of(threads, providers)
    if batch is not None and batch < 1:
        raise OptionError(f"--batch must be at least 1, not {batch}")
    if limit <= 0:
        raise OptionError(f"--seconds must be positive, not {limit:g}")
    entries: list[Entry] = []
    for i, model in enumerate(models):
        entries.append(_entry(Path(model), entries[:1], batch, data, images, shape, setting))
        tell("load", i + 1, len(models))
    memory = []
    for i, entry in enumerate(entries):
        memory.append(peak_memory(entry.path, entry.feeds, setting))
        tell("memory", i + 1, len(models))
    rounds = interleaved([runner(e.path, e.feeds, setting) for e in entries], limit=limit * len(entries))
    tell("time", 1, 1)
    report: dict[str, Any] = {
        **setting.to_json(),
        "batch": entries[0].samples,
        "inputs": "random" if data is None else "data",
        "rounds": len(rounds),
        "models": [_told(entries, m, rounds, memory[m]) for m in range(len(entries))],
    }
    if profile:
        timed = [spread.median for spread in rounds.spreads]
        found = [profiled(e.path, e.feeds, setting, limit=limit / 2, latency=t) for e, t in zip(entries, timed, strict=True)]
        report["profile"] = [_profile(entries, m, rounds, found) for m in range(len(entries))]
    return report


def _entry(
    path: Path,
    first: Sequence[Entry],
    batch: int | None,
    data: Any,
    images: ImageOptions | None,
    shape: Sequence[str],
    setting: Setting,
) -> Entry:
    """A model with inputs: those of the first one where it takes them."""
    imported = load(path, data=data, images=images, shape=shape)
    if first and _takes(path, imported.model, first[0].feeds, setting):
        return Entry(path, imported, first[0].feeds)
    if data is None:
        feeds = batched(imported.model, imported.groups.net.feeds, batch)
    else:
        samples = open_data(data, imported.specs, images)
        fixed = next((s.shape[0] for s in imported.specs if s.shape and s.shape[0]), None)
        if fixed and batch and fixed != batch:
            batched(imported.model, imported.groups.net.feeds, batch)  # which says what does not fit
        feeds = dict(samples.batch(np.resize(np.arange(len(samples)), fixed or batch or 1)))
    if not runs(path, feeds, setting):
        raise ModelError(f"{path} does not run with a batch of {batch or 1}", hint="its graph may count on another batch")
    return Entry(path, imported, feeds)


def _takes(path: Path, model: onnx.ModelProto, feeds: dict[str, Array], setting: Setting) -> bool:
    """Whether a model has the inputs of another one."""
    wanted = {i.name for i in model.graph.input} - {t.name for t in model.graph.initializer}
    return wanted == set(feeds) and runs(path, feeds, setting)


def _told(entries: Sequence[Entry], m: int, rounds: Rounds, memory: int | None) -> dict[str, Any]:
    entry, latency, ratio = entries[m], rounds.spreads[m], rounds.ratio(m)
    size, first = entry.imported.size, entries[0].imported.size
    return {
        "model": str(entry.path),
        "latency": latency.to_json(),
        "throughput": entry.samples / latency.median,
        "ratio": ratio.to_json(),
        "speedup": 1 / ratio.median,
        "peak_memory": memory,
        "macs": size.macs,
        "macs_ratio": size.macs / first.macs if first.macs else None,
        "params": size.params,
        "bytes": entry.bytes,
    }


def _profile(entries: Sequence[Entry], m: int, rounds: Rounds, found: Sequence[Sequence[Kernel]]) -> dict[str, Any]:
    """Time by kind of kernel and the slowest nodes; of all but the first model also where it falls short of its MACs."""
    slowest = sorted(found[m], key=lambda k: -k.median)[:SLOWEST]
    told: dict[str, Any] = {
        "model": str(entries[m].path),
        "kinds": [{"kind": kind, "seconds": seconds} for kind, seconds in by_kind(found[m]).items()],
        "nodes": [{"node": k.node, "kind": k.kind, "provider": k.provider, "seconds": k.median} for k in slowest],
    }
    before, after = entries[0].imported.size.macs, entries[m].imported.size.macs
    if m and before:
        latencies = (rounds.spreads[0].median, rounds.spreads[m].median)
        told["macs_ratio"], told["ratio"] = after / before, rounds.ratio(m).median
        told["shortfall"] = [c.to_json() for c in shortfall(found[0], found[m], after / before, latencies)]
    return told
