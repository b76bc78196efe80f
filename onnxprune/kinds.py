"""Element types of the tensors of a model, as far as shape inference knows them."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto

SMALL = 4096  # elements; integer tensors up to this size are recorded by the probe


def tensor_types(model: onnx.ModelProto) -> dict[str, int | None]:
    """Element type of every tensor that shape inference knows; None for sequences, maps and optionals."""
    hollow = onnx.ModelProto()
    hollow.CopyFrom(model)
    for tensor in hollow.graph.initializer:
        if int(np.prod(tensor.dims)) > SMALL:
            tensor.ClearField("raw_data")  # no type depends on it, and inference would copy it twice
    try:
        inferred = onnx.shape_inference.infer_shapes(hollow)
    except Exception:  # inference is a convenience here: an unknown type only means that a value is not recorded
        inferred = model
    kinds: dict[str, int | None] = {}
    for value in [*inferred.graph.value_info, *inferred.graph.output]:
        tensor = value.type.HasField("tensor_type")
        kinds[value.name] = value.type.tensor_type.elem_type if tensor else None
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute:
            a = node.attribute[0]
            kinds[node.output[0]] = a.t.data_type if a.name == "value" else TensorProto.INT64 if "int" in a.name else 1
        elif node.op_type in ("Shape", "Size", "NonZero"):
            kinds[node.output[0]] = TensorProto.INT64
        elif (node.op_type.startswith("Sequence") and node.op_type not in ("SequenceAt", "SequenceLength")) or node.op_type in (
            "SplitToSequence",
            "Optional",
            "ZipMap",
        ):
            kinds[node.output[0]] = None
    return kinds
