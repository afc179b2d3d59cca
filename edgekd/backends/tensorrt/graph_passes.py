"""Graph passes for TensorRT: fp16 types for strongly typed networks, ranges in place of Q/DQ pairs for a DLA, and
operators of 8.6 written out for 8.5.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from edgekd.errors import BackendError

IMAGES, EXIT = "images", "exit_"
"""Names of the tensors that stay float32 in every engine: the images, and the prefix of the logits."""
HALF_QDQ_OPSET = 19
"""The first opset whose QuantizeLinear and DequantizeLinear accept fp16."""
KEPT_FLOAT = {"Resize": (1, 2)}
"""Operator to the indices of inputs that ONNX requires in float32."""
_QDQ = ("QuantizeLinear", "DequantizeLinear")


def is_boundary(name: str) -> bool:
    """Return True if an input or output is a boundary tensor between two stages."""
    return name != IMAGES and not name.startswith(EXIT)


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Convert a graph to fp16; images and logits stay float32, and 8-bit tensors int8.

    Raises:
        BackendError: A weight is beyond fp16's range, or the graph cannot be converted.
    """
    try:
        return _to_half(model)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, version_converter.ConvertError) as error:
        reason = str(error).strip().splitlines()[0]
        raise BackendError(f"the network cannot be converted to fp16: {reason}", fix="use --recipe fp32") from error


def _to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    model = _at_opset(model, HALF_QDQ_OPSET) if _has_qdq(model) else _copy(model)
    graph = model.graph
    del graph.value_info[:]
    kept = {node.input[i] for node in graph.node for i in KEPT_FLOAT.get(node.op_type, ()) if i < len(node.input)}
    scales = {node.input[1] for node in graph.node if node.op_type in _QDQ}
    for constant in graph.initializer:
        if constant.data_type == TensorProto.FLOAT and constant.name not in kept:
            constant.CopyFrom(_to_fp16(constant, upwards=constant.name in scales))
    for node in graph.node:
        _attributes_to_fp16(node, kept)
    for value in [*graph.input, *graph.output]:
        if value.type.tensor_type.elem_type == TensorProto.FLOAT and is_boundary(value.name):
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    _cast_ends(graph)
    return onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)


def _to_fp16(constant: onnx.TensorProto, *, upwards: bool) -> onnx.TensorProto:
    """Convert a constant to fp16; `upwards` never rounds down, so that the scale of tiny weights is not 0."""
    exact = numpy_helper.to_array(constant)
    if np.abs(exact).max(initial=0) > np.finfo(np.float16).max:
        raise BackendError(f"{constant.name} has values that fp16 cannot hold", fix="use --recipe fp32 or int8")
    half = exact.astype(np.float16)
    if upwards:
        half = np.where(half < exact, np.nextafter(half, np.float16(np.inf)), half)
    return numpy_helper.from_array(half, constant.name)


def _attributes_to_fp16(node: onnx.NodeProto, kept: set[str]) -> None:
    """Convert constants inside nodes, and casts to float32."""
    for attribute in node.attribute:
        if node.op_type in ("Constant", "ConstantOfShape"):
            if attribute.name in ("value_float", "value_floats"):  # have no 16-bit form
                value = np.array(helper.get_attribute_value(attribute), np.float32)
                attribute.CopyFrom(helper.make_attribute("value", numpy_helper.from_array(value)))
            if attribute.t.data_type == TensorProto.FLOAT and not kept.intersection(node.output):
                attribute.t.CopyFrom(_to_fp16(attribute.t, upwards=False))
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = TensorProto.FLOAT16


def _cast_ends(graph: onnx.GraphProto) -> None:
    """Insert casts after the images and before the logits."""
    images = [value.name for value in graph.input if value.name == IMAGES]
    logits = [value.name for value in graph.output if not is_boundary(value.name)]
    inner = {name: f"{name}_fp16" for name in (*images, *logits)}
    for node in graph.node:
        node.input[:] = [inner.get(name, name) for name in node.input]
        node.output[:] = [inner.get(name, name) for name in node.output]
    casts = [helper.make_node("Cast", [n], [inner[n]], name=f"cast_{n}", to=TensorProto.FLOAT16) for n in images]
    nodes = [*casts, *graph.node]
    nodes += [helper.make_node("Cast", [inner[n]], [n], name=f"cast_{n}", to=TensorProto.FLOAT) for n in logits]
    del graph.node[:]
    graph.node.extend(nodes)


def without_new_operators(model: onnx.ModelProto) -> onnx.ModelProto:
    """Write out the operators that the parser of TensorRT 8.5 lacks: LayerNormalization and HardSwish (opset 17)."""
    model = _copy(model)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        written_out = {"LayerNormalization": _layer_normalization, "HardSwish": _hard_swish}.get(node.op_type)
        nodes += written_out(node) if written_out and node.domain in ("", "ai.onnx") else [node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def _layer_normalization(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """(x - mean) / sqrt(variance + epsilon) * scale + bias, over the last axes."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    x, scale, *bias = node.input
    first = int(attributes.get("axis", -1))
    if first >= 0:
        raise BackendError(f"node '{node.name}' normalises from axis {first} on", fix="use TensorRT 8.6 or newer")
    axes, prefix = list(range(first, 0)), node.output[0]
    mean, centred, square, variance, epsilon, stable, deviation, normal = (
        f"{prefix}_{part}"
        for part in ("mean", "centred", "square", "variance", "epsilon", "stable", "deviation", "normal")
    )
    has_bias = bool(bias and bias[0])
    scaled = f"{prefix}_scaled" if has_bias else prefix
    value = numpy_helper.from_array(np.float32(attributes.get("epsilon", 1e-5)))
    nodes = [
        helper.make_node("ReduceMean", [x], [mean], axes=axes, keepdims=1),
        helper.make_node("Sub", [x, mean], [centred]),
        helper.make_node("Mul", [centred, centred], [square]),
        helper.make_node("ReduceMean", [square], [variance], axes=axes, keepdims=1),
        helper.make_node("Constant", [], [epsilon], value=value),
        helper.make_node("Add", [variance, epsilon], [stable]),
        helper.make_node("Sqrt", [stable], [deviation]),
        helper.make_node("Div", [centred, deviation], [normal]),
        helper.make_node("Mul", [normal, scale], [scaled]),
    ]
    if has_bias:
        nodes.append(helper.make_node("Add", [scaled, bias[0]], [prefix]))
    for part in nodes:
        part.name = f"{node.name or prefix}_{part.op_type}_{part.output[0].removeprefix(prefix).lstrip('_')}"
    return nodes


def _hard_swish(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """x * max(0, min(1, x / 6 + 1 / 2))."""
    (x,), (y,) = node.input, node.output
    gate = f"{y}_gate"
    return [
        helper.make_node("HardSigmoid", [x], [gate], name=f"{node.name or y}_gate", alpha=1 / 6, beta=0.5),
        helper.make_node("Mul", [x, gate], [y], name=node.name),
    ]


def without_qdq(model: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, float]]:
    """Remove the Q/DQ pairs of a graph, for TensorRT's implicit quantisation.

    A DLA accepts no Q/DQ below TensorRT 11 (NVIDIA/TensorRT #2222). Boundary tensors of 8 bits become float.

    Returns:
        The float graph, and the activation range (amax) of each quantised tensor.
    """
    model = _copy(model)
    graph = model.graph
    constants = {c.name: numpy_helper.to_array(c) for c in graph.initializer}
    ranges: dict[str, float] = {}
    float_of: dict[str, str] = {}  # readers of the key will read the value
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        node.input[:] = [float_of.get(name, name) for name in node.input]
        if node.op_type not in _QDQ:
            nodes.append(node)
            continue
        source, scale = node.input[0], constants[node.input[1]]
        if source in constants and constants[source].dtype == np.int8:
            graph.initializer.append(_dequantised(node, constants))
            continue
        if not scale.ndim:  # else it is for weights
            ranges[source] = 127 * float(scale)
        float_of[node.output[0]] = source
    for value in graph.output:
        if value.name in float_of:
            nodes.append(
                helper.make_node("Identity", [float_of[value.name]], [value.name], name=f"boundary_{value.name}")
            )
            ranges[value.name] = ranges[float_of[value.name]]
    for value in [*graph.input, *graph.output]:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    _replace(graph, nodes)
    return model, ranges


def _dequantised(node: onnx.NodeProto, constants: dict[str, npt.NDArray[Any]]) -> onnx.TensorProto:
    axis = next((a.i for a in node.attribute if a.name == "axis"), 1)
    whole, scale = constants[node.input[0]], constants[node.input[1]]
    shape = [-1 if i == axis else 1 for i in range(whole.ndim)] if scale.ndim else []
    return numpy_helper.from_array((whole * scale.reshape(shape)).astype(np.float32), node.output[0])


def _replace(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    """Replace the graph's nodes, and keep only the constants that they read."""
    read = {name for node in nodes for name in node.input}
    constants = [c for c in graph.initializer if c.name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)


def _has_qdq(model: onnx.ModelProto) -> bool:
    return any(node.op_type in _QDQ for node in model.graph.node)


def _at_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    opset = next(o.version for o in model.opset_import if o.domain in ("", "ai.onnx"))
    return version_converter.convert_version(model, least) if opset < least else _copy(model)


def _copy(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy
