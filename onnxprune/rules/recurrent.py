"""LSTM, GRU and RNN: hidden units and input features.

A unit owns one row in every gate's block of W, R and B, one column of R, and one place in every state. Both directions
of a bidirectional layer keep the same units, since they share tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from onnxprune.channels import Dim, Tie
from onnxprune.rules.base import Consumer, Fact, Layer, Resize, Rule, View
from onnxprune.rules.edits import Edit, SetAttr

OPERATORS = ["LSTM", "GRU", "RNN"]
PEEPHOLES = 3
# Inputs: X, W, R, B, sequence_lens, initial_h, initial_c, P. Outputs: Y, Y_h, Y_c.


@dataclass(frozen=True)
class Form:
    """How W and R lie: the axis that is summed over (input features, units) and the one of the gates' rows."""

    summed: int = 2
    rows: int = 1


PLAIN = Form()


def hidden_size(view: View, form: Form = PLAIN) -> int:
    """Units per direction, from R [directions, gates * H, H]."""
    return view.shape(2)[form.summed]


def ties(view: View, form: Form = PLAIN) -> Iterator[Fact]:
    """Ties of the units (to the columns of R) and of the input features (to the columns of W)."""
    units, unit = hidden_size(view, form), view.x(2, form.summed)
    gates = view.shape(2)[form.rows] // units
    yield Tie(view.x(0, -1), view.x(1, form.summed))
    yield Consumer(view.x(1, form.summed))
    yield Consumer(unit)
    yield Tie(unit, view.x(1, form.rows), np.tile(np.arange(units), gates), None)
    yield Tie(unit, view.x(2, form.rows), np.tile(np.arange(units), gates), None)
    if view.has(3):
        yield Tie(unit, view.x(3, 1), np.tile(np.arange(units), 2 * gates), None)
    for state in (5, 6):
        if view.has(state):
            yield Tie(unit, view.x(state, -1))
    if view.has(7):
        yield Tie(unit, view.x(7, 1), np.tile(np.arange(units), PEEPHOLES), None)
    for o, tensor in enumerate(view.node.outputs):
        if tensor.name:
            yield Tie(unit, view.y(-1, o))


def fixup(view: View, resize: Resize, form: Form = PLAIN) -> Iterator[Edit]:
    """`hidden_size` counts the units."""
    unit = view.x(2, form.summed)
    if resize.touches(unit) and "hidden_size" in view.node.attrs:
        yield SetAttr("hidden_size", resize.size(unit))


def layers(view: View, form: Form = PLAIN) -> list[Layer]:
    """Two linear maps: W on the input, R on the state of the step before (read where the layer puts it out)."""
    steps = int(np.prod(view.shape(0)[:-1]))  # positions in the sequence, over the batch
    directions = view.shape(1)[0]
    outputs = [o for o, tensor in enumerate(view.node.outputs) if tensor.name]
    if not outputs:
        return []
    out = view.y(-1, outputs[0])
    factor = steps * directions
    (w, w_rows), (r, r_rows) = ((view.x(i, form.summed), view.x(i, form.rows)) for i in (1, 2))
    state: Dim = out if outputs[0] == 0 else r  # without Y no tensor holds the states: R is not calibrated on
    seen = r if outputs[0] == 0 else None
    return [
        Layer(view.index, view.label, view.op, view.x(0, -1), w, out, factor, (w_rows, w), view.name(1)),
        Layer(view.index, f"{view.label} (recurrent)", view.op, state, seen, out, factor, (r_rows, r), view.name(2)),
    ]


RULES = {op: Rule(ties, fixup, layers) for op in OPERATORS}
