"""Handing a model over to TensorRT: what it would refuse, shape profiles, and the commands that build and compare an engine."""
