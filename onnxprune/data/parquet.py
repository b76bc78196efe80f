"""Samples out of a .parquet table: encoded images, or fixed-size lists, with a column of labels."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from onnxprune.data.arrays import Bundle, Column, array_samples, in_memory, label_array
from onnxprune.data.images import ImageOptions, ImageSamples
from onnxprune.data.samples import Array, InputSpec, Samples
from onnxprune.errors import DataError

_LABELS = ("y", "label", "labels")


def parquet_samples(path: Path, inputs: Sequence[InputSpec], options: ImageOptions) -> Samples:
    """Open a table: a column of images (bytes, or a struct with `bytes`) or columns of numbers and fixed-size lists.

    Labels are the column `y`, `label` or `labels`. Encoded images stay in memory, decoded ones do not.
    Raises DataError.
    """
    source = str(path)
    try:
        pa, pq = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    except ImportError as error:
        raise DataError(f"{source}: reading it needs the pyarrow package", hint="pip install pyarrow") from error
    try:
        schema = pq.read_schema(path)
        images = [field.name for field in schema if _is_image(pa, field.type)]
        named = {"x", "image", *(spec.name for spec in inputs)}
        image = next((name for name in images if name in named or len(images) == 1), None)
        numbers = [name for name in schema.names if name in _LABELS or (image is None and name in named)]
        table = pq.read_table(path, columns=[*numbers, *([image] if image else [])])
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{source} is not a .parquet file that can be read: {error}") from error
    bundle: Bundle = {name: partial(_column, pa, table[name], name, source) for name in numbers}
    label = next((name for name in _LABELS if name in numbers), None)
    if image is not None:
        return _images(table[image], image, bundle, label, inputs, options, source)
    if label is not None:
        bundle = {**bundle, "y": bundle[label]}
    return array_samples(bundle, inputs, source)


def _is_image(pa: Any, kind: Any) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_image(pa, field.type) for field in kind)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _images(
    cells: Any,
    name: str,
    bundle: Bundle,
    label: str | None,
    inputs: Sequence[InputSpec],
    options: ImageOptions,
    source: str,
) -> Samples:
    if not len(cells):
        raise DataError(f"{source}: there are no samples in it", hint="give a table with rows")
    labels = None if label is None else label_array(bundle[label](), len(cells), label, source)

    def read(index: int) -> bytes:
        cell = cells[index].as_py()
        data = cell["bytes"] if isinstance(cell, dict) else cell
        if not isinstance(data, bytes):
            raise ValueError("no bytes in this row")
        return data

    names = [f"row {row} of column {name}" for row in range(len(cells))]
    return ImageSamples(source, inputs, options, names, read, labels, None)


def _column(pa: Any, cells: Any, name: str, source: str) -> Column:
    values = cells.combine_chunks()
    shape = [len(values)]
    nulls = values.null_count
    while pa.types.is_fixed_size_list(values.type):
        shape.append(values.type.list_size)
        values = values.flatten()
        nulls += values.null_count
    if nulls:
        raise DataError(f"{source}: column {name!r} has empty cells", hint="fill them or leave those rows out")
    if pa.types.is_nested(values.type):
        raise DataError(
            f"{source}: column {name!r} is of type {cells.type}", hint="give numbers or fixed-size lists of numbers"
        )
    array: Array = np.asarray(values.to_numpy(zero_copy_only=False))
    return in_memory(array.reshape(shape))()
