"""The original model, which tells what the outputs should be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import onnx
import torch

from onnxprune import runtime
from onnxprune.graph import Array
from onnxprune.torchgraph import TorchGraph

Tensor: TypeAlias = Any


class Teacher:
    """Answers by tensor name: of ONNX Runtime on the CPU, where it is the quicker one, of torch elsewhere."""

    def __init__(self, model: onnx.ModelProto, wanted: Sequence[str], device: str, threads: int) -> None:
        self._wanted = list(wanted)
        self._graph = None if device == "cpu" else TorchGraph(model, device=device)
        self._session = None
        if self._graph is None:
            self._session = runtime.session(runtime.with_outputs(model, wanted), threads=threads)

    def answer(self, feeds: Mapping[str, Array], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The wanted tensors, without gradients. feeds and tensors: the same inputs."""
        if self._graph is not None:
            with torch.no_grad():
                return {k: v.float() for k, v in self._graph.run(tensors, self._wanted).items()}
        made = runtime.run(self._session, feeds, self._wanted)
        return {k: torch.from_numpy(v).float() for k, v in zip(self._wanted, made, strict=True)}
