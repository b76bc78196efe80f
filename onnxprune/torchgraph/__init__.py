"""ONNX graphs in torch: an interpreter, so that gradients reach the weights of the file. Importing it imports torch."""

from onnxprune.torchgraph.graph import KNOWN, TorchGraph, require, unknown

__all__ = ["KNOWN", "TorchGraph", "require", "unknown"]
