"""Model files and the graph IR: loading, saving, and a read-only view of a network for the analyses.

The IR is ONNX GraphSurgeon's: `Network.nodes[i]` is the GraphSurgeon node of `model.graph.node[i]`. Analyses walk the
IR; surgery edits a copy of the ModelProto itself, so that whatever is not touched stays as the exporter wrote it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from google.protobuf.message import DecodeError
from onnx import numpy_helper
from onnx.external_data_helper import load_external_data_for_model, uses_external_data

from onnxprune import control, inline
from onnxprune.control import Inside
from onnxprune.errors import ModelError, OutputError

Array = np.ndarray[Any, Any]

gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL  # its warnings would go to the user's standard output
# Operators that make as many elements as the data have them do.
DATA_DEPENDENT = {"Compress", "NonMaxSuppression", "NonZero", "Range", "Unique"}
EXTERNAL_THRESHOLD = 1024  # bytes; smaller tensors stay in the model file


# ------------------------------------------------------------------------------------------ reading and writing


def load(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """Reads an ONNX file with its external data, and simplifies it (see `inline`).

    Raises ModelError when the file is missing, is not an ONNX model, is truncated, or lacks its external data.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"no such model file: {path}", hint="give the path of an .onnx file")
    if path.is_dir():
        raise ModelError(f"{path} is a folder, not a model file", hint="give the path of an .onnx file")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError:
        raise ModelError(f"{path} is not a readable ONNX model", hint="it is truncated or of another format") from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from None
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{path} is not an ONNX model", hint="it holds no graph with operators")
    outside = [t for t in model.graph.initializer if uses_external_data(t)]
    try:
        load_external_data_for_model(model, str(path.parent))
    except (OSError, ValueError, onnx.checker.ValidationError) as error:
        text = str(error).splitlines()[0]
        raise ModelError(f"the external data of {path} cannot be read: {text}", hint="keep the data file beside it") from None
    for tensor in outside:
        tensor.ClearField("data_location")  # now like any other tensor, so that digests do not tell where it was stored
    return inline.simplified(model, str(path))


def external_files(path: str | os.PathLike[str]) -> list[Path]:
    """The files beside the model at `path` in which it keeps weights; none where it is not a model."""
    model = onnx.ModelProto()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except (OSError, DecodeError):
        return []
    entries = [e for t in model.graph.initializer if uses_external_data(t) for e in t.external_data]
    return [Path(path).parent / name for name in dict.fromkeys(e.value for e in entries if e.key == "location")]


def data_file(path: str | os.PathLike[str]) -> Path:
    """Where `save` puts the weights of a model with external data."""
    return Path(path).with_name(Path(path).name + ".data")


def writable(*paths: Path, force: bool) -> None:
    """Raises OutputError unless files can be written at all of `paths`; asked before long work, not after it."""
    for i, path in enumerate(paths):
        if any(path.absolute() == other.absolute() for other in paths[:i]):
            raise OutputError(f"two outputs would be written to {path}", hint="give each a name of its own")
        _writable(path, force=force)


def _writable(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise OutputError(f"{path} is a folder", hint="name a file to write")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is not a regular file", hint="name a file to write")
    if path.exists() and not force:
        raise OutputError(f"{path} exists already", hint="add --force to replace it, or choose another name")
    if path.parent.exists() and not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a folder, so nothing can be written in it", hint="choose another folder")
    if not path.parent.is_dir():
        raise OutputError(f"the folder {path.parent} does not exist", hint="create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".onnxprune-"):
            pass
    except OSError as error:
        raise OutputError(f"cannot write in {path.parent}: {error.strerror}", hint="choose another folder") from None


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place if, and only if, the block ends well. Raises OutputError."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".onnxprune-", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)  # mkstemp makes files that only their owner may read
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}", hint="is there space, and may you write there?") from None


def save(model: onnx.ModelProto, path: str | os.PathLike[str], *, external: bool = False) -> None:
    """Writes the model whole or not at all; with `external`, big tensors go into PATH.data beside it."""
    path = Path(path)
    if not external:
        with whole_file(path) as temporary:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
        return
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    data = data_file(path)
    with whole_file(path) as temporary, whole_file(data) as blob:  # the data are in place before the model that needs them
        _externalise(copy, blob, data.name)
        temporary.write_bytes(copy.SerializeToString(deterministic=True))


def _externalise(model: onnx.ModelProto, blob: Path, location: str) -> None:
    offset = 0
    with blob.open("wb") as out:
        for tensor in model.graph.initializer:
            raw = tensor.raw_data
            if len(raw) < EXTERNAL_THRESHOLD:
                continue
            pad = -offset % 4096  # aligned, so that a runtime can map the file
            out.write(b"\0" * pad + raw)
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", offset + pad), ("length", len(raw))):
                entry = tensor.external_data.add()
                entry.key, entry.value = key, str(value)
            offset += pad + len(raw)


def digest(model: onnx.ModelProto) -> str:
    """SHA-256 of the model's deterministic serialisation, weights included."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


# --------------------------------------------------------------------------------------------------- the network


@dataclass(frozen=True, eq=False)
class Network:
    """A model together with what one run of it told: the shape of every tensor, the value of every small integer one.

    model: the flat graph, see `control`; it is the model itself unless bodies of If, Loop or Scan are followed. shapes:
    concrete shape of every tensor, batch 1 where the batch is dynamic. values: of integer and constant tensors. feeds: the
    inputs of that run. others: the shapes of a second run, on inputs of other sizes; None if there was none. nested: the
    model itself where `model` is not. inside: what is known of its bodies.
    """

    model: onnx.ModelProto
    shapes: Mapping[str, tuple[int, ...]]
    values: Mapping[str, Array]
    feeds: Mapping[str, Array] = field(default_factory=dict)
    others: Mapping[str, tuple[int, ...]] | None = None
    nested: onnx.ModelProto | None = None
    inside: Inside = field(default_factory=Inside)

    @property
    def source(self) -> onnx.ModelProto:
        """The model as the file has it, which can be run and edited."""
        return self.model if self.nested is None else self.nested

    @cached_property
    def static(self) -> bool:
        """Whether every tensor has the same shape in every run."""
        open_sizes = any(d.dim_value <= 0 for v in self.inputs for d in v.type.tensor_type.shape.dim)
        return not open_sizes and not any(
            n.op_type in DATA_DEPENDENT or control.decides(n, self.shapes) for n in self.model.graph.node
        )

    def steady(self, tensor: str, axis: int) -> bool:
        """Whether an axis has the same size in every run, as far as a second run tells; False where it is not known."""
        if self.static or tensor in self.initializers:
            return True
        if self.others is None or tensor in self._undecided:
            return False
        return self.others.get(tensor, ())[axis : axis + 1] == (self.shapes[tensor][axis],)

    @cached_property
    def _undecided(self) -> set[str]:
        """Tensors whose sizes may hang on a condition that had one value in both runs."""
        found: set[str] = set()
        for i in self.order:
            node = self.model.graph.node[i]
            if control.decides(node, self.shapes) or any(x in found for x in node.input):
                found.update(node.output)
        return found

    @cached_property
    def graph(self) -> gs.Graph:
        return gs.import_onnx(self.model)

    @cached_property
    def nodes(self) -> list[gs.Node]:
        return list(self.graph.nodes)

    @cached_property
    def order(self) -> list[int]:
        """Node indices in topological order (exporters do write unsorted graphs)."""
        producer = self.producer
        order: list[int] = []
        state = [0] * len(self.model.graph.node)
        for root in range(len(state)):
            stack = [(root, False)]
            while stack:
                i, done = stack.pop()
                if done:
                    order.append(i)
                elif not state[i]:
                    state[i] = 1
                    stack.append((i, True))
                    stack.extend(
                        (producer[x], False) for x in reversed(self.reads(i)) if x in producer and not state[producer[x]]
                    )
        return order

    @cached_property
    def producer(self) -> dict[str, int]:
        """The node that makes each tensor."""
        return {o: i for i, n in enumerate(self.model.graph.node) for o in n.output if o}

    def reads(self, index: int) -> list[str]:
        """Names of all tensors that node `index` reads, those captured by its subgraphs included."""
        return [x for x in self.model.graph.node[index].input if x] + self.captured[index]

    @cached_property
    def captured(self) -> list[list[str]]:
        """For every node the outer tensors that its subgraphs (If, Loop, Scan bodies) read."""
        return [control.captured(n) for n in self.model.graph.node]

    @cached_property
    def read_elsewhere(self) -> set[str]:
        """The tensors that `uses` does not tell all about: graph outputs, and what subgraphs capture."""
        return {x for names in self.captured for x in names}.union(self.outputs)

    @cached_property
    def initializers(self) -> dict[str, onnx.TensorProto]:
        """Every constant tensor of the file: initializers and outputs of Constant nodes."""
        found = {t.name: t for t in self.model.graph.initializer}
        for node in self.model.graph.node:
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
                value = inline.constant_value(node)
                if value is not None:
                    found[node.output[0]] = value
        return found

    @cached_property
    def kinds(self) -> dict[str, np.dtype[Any]]:
        """The NumPy type of every constant tensor."""
        return {k: np.dtype(onnx.helper.tensor_dtype_to_np_dtype(t.data_type)) for k, t in self.initializers.items()}

    @cached_property
    def uses(self) -> dict[str, list[tuple[int, int]]]:
        """For every tensor the (node, input position) pairs that read it."""
        uses: dict[str, list[tuple[int, int]]] = {}
        for i, node in enumerate(self.model.graph.node):
            for position, name in enumerate(node.input):
                if name:
                    uses.setdefault(name, []).append((i, position))
        return uses

    @cached_property
    def fixed(self) -> set[str]:
        """Tensors computed from constants alone (weights behind Identity, Transpose, Cast ...), constants included."""
        fixed = set(self.initializers)
        for i in self.order:
            node = self.model.graph.node[i]
            constant = node.op_type == "Constant" or (bool(node.input) and all(x in fixed for x in self.reads(i)))
            if constant and not node.op_type.startswith("Random") and node.domain != control.FLAT:
                fixed.update(o for o in node.output if o)
        return fixed

    @cached_property
    def inputs(self) -> list[onnx.ValueInfoProto]:
        """Graph inputs proper: those that are not initializers."""
        return graph_inputs(self.model)

    @cached_property
    def outputs(self) -> list[str]:
        return [o.name for o in self.model.graph.output]

    @cached_property
    def opset(self) -> int:
        return next((o.version for o in self.model.opset_import if o.domain in ("", "ai.onnx")), 1)

    def array(self, name: str) -> Array | None:
        """The value of a constant tensor, or of one that the probe run recorded; None when it is unknown."""
        if name in self.initializers:
            return np.asarray(numpy_helper.to_array(self.initializers[name]))
        return self.values.get(name)

    def label(self, index: int) -> str:
        """What to call node `index` in a report: its name where it has one of its own, else its first output."""
        node = self.model.graph.node[index]
        return node.name if node.name and self._names[node.name] == 1 else next((o for o in node.output if o), f"#{index}")

    @cached_property
    def _names(self) -> dict[str, int]:
        count: dict[str, int] = {}
        for node in self.model.graph.node:
            count[node.name] = count.get(node.name, 0) + 1
        return count


def graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller must feed: those without an initializer behind them."""
    constants = {t.name for t in model.graph.initializer} | {t.values.name for t in model.graph.sparse_initializer}
    return [i for i in model.graph.input if i.name not in constants]
