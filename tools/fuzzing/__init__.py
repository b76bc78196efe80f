"""Random ONNX operator graphs and the oracle that pruning is held against on them."""
