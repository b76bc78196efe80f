"""How a model leaves the process while large tensors stay in files: its bytes in pieces, and forms of it for other readers.

The pieces are those of the deterministic serialisation of the same model with all of its tensors inside, so that neither a
digest nor a size tells where the weights were stored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import EncodeError
from onnx import TensorProto

from onnxprune.errors import ModelError, OutputError
from onnxprune.weights import Place, back, copy_field, place, point, references

LIMIT = 2**31 - 1  # bytes that protobuf can serialise
_LENGTH_DELIMITED = 2  # wire type of texts, bytes and messages (Protocol Buffers, Encoding)


def digest(model: onnx.ModelProto) -> str:
    """SHA-256 of the model's deterministic serialisation, weights included, wherever they are."""
    state = hashlib.sha256()
    for chunk in chunks(model):
        state.update(chunk)
    return state.hexdigest()


def size(model: onnx.ModelProto) -> int:
    """Bytes of the model's serialisation, weights included."""
    return sum(_length(p) for p in _pieces(model))


def chunks(model: onnx.ModelProto) -> Iterator[bytes]:
    """The model's deterministic serialisation, weights included, a few megabytes at a time."""
    for piece in _pieces(model):
        if isinstance(piece, Place):
            yield from piece.chunks()
        else:
            yield piece


def write(model: onnx.ModelProto, path: Path) -> None:
    """Writes the model, weights included, into one file. Raises OutputError when they do not fit, OSError as files do."""
    if not references(model):
        path.write_bytes(model.SerializeToString(deterministic=True))
        return
    if size(model) > LIMIT:
        raise OutputError("a model of 2 GB or more does not fit in one file", hint="write it with external data")
    with path.open("wb") as out:
        out.writelines(chunks(model))


def _pieces(message: Any) -> list[bytes | Place]:
    """Fields in the order of their numbers, unknown ones last, as the serialiser writes them."""
    if not references(message):
        return [_serialised(message)]
    if isinstance(message, TensorProto):
        return _tensor(message)
    found: list[bytes | Place] = []
    rest = type(message)()
    rest.CopyFrom(message)
    for field, value in message.ListFields():
        rest.ClearField(field.name)
        if field.message_type is None:
            part = type(message)()
            copy_field(part, field.name, value)
            found.append(part.SerializeToString(deterministic=True))
            continue
        for item in value if hasattr(value, "add") else [value]:
            inner = _pieces(item)
            found += [_tag(field.number) + _varint(sum(_length(p) for p in inner)), *inner]
    return [*found, rest.SerializeToString(deterministic=True)]


def _tensor(tensor: TensorProto) -> list[bytes | Place]:
    """A reference as the tensor that it stands for: the values become its raw data."""
    where = place(tensor)
    head, tail = TensorProto(), TensorProto()
    tail.CopyFrom(tensor)
    back(tail)
    for field, value in list(tail.ListFields()):
        if field.number < TensorProto.RAW_DATA_FIELD_NUMBER:
            copy_field(head, field.name, value)
            tail.ClearField(field.name)
    parts = [m.SerializeToString(deterministic=True) for m in (head, tail)]
    return [parts[0], _tag(TensorProto.RAW_DATA_FIELD_NUMBER) + _varint(where.length), where, parts[1]]


def _serialised(message: Any) -> bytes:
    try:
        return bytes(message.SerializeToString(deterministic=True))
    except EncodeError:
        hint = "save it with external data, and give the path of the file"
        raise ModelError("the model has more than 2 GB in memory", hint=hint) from None


def _length(piece: bytes | Place) -> int:
    return piece.length if isinstance(piece, Place) else len(piece)


def _tag(number: int) -> bytes:
    return _varint(number << 3 | _LENGTH_DELIMITED)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# -------------------------------------------------------------------------------------------------- other readers


def staged(model: onnx.ModelProto) -> tuple[bytes, Path | None]:
    """What a runtime loads: the serialised model, and the folder that the locations in it are relative to, if any are.

    Raises ModelError when a file is gone or has changed.
    """
    if not references(model):
        return _serialised(model), None
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = [(t, place(t)) for t in references(copy)]
    try:
        folder = Path(os.path.commonpath([where.checked().parent for _, where in found]))
    except ValueError:
        hint = f"set TMPDIR to a folder on the drive of {found[0][1].path}"
        raise ModelError("the weights are on several drives, which ONNX Runtime does not load", hint=hint) from None
    for tensor, where in found:
        point(tensor, where.path.relative_to(folder).as_posix(), where.offset, where.length)
    return copy.SerializeToString(), folder


def hollow(model: onnx.ModelProto, folder: Path) -> Path:
    """Writes the model into `folder` with a file of holes in place of the values in files; for checks of the structure."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    longest = 0
    for tensor in references(copy):
        length = place(tensor).length
        point(tensor, "holes", 0, length)
        longest = max(longest, length)
    with (folder / "holes").open("wb") as file:
        file.truncate(longest)
    path = folder / "model.onnx"
    path.write_bytes(copy.SerializeToString())
    return path
