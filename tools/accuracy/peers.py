"""Torch-Pruning and onnxsim on the same networks. Both are optional: `missing` says which cannot be imported."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from accuracy.networks import Array, Network, macs

TORCH_PRUNING, ONNXSIM = "torch-pruning", "onnxsim"
NEEDS = {TORCH_PRUNING: ("torch", "torch_pruning"), ONNXSIM: ("onnxsim",)}
IMPORTANCES = ("magnitude", "group-norm", "taylor")
HALVINGS = 11
Way = Callable[[float, list[Any]], onnx.ModelProto]  # of a ratio and samples

# method, fraction of the MACs kept, the cut model, and a function that recovers it without training
Made = tuple[str, float, onnx.ModelProto, Callable[[], onnx.ModelProto] | None]


def missing(peer: str) -> str | None:
    """The line to print where a peer is not installed, else None."""
    for module in NEEDS.get(peer, ()):
        try:
            importlib.import_module(module)
        except ImportError as error:
            return f"{peer} is left out: {error}; pip install {peer} {'torch' if peer == TORCH_PRUNING else ''}".rstrip()
    return None


def nearest(target: float, cut: Callable[[float], tuple[float, Any]]) -> tuple[float, Any]:
    """What `cut(ratio)` makes that is nearest to `target` of the MACs, by halving; `cut` returns (MACs kept, what)."""
    low, high = 0.0, 0.98
    best: tuple[float, Any] | None = None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        kept, made = cut(ratio)
        if best is None or abs(kept - target) < abs(best[0] - target):
            best = kept, made
        low, high = (ratio, high) if kept > target else (low, ratio)
    assert best is not None
    return best


# ---------------------------------------------------------------------------------------------------------- Torch-Pruning


def torch_pruning(network: Network, targets: list[float], calibration: tuple[Array, Array], seed: int) -> Iterator[Made]:
    """All importances, local and global, all groups and inner ones; recovery: batch norm statistics estimated again."""
    import torch
    from torch.nn import functional as F

    from accuracy.torchnet import TorchNet

    torch.manual_seed(seed)
    x, y = (torch.from_numpy(v) for v in calibration)
    net = TorchNet(network.model)
    net.insert_norms(x)
    agree(net, network, calibration[0][:64])
    for part, classes in zip(x.split(128), y.split(128), strict=True):
        (F.cross_entropy(net(part), classes, reduction="sum") / len(x)).backward()
    scopes = ("all", "inner") if any(n.op_type == "Add" for n in net.source.graph.node) else ("all",)
    for target in targets:
        for importance in IMPORTANCES:
            for spread in ("local", "global"):
                for scope in scopes:
                    name = f"{importance}, {spread}, {scope}"
                    try:
                        kept, pruned = nearest(
                            target, lambda r, i=importance, s=spread, c=scope: _cut(net, network, r, i, s, c)
                        )
                    except Exception as error:  # whatever a peer raises is a row that is missing
                        print(f"{network.name} {target} torch-pruning {name}: {type(error).__name__}: {error}", flush=True)
                        continue

                    def recover(pruned: Any = pruned) -> onnx.ModelProto:
                        again = copy.deepcopy(pruned)
                        again.reestimate(x)
                        return again.onnx()

                    yield name, kept, pruned.onnx(), recover


def agree(net: Any, network: Network, x: Array) -> None:
    """Raises AssertionError where the module, or the file written from it, does not compute what the original file does."""
    import torch

    expected = _run(network.model, network.input, x)
    with torch.no_grad():
        told = net(torch.from_numpy(x)).numpy()
    for found in (told, _run(net.onnx(), network.input, x)):
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"the torch form of {network.name} is {error:.1e} from the file"
    assert macs(net.onnx()) == network.macs


def _cut(net: Any, network: Network, ratio: float, importance: str, spread: str, scope: str) -> tuple[float, Any]:
    import torch_pruning as tp
    from torch import nn

    from accuracy.torchnet import TorchNet, example

    pruned: TorchNet = copy.deepcopy(net)
    for copied, parameter in zip(pruned.parameters(), net.parameters(), strict=True):  # deepcopy leaves gradients behind
        copied.grad = None if parameter.grad is None else parameter.grad.clone()
    last = [m for m in pruned.layers.values() if isinstance(m, nn.Linear)][-1]
    ignored: list[Any] = [last, *(_joined(pruned) if scope == "inner" else [])]
    pruner = tp.pruner.BasePruner(
        pruned,
        example(pruned),
        importance=_importance(importance, pruned.own_norms),
        global_pruning=spread == "global",
        pruning_ratio=ratio,
        ignored_layers=ignored,
    )
    pruner.step()
    return macs(pruned.onnx()) / network.macs, pruned


def _importance(name: str, norms: bool) -> Any:
    """Torch-Pruning's importance, blind to what `torchnet` has added to the network."""
    import torch_pruning as tp
    from torch import nn

    from accuracy.torchnet import Selection

    kinds: dict[str, Any] = {} if norms else {"target_types": [nn.Conv2d, nn.Linear]}
    made = {
        "magnitude": lambda: tp.importance.GroupMagnitudeImportance(p=2, group_reduction="first", **kinds),
        "group-norm": lambda: tp.importance.GroupMagnitudeImportance(p=2, group_reduction="mean", **kinds),
        "taylor": lambda: tp.importance.GroupTaylorImportance(**kinds),
    }[name]()

    def score(group: Any, **options: Any) -> Any:
        seen = copy.copy(group)
        seen._group = [item for item in group._group if not isinstance(item.dep.target.module, Selection)]
        return made(seen, **options)

    return score


def _joined(net: Any) -> list[Any]:
    """The layers whose outputs an Add reads, and the first one: what the residual streams are made of."""
    from torch import nn

    made = {n.output[0]: n for n in net.source.graph.node}
    found = [next(m for m in net.layers.values() if isinstance(m, nn.Conv2d))]
    for node in net.source.graph.node:
        if node.op_type == "Add":
            for name in node.input:
                maker = made[name]
                while maker.op_type == "BatchNormalization":
                    maker = made[maker.input[0]]
                if maker.op_type in ("Conv", "Pad"):
                    found.append(net.layers[maker.output[0].replace(".", "_").replace("/", "_")])
    return found


# ----------------------------------------------------------------------------------------------------------------- onnxsim


def onnxsim(network: Network, targets: list[float], calibration: tuple[Array, Array], seed: int) -> Iterator[Made]:
    """L2 and Wanda, local and global, after its own simplification; recovery: its ridge regression of MatMul and Gemm."""
    import onnxsim as sim

    simple, _ = sim.simplify(network.model)
    feeds = [{network.input: part} for part in np.split(calibration[0], 8)]
    wanda = sim.apply_structured_wanda_pruning
    ways: dict[str, Way] = {
        "L2, local": lambda r, _: sim.apply_structured_pruning(simple, sparsity=r),
        "L2, global": lambda r, _: sim.apply_structured_pruning(simple, sparsity=r, global_sparsity=True),
        "Wanda, local": lambda r, given: wanda(simple, given, seed=seed, sparsity=r),
        "Wanda, global": lambda r, given: wanda(simple, given, seed=seed, sparsity=r, global_sparsity=True),
    }
    for target in targets:
        for name, way in ways.items():

            def cut(ratio: float, way: Way = way) -> tuple[float, float]:
                made = way(ratio, feeds[:1])  # an eighth of the images while the ratio is looked for
                _run(made, network.input, calibration[0][:1])
                return macs(made) / network.macs, ratio

            try:
                pruned = way(nearest(target, cut)[1], feeds)
                kept = macs(pruned) / network.macs
            except Exception as error:  # as above; broken files count as failures
                print(f"{network.name} {target} onnxsim {name}: {type(error).__name__}: {error}", flush=True)
                continue
            yield name, kept, pruned, lambda p=pruned: sim.apply_pruning_finetune(simple, p, feeds)


def _run(model: onnx.ModelProto, name: str, x: Array) -> Array:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: Array = session.run(None, {name: x})[0]
    return found
