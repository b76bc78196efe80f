"""Optimisation profiles: the smallest, the usual and the largest size of every input that the model leaves open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto

from onnxprune.errors import ModelError, OptionError
from onnxprune.graph import graph_inputs, named

BATCH = (1, 8, 32)
LARGEST = 2**31 - 1  # trtexec reads sizes as 32-bit integers
_SPECIAL = (",", "'", "*")  # trtexec: separates inputs, quotes names, stands for any text

Range = tuple[int, int, int]
"""Smallest, usual, largest."""


@dataclass(frozen=True)
class Profile:
    """An open input's shapes: smallest, usual, largest."""

    name: str
    least: tuple[int, ...]
    usual: tuple[int, ...]
    most: tuple[int, ...]

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return self.least, self.usual, self.most


@dataclass(frozen=True)
class _Input:
    """sizes: a number, or the name of an open size, or "" for one without; None where not even the rank is declared."""

    name: str
    sizes: tuple[int | str, ...] | None


def profiles(model: onnx.ModelProto, shapes: Sequence[str] = (), batch: Sequence[int] | None = None) -> list[Profile]:
    """A profile for every input with open sizes.

    shapes: NAME=MIN:OPT:MAX, each of them sizes as in 1x3x224x224, or one for all three. batch: smallest, usual and largest
    first axis of inputs that leave it open, by default `BATCH`. Open sizes of one name have one range. Raises OptionError for
    what does not fit the model or leaves a size open, ModelError for an input whose name trtexec cannot be told.
    """
    inputs = {v.name: _read(v) for v in graph_inputs(model)}
    given = _given(inputs, shapes)
    if batch is not None:
        _checked(batch, f"--batch {' '.join(map(str, batch))}", least=1)
        if not any(i.sizes and isinstance(i.sizes[0], str) and i.name not in given for i in inputs.values()):
            raise OptionError("--batch: no input leaves its first axis open", hint="leave it out")
    return _filled(inputs, given, tuple(BATCH if batch is None else batch))  # type: ignore[arg-type]


def shape_values(model: onnx.ModelProto) -> list[str]:
    """Inputs that may hold sizes instead of data: integers of at most one axis. TensorRT's profile has their values then."""
    kinds = (TensorProto.INT32, TensorProto.INT64)
    types = {v.name: v.type.tensor_type for v in graph_inputs(model)}
    return [n for n, t in types.items() if t.elem_type in kinds and t.HasField("shape") and len(t.shape.dim) < 2]


def _read(value: onnx.ValueInfoProto) -> _Input:
    tensor = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not tensor.HasField("shape"):
        return _Input(value.name, None)
    return _Input(value.name, tuple(d.dim_value if d.dim_value > 0 else _called(d.dim_param) for d in tensor.shape.dim))


def _called(name: str) -> str:
    """The name of an open size; some exporters call every one of them '?', which is no name."""
    return name if any(c.isalnum() for c in name) else ""


def _given(inputs: Mapping[str, _Input], texts: Sequence[str]) -> dict[str, list[Range]]:
    given: dict[str, list[Range]] = {}
    for text in texts:
        name, sizes = named("--shapes", text, inputs)
        if name in given:
            raise OptionError(f"--shapes is given twice for input '{name}'", hint="one profile is written")
        given[name] = _ranges(text, sizes, inputs[name])
    return given


def _ranges(text: str, sizes: str, wanted: _Input) -> list[Range]:
    shapes = [_sizes(part) for part in sizes.split(":")]
    if len(shapes) == 1:
        shapes *= 3
    if len(shapes) != 3 or None in shapes:
        raise OptionError(f"--shapes {text} is not MIN:OPT:MAX", hint=f"for example --shapes {_example(wanted)}")
    ranks = {len(s) for s in shapes if s is not None}
    if len(ranks) > 1 or (wanted.sizes is not None and ranks != {len(wanted.sizes)}):
        raise OptionError(f"--shapes {text} has another number of axes than '{wanted.name}'", hint=f"it is {_declared(wanted)}")
    ranges: list[Range] = [(a, b, c) for a, b, c in zip(*(s for s in shapes if s is not None), strict=True)]
    for axis, found in enumerate(ranges):
        _checked(found, f"--shapes {text}")
        size = wanted.sizes[axis] if wanted.sizes is not None else ""
        if isinstance(size, int) and set(found) != {size}:
            raise OptionError(f"--shapes {text} does not fit '{wanted.name}'", hint=f"it is {_declared(wanted)}")
    return ranges


def _sizes(text: str) -> list[int] | None:
    parts = text.replace(",", "x").split("x")
    return [int(p) for p in parts] if all(p.strip().isascii() and p.strip().isdigit() for p in parts) else None


def _checked(found: Sequence[int], said: str, least: int = 1) -> None:
    if len(found) != 3 or not least <= found[0] <= found[1] <= found[2] <= LARGEST:
        hint = "smallest, usual and largest size, in that order"
        raise OptionError(f"{said} is no range of sizes: {', '.join(map(str, found))}", hint=hint)


def _filled(inputs: Mapping[str, _Input], given: Mapping[str, list[Range]], batch: Range) -> list[Profile]:
    """Sizes by name go from given inputs to the others; first axes that are still open have the batch's range."""
    named: dict[str, Range] = {}
    for name, ranges in given.items():
        for size, found in zip(inputs[name].sizes or (), ranges, strict=False):
            if isinstance(size, str) and size and named.setdefault(size, found) != found:
                raise OptionError(f"--shapes gives the size '{size}' two ranges", hint="it is one size in the model")
    for i in inputs.values():
        if i.name not in given and i.sizes and isinstance(i.sizes[0], str) and i.sizes[0]:
            named.setdefault(i.sizes[0], batch)
    made = []
    for i in inputs.values():
        ranges = given.get(i.name) or [_range(i, axis, named, batch) for axis in range(len(_known(i)))]
        if i.sizes is None or any(isinstance(s, str) for s in i.sizes):
            _tellable(i.name)
            made.append(Profile(i.name, *(tuple(r[k] for r in ranges) for k in range(3))))
    return made


def _known(i: _Input) -> tuple[int | str, ...]:
    if i.sizes is None:
        raise OptionError(f"input '{i.name}' declares no shape", hint=f"give one: --shapes {i.name}=1x3x224x224")
    return i.sizes


def _range(i: _Input, axis: int, named: Mapping[str, Range], batch: Range) -> Range:
    size = _known(i)[axis]
    if isinstance(size, int):
        return size, size, size
    if size in named:
        return named[size]
    if axis == 0:
        return batch
    called = f" ('{size}')" if size else ""
    raise OptionError(f"input '{i.name}' leaves axis {axis}{called} open", hint=f"for example --shapes {_example(i)}")


def _tellable(name: str) -> None:
    if any(c in name for c in _SPECIAL) or name.startswith("-") or not name:
        hint = "rename it: trtexec reads commas, quotes and asterisks in names as its own"
        raise ModelError(f"trtexec cannot be told the shape of an input named '{name}'", hint=hint)


def _example(i: _Input) -> str:
    sizes = i.sizes if i.sizes is not None else (1, 3, 224, 224)
    shapes = ["x".join(str(s if isinstance(s, int) else b if n == 0 else 224) for n, s in enumerate(sizes)) for b in BATCH]
    return f"{i.name}={':'.join(shapes)}"


def _declared(i: _Input) -> str:
    return "x".join(str(s or "?") for s in i.sizes) if i.sizes is not None else "of no declared shape"
