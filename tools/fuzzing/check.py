"""The oracle on random graphs: a pruned model against the original with the same channels silenced.

A difference is wrong unless the masked original itself is that unstable: its weights and inputs are then nudged by a
millionth, and where that moves the outputs as much, other inputs decide (rounding steps and ties do that to a graph).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from fuzzing.graphs import Case
from onnxprune import runtime
from onnxprune.channels import ChannelGroup
from onnxprune.control import every_graph
from onnxprune.errors import ModelError
from onnxprune.graph import Network
from onnxprune.groups import Accounting, Groups
from onnxprune.inline import constant_value
from onnxprune.passes.group import group
from onnxprune.passes.surgery import mask, reweightable, surgery
from onnxprune.passes.validate import QUANTISED
from onnxprune.plan import Kept, Plan
from onnxprune.rounding import quantises

Array = np.ndarray[Any, Any]
Feeds = Mapping[str, Array]
TOLERANCE = 1e-4  # of the output's range
HALF = 1e-2  # where tensors pass through half precision: some units in its last place
NUDGE = 1e-6
UNSTABLE = 8.0  # a difference this many times what a nudge makes is not put down to instability
FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)
EIGHTS = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
KINDS = ("random", "one channel", "one group", "all but one", "scaled")


@dataclass(frozen=True)
class Finding:
    """Something wrong: what kind of thing, in which plan, and the words that came with it."""

    kind: str
    plan: str
    text: str


@dataclass
class Outcome:
    """What became of one graph. status: "ok", "discarded" or "wrong"."""

    status: str = "ok"
    why: str = ""
    nodes: int = 0
    groups: int = 0
    prunable: int = 0
    plans: int = 0
    worst: float = 0.0
    findings: list[Finding] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    present: set[str] = field(default_factory=set)
    cut: set[str] = field(default_factory=set)
    story: str = ""
    refused: Counter[str] = field(default_factory=Counter)


class WrongError(Exception):
    """A property does not hold."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


def examine(case: Case, tell: Callable[[str], None] = lambda stage: None) -> Outcome:
    """Analyses a graph, cuts it by several plans and compares each result with the masked original.

    Where more can be cut approximately, such a cut has to run and to keep the shapes. tell: is told what is done next, so
    that a crash of the runtime can be put down to the right model.
    """
    tell("original")
    made = Outcome(nodes=len(case.model.graph.node), present={_name(n) for n in case.model.graph.node})
    try:
        original = Original(case)
    except ModelError as error:
        made.status, made.why = "discarded", str(error)[:200]
        return made
    tell("analysis")
    try:
        net = runtime.probe(case.model, case.feeds[0])
        net = net if net.static else runtime.probe_again(net)
        groups = group(net)
        approximate = group(net, approximate=True)
    except Exception as error:
        return _failed(made, "analysis", error)
    if not original.same_optimised:
        made.notes["ONNX Runtime's optimisations change the original's outputs"] += 1
    made.groups, made.prunable = len(groups.groups), len(groups.prunable)
    if may_round(groups, groups.prunable):
        original.tolerance = QUANTISED
    if groups.prunable:
        for kind, plan in plans(groups, case.seed):
            made.plans += 1
            tell(kind)
            try:
                Trial(original, groups, plan, made).run()
            except Exception as error:
                _failed(made, kind, error)
    if any(g.flaw is not None and not g.flaw.comparable for g in approximate.prunable):
        made.plans += 1
        tell("approximate")
        try:
            chosen = plan_of(approximate, "random", np.random.default_rng(case.seed))
            Trial(original, approximate, chosen, made, comparable=False).run()
        except Exception as error:
            _failed(made, "approximate", error)
    return made


def may_round(groups: Groups, cut: Iterable[ChannelGroup]) -> bool:
    """Whether some of these groups are flagged as not exact, and 8-bit activations may round to another step.

    A group has one flaw only, and a zero point other than 0 is told before the rounding.
    """
    return any(g.flaw is not None for g in cut) and any(quantises(n) for n in groups.net.model.graph.node)


def _failed(made: Outcome, plan: str, error: Exception) -> Outcome:
    kind = error.kind if isinstance(error, WrongError) else f"exception {type(error).__name__}"
    made.findings.append(Finding(kind, plan, str(error)[:600]))
    made.status = "wrong"
    return made


def _name(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


# ---- plans


def plans(groups: Groups, seed: int) -> Iterator[tuple[str, Plan]]:
    """A random plan over all groups, one that keeps a single channel of each, and one of another kind."""
    rng = np.random.default_rng(seed)
    for kind in ("random", "one channel", str(rng.choice(KINDS[2:]))):
        yield kind, plan_of(groups, kind, rng)


def plan_of(groups: Groups, kind: str, rng: np.random.Generator) -> Plan:
    """A plan of one of KINDS over all groups that can be pruned."""
    part = {g.id: float(rng.uniform(0.0, 1.0)) for g in groups.prunable}
    if kind == "one channel":
        part = dict.fromkeys(part, 0.0)
    elif kind == "all but one":
        part = {g.id: 1 - 1 / g.size for g in groups.prunable}
    elif kind == "one group":
        part = {str(rng.choice(list(part))): 0.5}
    chosen = {}
    for g in groups.prunable:
        if g.id in part:
            count = min(g.size, max(1, round(g.size * part[g.id])))
            indices = np.sort(rng.choice(g.size, count, replace=False)).astype(np.int64)
            scale = rng.uniform(0.5, 2.0, count) if kind == "scaled" and reweightable(groups, g) else None
            chosen[g.id] = Kept(g.size, indices, scale)
    return Plan(chosen)


# ---- running


class Original:
    """The model as it was, with its outputs. ModelError where ONNX Runtime refuses it.

    same_optimised: whether ONNX Runtime's optimisations leave the outputs as they are (quantised pieces it computes
    otherwise); where not, the optimised pruned model must only run and keep the shapes.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.model = case.model
        self.names = [o.name for o in case.model.graph.output]
        self.bytes = case.model.SerializeToString(deterministic=True)
        self.valid = checked(case.model) is None
        halves = {10, 16}
        self.tolerance = HALF if any(_elem(t) in halves for t in _typed(case.model)) else TOLERANCE
        self.wanted = outputs(case.model, case.feeds, False)
        fast = outputs(case.model, case.feeds, True)
        pairs = [(a, b) for plain, quick in zip(self.wanted, fast, strict=True) for a, b in zip(plain, quick, strict=True)]
        self.same_optimised = all(a.shape == b.shape and difference(a, b, a) <= TOLERANCE for a, b in pairs)


def _typed(model: onnx.ModelProto) -> Iterator[Any]:
    yield from model.graph.initializer
    for node in model.graph.node:
        for a in node.attribute:
            if a.name == "to":
                yield a
            elif a.HasField("t"):
                yield a.t


def _elem(value: Any) -> int:
    return int(value.i if isinstance(value, onnx.AttributeProto) else value.data_type)


def outputs(model: onnx.ModelProto, feeds: tuple[Feeds, ...], optimise: bool) -> list[list[Array]]:
    """All outputs on each set of inputs."""
    session = runtime.session(model, threads=1, optimise=optimise)
    return [runtime.run(session, f) for f in feeds]


def checked(model: onnx.ModelProto) -> str | None:
    """What the ONNX checker, shape inference included, says against a model whose nodes are put in order."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.node[:]
    copy.graph.node.extend(model.graph.node[i] for i in Network(model, {}, {}).order)
    try:
        onnx.checker.check_model(copy, full_check=True)
    except Exception as error:  # the checker and shape inference raise several unrelated types
        return " ".join(str(error).split())
    return None


def difference(want: Array, got: Array, original: Array) -> float:
    """max |got - want| in units of the larger of max |want| and max |original|; infinite where only one is finite."""
    if want.size == 0:
        return 0.0
    if want.dtype.kind != "f":
        return 0.0 if np.array_equal(want, got) else float("inf")
    a, b, o = (v.astype(np.float64) for v in (want, got, original))
    finite = np.isfinite(a)
    if not np.array_equal(finite, np.isfinite(b)):
        return float("inf")
    largest = max(float(np.abs(v[np.isfinite(v)]).max(initial=0)) for v in (a, o))
    worst = float(np.abs(np.where(finite, b, 0) - np.where(finite, a, 0)).max())
    return worst / largest if largest else worst


class Trial:
    """One plan on one graph. comparable: whether the result has to be that of the masked original; its shapes have to."""

    def __init__(self, original: Original, groups: Groups, plan: Plan, made: Outcome, comparable: bool = True) -> None:
        self.original, self.groups, self.plan, self.made, self.comparable = original, groups, plan, made, comparable

    def run(self) -> None:
        """Raises WrongError, or whatever the package raises, when something is wrong."""
        self.pruned, self.masked = surgery(self.groups, self.plan), mask(self.groups, self.plan)
        if self.original.model.SerializeToString(deterministic=True) != self.original.bytes:
            raise WrongError("input changed", "the input model was changed")
        self._count_cuts()
        if self.original.valid and (text := checked(self.pruned)) is not None:
            raise WrongError("checker", text)
        feeds = self.original.case.feeds
        try:
            plain = outputs(self.pruned, feeds, False)
        except ModelError as error:
            if self._masked_fails():
                return
            raise WrongError("does not run", str(error)) from None
        masked = outputs(self.masked, feeds, False)
        for i, feed in enumerate(feeds):
            self._compare(feed, self.original.wanted[i], masked[i], plain[i], i)
        self._compare_optimised(feeds, masked, plain)
        self._check_accounting()

    def _masked_fails(self) -> bool:
        """Whether the masked original does not run either: silent channels took it into a branch that never ran before."""
        try:
            outputs(self.masked, self.original.case.feeds, False)
        except ModelError:
            self.made.notes["the masked original does not run either"] += 1
            return True
        return False

    def _count_cuts(self) -> None:
        """Notes the operators of which an operand or a result loses channels; a shared constant counts where it is cut."""
        removed = {(d.tensor, d.use) for d in self.groups.removed({name: k.indices for name, k in self.plan.groups.items()})}
        for index, node in enumerate(self.original.model.graph.node):
            uses = {(name, f"{index}.{i}") for i, name in enumerate(node.input)}
            if removed & (uses | {(name, "") for name in [*node.input, *node.output]}):
                self.made.cut.add(_name(node))

    def _compare(self, feed: Feeds, original: list[Array], masked: list[Array], pruned: list[Array], number: int) -> None:
        for name, o, a, b in zip(self.original.names, original, masked, pruned, strict=True):
            where = f"output '{name}' on inputs {number}"
            if a.shape != b.shape or a.dtype != b.dtype:
                raise WrongError("shape", f"{where}: {b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}")
            if not self.comparable:
                continue
            error = difference(a, b, o)
            if error <= self.original.tolerance:
                self.made.worst = max(self.made.worst, error)
            elif not self._unstable(feed, error):
                raise WrongError("value", f"{where} is off by {error:.3g} of its range")

    def _compare_optimised(self, feeds: tuple[Feeds, ...], masked: list[list[Array]], plain: list[list[Array]]) -> None:
        if misread(self.pruned):
            self.made.notes["a weight that ONNX Runtime's optimiser misreads"] += 1
            return
        try:
            fast = outputs(self.pruned, feeds, True)
        except ModelError as error:
            if not _invented(self.pruned, str(error)):
                raise WrongError("does not run optimised", str(error)) from None
            self.made.notes["ONNX Runtime's optimiser makes an invalid graph of a valid one"] += 1
            return
        for i, feed in enumerate(feeds):
            results = (self.original.wanted[i], masked[i], fast[i], plain[i])
            for name, o, a, b, c in zip(self.original.names, *results, strict=True):
                if a.shape != b.shape:
                    raise WrongError("shape optimised", f"output '{name}': {list(b.shape)} instead of {list(a.shape)}")
                error = difference(a, b, o) if self.original.same_optimised and self.comparable else 0.0
                if error > self.original.tolerance and error > 2 * difference(a, c, o):
                    if not self._rounded_by_the_optimiser(feed, error, fast[i]) and not self._unstable(feed, error):
                        raise WrongError("value optimised", f"output '{name}' on inputs {i} is off by {error:.3g} of its range")

    def _rounded_by_the_optimiser(self, feed: Feeds, error: float, fast: list[Array]) -> bool:
        """Whether ONNX Runtime's optimiser changes the masked original as well, or rounds otherwise in a quantised network.

        As it stands the pruned model computes what the masked original does, by now. The optimiser merges pairs of
        QuantizeLinear and DequantizeLinear, where one channel is left also those by channel, and multiplies in 8 bits what
        comes of a quantised weight: that is no doing of the cut.
        """
        original, masked = (outputs(m, (feed,), True)[0] for m in (self.original.model, self.masked))
        same = all(difference(a, b, o) <= self.original.tolerance for a, b, o in zip(masked, fast, original, strict=True))
        if same or (error <= QUANTISED and any(quantises(n) for n in self.pruned.graph.node)):
            self.made.notes["ONNX Runtime's optimisations round otherwise"] += 1
            return True
        return False

    def _unstable(self, feed: Feeds, error: float) -> bool:
        """Whether the masked original is as unstable as the difference is large, and other inputs show no difference."""
        rng = np.random.default_rng(0)
        if error > UNSTABLE * self._sway(feed, rng):
            return False
        for _ in range(6):
            fresh = {k: rng.standard_normal(v.shape).astype(v.dtype) if v.dtype.kind == "f" else v for k, v in feed.items()}
            try:
                original, masked, pruned = (
                    outputs(m, (fresh,), False)[0] for m in (self.original.model, self.masked, self.pruned)
                )
            except ModelError:
                continue
            errors = [difference(a, b, o) for o, a, b in zip(original, masked, pruned, strict=True)]
            if max(errors) <= self.original.tolerance:
                self.made.notes["unstable: other inputs agree"] += 1
                return True
            if max(errors) > UNSTABLE * self._sway(fresh, rng):
                return False
        if may_round(self.groups, (self.groups.by_id[name] for name in self.plan.groups)):
            # Such a cut is promised to be right to one step of 8 bits, `exact: false`, and what follows may magnify a step.
            self.made.notes["undecided: a cut that is flagged as not exact, in an unstable graph"] += 1
            return True
        raise WrongError("undecided", f"the graph is as unstable as the error of {error:.3g} is large, on all inputs tried")

    def _sway(self, feed: Feeds, rng: np.random.Generator) -> float:
        """How far the masked original's outputs move when all of its weights and inputs are nudged."""
        original, want = (outputs(m, (feed,), False)[0] for m in (self.original.model, self.masked))
        most = 0.0
        for _ in range(4):
            model, moved = nudged(self.masked, rng), {k: _nudge(v, rng) for k, v in feed.items()}
            try:
                got = outputs(model, (moved,), False)[0]
            except ModelError:
                return float("inf")
            for o, a, b in zip(original, want, got, strict=True):
                most = max(most, float("inf") if a.shape != b.shape else difference(a, b, o))
        return most

    def _check_accounting(self) -> None:
        """What the plan was said to leave is what it left: parameters counted in the file, MACs by a new analysis."""
        before = Accounting(self.groups, len(self.original.bytes))
        said = before.size(before.widths({name: k.indices for name, k in self.plan.groups.items()}))
        apart = len(self.pruned.graph.initializer) - len(self.original.model.graph.initializer)
        counted = parameters(self.pruned)
        if said.params != counted and not apart:
            raise WrongError("parameters", f"{said.params} were predicted, {counted} are there")
        again = group(runtime.probe(self.pruned, self.original.case.feeds[0]))
        after = Accounting(again, self.pruned.ByteSize())
        macs = after.size(after.full_widths).macs
        if said.macs != macs:
            raise WrongError("macs", f"{said.macs} were predicted, {macs} are there")


def misread(model: onnx.ModelProto) -> bool:
    """Whether a MatMul reads a weight in 8 bits with a scale for each row.

    The optimiser of ONNX Runtime 1.31 makes a MatMulIntegerToFloat of it, takes the scales for those of columns, and reads
    beyond them where there are more columns, refuses, or crashes where there are fewer; of models that nobody cut as well.
    """
    by_row = {
        n.output[0]
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and any(a.name == "axis" and a.i in (0, -2) for a in n.attribute)
    }
    return any(n.op_type == "MatMul" and n.input[1] in by_row for n in model.graph.node)


def _invented(model: onnx.ModelProto, text: str) -> bool:
    """Whether an error message is about a node that is not in the model: the optimiser put it there."""
    name, op = re.search(r"Node \(([^)]*)\)", text), re.search(r"while running (\w+) node", text)
    nodes = [n for graph in every_graph(model.graph) for n in graph.node]
    if op is not None:
        return op[1] not in {n.op_type for n in nodes}
    return name is not None and name[1] not in {n.name for n in nodes}


def nudged(model: onnx.ModelProto, rng: np.random.Generator) -> onnx.ModelProto:
    """The model with every floating-point constant off by about a millionth of itself."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    kept = {name for n in copy.graph.node if n.op_type in ("Resize", "Upsample") for name in n.input[1:]}  # sizes hang on them
    protos = [t for t in copy.graph.initializer if t.name not in kept]
    constants = [n for n in copy.graph.node if n.op_type == "Constant" and n.output[0] not in kept]
    protos += [a.t for n in constants for a in n.attribute if a.name == "value"]
    for proto in protos:
        if proto.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            name = proto.name
            proto.CopyFrom(numpy_helper.from_array(np.array(_nudge(numpy_helper.to_array(proto), rng), order="C"), name))
    return copy


def _nudge(value: Array, rng: np.random.Generator) -> Array:
    if value.dtype.kind != "f":
        return value
    moved: Array = np.asarray(value * (1 + NUDGE * rng.uniform(-1, 1, value.shape))).astype(value.dtype)
    return moved


def parameters(model: onnx.ModelProto) -> int:
    """Elements of constants that are read: floating-point ones, and 8-bit ones that are no vectors."""
    graphs = list(every_graph(model.graph))
    read = {name for graph in graphs for node in graph.node for name in node.input}
    read |= {o.name for graph in graphs for o in graph.output}
    total = 0
    for graph in graphs:
        held = {n.output[0]: t for n in graph.node if n.op_type == "Constant" and (t := constant_value(n)) is not None}
        for name, t in {**{t.name: t for t in graph.initializer}, **held}.items():
            if name in read and (t.data_type in FLOATS or (t.data_type in EIGHTS and len(t.dims) > 1)):
                total += int(np.prod(t.dims))
    return total
