"""Where Q/DQ pairs go for TensorRT, which takes them as orders: what lies between pairs and can be fused runs in int8.

Symmetric int8 with zero point 0, weights a channel, biases FP32; scales FP32, as opset 17 has them. A pair
- on what every quantised convolution reads, and on its weights;
- on one side of a residual addition: the identity, which a convolution reads as well, shares its pair; a shortcut
  that is a convolution gets one of its own. The other side stays raw, so that TensorRT fuses convolution and addition;
- on all that is concatenated, if one of these is or a quantised convolution or addition reads the whole in the end.
  What is only moved on the way (shuffled, split, pooled by maximum) keeps one scale, so that nothing has to rescale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
from onnx import NodeProto, helper, numpy_helper

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.partition import backbone, with_shapes
from edgekd.errors import ConfigError
from edgekd.quantization.calibration import ranges
from edgekd.quantization.fold_batchnorm import fold_norms
from edgekd.types import Array

MOVES = {"Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
"""Operators whose outputs hold nothing but values of their inputs."""
LEAST_SCALE = 2.0**-24
"""What FP16 can hold; only ranges that are as good as zero come under it."""


def quantize_tensorrt(
    model: onnx.ModelProto,
    metadata: ModelMetadata,
    images: Array,
    *,
    heads: bool = False,
    gates: bool = False,
    method: str = "minmax",
    folder: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> onnx.ModelProto:
    """A Q/DQ graph with the same inputs, outputs and boundaries.

    images: (N, 3, H, W), preprocessed, of the training split. heads: quantise the exit heads' convolutions, too.
    gates: also what reads nothing but pooled features: squeeze-excite gates and linear layers.
    method: `minmax`, `percentile` or `entropy`. folder: see `edgekd.quantization.calibration.ranges`.

    Raises:
        ConfigError: no images, an unknown method, or a network without a convolution worth quantising.
        BackendError: see `edgekd.quantization.calibration.ranges`.
    """
    model = fold_norms(model)
    places = Places(with_shapes(model), metadata, heads=heads, gates=gates)
    if not places.weighted:
        raise ConfigError(f"{metadata.network} has no convolution worth quantising", fix="compile with --recipe fp16")
    reach = ranges(model, places.tensors, images, method=method, folder=folder, progress=progress)
    quantised = onnx.ModelProto()
    quantised.CopyFrom(model)
    _insert(quantised.graph, places, reach)
    del quantised.metadata_props[:]
    onnx.checker.check_model(quantised)
    return quantised


class Places:
    """What is quantised. weighted: the nodes. tensors: the activations, in the graph's order; `group` tells whose
    scale one has.
    """

    def __init__(self, model: onnx.ModelProto, metadata: ModelMetadata, *, heads: bool, gates: bool) -> None:
        nodes = list(model.graph.node)
        self._maker = {name: node for node in nodes for name in node.output}
        self._readers: dict[str, list[NodeProto]] = {}
        for node in nodes:
            for name in node.input:
                self._readers.setdefault(name, []).append(node)
        self._shapes = _shapes(model)
        self._constant = {i.name: tuple(i.dims) for i in model.graph.initializer}
        self._same: dict[str, str] = {}
        self._followed: set[str] = set()
        pooled = set() if gates else _after_pooling(nodes, self._constant)
        float_ = [] if heads else _heads(model, metadata)
        rest = [n for n in nodes if n.output[0] not in pooled and n not in float_]
        self.weighted = [n for n in rest if self._is_worth(n, gates=gates)]
        self._points = {n.input[0] for n in self.weighted}
        self._follow(self._points)
        self._add_residuals(rest, _depths(nodes))
        self._add_joined([n for n in rest if n.op_type == "Concat"])
        order = [v.name for v in model.graph.input] + [name for node in nodes for name in node.output]
        self.tensors = [name for name in order if name in self._points]

    def group(self, tensor: str) -> str:
        """The tensor that stands for all that share a scale."""
        while tensor in self._same:
            tensor = self._same[tensor]
        return tensor

    def _is_worth(self, node: NodeProto, *, gates: bool) -> bool:
        """Whether TensorRT has an int8 kernel that pays: not for few or odd channels, but for the images' three."""
        shape = self._constant.get(node.input[1]) if node.op_type in ("Conv", "Gemm") else None
        if shape is None or node.op_type == "Gemm":
            return shape is not None and gates
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        if groups > 1:
            return bool(shape[0] % 8 == 0)
        channels = shape[:1] if node.input[0] not in self._maker else shape[:2]
        return all(c >= 16 or c % 8 == 0 for c in channels)

    def _add_residuals(self, nodes: Iterable[NodeProto], depth: dict[str, int]) -> None:
        """Pairs for the inputs of additions, but not for the deepest convolution that nothing else reads."""
        for node in nodes:
            inputs = list(node.input)
            same = len({self._shapes.get(name) for name in inputs}) == 1  # else it is a bias or a gate, not two maps
            if node.op_type == "Add" and same and any(self._is_near(name) for name in inputs):
                raw = [n for n in inputs if self._maker.get(n) in self.weighted and self._readers[n] == [node]]
                keep = max(raw, key=depth.__getitem__, default=None)
                self._points.update(name for name in inputs if name != keep)
                self._follow(name for name in inputs if name != keep)

    def _add_joined(self, joins: list[NodeProto]) -> None:
        """Pairs for all that is concatenated with what has one."""
        count = 0
        while len(self._points) > count:  # what is joined may be joined again
            count = len(self._points)
            self._follow(n.output[0] for n in joins if self._points.intersection(n.input))

    def _is_near(self, name: str) -> bool:
        """Whether a quantised convolution made it, or it was moved from or will be moved to what has a pair."""
        made = self._maker.get(name)
        if name in self._followed or made in self.weighted:
            return True
        return made is not None and made.op_type in MOVES and any(map(self._is_near, made.input))

    def _follow(self, tensors: Iterable[str]) -> None:
        """Tie these to what they were moved from; what was joined on the way needs a pair, too."""
        waiting = list(tensors)
        while waiting:
            name = waiting.pop()
            made = self._maker.get(name)
            if name in self._followed:
                continue
            self._followed.add(name)
            if made is None or made.op_type not in MOVES:
                continue
            sources = list(made.input) if made.op_type == "Concat" else [made.input[0]]
            if made.op_type == "Concat":
                self._points.update(sources)
            for source in sources:
                if self.group(source) != self.group(name):
                    self._same[self.group(name)] = self.group(source)
            waiting += sources


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[object, ...]]:
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {v.name: tuple(d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim) for v in values}


def _heads(model: onnx.ModelProto, metadata: ModelMetadata) -> list[NodeProto]:
    kept = backbone(model, metadata)
    return [node for node in model.graph.node if node not in kept]


def _after_pooling(nodes: Iterable[NodeProto], constant: Iterable[str]) -> set[str]:
    """Outputs of the nodes that read nothing but what a global pooling left."""
    found, known = set[str](), set(constant)
    for node in nodes:
        inputs = [name for name in node.input if name and name not in known]
        if node.op_type == "Constant":
            known.update(node.output)
        elif _is_global_pool(node) or (inputs and found.issuperset(inputs)):
            found.update(node.output)
    return found


def _is_global_pool(node: NodeProto) -> bool:
    axes = next((sorted(a % 4 for a in attribute.ints) for attribute in node.attribute if attribute.name == "axes"), [])
    return node.op_type == "GlobalAveragePool" or (node.op_type == "ReduceMean" and axes == [2, 3])


def _depths(nodes: Iterable[NodeProto]) -> dict[str, int]:
    """Tensor to the length of the longest way to it."""
    depth: dict[str, int] = {}
    for node in nodes:
        here = 1 + max((depth.get(name, 0) for name in node.input), default=0)
        depth.update(dict.fromkeys(node.output, here))
    return depth


def _insert(graph: onnx.GraphProto, places: Places, reach: dict[str, float]) -> None:
    """Put the pairs into the graph."""
    top: dict[str, float] = {}
    for name in places.tensors:
        top[places.group(name)] = max(top.get(places.group(name), 0.0), reach[name])
    for group, value in top.items():
        graph.initializer.append(_scale(f"{group}_scale", np.float32(value / 127)))
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), "zero_point"))
    pairs = {name: _pair(name, f"{places.group(name)}_scale", "zero_point") for name in places.tensors}
    weights = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    outputs, nodes = {n.output[0] for n in places.weighted}, []
    for name in [value.name for value in graph.input]:
        nodes += pairs.get(name, [])
    for node in graph.node:
        for at, name in enumerate(node.input):
            if name in pairs:
                node.input[at] = pairs[name][1].output[0]
        if node.output[0] in outputs:
            name = node.input[1]
            if name not in pairs:  # onnxsim lets layers share equal weights
                pairs[name] = _weight_pair(graph, node, weights[name])
                nodes += pairs[name]
            node.input[1] = pairs[name][1].output[0]
        nodes.append(node)
        for name in node.output:
            nodes += pairs.get(name, [])
    del graph.node[:]
    graph.node.extend(nodes)


def _pair(tensor: str, scale: str, zero: str, *, axis: int | None = None) -> list[NodeProto]:
    q, dq = f"{tensor}_quantized", f"{tensor}_dequantized"
    pair = [
        helper.make_node("QuantizeLinear", [tensor, scale, zero], [q], name=q),
        helper.make_node("DequantizeLinear", [q, scale, zero], [dq], name=dq),
    ]
    for node in pair if axis is not None else ():
        node.attribute.append(helper.make_attribute("axis", axis))
    return pair


def _scale(name: str, value: npt.NDArray[np.float32] | np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.maximum(value, np.float32(LEAST_SCALE)), name)


def _weight_pair(graph: onnx.GraphProto, node: NodeProto, weights: npt.NDArray[np.float32]) -> list[NodeProto]:
    """A pair for the weights of a node, one scale for each output channel."""
    name = node.input[1]
    is_gemm = node.op_type == "Gemm"
    axis = 1 if is_gemm and not any(a.name == "transB" and a.i for a in node.attribute) else 0
    others = tuple(i for i in range(weights.ndim) if i != axis)
    scale = np.abs(weights).max(axis=others) / np.float32(127)
    graph.initializer.append(_scale(f"{name}_scale", scale))
    graph.initializer.append(numpy_helper.from_array(np.zeros(len(scale), np.int8), f"{name}_zero_point"))
    return _pair(name, f"{name}_scale", f"{name}_zero_point", axis=axis)
