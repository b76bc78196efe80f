"""onnxprune: provable filter pruning of ONNX files.

import onnxprune

result = onnxprune.prune("model.onnx", "images/", budget={"macs": 0.5})
result.save("smaller.onnx")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxprune.api import Result, apply, calibrate, prune, sweep, verify
    from onnxprune.budget import Budget
    from onnxprune.data import ImageOptions
    from onnxprune.errors import OnnxPruneError
    from onnxprune.finetuning import finetune
    from onnxprune.imported import load
    from onnxprune.options import Options
    from onnxprune.plan import Plan
    from onnxprune.saliency import Saliency
    from onnxprune.training.settings import Training
    from onnxprune.trt.export import HandOver, export_trt

__version__ = "0.1.0"

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

_HOMES = {
    "api": ("Result", "apply", "calibrate", "prune", "sweep", "verify"),
    "budget": ("Budget",),
    "data": ("ImageOptions",),
    "errors": ("OnnxPruneError",),
    "finetuning": ("finetune",),
    "imported": ("load",),
    "options": ("Options",),
    "plan": ("Plan",),
    "saliency": ("Saliency",),
    "training.settings": ("Training",),
    "trt.export": ("HandOver", "export_trt"),
}


def __getattr__(name: str) -> Any:
    """Imports what is asked for, with the plug-ins, at its first use: the command line has to speak to NumPy's BLAS before."""
    for home, names in _HOMES.items():
        if name in names:
            import_module("onnxprune.plugins").load_once()
            found = globals()[name] = getattr(import_module(f"onnxprune.{home}"), name)
            return found
    raise AttributeError(f"module 'onnxprune' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
