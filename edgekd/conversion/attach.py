"""Exit heads as ordinary ONNX nodes, alone and as part of a student.onnx."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifacts.metadata import Exit
from edgekd.conversion.cut_points import CutPoint
from edgekd.conversion.features import opset_of
from edgekd.conversion.heads import Head
from edgekd.conversion.pooling import add_pooling


def attach(
    model: onnx.ModelProto, cuts: Sequence[CutPoint], heads: Sequence[Head], last: CutPoint
) -> tuple[onnx.ModelProto, tuple[Exit, ...]]:
    """Add exit heads to a network; its own nodes and weights stay as they are.

    Args:
        model: The network: input `images`, one output.
        cuts: Where the exits are, in order.
        heads: The head of each.
        last: The cut point before the network's own last layer.

    Returns:
        The network with the outputs `exit_0`, …, the last being its own, and the exits' tensors.
    """
    student = onnx.ModelProto()
    student.CopyFrom(model)
    graph, own, output = student.graph, student.graph.output[0], f"exit_{len(cuts)}"
    names = _reserved(graph) | {own.name: output}
    _rename(graph, names)
    renamed = [replace(cut, tensors=tuple(names.get(n, n) for n in cut.tensors)) for cut in (*cuts, last)]
    del graph.output[:]
    for k, (cut, head) in enumerate(zip(renamed, heads)):
        _add_head(graph, cut, head, prefix=f"head_{k}_", output=f"exit_{k}", opset=opset_of(model))
        graph.output.append(_value(f"exit_{k}", (head.layers[-1][0].shape[0],)))
    own.name = output
    graph.output.append(own)
    onnx.checker.check_model(student, full_check=True)
    return student, tuple(Exit(f"exit_{k}", cut.tensors) for k, cut in enumerate(renamed))


def head_graph(cut: CutPoint, head: Head, *, opset: int = 17) -> onnx.ModelProto:
    """Return a head as a graph of its own, from the tensors of the cut point to `logits`."""
    graph = helper.make_graph([], "head", [_value(n, s) for n, s in zip(cut.tensors, cut.shapes)], [])
    _add_head(graph, cut, head, prefix="head_", output="logits", opset=opset)
    graph.output.append(_value("logits", (head.layers[-1][0].shape[0],)))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def _add_head(graph: onnx.GraphProto, cut: CutPoint, head: Head, *, prefix: str, output: str, opset: int) -> None:
    tensor = add_pooling(graph, cut, prefix=prefix, opset=opset)
    for i, (weights, bias) in enumerate(head.layers):
        is_last = i == len(head.layers) - 1
        names = f"{prefix}weights_{i}", f"{prefix}bias_{i}"
        graph.initializer.extend(
            numpy_helper.from_array(np.ascontiguousarray(a), n) for a, n in zip((weights, bias), names)
        )
        made = output if is_last else f"{prefix}linear_{i}"
        graph.node.append(helper.make_node("Gemm", [tensor, *names], [made], name=made, transB=1))
        if not is_last:
            tensor = f"{prefix}relu_{i}"
            graph.node.append(helper.make_node("Relu", [made], [tensor], name=tensor))


def _value(name: str, row: tuple[int, ...]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *row])


def _reserved(graph: onnx.GraphProto) -> dict[str, str]:
    """Return other names for the tensors that are called like those of exits and heads."""
    tensors = {name for node in graph.node for name in node.output} | {tensor.name for tensor in graph.initializer}
    return {name: f"network_{name}" for name in tensors if name.startswith(("exit_", "head_"))}


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors wherever they are written or read."""
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for named in (*graph.initializer, *graph.value_info):
        named.name = names.get(named.name, named.name)
