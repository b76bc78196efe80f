"""`open_data`: from what the user names to a list of samples."""

from __future__ import annotations

import importlib
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from onnxprune.data.arrays import Bundle, Column, array_samples, in_memory
from onnxprune.data.folders import EXTENSIONS, image_folder, image_zip
from onnxprune.data.images import ImageOptions
from onnxprune.data.parquet import parquet_samples
from onnxprune.data.samples import Array, InputSpec, Samples
from onnxprune.data.scripts import call_bundle, script_bundle
from onnxprune.errors import DataError

_SCRIPT = re.compile(r"(?P<path>.+\.py):(?P<function>\w+)")
_KINDS = "give an .npz, .npy, .zip, .safetensors or .parquet file, a folder of images, or script.py:function"
_LOCAL_HEADER = struct.Struct("<4s22xHH")

DataSource = str | os.PathLike[str] | Mapping[str, Array] | Array | Callable[[], Iterable[Mapping[str, Array]]]


def open_data(source: DataSource, inputs: Sequence[InputSpec], images: ImageOptions | None = None) -> Samples:
    """Open sample data for a model with these inputs; nothing but headers, names and labels is read yet.

    `source` is a path (`.npz`, `.npy`, `.safetensors`, `.parquet`, a folder or `.zip` of images), the text
    `script.py:function`, a mapping of arrays, an array, or a callable that returns an iterable of batches, each a dict
    {input name: array}; a callable is consumed into memory at once. Arrays have the samples along axis 0 and are named
    like the inputs (or `x` for a model with one); `y` holds class indices; `NAME_test` or `x_test`, with `y_test`,
    becomes `held_out`. Arrays may differ from the model in dtype where numpy casts within the same kind or from
    integers to floats, and in nothing else.
    Raises DataError for data that cannot be read or do not fit, OptionError for image options that do not.
    """
    if isinstance(source, Mapping):
        return array_samples({name: partial(_given, source, name) for name in source}, inputs, "the data")
    if isinstance(source, (str, os.PathLike)):
        return _open_path(os.fspath(source), inputs, images or ImageOptions())
    if callable(source):
        name = getattr(source, "__name__", type(source).__name__)
        return array_samples(call_bundle(source, f"{name}()"), inputs, f"{name}()")
    return _single(partial(_given, {"x": source}, "x"), inputs, "the data")


def _given(arrays: Mapping[str, Any], name: str) -> Column:
    try:
        return in_memory(np.asarray(arrays[name]))()
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"the data: {name!r} is not an array: {error}", hint="give a numpy array") from error


def _open_path(text: str, inputs: Sequence[InputSpec], images: ImageOptions) -> Samples:
    script = _SCRIPT.fullmatch(text)
    path = Path(text)
    if script and not path.exists():
        return array_samples(script_bundle(Path(script["path"]), script["function"], text), inputs, text)
    if not text or not path.exists():
        raise DataError(f"there is no file or folder {text!r}", hint="check the path")
    if path.is_dir():
        return image_folder(path, inputs, images)
    match path.suffix.lower():
        case ".npz":
            return array_samples(_npz(path), inputs, text)
        case ".npy":
            return _single(partial(_npy, path), inputs, text)
        case ".safetensors":
            return array_samples(_safetensors(path), inputs, text)
        case ".parquet":
            return parquet_samples(path, inputs, images)
        case ".zip":
            return image_zip(path, inputs, images)
        case ".py":
            raise DataError(f"{text} names no function", hint=f"give {text}:function")
        case suffix if suffix in EXTENSIONS:
            raise DataError(f"{text} is a single image", hint="give the folder that it is in")
        case _:
            raise DataError(f"{text} is not a kind of data that is known", hint=_KINDS)


def _single(column: Callable[[], Column], inputs: Sequence[InputSpec], source: str) -> Samples:
    if len(inputs) != 1:
        names = ", ".join(repr(spec.name) for spec in inputs)
        raise DataError(
            f"{source}: one array cannot feed the inputs {names}", hint="give an .npz or a dict with one array for each"
        )
    return array_samples({inputs[0].name: column}, inputs, source)


def _npy(path: Path) -> Column:
    try:
        with path.open("rb") as stream:
            return _mapped(stream, path, 0)
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not an .npy file that can be read: {error}", hint="save it with numpy.save") from error


def _npz(path: Path) -> Bundle:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(
            f"{path} is not an .npz file: it is no zip archive that can be read", hint="save it with numpy.savez"
        ) from error
    return {entry.filename.removesuffix(".npy"): partial(_member, path, entry) for entry in members}


def _member(path: Path, entry: zipfile.ZipInfo) -> Column:
    """One array of an .npz: mapped where it is stored plainly, unpacked whole on first use where it is compressed."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(entry) as stream:
            if entry.compress_type != zipfile.ZIP_STORED:
                shape, _, dtype = _npy_header(stream)
                return Column(shape, dtype, partial(_unpacked, path, entry))
            return _mapped(stream, path, _member_start(path, entry))
    except (ValueError, OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise _broken_member(path, entry, error) from error


def _unpacked(path: Path, entry: zipfile.ZipInfo) -> Array:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(entry) as stream:
            array: Array = np.lib.format.read_array(stream, allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise _broken_member(path, entry, error) from error
    return array


def _broken_member(path: Path, entry: zipfile.ZipInfo, error: Exception) -> DataError:
    name = entry.filename.removesuffix(".npy")
    return DataError(f"{path}: array {name!r} cannot be read: {error}", hint="save it anew with numpy.savez")


def _member_start(path: Path, entry: zipfile.ZipInfo) -> int:
    with path.open("rb") as stream:
        stream.seek(entry.header_offset)
        _, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    return entry.header_offset + _LOCAL_HEADER.size + int(name_bytes) + int(extra_bytes)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"format version {version} is not for plain numbers")


def _mapped(stream: IO[bytes], path: Path, start: int) -> Column:
    """A column of the .npy bytes that `stream` is at the beginning of and that begin at `start` in the file."""
    shape, fortran, dtype = _npy_header(stream)
    if dtype.hasobject or 0 in shape:
        return Column(shape, dtype, lambda: np.empty(shape, dtype))
    offset = start + stream.tell()
    if offset + math.prod(shape) * dtype.itemsize > path.stat().st_size:
        raise ValueError("the file is cut short")
    order: Literal["C", "F"] = "F" if fortran else "C"
    return Column(shape, dtype, lambda: np.asarray(np.memmap(path, dtype, "r", offset, shape, order)))


def _safetensors(path: Path) -> Bundle:
    try:
        safetensors = importlib.import_module("safetensors")
    except ImportError as error:
        raise DataError(f"{path}: reading it needs the safetensors package", hint="pip install safetensors") from error
    try:
        with safetensors.safe_open(path, framework="np") as archive:
            names = list(archive.keys())
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} is not a .safetensors file that can be read: {error}") from error

    def column(name: str) -> Column:
        try:
            with safetensors.safe_open(path, framework="np") as archive:
                array: Array = archive.get_tensor(name)
        except (OSError, TypeError, AttributeError, safetensors.SafetensorError) as error:
            raise DataError(
                f"{path}: tensor {name!r} cannot be read as a numpy array: {error}", hint="save it as float32"
            ) from error
        return in_memory(array)()

    return {name: partial(column, name) for name in names}
