"""TensorRT from 8.5 to 11 on desktop GPUs and Jetsons: fp32, fp16, int8, and int8 with the rest in fp16 or on a DLA."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx

from edgekd.artifact import Manifest
from edgekd.engines.backends import Read, shares
from edgekd.engines.cuda import device
from edgekd.engines.recipe import Recipe
from edgekd.engines.trt_build import build_plan
from edgekd.engines.trt_device_exit import decider as decider
from edgekd.engines.trt_library import failed, library, number
from edgekd.engines.trt_library import version as version
from edgekd.engines.trt_run import Opened
from edgekd.engines.trt_run import walker as walker
from edgekd.errors import BackendError
from edgekd.files import atomic_write

log = logging.getLogger(__name__)

SUFFIX = ".plan"
EXTRA = "tensorrt"
TARGET = "tensorrt"
ANY_BATCH = False
SATURATES = False
_WEIGHTED = r"conv|gemm|matrixmultiply|matmul|fullyconnected|dla"
"""What the inspector calls layers that multiply by weights, in any of its words."""
_TYPES = {"int8": "int8|i8", "bf16": "bf16|bfloat", "fp8": "fp8|e4m3", "fp16": "fp16|half|f16", "fp32": "float|fp?32"}
_MAJORS = {8: 0, 9: 1, 10: 1, 11: 2}
"""Version-compatible engines cross one of these steps, upwards."""


def build(
    graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
) -> None:
    """Write the engine, and if it has no weights of its own the graph that holds them beside it.

    Raises:
        BackendError: see `trt_build.build_plan`; or no driver, GPU or CUDA bindings.
    """
    with device():
        plan, given = build_plan(graph, name=path.stem, recipe=recipe, progress=progress)
    atomic_write(path, plan)
    if recipe.tensorrt.strip_weights:
        atomic_write(path.with_suffix(".onnx"), given.SerializeToString())


def suffixes(recipe: Recipe) -> tuple[str, ...]:
    """The files that `build` writes for each graph."""
    return (SUFFIX, ".onnx") if recipe.tensorrt.strip_weights else (SUFFIX,)


def load(path: Path, *, recipe: Recipe, threads: int, read: Read = Path.read_bytes) -> Opened:  # the GPU does the work
    """Deserialise a written engine.

    Raises:
        BackendError: TensorRT refuses it; or no driver, GPU or CUDA bindings.
    """
    return Opened(path, recipe, read)


def here() -> dict[str, Any]:
    """What of this machine an engine depends on, for the manifest."""
    gpu = device()
    return {"gpu": gpu.name, "sm": gpu.sm, "cuda_runtime": gpu.cuda["runtime"], "cuda_driver": gpu.cuda["driver"]}


def refusal(manifest: Manifest) -> str:
    """Why an engine that was built there cannot run here; empty if it can. Asked before TensorRT sees it.

    Raises:
        BackendError: no driver, GPU or CUDA bindings.
    """
    asked = manifest.recipe.get("tensorrt", {})
    gpu, there = device(), manifest.host
    ours, its = str(version()), manifest.backend_version
    if ours != its and not (asked.get("version_compatible") and _follows(ours, its)):
        return f"was built by TensorRT {its}; here is {ours}"
    if there.get("sm") != gpu.sm and not (asked.get("hardware_compatible") and float(gpu.sm) >= 8):
        return f"was built for {there.get('gpu')} (SM {there.get('sm')}); here is {gpu.name} (SM {gpu.sm})"
    if there.get("gpu") != gpu.name:
        log.warning("the engine was built on %s; here is %s: its times do not hold", there.get("gpu"), gpu.name)
    return ""


def _follows(ours: str, its: str) -> bool:
    """Whether version-compatible engines of one version run in the other."""
    newer, older = number(ours), number(its)
    return newer >= older and _MAJORS.get(newer[0], -9) - _MAJORS.get(older[0], 9) in (0, 1)


def precisions(path: Path, *, recipe: Recipe) -> dict[str, float]:
    """Shares of precisions among the layers that multiply by weights, as TensorRT's engine inspector names them.

    Raises:
        BackendError: the inspector says nothing that can be read.
    """
    found = shares([_type(layer) for layer in layers(Opened(path, recipe)) if _is_weighted(layer)])
    if not found:
        raise BackendError(f"TensorRT's inspector names no layer of {path} with weights", fix="report this network")
    return found


def layers(opened: Opened) -> list[dict[str, Any]]:
    """What TensorRT's engine inspector tells of each layer; of an engine for several batch sizes, below 10, of all.

    Raises:
        BackendError: the inspector says nothing that can be read.
    """
    with device():
        inspector = opened.engine.create_engine_inspector()
        inspector.execution_context = opened.context(opened.sizes[0])  # without one, formats are unknown
        text = inspector.get_engine_information(library().LayerInformationFormat.JSON)
    try:  # names are joined by control characters, which strict JSON forbids
        return [layer for layer in json.loads(text, strict=False)["Layers"] if isinstance(layer, dict)]
    except (ValueError, KeyError, TypeError) as error:
        raise failed(f"TensorRT's inspector gives no layers of {opened.name}: {error}") from error


def _is_weighted(layer: dict[str, Any]) -> bool:
    words = " ".join(str(layer.get(key, "")) for key in ("LayerType", "ParameterType"))
    return re.search(_WEIGHTED, words, re.IGNORECASE) is not None


def _type(layer: dict[str, Any]) -> str:
    """What a layer computes in: the type of its weights, else of what it reads, else what its kernel's name tells."""
    weights = layer.get("Weights")
    inputs = layer.get("Inputs") or [{}]
    said = (
        weights.get("Type") if isinstance(weights, dict) else None,
        inputs[0].get("Format/Datatype") if isinstance(inputs[0], dict) else None,
        layer.get("TacticName"),
    )
    for text in filter(None, said):
        for name, words in _TYPES.items():
            if re.search(words, str(text), re.IGNORECASE):
                return name
    return "unknown"
