"""Q/DQ graphs for CPUs, by ONNX Runtime's static quantiser."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.partition import with_shapes
from edgekd.quantization.calibration import activation_limits
from edgekd.quantization.fold_batchnorm import fold_batchnorm
from edgekd.quantization.qdq import head_nodes, named
from edgekd.types import Array, Progress

QUANTIZED_OPS = ["Conv", "Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool"]
"""Operators that are quantised.

Linear layers stay float: the heads' are tiny, and a conversion before and after costs more than it saves. So do
Sigmoid, Mul and the shuffling of channels, which gained nothing, and Concat, on which OpenVINO 2026.4 crashes in
GhostNet, MixNet and DenseNet. Clip is ReLU6: without it MobileNetV2's error was five times as large.
"""


def quantize_cpu(
    model: onnx.ModelProto,
    metadata: ModelMetadata,
    images: Array,
    *,
    heads: bool = True,
    floats: Collection[str] = (),
    reduce_range: bool = False,
    method: str = "minmax",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Insert pairs with unsigned 8-bit activations and signed 8-bit weights with a scale for each channel.

    ONNX Runtime and OpenVINO run these fast. Symmetric int8 activations, which TensorRT needs, ran slower than float in
    ONNX Runtime. `folder` is where activation ranges are cached, the user's cache folder if None. See
    `quantization.quantize` for the other arguments and for errors.
    """
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorsData

    ready = with_shapes(named(fold_batchnorm(model)))
    limits = activation_limits(ready, _activations(ready), images, method=method, folder=folder, progress=progress)
    ranges = {name: (np.float32(low), np.float32(high)) for name, (low, high) in limits.items()}
    excluded = [node.name for node in ready.graph.node if node.output[0] in floats]
    quantizer = QDQQuantizer(
        ready,
        per_channel=True,
        reduce_range=reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, ranges),
        nodes_to_quantize=[],
        nodes_to_exclude=excluded + ([] if heads else [node.name for node in head_nodes(ready, metadata)]),
        op_types_to_quantize=QUANTIZED_OPS,
        extra_options={},
    )
    quantizer.quantize_model()
    quantizer.model.topological_sort()
    quantised: onnx.ModelProto = quantizer.model.model
    del quantised.metadata_props[:]
    return quantised


def _activations(model: onnx.ModelProto) -> list[str]:
    """Return the float tensors that a quantised operator reads or writes, in the graph's order."""
    values: dict[str, Any] = {v.name: v for v in [*model.graph.input, *model.graph.value_info, *model.graph.output]}
    constants = {constant.name for constant in model.graph.initializer}
    names = dict.fromkeys(
        name
        for node in model.graph.node
        if node.op_type in QUANTIZED_OPS
        for name in [*node.input, *node.output]
        if name in values and name not in constants
    )
    return [name for name in names if values[name].type.tensor_type.elem_type == onnx.TensorProto.FLOAT]
