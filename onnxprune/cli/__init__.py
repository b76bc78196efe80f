"""The command line: one module per family of commands; `program.main` runs them."""

import os

# Read once, when NumPy and SciPy each load an OpenBLAS: the threads of the one that has nothing to do would spin for a while
# after every product, on processors that the other, or ONNX Runtime, needs.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # a power of two of processor cycles

from onnxprune.cli.program import main
from onnxprune.plugins import load_once

load_once()

__all__ = ["main"]
