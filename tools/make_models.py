#!/usr/bin/env python3
"""Train the small networks in `models/` again, from Fashion-MNIST.

    python tools/make_models.py train resnet20 [--epochs 24]   writes build/resnet20.pt
    python tools/make_models.py export                         writes models/*.onnx, models/fashion-mnist.npz

The data set is looked for in `--data DIR` (the four original idx files; Debian's package
`dataset-fashion-mnist` puts them in /usr/share/datasets/fashion-mnist) and downloaded where it is absent.
Training is deterministic for a given machine and thread count only.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from torch import Tensor, nn
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
SOURCE = "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/"
FILES = {
    "x_train": "train-images-idx3-ubyte.gz",
    "y_train": "train-labels-idx1-ubyte.gz",
    "x_test": "t10k-images-idx3-ubyte.gz",
    "y_test": "t10k-labels-idx1-ubyte.gz",
}


# --------------------------------------------------------------------------------------------- data


def fashion_mnist(folder: Path) -> dict[str, Any]:
    """The four arrays of Fashion-MNIST: images uint8 [N, 1, 28, 28], labels int64 [N]."""
    arrays = {}
    for key, name in FILES.items():
        path = folder / name
        if not path.exists():
            path = BUILD / name
            if not path.exists():
                BUILD.mkdir(exist_ok=True)
                urllib.request.urlretrieve(SOURCE + name, path)
        raw = gzip.decompress(path.read_bytes())
        if key.startswith("x"):
            arrays[key] = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, 28, 28)
        else:
            arrays[key] = np.frombuffer(raw, np.uint8, offset=8).astype(np.int64)
    return arrays


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random shift by up to two pixels and random mirror, image by image; x is uint8 [N, 1, 28, 28]."""
    n = len(x)
    padded = F.pad(x, (2, 2, 2, 2))
    dy = torch.randint(0, 5, (n, 1, 1), generator=generator)
    dx = torch.randint(0, 5, (n, 1, 1), generator=generator)
    columns = torch.arange(28).view(1, 1, 28).expand(n, 1, 28)
    mirror = torch.rand(n, 1, 1, generator=generator) < 0.5
    columns = torch.where(mirror, 27 - columns, columns)
    rows = torch.arange(28).view(1, 28, 1) + dy
    return padded[torch.arange(n).view(n, 1, 1), 0, rows, columns + dx].unsqueeze(1)


# ----------------------------------------------------------------------------------------- networks


def conv_bn(i: int, o: int, k: int = 3, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(i, o, k, stride, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]


class Normalised(nn.Module):
    """Takes pixels 0..255, so that whoever deploys the file needs to know nothing about its training."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net((x - 72.94) / 90.02)
        return out


class Residual(nn.Module):
    def __init__(self, i: int, o: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*conv_bn(i, o, 3, stride), nn.ReLU(), *conv_bn(o, o))
        plain = i == o and stride == 1
        self.shortcut = nn.Identity() if plain else nn.Sequential(*conv_bn(i, o, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet20() -> nn.Module:
    """He et al. 2016, n = 3, projection shortcuts (option B)."""
    layers: list[nn.Module] = [*conv_bn(1, 16), nn.ReLU()]
    width = 16
    for out, stride in ((16, 1), (32, 2), (64, 2)):
        for block in range(3):
            layers.append(Residual(width, out, stride if block == 0 else 1))
            width = out
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*layers)


def vgg8() -> nn.Module:
    """A plain VGG-style net: three stages of two convolutions, then two linear layers on 3 x 3 maps."""
    layers: list[nn.Module] = []
    width = 1
    for out in (32, 64, 128):
        layers += [*conv_bn(width, out), nn.ReLU(), *conv_bn(out, out), nn.ReLU(), nn.MaxPool2d(2)]
        width = out
    layers += [nn.Flatten(), nn.Dropout(0.3), nn.Linear(128 * 9, 128), nn.ReLU(), nn.Dropout(0.3), nn.Linear(128, 10)]
    return nn.Sequential(*layers)


class Inverted(nn.Module):
    """The inverted residual block of MobileNetV2 (Sandler et al. 2018)."""

    def __init__(self, i: int, o: int, stride: int, expand: int) -> None:
        super().__init__()
        hidden = i * expand
        self.body = nn.Sequential(
            *conv_bn(i, hidden, 1),
            nn.ReLU6(),
            *conv_bn(hidden, hidden, 3, stride, hidden),
            nn.ReLU6(),
            *conv_bn(hidden, o, 1),
        )
        self.residual = i == o and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out + x if self.residual else out


def mobilenet() -> nn.Module:
    layers: list[nn.Module] = [*conv_bn(1, 16, 3, 2), nn.ReLU6()]
    width = 16
    for out, stride, count in ((24, 1, 2), (40, 2, 3), (64, 1, 2)):
        for block in range(count):
            layers.append(Inverted(width, out, stride if block == 0 else 1, 4))
            width = out
    layers += [*conv_bn(width, 192, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10)]
    return nn.Sequential(*layers)


NETWORKS = {"resnet20": resnet20, "vgg8": vgg8, "mobilenet": mobilenet}


# ----------------------------------------------------------------------------------------- training


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    net.eval()
    hits = sum(int((net(x[i : i + 500].float()).argmax(1) == y[i : i + 500]).sum()) for i in range(0, len(x), 500))
    return hits / len(x)


def train(name: str, data: dict[str, Any], epochs: int, seed: int) -> None:
    """SGD with Nesterov momentum under a one-cycle schedule; label smoothing 0.05; weight decay 5e-4."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.from_numpy(data["x_train"].copy()), torch.from_numpy(data["y_train"])
    xt, yt = torch.from_numpy(data["x_test"].copy()), torch.from_numpy(data["y_test"])
    net = Normalised(NETWORKS[name]()).to(memory_format=torch.channels_last)
    batch = 128
    steps = len(x) // batch
    optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.2, total_steps=epochs * steps, pct_start=0.2)
    for epoch in range(epochs):
        net.train()
        start, total = time.perf_counter(), 0.0
        order = torch.randperm(len(x), generator=generator)
        for step in range(steps):
            index = order[step * batch : (step + 1) * batch]
            inputs = augment(x[index], generator).float().to(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(inputs), y[index], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
        seconds = time.perf_counter() - start
        print(
            f"{name} epoch {epoch + 1}/{epochs} loss {total / steps:.4f} test {accuracy(net, xt, yt):.4f} {seconds:.0f} s",
            flush=True,
        )
        BUILD.mkdir(exist_ok=True)
        torch.save({"state": net.state_dict(), "epochs": epochs, "seed": seed}, BUILD / f"{name}.pt")


# ------------------------------------------------------------------------------------------- export

EXPORTS = {  # network: (exporter, batch norm)
    "resnet20": ("dynamo", "folded"),
    "vgg8": ("legacy", "kept"),
    "mobilenet": ("legacy", "folded"),
}


def export(name: str, path: Path) -> None:
    """Writes one trained network as ONNX: dynamic batch, input `image` (pixels 0..255), output `logits`."""
    saved = torch.load(BUILD / f"{name}.pt", weights_only=True)
    net = Normalised(NETWORKS[name]())
    net.load_state_dict(saved["state"])
    net = net.eval().to(memory_format=torch.contiguous_format)
    image = torch.zeros(2, 1, 28, 28)
    exporter, norm = EXPORTS[name]
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["logits"]}
    if exporter == "dynamo":
        batch = torch.export.Dim("batch", min=1)
        torch.onnx.export(net, (image,), path, dynamo=True, dynamic_shapes=({0: batch},), external_data=False, **names)
    else:
        mode = torch.onnx.TrainingMode.PRESERVE if norm == "kept" else torch.onnx.TrainingMode.EVAL
        axes = {"image": {0: "batch"}, "logits": {0: "batch"}}
        torch.onnx.export(net, (image,), path, dynamo=False, training=mode, dynamic_axes=axes, opset_version=17, **names)
    model = onnx.load(path)
    clean(model)
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def clean(model: onnx.ModelProto) -> None:
    """Takes out what exporters note about the machine that they ran on: stack traces, source paths, module names."""
    del model.metadata_props[:]
    model.doc_string = model.graph.doc_string = ""
    del model.graph.metadata_props[:]
    for item in [*model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        item.doc_string = ""
        del item.metadata_props[:]


def onnx_accuracy(path: Path, x: Any, y: Any) -> float:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    hits = 0
    for start in range(0, len(x), 500):
        logits = session.run(None, {"image": x[start : start + 500].astype(np.float32)})[0]
        hits += int((logits.argmax(1) == y[start : start + 500]).sum())
    return hits / len(x)


def sample_archive(data: dict[str, Any], path: Path) -> None:
    """512 calibration images from the training set and 2,000 test images, with labels, chosen by a fixed seed."""
    rng = np.random.default_rng(0)
    train = np.sort(rng.choice(len(data["x_train"]), 512, replace=False))
    test = np.sort(rng.choice(len(data["x_test"]), 2000, replace=False))
    np.savez_compressed(
        path,
        x=data["x_train"][train],
        y=data["y_train"][train].astype(np.uint8),
        x_test=data["x_test"][test],
        y_test=data["y_test"][test].astype(np.uint8),
    )


def export_all(data: dict[str, Any]) -> None:
    models = ROOT / "models"
    sample_archive(data, models / "fashion-mnist.npz")
    rows = {}
    for name, (exporter, norm) in EXPORTS.items():
        path = models / f"{name}.onnx"
        export(name, path)
        accuracy_full = onnx_accuracy(path, data["x_test"], data["y_test"])
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        rows[name] = {"accuracy": accuracy_full, "exporter": exporter, "batch_norm": norm, "sha256": digest}
        print(f"{name}: {accuracy_full:.4f} on 10,000 test images, {path.stat().st_size:,} bytes, sha256 {digest}")
    (models / "models.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("train", "export"))
    parser.add_argument("network", nargs="?", choices=tuple(NETWORKS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    args = parser.parse_args()
    data = fashion_mnist(args.data)
    if args.task == "export":
        export_all(data)
    else:
        for name in [args.network] if args.network else NETWORKS:
            train(name, data, args.epochs, args.seed)


if __name__ == "__main__":
    main()
