"""Models ready to be timed: sessions with stated threads and providers, and the inputs that they are run on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx

from onnxprune import runtime
from onnxprune.errors import ModelError, OptionError
from onnxprune.graph import Array, graph_inputs

Model = onnx.ModelProto | Path
Feeds = Mapping[str, Array]
CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Setting:
    """How models are run while they are timed: threads within an operator, and execution providers by their full names."""

    threads: int
    providers: tuple[str, ...] = (CPU,)

    @staticmethod
    def of(threads: int | None = None, providers: Sequence[str] = ("cpu",)) -> Setting:
        """threads: by default those that every session of this process has. providers: short or full names.

        Raises OptionError for no thread, or a provider that this ONNX Runtime does not have.
        """
        if threads is not None and threads < 1:
            raise OptionError(f"--threads must be at least 1, not {threads}")
        return Setting(threads or runtime.default_threads() or 1, tuple(runtime.providers(providers)))

    @property
    def on_cpu(self) -> bool:
        return self.providers[0] == CPU

    def session(self, model: Model, profile: str | None = None) -> Any:
        """A session; ModelError when ONNX Runtime refuses the model, OptionError when it falls back from the provider."""
        return runtime.session(model, providers=self.providers, threads=self.threads, profile=profile, spin=False)

    def to_json(self) -> dict[str, Any]:
        return {"threads": self.threads, "providers": list(self.providers)}


def runner(model: Model, feeds: Feeds, setting: Setting) -> Callable[[], Any]:
    """A call that runs the model once on these inputs, which has been tried. Raises ModelError when it fails."""
    session = setting.session(model)
    runtime.run(session, feeds)
    names = {i.name for i in session.get_inputs()}
    return partial(session.run, None, {k: v for k, v in feeds.items() if k in names})


def batched(model: onnx.ModelProto, feeds: Feeds, batch: int | None) -> dict[str, Array]:
    """Pseudo-random inputs of the sizes of `feeds`, the first axis as long as `batch` where the model leaves it open.

    Raises OptionError where an input's batch is another one and fixed.
    """
    shapes = {name: tuple(array.shape) for name, array in feeds.items()}
    for value in graph_inputs(model) if batch is not None else ():
        declared = runtime.input_shape(value)
        if not declared or declared[0] == batch:
            continue
        if declared[0] is not None:
            raise OptionError(
                f"--batch {batch} does not fit: input '{value.name}' has a fixed first axis of {declared[0]}",
                hint="export the model with a dynamic batch, or leave --batch out",
            )
        shapes[value.name] = (batch, *shapes[value.name][1:])
    return runtime.example_feeds(model, shapes=shapes)


def runs(model: Model, feeds: Feeds, setting: Setting) -> bool:
    """Whether a model takes these inputs."""
    try:
        runtime.run(setting.session(model), feeds)
    except ModelError:
        return False
    return True
