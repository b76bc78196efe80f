"""Runs a model piece by piece, so that the weights of a layer can be set when what it reads is known, and not before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from onnxprune import control, runtime
from onnxprune.errors import ModelError
from onnxprune.graph import Array

LEAST, MOST = 512 << 20, 4 << 30  # bytes of arrays in memory; what is beyond goes to a temporary file


def spare_memory() -> int:
    """A quarter of the memory that nobody uses, within limits: files cost more time than the products over their rows."""
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not everywhere is it told
        free = 0
    return min(max(free // 4, LEAST), MOST)


class Shelf:
    """Keeps arrays: in memory up to a limit (bytes), then in temporary files that are mapped."""

    def __init__(self, limit: int | None = None) -> None:
        self._left = spare_memory() if limit is None else limit
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._count = 0

    def put(self, value: Array) -> Array:
        """The array, or one like it in a file; `drop` it when it is no longer needed."""
        if value.nbytes <= self._left or value.nbytes < 1 << 16:
            self._left -= value.nbytes
            return value
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="onnxprune-")
        self._count += 1
        mapped = np.memmap(Path(self._folder.name) / str(self._count), value.dtype, "w+", shape=value.shape)
        mapped[...] = value
        return mapped

    def drop(self, value: Array) -> None:
        if isinstance(value, np.memmap):
            Path(str(value.filename)).unlink(missing_ok=True)
        else:
            self._left += value.nbytes


class Replay:
    """A model, the batches that it runs on, and how far it has come.

    model: of which weights may be set as long as no piece that reads them has run. Nodes run once, each in the first piece
    in which all that it reads is there.
    """

    def __init__(
        self, model: onnx.ModelProto, batches: Iterable[Mapping[str, Array]], providers: Sequence[str] | None = None
    ) -> None:
        self.model, self._providers = model, providers
        self.nodes = list(model.graph.node)
        self._shelf = Shelf()
        self.batches = [{k: self._shelf.put(v) for k, v in b.items()} for b in batches]
        self._outputs = {o.name for o in model.graph.output}
        self.look_again()
        self._producer = {o: i for i, n in enumerate(self.nodes) for o in n.output if o}
        self._fixed = self._constant_nodes()
        self._left = set(range(len(self.nodes))) - self._fixed

    def look_again(self) -> None:
        """What the nodes read, after some were given new constants."""
        self._initializers = {t.name for t in self.model.graph.initializer}
        self._reads = [[x for x in n.input if x] + control.captured(n) for n in self.nodes]

    def _constant_nodes(self) -> set[int]:
        """Nodes that read constants only: every piece that needs one has it."""
        fixed: set[int] = set()
        known = set(self._initializers)
        for i in self._order():
            constant = self.nodes[i].op_type == "Constant" or (self._reads[i] and all(x in known for x in self._reads[i]))
            if constant and not self.nodes[i].op_type.startswith("Random"):
                fixed.add(i)
                known.update(self.nodes[i].output)
        return fixed

    def _order(self) -> list[int]:
        """All nodes so that each comes after those that it reads."""
        waiting = [sum(x in self._producer for x in set(reads)) for reads in self._reads]
        readers: dict[str, list[int]] = {}
        for i, reads in enumerate(self._reads):
            for x in set(reads):
                readers.setdefault(x, []).append(i)
        order = [i for i, n in enumerate(waiting) if n == 0]
        for i in order:
            for name in self.nodes[i].output:
                for reader in readers.get(name, ()) if name else ():
                    waiting[reader] -= 1
                    if waiting[reader] == 0:
                        order.append(reader)
        return order

    @property
    def available(self) -> set[str]:
        """The tensors that have been computed and are still needed."""
        return set(self.batches[0])

    def advance(self, blocked: Collection[int]) -> bool:
        """Runs every node that can run without the blocked ones; False when there is none."""
        piece, known = [], self.available | self._initializers | {o for i in self._fixed for o in self.nodes[i].output}
        waiting = {i: sum(x not in known for x in set(self._reads[i])) for i in self._left - set(blocked)}
        readers: dict[str, list[int]] = {}
        for i in waiting:
            for x in set(self._reads[i]):
                readers.setdefault(x, []).append(i)
        ready = sorted((i for i, n in waiting.items() if n == 0), reverse=True)
        while ready:
            i = ready.pop()
            piece.append(i)
            for name in {o for o in self.nodes[i].output if o and o not in known}:
                known.add(name)
                for reader in readers.get(name, ()):
                    waiting[reader] -= 1
                    if waiting[reader] == 0:
                        ready.append(reader)
        if not piece:
            return False
        self._run(piece)
        return True

    def _run(self, piece: list[int]) -> None:
        self._left -= set(piece)
        made = [o for i in piece for o in self.nodes[i].output if o]
        needed = {x for i in self._left for x in self._reads[i]} | self._outputs
        outputs = [o for o in made if o in needed]
        inside = self._with_constants(piece)
        inputs = sorted({x for i in inside for x in self._reads[i]} & self.available)
        model = self._piece(inside, inputs, outputs)
        session = runtime.session(model, providers=self._providers, spin=False)
        for batch in self.batches:
            found = runtime.run(session, {name: np.asarray(batch[name]) for name in inputs}, outputs)
            for name, value in zip(outputs, found, strict=True):
                if not isinstance(value, np.ndarray):
                    raise ModelError(f"tensor '{name}' is no array")
                batch[name] = self._shelf.put(value)
            for name in [n for n in batch if n not in needed]:
                self._shelf.drop(batch.pop(name))

    def _with_constants(self, piece: list[int]) -> list[int]:
        """The nodes of a piece with those that compute its constants, in an order that runs."""
        found: list[int] = []
        seen: set[int] = set()
        for root in piece:
            stack = [(root, False)]
            while stack:
                i, done = stack.pop()
                if done:
                    found.append(i)
                elif i not in seen:
                    seen.add(i)
                    stack.append((i, True))
                    makers = (self._producer[x] for x in self._reads[i] if x in self._producer)
                    stack.extend((m, False) for m in makers if m in self._fixed or m in piece)
        return found

    def _piece(self, nodes: list[int], inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
        model = onnx.ModelProto(ir_version=self.model.ir_version)
        model.opset_import.extend(self.model.opset_import)
        graph = model.graph
        graph.name = "piece"
        graph.node.extend(self.nodes[i] for i in nodes)
        used = {x for i in nodes for x in self._reads[i]}
        graph.initializer.extend(t for t in self.model.graph.initializer if t.name in used)
        for name in inputs:
            kind = helper.np_dtype_to_tensor_dtype(self.batches[0][name].dtype)
            graph.input.append(helper.make_tensor_value_info(name, kind, None))
        if model.ir_version < 4:
            for tensor in graph.initializer:
                graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        return model
