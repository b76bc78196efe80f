"""Which models go by references, how they come to it when they are read or given, and how they come back whole."""

from __future__ import annotations

import ctypes
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import TensorProto
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from onnxprune import weights
from onnxprune.weights import (
    Place,
    Scratch,
    copy_field,
    length,
    nbytes,
    place,
    point,
    read,
    refer,
    references,
    resolved,
    stamp_of,
    tensors,
)

LARGE = 8 << 20  # bytes; a model with more of them in tensors keeps these in files
HELD = 1 << 30  # bytes; and one with more than this is never held in memory
COPIES = 3  # of the weights, that there has to be space for: a pruned model, a masked one, another try


def attach(model: onnx.ModelProto, folder: Path) -> None:
    """Finds the external data of a model that was read from `folder`: reads them, or refers to them where they are large.

    Raises OSError, ValueError or the checker's ValidationError when they are missing, short, or where they must not be.
    """
    found = [(t, _locate(t, folder)) for t in references(model)]
    large = _large(sum(where.length for _, where in found))
    for tensor, where in found:
        if large and where.length >= max(weights.SMALL, 1):
            refer(tensor, where)
        else:
            read(tensor, where)
    if found:
        unsay(model)


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
    return Place(path, offset, length, stamp_of(path))


def _read_safely(name: str, location: str, folder: Path) -> None:
    """Lets onnx read one byte, under its own rules on where data may be (no absolute paths, no links, not outside)."""
    probe = TensorProto(name=name)
    point(probe, location, 0, 1)
    load_external_data_for_tensor(probe, str(folder))


def settle(model: onnx.ModelProto) -> None:
    """Reads what the model still refers to."""
    for tensor in references(model):
        if resolved(tensor):
            read(tensor, place(tensor))


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
    plain = tensor.HasField("raw_data") and not tensor.external_data and not tensor.HasField("segment")
    return plain and (nbytes(tensor) or 0) >= max(weights.SMALL, 1)


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


def unsay(model: onnx.ModelProto) -> None:
    """Forgets which tensors say in so many words that they are inside: it is lost when they are written to another file."""
    for tensor in tensors(model):
        if uses_external_data(tensor):
            refer(tensor, place(tensor))
        else:
            tensor.ClearField("data_location")


def release() -> None:
    """Hands memory that was freed back to the system, where the C library can: what an import left would count for ever."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)
