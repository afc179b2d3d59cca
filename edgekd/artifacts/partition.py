"""Cutting student.onnx, float or quantised, into the graphs of an engine."""

from __future__ import annotations

import onnx
from onnx.utils import Extractor

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.errors import ArtifactError


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with the shape of every inner tensor noted, which cutting needs."""
    return onnx.shape_inference.infer_shapes(model)


def cut(model: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """The part of a graph (of `with_shapes`) that leads from `inputs` to `outputs`.

    Raises:
        ArtifactError: the model has no tensor of such a name, or the outputs need more than these inputs.
    """
    try:
        part = Extractor(model).extract_model(inputs, outputs)
    except ValueError as error:
        raise ArtifactError(f"the network cannot be cut: {error}", fix="export it again") from None
    if besides := _unmade(part.graph):  # the extractor walks past a cut that a skip connection leads around
        what = f"{', '.join(outputs)} cannot be made of {', '.join(inputs)} alone; needed besides: {', '.join(besides)}"
        raise ArtifactError(what, fix="export the network again with exits at the ends of its blocks")
    del part.graph.value_info[:]
    return part


def _unmade(graph: onnx.GraphProto) -> list[str]:
    """What nodes read and nothing gives."""
    given = {i.name for i in graph.input} | {i.name for i in graph.initializer} | {""}
    made = {name for node in graph.node for name in node.output}
    return sorted({name for node in graph.node for name in node.input} - given - made)


def graph_names(metadata: ModelMetadata) -> list[str]:
    """What an engine holds: a graph a stage, `monolithic` and `final`; only `monolithic` when there is one exit."""
    count = len(metadata.exits)
    return ["monolithic"] if count == 1 else [*(f"stage_{k}" for k in range(count)), "monolithic", "final"]


def graph(model: onnx.ModelProto, metadata: ModelMetadata, *, name: str) -> onnx.ModelProto:
    """One graph of `graph_names`, from a model `with_shapes`.

    Stage k: images or the tensors of boundary k-1 to exit k and (but for the last stage) those of boundary k.
    """
    if name == "monolithic":
        return cut(model, ["images"], metadata.outputs)
    if name == "final":
        return cut(model, ["images"], metadata.outputs[-1:])
    k = int(name.removeprefix("stage_"))
    boundaries = [[_cut_at(model, name) for name in e.boundary] for e in metadata.exits[:-1]]
    return cut(model, [["images"], *boundaries][k], [metadata.outputs[k], *[*boundaries, []][k]])


def graphs(model: onnx.ModelProto, metadata: ModelMetadata) -> dict[str, onnx.ModelProto]:
    """Every graph of `graph_names`."""
    model = with_shapes(model)
    return {name: graph(model, metadata, name=name) for name in graph_names(metadata)}


def _cut_at(model: onnx.ModelProto, name: str) -> str:
    """Where to cut: a quantised tensor after its QuantizeLinear, as 8-bit numbers: exact, and a quarter to move."""
    readers = [node for node in model.graph.node if name in node.input]
    one = len(readers) == 1 and readers[0].op_type == "QuantizeLinear"
    return str(readers[0].output[0]) if one else name


def backbone(model: onnx.ModelProto, metadata: ModelMetadata) -> list[onnx.NodeProto]:
    """The nodes that the boundaries need; the others are exit heads. All nodes if there is no boundary."""
    needed, nodes = {name for e in metadata.exits for name in e.boundary}, []
    if not needed:
        return list(model.graph.node)
    for node in reversed(model.graph.node):  # ONNX keeps nodes in an order in which they can run
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    return nodes
