"""Partitioning of student.onnx, float or quantised, into the graphs of an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import onnx
from onnx.utils import Extractor

from edgekd.artifacts.metadata import Exit, ModelMetadata
from edgekd.errors import ArtifactError


def with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the shapes of all tensors inferred, which `extract` needs."""
    return onnx.shape_inference.infer_shapes(model)


def extract(model: onnx.ModelProto, inputs: list[str], outputs: list[str]) -> onnx.ModelProto:
    """Extract a subgraph.

    Args:
        model: A model `with_shapes`.
        inputs: Names of the tensors to cut at.
        outputs: Names of the tensors to compute.

    Returns:
        The graph from `inputs` to `outputs`.

    Raises:
        ArtifactError: The model has no tensor of such a name, or the outputs need other inputs, too.
    """
    try:
        subgraph = Extractor(model).extract_model(inputs, outputs)
    except ValueError as error:
        raise ArtifactError(f"the network cannot be partitioned: {error}", fix="export it again") from None
    if missing := _undefined(subgraph.graph):  # the extractor passes a cut that a skip connection bypasses
        what = (
            f"{', '.join(outputs)} cannot be computed from {', '.join(inputs)} alone; also needed: {', '.join(missing)}"
        )
        raise ArtifactError(what, fix="export the network again with exits at the ends of its blocks")
    del subgraph.graph.value_info[:]
    return subgraph


def _undefined(graph: onnx.GraphProto) -> list[str]:
    """Return the tensors that nodes read and that are neither inputs, constants nor outputs of nodes."""
    given = {i.name for i in graph.input} | {i.name for i in graph.initializer} | {""}
    made = {name for node in graph.node for name in node.output}
    return sorted({name for node in graph.node for name in node.input} - given - made)


WHOLE = ("monolithic", "final")
"""The graphs that are not stages: every exit in one piece, and the last exit alone."""


def graph_names(metadata: ModelMetadata, *, whole: bool = True) -> list[str]:
    """Return the graphs of an engine: each stage and, if `whole`, those of `WHOLE`; `monolithic` if it has one exit."""
    count = len(metadata.exits)
    return ["monolithic"] if count == 1 else [*(f"stage_{k}" for k in range(count)), *(WHOLE if whole else ())]


def graph(model: onnx.ModelProto, metadata: ModelMetadata, *, name: str) -> onnx.ModelProto:
    """Extract one graph of `graph_names` from a model `with_shapes`.

    Stage k maps the images (k = 0) or boundary k-1 to the logits of exit k and, but for the last stage, boundary k.

    Args:
        model: A model `with_shapes`.
        metadata: Its metadata.
        name: Name of the graph.
    """
    if name == "monolithic":
        return extract(model, ["images"], metadata.outputs)
    if name == "final":
        return extract(model, ["images"], metadata.outputs[-1:])
    k = int(name.removeprefix("stage_"))
    boundaries = [[_cut_at(model, name) for name in e.boundary] for e in metadata.exits[:-1]]
    return extract(model, [["images"], *boundaries][k], [metadata.outputs[k], *[*boundaries, []][k]])


def graphs(
    model: onnx.ModelProto, metadata: ModelMetadata, names: Sequence[str] | None = None
) -> dict[str, onnx.ModelProto]:
    """Extract the graphs called `names`; every graph of `graph_names` if None."""
    model = with_shapes(model)
    return {name: graph(model, metadata, name=name) for name in names or graph_names(metadata)}


def keep_exits(
    model: onnx.ModelProto, metadata: ModelMetadata, keep: Sequence[int]
) -> tuple[onnx.ModelProto, ModelMetadata]:
    """Remove exits from a network: their heads, and their boundaries.

    Args:
        model: The network, float or quantised.
        metadata: Its metadata.
        keep: Indices of the exits to keep, rising; the last exit is one of them.

    Returns:
        The network with the outputs `exit_0`, `exit_1`, …, and its metadata with the policy of these exits.
    """
    outputs = [metadata.outputs[k] for k in keep]
    kept = extract(with_shapes(model), ["images"], outputs)
    # a later head may read the logits of a removed exit, whose name a kept exit takes
    removed = {name: f"{name}_removed" for name in metadata.outputs if name not in outputs}
    _rename(kept.graph, removed | {name: f"exit_{k}" for k, name in enumerate(outputs)})
    exits = tuple(Exit(f"exit_{k}", metadata.exits[old].boundary) for k, old in enumerate(keep))
    return kept, dataclasses.replace(metadata, exits=exits, policy=metadata.policy.of_exits(keep))


def _rename(graph: onnx.GraphProto, names: dict[str, str]) -> None:
    """Rename tensors, all at once: `names` may exchange two of them."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for value in graph.output:
        value.name = names.get(value.name, value.name)


def _cut_at(model: onnx.ModelProto, name: str) -> str:
    """Return the tensor to cut at: the 8-bit output of its QuantizeLinear, if any, which is exact and smaller."""
    readers = [node for node in model.graph.node if name in node.input]
    one = len(readers) == 1 and readers[0].op_type == "QuantizeLinear"
    return str(readers[0].output[0]) if one else name


def backbone(model: onnx.ModelProto, metadata: ModelMetadata) -> list[onnx.NodeProto]:
    """Return the nodes that compute the boundaries, all if there is none; the others are exit heads."""
    needed, nodes = {name for e in metadata.exits for name in e.boundary}, []
    if not needed:
        return list(model.graph.node)
    for node in reversed(model.graph.node):  # ONNX sorts nodes topologically
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    return nodes
