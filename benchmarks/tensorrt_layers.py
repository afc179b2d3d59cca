"""Counts the layers that NVIDIA's compiler makes of int8 networks, for several placements of their Q/DQ pairs.

    python benchmarks/tensorrt_layers.py --out benchmarks/results/tensorrt-qdq
    python benchmarks/tensorrt_layers.py --out benchmarks/results/tensorrt-qdq --networks --data DATA --runs RUN …

The first command writes OUT-layers.md. It needs TensorRT-RTX (extra tensorrt-rtx) and no GPU. Weights are random: the
layers do not depend on them. The second writes OUT-error.md: what each placement costs trained networks in accuracy, in
ONNX Runtime.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import logging
import math
import unittest.mock
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from students import measure_norms

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.artifacts.partition import graph, graph_names, with_shapes
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.onnxruntime import open_graph
from edgekd.backends.tensorrt.builder import build_plan
from edgekd.backends.tensorrt.layers import Layer, precision_of_nodes
from edgekd.backends.tensorrt.library import TENSORRT_RTX
from edgekd.backends.tensorrt.options import Target, TensorRTOptions
from edgekd.bench.tables import pipe_table
from edgekd.data.folders import scan
from edgekd.data.images import load_batch, load_subset
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import read_split
from edgekd.export import model_metadata, to_onnx
from edgekd.files import atomic_write
from edgekd.models.base import FOUR_STAGES, MultiExitNetwork
from edgekd.models.networks import build
from edgekd.models.weights import load_state, read_state
from edgekd.policy import ensemble
from edgekd.quantization import tensorrt
from edgekd.quantization.tensorrt import DATA_MOVEMENT_OPS, QdqPlacement, quantize_tensorrt
from edgekd.training.run_folder import load_model
from edgekd.types import Array

log = logging.getLogger("tensorrt_layers")

Subject = tuple[onnx.ModelProto, ModelMetadata]
NETWORKS = {
    "multi-exit-resnet18": (),
    "multi-exit-shufflenet_v2_x1_0": (),
    "multi-exit-ghostnet_100": (),
    "multi-exit-mixnet_s": (),
    "multi-exit-mobilenet_v2": (),
    "multi-exit-shufflenet_v2_x1_0, exits inside its stages": ("stage2.1", "stage3.3", "final"),
    "multi-exit-mixnet_s, exits inside its stages": ("blocks.1", "blocks.3", "blocks.4", "final"),
    "resnet18": (),
}
"""Networks, with the exits that are not the usual ones."""
RECIPES = {"int8-fp16": Recipe("int8", "fp16", batch_sizes=(1,)), "int8": Recipe("int8", batch_sizes=(1,))}
BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
SIZE = 224


OMITTED = "Placements that are not listed for a network have the same numbers as the first."


class Before(QdqPlacement):
    """The placement without pairs around pooling and at the sources of moved tensors."""

    def pair_pooling(self, pools: Iterable[onnx.NodeProto]) -> None:
        """Pair nothing."""

    def pair_sources(self, boundaries: Collection[str]) -> None:
        """Pair nothing."""


class Pooling(Before):
    """Pairs around the global pooling of classifiers and exit heads."""

    pair_pooling = QdqPlacement.pair_pooling


class Sources(Before):
    """Pairs where a moved tensor is computed, and where stages are cut."""

    pair_sources = QdqPlacement.pair_sources


class GatePooling(Before):
    """Pairs around the global pooling of squeeze-excite gates, too."""

    def pair_pooling(self, pools: Iterable[onnx.NodeProto]) -> None:
        """Pair all."""
        self.pair(name for node in pools for name in [node.input[0], node.output[0]])


class GatedMaps(Before):
    """A pair on the map that a squeeze-excite gate multiplies, where the product has one."""

    def pair_sources(self, boundaries: Collection[str]) -> None:
        """Pair the maps."""
        for node in self._nodes:
            spatial = [name for name in node.input if self._shapes.get(name, ())[2:] not in ((), (1, 1))]
            if node.op_type == "Mul" and node.output[0] in self._paired and len(spatial) == 1:
                self.pair(spatial)


class Swish(Before):
    """A pair between a quantised convolution and its swish."""

    def pair_sources(self, boundaries: Collection[str]) -> None:
        """Pair what Sigmoid and Mul read."""
        self.pair(node.input[0] for node in self._nodes if node.op_type == "Sigmoid" and node.input[0] in self.layers)


class Depthwise(Before):
    """Depthwise convolutions in int8 whose channels are a multiple of 4, not of 8."""

    def _is_quantizable(self, node: onnx.NodeProto) -> bool:
        shape = self._constants.get(node.input[1], ()) if node.op_type == "Conv" else ()
        grouped = any(attribute.name == "group" and attribute.i > 1 for attribute in node.attribute)
        return super()._is_quantizable(node) or (grouped and len(shape) == 4 and shape[0] % 4 == 0)


BEFORE, NOW = "before", "now (both)"
TRIALS: dict[str, type[QdqPlacement]] = {
    BEFORE: Before,
    "pooling of heads": Pooling,
    "sources of moved tensors": Sources,
    NOW: QdqPlacement,
    "pooling of heads and gates": GatePooling,
    "gated maps": GatedMaps,
    "in front of swish": Swish,
    "depthwise, 4 channels": Depthwise,
}


@dataclass
class Count:
    """The layers of one or more engines.

    Attributes:
        kinds: Number of layers that compute, or only quantise, dequantise or reformat.
        bytes: Bytes of the activations that layers read and write.
        int8: Quantised convolutions that read int8, and their number.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    bytes: int = 0
    int8: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Count) -> Count:
        """Return the layers of both."""
        return Count(self.kinds + other.kinds, self.bytes + other.bytes, self.int8 + other.int8)

    def cells(self) -> list[str]:
        """Return the cells: layers, reformat, quantise, dequantise, MiB, convolutions."""
        found = [str(self.kinds.total()), *(str(self.kinds[k]) for k in ("reformat", "quantise", "dequantise"))]
        return [*found, f"{self.bytes / 2**20:.2f}", f"{self.int8['int8']} of {self.int8.total()}"]


HEAD = ["layers", "reformat", "quantise", "dequantise", "MiB", "read int8"]


def counted(model: onnx.ModelProto, recipe: Recipe) -> Count:
    """Build a graph, and count its layers."""
    target = Target(TENSORRT_RTX, recipe, TensorRTOptions(timing_cache=False))
    plan = build_plan(model, name="graph", target=target)
    operators = {node.name: node.op_type for node in model.graph.node}
    layers = [layer for layer in plan.layers if layer.kind not in ("signal", "wait")]
    tensors = [tensor for layer in layers for tensor in (*layer.inputs, *layer.outputs)]
    maker = {name: node.op_type for node in model.graph.node for name in node.output}
    wanted = [n.name for n in model.graph.node if n.op_type == "Conv" and maker.get(n.input[1]) == "DequantizeLinear"]
    found = precision_of_nodes(layers, wanted)
    return Count(
        Counter(_kind(layer, operators) for layer in layers),
        sum(math.prod(tensor.shape) * BYTES.get(tensor.precision, 4) for tensor in tensors),
        Counter(str(found.get(name)) for name in wanted),
    )


def _kind(layer: Layer, operators: dict[str, str]) -> str:
    """Classify a layer by the ONNX operators that it takes part in: without any, it only reformats."""
    named = {operators.get(node, "Cast") for node in layer.nodes} - DATA_MOVEMENT_OPS - {"Cast"}
    if layer.multiplies or named - {"QuantizeLinear", "DequantizeLinear"}:
        return "compute"
    reads, writes = ({tensor.precision for tensor in some} for some in (layer.inputs, layer.outputs))
    if "int8" in writes and reads - {"int8"}:
        return "quantise"
    return "dequantise" if "int8" in reads and writes - {"int8"} else "reformat"


def exported(net: MultiExitNetwork, name: str, images: Array, preprocess: Preprocess, classes: int) -> Subject:
    """Export a network."""
    with torch.no_grad():
        outputs = net.eval()(torch.from_numpy(images[:1]))
    labels = tuple(f"class {i}" for i in range(classes))
    return to_onnx(net, image_size=preprocess.image_size), model_metadata(name, labels, preprocess, outputs)


def untrained(name: str, images: Array) -> Subject:
    """Build a network of random weights, whose norms have seen noise."""
    exits = NETWORKS[name] or FOUR_STAGES
    torch.manual_seed(0)
    net = build(name.partition(",")[0], classes=5, image_size=SIZE, exits=exits)
    measure_norms(net, images)
    return exported(net, name, images, Preprocess(SIZE), 5)


def quantised(subject: Subject, placement: type[QdqPlacement], images: Array, *, heads: bool = True) -> onnx.ModelProto:
    """Quantise with a placement other than edgekd's."""
    with unittest.mock.patch.object(tensorrt, "QdqPlacement", placement):
        return quantize_tensorrt(*subject, images, heads=heads)


def boundaries(model: onnx.ModelProto, metadata: ModelMetadata) -> str:
    """Return the types of the tensors between stages, in turn."""
    inputs = [
        value.type.tensor_type.elem_type
        for k in range(1, len(metadata.exits))
        for value in graph(with_shapes(model), metadata, name=f"stage_{k}").graph.input
    ]
    return ", ".join("int8" if kind == onnx.TensorProto.INT8 else "float" for kind in inputs) or "–"


def layer_tables(names: Iterable[str]) -> str:
    """Count the layers of each network: by stage for the old and the new placement, and in all for every trial."""
    images = np.random.default_rng(0).normal(size=(8, 3, SIZE, SIZE)).astype(np.float32)
    sums, stages = [], []
    for name, (recipe_name, recipe) in itertools.product(names, RECIPES.items()):
        subject = untrained(name, images)
        parts = [part for part in graph_names(subject[1]) if part.startswith("stage")] or ["monolithic"]
        built: dict[bytes, Count] = {}
        counts: dict[str, list[Count]] = {}
        rows: dict[str, list[str]] = {}
        for trial, placement in TRIALS.items():
            log.info("%s, %s, %s", name, recipe_name, trial)
            model = quantised(subject, placement, images[:2])
            counts[trial] = []
            for part in parts:
                stage = graph(with_shapes(model), subject[1], name=part)
                key = stage.SerializeToString(deterministic=True)
                built[key] = built.get(key) or counted(stage, recipe)
                counts[trial].append(built[key])
            rows[trial] = [*sum(counts[trial], Count()).cells(), boundaries(model, subject[1])]
        differ = {trial: row for trial, row in rows.items() if trial in (BEFORE, NOW) or row != rows[BEFORE]}
        sums += [[name, recipe_name, trial, *row] for trial, row in differ.items()]
        for part, old, new in zip(parts, counts[BEFORE], counts[NOW]):
            cells = [a if a == b else f"{a} → {b}" for a, b in zip(old.cells(), new.cells())]
            stages.append([name, recipe_name, part, *cells])
    return (
        f"## All stages together\n\n{OMITTED}\n\n"
        + pipe_table((["network", "recipe", "pairs", *HEAD, "boundaries"], sums))
        + "\n\n## Each stage, before → now\n\n"
        + pipe_table((["network", "recipe", "graph", *HEAD], stages))
    )


def accuracy_table(subjects: Iterable[tuple[str, Subject, Array, Array]]) -> str:
    """Compare each placement with the float network, in ONNX Runtime."""
    rows = []
    for name, subject, calibration, images in subjects:
        whole, before = _logits(subject[0], images), list[str]()
        for trial, placement in TRIALS.items():
            log.info("%s, %s", name, trial)
            ints = _logits(quantised(subject, placement, calibration), images)
            decibels = [10 * np.log10((w**2).sum() / ((w - i) ** 2).sum()) for w, i in zip(whole, ints)]
            same = np.mean(ensemble(whole).argmax(axis=1) == ensemble(ints).argmax(axis=1))
            row = [", ".join(f"{value:.1f}" for value in decibels), f"{100 * same:.1f}", str(len(images))]
            before = row if trial == BEFORE else before
            if trial in (BEFORE, NOW) or row != before:
                rows.append([name, trial, *row])
    head = ["network", "pairs", "SQNR of each exit's logits, dB", "same prediction as float, %", "images"]
    return pipe_table((head, rows))


def _logits(model: onnx.ModelProto, images: Array) -> Array:
    runner = open_graph(model.SerializeToString(), threads=1)
    parts = [np.stack(runner(images[i : i + 16])) for i in range(0, len(images), 16)]
    return np.concatenate(parts, axis=1)


def trained(runs: Iterable[Path], data: Path, limit: int) -> Iterable[tuple[str, Subject, Array, Array]]:
    """Load run folders: network, calibration images and test images."""
    for run in runs:
        network, made = load_model(run)
        split = read_split(run)
        calibration, _ = load_subset(split, "train", data=data, preprocess=made.preprocess, limit=128)
        images, _ = load_subset(split, "test", data=data, preprocess=made.preprocess, limit=limit)
        subject = exported(network, made.network, images, made.preprocess, len(made.classes))
        yield made.network, subject, calibration, images


def imagenet(files: Iterable[Path], data: Path, limit: int) -> Iterable[tuple[str, Subject, Array, Array]]:
    """Load ImageNet weights, NAME.safetensors, and pictures of `data`, every other one for calibration."""
    paths = [found.path for found in scan(data).items]
    preprocess = Preprocess(160)
    for file in files:
        net = build(file.stem, classes=1000, image_size=160)
        load_state(net, read_state(file), source=str(file))
        images = load_batch([data / path for path in paths[:: max(len(paths) // (2 * limit), 1)]], preprocess)
        yield f"{file.stem} (ImageNet)", exported(net, file.stem, images, preprocess, 1000), images[::2], images[1::2]


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="run folders of trained networks")
    parser.add_argument("--weights", type=Path, nargs="*", default=[], help="ImageNet weights, NAME.safetensors")
    parser.add_argument("--data", type=Path, help="folder of class folders of images")
    parser.add_argument("--images", type=int, default=400, help="maximum number of compared predictions")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.networks:
        made = (
            f"TensorRT-RTX {TENSORRT_RTX.version()}, {SIZE} pixels, batch 1, int8 exit heads, {datetime.date.today()}."
        )
        text = f"# Layers of int8 engines\n\n{made}\n\n{layer_tables(options.networks)}\n"
        atomic_write(options.out.with_name(f"{options.out.name}-layers.md"), text.encode())
    if options.data:
        subjects = itertools.chain(
            trained(options.runs, options.data, options.images), imagenet(options.weights, options.data, options.images)
        )
        text = f"# Error of int8 networks in ONNX Runtime\n\n{OMITTED}\n\n{accuracy_table(subjects)}\n"
        atomic_write(options.out.with_name(f"{options.out.name}-error.md"), text.encode())


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    main()
