"""Folding of the batch norms that follow a concatenation, as in MixNet, into the convolutions before it.

The export already folds those that directly follow a convolution.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, numpy_helper


def fold_batchnorm(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return an equivalent network with fewer nodes.

    A batch norm stays if anything else reads the concatenation or one of the convolutions.
    """
    folded = onnx.ModelProto()
    folded.CopyFrom(model)
    graph = folded.graph
    constants = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    producer = {name: node for node in graph.node for name in node.output}
    consumers = Counter(name for node in graph.node for name in node.input)
    consumers.update(value.name for value in graph.output)
    removed = []
    for norm in graph.node:
        concat = producer.get(norm.input[0]) if norm.op_type == "BatchNormalization" else None
        if concat is None or not _concatenates_channels(concat) or consumers[concat.output[0]] > 1:
            continue
        convs = [producer[name] for name in concat.input if name in producer and consumers[name] == 1]
        if len(convs) == len(concat.input) and all(_is_foldable(conv, constants) for conv in convs):
            _fold(graph, norm, convs, constants)
            concat.output[0] = norm.output[0]
            removed.append(norm)
    for norm in removed:
        graph.node.remove(norm)
    read = {name for node in graph.node for name in node.input}
    kept = [i for i in graph.initializer if i.name in read]
    del graph.initializer[:], graph.value_info[:]
    graph.initializer.extend(kept)
    return folded


def _concatenates_channels(node: NodeProto) -> bool:
    return node.op_type == "Concat" and node.attribute[0].i == 1


def _is_foldable(node: NodeProto, constants: dict[str, npt.NDArray[Any]]) -> bool:
    return node.op_type == "Conv" and all(name in constants for name in node.input[1:])


def _fold(
    graph: onnx.GraphProto, norm: NodeProto, convs: list[NodeProto], constants: dict[str, npt.NDArray[Any]]
) -> None:
    """Give the convolutions new weights and biases, under new names: other layers may share the old ones.

    With gain g = gamma / sqrt(variance + epsilon): weights W g, bias (b - mean) g + beta.
    """
    gain, shift, mean, variance = (constants[name].astype(np.float64) for name in norm.input[1:])
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    gain = gain / np.sqrt(variance + epsilon)
    start = 0
    for conv in convs:
        weights = constants[conv.input[1]]
        channels = slice(start, start + len(weights))
        bias = constants[conv.input[2]] if len(conv.input) > 2 else np.zeros(len(weights))
        new = {
            f"{conv.output[0]}_weights": weights * gain[channels].reshape(-1, *[1] * (weights.ndim - 1)),
            f"{conv.output[0]}_bias": (bias - mean[channels]) * gain[channels] + shift[channels],
        }
        graph.initializer.extend(numpy_helper.from_array(v.astype(np.float32), k) for k, v in new.items())
        conv.input[1:] = list(new)
        start = channels.stop
