"""student.onnx and calibration images to a quantised graph for a target."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.partition import backbone, with_shapes
from edgekd.errors import ConfigError, nearest
from edgekd.files import temporary_folder
from edgekd.quantization.dla import quantize_dla
from edgekd.quantization.fold_batchnorm import fold_norms
from edgekd.quantization.tensorrt import quantize_tensorrt
from edgekd.types import Array

BATCH = 8
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")
"""Tells ONNX Runtime that shapes are there, or it logs advice to infer them."""


def _cpu_settings(reduce_range: bool) -> dict[str, Any]:
    """uint8 activations with a zero point, int8 weights a channel: what ONNX Runtime and OpenVINO run fast.

    Symmetric int8 activations, which TensorRT wants, ran slower than float in ONNX Runtime. Linear layers stay
    float: the heads' are tiny, and a conversion before and after costs more than it saves. So do Sigmoid, Mul and
    the shuffling of channels, which gained nothing, and Concat, on which OpenVINO 2026.4 crashes in GhostNet, MixNet
    and DenseNet. Clip is ReLU6: without it MobileNetV2's error was five times as large. Depthwise convolutions take
    part; ONNX Runtime quantises one left in float between others by itself, a whole tensor at once, and badly.
    """
    from onnxruntime.quantization import QuantType

    return {
        "op_types_to_quantize": ["Conv", "Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool"],
        "activation_type": QuantType.QUInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
        "reduce_range": reduce_range,
    }


TARGETS = ("cpu", "dla", "tensorrt")
"""What a quantised graph is made for; a graph that is fast on one target is slow or refused on another."""


def quantize(
    model: onnx.ModelProto,
    metadata: ModelMetadata,
    images: Array,
    *,
    target: str,
    heads: bool,
    reduce_range: bool = False,
    method: str = "minmax",
    progress: Callable[[int, int], None] | None = None,
) -> onnx.ModelProto:
    """A Q/DQ graph with the same inputs, outputs and boundaries.

    images: (N, 3, H, W), preprocessed, of the training split. heads: quantise the exit heads, too.
    reduce_range: keep the weights of the target `cpu` to 7 bits, for CPUs whose sums of 8-bit products saturate.
    method: `minmax`, `percentile` or `entropy`; the last two keep every activation in memory.

    Raises:
        ConfigError: no images, or an unknown target.
    """
    if target == "tensorrt":
        return quantize_tensorrt(model, metadata, images, heads=heads, method=method, progress=progress)
    if target == "dla":
        return quantize_dla(model, images, method=method, progress=progress)
    if target not in TARGETS:
        raise ConfigError(f"no quantisation target '{target}'", fix=nearest(target, TARGETS))
    if not len(images):
        raise ConfigError("no calibration images", fix="int8 needs images of the training split: --data and --split")
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, quantize_static

    ready = _prepared(model)
    with _temporary() as folder:
        out = folder / "quantised.onnx"
        quantize_static(
            ready,
            str(out),
            _reader(images, progress),
            quant_format=QuantFormat.QDQ,
            calibrate_method={m.name.lower(): m for m in CalibrationMethod}[method],
            nodes_to_exclude=[] if heads else _head_names(ready, metadata),
            **_cpu_settings(reduce_range),
        )
        quantised = onnx.load(str(out))
    del quantised.metadata_props[:]
    return quantised


@contextlib.contextmanager
def _temporary() -> Iterator[Path]:
    """A folder that ONNX Runtime has its temporary folders in, too: it leaves them behind when it is killed."""
    with temporary_folder("quantize") as folder:
        before, tempfile.tempdir = tempfile.tempdir, str(folder)
        try:
            yield folder
        finally:
            tempfile.tempdir = before


def _prepared(model: onnx.ModelProto) -> onnx.ModelProto:
    """With shapes, and with a name for every node so that it can be excluded."""
    ready = with_shapes(fold_norms(model))
    for i, node in enumerate(ready.graph.node):
        node.name = node.name or f"unnamed_{node.op_type}_{i}"
    ready.metadata_props.add(key=_PREPARED[0], value=_PREPARED[1])
    return ready


def _head_names(model: onnx.ModelProto, metadata: ModelMetadata) -> list[str]:
    kept = {node.name for node in backbone(model, metadata)}
    return [node.name for node in model.graph.node if node.name not in kept]


def _reader(images: Array, progress: Callable[[int, int], None] | None) -> Any:
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
