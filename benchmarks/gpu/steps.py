"""Builds, records and measures one engine, through edgekd's public functions."""

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
"""Allowed accuracy drop of each exit, and of the cascade, in percentage points."""
PRECISION = {
    "fp16": ("fp16", "fp32"),
    "fp32": ("fp32", "fp32"),
    "int8": ("int8", "fp32"),
    "int8-fp16": ("int8", "fp16"),
}


def recipe_of(args: argparse.Namespace, *, method: str = "minmax") -> Recipe:
    """Return the recipe by name, with the requested batch sizes and tactics."""
    precision, floats = PRECISION[args.recipe]
    sizes = args.batch_sizes if args.recipe.endswith("fp16") else tuple(sorted({1, args.batch_sizes[-1]}))
    return Recipe(
        precision,  # type: ignore[arg-type]
        float_layers=floats,  # type: ignore[arg-type]
        max_accuracy_drop=DROP,
        calibration_method=method,  # type: ignore[arg-type]
        batch_sizes=sizes,
        graphs="all",
        options={
            "tensorrt": {
                "library_tactics": not args.no_library_tactics,
                "optimization_level": args.optimization_level,
            }
        },
    )


def engine_path(args: argparse.Namespace, network: str) -> Path:
    return Path(args.out / "engines" / f"{network}-{args.recipe}.engine")


def images_of(args: argparse.Namespace, subset: Any) -> tuple[Any, Any]:
    """Load the images (N, 3, H, W) and labels (N,) of a subset."""
    preprocess = read_onnx(args.models / f"{args.network}.onnx")[1].preprocess
    return load_subset(read_split(args.images), subset, data=args.images, preprocess=preprocess)


def check(args: argparse.Namespace) -> dict[str, Any]:
    """Check that TensorRT and a GPU are available."""
    if args.dry_run:
        return {}
    find_backend("tensorrt")
    return facts(device())


def build(args: argparse.Namespace) -> dict[str, Any]:
    """Compile, gate every exit's parity and accuracy against ONNX Runtime's logits, and tune the cascade."""
    began, out = time.monotonic(), engine_path(args, args.network)
    validation = images_of(args, "val")
    reference = np.load(args.models / f"{args.network}.npz")["val"]
    refusals = []
    for method in ("minmax", "entropy") if args.recipe.startswith("int8") else ("minmax",):
        try:
            manifest, attempts = compile_engine(
                read_student(args.models / f"{args.network}.onnx"),
                out,
                recipe=recipe_of(args, method=method),
                backend="onnxruntime" if args.dry_run else "tensorrt",
                calibration=images_of(args, "train")[0],
                validation=validation,
                reference=reference,
            )
            break
        except GateError as error:
            refusals.append(f"{method}: {error.what}")
    else:
        raise GateError("\n".join(refusals), fix="train longer, or keep more layers in float")
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
        "tuned": _tuned(args, out, validation),
    }


def _tuned(args: argparse.Namespace, out: Path, validation: tuple[Any, Any]) -> dict[str, Any] | str:
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


def records(args: argparse.Namespace) -> dict[str, Any]:
    """Write an edgekd record: cascade, cascade without early exit, all exits, last exit, and the plain network."""
    sizes = recipe_of(args).batch_sizes
    main = args.recipe.endswith("fp16") and args.network == "student"
    suite = Suite(
        batch_sizes=sizes,
        min_count=tuple(max(400 // size, 10) for size in sizes) if not args.dry_run else (20,) * len(sizes),
        min_seconds=args.seconds / 2,
        warmup_seconds=args.seconds / 4,
        rounds=2 if main and not args.dry_run else 1,
        pool=256,
        variants=("cascade", "no-early-exit", "full", "final"),
    )
    plain = engine_path(args, "plain")
    record = bench(
        engine_path(args, args.network),
        suite=suite,
        data=args.images,
        split=read_split(args.images),
        against={"plain": plain} if plain.is_dir() else {},
        command="benchmarks/gpu/run.sh",
    )
    path = args.out / "records" / f"{args.network}-{args.recipe}.json"
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
    return {"record": str(path.relative_to(args.out)), "variants": rows, "warnings": record.warnings}


def on_device(args: argparse.Namespace) -> dict[str, Any]:
    """Measure on the GPU's clock each graph at each batch size and the gaps between stages; also memory and energy."""
    try:
        gpu = device()
    except BackendError as error:
        if not args.dry_run:
            raise
        raise NotMeasured(f"dry run: {error.what}") from None
    images, _ = images_of(args, "test")
    with gpu:
        free = gpu.free_bytes()
        engine = open_engine(engine_path(args, args.network))
        clocks = _clocks(gpu, engine, images, args)
        found = {"device_ms": clocks, "device_mib": (free - gpu.free_bytes()) / 2**20, **facts(gpu)}
        if len(engine.metadata.exits) > 1:
            found["gap_us"] = _gap_us(gpu, engine, images, seconds=args.seconds)
    return {**found, "energy": _energy(args, engine, images)}


def _clocks(gpu: Any, engine: Any, images: Any, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Measure each graph, including the copy of its logits, by batch size: median in ms."""
    graphs = {"monolithic": engine.monolithic}
    exits = len(engine.metadata.exits)
    if exits > 1:
        engine.staged_runner()  # links the stages: each reads its predecessor's output in place
        graphs |= {"final": engine.final, **{f"stage_{k}": engine.stage(k) for k in range(exits)}}
    found: dict[str, dict[str, float]] = {}
    for name, graph in graphs.items():
        for size in recipe_of(args).batch_sizes:
            _feed(graph, images[:size])
            times = spans(gpu, functools.partial(graph.launch, size), seconds=args.seconds / 4)
            found.setdefault(name, {})[str(size)] = float(np.median(times))
    return found


def _feed(graph: Any, images: Any) -> None:
    for name in graph.inputs:
        if name == "images":
            graph.tensors[name].put(images)


def _gap_us(gpu: Any, engine: Any, images: Any, *, seconds: float) -> float:
    """Return the median gap between two stages in µs, without early exits, decided by the classifier."""
    predict = make_predictor(engine, "no-early-exit")
    predict(images[:1])  # links the stages
    stages = [engine.stage(k) for k in range(len(engine.metadata.exits))]
    return 1e3 * float(np.median(gaps(gpu, stages, lambda: predict(images[:1]), seconds=seconds)))


def _energy(args: argparse.Namespace, engine: Any, images: Any) -> dict[str, Any]:
    """Measure the energy per image above idle at batch 1 in mJ, through NVML."""
    try:
        meter = Meter(device())
    except NotMeasured as error:
        return {"not measured": str(error)}
    idle = meter.watts(lambda: time.sleep(args.seconds))[0]
    found: dict[str, Any] = {"idle_watts": idle, **meter.state()}
    for kind in (
        ("cascade", "full", "final")
        if engine.metadata.policy.is_tuned and len(engine.metadata.exits) > 1
        else ("final",)
    ):
        predict = make_predictor(engine, kind)
        count = 0

        def work(predict: Any = predict) -> None:
            nonlocal count
            queries = [images[i : i + 1] for i in range(min(len(images), 64))]
            count = len(
                time_queries(lambda x: int(predict(x).exits[0]), queries, seconds=2 * args.seconds, count=10)[0]
            )

        watts, seconds = meter.watts(work)
        found[kind] = {"watts": watts, "mj_an_image": 1e3 * (watts - idle) * seconds / count, "images": count}
    return found


def short(args: argparse.Namespace) -> dict[str, Any]:
    """Run a few images through every variant, for compute-sanitizer."""
    if args.dry_run:
        raise NotMeasured("dry run: compute-sanitizer has nothing to check")
    images, _ = images_of(args, "test")
    engine = open_engine(engine_path(args, args.network))
    for kind in ("no-early-exit", "full", "final"):
        predict = make_predictor(engine, kind)
        for size in recipe_of(args).batch_sizes[:2]:
            predict(images[:size])
    return {}


def layers(args: argparse.Namespace) -> dict[str, Any]:
    """Write the inspector's report on every graph to its own file; return the number of reformats of each."""
    if args.dry_run:
        raise NotMeasured("dry run: no TensorRT to inspect")
    found = golden.inspected(engine_path(args, args.network))
    path = args.out / "layers" / f"{args.network}-{args.recipe}.json"
    atomic_write(path, to_json(found))
    reformats = {name: graph["reformats"] for name, graph in found.items()}
    ends = {name: end["format"] for graph in found.values() for name, end in graph["ends"].items()}
    return {"file": str(path.relative_to(args.out)), "reformats": reformats, "formats": ends}


def launches(args: argparse.Namespace) -> dict[str, Any]:
    """Compare CUDA graphs with TensorRT's own launches."""
    if args.dry_run:
        raise NotMeasured("dry run: no launches")
    return {"microseconds": golden.launches(engine_path(args, args.network), seconds=args.seconds / 8)}


def one_launch(args: argparse.Namespace) -> dict[str, Any]:
    """Compare device-side exit with the host's cascade."""
    if args.dry_run:
        raise NotMeasured("dry run: no GPU to decide")
    images = images_of(args, "test")[0][:64]
    return golden.one_launch(engine_path(args, args.network), images, seconds=args.seconds)


def build_times(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the build time that the timing cache saves."""
    if args.dry_run:
        raise NotMeasured("dry run: nothing is timed while building")
    recipe = dataclasses.replace(recipe_of(args), batch_sizes=(1,))
    return {"seconds": golden.build_times(args.models / f"{args.network}.onnx", recipe)}
