"""Measured time and memory of models in ONNX Runtime."""
