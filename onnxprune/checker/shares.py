"""Sensitivities measured once more, the plain way: unfold every patch, form every share, take the largest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from onnxprune import runtime
from onnxprune.graph import Array
from onnxprune.groups import Groups
from onnxprune.rules import Layer

TINY = 1e-6  # sums below this share of the sample's largest have no shares
CHUNK = 1 << 22  # elements of one block of shares
WORK = 2e9  # shares that are formed at most; of larger networks only the first samples are measured


class Unsupported(Exception):  # noqa: N818 - no error: it says what was left unchecked
    """The layer is of a kind whose shares this module does not form."""


def readers(groups: Groups) -> dict[str, list[str]]:
    """For every layer that sums over channels that can be cut the groups that it reads, in order."""
    found: dict[str, list[str]] = {}
    for layer in groups.layers:
        read = [g.id for g, _ in groups.at.get(layer.x, []) if not g.frozen]
        if layer.sums and read:
            found.setdefault(layer.name, []).extend(x for x in dict.fromkeys(read) if x not in found.get(layer.name, []))
    return found


def layers(groups: Groups, names: set[str]) -> list[Layer]:
    """The layers of these names. Raises Unsupported for one that is no float convolution or matrix product."""
    wanted = [x for x in groups.layers if x.sums and x.name in names]
    for layer in wanted:
        plain = layer.steps is None and layer.x_steps is None and layer.other is None and layer.w is not None
        if not plain or layer.op not in ("Conv", "Gemm", "MatMul") or groups.net.inside.followed:
            raise Unsupported(f"layer '{layer.name}' ({layer.op})")
    return wanted


def affordable(groups: Groups, wanted: list[Layer]) -> int:
    """On how many samples all shares of these layers can be formed; 0 where one would take minutes."""
    each = sum(groups.full(x.x) * groups.outputs(x) for x in wanted)
    return 0 if each > WORK else max(1, int(WORK / max(1, 2 * each)))


class Measured:
    """Largest shares so far, by layer and group [channels], and the live sign parts of every layer."""

    def __init__(self, groups: Groups, wanted: list[Layer]) -> None:
        self.groups, self.wanted = groups, wanted
        self.weights = runtime.fixed_values(groups.net, dict.fromkeys(x.weight for x in wanted))
        self.largest: dict[tuple[str, str], Array] = {}
        self.parts: dict[str, int] = {}
        self.exempt: dict[str, int] = {}
        self._session = runtime.session(runtime.with_outputs(groups.net.source, [x.x.tensor for x in wanted]))

    def see(self, feeds: Mapping[str, Array]) -> None:
        """Forms the shares of one batch."""
        names = list(dict.fromkeys(x.x.tensor for x in self.wanted))
        seen = dict(zip(names, runtime.run(self._session, feeds, names), strict=True))
        for layer in self.wanted:
            live = 0
            for x, w, places in _plain(self.groups, layer, seen[layer.x.tensor], self.weights[layer.weight]):
                units = self._units(layer, places)
                signs = [(a, b) for a in (1, -1) for b in (1, -1) if (x * a > 0).any() and (w * b > 0).any()]
                live = max(live, len(signs))
                for a, b in signs:
                    self._part(layer, np.maximum(x * a, 0), np.maximum(w * b, 0), units)
            self.parts[layer.name] = max(self.parts.get(layer.name, 0), live)

    def _units(self, layer: Layer, places: Array) -> list[tuple[str, int, Array, Array]]:
        """(group, its size, channel, position within `places`) of what can be cut."""
        found = []
        index = {int(p): k for k, p in enumerate(places)}
        for group, slot in self.groups.at.get(layer.x, []):
            inside = [(int(c), index[int(p)]) for p, c in zip(slot.positions, slot.channels, strict=True) if int(p) in index]
            if not group.frozen and inside:
                channels, at = np.array(inside).T
                found.append((group.id, group.size, channels, at))
        return found

    def _part(self, layer: Layer, x: Array, w: Array, units: list[tuple[str, int, Array, Array]]) -> None:
        """x [n, I, taps, P], w [O, I, taps], neither negative."""
        filters = w.shape[0]
        for sample in x:
            step = max(1, CHUNK // max(1, sample.shape[0] * sample.shape[2]))
            terms = [np.matmul(w[f : f + step].transpose(1, 0, 2), sample) for f in range(0, filters, step)]  # [I, O, P]
            sums = [t.sum(axis=0, dtype=np.float64) for t in terms]
            floor = TINY * max(float(s.max(initial=0.0)) for s in sums)
            for t, s in zip(terms, sums, strict=True):
                inverse = np.divide(1.0, s, out=np.zeros_like(s), where=s > floor).astype(np.float32)
                for name, size, channels, at in units:
                    whole = t[at[np.argsort(channels)]]
                    if len(at) != size or not (np.bincount(channels, minlength=size) == 1).all():
                        whole = np.zeros((size, *t.shape[1:]), np.float32)
                        np.add.at(whole, channels, t[at])
                    best = (whole * inverse).reshape(size, -1).max(axis=1, initial=0.0)
                    have = self.largest.setdefault((layer.name, name), np.zeros(size))
                    np.maximum(have, np.minimum(best, 1.0), out=have)


def _plain(groups: Groups, layer: Layer, x: Array, w: Array) -> Iterator[tuple[Array, Array, Array]]:
    """(patches [n, I, taps, P], weights [O, I, taps], positions on the layer's channel axis) of every group of channels."""
    attributes = groups.net.nodes[layer.index].attrs
    if layer.op != "Conv":
        assert layer.w is not None
        channels = x.shape[layer.x.axis]
        rows = np.moveaxis(x, layer.x.axis, 1).reshape(len(x), channels, 1, -1)
        yield rows, np.moveaxis(w, layer.w.axis, -1).reshape(-1, channels, 1), np.arange(channels)
        return
    count = int(attributes.get("group", 1))
    patches = _patches(x, w.shape[2:], attributes)
    each, filters = x.shape[1] // count, len(w) // count
    for g in range(count):
        at = np.arange(g * each, (g + 1) * each)
        yield patches[:, at], w[g * filters : (g + 1) * filters].reshape(filters, each, -1), at


def _patches(x: Array, taps: tuple[int, ...], attributes: Mapping[str, Any]) -> Array:
    rank = len(taps)
    strides = list(attributes.get("strides", [1] * rank))
    dilations = list(attributes.get("dilations", [1] * rank))
    reach = [d * (t - 1) + 1 for d, t in zip(dilations, taps, strict=True)]
    pads = list(attributes.get("pads", [0] * 2 * rank))
    mode = attributes.get("auto_pad", "NOTSET")
    if mode.startswith("SAME"):
        total = [max((-(-n // s) - 1) * s + k - n, 0) for n, s, k in zip(x.shape[2:], strides, reach, strict=True)]
        small, large = [t // 2 for t in total], [t - t // 2 for t in total]
        pads = small + large if mode == "SAME_UPPER" else large + small
    elif mode == "VALID":
        pads = [0] * 2 * rank
    x = np.pad(x, [(0, 0), (0, 0), *((pads[i], pads[i + rank]) for i in range(rank))])
    view = sliding_window_view(x, tuple(reach), axis=tuple(range(2, 2 + rank)))
    view = view[(slice(None), slice(None), *(slice(None, None, s) for s in strides))]
    view = view[(*[slice(None)] * (2 + rank), *(slice(None, None, d) for d in dilations))]
    out = int(np.prod(view.shape[2 : 2 + rank]))
    flat = view.reshape(*view.shape[:2], out, -1)
    return np.ascontiguousarray(flat.transpose(0, 1, 3, 2))
