"""If, Loop and Scan: where their bodies meet the graph around them (see `onnxprune.control`).

Both branches of an If make its outputs; what a loop carries from one iteration to the next keeps its channels, so that
the state before the first one, the state in the body and the state after the last one are one (ONNX Loop and Scan
clauses). What is scanned gains or loses one axis, along which the iterations lie.
"""

from __future__ import annotations

from collections.abc import Iterator

from onnxprune.channels import Freeze, Tie
from onnxprune.rules.base import Fact, Rule, View, splittable


def _same(view: View, i: int, o: int, scanned: int | None = None, scans: int | None = None) -> Iterator[Fact]:
    """Input `i` and output `o` have the same axes, but for axis `scanned` of the input and `scans` of the output."""
    inner = [axis for axis in range(len(view.shape(i))) if axis != scanned]
    outer = [axis for axis in range(len(view.out_shape(o))) if axis != scans]
    why = f"{view} hands it on in another size"
    if len(inner) != len(outer):  # the stack of no iterations at all has no axes to speak of
        yield from _frozen(view, i, o, why)
        return
    for axis, other in zip(inner, outer, strict=True):
        if view.shape(i)[axis] != view.out_shape(o)[other]:
            yield Freeze(view.x(i, axis), why)
            yield Freeze(view.y(other, o), why)
        elif view.shape(i)[axis] > 1:
            yield Tie(view.x(i, axis), view.y(other, o))


def _made(view: View, i: int, o: int, scans: int | None = None) -> Iterator[Fact]:
    """Like `_same`, where the input is what a body makes: the node in the file does not read it, so it cannot read another."""
    if splittable(view.net, view.name(i)):
        yield from _frozen(view, i, o, f"{view} hands out a constant that other nodes use too")
    else:
        yield from _same(view, i, o, None, scans)


def _frozen(view: View, i: int, o: int, why: str) -> Iterator[Fact]:
    yield from (Freeze(view.x(i, axis), why) for axis in range(len(view.shape(i))))
    yield from (Freeze(view.y(axis, o), why) for axis in range(len(view.out_shape(o))))


def branches(view: View) -> Iterator[Fact]:
    """(condition, outputs of one branch, outputs of the other) -> outputs."""
    count = len(view.node.outputs)
    for o, tensor in enumerate(view.node.outputs):
        if tensor.name:
            yield from _made(view, 1 + o, o)
            yield from _made(view, 1 + count + o, o)


def loop_body(view: View) -> Iterator[Fact]:
    """(trip count, condition, states) -> the same in the body; the first two are scalars."""
    for k in range(2, view.count):
        yield from _same(view, k, k)


def loop(view: View) -> Iterator[Fact]:
    """(states in the body, condition, next states, what is stacked) -> last states, stacks."""
    return _rounds(view, view.count - 1 - len(view.node.outputs), 1)


def scan_body(view: View) -> Iterator[Fact]:
    """(states, what is scanned) -> states, slices."""
    scanned = view.attr("num_scan_inputs")
    axes = view.attr("scan_input_axes", [0] * scanned)
    for k in range(view.count):
        j = k - (view.count - scanned)
        yield from _same(view, k, k, None if j < 0 else axes[j] % len(view.shape(k)))


def scan(view: View) -> Iterator[Fact]:
    """(states in the body, next states, what is stacked) -> last states, stacks."""
    return _rounds(view, view.count - len(view.node.outputs), 0)


def _rounds(view: View, carried: int, between: int) -> Iterator[Fact]:
    axes = view.attr("scan_output_axes", [0] * len(view.node.outputs))
    for o in range(len(view.node.outputs)):
        if o < carried:
            yield from _same(view, o, o)
        rank = max(1, len(view.out_shape(o)))
        yield from _made(view, carried + between + o, o, None if o < carried else axes[o - carried] % rank)


RULES = {
    "If": Rule(branches),
    "LoopBody": Rule(loop_body),
    "Loop": Rule(loop),
    "ScanBody": Rule(scan_body),
    "Scan": Rule(scan),
}
