"""Q/DQ pairs on everything for a deep learning accelerator, which runs a region in int8 if all of it has scales."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from edgekd.artifacts.partition import with_shapes
from edgekd.quantization.calibration import ranges
from edgekd.quantization.fold_batchnorm import fold_norms
from edgekd.types import Array

LEAST_SCALE = 2.0**-24
"""What FP16 can hold; only ranges that are as good as zero come under it."""


def quantize_dla(
    model: onnx.ModelProto,
    images: Array,
    *,
    method: str = "minmax",
    progress: Callable[[int, int], None] | None = None,
) -> onnx.ModelProto:
    """A pair behind every float tensor but the logits, with one scale, and behind weights, with one a channel.

    TensorRT up to 10.11 gets the scales as ranges instead (`graph_passes.without_qdq`). images: (N, 3, H, W),
    preprocessed, of the training split. method: see `edgekd.quantization.calibration.ranges`.

    Raises:
        BackendError: see `edgekd.quantization.calibration.ranges`.
    """
    model = fold_norms(model)
    logits = {value.name for value in model.graph.output}
    shaped = with_shapes(model).graph
    floats = {v.name for v in shaped.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT} - logits
    computed = [name for node in model.graph.node if node.op_type != "Constant" for name in node.output]
    tensors = ["images", *(name for name in computed if name in floats)]
    reach = ranges(model, tensors, images, method=method, progress=progress)
    quantised = onnx.ModelProto()
    quantised.CopyFrom(model)
    _insert(quantised.graph, reach)
    onnx.checker.check_model(quantised)
    return quantised


def _insert(graph: onnx.GraphProto, reach: dict[str, float]) -> None:
    weights = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
    nodes = _pair(graph, "images", np.float32(reach["images"] / 127))
    paired = set(reach)
    for node in graph.node:
        kernel = node.input[1] if node.op_type in ("Conv", "Gemm") else ""
        if kernel in weights and kernel not in paired:
            others = tuple(range(1, weights[kernel].ndim))
            nodes += _pair(graph, kernel, np.abs(weights[kernel]).max(axis=others) / np.float32(127))
            paired.add(kernel)
        node.input[:] = [f"{name}_dequantized" if name in paired else name for name in node.input]
        nodes.append(node)
        for name in node.output:
            nodes += _pair(graph, name, np.float32(reach[name] / 127)) if name in reach else []
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)


def _pair(graph: onnx.GraphProto, tensor: str, scale: npt.NDArray[np.float32] | np.float32) -> list[NodeProto]:
    q, dq = f"{tensor}_quantized", f"{tensor}_dequantized"
    scales = np.asarray(np.maximum(scale, np.float32(LEAST_SCALE)))
    graph.initializer.append(numpy_helper.from_array(scales, f"{tensor}_scale"))
    graph.initializer.append(numpy_helper.from_array(np.zeros(scales.shape, np.int8), f"{tensor}_zero"))
    return [
        helper.make_node(op, [x, f"{tensor}_scale", f"{tensor}_zero"], [y], name=y, axis=0)
        for op, x, y in (("QuantizeLinear", tensor, q), ("DequantizeLinear", q, dq))
    ]
