"""Samples that are arrays: matched by name with the model's inputs, checked by their headers, read row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxprune.data.samples import Array, InputSpec, Samples, castable
from onnxprune.errors import DataError


@dataclass(frozen=True)
class Column:
    """One array of a source: its header, and how to read its values (called at most once)."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    load: Callable[[], Array]


# The arrays that a source has; a column is opened only when it is wanted, so that others may be anything.
Bundle = Mapping[str, Callable[[], Column]]


def in_memory(array: Array) -> Callable[[], Column]:
    """The bundle entry of an array that is there already, memory-mapped ones included."""
    plain = np.asarray(array)
    return lambda: Column(plain.shape, plain.dtype, lambda: plain)


class ArraySamples(Samples):
    """Samples whose inputs are rows of arrays, read on first use (memory-mapped where the source allows it)."""

    def __init__(self, source: str, inputs: Sequence[InputSpec], columns: Mapping[str, Column], labels: Array | None) -> None:
        super().__init__(source, inputs, labels)
        self._columns = columns
        self._loaded: dict[str, Array] = {}
        self._count = _length(columns, inputs)

    def __len__(self) -> int:
        return self._count

    def _rows(self, indices: Array) -> dict[str, Array]:
        arrays = [(spec, self._array(spec.name)) for spec in self.inputs]
        return {spec.name: array[indices] if spec.shape else array.copy() for spec, array in arrays}

    def _array(self, name: str) -> Array:
        if name not in self._loaded:
            self._loaded[name] = self._columns[name].load()
        return self._loaded[name]


def array_samples(bundle: Bundle, inputs: Sequence[InputSpec], source: str) -> ArraySamples:
    """Match a bundle with the model's inputs, and its `*_test` arrays, if any, as held-out samples.

    An input takes the array of its own name or, as the only input, `x`; labels are `y`; held-out arrays are called the
    same with `_test` at the end. Raises DataError for arrays that are missing or do not fit.
    """
    samples = _matched(bundle, inputs, source, "")
    own = {spec.name for spec in inputs}
    if any(name in bundle and name not in own for spec in inputs for name in _names(spec, inputs, "_test")):
        samples.held_out = _matched(bundle, inputs, source, "_test")
    return samples


def label_array(column: Column, count: int, name: str, source: str) -> Array:
    """Labels as int64 class indices [count]; takes [count] or [count, 1] of any integer type, else DataError."""
    if column.dtype.kind not in "iu":
        raise DataError(f"{source}: labels {name!r} are {column.dtype}, not integers", hint="labels are class indices from 0")
    if column.shape not in ((count,), (count, 1)):
        raise DataError(
            f"{source}: labels {name!r} have shape {column.shape} and there are {count} samples",
            hint=f"give one class index per sample: shape ({count},)",
        )
    labels: Array = column.load().reshape(count).astype(np.int64)
    if (labels < 0).any():
        raise DataError(
            f"{source}: labels {name!r} have a negative class index at sample {int(np.argmax(labels < 0))}",
            hint="labels are class indices from 0; leave out samples without a class",
        )
    return labels


def _names(spec: InputSpec, inputs: Sequence[InputSpec], suffix: str) -> list[str]:
    return [spec.name + suffix] + (["x" + suffix] if len(inputs) == 1 else [])


def _matched(bundle: Bundle, inputs: Sequence[InputSpec], source: str, suffix: str) -> ArraySamples:
    columns: dict[str, Column] = {}
    for spec in inputs:
        # A scalar input belongs to no sample, so the held-out samples share it.
        name = _find(bundle, spec, inputs, source, suffix if spec.shape else "")
        columns[spec.name] = bundle[name]()
        _check_dtype(columns[spec.name], spec, name, source)
        _check_shape(columns[spec.name], spec, name, source)
    _check_lengths(columns, inputs, source)
    label_name = "y" + suffix
    if label_name not in bundle or any(spec.name == label_name for spec in inputs):
        return ArraySamples(source, inputs, columns, None)
    labels = label_array(bundle[label_name](), _length(columns, inputs), label_name, source)
    return ArraySamples(source, inputs, columns, labels)


def _find(bundle: Bundle, spec: InputSpec, inputs: Sequence[InputSpec], source: str, suffix: str) -> str:
    wanted = _names(spec, inputs, suffix)
    for name in wanted:
        if name in bundle:
            return name
    have = ", ".join(repr(name) for name in bundle) or "none"
    raise DataError(
        f"{source}: no array for input {spec.name!r}: it has {have}; wanted {' or '.join(map(repr, wanted))}",
        hint=f"name the array {wanted[0]!r}",
    )


def _check_dtype(column: Column, spec: InputSpec, name: str, source: str) -> None:
    if castable(column.dtype, spec.dtype):
        return
    hint = f"convert it to {spec.dtype} first"
    if column.dtype.hasobject:
        hint = "pickled objects are never read; save a plain numeric array"
    raise DataError(f"{source}: array {name!r} is {column.dtype} and input {spec.name!r} takes {spec.dtype}", hint=hint)


def _check_shape(column: Column, spec: InputSpec, name: str, source: str) -> None:
    if _fits(column.shape, spec):
        return
    hint = f"every dimension but the first must be as in {spec.describe()}"
    if not spec.shape:
        hint = "a scalar input takes a rank-0 array, which serves all samples"
    elif _fits((1, *column.shape), spec):
        hint = "add a leading batch axis: array[None]"
    elif len(column.shape) == 4:
        for order in ((0, 3, 1, 2), (0, 2, 3, 1)):
            if _fits(tuple(column.shape[axis] for axis in order), spec):
                hint = f"reorder the axes: array.transpose{order}"
    raise DataError(
        f"{source}: array {name!r} has shape {column.shape} and input {spec.name!r} takes {spec.describe()}", hint=hint
    )


def _fits(shape: tuple[int, ...], spec: InputSpec) -> bool:
    return len(shape) == len(spec.shape) and all(
        want is None or have == want for have, want in zip(shape[1:], spec.shape[1:], strict=True)
    )


def _check_lengths(columns: Mapping[str, Column], inputs: Sequence[InputSpec], source: str) -> None:
    lengths = {spec.name: columns[spec.name].shape[0] for spec in inputs if spec.shape}
    if len(set(lengths.values())) > 1:
        listed = ", ".join(f"{name!r} has {count}" for name, count in lengths.items())
        raise DataError(
            f"{source}: the inputs have different numbers of samples: {listed}",
            hint="give as many rows for every input",
        )
    if 0 in lengths.values():
        raise DataError(f"{source}: there are no samples in it", hint="the first axis of every array counts samples")


def _length(columns: Mapping[str, Column], inputs: Sequence[InputSpec]) -> int:
    return next((columns[spec.name].shape[0] for spec in inputs if spec.shape), 1)
