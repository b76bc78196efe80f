"""The parts of tools/bench_accuracy.py that its figures rest on: the torch form of a file, the search, the picture."""

import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from accuracy import peers, picture
from accuracy.networks import macs, networks

KNOWN = networks(Path(__file__).resolve().parent.parent.parent / "shared")


@pytest.mark.parametrize("name", list(KNOWN))
def test_torch_form_computes_what_the_file_does(name):
    torch = pytest.importorskip("torch")
    from accuracy.torchnet import TorchNet

    network = KNOWN[name]
    if not network.path.exists():
        pytest.skip(f"no {network.path}")
    net = TorchNet(network.model)
    dims = [d.dim_value for d in network.model.graph.input[0].type.tensor_type.shape.dim[1:]]
    x = np.random.default_rng(0).uniform(0, 2, (32, *dims)).astype(np.float32)
    peers.agree(net, network, x)
    net.insert_norms(torch.from_numpy(x))
    peers.agree(net, network, x)
    assert macs(net.onnx()) == network.macs


def test_reestimation_changes_statistics_of_a_network_on_other_images():
    torch = pytest.importorskip("torch")
    from accuracy.torchnet import TorchNet

    network = KNOWN["vgg8-fashion"]
    net = TorchNet(network.model)
    net.reestimate(torch.zeros(128, 1, 28, 28))
    with pytest.raises(AssertionError, match="from the file"):
        peers.agree(net, network, network.calibrating(0)[0][:32])


def test_nearest_finds_the_ratio_whose_macs_are_nearest():
    kept, ratio = peers.nearest(0.5, lambda r: (round((1 - r) ** 2, 2), r))
    assert kept == 0.5
    assert abs((1 - ratio) ** 2 - 0.5) < 0.006


def test_picture_has_a_line_for_every_tool_and_stage():
    rows = [
        {"network": "a", "who": "onnxprune", "stage": "cut", "macs": 0.5, "accuracy": 20.0},
        {"network": "a", "who": "onnxprune", "stage": "recovered", "macs": 0.5, "accuracy": 80.0},
        {"network": "a", "who": "onnxsim", "stage": "cut", "macs": 0.5, "accuracy": 10.0},
    ]
    root = ElementTree.fromstring(picture.svg({"a": 90.0}, rows))
    assert len(root.findall("{*}polyline")) == 3
    assert len(root.findall("{*}circle")) == 3
