"""onnxprune: provable filter pruning of ONNX files.

import onnxprune

result = onnxprune.prune("model.onnx", "images/", budget={"macs": 0.5})
result.save("smaller.onnx")
"""

__version__ = "0.1.0"

from onnxprune.api import Result, apply, calibrate, prune, sweep, verify
from onnxprune.budget import Budget
from onnxprune.data import ImageOptions
from onnxprune.errors import OnnxPruneError
from onnxprune.finetuning import finetune
from onnxprune.imported import load
from onnxprune.options import Options
from onnxprune.plan import Plan
from onnxprune.plugins import load_installed as _load_plugins
from onnxprune.saliency import Saliency
from onnxprune.training.settings import Training
from onnxprune.trt.export import HandOver, export_trt

__all__ = [
    "Budget",
    "HandOver",
    "ImageOptions",
    "OnnxPruneError",
    "Options",
    "Plan",
    "Result",
    "Saliency",
    "Training",
    "apply",
    "calibrate",
    "export_trt",
    "finetune",
    "load",
    "prune",
    "sweep",
    "verify",
]

_load_plugins()
