"""LSTM, GRU and RNN: hidden units and input features.

A unit owns one row in every gate's block of W, R and B, one column of R, and one place in every state. Both directions
of a bidirectional layer keep the same units, since they share tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxprune.channels import Dim, Tie
from onnxprune.rules.base import Consumer, Edit, Fact, Layer, Resize, Rule, SetAttr, View

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
PEEPHOLES = 3
# Inputs: X, W, R, B, sequence_lens, initial_h, initial_c, P. Outputs: Y, Y_h, Y_c.


def hidden_size(view: View) -> int:
    """Units per direction, from R [directions, gates * H, H]."""
    return view.shape(2)[2]


def ties(view: View) -> Iterator[Fact]:
    """Ties of the units (to the columns of R) and of the input features (to the columns of W)."""
    units, gates = hidden_size(view), GATES[view.op]
    unit = view.x(2, 2)
    yield Tie(view.x(0, -1), view.x(1, 2))
    yield Consumer(view.x(1, 2))
    yield Consumer(unit)
    yield Tie(unit, view.x(1, 1), np.tile(np.arange(units), gates), None)
    yield Tie(unit, view.x(2, 1), np.tile(np.arange(units), gates), None)
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


def fixup(view: View, resize: Resize) -> Iterator[Edit]:
    """`hidden_size` counts the units."""
    if resize.touches(view.x(2, 2)) and "hidden_size" in view.node.attrs:
        yield SetAttr("hidden_size", resize.size(view.x(2, 2)))


def layers(view: View) -> list[Layer]:
    """Two linear maps: W on the input, R on the state of the step before (read where the layer puts it out)."""
    steps = int(np.prod(view.shape(0)[:-1]))  # positions in the sequence, over the batch
    directions = view.shape(1)[0]
    outputs = [o for o, tensor in enumerate(view.node.outputs) if tensor.name]
    if not outputs:
        return []
    out = view.y(-1, outputs[0])
    factor = steps * directions
    w_dims, r_dims = (view.x(1, 1), view.x(1, 2)), (view.x(2, 1), view.x(2, 2))
    state: Dim = out if outputs[0] == 0 else view.x(2, 2)  # without Y no tensor holds the states: R is not calibrated on
    seen = view.x(2, 2) if outputs[0] == 0 else None
    return [
        Layer(view.index, view.label, view.op, view.x(0, -1), view.x(1, 2), out, factor, w_dims, view.name(1)),
        Layer(view.index, f"{view.label} (recurrent)", view.op, state, seen, out, factor, r_dims, view.name(2)),
    ]


RULES = {op: Rule(ties, fixup, layers) for op in GATES}
