"""Weights that stay in files: a large model's tensors are read when somebody asks for their values, and not before.

Such a tensor is a *reference*: a TensorProto whose external data name a file by its absolute path, the bytes in it, and a
stamp of the file as it was found. `array` maps it, and what surgery makes goes into files of its own (`Scratch`). How a
model with references leaves the process is the business of `wire`.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import uses_external_data

from onnxprune.errors import ModelError, OutputError

Array = np.ndarray[Any, Any]

SMALL = 1 << 16  # bytes; smaller tensors of a large model are read nevertheless, as shape inference needs small constants
_CHUNK = 1 << 24
_STAMP = "onnxprune.stamp"
_SAID = "onnxprune.said"  # a reference to a tensor that said it was inside, as most only imply
# Types that NumPy does not have, by what their names begin with; those below eight bits share bytes.
_BITS = {"INT2": 2, "UINT2": 2, "INT4": 4, "UINT4": 4, "FLOAT4": 4, "FLOAT6": 6, "FLOAT8": 8, "BFLOAT16": 16}
_KINDS = {number: name for name, number in TensorProto.DataType.items()}


@dataclass(frozen=True)
class Place:
    """`length` bytes of a file from `offset` on. stamp: the file's size and time of change when it was found."""

    path: Path
    offset: int
    length: int
    stamp: str

    def checked(self) -> Path:
        """The file's path. ModelError when the file is gone or no longer what it was."""
        try:
            now = stamp_of(self.path)
        except OSError:
            hint = "keep the model's data file where it is, and the Result as long as its model"
            raise ModelError(f"the weights in {self.path} are gone", hint=hint) from None
        if now != self.stamp:
            raise ModelError(f"{self.path} has changed since the model was read", hint="start again with the new file")
        return self.path

    def chunks(self) -> Iterator[bytes]:
        """The bytes, a few megabytes at a time."""
        with self.checked().open("rb") as file:
            file.seek(self.offset)
            left = self.length
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise ModelError(f"{self.path} became shorter while it was read", hint="start again")
                left -= len(chunk)
                yield chunk


def stamp_of(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


class Scratch:
    """A temporary folder for changed weights; it goes with its last owner, or with the process. TMPDIR says where it is."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._count = 0

    def add(self, value: Array) -> Place:
        """Writes an array to a file of its own. Raises OutputError when there is no space."""
        flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
        try:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="onnxprune-")).resolve()
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            path = self._folder / str(self._count)
            self._count += 1
            flat.tofile(path)
            return Place(path, 0, flat.size, stamp_of(path))
        except OSError as error:
            hint = "set TMPDIR to a folder with space for another copy of the weights"
            raise OutputError(f"cannot keep changed weights in {tempfile.gettempdir()}: {error}", hint=hint) from None

    def drop(self, *models: onnx.ModelProto, keep: Iterable[onnx.ModelProto] = ()) -> None:
        """Deletes the files that the models refer to here; other models must not, but for those to keep."""
        kept = {place(t).path for m in keep for t in references(m)}
        for path in {place(t).path for m in models for t in references(m)} - kept:
            if path.parent == self._folder:
                path.unlink(missing_ok=True)


# -------------------------------------------------------------------------------------------- tensors of a model


def tensors(message: Any) -> Iterator[TensorProto]:
    """Every dense tensor of a model, graph, node or attribute: initializers and attributes, subgraphs' and functions' too."""
    if isinstance(message, TensorProto):
        yield message
    elif isinstance(message, onnx.ModelProto):
        yield from tensors(message.graph)
        for function in message.functions:
            yield from tensors(function)
    elif isinstance(message, onnx.GraphProto | onnx.FunctionProto):
        if isinstance(message, onnx.GraphProto):
            yield from message.initializer
        for node in message.node:
            yield from tensors(node)
    elif isinstance(message, onnx.NodeProto):
        for attribute in message.attribute:
            yield from tensors(attribute)
    elif isinstance(message, onnx.AttributeProto):
        yield from ([message.t] if message.HasField("t") else [])
        yield from message.tensors
        for graph in [*([message.g] if message.HasField("g") else []), *message.graphs]:
            yield from tensors(graph)


def references(message: Any) -> list[TensorProto]:
    """The tensors whose values are in files."""
    return [t for t in tensors(message) if uses_external_data(t)]


def nbytes(tensor: TensorProto) -> int | None:
    """How many bytes a tensor's values take as raw data, by its type and shape; None for text and unknown types."""
    count, name = prod(tensor.dims), _KINDS.get(tensor.data_type, "UNDEFINED")
    if name in ("UNDEFINED", "STRING"):
        return None
    bits = _BITS.get(name.split("E")[0]) or 8 * int(helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
    return int(-(-count * bits // 8))


def resolved(tensor: TensorProto) -> bool:
    """Whether external data are a reference, and not as the file had them."""
    return any(e.key == _STAMP for e in tensor.external_data)


def place(tensor: TensorProto) -> Place:
    """Where a reference's values are. ModelError for external data that nobody has resolved."""
    entries = {e.key: e.value for e in tensor.external_data}
    if not resolved(tensor):
        raise ModelError(f"the values of tensor '{tensor.name}' are in a file beside the model", hint="give the model's path")
    return Place(Path(entries["location"]), int(entries["offset"]), int(entries["length"]), entries[_STAMP])


def refer(tensor: TensorProto, where: Place) -> None:
    """Makes a tensor a reference; its type, shape and name stay."""
    said = tensor.HasField("data_location") and not uses_external_data(tensor)
    point(tensor, str(where.path), where.offset, where.length)
    tensor.external_data.add(key=_STAMP, value=where.stamp)
    if said:
        tensor.external_data.add(key=_SAID, value="1")


def point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Sets the external data of a tensor (ONNX IR, External Tensor Data)."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def back(tensor: TensorProto) -> None:
    """Takes away what makes a reference of a tensor, so that digests do not tell where its values were stored."""
    said = any(e.key == _SAID for e in tensor.external_data)
    del tensor.external_data[:]
    tensor.ClearField("data_location")
    if said:
        tensor.data_location = TensorProto.DEFAULT


def read(tensor: TensorProto, where: Place) -> None:
    """Gives a tensor the values in a file as its own."""
    back(tensor)
    tensor.raw_data = b"".join(where.chunks())


def array(tensor: TensorProto) -> Array:
    """The values of a tensor, read-only; those of a reference are mapped, not read."""
    if not uses_external_data(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    where = place(tensor)
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if where.length != prod(tensor.dims) * kind.itemsize:  # several values to a byte
        copy = TensorProto()
        copy.CopyFrom(tensor)
        read(copy, where)
        return np.asarray(numpy_helper.to_array(copy))
    return np.asarray(np.memmap(where.checked(), kind, "r", where.offset, tuple(tensor.dims)))


def length(tensor: TensorProto) -> int:
    """Bytes of a tensor's values where they are in a file or raw, else 0."""
    if uses_external_data(tensor):
        return place(tensor).length
    return len(tensor.raw_data)


def values(tensor: TensorProto) -> Iterable[bytes]:
    """The bytes that `length` counts."""
    return place(tensor).chunks() if uses_external_data(tensor) else [tensor.raw_data]


def tensor_of(value: Array, data_type: int, scratch: Scratch | None) -> TensorProto:
    """A nameless tensor of the given type; with a scratch folder its values go there, unless they are few."""
    kind = helper.tensor_dtype_to_np_dtype(data_type)
    typed = np.asarray(value.astype(kind, copy=False), order="C")  # a scalar stays one
    if scratch is None or typed.nbytes < max(SMALL, 1):
        return numpy_helper.from_array(typed)
    made = TensorProto(dims=typed.shape, data_type=data_type)
    if nbytes(made) != typed.nbytes:
        return numpy_helper.from_array(typed)
    refer(made, scratch.add(typed))
    return made


def copy_field(target: Any, name: str, value: Any) -> None:
    if hasattr(value, "extend"):
        getattr(target, name).extend(value)
    else:
        setattr(target, name, value)
