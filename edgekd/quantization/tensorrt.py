"""Q/DQ pairs for TensorRT, which runs in int8 only the fusible layers between pairs.

Symmetric int8 with zero point 0, a weight scale for each channel, FP32 biases, FP32 scales (opset 17 has no others).
There is a pair
- on the input of every quantised convolution, and on its weights;
- on one side of a residual addition: the identity, which a convolution reads, too, shares its pair; a shortcut
  that is a convolution gets one of its own. The other side has none, so that TensorRT fuses convolution and addition;
- on every input of a concatenation if one of them has a pair, or if a quantised convolution or addition reads the
  result in the end. Data movement in between (shuffling, splitting, max pooling) keeps one scale, so that nothing has
  to be requantised;
- on a tensor that is moved before it is read, where it is computed, and where two stages are cut in between: it is
  moved, and passed on, as int8;
- on both sides of the global average pooling of a classifier or exit head that reads what a quantised convolution
  computes: it is not dequantised as a whole.

`benchmarks/tensorrt_layers.py` counts the layers that NVIDIA's compiler makes of this and of other placements.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path

import onnx
from onnx import NodeProto, numpy_helper

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.partition import with_shapes
from edgekd.errors import ConfigError
from edgekd.quantization import qdq
from edgekd.quantization.calibration import activation_ranges
from edgekd.quantization.fold_batchnorm import fold_batchnorm
from edgekd.types import Array, Progress

DATA_MOVEMENT_OPS = {
    *("Concat", "Flatten", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"),
}
"""Operators whose outputs hold values of their inputs only."""
_REARRANGING_OPS = DATA_MOVEMENT_OPS - {"Concat", "MaxPool"}
"""Those that compute nothing and have one source."""


def quantize_tensorrt(
    model: onnx.ModelProto,
    metadata: ModelMetadata,
    images: Array,
    *,
    heads: bool = False,
    floats: Collection[str] = (),
    reduce_range: bool = False,
    method: str = "minmax",
    folder: Path | None = None,
    progress: Progress | None = None,
) -> onnx.ModelProto:
    """Insert the pairs that `place_pairs` chooses.

    `reduce_range` changes nothing. `folder` is where activation ranges are cached, the user's cache folder if None.
    See `quantization.quantize` for the other arguments and for errors.
    """
    model = qdq.named(fold_batchnorm(model))
    placement = place_pairs(model, metadata, heads=heads, floats=floats)
    if not placement.layers:
        raise ConfigError(f"{metadata.network} has no convolution worth quantising", fix="compile with --recipe fp16")
    ranges = activation_ranges(model, placement.tensors, images, method=method, folder=folder, progress=progress)
    quantised = onnx.ModelProto()
    quantised.CopyFrom(model)
    _insert(quantised.graph, placement, ranges)
    del quantised.metadata_props[:]
    onnx.checker.check_model(quantised)
    return quantised


def place_pairs(
    model: onnx.ModelProto, metadata: ModelMetadata, *, heads: bool, floats: Collection[str] = ()
) -> QdqPlacement:
    """Choose the layers that are quantised and the activations that get a pair.

    Args:
        model: The float network, batch norm folded.
        metadata: Its metadata, which identify the exit heads.
        heads: Quantise the exit heads, too.
        floats: First outputs of nodes that stay float.
    """
    nodes = list(model.graph.node)
    pooled = _after_global_pooling(nodes, [constant.name for constant in model.graph.initializer])
    excluded = {*floats} | (set() if heads else {node.output[0] for node in qdq.head_nodes(model, metadata)})
    candidates = [node for node in nodes if node.output[0] not in excluded | pooled]
    placement = QdqPlacement(with_shapes(model))
    placement.choose_layers(candidates)
    placement.pair_layer_inputs()
    placement.pair_residual_additions(candidates)
    placement.pair_concatenations(candidates)
    placement.pair_pooling(node for node in nodes if _is_global_pool(node) and node.output[0] not in excluded)
    placement.pair_sources({name for one in metadata.exits for name in one.boundary})
    return placement


class ScaleGroups:
    """Disjoint sets of tensors, each with one scale: a union-find whose roots name the scales."""

    def __init__(self) -> None:
        self._parent: dict[str, str] = {}

    def scale_root(self, tensor: str) -> str:
        """Return the tensor that represents all those with the same scale."""
        while tensor in self._parent:
            tensor = self._parent[tensor]
        return tensor

    def join(self, tensor: str, root: str) -> None:
        """Give `tensor` and all in its group the scale of `root`."""
        if self.scale_root(tensor) != self.scale_root(root):
            self._parent[self.scale_root(tensor)] = self.scale_root(root)


class QdqPlacement:
    """The pairs of a network; each method after `choose_layers` is a pass that adds some and shares their scales.

    Attributes:
        layers: Outputs of the convolutions that are quantised, to these.
        scales: The activations that share a scale.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._nodes = list(model.graph.node)
        self._inputs = [value.name for value in model.graph.input]
        self._producer = {name: node for node in self._nodes for name in node.output}
        self._consumers: dict[str, list[NodeProto]] = {}
        for node in self._nodes:
            for name in node.input:
                self._consumers.setdefault(name, []).append(node)
        self._shapes = _shapes(model)
        self._constants = {constant.name: tuple(constant.dims) for constant in model.graph.initializer}
        self.layers: dict[str, NodeProto] = {}
        self.scales = ScaleGroups()
        self._paired: set[str] = set()
        self._propagated: set[str] = set()

    @property
    def tensors(self) -> list[str]:
        """The activations with a pair, in the graph's order."""
        order = [*self._inputs, *(name for node in self._nodes for name in node.output)]
        return [name for name in order if name in self._paired]

    def choose_layers(self, candidates: Iterable[NodeProto]) -> None:
        """Pass 1: quantise the candidates for which TensorRT has an int8 kernel that pays."""
        self.layers = {node.output[0]: node for node in candidates if self._is_quantizable(node)}

    def pair_layer_inputs(self) -> None:
        """Pass 2: pair the input of every quantised layer."""
        self.pair(dict.fromkeys(node.input[0] for node in self.layers.values()))

    def pair_residual_additions(self, candidates: Iterable[NodeProto]) -> None:
        """Pass 3: pair the inputs of additions, except that of the deepest convolution that nothing else reads."""
        depth = _depths(self._nodes)
        for node in candidates:
            inputs = list(node.input)
            same_shape = len({self._shapes.get(name) for name in inputs}) == 1  # else it adds a bias or a gate
            if node.op_type == "Add" and same_shape and any(self._is_near_int8(name) for name in inputs):
                fusible = [n for n in inputs if n in self.layers and self._consumers[n] == [node]]
                fused = max(fusible, key=depth.__getitem__, default=None)
                self.pair(name for name in inputs if name != fused)

    def pair_concatenations(self, candidates: Iterable[NodeProto]) -> None:
        """Pass 4: pair every input of a concatenation if one has a pair, until no more are added."""
        concatenations = [node for node in candidates if node.op_type == "Concat"]
        count = 0
        while len(self._paired) > count:  # a result may be concatenated again
            count = len(self._paired)
            self._propagate_scale(node.output[0] for node in concatenations if self._paired.intersection(node.input))

    def pair_pooling(self, pools: Iterable[NodeProto]) -> None:
        """Pass 5: pair input and output of a global pooling behind quantised layers, but not in front of a gate.

        A gate's is left alone: the compiler fuses its pooling with what reads the map, too.
        """
        for node in pools:
            if self._is_written_as_int8(node.input[0]) and not self._feeds_convolution(node.output[0]):
                self.pair([node.input[0], node.output[0]])

    def pair_sources(self, boundaries: Collection[str]) -> None:
        """Pass 6: pair what becomes a paired tensor by being rearranged: where it is computed, and at `boundaries`."""
        for name in self.tensors:
            while (producer := self._producer.get(name)) is not None and producer.op_type in _REARRANGING_OPS:
                name = producer.input[0]
                self.pair([name] if name in boundaries else [])
            self.pair([name])

    def pair(self, tensors: Iterable[str]) -> None:
        """Pair these tensors, and share their scales with what they were moved from."""
        tensors = list(tensors)
        self._paired.update(tensors)
        self._propagate_scale(tensors)

    def _is_quantizable(self, node: NodeProto) -> bool:
        """Return True for a convolution whose channels fit int8 kernels; the images' three may be fewer."""
        shape = self._constants.get(node.input[1]) if node.op_type == "Conv" else None
        if shape is None:
            return False
        if qdq.groups_of(node) > 1:
            return bool(shape[0] % 8 == 0)
        channels = shape[:1] if node.input[0] not in self._producer else shape[:2]
        return all(count >= 16 or count % 8 == 0 for count in channels)

    def _is_near_int8(self, name: str) -> bool:
        """Return True if only data movement, or nothing, lies between a tensor and a quantised layer or a pair."""
        if name in self._propagated or name in self.layers:
            return True
        producer = self._producer.get(name)
        return (
            producer is not None
            and producer.op_type in DATA_MOVEMENT_OPS
            and any(map(self._is_near_int8, producer.input))
        )

    def _is_written_as_int8(self, name: str) -> bool:
        """Return True for a tensor with a pair, or one that a quantised layer could write, with what is fused to it."""
        producer = self._producer.get(name)
        if name in self._paired or name in self.layers or producer is None:
            return name in self._paired or name in self.layers
        if producer.op_type in ("Relu", "Clip"):
            return self._is_written_as_int8(producer.input[0])
        return producer.op_type == "Add" and any(
            self._consumers[n] == [producer] and n in self.layers for n in producer.input
        )

    def _feeds_convolution(self, name: str) -> bool:
        """Return True if a convolution depends on the tensor."""
        readers = self._consumers.get(name, [])
        return any(n.op_type == "Conv" or any(map(self._feeds_convolution, n.output)) for n in readers)

    def _propagate_scale(self, tensors: Iterable[str]) -> None:
        """Share the scale of `tensors` with what they were moved from; inputs of concatenations get a pair, too."""
        pending = list(tensors)
        while pending:
            name = pending.pop()
            producer = self._producer.get(name)
            if name in self._propagated:
                continue
            self._propagated.add(name)
            if producer is None or producer.op_type not in DATA_MOVEMENT_OPS:
                continue
            sources = list(producer.input) if producer.op_type == "Concat" else [producer.input[0]]
            if producer.op_type == "Concat":
                self._paired.update(sources)
            for source in sources:
                self.scales.join(name, source)
            pending += sources


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[object, ...]]:
    values = [*model.graph.value_info, *model.graph.input, *model.graph.output]
    return {v.name: tuple(d.dim_value or d.dim_param for d in v.type.tensor_type.shape.dim) for v in values}


def _after_global_pooling(nodes: Iterable[NodeProto], constants: Iterable[str]) -> set[str]:
    """Return the outputs of global pooling and of the nodes that read nothing else: gates and classifiers."""
    found, known = set[str](), set(constants)
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
    """Return the length of the longest path to each tensor, in nodes."""
    depth: dict[str, int] = {}
    for node in nodes:
        here = 1 + max((depth.get(name, 0) for name in node.input), default=0)
        depth.update(dict.fromkeys(node.output, here))
    return depth


def _insert(graph: onnx.GraphProto, placement: QdqPlacement, ranges: dict[str, float]) -> None:
    """Insert the pairs; tensors that share a scale have that of the largest range."""
    tensors, root = placement.tensors, placement.scales.scale_root
    amax: dict[str, float] = {}
    for name in tensors:
        amax[root(name)] = max(amax.get(root(name), 0.0), ranges[name])
    for name, value in amax.items():
        qdq.add_scale(graph, f"{name}_scale", qdq.activation_scale(value))
    qdq.add_zero_point(graph, "zero_point")
    weights = {i.name: numpy_helper.to_array(i) for i in graph.initializer}

    def weight_pair(node: NodeProto) -> list[NodeProto]:
        name = node.input[1]
        scales = qdq.weight_scales(weights[name])
        qdq.add_scale(graph, f"{name}_scale", scales)
        qdq.add_zero_point(graph, f"{name}_zero_point", scales.shape)
        return qdq.qdq_pair(name, f"{name}_scale", f"{name}_zero_point", axis=0)

    qdq.insert_pairs(
        graph,
        set(tensors),
        lambda name: qdq.qdq_pair(name, f"{root(name)}_scale", "zero_point"),
        weight_pair,
        is_quantized=lambda node: node.output[0] in placement.layers,
    )
