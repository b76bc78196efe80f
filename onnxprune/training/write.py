"""Trained values back into the graph: the bytes of constants change, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from onnxprune import weights
from onnxprune.graph import Array

_LISTS: dict[int, str] = {TensorProto.FLOAT: "float_data", TensorProto.DOUBLE: "double_data"}


def written(model: onnx.ModelProto, values: Mapping[str, Array], scratch: weights.Scratch | None = None) -> onnx.ModelProto:
    """A copy of the model with new values for constants, by name; each keeps its type, shape and the way it is stored.

    scratch: where values go of which the model has references only. Raises KeyError for a name that is no constant.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    found = {t.name: t for t in copy.graph.initializer}
    for node in copy.graph.node:
        if node.op_type == "Constant" and node.output[0] in values and node.output[0] not in found:
            _set_constant(node, values[node.output[0]], scratch)
            found[node.output[0]] = TensorProto()
    for name, value in values.items():
        if found[name].data_type:
            put(found[name], value, scratch)
    return copy


def _set_constant(node: onnx.NodeProto, value: Array, scratch: weights.Scratch | None) -> None:
    for attribute in node.attribute:
        if attribute.name == "value":
            put(attribute.t, value, scratch)
        elif attribute.name == "value_floats":
            attribute.floats[:] = value.reshape(-1).tolist()


def put(tensor: TensorProto, value: Array, scratch: weights.Scratch | None) -> None:
    """Replaces the values of a tensor where they are: raw, in a typed list, or in a file."""
    kind = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    typed = np.ascontiguousarray(value.reshape(tuple(tensor.dims)).astype(kind))
    if onnx.external_data_helper.uses_external_data(tensor):
        if scratch is None:
            raise ValueError(f"tensor '{tensor.name}' is in a file")
        weights.refer(tensor, scratch.add(typed))
    elif tensor.HasField("raw_data") or tensor.data_type not in _LISTS:
        for name in ("float_data", "int32_data"):
            tensor.ClearField(name)
        tensor.raw_data = typed.tobytes()
    else:
        getattr(tensor, _LISTS[tensor.data_type])[:] = typed.reshape(-1).tolist()
