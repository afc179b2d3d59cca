"""Q/DQ pairs for a deep learning accelerator (DLA), which runs a region in int8 if each of its tensors has a scale."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.partition import with_shapes
from edgekd.quantization import qdq
from edgekd.quantization.calibration import activation_ranges
from edgekd.quantization.fold_batchnorm import fold_batchnorm
from edgekd.types import Array, Progress


def quantize_dla(
    model: onnx.ModelProto,
    metadata: ModelMetadata,
    images: Array,
    *,
    heads: bool = True,
    floats: Collection[str] = (),
    reduce_range: bool = False,
    method: str = "minmax",
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Insert a pair behind every float tensor but the logits, with one scale, and behind weights, one for each channel.

    TensorRT up to 10.11 gets the scales as dynamic ranges instead (`graph_passes.without_qdq`). `heads` and
    `reduce_range` change nothing. See `quantization.quantize` for arguments and errors.
    """
    model = qdq.named(fold_batchnorm(model))
    logits = {value.name for value in model.graph.output}
    shaped = with_shapes(model).graph
    known = {v.name for v in shaped.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT} - logits
    quantizable = [n for n in model.graph.node if n.op_type != "Constant" and n.output[0] not in floats]
    tensors = ["images", *(name for node in quantizable for name in node.output if name in known)]
    ranges = activation_ranges(model, tensors, images, method=method, progress=progress)
    quantised = onnx.ModelProto()
    quantised.CopyFrom(model)
    _insert(quantised.graph, ranges, floats)
    onnx.checker.check_model(quantised)
    return quantised


def _insert(graph: onnx.GraphProto, ranges: dict[str, float], floats: Collection[str]) -> None:
    weights = {c.name: numpy_helper.to_array(c) for c in graph.initializer}

    def pair(tensor: str, scale: np.float32 | np.ndarray) -> list[NodeProto]:
        names = f"{tensor}_scale", f"{tensor}_zero"
        qdq.add_scale(graph, names[0], scale)
        qdq.add_zero_point(graph, names[1], np.shape(scale))
        return qdq.qdq_pair(tensor, *names, axis=0)

    qdq.insert_pairs(
        graph,
        ranges,
        lambda tensor: pair(tensor, qdq.activation_scale(ranges[tensor])),
        lambda node: pair(node.input[1], qdq.weight_scales(weights[node.input[1]])),
        is_quantized=lambda node: (
            node.op_type in ("Conv", "Gemm") and node.input[1] in weights and node.output[0] not in floats
        ),
    )
    del graph.value_info[:]
