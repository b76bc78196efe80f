"""ONNX Runtime: the only module that imports it."""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from onnxprune import wire
from onnxprune.control import flatten
from onnxprune.errors import ModelError, OptionError
from onnxprune.explore import Seen, explore
from onnxprune.graph import Array, Network, graph_inputs, named
from onnxprune.kinds import SMALL, tensor_types

Feeds = Mapping[str, Array]

_SHAPE = "onnxprune.shape."
_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
GUESSES = ((224, 16), (64, 64), (256, 512), (32, 1), (512, 2048))
LARGER = 16  # times as many elements of an input as in the first run: a second one must not need memory without end
MOST = 1 << 29  # elements of a tensor: two gigabytes

ort.set_default_logger_severity(4)


def providers(names: Sequence[str] = ("cpu",)) -> list[str]:
    """Execution provider names from short ones (`cpu`, `cuda`, `tensorrt`); the CPU is always the last resort.

    Raises OptionError for an unknown name or one that this ONNX Runtime lacks.
    """
    chosen = []
    for name in names:
        full = _PROVIDERS.get(name.lower(), name)
        if full not in ort.get_available_providers():
            hint = f"this ONNX Runtime has {', '.join(ort.get_available_providers())}"
            raise OptionError(f"execution provider '{name}' is not available", hint=hint)
        chosen.append(full)
    return list(dict.fromkeys([*chosen, "CPUExecutionProvider"]))


def version() -> str:
    """ONNX Runtime's."""
    return str(ort.__version__)


def default_threads() -> int:
    """Threads of a session: the environment's ONNXPRUNE_THREADS, else as many as the process may run on."""
    wanted = os.environ.get("ONNXPRUNE_THREADS", "")
    if wanted:
        if not wanted.isdigit():
            raise OptionError(f"ONNXPRUNE_THREADS must be a number, not '{wanted}'")
        return int(wanted)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0


def session(
    model: onnx.ModelProto | Path,
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    optimise: bool = True,
    reuse: bool = True,
    pattern: bool = True,
    spin: bool = True,
    profile: str | None = None,
) -> ort.InferenceSession:
    """An inference session, which maps weights that are in files by itself.

    Raises ModelError with ONNX Runtime's own words when it refuses the model, OptionError where it falls back from a provider.
    optimise: as deployed; else every node runs as it stands, and ONNX Runtime makes no repacked copies of such weights.
    reuse: whether a tensor may take the place of one that is no longer needed. Planning that takes time that grows with the
    square of the nodes; but it is how a model is deployed, and at run time ONNX Runtime then refuses shapes that contradict
    the declared ones. Without it no run was slower or larger: memory goes back to the arena after its last use anyhow.
    pattern: whether runs after the first take all their memory at once, beside what the arena holds from the first.
    spin: whether threads keep their processors busy for a while after a run, which they take from what comes in between.
    profile: where the name of a profile starts, to be written when profiling ends; None for no profile.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads or default_threads()
    options.enable_mem_reuse = reuse
    options.enable_mem_pattern = pattern
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if not optimise:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    blob, folder = (str(model), None) if isinstance(model, Path) else wire.staged(model)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        options.add_session_config_entry("session.disable_prepacking", str(int(not optimise)))
    wanted = list(providers or ["CPUExecutionProvider"])
    try:
        with contextlib.redirect_stdout(io.StringIO()) if len(wanted) > 1 else contextlib.nullcontext():  # it prints fallbacks
            made = ort.InferenceSession(blob, options, providers=wanted)
    except Exception as error:  # ONNX Runtime raises a dozen unrelated types here
        raise ModelError(f"ONNX Runtime refuses the model: {_first_line(error)}") from None
    if wanted[0] not in made.get_providers():
        raise OptionError(f"execution provider '{wanted[0]}' does not start here", hint="is its GPU there, with its libraries?")
    return made


def run(sess: ort.InferenceSession, feeds: Feeds, outputs: Sequence[str] | None = None) -> list[Array]:
    """Runs a session; ModelError with ONNX Runtime's own words when it fails."""
    names = {i.name for i in sess.get_inputs()}
    try:
        return list(sess.run(outputs, {k: v for k, v in feeds.items() if k in names}))
    except Exception as error:
        raise ModelError(f"ONNX Runtime fails on the model: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-190:]}"  # the cause often stands at the end


def with_outputs(model: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """A copy whose outputs are exactly `tensors`."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.ValueInfoProto(name=t) for t in dict.fromkeys(tensors))
    return copy


def input_dtype(value: onnx.ValueInfoProto) -> np.dtype[Any]:
    """The NumPy type of a graph input."""
    return np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type))


def input_shape(value: onnx.ValueInfoProto) -> tuple[int | None, ...]:
    """The declared shape of a graph input; None for a dynamic dimension."""
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims)


Shapes = Mapping[str, tuple[int, ...]]
"""The shape of an input, by its name."""


def input_shapes(model: onnx.ModelProto, texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes from NAME=1,3,224,224, or 1,3,224,224 for the only input. OptionError for what does not fit the model."""
    declared = {v.name: input_shape(v) for v in graph_inputs(model)}
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, sizes = named("--shape", text, declared)
        parts = sizes.replace("x", ",").split(",")
        if not all(p.strip().isdigit() and int(p) > 0 for p in parts):
            example = ",".join(str(d or 1) for d in declared[name])
            raise OptionError(f"--shape {text} is not a list of sizes", hint=f"for example --shape {name}={example}")
        shape = tuple(int(p) for p in parts)
        if len(shape) != len(declared[name]) or any(d not in (None, n) for d, n in zip(declared[name], shape, strict=True)):
            wanted = ",".join("?" if d is None else str(d) for d in declared[name])
            raise OptionError(f"--shape {text} does not fit input '{name}'", hint=f"the model declares {wanted}")
        shapes[name] = shape
    return shapes


def example_feeds(
    model: onnx.ModelProto, guess: tuple[int, int] = GUESSES[0], shapes: Shapes | None = None, seed: int = 0
) -> dict[str, Array]:
    """Pseudo-random inputs (the same for the same seed) of the declared shapes; dynamic sizes are guessed.

    A dynamic batch is 1; guess: size of other dynamic axes of four-dimensional inputs, and of all others. shapes: known ones.
    Raises ModelError for inputs that are not tensors.
    """
    rng = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    sizes = _filled(model, shapes or {}, lambda name, rank, axis: 1 if axis == 0 else guess[0] if rank == 4 else guess[1])
    for value in graph_inputs(model):
        if not value.type.HasField("tensor_type"):
            raise ModelError(f"input '{value.name}' is not a tensor", hint="onnxprune handles tensor inputs only")
        shape, dtype = sizes[value.name], input_dtype(value)
        if dtype.kind == "b":
            feeds[value.name] = np.ones(shape, dtype)
        elif dtype.kind in "iu":
            feeds[value.name] = rng.integers(0, 2, shape).astype(dtype)
        else:
            feeds[value.name] = rng.standard_normal(shape).astype(dtype)
    return feeds


def _filled(model: onnx.ModelProto, known: Shapes, choose: Callable[[str, int, int], int]) -> dict[str, tuple[int, ...]]:
    """A shape for every input: sizes left open are `known`, or as choose(input, rank, axis) says.

    Axes of one name (`dim_param`) have one size; where the first axis of an input has that name, it decides.
    """
    named: dict[str, int] = {}
    shapes: dict[str, list[int]] = {v.name: [0] * len(input_shape(v)) for v in graph_inputs(model)}
    axes = [(v, axis) for v in graph_inputs(model) for axis in range(len(input_shape(v)))]
    for value, axis in sorted(axes, key=lambda at: (at[0].name not in known, at[1] > 0)):
        given = known[value.name][axis] if value.name in known else input_shape(value)[axis]
        name = value.type.tensor_type.shape.dim[axis].dim_param
        size = given or named.get(name) or choose(value.name, len(shapes[value.name]), axis)
        shapes[value.name][axis] = size
        if name:
            named.setdefault(name, size)
    return {name: tuple(sizes) for name, sizes in shapes.items()}


def fixed_values(net: Network, names: Iterable[str]) -> dict[str, Array]:
    """Values of tensors that are computed from constants alone, e.g. weights behind Transpose or Cast nodes."""
    found = {n: v for n in names if (v := net.array(n)) is not None}
    wanted = [n for n in names if n not in found]
    if wanted:
        part = onnx.ModelProto()
        part.CopyFrom(net.model)
        nodes = [n for n in net.model.graph.node if n.output and all(o in net.fixed for o in n.output if o)]
        del part.graph.node[:], part.graph.input[:], part.graph.output[:], part.graph.value_info[:]
        part.graph.node.extend(nodes)
        part.graph.output.extend(onnx.ValueInfoProto(name=n) for n in wanted)
        found |= dict(zip(wanted, run(session(part, optimise=False), {}), strict=True))
    return found


def probe(model: onnx.ModelProto, feeds: Feeds | None = None, shapes: Shapes | None = None) -> Network:
    """Runs the model once and records the shape of every tensor and the value of every small integer tensor.

    One run of the real runtime tells what no shape inference does for every graph; only shapes and integers leave it,
    so it needs no more memory than an inference. feeds: one sample, by default `example_feeds`, for inputs of these `shapes`.
    Raises ModelError when ONNX Runtime refuses or fails.
    """
    if feeds is None:
        return _probe_by_guess(model, shapes or {})
    found = explore(model, feeds, _observe)
    flat = flatten(model, found.followed)
    net = Network(flat, found.seen.shapes, found.seen.values, dict(feeds), nested=model, inside=found.inside)
    if found.varying:
        constant = {k: v for k, v in net.values.items() if k not in found.varying or k in net.fixed}
        net = replace(net, values=constant)
    return net


def _observe(model: onnx.ModelProto, feeds: Feeds, wanted: Collection[str]) -> Seen:
    """One run: all shapes, small integer tensors, and the tensors `wanted` where nodes make them."""
    kinds = tensor_types(model)
    outer = [o for n in model.graph.node for o in n.output if o and kinds.get(o, 0) is not None]
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    integers = (TensorProto.INT64, TensorProto.INT32, TensorProto.BOOL)
    values = [o for o in outer if kinds.get(o) in integers]
    copy.graph.node.extend(helper.make_node("Shape", [o], [_SHAPE + str(i)]) for i, o in enumerate(outer))
    names = [_SHAPE + str(i) for i in range(len(outer))]
    arrays = [o for o in outer if o in wanted]
    asked = [*names, *dict.fromkeys([*values, *arrays])]
    copy.graph.output.extend(onnx.ValueInfoProto(name=n) for n in asked)
    results = dict(zip(asked, _run_undeclared(copy, feeds), strict=True))
    shapes = {o: tuple(int(d) for d in results[n]) for o, n in zip(outer, names, strict=True)}
    shapes |= {t.name: tuple(t.dims) for t in model.graph.initializer}
    shapes |= {k: tuple(v.shape) for k, v in feeds.items()}
    small = {o: results[o] for o in values if results[o].size <= SMALL}
    return Seen(shapes, small, {o: results[o] for o in arrays})


def _run_undeclared(model: onnx.ModelProto, feeds: Feeds) -> list[Array]:
    """All outputs of a run that no declared shape has a say in; but some models ONNX Runtime only takes with those."""
    declared = list(model.graph.value_info)
    del model.graph.value_info[:]
    try:
        return run(session(model, optimise=False), feeds)
    except ModelError:
        if not declared:
            raise
        model.graph.value_info.extend(declared)
        return run(session(model, optimise=False), feeds)


def probe_again(net: Network) -> Network:
    """The same network, with what a run on inputs of other sizes tells; where no other sizes run, it says that.

    What has one size in both runs does not depend on the sizes that the model leaves open.
    """
    for other in (partial(_step, net), *(partial(_another, net, guess) for guess in GUESSES)):
        shapes = _filled(net.source, {}, other)
        if any(math.prod(shape) > LARGER * max(1, net.feeds[name].size) for name, shape in shapes.items()):
            continue
        try:
            return replace(net, again=probe(net.source, example_feeds(net.source, shapes=shapes, seed=1)))
        except ModelError:
            continue
    return replace(net, alone=True)


def _step(net: Network, name: str, rank: int, axis: int) -> int:
    """A size somewhat larger than in the first run that can be halved as often, so that networks with strides take it."""
    first: int = net.feeds[name].shape[axis]
    return first + max(1, min(first & -first, 32))


def _another(net: Network, guess: tuple[int, int], name: str, rank: int, axis: int) -> int:
    """A size that many models take, but not the one that an axis of an input had in the first run."""
    first, other = net.feeds[name].shape[axis], max(2, guess[0] if rank == 4 else guess[1])  # an axis of 1 has no channels
    return first + 1 if axis == 0 or first == other else other


def _probe_by_guess(model: onnx.ModelProto, shapes: Shapes) -> Network:
    """Tries sizes for the dynamic axes until the model runs; the error of the first try speaks for all."""
    failure: ModelError | None = None
    if (small := _modest(model, shapes)) is not None:
        return small
    for guess in GUESSES:
        try:
            return probe(model, example_feeds(model, guess, shapes))
        except ModelError as error:
            failure = failure or error
            open_ones = [v for v in graph_inputs(model) if v.name not in shapes]
            static = all(d is not None for v in open_ones for d in input_shape(v)[1:])
            if static:
                break
    assert failure is not None
    raise failure


def _modest(model: onnx.ModelProto, shapes: Shapes) -> Network | None:
    """The network on small images, where tensors that grow with the square of the pixels would be too large on usual ones."""
    images = [v for v in graph_inputs(model) if v.name not in shapes and len(input_shape(v)) == 4]
    if not any(None in input_shape(v)[1:] for v in images):
        return None
    try:
        net = probe(model, example_feeds(model, GUESSES[1], shapes))
    except ModelError:
        return None
    growth = (GUESSES[0][0] / GUESSES[1][0]) ** 4
    return net if max(math.prod(shape) for shape in net.shapes.values()) * growth > MOST else None
