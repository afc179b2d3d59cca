"""Pooled features of a cut point, as ONNX nodes: the same ones compute what heads learn from and are part of them."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import helper, numpy_helper

from edgekd.conversion.cut_points import CutPoint


def pooled_size(cut: CutPoint) -> int:
    """Return the number of features that `add_pooling` computes for one image."""
    return sum(_channels(shape) * (3 + _has_class_token(shape)) if shape[1:] else shape[0] for shape in cut.shapes)


def add_pooling(graph: onnx.GraphProto, cut: CutPoint, *, prefix: str, opset: int) -> str:
    """Append nodes that pool the tensors of a cut point.

    Of maps and tokens, the mean, the maximum and the Euclidean norm over all places, in each channel: mean and norm
    hold the deviation, without a small difference of large numbers. Of tokens, the class token as well, if there is
    one. Vectors are taken as they are.

    Args:
        graph: Changed in place.
        cut: The cut point.
        prefix: Prefix of the names of nodes and tensors.
        opset: The graph's opset, from 13: since 18, axes are an input.

    Returns:
        Name of the features, float32 (n, `pooled_size`).
    """
    parts = []
    for i, (tensor, shape) in enumerate(zip(cut.tensors, cut.shapes)):
        if not shape[1:]:
            parts.append(tensor)
            continue
        axes = places(shape)
        for op in ("ReduceMean", "ReduceMax", "ReduceL2"):
            parts.append(f"{prefix}{op}_{i}")
            _add_reduction(graph, op, tensor, parts[-1], axes, opset)
        if _has_class_token(shape):
            parts.append(f"{prefix}class_token_{i}")
            index = f"{prefix}first"
            if index not in {tensor.name for tensor in graph.initializer}:
                graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), index))
            graph.node.append(helper.make_node("Gather", [tensor, index], [parts[-1]], name=parts[-1], axis=1))
    if len(parts) == 1:
        return parts[0]
    features = f"{prefix}features"
    graph.node.append(helper.make_node("Concat", parts, [features], name=features, axis=1))
    return features


def _add_reduction(graph: onnx.GraphProto, op: str, tensor: str, out: str, axes: tuple[int, ...], opset: int) -> None:
    if opset < 18:
        graph.node.append(helper.make_node(op, [tensor], [out], name=out, axes=axes, keepdims=0))
        return
    name = f"{out}_axes"
    graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), name))
    graph.node.append(helper.make_node(op, [tensor, name], [out], name=out, keepdims=0))


def places(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes, the batch being 0, that are pooled of a map (C, H, W) or (H, W, C), or of tokens (T, D).

    Images are square, and so are maps: the two equal sides are height and width; where all three are equal, the
    channels come first.
    """
    if len(shape) == 3:
        return (2, 3) if shape[1] == shape[2] else (1, 2)
    return tuple(range(1, len(shape)))


def _channels(shape: tuple[int, ...]) -> int:
    pooled = places(shape)
    return math.prod(side for axis, side in enumerate(shape, start=1) if axis not in pooled)


def _has_class_token(shape: tuple[int, ...]) -> bool:
    """Return True for tokens (T, D) of which T is no square: a square of patches and others, the class token first."""
    return len(shape) == 2 and math.isqrt(shape[0]) ** 2 != shape[0]
