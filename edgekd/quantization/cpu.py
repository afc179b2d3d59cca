"""Q/DQ graphs for CPUs, by ONNX Runtime's static quantiser."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.partition import with_shapes
from edgekd.files import temporary_folder
from edgekd.quantization.calibration import BATCH, check_inputs
from edgekd.quantization.fold_batchnorm import fold_batchnorm
from edgekd.quantization.qdq import head_nodes
from edgekd.types import Array, Progress

_PREPROCESSED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Metadata key that marks shapes as inferred; without it, ONNX Runtime logs advice to infer them."""


def quantize_cpu(
    model: onnx.ModelProto,
    metadata: ModelMetadata,
    images: Array,
    *,
    heads: bool = True,
    reduce_range: bool = False,
    method: str = "minmax",
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Insert pairs with unsigned 8-bit activations and signed 8-bit weights.

    ONNX Runtime calibrates by itself: `percentile` and `entropy` keep every activation in memory. See
    `quantization.quantize` for arguments and errors.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, quantize_static

    check_inputs(images, method)
    ready = _preprocessed(model)
    with _temporary() as folder:
        out = folder / "quantised.onnx"
        quantize_static(
            ready,
            str(out),
            _reader(images, progress),
            quant_format=QuantFormat.QDQ,
            calibrate_method={m.name.lower(): m for m in CalibrationMethod}[method],
            nodes_to_exclude=[] if heads else [node.name for node in head_nodes(ready, metadata)],
            **_settings(reduce_range),
        )
        quantised = onnx.load(str(out))
    del quantised.metadata_props[:]
    return quantised


def _settings(reduce_range: bool) -> dict[str, Any]:
    """Return ONNX Runtime's options: uint8 activations with a zero point, int8 weights with a scale for each channel.

    ONNX Runtime and OpenVINO run these fast. Symmetric int8 activations, which TensorRT needs, ran slower than float in
    ONNX Runtime. Linear layers stay float: the heads' are tiny, and a conversion before and after costs more than it
    saves. So do Sigmoid, Mul and the shuffling of channels, which gained nothing, and Concat, on which OpenVINO 2026.4
    crashes in GhostNet, MixNet and DenseNet. Clip is ReLU6: without it MobileNetV2's error was five times as large.
    Depthwise convolutions are included; ONNX Runtime quantises one left in float between others by itself, per tensor,
    and badly.
    """
    from onnxruntime.quantization import QuantType

    return {
        "op_types_to_quantize": ["Conv", "Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool"],
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
        "reduce_range": reduce_range,
    }


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """Provide a folder that also holds ONNX Runtime's temporary folders, which remain when the process is killed."""
    with temporary_folder("quantize") as folder:
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before


def _preprocessed(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network with inferred shapes and with a name for every node, so that it can be excluded."""
    ready = with_shapes(fold_batchnorm(model))
    for i, node in enumerate(ready.graph.node):
        node.name = node.name or f"unnamed_{node.op_type}_{i}"
    ready.metadata_props.add(key=_PREPROCESSED[0], value=_PREPROCESSED[1])
    return ready


def _reader(images: Array, progress: Progress | None) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]  # ONNX Runtime has no types
        def __init__(self) -> None:
            self._start = 0

        def get_next(self) -> dict[str, Array] | None:
            batch = images[self._start : self._start + BATCH]
            self._start += len(batch)
            if progress:
                progress(self._start, len(images))
            return {"images": batch} if len(batch) else None

    return Reader()
