"""The share of every channel in what a linear layer computes, by ONNX Runtime alone: for providers other than the CPU.

For a part (sign of the weights, sign of the activations) all terms are non-negative and the share of channel j in output
i at patch p is c_ijp / z_ip, with c_ijp the sum of the channel's terms and z_ip the sum of all. The numerators of all
channels come from one grouped convolution, the denominators from the plain one. Only [U] maxima leave a batch, and
filters go in chunks, so memory stays bounded.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper

from onnxprune import runtime
from onnxprune.channels import Index
from onnxprune.contraction import Contraction
from onnxprune.criteria.base import Reduce
from onnxprune.criteria.kernels import LEAST, TINY, Part, build_session, parts
from onnxprune.graph import Array
from onnxprune.threads import Workers

CHUNK = 4 << 20  # elements of the largest intermediate


class Shares:
    """Maximal shares for one kind of contraction; sessions are built once and used for every batch."""

    def __init__(self, reduce: Reduce = "sum", providers: list[str] | None = None) -> None:
        self.reduce, self.providers = reduce, providers
        self.workers = Workers(1)  # the provider has its own
        self._sessions: dict[Any, Any] = {}

    def largest(self, c: Contraction, units: Index, known: Array, key: object = None) -> tuple[Array, int]:
        """(the larger of `known` and the largest share of every unit, over all outputs and samples [U]; live sign parts).

        units: [U, m] positions within the contraction's own channel axis. Nothing is kept by `key`.
        """
        best = known.astype(np.float64)
        live = 0
        for part in parts(c):
            live += 1
            np.maximum(best, self.part(c, part, units), out=best)
        return best, live

    def part(self, c: Contraction, part: Part, units: Index) -> Array:
        """Maximal share of every unit [U] in one sign part."""
        z = self._forward(c, part)
        floor = np.maximum(TINY * z.max(axis=tuple(range(1, z.ndim)), keepdims=True), LEAST)
        r = np.divide(np.float32(1), z, out=np.zeros_like(z), where=z > floor)
        n, filters = r.shape[:2]
        patches = int(np.prod(r.shape[2:]))
        r = r.reshape(n, filters, patches)
        w = part.w if not c.transposed else np.swapaxes(part.w, 0, 1)  # [O, I, *taps]
        x = part.x[:, units.ravel()]
        chosen = w[:, units.ravel()]  # [O, U*m, *taps]
        taps = int(np.prod(w.shape[2:]))
        pointwise = taps == 1 and units.shape[1] == 1 and patches == int(np.prod(x.shape[2:])) and not _pads(c)
        per_filter = units.size * patches * (taps if self.reduce == "max" else 1)
        step_n = max(1, min(n, CHUNK // max(1, per_filter)))
        step_f = max(1, min(filters, CHUNK // max(1, per_filter * step_n)))
        best = np.zeros(len(units))
        for a in range(0, n, step_n):
            for f in range(0, filters, step_f):
                block = (x[a : a + step_n], chosen[f : f + step_f], r[a : a + step_n, f : f + step_f])
                found = self._pointwise(*block) if pointwise else self._general(c, units.shape, *block)
                np.maximum(best, found, out=best)
        return np.minimum(best, 1.0)  # rounding may leave 1 + 1e-7

    def _forward(self, c: Contraction, part: Part) -> Array:
        key = ("forward", c.transposed, part.w.shape[2:], _frozen(c))
        if key not in self._sessions:
            op = "ConvTranspose" if c.transposed else "Conv"
            node = helper.make_node(op, ["x", "w"], ["z"], **dict(c.attributes))
            self._sessions[key] = self._session([node], ["x", "w"], ["z"])
        return np.asarray(runtime.run(self._sessions[key], {"x": part.x, "w": part.w})[0])

    def _pointwise(self, x: Array, w: Array, r: Array) -> Array:
        """One tap: the maximum over filters of w R first, then times the activation. x [n, U, *], w [G, U, 1], r [n, G, P]."""
        if "pointwise" not in self._sessions:
            nodes = [
                helper.make_node("Mul", ["w", "r"], ["wr"]),
                helper.make_node("ReduceMax", ["wr"], ["h"], axes=[2], keepdims=0),
                helper.make_node("Mul", ["x", "h"], ["share"]),
                helper.make_node("ReduceMax", ["share"], ["s"], axes=[0, 2], keepdims=0),
            ]
            self._sessions["pointwise"] = self._session(nodes, ["x", "w", "r"], ["s"])
        feeds = {
            "x": np.ascontiguousarray(x.reshape(x.shape[0], x.shape[1], -1)),
            "w": np.ascontiguousarray(w.reshape(w.shape[:2]).T)[None, :, :, None],
            "r": np.ascontiguousarray(r)[:, None],
        }
        return np.asarray(runtime.run(self._sessions["pointwise"], feeds)[0], np.float64)

    def _general(self, c: Contraction, shape: tuple[int, ...], x: Array, w: Array, r: Array) -> Array:
        """Numerators from a grouped convolution, channel-major and filter-minor as ONNX orders its outputs."""
        (count, per), filters, taps = shape, w.shape[0], w.shape[2:]
        each = np.swapaxes(w, 0, 1)  # [U*m, G, *taps]
        k = int(np.prod(taps))
        if self.reduce == "max":  # every tap by itself: one filter with a single non-zero entry for each
            spread = np.zeros((*each.shape[:2], k, k), np.float32)
            spread[:, :, np.arange(k), np.arange(k)] = each.reshape(*each.shape[:2], k)
            each = spread.reshape(each.shape[0], filters * k, *taps)
        singles = k if self.reduce == "max" else 1
        weight = each if c.transposed else each.reshape(-1, 1, *taps)
        key = ("general", c.transposed, count, per, filters, taps, _frozen(c))
        if key not in self._sessions:
            self._sessions[key] = self._general_session(c, count, per, filters, singles)
        feeds = {
            "x": np.ascontiguousarray(x),
            "w": np.ascontiguousarray(weight),
            "r": np.ascontiguousarray(r)[:, None, None, :, None, :],
        }
        return np.asarray(runtime.run(self._sessions[key], feeds)[0], np.float64)

    def _general_session(self, c: Contraction, count: int, per: int, filters: int, singles: int) -> Any:
        op = "ConvTranspose" if c.transposed else "Conv"
        shape = np.array([0, count, per, filters, singles, -1], np.int64)
        combine = "ReduceSum" if self.reduce == "sum" else "ReduceMax"
        axes: dict[str, Any] = {"axes": [2]} if combine == "ReduceMax" else {}
        nodes = [
            helper.make_node(op, ["x", "w"], ["flat"], **{**c.attributes, "group": count * per}),
            helper.make_node("Reshape", ["flat", "shape"], ["each"]),
        ]
        if per > 1:
            nodes.append(helper.make_node(combine, ["each", *(["two"] if not axes else [])], ["num"], keepdims=1, **axes))
        nodes.append(helper.make_node("Mul", ["num" if per > 1 else "each", "r"], ["share"]))
        nodes.append(helper.make_node("ReduceMax", ["share"], ["s"], axes=[0, 2, 3, 4, 5], keepdims=0))
        return self._session(nodes, ["x", "w", "r"], ["s"], shape=shape, two=np.array([2], np.int64))

    def _session(self, nodes: list[onnx.NodeProto], inputs: list[str], outputs: list[str], **constants: Any) -> Any:
        return build_session(nodes, inputs, outputs, constants, self.providers)


def _frozen(c: Contraction) -> tuple[Any, ...]:
    return tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in sorted(c.attributes.items()))


def _pads(c: Contraction) -> bool:
    """Whether patches and positions might not coincide although they are equally many."""
    pads = c.attributes.get("pads", [0])
    strides = c.attributes.get("strides", [1])
    return any(pads) or any(s != 1 for s in strides) or c.attributes.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
