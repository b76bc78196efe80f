"""The trained networks that are compared on, their calibration and test images, and how accuracy and MACs are counted."""

from __future__ import annotations

import io
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from PIL import Image

import onnxprune
from onnxprune.data import ImageOptions

ROOT = Path(__file__).resolve().parent.parent.parent
CIFAR = ImageOptions(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
CALIBRATION = 512
Array = np.ndarray[Any, Any]


@dataclass(frozen=True, eq=False)
class Network:
    """A trained classifier. train: what fine-tuning reads, a zip of images; None: there is no training set here."""

    name: str
    path: Path
    train: Path | None
    test: Path
    images: ImageOptions

    @cached_property
    def model(self) -> onnx.ModelProto:
        return onnx.load(self.path)

    @cached_property
    def input(self) -> str:
        return str(self.model.graph.input[0].name)

    @cached_property
    def macs(self) -> int:
        return macs(self.model)

    @cached_property
    def testing(self) -> tuple[Array, Array]:
        """All test images, ready for the model, and their classes."""
        if self.test.suffix == ".npz":
            with np.load(self.test) as held:
                return held["x_test"].astype(np.float32), held["y_test"]
        return self._pictures(self.test, None)

    def calibrating(self, seed: int) -> tuple[Array, Array]:
        """CALIBRATION training images and their classes, which only the methods that need labels may look at."""
        if self.train is None:
            with np.load(self.test) as held:
                return held["x"][:CALIBRATION].astype(np.float32), held["y"][:CALIBRATION]
        return self._pictures(self.train, seed)

    def _pictures(self, path: Path, seed: int | None) -> tuple[Array, Array]:
        with zipfile.ZipFile(path) as archive:
            names = sorted(name for name in archive.namelist() if name.endswith(".jpg"))
            classes = {c: i for i, c in enumerate(sorted({name.split("/")[0] for name in names}))}
            if seed is not None:
                names = [names[i] for i in np.random.default_rng(seed).choice(len(names), CALIBRATION, replace=False)]
            pixels = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in names])
        mean, std = (np.asarray(v, np.float32) for v in (self.images.mean, self.images.std))
        ready = (pixels.astype(np.float32) * np.float32(1 / 255) - mean) / std
        return np.ascontiguousarray(ready.transpose(0, 3, 1, 2)), np.array([classes[name.split("/")[0]] for name in names])


def networks(shared: Path) -> dict[str, Network]:
    """All networks by name; `shared` has `models/` and `data/`."""
    data = shared / "data"
    found = {
        f"{net}-cifar10": Network(
            f"{net}-cifar10",
            shared / "models" / f"{net}-cifar10.onnx",
            data / "cifar10-train.zip",
            data / "cifar10-test.zip",
            CIFAR,
        )
        for net in ("resnet20", "resnet56")
    }
    models = ROOT / "models"
    for net in ("vgg8", "mobilenet", "resnet20"):
        name = f"{net}-fashion"
        found[name] = Network(name, models / f"{net}.onnx", None, models / "fashion-mnist.npz", ImageOptions())
    return found


def macs(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of one sample, without those of nodes named `selection...`, which only move channels."""
    loaded = onnxprune.load(model).size.macs
    return int(loaded - sum(int(p.value) for p in model.metadata_props if p.key == "selection_macs"))


def accuracy(model: onnx.ModelProto, network: Network, threads: int, every: int = 1) -> float:
    """Top-1 in per cent on the test images, or on `every` n-th of them, in ONNX Runtime, and whatever that raises."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x, y = (part[::every] for part in network.testing)
    right = 0
    for start in range(0, len(x), 250):
        scores = session.run(None, {network.input: x[start : start + 250]})[0]
        right += int((scores.argmax(1) == y[start : start + 250]).sum())
    return 100 * right / len(x)
