"""Calibration and Q/DQ placement: a float network and images to the quantised graph that a target runs fast."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Protocol

import onnx

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.registry import Registry
from edgekd.types import Array, Progress


class Quantizer(Protocol):
    """Signature of the entries of `QUANTIZERS`; the arguments are those of `quantize`."""

    def __call__(
        self,
        model: onnx.ModelProto,
        metadata: ModelMetadata,
        images: Array,
        *,
        heads: bool,
        floats: Collection[str],
        reduce_range: bool,
        method: str,
        progress: Progress | None,
    ) -> onnx.ModelProto:
        """Return the Q/DQ graph of `model`, which is left as it is."""


QUANTIZERS: Registry[Quantizer] = Registry(
    "quantisation target",
    "quantizers",
    Callable,  # type: ignore[arg-type]  # an abstract class to isinstance, none to mypy
    {
        "cpu": "edgekd.quantization.cpu:quantize_cpu",
        "tensorrt": "edgekd.quantization.tensorrt:quantize_tensorrt",
        "dla": "edgekd.quantization.dla:quantize_dla",
    },
)
"""Target to its quantizer. A graph that is fast on one target is slow, or cannot be built, on another."""


def quantize(
    model: onnx.ModelProto,
    metadata: ModelMetadata,
    images: Array,
    *,
    target: str,
    heads: bool,
    floats: Collection[str] = (),
    reduce_range: bool = False,
    method: str = "minmax",
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Insert Q/DQ pairs where a target runs int8; inputs, outputs and boundary tensors keep their names.

    Args:
        model: The float network.
        metadata: Its metadata, which identify the exit heads.
        images: Calibration images (N, 3, H, W) of the training split, preprocessed.
        target: A name in `QUANTIZERS`.
        heads: Quantise the exit heads, too; a DLA's always are.
        floats: First outputs of nodes, of the network with its batch norm folded, that stay float.
        reduce_range: Limit weights of the target `cpu` to 7 bits, for CPUs on which sums of 8-bit products saturate.
        method: A name in `calibration.CALIBRATORS`.
        progress: Called with the number of calibration images done and their total.

    Raises:
        ConfigError: No images; an unknown target or method; nothing in the network that can be quantised.
        BackendError: See `calibration.activation_ranges`.
    """
    quantizer = QUANTIZERS[target]
    return quantizer(
        model,
        metadata,
        images,
        heads=heads,
        floats=floats,
        reduce_range=reduce_range,
        method=method,
        progress=progress,
    )
