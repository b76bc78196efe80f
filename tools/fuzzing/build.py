"""Writes a random graph operator by operator; each is run at once, on two sets of inputs, so that every shape is known.

An operator that ONNX Runtime refuses, or whose values are not tame (not finite, or large), is taken back: what is left
is a graph that runs on both sets of inputs. They differ in their values and in all sizes that are declared dynamic.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxprune import runtime
from onnxprune.errors import ModelError

Array = np.ndarray[Any, Any]
RUNS = 2
LARGEST = 200.0  # magnitude of a floating-point value; beyond it sums lose the digits that the oracle compares
MOST_ELEMENTS = 4096


class NoFitError(Exception):
    """The operator cannot be put here: no tensor fits, or ONNX Runtime refuses, or the values are not tame."""


@dataclass(frozen=True, eq=False)
class T:
    """A tensor of the graph with its value on each set of inputs.

    fixed: computed from constants alone. channel: the axis on which its maker expects channels, a hint for those after it.
    """

    name: str
    values: tuple[Array, ...]
    fixed: bool = False
    channel: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.values[0].shape)

    @property
    def rank(self) -> int:
        return int(self.values[0].ndim)

    @property
    def dtype(self) -> np.dtype[Any]:
        return self.values[0].dtype

    def sizes(self, axis: int) -> tuple[int, ...]:
        """The size of an axis on each set of inputs."""
        return tuple(v.shape[axis] for v in self.values)

    def static(self, axis: int) -> bool:
        """Whether an axis has the same size on all sets of inputs."""
        return len(set(self.sizes(axis))) == 1

    @property
    def steady(self) -> bool:
        """Whether the whole shape is the same on all sets of inputs."""
        return len({v.shape for v in self.values}) == 1


class Builder:
    """A graph in the making."""

    def __init__(self, seed: int, opset: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.opset = opset
        self.constants = self.choose([0.0, 0.0, 0.2, 1.0])  # share of constants that are written as Constant nodes
        self.dressed = self.choose([0.0, 0.2, 0.2, 0.7])  # of weights that are not stored as the layer reads them
        self.shared = self.choose([0.0, 0.1, 0.1, 0.6])  # of weights that are looked for among those in use already
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.inputs: list[T] = []
        self.pool: list[T] = []  # what the next operator may read
        self.stored: list[T] = []  # constants of the file
        self.domains = {"": opset}
        self.refused: Counter[str] = Counter()
        self._count = 0

    # ---- draws

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def number(self, low: int, high: int) -> int:
        """A number between `low` and `high`, both included."""
        return int(self.rng.integers(low, high + 1))

    def choose(self, options: Sequence[Any]) -> Any:
        if not len(options):
            raise NoFitError
        return options[int(self.rng.integers(len(options)))]

    def some(self, options: Sequence[Any], least: int = 1) -> list[Any]:
        """A random non-empty subset, in order."""
        if len(options) < least:
            raise NoFitError
        count = self.number(least, len(options))
        return [options[i] for i in sorted(self.rng.choice(len(options), count, replace=False))]

    # ---- tensors

    def fresh(self, like: str) -> str:
        self._count += 1
        return f"{like}{self._count}"

    def data(
        self,
        kinds: str = "f",
        ranks: Sequence[int] | None = None,
        where: Callable[[T], bool] | None = None,
        dtype: Any = None,
    ) -> T:
        """A tensor to read, recent ones and ones with channels first. kinds: NumPy's letters for types.

        NoFitError where there is none.
        """
        fits = [
            t
            for t in self.pool
            if t.dtype.kind in kinds
            and (ranks is None or t.rank in ranks)
            and (dtype is None or t.dtype == dtype)
            and (where is None or where(t))
        ]
        if not fits:
            raise NoFitError
        read = {name for n in self.nodes for name in n.input}
        odds = np.array([self._appeal(t, t.name in read, len(fits) - i) for i, t in enumerate(fits)])
        return fits[int(self.rng.choice(len(fits), p=odds / odds.sum()))]

    @staticmethod
    def _appeal(t: T, read: bool, age: int) -> float:
        fresh = 0.8**age * (3 if t.channel is not None else 1) * (1 if read else 4) + 0.002
        return fresh * (0.1 if t.fixed else 1)

    def const(self, value: Any, like: str = "c") -> T:
        """A constant: an initializer or a Constant node."""
        array = np.array(value, order="C")
        name = self.fresh(like)
        if self.stored and self.chance(0.02):
            name = self._awkward(name)
        proto = numpy_helper.from_array(array, name)
        if self.chance(self.constants):
            self.nodes.append(helper.make_node("Constant", [], [name], self._node_name("Constant"), value=proto))
        else:
            self.weights.append(proto)
        tensor = T(name, (array,) * RUNS, fixed=True)
        self.stored.append(tensor)
        return tensor

    def _awkward(self, name: str) -> str:
        """A name that an editor might choose for a copy of another constant."""
        other = f"{self.stored[-1].name}.1"
        return name if any(t.name == other for t in self.stored) else other

    def ints(self, *values: int) -> T:
        return self.const(np.array(values, np.int64))

    def input(self, values: Sequence[Array]) -> T:
        """A graph input."""
        tensor = T(self.fresh("x"), tuple(values))
        self.inputs.append(tensor)
        self.pool.append(tensor)
        return tensor

    # ---- operators

    def op(
        self,
        op: str,
        reads: Sequence[T | None],
        domain: str = "",
        channel: int | None = None,
        **attributes: Any,
    ) -> T:
        """Adds an operator with one output."""
        return self.ops(op, reads, [True], domain, channel, **attributes)[0]

    def ops(
        self,
        op: str,
        reads: Sequence[T | None],
        outputs: Sequence[bool],
        domain: str = "",
        channel: int | None = None,
        **attributes: Any,
    ) -> list[T]:
        """Adds an operator; `outputs` says which of its outputs are named. Returns those. NoFitError when it is refused."""
        kept = list(reads)
        while kept and kept[-1] is None:
            kept.pop()
        names = [self.fresh("t") if wanted else "" for wanted in outputs]
        while names and not names[-1]:
            names.pop()
        attributes = {k: v for k, v in attributes.items() if v is not None}
        node = helper.make_node(
            op, [t.name if t else "" for t in kept], names, self._node_name(op), domain=domain or None, **attributes
        )
        made = self.block([node], [t for t in kept if t], [n for n in names if n])
        hint = self._hint([t for t in kept if t], made[0]) if channel is None else channel
        rank = made[0].rank if hint is not None and hint < made[0].rank else -1
        made = [T(t.name, t.values, t.fixed, hint if t.rank == rank else None) for t in made]
        self.pool[-len(made) :] = made
        return made

    def block(self, nodes: Sequence[onnx.NodeProto], reads: Sequence[T], outputs: Sequence[str]) -> list[T]:
        """Adds several nodes that are run together: a subgraph's captures and values that are no tensors stay inside."""
        for node in nodes:
            self.domains.setdefault(node.domain, 1)
        values = self._run(nodes, reads, outputs)
        fixed = all(t.fixed for t in reads)
        made = [T(name, tuple(v[i] for v in values), fixed) for i, name in enumerate(outputs)]
        for t in made:
            _check_tame(t)
            if len({v.ndim for v in t.values}) > 1:
                raise NoFitError
        self.nodes.extend(nodes)
        self.pool.extend(made)
        return made

    def _run(self, nodes: Sequence[onnx.NodeProto], reads: Sequence[T], outputs: Sequence[str]) -> list[list[Array]]:
        stored = {t.name for t in self.stored}
        distinct = {t.name: t for t in reads}
        constants = [numpy_helper.from_array(t.values[0], t.name) for t in distinct.values() if t.name in stored]
        fed = [t for t in distinct.values() if t.name not in stored]
        inputs = [helper.make_tensor_value_info(t.name, helper.np_dtype_to_tensor_dtype(t.dtype), None) for t in fed]
        made = [onnx.ValueInfoProto(name=n) for n in outputs]
        graph = helper.make_graph(list(nodes), "step", inputs, made, constants)
        try:
            session = runtime.session(self._model(graph), threads=1, optimise=False)
            return [runtime.run(session, {t.name: t.values[r] for t in fed}, list(outputs)) for r in range(RUNS)]
        except ModelError as error:
            self.refused[nodes[-1].op_type] += 1
            raise NoFitError(str(error)) from None

    def _model(self, graph: onnx.GraphProto) -> onnx.ModelProto:
        imports = [helper.make_opsetid(d, v) for d, v in self.domains.items()]
        return helper.make_model(graph, opset_imports=imports, ir_version=10 if self.opset >= 21 else 8)

    def _node_name(self, op: str) -> str:
        """Some have none. ONNX Runtime refuses two nodes of one name, so that those are rare."""
        return op if self.chance(0.001) else "" if self.chance(0.1) else f"{op}_{len(self.nodes)}"

    @staticmethod
    def _hint(reads: Sequence[T], made: T) -> int | None:
        """Where channels are expected after an operator that keeps axes: where a tensor that it reads has them."""
        for t in reads:
            if t.channel is not None and t.channel < made.rank and t.rank == made.rank:
                if t.shape[t.channel] == made.shape[t.channel]:
                    return t.channel
        return None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Takes back what was added inside when it ends in NoFitError."""
        marks = [len(v) for v in (self.nodes, self.weights, self.inputs, self.pool, self.stored)]
        domains = dict(self.domains)
        try:
            yield
        except NoFitError:
            for values, mark in zip((self.nodes, self.weights, self.inputs, self.pool, self.stored), marks, strict=True):
                del values[mark:]  # type: ignore[attr-defined]
            self.domains = domains
            raise


def _check_tame(t: T) -> None:
    for v in t.values:
        if not isinstance(v, np.ndarray) or v.size > MOST_ELEMENTS or v.size == 0:
            raise NoFitError
        if v.dtype.kind == "f" and not (np.isfinite(v).all() and float(np.abs(v).max()) <= LARGEST):
            raise NoFitError
