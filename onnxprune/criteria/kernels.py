"""What both kernels of the sensitivity share: sign parts, the smallest denominator that counts, small ONNX graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxprune import runtime
from onnxprune.contraction import Contraction
from onnxprune.graph import Array

TINY = 1e-6  # denominators below this share of the sample's largest one in the layer count as zero: no share
LEAST = 1e-18  # and so do those this small for activations and weights near 1, whose square float32 could not divide by
_OPSET = helper.make_opsetid("", 17)


@dataclass(frozen=True)
class Part:
    """One sign part of a contraction, all entries non-negative."""

    x: Array
    w: Array


def parts(c: Contraction) -> Iterator[Part]:
    """The sign parts that are not identically zero: at most two where activations are non-negative, else four."""
    for sign_x in (1, -1):
        x = np.maximum(c.x if sign_x > 0 else -c.x, 0) if c.x.size and (sign_x < 0 or c.x.min() < 0) else c.x
        if sign_x < 0 and not x.any():
            return
        for sign_w in (1, -1):
            w = np.maximum(c.w * np.float32(sign_w), 0)
            if w.any():
                yield Part(np.ascontiguousarray(_scaled(x, tuple(range(1, x.ndim)))), _scaled(w, None))


def _scaled(a: Array, axes: tuple[int, ...] | None) -> Array:
    """`a` times powers of two that bring the largest entry over `axes` near 1: shares stay, and no square underflows."""
    _, exponent = np.frexp(a.max(axis=axes, keepdims=True, initial=0))
    factor = np.exp2(np.clip(-exponent, -126, 126).astype(np.float32))
    return np.asarray(a * factor)


def build_session(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[str],
    outputs: Sequence[str],
    constants: Mapping[str, Any],
    providers: list[str] | None,
    threads: int | None = None,
    kinds: Mapping[str, int] | None = None,
) -> Any:
    """A session for a small graph; `constants` become its initializers. kinds: of inputs and outputs that are not float32."""
    used, types = {x for n in nodes for x in n.input}, kinds or {}
    graph = helper.make_graph(
        nodes,
        "shares",
        [helper.make_tensor_value_info(i, types.get(i, TensorProto.FLOAT), None) for i in inputs],
        [helper.make_tensor_value_info(o, types.get(o, TensorProto.FLOAT), None) for o in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items() if n in used],
    )
    return runtime.session(helper.make_model(graph, opset_imports=[_OPSET], ir_version=8), providers=providers, threads=threads)
