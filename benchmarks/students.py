"""Measures the cost of int8 for each student: latency at batch 1 and predictions, fp32 and int8, in both CPU backends.

    python benchmarks/students.py DATA [RUN ...] --weights FOLDER --out benchmarks/results/students-int8

Writes OUT.json, with every sample, and OUT.md. Nothing is trained; the significance of a row
depends on the origin of the network's weights:

- a run folder (edgekd train or distill on DATA): accuracy on its test images. Calibrated on its training images.
- FOLDER/NAME.safetensors, ImageNet's: how often int8 and float predict the same of 1,000 classes, on images of DATA.
- random weights, batch norm measured on images of DATA: likewise, but one class may win on every image; only the
  latency is meaningful.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import itertools
import logging
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgekd.artifacts.metadata import ModelMetadata, read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.report import describe_host
from edgekd.backends.runner import Runner
from edgekd.bench.latency import summarise, time_queries
from edgekd.bench.record import refuse_existing, write_record
from edgekd.bench.tables import pipe_table
from edgekd.compiler.build import compile_engine
from edgekd.data.folders import scan
from edgekd.data.images import load_subset
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import Item, Split, read_split
from edgekd.export import export, model_metadata
from edgekd.files import atomic_write
from edgekd.host import HostInfo, load_average
from edgekd.models.base import MultiExitNetwork, Outputs
from edgekd.models.networks import build
from edgekd.models.weights import load_state, read_state
from edgekd.policy import ensemble
from edgekd.runtime.engine import Engine, open_engine
from edgekd.text import percent
from edgekd.training.run_folder import load_model, read_metadata
from edgekd.types import Array

log = logging.getLogger("students")

PLAIN = (
    "resnet18",
    "resnet50",
    "mixnet_s",
    "shufflenet_v2_x1_0",
    "ghostnet_100",
    "squeezenet1_1",
    "mobilenet_v2",
    "tf_mobilenetv3_small_100",
    "densenet121",
)
NAMES = (*PLAIN, *(f"multi-exit-{name}" for name in PLAIN[:-2]), "scan-resnet18", "msdnet")
HALF = {"tf_mobilenetv3_small_100": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
"""Mean and standard deviation that a network's ImageNet weights expect, where they differ from the usual ones."""
BACKENDS = ("onnxruntime", "openvino")
PRECISIONS = ("fp32", "int8")


@dataclass(frozen=True)
class Subject:
    """One network.

    Attributes:
        network: The network.
        metadata: Its metadata.
        weights: Origin of the weights, for the table.
        calibration: Images (N, 3, H, W) for int8.
        images: Images (N, 3, H, W) to predict.
        labels: Their labels (N,); None for a network that was not trained.
    """

    network: nn.Module
    metadata: ModelMetadata
    weights: str
    calibration: Array
    images: Array
    labels: npt.NDArray[np.int64] | None


def trained(run: Path, options: argparse.Namespace) -> Subject:
    """Load the network of a run folder, its training images for calibration, and its test images."""
    network, made = load_model(run)
    split, p = read_split(run), made.preprocess
    calibration, _ = load_subset(split, "train", data=options.data, preprocess=p, limit=options.calibration)
    images, labels = load_subset(split, "test", data=options.data, preprocess=p, limit=options.images)
    outputs = _outputs(network, images)
    metadata = model_metadata(made.network, made.classes, p, outputs, provenance=made.provenance)
    return Subject(network, metadata, f"trained ({split.method}, {split.group})", calibration, images, labels)


def untrained(name: str, options: argparse.Namespace) -> Subject:
    """Build a network with ImageNet weights if available, else random ones; every other image is for calibration."""
    file = Path(options.weights or ".") / f"{name}.safetensors"
    pretrained = bool(options.weights) and file.is_file()
    preprocess = Preprocess(options.image_size, *(HALF.get(name, ()) if pretrained else ()))
    folder = scan(options.data)
    items = tuple(Item(found.path, found.label) for found in folder.items)
    split = Split(folder.classes, {"train": items[::2], "test": items[1::2]}, "every other", 0, "none", 0, 0, "")
    calibration, _ = load_subset(split, "train", data=options.data, preprocess=preprocess, limit=options.calibration)
    images, _ = load_subset(split, "test", data=options.data, preprocess=preprocess, limit=options.images)
    classes = tuple(f"class {i}" for i in range(1000 if pretrained else 5))
    torch.manual_seed(0)
    network = build(name, classes=len(classes), image_size=options.image_size)
    if pretrained:
        log.info("%s: %s", name, load_state(network, read_state(file), source=str(file)).summary())
    else:
        measure_norms(network, calibration[:32])
    metadata = model_metadata(name, classes, preprocess, _outputs(network, images))
    return Subject(network, metadata, "ImageNet" if pretrained else "random", calibration, images, None)


def measure_norms(network: nn.Module, images: Array) -> None:
    """Set batch-norm statistics from one batch; without them signals vanish in a network of random weights."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.from_numpy(images))


@torch.no_grad()
def _outputs(network: MultiExitNetwork, images: Array) -> Outputs:
    return network.eval()(torch.from_numpy(images[:1]))


def measure(subject: Subject, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Export, compile for both backends in both precisions, time them interleaved, and compare their predictions."""
    source = folder / "student.onnx"
    names = [f"image {i}" for i in range(32)]
    difference = export(subject.network, subject.metadata, out=source, images=subject.images[:32], names=names)
    ways = list(itertools.product(BACKENDS, PRECISIONS))
    engines = [_engine(subject, source, *way, threads=options.threads) for way in ways]
    samples = _timed(engines, subject.images, options)
    return {
        "network": subject.metadata.network,
        "weights": subject.weights,
        "exits": len(subject.metadata.exits),
        "image_size": subject.metadata.preprocess.image_size,
        "parameters": sum(p.numel() for p in subject.network.parameters()),
        "difference_from_torch": difference,
        "calibration_images": len(subject.calibration),
        "labels": None if subject.labels is None else subject.labels.tolist(),
        "provenance": subject.metadata.provenance,
        "results": [_result(*way, e, ms, subject.images) for way, e, ms in zip(ways, engines, samples)],
    }


def _engine(subject: Subject, source: Path, backend: str, precision: str, *, threads: int | None) -> Engine:
    """Compile without validation images, so without a gate: the table shows what int8 costs."""
    out = source.with_name(f"{backend}-{precision}.engine")
    options = {"openvino": {"static_batch_sizes": (1,)}}
    recipe = Recipe(precision, batch_sizes=(1,), graphs="all", options=options)  # type: ignore[arg-type]
    images = subject.calibration if precision == "int8" else None
    compile_engine(
        read_student(source), out, recipe=recipe, backend=backend, calibration=images, validation=None, threads=threads
    )
    return open_engine(out, threads=threads)


def _timed(engines: list[Engine], images: Array, options: argparse.Namespace) -> list[list[list[float]]]:
    """Return the milliseconds of each query, for each engine and round; engines are interleaved."""
    queries = [images[i : i + 1] for i in range(min(len(images), 64))]
    samples: list[list[list[float]]] = [[] for _ in engines]
    for _, (at, engine) in itertools.product(range(options.rounds), enumerate(engines)):
        graph = engine.monolithic

        def query(x: Array, graph: Runner = graph) -> int:
            return len(graph(x))

        time_queries(query, queries, seconds=options.seconds / 4, count=3)
        found, _ = time_queries(query, queries, seconds=options.seconds, count=10)
        samples[at].append([round(ms, 4) for ms in found])
    return samples


def _result(backend: str, precision: str, engine: Engine, samples: list[list[float]], images: Array) -> dict[str, Any]:
    assert engine.manifest is not None
    files = [f for f in engine.manifest.files.values() if f.graph == "monolithic"]
    return {
        "backend": backend,
        "precision": precision,
        "ran": engine.manifest.precision,
        "size_mib": sum(file.bytes for file in files) / 2**20,
        "samples_ms": samples,
        "predictions": ensemble(engine.logits(images, batch_size=1)).argmax(axis=1).tolist(),
    }


def rows(network: dict[str, Any]) -> list[list[str]]:
    """Make the rows of one network, one for each backend."""
    found = []
    for backend in BACKENDS:
        float_, int8 = (r for r in network["results"] if r["backend"] == backend)
        ms = [summarise(r["samples_ms"]).p50 for r in (float_, int8)]
        predictions = [np.array(r["predictions"]) for r in (float_, int8)]
        same = float((predictions[0] == predictions[1]).mean())
        cells = [network["network"], network["weights"], backend, *(f"{m:.2f}" for m in ms), f"{ms[0] / ms[1]:.2f}"]
        cells += [f"{r['size_mib']:.1f}" for r in (float_, int8)]
        found.append([*cells, *_accuracy(predictions, network["labels"]), percent(same, digits=1)])
    return found


def _accuracy(predictions: list[npt.NDArray[np.int64]], labels: list[int] | None) -> list[str]:
    """Format the accuracy of both and their difference in points, with the standard error of a paired difference."""
    if labels is None:
        return ["–"] * 3
    right = [a == np.array(labels) for a in predictions]
    points = 100 * (right[1].mean() - right[0].mean())
    error = 100 * np.sqrt((right[0] != right[1]).sum()) / len(labels)
    return [*(percent(float(r.mean())) for r in right), f"{points:+.2f} ± {error:.2f}"]


def markdown(record: dict[str, Any]) -> str:
    """Render the table, with its columns and conditions explained."""
    head = ["network", "weights", "backend", "fp32 ms", "int8 ms", "× faster", "fp32 MiB", "int8 MiB"]
    head += ["fp32 accuracy %", "int8 accuracy %", "points", "same prediction %"]
    host, s = HostInfo(**record["host"]), record["settings"]
    return (
        "## Cost of int8 for each student\n\n"
        + pipe_table((head, [row for network in record["networks"] for row in rows(network)]))
        + "\n\nMedian latency of the whole graph, all exits, at batch 1; size of its files; predictions of all exits' "
        "ensemble. Trained: accuracy on the run's test images, and the difference with its standard error. ImageNet: "
        "agreement of predictions over 1,000 classes, on images unlike those of its training, so that many are close "
        "calls. Random: only latency is meaningful. No accuracy gate was applied here; `edgekd compile` refuses a loss "
        f"of more than 0.5 points.\n\n{record['created']}. {host}. {s['threads'] or host.cores} threads. "
        f"Load average {record['load_before'][0]:g} before, {record['load_after'][0]:g} "
        f"after. {s['image_size']} pixels unless trained otherwise, at most {s['images']} images, "
        f"{s['calibration']} for calibration, {s['rounds']} rounds of {s['seconds']:g} s interleaved in one process.\n"
    )


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of class folders of images")
    parser.add_argument("runs", type=Path, nargs="*", help="run folders of trained students")
    parser.add_argument("--out", type=Path, required=True, help="output path without suffix")
    parser.add_argument("--weights", type=Path, help="folder of ImageNet weights, NAME.safetensors")
    parser.add_argument("--names", nargs="*", default=NAMES, help="networks to measure besides those of the runs")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--images", type=int, default=400, help="maximum number of compared predictions")
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--threads", type=int)
    return parser.parse_args(arguments)


def main(arguments: list[str]) -> None:
    options = parsed(arguments)
    record_file = options.out.with_suffix(".json")
    refuse_existing(record_file)
    before, networks = load_average(), []
    done = {read_metadata(run).network for run in options.runs}
    rest = [name for name in options.names if name not in done]
    subjects = itertools.chain(
        (trained(run, options) for run in options.runs), (untrained(name, options) for name in rest)
    )
    for subject in subjects:
        log.info("%s, %s weights", subject.metadata.network, subject.weights)
        with tempfile.TemporaryDirectory(prefix="edgekd-students-") as folder:
            networks.append(measure(subject, Path(folder), options))
    kept = ("image_size", "images", "calibration", "rounds", "seconds", "threads")
    record = {
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "settings": {key: getattr(options, key) for key in kept},
        "host": dataclasses.asdict(describe_host(*BACKENDS)),
        "load_before": before,
        "load_after": load_average(),
        "networks": networks,
    }
    write_record(record_file, record)
    atomic_write(options.out.with_suffix(".md"), markdown(record).encode())


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s")
    log.setLevel(logging.INFO)
    main(sys.argv[1:])
