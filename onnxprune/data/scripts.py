"""Samples out of a user's own function, `script.py:function` or a callable."""

from __future__ import annotations

import importlib.util
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from onnxprune.data.arrays import Bundle, in_memory
from onnxprune.data.samples import Array
from onnxprune.errors import DataError

_MODULE = "_onnxprune_data_script"
_YIELD = "yield dicts {input name: array}, one per batch"


def script_bundle(path: Path, function: str, source: str) -> Bundle:
    """The arrays that a function in a Python file returns. Raises DataError, also for whatever the script raises."""
    if not path.is_file():
        raise DataError(f"{source}: there is no file {str(path)!r}", hint="check the path before the colon")
    with _importing(path.resolve()) as module:
        with _blaming(f"{source}: loading the script"):
            assert module.__spec__ is not None and module.__spec__.loader is not None
            module.__spec__.loader.exec_module(module)
        maker = getattr(module, function, None)
        if not callable(maker):
            raise DataError(f"{source}: {path} has no function {function!r}", hint="check the name after the colon")
        return call_bundle(maker, source)


def call_bundle(maker: Callable[[], Iterable[Mapping[str, Array]]], source: str) -> Bundle:
    """Call, consume all the batches and join them along axis 0. Raises DataError, also for whatever the call raises."""
    with _blaming(f"{source}: the function"):
        batches = maker()
    if isinstance(batches, Mapping) or not isinstance(batches, Iterable):
        raise DataError(f"{source}: the function returned a {type(batches).__name__}, not batches", hint=_YIELD)
    parts: dict[str, list[Array]] = {}
    for number, batch in enumerate(_consumed(batches, source)):
        if not isinstance(batch, Mapping):
            raise DataError(f"{source}: batch {number} is a {type(batch).__name__}, not a dict", hint=_YIELD)
        if number and set(batch) != set(parts):
            raise DataError(
                f"{source}: batch {number} has the arrays {_listed(batch)}, those before {_listed(parts)}",
                hint="give the same arrays in every batch",
            )
        for name, value in batch.items():
            parts.setdefault(str(name), []).append(_copied(value, f"{source}: array {name!r} of batch {number}"))
    if not parts:
        raise DataError(f"{source}: the function gave no batches", hint=_YIELD)
    return {name: in_memory(_joined(arrays, name, source)) for name, arrays in parts.items()}


def _consumed(batches: Iterable[Any], source: str) -> Iterator[Any]:
    with _blaming(f"{source}: the function"):
        iterator = iter(batches)
    while True:
        with _blaming(f"{source}: the function"):
            try:
                batch = next(iterator)
            except StopIteration:
                return
        yield batch


def _copied(value: Any, what: str) -> Array:
    try:
        # A copy, since a generator may fill the same buffer again and again.
        return np.array(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{what} is not an array: {error}", hint="give numpy arrays") from error


def _joined(arrays: Sequence[Array], name: str, source: str) -> Array:
    if len({(array.shape[1:], array.ndim) for array in arrays}) > 1:
        shapes = sorted({array.shape[1:] for array in arrays})
        raise DataError(
            f"{source}: the batches of array {name!r} have samples of different shapes: {shapes[0]} and {shapes[-1]}",
            hint="pad or crop them to one shape",
        )
    if arrays[0].ndim:
        return np.concatenate(arrays)
    if any(array != arrays[0] for array in arrays):
        raise DataError(
            f"{source}: the scalar {name!r} differs between batches",
            hint="a scalar input has one value for all samples",
        )
    return arrays[0]


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


@contextmanager
def _importing(path: Path) -> Iterator[ModuleType]:
    """The not yet run module of a file, which may import its neighbours as long as the context lasts."""
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    folder = str(path.parent)
    writes_nothing = sys.dont_write_bytecode
    sys.path.insert(0, folder)
    sys.modules[_MODULE] = module
    sys.dont_write_bytecode = True
    try:
        yield module
    finally:
        sys.dont_write_bytecode = writes_nothing
        sys.modules.pop(_MODULE, None)
        if folder in sys.path:
            sys.path.remove(folder)


@contextmanager
def _blaming(what: str) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:
        said = textwrap.shorten(str(error), 200) or "no message"
        raise DataError(f"{what} raised {type(error).__name__}: {said}", hint="run the function by itself") from error
