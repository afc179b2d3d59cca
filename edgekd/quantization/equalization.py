"""Equalisation of activation ranges over channels: factors move from one convolution into those that read it.

Activations have one scale for all channels, so a channel that is small beside the largest is rounded to few levels.
Cross-layer equalisation (Nagel et al. 2019, "Data-free quantization through weight equalization and bias correction")
divides channel i of an activation by s_i and multiplies the weights that read it by s_i. Here weights have a scale for
each output channel, so that the producer's weights set no limit, and the ranges to balance are those of the activation,
measured on calibration images, and of the weights that read it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, numpy_helper

from edgekd.quantization.calibration import run_tensors
from edgekd.quantization.qdq import groups_of
from edgekd.types import Array, Progress

HEADROOM = 1.25
"""Factor by which a channel may exceed its largest calibrated activation until a ReLU6 clips it."""
LEAST = 1 / 256
"""The smallest activation range of a channel that is equalised, as a fraction of the largest; less is noise."""

Values = npt.NDArray[Any]


@dataclass(frozen=True)
class _Link:
    """An activation that one convolution writes and only convolutions read.

    Attributes:
        producer: The convolution that writes it, perhaps before a ReLU.
        tensor: The activation.
        readers: The convolutions that read it.
        ceiling: Where a ReLU6 clips it; infinite for a ReLU or none.
    """

    producer: NodeProto
    tensor: str
    readers: list[NodeProto]
    ceiling: float


def equalize(model: onnx.ModelProto, images: Array, *, progress: Progress | None = None) -> onnx.ModelProto:
    """Return a network of the same function whose activations have more even channels.

    A channel that a ReLU6 clips on a calibration image stays as it is. One that it does not clip may be enlarged until
    its largest activation, with `HEADROOM`, is where the ReLU6 clips: beyond that, on other images, the function
    changes. Other nonlinearities do not commute with a factor, so nothing moves through them.

    Args:
        model: The float network, batch norm folded.
        images: Calibration images (N, 3, H, W).
        progress: Called with the number of images done and their total.
    """
    result = onnx.ModelProto()
    result.CopyFrom(model)
    constants = {c.name: numpy_helper.to_array(c) for c in result.graph.initializer}
    links = _links(result.graph, constants)
    if not links:
        return result
    largest: dict[str, Values] = {}
    for batch in run_tensors(model, [link.tensor for link in links], images, progress=progress):
        for name, values in batch.items():
            found = np.abs(values).max(axis=(0, 2, 3))
            largest[name] = np.maximum(largest.get(name, 0), found)
    weights: dict[str, Values] = {}
    for link in links:
        factors = _factors(link, largest[link.tensor], {**constants, **weights})
        for name in link.producer.input[1:]:
            value = weights.get(name, constants[name])
            weights[name] = value / factors.reshape(-1, *[1] * (value.ndim - 1))
        for node in link.readers:
            name = node.input[1]
            value = weights.get(name, constants[name])
            weights[name] = value * _by_input(node, factors, value)
    for constant in result.graph.initializer:
        if constant.name in weights:
            constant.CopyFrom(numpy_helper.from_array(weights[constant.name].astype(np.float32), constant.name))
    return result


def _links(graph: onnx.GraphProto, constants: dict[str, Values]) -> list[_Link]:
    readers: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    values = constants | {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t) for node in graph.node if node.op_type == "Constant"
    }
    outputs = {value.name for value in graph.output}

    def is_own(node: NodeProto) -> bool:
        """Return True for a convolution with constants that no other node reads."""
        return node.op_type == "Conv" and all(n in constants and len(readers[n]) == 1 for n in node.input[1:])

    found = []
    for conv in graph.node:
        if not is_own(conv):
            continue
        tensor, ceiling = conv.output[0], np.inf
        after = readers[tensor]
        if len(after) == 1 and after[0].op_type in ("Relu", "Clip") and tensor not in outputs:
            limits = [float(values[name]) for name in after[0].input[1:] if name in values]
            if after[0].op_type == "Clip" and (len(limits) != 2 or limits[0] != 0):
                continue
            tensor, ceiling = after[0].output[0], limits[1] if limits else np.inf
        reading = readers[tensor]
        if reading and tensor not in outputs and all(n.input[0] == tensor and is_own(n) for n in reading):
            found.append(_Link(conv, tensor, reading, ceiling))
    return found


def _factors(link: _Link, largest: Values, weights: dict[str, Values]) -> Values:
    """Return what each channel of the activation is divided by, (C,)."""
    activation = np.maximum(largest, LEAST * largest.max(initial=0))
    if not activation.any():
        return np.ones_like(activation)
    if all(groups_of(node) == len(activation) for node in link.readers):  # depthwise: each channel has its own scale
        factors = activation / activation.max()
    else:
        read = np.max([_read_ranges(node, weights[node.input[1]], len(activation)) for node in link.readers], axis=0)
        factors = np.sqrt(activation / np.where(read > 0, read, np.inf))
        factors = np.where(factors > 0, factors, 1)
        factors *= (activation / factors).max() / activation.max()
    if np.isfinite(link.ceiling):
        free = largest * HEADROOM < link.ceiling
        factors = np.where(free, np.clip(factors, activation * HEADROOM / link.ceiling, 1), 1)
    return np.asarray(factors)


def _read_ranges(node: NodeProto, weight: Values, channels: int) -> Values:
    """Return the largest magnitude of the weights that read each channel, relative to the output channel's, (C,)."""
    relative = np.abs(weight) / np.maximum(np.abs(weight).max(axis=tuple(range(1, weight.ndim)), keepdims=True), 1e-30)
    groups = groups_of(node)
    grouped = relative.reshape(groups, len(weight) // groups, *weight.shape[1:])
    return np.asarray(grouped.max(axis=(1, *range(3, grouped.ndim))).reshape(channels))


def _by_input(node: NodeProto, factors: Values, weight: Values) -> Values:
    """Return the factors of the input channels, shaped to multiply the weights of a convolution."""
    groups = groups_of(node)
    each = np.repeat(factors.reshape(groups, -1), len(weight) // groups, axis=0)  # (outputs, inputs of a group)
    return each.reshape(*each.shape, *[1] * (weight.ndim - 2))
