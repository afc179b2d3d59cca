"""Blocks of a network, the units in which layers are left in float."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
from onnx import NodeProto

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.quantization.qdq import head_nodes

MOST = 24
"""Blocks of a backbone, at most."""


@dataclass(frozen=True)
class Block:
    """Neighbouring layers.

    Attributes:
        name: Its first and last convolution, for people.
        outputs: The first output of each of its nodes.
        convolutions: Number of its convolutions.
    """

    name: str
    outputs: frozenset[str]
    convolutions: int


def blocks(model: onnx.ModelProto, metadata: ModelMetadata) -> list[Block]:
    """Divide the layers into blocks: those of the backbone in order, then the head of each exit.

    The backbone is cut where a single tensor passes, as between residual blocks, and neighbours are merged until there
    are at most `MOST`. What is larger than an eighth of the backbone, such as a network of dense connections, is cut
    into even groups of convolutions.

    Args:
        model: The float network, batch norm folded.
        metadata: Its metadata, which identify the exit heads.
    """
    heads = {node.output[0] for node in head_nodes(model, metadata)}
    backbone = [node for node in model.graph.node if node.output[0] not in heads]
    total = _convolutions(backbone)
    parts = [piece for part in _single_tensor_parts(model, backbone) for piece in _cut(part, max(1, -(-total // 8)))]
    while len(parts) > MOST:
        counts = [_convolutions(parts[i] + parts[i + 1]) for i in range(len(parts) - 1)]
        smallest = counts.index(min(counts))
        parts[smallest : smallest + 2] = [parts[smallest] + parts[smallest + 1]]
    parts = [part for part in [*parts, *_heads(model, metadata, heads)] if _convolutions(part)]
    names = [_name(node) for part in parts for node in part if node.op_type == "Conv"]
    prefix = _shared_scope(names)
    return [_block(part, prefix) for part in parts]


def _single_tensor_parts(model: onnx.ModelProto, nodes: Sequence[NodeProto]) -> list[list[NodeProto]]:
    """Divide nodes, in the graph's order, wherever a single tensor is read later; each part has a convolution."""
    given = {value.name for value in model.graph.input}
    last = {name: i for i, node in enumerate(nodes) for name in node.input}
    live, parts, part = set(given), list[list[NodeProto]](), list[NodeProto]()
    for i, node in enumerate(nodes):
        part.append(node)
        if node.op_type != "Constant":
            live |= {name for name in node.output if last.get(name, -1) > i}
        live -= {name for name in node.input if last.get(name) == i}
        # an activation belongs to the convolution before it
        fused = i + 1 < len(nodes) and nodes[i + 1].op_type in ("Relu", "Clip", "Sigmoid", "HardSigmoid", "HardSwish")
        if len(live) == 1 and not fused and _convolutions(part):
            parts.append(part)
            part = []
    if parts and not _convolutions(part):
        parts[-1] += part
        return parts
    return [*parts, part]


def _cut(part: list[NodeProto], most: int) -> list[list[NodeProto]]:
    """Cut a part into even groups of at most `most` convolutions, unless it is no larger."""
    count = _convolutions(part)
    if count <= max(most, 4):
        return [part]
    groups = -(-count // most)
    pieces: list[list[NodeProto]] = [[] for _ in range(groups)]
    done = 0
    for node in part:
        done += node.op_type == "Conv"
        pieces[max(0, done - 1) * groups // count].append(node)
    return pieces


def _heads(model: onnx.ModelProto, metadata: ModelMetadata, heads: set[str]) -> list[list[NodeProto]]:
    """Return the nodes of each exit's head; what several heads read belongs to the first."""
    nodes = [node for node in model.graph.node if node.output[0] in heads]
    found = []
    taken = set[str]()
    for exit_ in metadata.outputs:
        needed, head = {exit_}, list[NodeProto]()
        for node in reversed(nodes):
            if needed.intersection(node.output) and node.output[0] not in taken:
                needed.update(node.input)
                head.append(node)
        taken |= {node.output[0] for node in head}
        found.append(head[::-1])
    return found


def _block(nodes: Sequence[NodeProto], prefix: str) -> Block:
    names = [_name(node).removeprefix(prefix).removesuffix("/Conv") for node in nodes if node.op_type == "Conv"]
    ends = dict.fromkeys((names[0], names[-1]))
    return Block(" to ".join(ends), frozenset(node.output[0] for node in nodes), len(names))


def _shared_scope(names: Sequence[str]) -> str:
    """Return the start of all names, up to a slash."""
    first, last = min(names), max(names)  # what the extremes share, all share
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last))
    return "".join(a for a, _ in same).rpartition("/")[0] + "/"


def _name(node: NodeProto) -> str:
    return node.name or str(node.output[0])


def _convolutions(nodes: Iterable[NodeProto]) -> int:
    return sum(node.op_type == "Conv" for node in nodes)
