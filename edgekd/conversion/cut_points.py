"""Cut points of a classifier's ONNX graph: where one or few small tensors carry all that the rest reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from edgekd.conversion import graph_rewriting
from edgekd.errors import ConfigError
from edgekd.types import Array

MAX_TENSORS = 3
"""Most tensors that a boundary may have."""
MAX_CANDIDATES = 16
"""Most cut points that heads are trained for."""
ENOUGH = 3
"""With so many cut points of one tensor, those of several are left out: within a residual block, for example."""
SHARES = 0.01, 0.97
"""Share of the multiplications before a useful cut point: an exit behind nearly all of them saves nothing."""
_BATCHES = 2, 3
"""Batch sizes that tell a batch axis from any other."""


@dataclass(frozen=True)
class CutPoint:
    """A place at which the graph can be cut.

    Attributes:
        tensors: Names of the tensors that the rest of the graph reads, in the graph's order.
        shapes: Shape of each for one image, without the batch axis.
        share: Multiply-accumulates before it, as a fraction of the network's.
    """

    tensors: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    share: float

    @property
    def bytes(self) -> int:
        """Bytes of the tensors for one image, in float32."""
        return 4 * sum(math.prod(shape) for shape in self.shapes)

    @property
    def name(self) -> str:
        """Names of the tensors, for tables and options."""
        return "+".join(self.tensors)


def find_cut_points(model: onnx.ModelProto) -> tuple[CutPoint, ...]:
    """Find the cut points of a classifier, in the graph's order; one for each place between two layers with weights.

    A cut point is a set of at most `MAX_TENSORS` float tensors with the batch as their first axis, such that everything
    after it depends on the images through them alone: what is alive at one place of the topological order. Of the
    places with the same computation before them, the one with fewest tensors and bytes is kept, the last of equals,
    which is behind activations and residual additions.

    Args:
        model: One input `images`, one output, dynamic batch.

    Raises:
        ConfigError: There is none; the narrowest place is named.
    """
    alive = _alive_sets(model)
    size = model.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    few = {name for names in alive if len(names) <= MAX_TENSORS for name in names}
    layers = [node for node in model.graph.node if node.op_type in _MACS]
    constants = {tensor.name for tensor in model.graph.initializer} | {"images"}
    wanted = few.union(*({*node.input[:2], node.output[0]} for node in layers)) - constants
    small, large = (_run(model, sorted(wanted), np.zeros((n, 3, size, size), np.float32)) for n in _BATCHES)
    rows = {
        name: a.shape[1:]
        for name, a in small.items()
        if a.dtype == np.float32
        and (a.shape[:1], large[name].shape[:1]) == ((_BATCHES[0],), (_BATCHES[1],))
        and a.shape[1:] == large[name].shape[1:]
    }
    shapes = {name: a.shape for name, a in small.items()} | {"images": (_BATCHES[0], 3, size, size)}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    macs = np.cumsum([_macs(node, shapes) for node in model.graph.node])
    total = float(macs[-1])
    if not total:
        raise ConfigError("the network has no convolution and no linear layer", fix="give an image classifier")
    best: dict[float, CutPoint] = {}
    for names, before in zip(alive, macs.tolist()):
        share = before / total
        if not (0 < share < 1 and 0 < len(names) <= MAX_TENSORS and rows.keys() >= set(names)):
            continue
        cut = CutPoint(names, tuple(rows[name] for name in names), share)
        kept = best.get(before)
        if kept is None or (len(cut.tensors), cut.bytes) <= (len(kept.tensors), kept.bytes):
            best[before] = cut
    if not any(SHARES[0] <= cut.share <= SHARES[1] for cut in best.values()):
        raise _no_cut_point(alive, (macs / total).tolist())
    return tuple(best.values())


def candidates(cuts: Sequence[CutPoint], limit: int = MAX_CANDIDATES) -> tuple[CutPoint, ...]:
    """Choose the cut points that heads are trained for: spread evenly over the computation, of few and small tensors.

    Args:
        cuts: Cut points in the graph's order.
        limit: Most that are chosen.
    """
    useful = [cut for cut in cuts if SHARES[0] <= cut.share <= SHARES[1]]
    single = [cut for cut in useful if len(cut.tensors) == 1]
    useful = single if len(single) >= ENOUGH else useful
    if len(useful) <= limit:
        return tuple(useful)
    best: dict[int, CutPoint] = {}
    for cut in useful:
        part = int(limit * cut.share)
        kept = best.get(part)
        if kept is None or (len(cut.tensors), cut.bytes) <= (len(kept.tensors), kept.bytes):
            best[part] = cut
    return tuple(best.values())


def _no_cut_point(alive: Sequence[tuple[str, ...]], shares: Sequence[float]) -> ConfigError:
    inner = [(len(names), share) for names, share in zip(alive, shares) if SHARES[0] <= share <= SHARES[1]]
    if not any(0 < share < 1 for share in shares):
        where = "it has a single layer with weights"
    elif not inner:
        where = "a single layer has nearly all of its multiplications"
    else:
        count, share = min(inner)
        tensors = "one tensor, which has no batch axis of its own," if count == 1 else f"{count} tensors"
        where = f"where it narrows most, after {share:.0%} of its multiplications, {tensors} would have to be passed on"
    return ConfigError(
        f"the network has no cut point for an early exit: {where} (at most {MAX_TENSORS} float tensors are possible)",
        fix="use the network without early exits, or train a student with exits: edgekd distill",
    )


def _alive_sets(model: onnx.ModelProto) -> list[tuple[str, ...]]:
    """Return, behind each node, the tensors that depend on the images and are read later."""
    nodes, last = model.graph.node, dict[str, int]()
    for at, node in enumerate(nodes):
        last.update(dict.fromkeys(node.input, at))
    last.update({output.name: len(nodes) for output in model.graph.output})
    alive, found = {"images": None}, list[tuple[str, ...]]()  # dictionaries keep the order
    depends = {"images"}
    for at, node in enumerate(nodes):
        if depends.intersection(node.input):
            depends.update(node.output)
            alive.update(dict.fromkeys(name for name in node.output if name))
        alive = {name: None for name in alive if last.get(name, -1) > at}
        found.append(tuple(alive))
    return found


def with_outputs(model: onnx.ModelProto, names: Iterable[str]) -> onnx.ModelProto:
    """Return the graph with these inner tensors, whose types are left to be inferred, as its only outputs."""
    wanted = onnx.ModelProto()
    wanted.CopyFrom(model)
    del wanted.graph.output[:]
    wanted.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return wanted


def _run(model: onnx.ModelProto, names: Sequence[str], images: Array) -> dict[str, Any]:
    """Return inner tensors, computed by the operators as they are."""
    opened = graph_rewriting.session(model, outputs=names, optimise=False)
    return dict(zip(names, opened.run(list(names), {"images": images})))


def _conv_macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _transposed_macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    return math.prod(shapes[node.input[0]]) * math.prod(shapes[node.input[1]][1:])


def _gemm_macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][0 if transposed else 1]


def _matmul_macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    return math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-1]


_MACS = {"Conv": _conv_macs, "ConvTranspose": _transposed_macs, "Gemm": _gemm_macs, "MatMul": _matmul_macs}
"""Multiply-accumulates of the layers that nearly all of them are in."""


def _macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    count = _MACS.get(node.op_type)
    return count(node, shapes) if count and node.output[0] in shapes else 0
