"""ONNX graphs in torch: an interpreter, so that gradients reach the weights of the file. Importing it imports torch."""

from onnxprune.torchgraph.graph import KNOWN, TorchGraph, unknown

__all__ = ["KNOWN", "TorchGraph", "unknown"]
