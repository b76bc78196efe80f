"""Weights that stay in files: a large model's tensors are read when somebody asks for their values, and not before.

Such a tensor is a *reference*: a TensorProto whose external data name a file by its absolute path, the bytes in it, and a
stamp of the file as it was found. `array` maps it, and what surgery makes goes into files of its own (`Scratch`). How a
model with references leaves the process is the business of `wire`.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import TensorProto, helper, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from onnxprune.errors import ModelError, OutputError

Array = np.ndarray[Any, Any]

LARGE = 64 << 20  # bytes; a model with more of them in tensors keeps these in files
HELD = 1 << 30  # bytes; and one with more than this is never held in memory
SMALL = 1 << 16  # bytes; smaller tensors of a large model are read nevertheless, as shape inference needs small constants
COPIES = 3  # of the weights, that there has to be space for: a pruned model, a masked one, another try
_CHUNK = 1 << 24
_STAMP = "onnxprune.stamp"
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
            now = _stamp(self.path)
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


def _stamp(path: Path) -> str:
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
            return Place(path, 0, flat.size, _stamp(path))
        except OSError as error:
            hint = "set TMPDIR to a folder with space for another copy of the weights"
            raise OutputError(f"cannot keep changed weights in {tempfile.gettempdir()}: {error}", hint=hint) from None

    def drop(self, *models: onnx.ModelProto) -> None:
        """Deletes the files that the models refer to here; other models must not."""
        for path in {place(t).path for m in models for t in references(m)}:
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


def place(tensor: TensorProto) -> Place:
    """Where a reference's values are. ModelError for external data that nobody has resolved."""
    entries = {e.key: e.value for e in tensor.external_data}
    if _STAMP not in entries:
        raise ModelError(f"the values of tensor '{tensor.name}' are in a file beside the model", hint="give the model's path")
    return Place(Path(entries["location"]), int(entries["offset"]), int(entries["length"]), entries[_STAMP])


def refer(tensor: TensorProto, where: Place) -> None:
    """Makes a tensor a reference; its type, shape and name stay."""
    point(tensor, str(where.path), where.offset, where.length)
    tensor.external_data.add(key=_STAMP, value=where.stamp)


def point(tensor: TensorProto, location: str, offset: int, length: int) -> None:
    """Sets the external data of a tensor (ONNX IR, External Tensor Data)."""
    tensor.ClearField("raw_data")
    del tensor.external_data[:]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def array(tensor: TensorProto) -> Array:
    """The values of a tensor, read-only; those of a reference are mapped, not read."""
    if not uses_external_data(tensor):
        return np.asarray(numpy_helper.to_array(tensor))
    where = place(tensor)
    kind = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    if where.length != prod(tensor.dims) * kind.itemsize:  # several values to a byte
        copy = TensorProto()
        copy.CopyFrom(tensor)
        _read(copy, where)
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


# ------------------------------------------------------------------------------------------------ whole models


def attach(model: onnx.ModelProto, folder: Path) -> None:
    """Finds the external data of a model that was read from `folder`: reads them, or refers to them where they are large.

    Raises OSError, ValueError or the checker's ValidationError when they are missing, short, or where they must not be.
    """
    found = [(t, _locate(t, folder)) for t in references(model)]
    large = _large(sum(where.length for _, where in found))
    for tensor, where in found:
        if large and where.length >= max(SMALL, 1):
            refer(tensor, where)
        else:
            _read(tensor, where)


def _large(total: int) -> bool:
    """Whether a model goes by references: it must, or it had better and there is space for the weights that change."""
    try:
        return total > HELD or (total > LARGE and shutil.disk_usage(tempfile.gettempdir()).free > COPIES * total)
    except OSError:  # nowhere to put temporary files
        return False


def _locate(tensor: TensorProto, folder: Path) -> Place:
    """ONNX IR, External Tensor Data: `location` is relative to the model; without a `length` the shape tells it."""
    entries = {e.key: e.value for e in tensor.external_data}
    location, offset, needed = entries.get("location", ""), int(entries.get("offset", 0)), nbytes(tensor)
    path = (folder / location).resolve()
    if location and not path.exists():
        raise ValueError(f"there is no file '{location}', which tensor '{tensor.name}' is in")
    there = path.stat().st_size
    if there:
        _read_safely(tensor.name, location, folder)
    if "length" in entries:
        length = int(entries["length"])
    else:
        length = needed if needed is not None and 0 <= needed <= there - offset else there - offset
    if offset < 0 or length < 0 or offset + length > there:
        raise ValueError(f"'{location}' has {there} bytes, but tensor '{tensor.name}' is at {offset} to {offset + length}")
    if needed is not None and length != needed:
        raise ValueError(f"tensor '{tensor.name}' takes {needed} bytes, but {length} are there for it")
    return Place(path, offset, length, _stamp(path))


def _read_safely(name: str, location: str, folder: Path) -> None:
    """Lets onnx read one byte, under its own rules on where data may be (no absolute paths, no links, not outside)."""
    probe = TensorProto(name=name)
    point(probe, location, 0, 1)
    load_external_data_for_tensor(probe, str(folder))


def _read(tensor: TensorProto, where: Place) -> None:
    del tensor.external_data[:]
    tensor.ClearField("data_location")  # now like any other tensor, so that digests do not tell where it was stored
    tensor.raw_data = b"".join(where.chunks())


def settle(model: onnx.ModelProto) -> None:
    """Reads what the model still refers to."""
    for tensor in references(model):
        if _STAMP in {e.key for e in tensor.external_data}:
            _read(tensor, place(tensor))


def whole(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with all weights in it; the model itself where they are, or are too many for that."""
    found = references(model)
    if not found or sum(length(t) for t in found) > HELD:
        return model
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    settle(copy)
    return copy


def lean(model: onnx.ModelProto, scratch: Scratch) -> onnx.ModelProto:
    """The model with its tensors in files, if it is large; else the model itself. The model is not changed.

    Nor is it taken apart where it has fields of a later ONNX than the installed one: only the serialiser carries them over.
    """
    if not _large(sum(nbytes(t) or 0 for t in tensors(model) if t.HasField("raw_data"))):
        return model
    if any(len(UnknownFieldSet(m)) for m in _spine(model)):
        return model
    copy = onnx.ModelProto()

    def put(tensor: TensorProto, target: TensorProto) -> None:
        for field, value in tensor.ListFields():
            if field.name != "raw_data":
                copy_field(target, field.name, value)
        refer(target, scratch.add(np.frombuffer(tensor.raw_data, np.uint8)))

    _copy(model, copy, put)
    return copy


def _heavy(tensor: TensorProto) -> bool:
    return tensor.HasField("raw_data") and (nbytes(tensor) or 0) >= max(SMALL, 1)


def _spine(message: Any) -> Iterator[Any]:
    """The large tensors, and the messages that they are in."""
    if any(_heavy(t) for t in tensors(message)):
        yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                for item in value if hasattr(value, "add") else [value]:
                    yield from _spine(item)


def _copy(source: Any, target: Any, put: Callable[[TensorProto, TensorProto], None]) -> None:
    """Copies a message without ever copying it whole: `put` makes the large tensors."""
    if isinstance(source, TensorProto) and _heavy(source):
        put(source, target)
    elif not any(_heavy(t) for t in tensors(source)):
        target.CopyFrom(source)
    else:
        for field, value in source.ListFields():
            if field.message_type is None:
                copy_field(target, field.name, value)
            elif hasattr(value, "add"):
                for item in value:
                    _copy(item, getattr(target, field.name).add(), put)
            else:
                _copy(value, getattr(target, field.name), put)


def copy_field(target: Any, name: str, value: Any) -> None:
    if hasattr(value, "extend"):
        getattr(target, name).extend(value)
    else:
        setattr(target, name, value)
