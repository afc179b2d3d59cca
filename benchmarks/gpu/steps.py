"""Building, recording and measuring one engine; written against what edgekd gives to everybody."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import golden
import numpy as np
from gpu import Meter, NotMeasured, facts, gaps, spans

from edgekd.artifacts.metadata import read_onnx, read_student
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import find_backend
from edgekd.backends.cuda.device import device
from edgekd.bench.latency import time_queries
from edgekd.bench.measure import bench
from edgekd.bench.record import summary, write_record
from edgekd.bench.suite import Suite
from edgekd.bench.variants import make_predictor
from edgekd.compiler.build import compile_engine
from edgekd.data.images import load_subset
from edgekd.data.split import read_split
from edgekd.errors import BackendError, ConfigError, GateError
from edgekd.files import atomic_write
from edgekd.runtime.engine import open_engine
from edgekd.runtime.tuning import save_tuned, tune
from edgekd.serialization import to_json

DROP = 0.5
"""Points of accuracy that an exit, and the cascade, may lose."""
PRECISION = {
    "fp16": ("fp16", "fp32"),
    "fp32": ("fp32", "fp32"),
    "int8": ("int8", "fp32"),
    "int8-fp16": ("int8", "fp16"),
}


def recipe_of(asked: argparse.Namespace, *, method: str = "minmax") -> Recipe:
    """The recipe by name, for the batch sizes and tactics that are asked for."""
    precision, floats = PRECISION[asked.recipe]
    sizes = asked.batch_sizes if asked.recipe.endswith("fp16") else tuple(sorted({1, asked.batch_sizes[-1]}))
    return Recipe(
        precision,  # type: ignore[arg-type]
        float_layers=floats,  # type: ignore[arg-type]
        max_accuracy_drop=DROP,
        calibration_method=method,  # type: ignore[arg-type]
        batch_sizes=sizes,
        options={
            "tensorrt": {
                "library_tactics": not asked.no_library_tactics,
                "optimization_level": asked.optimization_level,
            }
        },
    )


def engine_path(asked: argparse.Namespace, network: str) -> Path:
    return Path(asked.out / "engines" / f"{network}-{asked.recipe}.engine")


def images_of(asked: argparse.Namespace, part: Any) -> tuple[Any, Any]:
    """Images (N, 3, H, W) and labels (N,) of a part."""
    preprocess = read_onnx(asked.models / f"{asked.network}.onnx")[1].preprocess
    return load_subset(read_split(asked.images), part, data=asked.images, preprocess=preprocess)


def check(asked: argparse.Namespace) -> dict[str, Any]:
    """Whether TensorRT and a GPU are here at all."""
    if asked.dry_run:
        return {}
    find_backend("tensorrt")
    return facts(device())


def build(asked: argparse.Namespace) -> dict[str, Any]:
    """Compile with parity and accuracy of every exit against ONNX Runtime's answers, then tune the cascade."""
    began, out = time.monotonic(), engine_path(asked, asked.network)
    validation = images_of(asked, "val")
    reference = np.load(asked.models / f"{asked.network}.npz")["val"]
    refusals = []
    for method in ("minmax", "entropy") if asked.recipe.startswith("int8") else ("minmax",):
        try:
            manifest, attempts = compile_engine(
                read_student(asked.models / f"{asked.network}.onnx"),
                out,
                recipe=recipe_of(asked, method=method),
                backend="onnxruntime" if asked.dry_run else "tensorrt",
                calibration=images_of(asked, "train")[0],
                validation=validation,
                reference=reference,
            )
            break
        except GateError as error:
            refusals.append(f"{method}: {error.what}")
    else:
        raise GateError("\n".join(refusals), fix="train longer, or quantise less")
    seconds = round(time.monotonic() - began, 1)
    return {
        "build_seconds": seconds,
        "calibration_method": method,
        "refusals": refusals,
        "batch1_ms": attempts[0].batch1_ms,
        "precision": manifest.precision,
        "parity": manifest.parity and dataclasses.asdict(manifest.parity),
        "accuracy": manifest.accuracy and dataclasses.asdict(manifest.accuracy),
        "stage_ms": manifest.stage_ms,
        "host": dataclasses.asdict(manifest.host),
        "backend_version": manifest.backend_version,
        "notes": manifest.notes,
        "bytes": {name: file.bytes for name, file in manifest.files.items()},
        "tuned": _tuned(asked, out, validation),
    }


def _tuned(asked: argparse.Namespace, out: Path, validation: tuple[Any, Any]) -> dict[str, Any] | str:
    engine = open_engine(out)
    if len(engine.metadata.exits) == 1:
        return "one exit"
    try:
        tuned = tune(engine, *validation, max_accuracy_drop=DROP)
    except ConfigError as error:
        return error.what
    facts = {"goal": {"max_accuracy_drop": DROP}, "images": len(validation[1])}
    save_tuned(out, tuned, facts, digest=engine.manifest.digest if engine.manifest else "")
    return {k: v for k, v in dataclasses.asdict(tuned).items() if k != "curve"}


def records(asked: argparse.Namespace) -> dict[str, Any]:
    """An edgekd record: cascade, cascade that nobody leaves, all exits at once, the last one, and the plain network."""
    sizes = recipe_of(asked).batch_sizes
    main = asked.recipe.endswith("fp16") and asked.network == "student"
    suite = Suite(
        batch_sizes=sizes,
        min_count=tuple(max(400 // size, 10) for size in sizes) if not asked.dry_run else (20,) * len(sizes),
        min_seconds=asked.seconds / 2,
        warmup_seconds=asked.seconds / 4,
        rounds=2 if main and not asked.dry_run else 1,
        pool=256,
        variants=("cascade", "no-early-exit", "full", "final"),
    )
    plain = engine_path(asked, "plain")
    record = bench(
        engine_path(asked, asked.network),
        suite=suite,
        data=asked.images,
        split=read_split(asked.images),
        against={"plain": plain} if plain.is_dir() else {},
        command="benchmarks/gpu/run.sh",
    )
    path = asked.out / "records" / f"{asked.network}-{asked.recipe}.json"
    path.unlink(missing_ok=True)
    write_record(path, record)
    rows = {
        v.name: {
            "mean_ms": {str(t.batch): summary(t).mean for t in v.timings},
            "p50_ms": {str(t.batch): summary(t).p50 for t in v.timings},
            "accuracy": v.metrics.accuracy,
            "shares": v.shares,
            "overhead_ms": v.overhead_ms,
            "memory_mib": v.memory_mib,
            "size_mib": v.size_mib,
        }
        for v in record.variants
    }
    return {"record": str(path.relative_to(asked.out)), "variants": rows, "warnings": record.warnings}


def on_device(asked: argparse.Namespace) -> dict[str, Any]:
    """On the device's own clock: each graph at each batch size, the cascade's gaps; memory; energy."""
    try:
        gpu = device()
    except BackendError as error:
        if not asked.dry_run:
            raise
        raise NotMeasured(f"dry run: {error.what}") from None
    images, _ = images_of(asked, "test")
    with gpu:
        free = gpu.free_bytes()
        engine = open_engine(engine_path(asked, asked.network))
        clocks = _clocks(gpu, engine, images, asked)
        found = {"device_ms": clocks, "device_mib": (free - gpu.free_bytes()) / 2**20, **facts(gpu)}
        if len(engine.metadata.exits) > 1:
            found["gap_us"] = _gap_us(gpu, engine, images, seconds=asked.seconds)
    return {**found, "energy": _energy(asked, engine, images)}


def _clocks(gpu: Any, engine: Any, images: Any, asked: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median milliseconds of each graph with the copy of its logits, by batch size."""
    graphs = {"monolithic": engine.monolithic}
    exits = len(engine.metadata.exits)
    if exits > 1:
        engine.staged_runner()  # links the stages: each reads what the one before wrote
        graphs |= {"final": engine.final, **{f"stage_{k}": engine.stage(k) for k in range(exits)}}
    found: dict[str, dict[str, float]] = {}
    for name, graph in graphs.items():
        for size in recipe_of(asked).batch_sizes:
            _feed(graph, images[:size])
            times = spans(gpu, functools.partial(graph.launch, size), seconds=asked.seconds / 4)
            found.setdefault(name, {})[str(size)] = float(np.median(times))
    return found


def _feed(graph: Any, images: Any) -> None:
    for name in graph.inputs:
        if name == "images":
            graph.tensors[name].put(images)


def _gap_us(gpu: Any, engine: Any, images: Any, *, seconds: float) -> float:
    """Between two stages while nobody leaves, in the middle of all; the classifier decides."""
    answer = make_predictor(engine, "no-early-exit")
    answer(images[:1])  # links the stages
    stages = [engine.stage(k) for k in range(len(engine.metadata.exits))]
    return 1e3 * float(np.median(gaps(gpu, stages, lambda: answer(images[:1]), seconds=seconds)))


def _energy(asked: argparse.Namespace, engine: Any, images: Any) -> dict[str, Any]:
    """Millijoules an image above idle at batch 1, by NVML."""
    try:
        meter = Meter(device())
    except NotMeasured as error:
        return {"not measured": str(error)}
    idle = meter.watts(lambda: time.sleep(asked.seconds))[0]
    found: dict[str, Any] = {"idle_watts": idle, **meter.state()}
    for kind in (
        ("cascade", "full", "final")
        if engine.metadata.policy.is_tuned and len(engine.metadata.exits) > 1
        else ("final",)
    ):
        answer = make_predictor(engine, kind)
        count = 0

        def work(answer: Any = answer) -> None:
            nonlocal count
            queries = [images[i : i + 1] for i in range(min(len(images), 64))]
            count = len(
                time_queries(lambda x: int(answer(x).exits[0]), queries, seconds=2 * asked.seconds, count=10)[0]
            )

        watts, seconds = meter.watts(work)
        found[kind] = {"watts": watts, "mj_an_image": 1e3 * (watts - idle) * seconds / count, "images": count}
    return found


def short(asked: argparse.Namespace) -> dict[str, Any]:
    """A few images through everything, for compute-sanitizer to watch."""
    if asked.dry_run:
        raise NotMeasured("dry run: nothing for compute-sanitizer to watch")
    images, _ = images_of(asked, "test")
    engine = open_engine(engine_path(asked, asked.network))
    for kind in ("no-early-exit", "full", "final"):
        answer = make_predictor(engine, kind)
        for size in recipe_of(asked).batch_sizes[:2]:
            answer(images[:size])
    return {}


def layers(asked: argparse.Namespace) -> dict[str, Any]:
    """The inspector's report on every graph, in a file of its own; how many reformats a graph has."""
    if asked.dry_run:
        raise NotMeasured("dry run: no TensorRT to inspect")
    found = golden.inspected(engine_path(asked, asked.network))
    path = asked.out / "layers" / f"{asked.network}-{asked.recipe}.json"
    atomic_write(path, to_json(found))
    reformats = {name: graph["reformats"] for name, graph in found.items()}
    ends = {end: told["format"] for graph in found.values() for end, told in graph["ends"].items()}
    return {"file": str(path.relative_to(asked.out)), "reformats": reformats, "formats": ends}


def launches(asked: argparse.Namespace) -> dict[str, Any]:
    """CUDA graphs against TensorRT's own launches."""
    if asked.dry_run:
        raise NotMeasured("dry run: no launches")
    return {"microseconds": golden.launches(engine_path(asked, asked.network), seconds=asked.seconds / 8)}


def one_launch(asked: argparse.Namespace) -> dict[str, Any]:
    """The cascade that the GPU ends itself against the host's."""
    if asked.dry_run:
        raise NotMeasured("dry run: no GPU to decide")
    images = images_of(asked, "test")[0][:64]
    return golden.one_launch(engine_path(asked, asked.network), images, seconds=asked.seconds)


def build_times(asked: argparse.Namespace) -> dict[str, Any]:
    """What the timing cache saves."""
    if asked.dry_run:
        raise NotMeasured("dry run: nothing is timed while building")
    recipe = dataclasses.replace(recipe_of(asked), batch_sizes=(1,))
    return {"seconds": golden.build_times(asked.models / f"{asked.network}.onnx", recipe)}
