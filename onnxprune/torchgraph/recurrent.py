"""LSTM, GRU and RNN, step by step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional

from onnxprune.torchgraph.base import Node, Table, Tensor
from onnxprune.torchgraph.linear import text

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor], State]
_DEFAULTS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}


def _check(node: Node, x: Tensor, lengths: Tensor | None) -> None:
    found = [text(a).capitalize() for a in node.get("activations", [])]
    default = _DEFAULTS[node.op]
    if found and found != default * (len(found) // len(default)):
        node.refuse(f"activations {', '.join(found)}")
    if node.get("clip") is not None or node.get("input_forget", 0):
        node.refuse("clip or input_forget")
    if lengths is not None and not bool((lengths == x.shape[0]).all()):
        node.refuse("sequences of different lengths")


def _recurrent(
    node: Node, x: Tensor, weights: Sequence[Tensor], lengths: Tensor | None, first: Sequence[Tensor | None], step: Step
) -> tuple[Tensor, ...]:
    """Outputs Y [time, directions, batch, hidden] and last states [directions, batch, hidden].

    weights: (W, R, B or None) with a first axis of directions. first: initial states; None for zeros.
    """
    by_batch = bool(node.get("layout", 0))
    if by_batch:
        x, first = x.transpose(0, 1), [None if s is None else s.transpose(0, 1) for s in first]
    _check(node, x, lengths)
    w, r, b = weights
    size, kind = r.shape[-1], text(node.get("direction", "forward"))
    made, last = [], []
    for d in range(len(w)):
        back = kind == "reverse" or d == 1
        state: State = tuple(x.new_zeros(x.shape[1], size) if s is None else s[d] for s in first)
        bias = None if b is None else b[d]
        ahead = functional.linear(x, w[d], None if bias is None else bias[: len(bias) // 2])
        rest = x.new_zeros(len(w[d])) if bias is None else bias[len(bias) // 2 :]
        outs = []
        for t in range(x.shape[0] - 1, -1, -1) if back else range(x.shape[0]):
            state = step(ahead[t], state, r[d], rest)
            outs.append(state[0])
        made.append(torch.stack(outs[::-1] if back else outs))
        last.append(state)
    y = torch.stack(made, 1)
    ends = [torch.stack(parts) for parts in zip(*last, strict=True)]
    if by_batch:
        y, ends = y.permute(2, 0, 1, 3), [e.transpose(0, 1) for e in ends]
    return (y, *ends)


def _lstm_step(ahead: Tensor, state: State, r: Tensor, bias: Tensor) -> State:
    """Gates in the order input, output, forget, cell (ONNX operators, LSTM)."""
    i, o, f, c = (ahead + functional.linear(state[0], r, bias)).chunk(4, -1)
    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(c)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def _gru_step(linear_before_reset: bool) -> Step:
    def step(ahead: Tensor, state: State, r: Tensor, bias: Tensor) -> State:
        """Gates in the order update, reset, hidden (ONNX operators, GRU)."""
        h, size = state[0], state[0].shape[-1]
        az, ar, ah = ahead.chunk(3, -1)
        z, reset = torch.sigmoid(torch.cat([az, ar], -1) + functional.linear(h, r[: 2 * size], bias[: 2 * size])).chunk(2, -1)
        if linear_before_reset:
            new = torch.tanh(ah + reset * functional.linear(h, r[2 * size :], bias[2 * size :]))
        else:
            new = torch.tanh(ah + functional.linear(reset * h, r[2 * size :], bias[2 * size :]))
        return ((1 - z) * new + z * h,)

    return step


def _rnn_step(ahead: Tensor, state: State, r: Tensor, bias: Tensor) -> State:
    return (torch.tanh(ahead + functional.linear(state[0], r, bias)),)


def _lstm(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
    c: Tensor | None = None,
    peepholes: Tensor | None = None,
) -> Any:
    if peepholes is not None:
        node.refuse("peepholes")
    return _recurrent(node, x, (w, r, b), lengths, (h, c), _lstm_step)


def _gru(
    node: Node,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None = None,
    lengths: Tensor | None = None,
    h: Tensor | None = None,
) -> Any:
    step = _gru_step(bool(node.get("linear_before_reset", 0))) if node.op == "GRU" else _rnn_step
    return _recurrent(node, x, (w, r, b), lengths, (h,), step)


FUNCTIONS: Table = {"LSTM": _lstm, "GRU": _gru, "RNN": _gru}
