"""Random small ONNX networks for the oracle: realistic blocks in a row, valid by construction, weights from a seed.

A network is drawn as a list of blocks over one running tensor [N, C, *space] whose shape is always known, and a head.
How it is written down varies as exporters vary: opset, weights as initializers or Constant nodes or behind Identity and
Transpose, initializers listed as inputs, vectors shared by accident, value_info, unsorted nodes, fixed or dynamic batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

Array = np.ndarray[Any, Any]
WIDEST = 12  # channels; a network is brought back to fewer when it gets wider
FINEST = 10  # positions along one spatial axis


@dataclass(frozen=True)
class T:
    """A tensor: its name and its shape in the first run."""

    name: str
    shape: tuple[int, ...]

    @property
    def c(self) -> int:
        return self.shape[1]

    @property
    def space(self) -> tuple[int, ...]:
        return self.shape[2:]


@dataclass(frozen=True, eq=False)
class Case:
    """A network with inputs: `probe` is what it is analysed on, `feeds` what it is compared on."""

    model: onnx.ModelProto
    probe: dict[str, Array]
    feeds: list[dict[str, Array]]
    story: tuple[str, ...]

    def __repr__(self) -> str:
        return f"Case({' > '.join(self.story)})\n{onnx.printer.to_text(_light(self.model))}"


def _light(model: onnx.ModelProto) -> onnx.ModelProto:
    """Without its weights, for printing."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    del copy.graph.initializer[:]
    return copy


@dataclass
class Build:
    """Writes a network node by node; every method returns the tensor that it makes."""

    draw: Callable[..., Any]
    opset: int
    rank: int
    batch: int
    dynamic: bool
    style: str
    share: bool
    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)
    shared: dict[tuple[float, int], str] = field(default_factory=dict)
    count: int = 0

    # ---- draws

    def pick(self, options: Sequence[Any]) -> Any:
        return self.draw(st.sampled_from(list(options)))

    def flag(self) -> bool:
        return bool(self.draw(st.booleans()))

    def number(self, low: int, high: int) -> int:
        return int(self.draw(st.integers(low, high)))

    # ---- constants and nodes

    def fresh(self, like: str) -> str:
        self.count += 1
        return f"{like}_{self.count}"

    def node(self, op: str, reads: Sequence[T | str], outputs: Sequence[str], **attributes: Any) -> None:
        names = [r if isinstance(r, str) else r.name for r in reads]
        while names and not names[-1]:
            names.pop()
        self.nodes.append(helper.make_node(op, names, list(outputs), outputs[0], **attributes))

    def op(self, op: str, reads: Sequence[T | str], shape: Sequence[int], **attributes: Any) -> T:
        name = self.fresh(op.lower())
        self.node(op, reads, [name], **attributes)
        return T(name, tuple(shape))

    def const(self, value: Array) -> str:
        """A small constant: a vector, a shape, a bound."""
        name = self.fresh("c")
        proto = numpy_helper.from_array(np.array(value, order="C"), name)
        if self.style == "constant":
            self.node("Constant", [], [name], value=proto)
        else:
            self.weights.append(proto)
        return name

    def ints(self, values: Sequence[int]) -> str:
        return self.const(np.array(values, np.int64))

    def weight(self, *shape: int, inner: int) -> str:
        """A random weight of `shape` that sums over `inner` values, written in the network's style."""
        value = (self.rng.standard_normal(shape) * 1.2 / np.sqrt(inner)).astype(np.float32)
        if self.style == "identity":
            return self.op("Identity", [self.const(value)], shape).name
        if self.style == "transpose":
            perm = list(range(len(shape)))[::-1]
            return self.op("Transpose", [self.const(value.transpose(perm))], shape, perm=perm).name
        return self.const(value)

    def vector(self, *shape: int, around: float = 0.0) -> str:
        """A random vector; where the exporter shares equal ones, one constant vector for all layers."""
        size = int(np.prod(shape))
        if self.share and len(shape) == 1:
            if (around, size) not in self.shared:
                self.shared[around, size] = self.const(np.full(shape, around, np.float32))
            return self.shared[around, size]
        return self.const((around + 0.3 * self.rng.standard_normal(shape)).astype(np.float32))

    # ---- operators whose form depends on the opset

    def by_axes(self, op: str, x: T, axes: Sequence[int], shape: Sequence[int], since: int, **attributes: Any) -> T:
        """An operator whose `axes` became an input in opset `since`."""
        if self.opset >= since:
            return self.op(op, [x, self.ints(axes)], shape, **attributes)
        return self.op(op, [x], shape, axes=list(axes), **attributes)

    def unsqueeze(self, x: T, axes: Sequence[int]) -> T:
        shape = list(x.shape)
        for a in sorted(axes):
            shape.insert(a, 1)
        return self.by_axes("Unsqueeze", x, axes, shape, 13)

    def mean(self, x: T, axes: Sequence[int], keep: bool, op: str = "ReduceMean") -> T:
        shape = [1 if i in axes else n for i, n in enumerate(x.shape) if keep or i not in axes]
        return self.by_axes(op, x, axes, shape, 13 if op == "ReduceSum" else 18, keepdims=int(keep))

    def slice(self, x: T, bounds: Sequence[tuple[int, int, int, int]]) -> T:
        """bounds: (axis, start, end, step)."""
        shape = list(x.shape)
        for axis, start, end, step in bounds:
            shape[axis] = len(range(shape[axis])[start : None if end < -shape[axis] else end : step])
        axes, starts, ends, steps = (list(v) for v in zip(*bounds, strict=True))
        if self.opset >= 10:
            kind = self.pick([np.int64, np.int32])
            operands = [self.const(np.array(v).clip(-(2**31), 2**31 - 1).astype(kind)) for v in (starts, ends, axes, steps)]
            return self.op("Slice", [x, *operands[: 4 if set(steps) != {1} or self.flag() else 3]], shape)
        if set(steps) != {1}:  # opset 9 has no steps
            return self.act(x)
        return self.op("Slice", [x], shape, axes=axes, starts=starts, ends=ends)

    def pad(self, x: T, before: Sequence[int], after: Sequence[int]) -> T:
        shape = [n + b + a for n, b, a in zip(x.shape, before, after, strict=True)]
        flat = [*before, *after]
        if self.opset < 11:
            return self.op("Pad", [x], shape, pads=flat)
        value = [self.const(np.float32(0))] if self.flag() else []
        return self.op("Pad", [x, self.ints(flat), *value], shape)

    def split(self, x: T, sizes: Sequence[int], spell: bool) -> list[T]:
        """Parts along axis 1; `spell` writes even sizes out too."""
        names = [self.fresh("split") for _ in sizes]
        even = len({*sizes}) == 1 or list(sizes) == [-(-x.c // len(sizes))] * (len(sizes) - 1) + [sizes[-1]]
        if self.opset >= 18 and even and not spell:
            self.node("Split", [x], names, axis=1, num_outputs=len(sizes))
        elif self.opset >= 13:
            self.node("Split", [x, self.ints(sizes)], names, axis=1)
        else:
            self.node("Split", [x], names, axis=1, split=list(sizes))
        return [T(n, (x.shape[0], s, *x.space)) for n, s in zip(names, sizes, strict=True)]

    def shape_of(self, x: T, axis: int) -> T:
        """The size of an axis at run time, as a vector of one element."""
        whole = self.op("Shape", [x], (len(x.shape),))
        if self.flag():
            return self.op("Gather", [whole, self.ints([axis])], (1,), axis=0)
        scalar = self.op("Gather", [whole, self.const(np.array(axis, np.int64))], (), axis=0)
        return self.unsqueeze(scalar, [0])

    def written(self, n: int) -> T:
        """A number as a vector of one element; legacy exporters make it out of a scalar."""
        return self.unsqueeze(T(self.const(np.array(n, np.int64)), ()), [0]) if self.flag() else T(self.ints([n]), (1,))

    def reshape(self, x: T, shape: Sequence[int], like: T | None = None) -> T:
        """A Reshape whose target is written with numbers, with 0 and -1, or computed at run time.

        like: a tensor whose sizes the target takes over where they agree, axis by axis.
        """
        how = self.pick(["numbers", "free", "zero", "computed"])
        target: list[int] = list(shape)
        if how == "computed":
            source = x if like is None else like
            parts = []
            for axis, n in enumerate(target):
                agree = axis < len(source.shape) and source.shape[axis] == n
                take = agree and (axis == 0 or self.flag())
                parts.append(self.shape_of(source, axis) if take else self.written(n))
            return self.op("Reshape", [x, self.op("Concat", parts, (len(parts),), axis=0)], shape)
        same = [i for i, n in enumerate(target) if i < len(x.shape) and x.shape[i] == n]
        if how == "zero":
            target = [0 if i in same else n for i, n in enumerate(target)]
        if self.dynamic and target[0] != 0:
            target[0] = -1
        elif how == "free":
            target[self.number(0, len(target) - 1)] = -1
        return self.op("Reshape", [x, self.ints(target)], shape)

    # ---- layers

    def conv(self, x: T, c: int, k: int = 1, stride: int = 1, dilation: int = 1, groups: int = 1, bias: bool = True) -> T:
        pad, n = dilation * (k - 1) // 2, len(x.space)
        space = [(s + 2 * pad - dilation * (k - 1) - 1) // stride + 1 for s in x.space]
        w = self.weight(c, x.c // groups, *[k] * n, inner=x.c // groups * k**n)
        settings = {"pads": [pad] * 2 * n, "strides": [stride] * n, "dilations": [dilation] * n, "group": groups}
        return self.op("Conv", [x, w, *([self.vector(c)] if bias else [])], (x.shape[0], c, *space), **settings)

    def norm(self, x: T) -> T:
        values = [self.vector(x.c, around=a) for a in (1.0, 0.0, 0.0)]
        variance = self.const(self.rng.uniform(0.5, 2.0, x.c).astype(np.float32))
        return self.op("BatchNormalization", [x, *values, variance], x.shape)

    def act(self, x: T) -> T:
        kinds = ["Relu", "LeakyRelu", "Sigmoid", "Tanh", "PRelu", "Clip", "Swish", *(["HardSwish"] if self.opset >= 14 else [])]
        kind = self.pick([*kinds, *(["Gelu"] if self.opset >= 20 else [])])
        if kind == "PRelu":
            slope = self.vector(x.c, *[1] * len(x.space)) if self.flag() else self.vector(1)
            return self.op("PRelu", [x, slope], x.shape)
        if kind == "Swish":
            return self.op("Mul", [x, self.op("Sigmoid", [x], x.shape)], x.shape)
        if kind == "Clip":
            if self.opset < 11:
                return self.op("Clip", [x], x.shape, min=0.0, max=6.0)
            return self.op("Clip", [x, self.const(np.float32(0)), self.const(np.float32(6))], x.shape)
        return self.op(kind, [x], x.shape)

    def dense(self, x: T, n: int, op: str = "") -> T:
        """A fully connected layer on the last axis."""
        op = op or self.pick(["Gemm", "GemmT", "MatMul"] if len(x.shape) == 2 else ["MatMul"])
        inner, shape = x.shape[-1], (*x.shape[:-1], n)
        if op == "Gemm":
            return self.op("Gemm", [x, self.weight(inner, n, inner=inner), self.vector(n)], shape, alpha=0.7)
        if op == "GemmT":
            bias = [self.vector(n)] if self.opset < 11 or self.flag() else []
            return self.op("Gemm", [x, self.weight(n, inner, inner=inner), *bias], shape, transB=1)
        product = self.op("MatMul", [x, self.weight(inner, n, inner=inner)], shape)
        pair = [product, self.vector(n)]
        return self.op("Add", pair[::-1] if self.flag() else pair, shape)

    def pooled(self, x: T) -> T:
        """[N, C, 1, ...]"""
        if self.flag():
            return self.op("GlobalAveragePool", [x], (*x.shape[:2], *[1] * len(x.space)))
        return self.mean(x, range(2, len(x.shape)), True)

    def concat(self, parts: Sequence[T], axis: int = 1) -> T:
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        return self.op("Concat", parts, shape, axis=axis)

    def like(self, x: T, k: int = 1) -> T:
        """Another tensor of the same shape, made of x."""
        return self.conv(x, x.c, k)


# ---- blocks: (network, running tensor) -> running tensor

Block: TypeAlias = Callable[[Build, T], T]


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n + 1) if n % d == 0]


def convolution(b: Build, x: T) -> T:
    k, groups = b.pick([1, 3]), b.pick([1, 1, 1, *divisors(x.c)])
    c = groups * b.number(1, 3) if groups > 1 else b.number(2, 8)
    y = b.conv(x, c, k, b.pick([1, 1, 2]), b.pick([1, 1, 2]), groups, b.flag())
    return b.act(b.norm(y) if b.flag() else y)


def separable(b: Build, x: T) -> T:
    """Depthwise with a multiplier, then pointwise."""
    y = b.act(b.norm(b.conv(x, x.c * b.pick([1, 1, 2]), 3, groups=x.c, bias=False)))
    return b.conv(y, b.number(2, 8))


def grouped(b: Build, x: T) -> T:
    """A ResNeXt bottleneck; cut inside the groups where they are wide and few, by whole groups where not."""
    groups, width = b.pick([(2, 4), (2, 3), (4, 2), (3, 2), (2, 2), (4, 1)])
    y = b.act(b.conv(x, groups * width))
    y = b.act(b.conv(y, groups * b.number(1, 4), 3, groups=groups))
    return b.conv(y, x.c) if b.flag() else y


def residual(b: Build, x: T) -> T:
    c, stride = (x.c, 1) if b.flag() else (b.number(2, 8), b.pick([1, 2]))
    shortcut = x if (c, stride) == (x.c, 1) else b.conv(x, c, 1, stride)
    y = b.conv(b.act(b.conv(x, b.number(2, 6), 3, stride)), c)
    y = b.norm(y) if b.flag() else y
    op = b.pick(["Add", "Add", "Add", "Sum", "Mul", "Max", "Mean", "Sub"])
    pair = [y, shortcut] if b.flag() else [shortcut, y]
    return b.act(b.op(op, pair, y.shape))


def option_a(b: Build, x: T) -> T:
    """The shortcut of the CIFAR ResNets: every other position, zero channels on either or one side."""
    if b.opset < 10:
        return residual(b, x)
    spare = b.number(1, 4)
    before = b.pick([0, spare, spare // 2])
    y = b.conv(b.act(b.conv(x, x.c + 1, 3, stride=2)), x.c + spare)
    small = b.slice(x, [(a, 0, 2**31, 2) for a in range(2, len(x.shape))])
    rest = [0] * len(x.space)
    return b.act(b.op("Add", [y, b.pad(small, [0, before, *rest], [0, spare - before, *rest])], y.shape))


def join(b: Build, x: T) -> T:
    kind = b.pick(["two", "three", "twice", "dense"])
    if kind == "two":
        parts = [b.conv(x, b.number(1, 4)), b.conv(x, b.number(1, 4), 3)]
    elif kind == "three":
        parts = [b.act(b.conv(x, b.number(1, 3), k)) for k in (1, 3, 1)]
    elif kind == "twice":
        parts = [x, x]
    else:
        parts = [x, b.conv(b.act(b.norm(x)), b.number(1, 4), 3)]
    return b.concat(parts)


def parts(b: Build, x: T) -> T:
    """Split, then use of the parts."""
    if x.c < 2:
        return convolution(b, x)
    use = b.pick(["glu", "paths", "partial", "drop", "swap"])
    even = [x.c // 2] * 2 if x.c % 2 == 0 else [x.c // 2 + 1, x.c // 2]
    cut = b.number(1, x.c - 1)
    sizes = even if use == "glu" or b.flag() else [cut, x.c - cut]
    if use == "glu" and x.c % 2:
        x = b.conv(x, x.c + 1)
        sizes = [x.c // 2] * 2
    one, two = b.split(x, sizes, b.flag())
    if use == "glu":
        return b.op("Mul", [one, b.op("Sigmoid", [two], two.shape)], one.shape)
    if use == "paths":
        return b.concat([b.act(b.conv(one, 3)), b.conv(two, 2, 3)])
    if use == "partial":
        return b.concat([b.conv(one, one.c, 3), two])
    return one if use == "drop" else b.concat([two, one])


def squeeze_excite(b: Build, x: T) -> T:
    gate = b.conv(b.act(b.conv(b.pooled(x), b.number(1, 4))), x.c)
    gate = b.op("Sigmoid", [gate], gate.shape)
    pair = [x, gate] if b.flag() else [gate, x]
    return b.op("Mul", pair, x.shape)


def channel_attention(b: Build, x: T) -> T:
    y = b.mean(x, list(range(2, len(x.shape))), False)
    y = b.dense(b.act(b.dense(y, b.number(2, 4))), x.c)
    gate = b.unsqueeze(b.op("Sigmoid", [y], y.shape), list(range(2, len(x.shape))))
    if b.flag():
        gate = b.op("Expand", [gate, b.op("Shape", [x], (len(x.shape),))], x.shape)
    return b.op("Mul", [x, gate], x.shape)


def spatial_gate(b: Build, x: T) -> T:
    """[N, 1, ...]: made by a convolution, or by statistics over the channels, which freezes them."""
    if b.pick([True, True, False]):
        one = b.conv(x, 1, 3)
    else:
        pair = [b.mean(x, [1], True), b.mean(x, [1], True, "ReduceMax")]
        one = b.conv(b.concat(pair), 1)
    return b.op("Mul", [x, b.op("Sigmoid", [one], one.shape)], x.shape)


def shuffle(b: Build, x: T) -> T:
    groups = b.pick(divisors(x.c)[:-1] or [1])
    n, space = x.shape[0], x.space
    y = b.reshape(x, (n, groups, x.c // groups, *space))
    perm = [0, 2, 1, *range(3, 3 + len(space))]
    y = b.op("Transpose", [y], (n, x.c // groups, groups, *space), perm=perm)
    return b.reshape(y, x.shape, x)


def take(b: Build, x: T) -> T:
    """A range of channels, in order, backwards or (which freezes them) every second one."""
    kind = b.pick(["range", "reverse", "stride", "halves"] if x.c > 2 and b.opset >= 10 else ["range"])
    if kind == "reverse":
        return b.slice(x, [(1, -1, -(2**31), -1)])
    if kind == "stride":
        return b.slice(x, [(1, 0, x.c, 2)])
    if kind == "halves":
        half = x.c // 2
        one, two = b.slice(x, [(1, 0, half, 1)]), b.slice(x, [(1, half, 2**31, 1)])
        return b.concat([b.act(two), b.conv(one, 3)])
    start = b.number(0, x.c - 2) if x.c > 2 else 0
    return b.slice(x, [(1, start, b.number(start + 1, x.c), 1)])


def permute(b: Build, x: T) -> T:
    order = b.rng.permutation(x.c)
    if b.flag():
        order = np.concatenate([order, order[:1]])[1 if b.flag() else 0 :]  # one twice, perhaps one left out
    return b.op("Gather", [x, b.ints(order)], (x.shape[0], len(order), *x.space), axis=1)


def pool(b: Build, x: T) -> T:
    n, k = len(x.space), b.pick([2, 3])
    space = [(s + 2 * (k // 2) - k) // 2 + 1 for s in x.space]
    how = {"kernel_shape": [k] * n, "strides": [2] * n, "pads": [k // 2] * 2 * n}
    return b.op(b.pick(["MaxPool", "AveragePool"]), [x], (*x.shape[:2], *space), **how)


def deconvolution(b: Build, x: T) -> T:
    n, groups = len(x.space), b.pick([1, 1, *divisors(x.c)])
    width = b.number(1, 4)
    w = b.weight(x.c, width, *[2] * n, inner=x.c // groups)
    bias = [b.vector(width * groups)] if b.flag() else []
    shape = (x.shape[0], width * groups, *(2 * s for s in x.space))
    return b.act(b.op("ConvTranspose", [x, w, *bias], shape, strides=[2] * n, group=groups))


def enlarge(b: Build, x: T) -> T:
    shape = (*x.shape[:2], *(2 * s for s in x.space))
    scales = b.const(np.array([1, 1, *[2] * len(x.space)], np.float32))
    if b.opset < 11:
        return b.op("Upsample" if b.opset < 10 else "Resize", [x, scales], shape, mode="nearest")
    roi = b.const(np.zeros(0, np.float32))
    kind = b.pick(["scales", "sizes", "computed"])
    if kind == "scales" or (kind == "sizes" and b.dynamic):
        return b.op("Resize", [x, roi, scales], shape, mode="nearest")
    sizes = b.ints(shape)
    if kind == "computed":
        front = b.slice(b.op("Shape", [x], (len(x.shape),)), [(0, 0, 2, 1)])
        sizes = b.op("Concat", [front, b.ints(shape[2:])], (len(shape),), axis=0).name
    none = b.const(np.zeros(0, np.float32)) if b.opset < 13 else ""
    return b.op("Resize", [x, roi if b.opset < 13 else "", none, sizes], shape, mode="nearest")


def pixels(b: Build, x: T) -> T:
    """PixelShuffle of a widened tensor, or its inverse."""
    n, space = x.shape[0], x.space
    if b.rank != 2:
        return convolution(b, x)
    if b.flag() and all(s % 2 == 0 for s in space):
        y = b.op("SpaceToDepth", [x], (n, 4 * x.c, *(s // 2 for s in space)), blocksize=2)
        return b.conv(y, b.number(2, 6))
    c = b.number(2, 4)
    wide = b.conv(x, 4 * c)
    mode = {"mode": b.pick(["DCR", "CRD"])} if b.opset >= 11 else {}
    return b.op("DepthToSpace", [wide], (n, c, *(2 * s for s in space)), blocksize=2, **mode)


def instance_norm(b: Build, x: T) -> T:
    shift = b.const(b.rng.uniform(0.5, 1.0, x.c).astype(np.float32))  # without it a mean over the positions is all noise
    return b.op("InstanceNormalization", [x, b.vector(x.c, around=1.0), shift], x.shape, epsilon=0.01)


def group_norm(b: Build, x: T) -> T:
    """As exporters wrote it before it was an operator: the statistics mix the channels of a group."""
    groups = b.pick([1, *divisors(x.c)])
    y = b.reshape(x, (x.shape[0], groups, int(np.prod(x.shape[1:])) // groups))
    values = [b.vector(groups, around=1.0), b.vector(groups)]
    y = b.op("InstanceNormalization", [y, *values], y.shape, epsilon=0.01)
    y = b.reshape(y, x.shape, x)
    flat = [1] * len(x.space)
    return b.op("Add", [b.op("Mul", [y, b.vector(x.c, *flat, around=1.0)], x.shape), b.vector(x.c, *flat)], x.shape)


def normalised(b: Build, x: T) -> T:
    """The operator that came of it."""
    if b.opset < 21:
        return group_norm(b, x)
    values = [b.vector(x.c, around=1.0), b.const(b.rng.uniform(0.5, 1.0, x.c).astype(np.float32))]
    return b.op("GroupNormalization", [x, *values], x.shape, num_groups=b.pick(divisors(x.c)), epsilon=0.01)


def filled(b: Build, x: T) -> T:
    """A tensor of one value, as large as the running one."""
    shape = b.op("Shape", [x], (len(x.shape),)) if b.dynamic or b.flag() else b.ints(x.shape)
    if b.flag():
        one = b.op("ConstantOfShape", [shape], x.shape, value=helper.make_tensor("v", TensorProto.FLOAT, [1], [0.5]))
    else:
        one = b.op("Expand", [b.const(np.float32(0.5)), shape], x.shape)
    return b.concat([one, x]) if b.flag() else b.op("Add", [one, x], x.shape)


def mixing(b: Build, x: T) -> T:
    """Operators that sum over the channels."""
    kind = b.pick(["Softmax", "LRN", "mean", *(["LayerNormalization"] if b.opset >= 17 else [])])
    if kind == "Softmax":
        return b.op("Softmax", [x], x.shape, axis=1)
    if kind == "LRN" and b.rank == 2:
        return b.op("LRN", [x], x.shape, size=3)
    if kind == "LayerNormalization":
        last = [0, *range(2, len(x.shape)), 1]
        y = b.op("Transpose", [x], [x.shape[i] for i in last], perm=last)
        y = b.op("LayerNormalization", [y, b.vector(x.c, around=1.0), b.vector(x.c)], y.shape, axis=-1)
        return b.op("Transpose", [y], x.shape, perm=[0, len(last) - 1, *range(1, len(last) - 1)])
    return b.op("Sub", [x, b.mean(x, [1], True)], x.shape)


def channels_last(b: Build, x: T) -> T:
    last = [0, *range(2, len(x.shape)), 1]
    y = b.op("Transpose", [x], [x.shape[i] for i in last], perm=last)
    if b.flag():
        y = b.op("Mul", [y, b.vector(x.c, around=1.0)], y.shape)
    if b.flag():
        y = b.dense(y, b.number(2, 6))
    back = [0, len(last) - 1, *range(1, len(last) - 1)]
    return b.op("Transpose", [y], [y.shape[i] for i in back], perm=back)


def siamese(b: Build, x: T) -> T:
    """One weight in two layers."""
    c = b.number(2, 6)
    w, bias = b.weight(c, x.c, *[1] * len(x.space), inner=x.c), b.vector(c)
    shape = (x.shape[0], c, *x.space)
    one, two = (b.act(b.op("Conv", [v, w, bias], shape)) for v in (x, b.like(x)))
    return b.op("Add", [one, two], shape) if b.flag() else b.concat([one, two])


def counted(b: Build, x: T) -> T:
    """A division by the number of channels, which a cut would change."""
    size = b.op("Cast", [b.shape_of(x, 1)], (1,), to=TensorProto.FLOAT)
    return b.op(b.pick(["Div", "Mul"]), [x, size], x.shape)


def attention(b: Build, x: T) -> T:
    n, d, p = x.shape[0], b.number(2, 4), int(np.prod(x.space))
    q, k = (b.reshape(b.conv(x, d), (n, d, p)) for _ in range(2))
    v = b.reshape(b.like(x), (n, x.c, p))
    scores = b.op("MatMul", [b.op("Transpose", [q], (n, p, d), perm=[0, 2, 1]), k], (n, p, p))
    scores = b.op("Softmax", [scores], (n, p, p), axis=2)
    return b.op("Add", [x, b.reshape(b.op("MatMul", [v, scores], v.shape), x.shape, x)], x.shape)


def constant_scale(b: Build, x: T) -> T:
    """A folded normalisation or a layer scale: Mul and Add of [C, 1, ...] or [1, C, 1, ...]."""
    shape = [*([1] if b.flag() else []), x.c, *[1] * len(x.space)]
    y = b.op("Mul", [x, b.vector(*shape, around=1.0)], x.shape)
    return b.op("Add", [b.vector(*shape), y], x.shape)


def choose(b: Build, x: T) -> T:
    """Where with a mask over the positions, made of the data."""
    one = b.conv(x, 1)
    test = b.op("Greater", [one, b.const(np.float32(100))], one.shape)  # far from any value: no rounding decides it
    return b.op("Where", [test, x, b.like(x)], x.shape)


def repeat(b: Build, x: T) -> T:
    times = [1, 2, *[1] * len(x.space)]
    return b.op("Tile", [x, b.ints(times)], (x.shape[0], 2 * x.c, *x.space))


def pad_space(b: Build, x: T) -> T:
    edge = [0, 0, *[1] * len(x.space)]
    return b.act(b.pad(x, edge, [0] * len(edge)))  # ORT fuses a Pad with a pooling behind it into one that it refuses


def autoencoder(b: Build, x: T) -> T:
    """One weight in a Conv and a ConvTranspose: axis 0 of one is axis 1 of the other."""
    c, taps = b.number(2, 6), [1] * len(x.space)
    w = b.weight(c, x.c, *taps, inner=x.c)
    y = b.act(b.op("Conv", [x, w], (x.shape[0], c, *x.space)))
    return b.op("ConvTranspose", [y, w], x.shape)


def dangling(b: Build, x: T) -> T:
    """A branch that nothing reads."""
    b.conv(x, 3)
    return x


BLOCKS: dict[str, Block] = {
    f.__name__: f
    for f in (
        convolution, separable, grouped, residual, option_a, join, parts, squeeze_excite, channel_attention, spatial_gate,
        shuffle, take, permute, pool, deconvolution, enlarge, pixels, instance_norm, group_norm, normalised, filled, mixing,
        channels_last, siamese, counted, attention, constant_scale, choose, repeat, pad_space, autoencoder, dangling,
    )
}  # fmt: skip


# ---- heads: (network, running tensor) -> outputs


def classifier(b: Build, x: T) -> T:
    """Pooling, then a fully connected layer or two."""
    pooled = b.pooled(x)
    flat = (x.shape[0], x.c)
    kind = b.pick(["Flatten", "Reshape", "Squeeze"])
    if kind == "Flatten":
        y = b.op("Flatten", [pooled], flat)
    elif kind == "Reshape":
        y = b.reshape(pooled, flat)
    else:
        y = b.by_axes("Squeeze", pooled, list(range(2, len(x.shape))), flat, 13)
    if b.flag():
        y = b.act(b.dense(y, b.number(2, 6)))
    return b.dense(y, 3)


def flattened(b: Build, x: T) -> T:
    """All positions of all channels into one fully connected layer."""
    flat = (x.shape[0], int(np.prod(x.shape[1:])))
    y = b.op("Flatten", [x], flat) if b.flag() else b.reshape(x, flat)
    return b.dense(b.act(b.dense(y, 4)) if b.flag() else y, 3)


def segmenter(b: Build, x: T) -> T:
    return b.conv(x, 2, 3)


def bare(b: Build, x: T) -> T:
    """The running tensor itself is the output, so its channels must stay."""
    return b.act(x)


HEADS: list[Block] = [classifier, classifier, flattened, segmenter, bare]


# ---- networks


def _tame(b: Build, x: T) -> T:
    """Brings a tensor that has become large back to a small one."""
    if x.c > WIDEST or x.c < 2:
        x = b.conv(x, 6)
    return pool(b, x) if x.space[0] > FINEST else x


@st.composite
def networks(
    draw: Callable[..., Any], opsets: Sequence[int] = tuple(range(9, 23)), most: int = 4, block: str | None = None
) -> Case:
    """A network of up to `most` blocks between a stem and a head; `block` is one of them."""
    rank = draw(st.sampled_from([2, 2, 2, 2, 1, 3]))
    dynamic = draw(st.booleans())
    b = Build(
        draw,
        draw(st.sampled_from(list(opsets))),
        rank,
        1 if dynamic else draw(st.sampled_from([1, 2])),
        dynamic,
        draw(st.sampled_from(["plain", "plain", "constant", "identity", "transpose"])),
        draw(st.booleans()),
        np.random.default_rng(draw(st.integers(0, 2**16))),
    )
    x = T("x", (b.batch, 3, *{1: (8,), 2: (6, 8), 3: (4, 3, 4)}[rank]))
    y = b.act(b.conv(x, draw(st.integers(2, 8)), 3))
    names = draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=block is None, max_size=most - (block is not None)))
    if block is not None:
        names.insert(draw(st.integers(0, len(names))), block)
    extra = draw(st.sampled_from([None, None, None, *range(len(names))]))
    outputs = []
    for i, name in enumerate(names):
        y = _tame(b, BLOCKS[name](b, y))
        if extra == i:
            outputs.append(y if draw(st.booleans()) else b.conv(y, 2))
    head = draw(st.sampled_from(HEADS))
    outputs.insert(0, head(b, y))
    story = (f"opset {b.opset}", f"{rank}-D", b.style, *names, head.__name__)
    return _finish(b, x, outputs, story)


def _finish(b: Build, x: T, outputs: Sequence[T], story: tuple[str, ...]) -> Case:
    inputs = [_declared(b, x)]
    listed = b.draw(st.sampled_from([False, False, True]))
    if listed:  # as IR version 3 demanded
        inputs += [helper.make_tensor_value_info(t.name, t.data_type, list(t.dims)) for t in b.weights]
    outputs = list({t.name: t for t in outputs}.values())
    graph = helper.make_graph(b.nodes, "net", inputs, [_declared(b, t) for t in outputs], b.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", b.opset)], ir_version=3 if listed else 8)
    if b.flag():
        model = onnx.shape_inference.infer_shapes(model)
    if b.draw(st.sampled_from([False, False, True])):
        nodes = [model.graph.node[i] for i in b.rng.permutation(len(model.graph.node))]
        del model.graph.node[:]
        model.graph.node.extend(nodes)
    batches = [1, 3] if b.dynamic else [b.batch]
    feeds = [{"x": b.rng.standard_normal((n, *x.shape[1:])).astype(np.float32)} for n in batches]
    return Case(model, feeds[0], feeds, story)


def _declared(b: Build, t: T) -> onnx.ValueInfoProto:
    shape: list[int | str] = list(t.shape)
    if b.dynamic:
        shape[0] = "N"
    return helper.make_tensor_value_info(t.name, TensorProto.FLOAT, shape)
