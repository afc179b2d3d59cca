"""TensorRT from 8.5 to 11 on desktop GPUs and Jetsons: fp32, fp16, int8, and int8 with the rest in fp16 or on a DLA."""

from __future__ import annotations

import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from edgekd.artifacts.manifest import Manifest
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import Backend, ReadFile
from edgekd.backends.cuda.device import device
from edgekd.backends.cuda.smi import power_and_clocks
from edgekd.backends.runner import DeviceCascade as DeviceCascadeRunner
from edgekd.backends.runner import StagedRunner
from edgekd.backends.tensorrt import library as trt_library
from edgekd.backends.tensorrt import runner
from edgekd.backends.tensorrt.builder import build_plan
from edgekd.backends.tensorrt.device_exit import DeviceCascade
from edgekd.backends.tensorrt.library import failed, library, parse_version
from edgekd.backends.tensorrt.options import TensorRTOptions, parse_options
from edgekd.backends.tensorrt.runner import TensorRTRunner
from edgekd.errors import BackendError
from edgekd.files import atomic_write
from edgekd.policy import Policy

log = logging.getLogger(__name__)

_WEIGHTED = r"conv|gemm|matrixmultiply|matmul|fullyconnected|dla"
"""Types of layers that multiply by weights, in the inspector's various spellings."""
_TYPES = {"int8": "int8|i8", "bf16": "bf16|bfloat", "fp8": "fp8|e4m3", "fp16": "fp16|half|f16", "fp32": "float|fp?32"}
_MAJORS = {8: 0, 9: 1, 10: 1, 11: 2}
"""Version-compatible engines cross one of these steps, upwards."""


Layer: TypeAlias = Mapping[str, Any]
"""The inspector's report on a layer, whose keys and types differ between versions of TensorRT."""


class TensorRTBackend(Backend[TensorRTRunner]):
    """TensorRT on the first GPU, or on a deep learning accelerator."""

    name = "tensorrt"
    extra = "tensorrt"
    packages = (*trt_library.PACKAGES, "cuda-python", "pycuda")
    suffix = ".plan"
    supported_precisions = frozenset({"fp32", "fp16", "int8"})
    options = TensorRTOptions
    fixed_batch_sizes = True
    pads_batches = True

    def version(self) -> str | None:
        return trt_library.version()

    def build(
        self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
    ) -> None:
        """Write the engine and, if its weights are stripped, the graph that holds them beside it.

        Raises:
            BackendError: See `builder.build_plan`; or no driver, GPU or CUDA bindings.
        """
        with device():
            plan, given = build_plan(graph, name=path.stem, recipe=recipe, progress=progress)
        atomic_write(path, plan)
        if parse_options(recipe).strip_weights:
            atomic_write(path.with_suffix(".onnx"), given.SerializeToString())

    def suffixes(self, recipe: Recipe) -> tuple[str, ...]:
        return (self.suffix, ".onnx") if parse_options(recipe).strip_weights else (self.suffix,)

    def load(self, path: Path, *, recipe: Recipe, threads: int, read: ReadFile = Path.read_bytes) -> TensorRTRunner:
        """Deserialise a built engine; the GPU does the work, so `threads` is not used.

        Raises:
            BackendError: TensorRT refuses it; or no driver, GPU or CUDA bindings.
        """
        return TensorRTRunner(path, recipe, read)

    def precisions(self, path: Path, *, recipe: Recipe) -> Counter[str]:
        """Count precisions among the layers that multiply by weights, as TensorRT's engine inspector names them.

        Raises:
            BackendError: The inspector's report cannot be read.
        """
        found = Counter([_type(layer) for layer in layers(TensorRTRunner(path, recipe)) if _is_weighted(layer)])
        if not found:
            raise BackendError(f"TensorRT's inspector names no layer of {path} with weights", fix="report this network")
        return found

    def quantization_target(self, recipe: Recipe) -> str:
        return "tensorrt" if parse_options(recipe).dla_core is None else "dla"

    def recipe_name(self, recipe: Recipe) -> str:
        return recipe.name if parse_options(recipe).dla_core is None else f"dla-{recipe.precision}"

    def exclusive_feature(self, recipe: Recipe) -> str:
        return "" if parse_options(recipe).dla_core is None else "DLA"

    def staged_runner(self, stages: Sequence[TensorRTRunner]) -> StagedRunner:
        return runner.staged_runner(stages)

    def device_cascade(self, stages: Sequence[TensorRTRunner], policy: Policy) -> DeviceCascadeRunner:
        if policy.average == "geometric":
            what = "the GPU cannot pool the exits' answers by a weighted geometric mean"
            raise BackendError(what, fix="omit --device-side-exit, or tune with --average own")
        return DeviceCascade(stages, policy)

    def host_facts(self) -> dict[str, str]:
        """Return GPU, compute capability (`sm`), the CUDA versions of runtime and driver, power limit and SM clock.

        Raises:
            BackendError: No driver, GPU or CUDA bindings.
        """
        gpu = device()
        versions = {"cuda_runtime": gpu.cuda["runtime"], "cuda_driver": gpu.cuda["driver"]}
        return {"gpu": gpu.name, "sm": gpu.sm, **versions, **power_and_clocks()}

    def incompatibility(self, manifest: Manifest) -> str:
        """Compare versions and GPU, before TensorRT reads the engine.

        Raises:
            BackendError: No driver, GPU or CUDA bindings.
        """
        requested, gpu, there = parse_options(manifest.recipe), device(), manifest.host.backends.get(self.name, {})
        ours, its = str(self.version()), manifest.backend_version
        if ours != its and not (requested.version_compatible and _follows(ours, its)):
            return f"was built by TensorRT {its}; this machine has {ours}"
        if there.get("sm") != gpu.sm and not (requested.hardware_compatible and float(gpu.sm) >= 8):
            return f"was built for {there.get('gpu')} (SM {there.get('sm')}); this machine has {gpu.name} (SM {gpu.sm})"
        if there.get("gpu") != gpu.name:
            log.warning(
                "the engine was built on %s, this machine has %s: its measured times do not apply",
                there.get("gpu"),
                gpu.name,
            )
        return ""

    def parse_options(self, recipe: Recipe, *, where: str = "the recipe") -> TensorRTOptions:
        return parse_options(recipe, where=where)


def _follows(ours: str, its: str) -> bool:
    """Return True if version-compatible engines of version `its` run in `ours`."""
    newer, older = parse_version(ours), parse_version(its)
    return newer >= older and _MAJORS.get(newer[0], -9) - _MAJORS.get(older[0], 9) in (0, 1)


def layers(opened: TensorRTRunner) -> list[Layer]:
    """Return the engine inspector's report on each layer; below TensorRT 10 on those of all batch sizes.

    Raises:
        BackendError: The inspector's report cannot be read.
    """
    with device():
        inspector = opened.engine.create_engine_inspector()
        inspector.execution_context = opened.context(opened.sizes[0])  # without one, formats are unknown
        text = inspector.get_engine_information(library().LayerInformationFormat.JSON)
    try:  # names are joined by control characters, which strict JSON forbids
        return [layer for layer in json.loads(text, strict=False)["Layers"] if isinstance(layer, dict)]
    except (ValueError, KeyError, TypeError) as error:
        raise failed(f"TensorRT's inspector gives no layers of {opened.name}: {error}") from error


def _is_weighted(layer: Layer) -> bool:
    text = " ".join(str(layer.get(key, "")) for key in ("LayerType", "ParameterType"))
    return re.search(_WEIGHTED, text, re.IGNORECASE) is not None


def _type(layer: Layer) -> str:
    """Return a layer's precision: the type of its weights, else of its first input, else from its kernel's name."""
    weights = layer.get("Weights")
    inputs = layer.get("Inputs") or [{}]
    clues = (
        weights.get("Type") if isinstance(weights, dict) else None,
        inputs[0].get("Format/Datatype") if isinstance(inputs[0], dict) else None,
        layer.get("TacticName"),
    )
    for text in filter(None, clues):
        for name, pattern in _TYPES.items():
            if re.search(pattern, str(text), re.IGNORECASE):
                return name
    return "unknown"
