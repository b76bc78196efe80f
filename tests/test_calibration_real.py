"""Calibration of trained networks: every layer against the definition in float64, shards, modes, providers, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from onnxprune import runtime
from onnxprune.contraction import consumers, units, weight_values
from onnxprune.control import expose
from onnxprune.criteria import Sensitivity
from onnxprune.criteria.pfp import SINGLE, TOLERANCE
from onnxprune.data import Samples, open_data
from onnxprune.errors import OptionError
from onnxprune.imported import Imported, load
from onnxprune.passes.calibrate import calibrate
from onnxprune.rules import Layer
from onnxprune.saliency import Saliency

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).resolve().parents[1]
MODELS, SHARED = ROOT / "models", ROOT.parent / "shared"
CIFAR = SHARED / "models" / "resnet20-cifar10.onnx"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def opened(name: str) -> tuple[Imported, Samples]:
    imported = load(MODELS / f"{name}.onnx")
    return imported, open_data(MODELS / "fashion-mnist.npz", imported.specs)


def activations(imported: Imported, feeds: dict[str, Array]) -> Iterator[tuple[Layer, Array, Array]]:
    """(layer, what it reads, its weight) for every layer that is scored."""
    layers = consumers(imported.groups)
    weights = weight_values(imported.groups.net, layers)
    model, outputs = expose(imported.groups.net.source, list(dict.fromkeys(layer.x.tensor for layer in layers)))
    session = runtime.session(runtime.with_outputs(model, outputs.values()))
    found = dict(zip(outputs, runtime.run(session, feeds, list(outputs.values())), strict=True))
    for layer in layers:
        yield layer, found[layer.x.tensor], weights[layer]


def defined(imported: Imported, layer: Layer, x: Array, w: Array) -> Array:
    """Largest share of every input channel of a convolution or a Gemm with transB, in float64, sample by sample."""
    node = imported.groups.net.nodes[layer.index]
    assert node.attrs.get("group", 1) == 1 and (layer.op == "Conv" or node.attrs.get("transB"))
    x, w = (v.astype(np.float64).reshape(*v.shape, *[1] * (4 - v.ndim)) for v in (x, w))
    pads, stride = node.attrs.get("pads", [0] * 4), node.attrs.get("strides", [1, 1])
    best = np.zeros(x.shape[1])
    for sample in x:
        padded = np.pad(sample, [(0, 0), (pads[0], pads[2]), (pads[1], pads[3])])
        view = np.lib.stride_tricks.sliding_window_view(padded, w.shape[2:], axis=(1, 2))[:, :: stride[0], :: stride[1]]
        for sign_x in (1, -1):
            a = np.maximum(sign_x * view, 0).reshape(len(sample), -1, w[0, 0].size)  # [C, P, K]
            for sign_w in (1, -1):
                v = np.maximum(sign_w * w, 0).reshape(*w.shape[:2], -1)  # [O, C, K]
                z = np.einsum("cpk,ock->op", a, v, optimize=True)
                live = z > 1e-6 * z.max(initial=0)
                inverse = np.where(live, 1 / np.where(live, z, 1), 0)
                for j in range(len(best)):
                    best[j] = max(best[j], (v[:, j] @ a[j].T * inverse).max())
    return best


def check_layers(imported: Imported, feeds: dict[str, Array]) -> int:
    """Every layer in every mode; how many there are."""
    count = 0
    for layer, x, w in activations(imported, feeds):
        want = defined(imported, layer, x, w)
        for mode, above in (("exact", 1e-5), ("bound", (SINGLE if w[0, 0].size == 1 else TOLERANCE) + 1e-5)):
            found = Sensitivity(mode=mode).observe(imported.groups, layer, x, w)  # type: ignore[arg-type]
            for score, unit in zip(found, units(imported.groups, layer), strict=True):
                assert unit.positions.shape[1] == 1
                s = want[unit.positions[:, 0]]
                assert (score.values >= s * (1 - 1e-5) - 1e-9).all(), (layer.name, mode)
                assert (score.values <= s * (1 + above) + 1e-9).all(), (layer.name, mode)
        count += 1
    return count


@pytest.mark.parametrize(("name", "layers"), [("resnet20", 21), ("mobilenet", 16)])
def test_every_layer_of_a_trained_network(name: str, layers: int) -> None:
    imported, samples = opened(name)
    assert check_layers(imported, samples.batch(np.arange(3))) == layers


@pytest.mark.skipif(not CIFAR.exists(), reason="the shared development models are not beside this checkout")
def test_every_layer_of_resnet20_on_cifar() -> None:
    from onnxprune.data import ImageOptions

    imported = load(CIFAR)
    samples = open_data(SHARED / "data" / "cifar10-test.zip", imported.specs, ImageOptions(mean=MEAN, std=STD))
    assert check_layers(imported, samples.batch(np.arange(0, 8000, 2000))) == 19


@pytest.mark.parametrize("mode", ["exact", "bound"])
def test_batches_and_threads_do_not_change_exact_sensitivities(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards merge to the calibration of all, and the bytes do not depend on the number of threads."""
    imported, samples = opened("vgg8")
    found = {}
    for threads in ("1", "3"):
        monkeypatch.setenv("ONNXPRUNE_THREADS", threads)
        found[threads] = calibrate(imported.groups, Sensitivity(mode=mode), samples, np.arange(24), batch=8)
    for a, b in zip(found["1"].layers, found["3"].layers, strict=True):
        assert a.values.tobytes() == b.values.tobytes() or np.allclose(a.values, b.values, rtol=1e-5)
    shards = [calibrate(imported.groups, Sensitivity(mode=mode), samples, np.arange(*r)) for r in ((0, 10), (10, 24))]
    merged: Saliency = shards[0].merged(shards[1])
    for a, b in zip(merged.layers, found["1"].layers, strict=True):
        np.testing.assert_allclose(a.values, b.values, rtol=1e-5 if mode == "exact" else TOLERANCE)


def test_cuda_gives_the_same() -> None:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA provider")
    wanted = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    imported, samples = opened("resnet20")
    try:
        runtime.session(imported.groups.net.source, providers=wanted)
    except OptionError:
        pytest.skip("no CUDA device, or no CUDA libraries, on this machine")
    cpu = calibrate(imported.groups, Sensitivity(), samples, np.arange(16))
    cuda = calibrate(imported.groups, Sensitivity("sum", wanted), samples, np.arange(16), providers=wanted)
    for a, b in zip(cpu.layers, cuda.layers, strict=True):
        np.testing.assert_allclose(a.values, b.values, rtol=1e-3)  # TF32 and other sums in the network itself


def test_the_bench_measures_a_small_network(tmp_path: Path) -> None:
    """One round of the tool: it prints seconds for inference and every mode, and the peak of a process."""
    tool = [sys.executable, str(ROOT / "tools" / "bench_calibration.py"), "--model", f"resnet20={MODELS / 'resnet20.onnx'}"]
    tool += ["--data", str(MODELS / "fashion-mnist.npz"), "--images", "4", "--repeats", "1", "--threads", "1"]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    for work in ("speed", "exact"):
        done = subprocess.run([*tool, "--one", "resnet20", work], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        if work == "speed":
            assert set(found["seconds"]) == {"inference", "exact", "bound", "max"}
            assert all(t > 0 for pair in found["seconds"].values() for t in pair)
        else:
            assert 20 < found["peak"] < 2000
