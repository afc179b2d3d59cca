"""The built engine as reported by TensorRT's inspector: layers, types and formats. The fakes are checked against it."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gpu import spans

from edgekd.artifacts.manifest import read_manifest
from edgekd.artifacts.metadata import read_onnx
from edgekd.artifacts.partition import graph, with_shapes
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.cuda.device import device
from edgekd.backends.tensorrt.backend import inspector_report
from edgekd.backends.tensorrt.builder import build_plan
from edgekd.backends.tensorrt.options import tensorrt_target
from edgekd.backends.tensorrt.runner import TensorRTRunner
from edgekd.files import temporary_folder
from edgekd.policy import NEVER_EXIT
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import open_engine


def inspected(engine: Path) -> dict[str, Any]:
    """Inspect every graph of an engine folder: boundary tensors, memory, layers, and the number of reformats."""
    manifest = read_manifest(engine)
    recipe = manifest.recipe
    return {path.stem: _graph(path, recipe) for path in sorted(engine.glob("*.plan"))}


def _graph(path: Path, recipe: Recipe) -> dict[str, Any]:
    with device():
        opened = TensorRTRunner(path, tensorrt_target(recipe))
        found = json.loads(inspector_report(opened), strict=False)["Layers"]
        ends = {name: _end(opened, name) for name in (*opened.inputs, *opened.outputs)}
        memory, profiles = opened.engine.device_memory_size, opened.engine.num_optimization_profiles
    kinds = {kind for layer in found if "eformat" in (kind := str(layer.get("LayerType", "")))}
    return {
        "ends": ends,
        "device_memory_bytes": memory,
        "profiles": profiles,
        "plan_bytes": path.stat().st_size,
        "layer_types": Counter(str(layer.get("LayerType")) for layer in found),
        "reformats": sum(layer.get("LayerType") in kinds for layer in found) / profiles,
        "layers": found,
    }


def _end(opened: TensorRTRunner, name: str) -> dict[str, Any]:
    """Return the type and memory layout of an input or output."""
    engine = opened.engine
    return {
        "dtype": str(engine.get_tensor_dtype(name)),
        "shape": list(engine.get_tensor_shape(name)),
        "format": str(engine.get_tensor_format(name)),
        "described": str(engine.get_tensor_format_desc(name)),
        "components": engine.get_tensor_components_per_element(name),
    }


def launches(engine: Path, *, seconds: float) -> dict[str, Any]:
    """Measure each graph at each batch size, on host and GPU, as a CUDA graph and by execute_async_v3: median in µs."""
    opened, found = open_engine(engine), {}
    with device() as gpu:
        names = ["monolithic", *(["final", "stage_0", "stage_1"] if len(opened.metadata.exits) > 1 else [])]
        for name in names:
            runner: Any = opened._runner(name)
            for size in runner.sizes:
                batch = runner.batch(size)
                ways: dict[str, Callable[[], object]] = {"graph": batch.launch, "execute_async_v3": batch.enqueue}
                for way, work in ways.items():
                    clock = np.median(spans(gpu, work, seconds=seconds))
                    wall = _wall(functools.partial(_waited, gpu, work), seconds=seconds)
                    host = _wall(work, seconds=seconds / 4, after=gpu.synchronize)
                    found[f"{name} {size} {way}"] = {"gpu_us": 1e3 * float(clock), "wall_us": wall, "host_us": host}
    return found


def _waited(gpu: Any, work: Callable[[], object]) -> None:
    work()
    gpu.synchronize()


def _wall(work: Callable[[], object], *, seconds: float, after: Callable[[], object] = lambda: None) -> float:
    """Return the median duration of `work` alone in µs."""
    found, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(found) < 20:
        start = time.perf_counter_ns()
        work()
        found.append((time.perf_counter_ns() - start) / 1e3)
        after()
    return float(np.median(found[len(found) // 10 :]))


def one_launch(engine: Path, images: Any, *, seconds: float) -> dict[str, Any]:
    """Compare host-side and device-side exit at batch 1, in ms per image: tuned thresholds, no exit, first exit."""
    opened, found = open_engine(engine), {}
    never = dataclasses.replace(opened.metadata.policy, thresholds=(NEVER_EXIT,) * (len(opened.metadata.exits) - 1))
    at_once = dataclasses.replace(never, thresholds=(0.0,) * len(never.thresholds))
    policies = {"tuned": opened.metadata.policy, "never": never, "first exit": at_once}
    for name, policy in policies.items():
        if not policy.is_tuned:
            continue
        ways = {
            "host": Classifier(opened, strategy="cascade", policy=policy),
            "device": Classifier(opened, strategy="cascade", policy=policy, device_side_exit=True),
        }
        outputs = {way: [c.run(images[i : i + 1]) for i in range(len(images))] for way, c in ways.items()}
        exits = {way: [int(a.exits[0]) for a in given] for way, given in outputs.items()}
        off = [np.abs(a.probabilities - b.probabilities).max() for a, b in zip(*outputs.values())]
        row: dict[str, Any] = {
            "same_exits": float(np.mean(np.equal(exits["host"], exits["device"]))),
            "probabilities_off_by": float(np.max(off)),
            "mean_exit": float(np.mean(exits["host"])),
        }
        for turn in range(2):
            for way, classifier in ways.items():
                times, end = [], time.perf_counter() + seconds
                while time.perf_counter() < end:
                    for i in range(len(images)):
                        start = time.perf_counter_ns()
                        classifier.run(images[i : i + 1])
                        times.append((time.perf_counter_ns() - start) / 1e6)
                row[f"{way}_ms_{turn}"] = {
                    "mean": float(np.mean(times)),
                    "p50": float(np.median(times)),
                    "n": len(times),
                }
        found[name] = row
    return found


def build_times(onnx_path: Path, recipe: Recipe) -> dict[str, float]:
    """Time the build of the last exit's graph, in s: without a timing cache, with an empty and with a full one."""
    model, metadata = read_onnx(onnx_path)
    subgraph, found = graph(with_shapes(model), metadata, name="final"), {}
    before = os.environ.get("XDG_CACHE_HOME")
    with temporary_folder("cache") as folder:
        os.environ["XDG_CACHE_HOME"] = str(folder)
        try:
            for name, cached in (("no cache", False), ("empty cache", True), ("full cache", True)):
                cached_recipe = dataclasses.replace(
                    recipe, options={"tensorrt": {**recipe.options.get("tensorrt", {}), "timing_cache": cached}}
                )
                start = time.perf_counter()
                with device():
                    build_plan(subgraph, name="final", target=tensorrt_target(cached_recipe))
                found[name] = time.perf_counter() - start
        finally:
            if before is not None:
                os.environ["XDG_CACHE_HOME"] = before
    return found
