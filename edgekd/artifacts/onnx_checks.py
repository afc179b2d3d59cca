"""Checks of ONNX graphs: an exported classifier has no control flow, foreign operators or external data."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import numpy_helper

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE, onnx.TensorProto.BFLOAT16)


def parse(data: bytes) -> onnx.ModelProto:
    """Parse a serialised graph that depends on nothing else.

    Raises:
        ValueError: It is not ONNX, has operators of other domains, functions or subgraphs, refers to data in another
            file, or has weights that are not finite.
    """
    try:
        model = onnx.load_model_from_string(data)
    except Exception:  # protobuf's DecodeError, which has no types
        raise ValueError("truncated, or not ONNX") from None
    if foreign := {o.domain for o in model.opset_import} - {"", "ai.onnx"}:
        raise ValueError(f"operators of the domain '{min(foreign)}'")
    if model.functions or model.training_info or model.graph.sparse_initializer:
        raise ValueError("functions, training information or sparse weights")
    for tensor in model.graph.initializer:
        _check_tensor(tensor)
    for node in model.graph.node:
        if node.domain not in ("", "ai.onnx"):
            raise ValueError(f"operator {node.op_type} of the domain '{node.domain}'")
        for attribute in node.attribute:
            if attribute.HasField("g") or attribute.graphs or attribute.HasField("sparse_tensor"):
                raise ValueError(f"operator {node.op_type} holds a graph or sparse weights")
            for tensor in (attribute.t, *attribute.tensors):
                _check_tensor(tensor)
    return model


def _check_tensor(tensor: onnx.TensorProto) -> None:
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise ValueError(f"the data of {tensor.name or 'a tensor'} is in another file")
    if tensor.data_type in _FLOATS:
        values = numpy_helper.to_array(tensor)
        # a single infinity may be intended, such as the padding of a maximum
        if np.isnan(values).any() or (values.size > 1 and not np.isfinite(values).all()):
            raise ValueError(f"the weights of {tensor.name or 'a constant'} are not finite")


def check_interface(model: onnx.ModelProto, *, image_size: int, outputs: Sequence[str], classes: int) -> None:
    """Check that a graph maps `images`, float32 (n, 3, S, S), to float32 (n, C) outputs of these names.

    Raises:
        ValueError: Other inputs or outputs.
    """
    if [i.name for i in model.graph.input] != ["images"]:
        raise ValueError(f"its inputs are {[i.name for i in model.graph.input]}, not ['images']")
    if [o.name for o in model.graph.output] != list(outputs):
        raise ValueError(f"its outputs are {[o.name for o in model.graph.output]}, its metadata states {list(outputs)}")
    _check_value(model.graph.input[0], (3, image_size, image_size))
    for output in model.graph.output:
        _check_value(output, (classes,))


def _check_value(value: onnx.ValueInfoProto, row: tuple[int, ...]) -> None:
    tensor = value.type.tensor_type
    found = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in tensor.shape.dim)
    if tensor.elem_type != onnx.TensorProto.FLOAT or found[:1] != (-1,) or found[1:] != row:
        kind = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
        shape = ", ".join(map(str, row))
        raise ValueError(f"{value.name} is {kind} {found}, its metadata states float (-1, {shape}), -1 for any")
