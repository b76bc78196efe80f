"""A model as the analyses have it: read, run once, its channel groups found and its size counted."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from onnxprune import files, graph, inline, large, runtime, weights, wire
from onnxprune.channels import ChannelGroup
from onnxprune.control import flatten
from onnxprune.data import ImageOptions, InputSpec, open_data
from onnxprune.errors import ModelError, OptionError
from onnxprune.graph import Network
from onnxprune.groups import Accounting, Groups, Size, is_parameter, parameters
from onnxprune.passes.group import Attention, group


@dataclass(frozen=True, eq=False)
class Imported:
    """A model after the `load` and `group` passes, with its size.

    model: as the file has it, simplified; the tensors of a large one stay in their files, see `large`.
    external: whether its weights are, or have to be, in a file of their own. sources: the files that it was read from.
    scratches: the temporary files that a large model, and what is cut from it, refer to.
    """

    path: str
    model: onnx.ModelProto
    groups: Groups
    accounting: Accounting
    size: Size
    external: bool
    sources: tuple[Path, ...]
    scratches: tuple[weights.Scratch, ...]

    def count_parameters(self, pruned: onnx.ModelProto) -> int:
        """Parameters of a model that was cut from this one, one by one: recovery may have split a vector that was shared."""
        followed = self.groups.net.inside.followed
        return parameters(Network(flatten(pruned, followed) if followed else pruned, {}, {}))

    @property
    def specs(self) -> list[InputSpec]:
        """The inputs that sample data must fill."""
        return [InputSpec(v.name, runtime.input_dtype(v), runtime.input_shape(v)) for v in self.groups.net.inputs]


def load(
    model: str | os.PathLike[str] | onnx.ModelProto,
    *,
    freeze: Sequence[str] = (),
    data: Any = None,
    images: ImageOptions | None = None,
    shape: Sequence[str] = (),
    approximate: bool = False,
    attention: Attention | None = None,
) -> Imported:
    """Imports a model: reads it, runs it once, finds its channel groups. Raises ModelError and OptionError.

    data, images: sample data as `open_data` takes it, of which one sample sets the sizes that the model leaves open.
    shape: these sizes, see `runtime.input_shapes`. approximate, attention: see `group`.
    """
    adopted = weights.Scratch()
    if isinstance(model, onnx.ModelProto):
        path, proto = "", inline.simplified(large.lean(model, adopted))
    else:
        path, proto = os.fspath(model), large.lean(files.load(model), adopted)
    beside = files.external_files(path) if path else []
    size = wire.size(proto)
    if size > wire.LIMIT:
        large.unsay(proto)
    shapes = runtime.input_shapes(proto, shape)
    try:
        net = runtime.probe(proto, None if data is None or shapes else _sample_feeds(proto, data, images), shapes)
    except ModelError as error:
        hint = error.hint or "it must run in ONNX Runtime as it is; --shape sets the sizes of inputs that are left open"
        raise ModelError(f"{path}: {error.message}" if path else error.message, hint=hint) from None
    groups = freeze_groups(_analysed(net, approximate, attention), freeze)
    accounting = Accounting(groups, size)
    return Imported(
        path,
        proto,
        groups,
        accounting,
        accounting.size(accounting.full_widths),
        external=bool(beside) or size > wire.LIMIT,
        sources=(Path(path), *beside) if path else (),
        scratches=(net.scratch, adopted),
    )


def _analysed(net: Network, approximate: bool, attention: Attention | None) -> Groups:
    """The groups; where a model leaves sizes open, a second run tells what depends on them."""
    return group(net if net.static else runtime.probe_again(net), approximate=approximate, attention=attention)


def freeze_groups(groups: Groups, patterns: Sequence[str]) -> Groups:
    """Freezes the groups with a layer or tensor whose name matches a glob. OptionError for one that matches nothing."""
    layers: dict[str, set[str]] = {}
    for layer in groups.layers:
        for tensor in (layer.out.tensor, layer.weight):
            layers.setdefault(tensor, set()).add(layer.name)
    used: set[str] = set()

    def frozen(g: ChannelGroup) -> ChannelGroup:
        tensors = {s.dim.tensor for s in g.slots}
        names = tensors | {g.id} | {n for t in tensors for n in layers.get(t, ())}
        hit = next((p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in names)), None)
        used.update(p for p in patterns if any(fnmatch.fnmatchcase(n, p) for n in names))
        return replace(g, reason=f"--freeze {hit}", remedy="leave it out") if hit and not g.frozen else g

    changed = tuple(frozen(g) for g in groups.groups)
    for pattern in patterns:
        if pattern not in used:
            raise OptionError(f"--freeze {pattern} matches no layer or tensor", hint="see `onnxprune inspect` for the names")
    return replace(groups, groups=changed) if patterns else groups


def _sample_feeds(proto: onnx.ModelProto, data: Any, images: ImageOptions | None) -> runtime.Feeds | None:
    """One real sample for the probe run, which then sees the sizes that the user's data has."""
    specs = [InputSpec(v.name, runtime.input_dtype(v), runtime.input_shape(v)) for v in graph.graph_inputs(proto)]
    if callable(data) or all(d is not None for s in specs for d in s.shape[1:]):
        return None  # nothing to learn: only the batch is dynamic
    samples = open_data(data, specs, images)
    return samples.batch(np.zeros(next((s.shape[0] for s in specs if s.shape and s.shape[0]), 1), np.int64))


def require_prunable(groups: Groups) -> None:
    if groups.prunable:
        return
    if not any(is_parameter(groups.net, name) for name in groups.net.initializers):
        raise ModelError(
            "the model has no weights to prune", hint="they must be constants of the file, in floating point or 8 bits"
        )
    first = max(groups.groups, key=lambda g: g.remedy.startswith("--"), default=None)  # one that an option would free, if any
    reason = (first.reason if first else None) or "it has no layer with channels"
    hint = (
        f"{first.remedy} would cut it" if first and first.remedy.startswith("--") else "`onnxprune inspect` lists every group"
    )
    raise ModelError(f"nothing in the model can be pruned: {reason}", hint=hint)
