"""Pass `surgery`: deletes channels from a model; and its mirror image, `mask`, which only silences them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx

from onnxprune.channels import ChannelGroup, Dim, Index
from onnxprune.contraction import silent_value
from onnxprune.edit import Editor, Transform
from onnxprune.errors import PlanError
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.inline import simplified
from onnxprune.plan import Plan
from onnxprune.rules import STANDARD, Become, Edit, Resize, RuleTable, SetInput, View
from onnxprune.symbolic import Symbols


def surgery(groups: Groups, plan: Plan, rules: RuleTable = STANDARD) -> onnx.ModelProto:
    """The model without the channels that `plan` drops. Pure: the input model is not touched.

    Weights lose slices; attributes and shape constants that count channels follow; consumers are rescaled where the plan
    says so. Whatever is not concerned stays as it was, to the byte. Raises PlanError when the plan does not fit.
    """
    check(groups, plan)
    net = groups.net
    removed = groups.removed({name: k.indices for name, k in plan.groups.items()})
    editor = Editor(net)
    editor.constants(_chain(_scalings(groups, plan), {d: partial(_delete, r) for d, r in removed.items()}))
    resize = Resize(net, removed)
    touched: dict[str, dict[int, int]] = {}
    for dim in removed:
        touched.setdefault(dim.tensor, {})[dim.axis] = resize.size(dim)
    symbols = Symbols(net)
    written: set[tuple[int, int]] = set()
    for index in net.order:
        node = net.model.graph.node[index]
        counted = (d for name in node.input for d in symbols.sizes_in(name))
        if any(name in touched for name in [*node.input, *node.output]) or any(d in removed for d in counted):
            rule = rules.get(("" if node.domain == "ai.onnx" else node.domain, node.op_type))
            if rule is not None and rule.fixup is not None:
                for edit in rule.fixup(View(net, symbols, index, lambda _: True), resize):
                    editor.node(index, edit)
                    written.update((index, position) for position in operands(edit))
    for pin in groups.pins:
        if any(dim in removed for dim in pin.dims) and (pin.index, pin.position) not in written:
            editor.node(pin.index, SetInput(pin.position, pin.value))
    editor.declare(touched)
    return simplified(editor.model)  # a condition may have become a constant


def operands(edit: Edit) -> list[int]:
    """The inputs of its node that an edit makes constants."""
    if isinstance(edit, SetInput):
        return [edit.position]
    return list(range(1, 1 + len(edit.constants))) if isinstance(edit, Become) else []


def mask(groups: Groups, plan: Plan) -> onnx.ModelProto:
    """The original model with the removed slices of every consumer set to zero (and the kept ones rescaled).

    A quantised weight has its zero point written instead, where that is another number. Where two activations are
    multiplied, the slices of what makes one of them. Where a tensor is quantised by its range, those of what makes the
    channel, so that it does not widen the range either. This computes what the pruned model must compute: the oracle that
    every cut is held against.
    """
    check(groups, plan)
    zeroings: dict[Dim, Transform] = {}
    for dim, positions in groups.removed({name: k.indices for name, k in plan.groups.items()}).items():
        if groups.roles.get(dim) in ("consumer", "silencer") or dim in groups.ranged:
            zeroings[dim] = partial(_silence, positions, silent_value(groups, dim.tensor))
    editor = Editor(groups.net)
    editor.constants(_chain(_scalings(groups, plan), zeroings))
    return editor.model


def check(groups: Groups, plan: Plan) -> None:
    """Raises PlanError unless every group of the plan exists, can be pruned, and keeps at least one channel."""
    for name, kept in plan.groups.items():
        group = groups.by_id.get(name)
        if group is None:
            raise PlanError(
                f"the plan names group '{name}', which this model does not have", hint="was it made for another model?"
            )
        if group.size != kept.size or np.any(kept.indices < 0) or np.any(kept.indices >= group.size):
            raise PlanError(f"the plan gives group '{name}' channels that it does not have", hint=f"it has {group.size}")
        if len(kept.indices) == 0 or np.any(np.diff(kept.indices) <= 0):
            raise PlanError(f"the plan for group '{name}' must keep at least one channel, in rising order, each once")
        if group.frozen and len(kept.indices) < group.size:
            raise PlanError(f"the plan cuts group '{name}', which is frozen: {group.reason}")
        if kept.scale is not None and not reweightable(groups, group):
            raise PlanError(f"the plan rescales group '{name}', but a consumer's weight has other uses")


def reweightable(groups: Groups, group: ChannelGroup) -> bool:
    """Whether every consumer of the group can be rescaled without touching anything else.

    A consumer's weight must be a floating-point constant, read by that consumer alone (data movement in between is fine).
    A product of two activations has none.
    """
    if any(slot.dim in groups.multiplied for slot in group.slots):
        return False
    for slot in group.slots:
        if slot.dim in groups.summed and not _alone(groups, slot.dim.tensor):
            return False
    return True


def _alone(groups: Groups, tensor: str) -> bool:
    net = groups.net
    if tensor in net.initializers:
        return net.kinds[tensor].kind == "f" and len(net.uses.get(tensor, [])) == 1
    producer = net.producer.get(tensor)
    if producer is None or len(net.uses.get(tensor, [])) != 1:
        return False
    node = net.model.graph.node[producer]
    return node.op_type in ("Transpose", "Identity") and _alone(groups, node.input[0])


def _scalings(groups: Groups, plan: Plan) -> dict[Dim, Transform]:
    """Multiplies every consumer's slices by the weight of their channel."""
    factors: dict[Dim, Array] = {}
    for name, kept in plan.groups.items():
        if kept.scale is None:
            continue
        group = groups.by_id[name]
        by_channel = np.ones(group.size)
        by_channel[kept.indices] = kept.scale
        for slot in group.slots:
            if groups.roles.get(slot.dim) == "consumer":
                factor = factors.setdefault(slot.dim, np.ones(groups.full(slot.dim)))
                factor[slot.positions] = by_channel[slot.channels]
    return {dim: partial(_multiply, factor) for dim, factor in factors.items()}


def _chain(first: Mapping[Dim, Transform], second: Mapping[Dim, Transform]) -> dict[Dim, Transform]:
    def both(a: Transform, b: Transform, value: Array, axis: int) -> Array:
        return b(a(value, axis), axis)

    chained = dict(first)
    for dim, transform in second.items():
        chained[dim] = partial(both, first[dim], transform) if dim in first else transform
    return chained


def _delete(positions: Index, value: Array, axis: int) -> Array:
    return np.delete(value, positions, axis)


def _silence(positions: Index, silent: Array, value: Array, axis: int) -> Array:
    value = value.copy()
    np.moveaxis(value, axis, 0)[positions] = np.moveaxis(np.broadcast_to(silent, value.shape), axis, 0)[positions]
    return value


def _multiply(factor: Array, value: Array, axis: int) -> Array:
    shape = [1] * value.ndim
    shape[axis] = len(factor)
    out = np.empty(value.shape, value.dtype)
    return np.multiply(value, factor.reshape(shape), out=out, dtype=np.float64, casting="unsafe")  # no copy in float64
