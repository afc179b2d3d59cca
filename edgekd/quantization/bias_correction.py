"""Empirical bias correction: the mean error of each quantised convolution, on calibration images, moves into its bias.

Rounding shifts the mean of a layer's output; depthwise layers with few weights shift most (Nagel et al. 2019).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, numpy_helper

from edgekd.quantization.calibration import run_tensors
from edgekd.types import Array, Progress


def correct_biases(
    model: onnx.ModelProto, quantised: onnx.ModelProto, images: Array, *, progress: Progress | None = None
) -> onnx.ModelProto:
    """Return the quantised network with corrected biases, one convolution after the other, in the graph's order.

    So each is corrected for what is left after the corrections before it. Convolutions without a bias stay as they are.

    Args:
        model: The float network that was quantised; its nodes have the names of the quantised one's.
        quantised: Its Q/DQ graph.
        images: Calibration images (N, 3, H, W).
        progress: Called with the number of convolutions done and their total.
    """
    result = onnx.ModelProto()
    result.CopyFrom(quantised)
    constants = {c.name: c for c in result.graph.initializer}
    producers = {name: node for node in result.graph.node for name in node.output}
    float_output = {node.name: node.output[0] for node in model.graph.node}
    convolutions = [
        node
        for node in result.graph.node
        if node.op_type == "Conv"
        and len(node.input) > 2
        and node.input[1] in producers
        and node.name in float_output
        and _bias(node, producers, constants)
    ]
    wanted = _means(model, [float_output[node.name] for node in convolutions], images)
    for done, node in enumerate(convolutions, 1):
        found = _means(result, [node.output[0]], images)[node.output[0]]
        _shift(node, wanted[float_output[node.name]] - found, producers, constants)
        if progress:
            progress(done, len(convolutions))
    return result


def _means(model: onnx.ModelProto, tensors: list[str], images: Array) -> dict[str, npt.NDArray[np.float64]]:
    """Return the mean of each channel of tensors (N, C, H, W)."""
    sums = {name: np.float64(0) for name in tensors}
    for batch in run_tensors(model, tensors, images):
        for name, values in batch.items():
            sums[name] = sums[name] + values.mean(axis=(2, 3), dtype=np.float64).sum(axis=0)
    return {name: np.asarray(total / len(images)) for name, total in sums.items()}


def _bias(
    node: NodeProto, producers: dict[str, NodeProto], constants: dict[str, onnx.TensorProto]
) -> tuple[onnx.TensorProto, onnx.TensorProto | None] | None:
    """Return the constant that holds the bias, and its scale if it is quantised."""
    name = node.input[2]
    if name in constants:
        return constants[name], None
    dequantize = producers.get(name)
    if dequantize is None or dequantize.op_type != "DequantizeLinear" or dequantize.input[0] not in constants:
        return None
    return constants[dequantize.input[0]], constants[dequantize.input[1]]


def _shift(
    node: NodeProto,
    shift: npt.NDArray[np.float64],
    producers: dict[str, NodeProto],
    constants: dict[str, onnx.TensorProto],
) -> None:
    found = _bias(node, producers, constants)
    assert found is not None  # only such convolutions are corrected
    constant, scale = found
    value = numpy_helper.to_array(constant)
    if scale is None:
        new = (value + shift).astype(np.float32)
    else:
        steps = np.rint(shift / numpy_helper.to_array(scale))
        limits = np.iinfo(value.dtype)
        new = np.clip(value.astype(np.float64) + steps, limits.min, limits.max).astype(value.dtype)
    constant.CopyFrom(numpy_helper.from_array(new, constant.name))
