"""Q/DQ pairs in an ONNX graph: a QuantizeLinear and a DequantizeLinear that share scale and zero point."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, NodeProto, helper, numpy_helper

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.partition import backbone

INT8_MAX = 127
"""Integer that the largest magnitude of a range is mapped to: symmetric int8 excludes -128."""
MIN_SCALE = 2.0**-24
"""The smallest positive FP16 number; only the scale of a range that is practically zero is raised to it."""


def head_nodes(model: onnx.ModelProto, metadata: ModelMetadata) -> list[NodeProto]:
    """Return the nodes of the exit heads, those that no boundary tensor depends on, in the graph's order."""
    kept = {node.output[0] for node in backbone(model, metadata)}
    return [node for node in model.graph.node if node.output[0] not in kept]


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the network with a name for every node, which quantisers keep."""
    complete = onnx.ModelProto()
    complete.CopyFrom(model)
    for i, node in enumerate(complete.graph.node):
        node.name = node.name or f"unnamed_{node.op_type}_{i}"
    return complete


def groups_of(node: NodeProto) -> int:
    """Return the number of groups of a convolution."""
    return next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)


def dequantized(tensor: str) -> str:
    """Return the name of the output of a tensor's pair."""
    return f"{tensor}_dequantized"


def qdq_pair(tensor: str, scale: str, zero_point: str, *, axis: int | None = None) -> list[NodeProto]:
    """Return the two nodes of a tensor's pair.

    Args:
        tensor: Name of the tensor.
        scale: Name of the scale, a scalar or (C,).
        zero_point: Name of the zero point, as many as scales.
        axis: Axis of the channels where there is a scale for each.
    """
    attributes: dict[str, Any] = {} if axis is None else {"axis": axis}
    quantized = f"{tensor}_quantized"
    ends = ("QuantizeLinear", tensor, quantized), ("DequantizeLinear", quantized, dequantized(tensor))
    return [helper.make_node(op, [x, scale, zero_point], [y], name=y, **attributes) for op, x, y in ends]


def add_scale(graph: GraphProto, name: str, scale: npt.NDArray[np.float32] | np.float32) -> None:
    """Add a scale to the graph's initializers.

    Args:
        graph: Changed in place.
        name: Name of the initializer.
        scale: A scalar or (C,); values below `MIN_SCALE` are raised to it.
    """
    graph.initializer.append(numpy_helper.from_array(np.asarray(np.maximum(scale, np.float32(MIN_SCALE))), name))


def add_zero_point(graph: GraphProto, name: str, shape: tuple[int, ...] = ()) -> None:
    """Add an int8 zero point of zeros to the graph's initializers."""
    graph.initializer.append(numpy_helper.from_array(np.zeros(shape, np.int8), name))


def activation_scale(amax: float) -> np.float32:
    """Return the scale of an activation whose magnitudes end at `amax`."""
    scale: np.float32 = np.float32(amax / INT8_MAX)
    return scale


def weight_scales(weights: npt.NDArray[Any], axis: int = 0) -> npt.NDArray[np.float32]:
    """Return the scale of each output channel, (C,), of weights that have their channels on `axis`."""
    others = tuple(i for i in range(weights.ndim) if i != axis)
    scales: npt.NDArray[np.float32] = np.abs(weights).max(axis=others) / np.float32(INT8_MAX)
    return scales


def insert_pairs(
    graph: GraphProto,
    tensors: Collection[str],
    activation_pair: Callable[[str], list[NodeProto]],
    weight_pair: Callable[[NodeProto], list[NodeProto]],
    *,
    is_quantized: Callable[[NodeProto], bool],
) -> None:
    """Insert a pair behind each of `tensors` and behind the weights of each quantised node, once if they are shared.

    Args:
        graph: Changed in place.
        tensors: Names of the activations that get a pair.
        activation_pair: Returns the pair of an activation; it may add initializers.
        weight_pair: Returns the pair of a node's weights, its second input; it may add initializers.
        is_quantized: Returns True if a node's weights get a pair.
    """
    paired, nodes = set(tensors), list[NodeProto]()
    for value in graph.input:
        nodes += activation_pair(value.name) if value.name in paired else []
    for node in graph.node:
        if is_quantized(node) and node.input[1] not in paired:
            nodes += weight_pair(node)
            paired.add(node.input[1])
        node.input[:] = [dequantized(name) if name in paired else name for name in node.input]
        nodes.append(node)
        for name in node.output:
            nodes += activation_pair(name) if name in tensors else []
    del graph.node[:]
    graph.node.extend(nodes)
