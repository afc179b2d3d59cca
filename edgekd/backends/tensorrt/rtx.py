"""TensorRT-RTX: engines for RTX GPUs, built on any x86-64 machine and compiled for the GPU when they are loaded there.

Engines have been built with version 1.7.1, where there is no GPU. None has been run: no RTX GPU was at hand.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx

from edgekd.artifacts.manifest import Manifest
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import Backend, ReadFile
from edgekd.backends.cuda.device import device
from edgekd.backends.cuda.smi import power_and_clocks
from edgekd.backends.runner import StagedRunner
from edgekd.backends.tensorrt import runner
from edgekd.backends.tensorrt.builder import build_plan
from edgekd.backends.tensorrt.layers import from_log, precisions
from edgekd.backends.tensorrt.library import TENSORRT_RTX
from edgekd.backends.tensorrt.options import Target, TensorRTOptions
from edgekd.backends.tensorrt.runner import TensorRTRunner
from edgekd.errors import BackendError
from edgekd.files import atomic_write

log = logging.getLogger(__name__)

ARCHITECTURES = {"rtx-30": ("SM86", "8.6"), "rtx-40": ("SM89", "8.9"), "rtx-50": ("SM120", "12.0")}
"""Device to its `ComputeCapability` in TensorRT-RTX and as CUDA writes it."""
LAYERS = ".layers.txt"
"""Suffix of the builder's list of an engine's layers, which no GPU is needed to read."""


@dataclass(frozen=True)
class RtxOptions:
    """The `[tensorrt-rtx]` table of a recipe.

    Attributes:
        device: GPUs to build for: rtx-30, rtx-40 or rtx-50, or portable for all of them and later ones.
    """

    device: Literal["portable", "rtx-30", "rtx-40", "rtx-50"] = "portable"

    def supports(self, sm: str) -> bool:
        """Return True if an engine for this device runs on GPUs of compute capability `sm`."""
        if self.device == "portable":  # NVIDIA names 8.0, 8.6, 8.9, 12.0 and later ones
            return sm in ("8.0", "8.6", "8.9") or float(sm) >= 12
        return sm == ARCHITECTURES[self.device][1]


class TensorRTRtxBackend(Backend[TensorRTRunner]):
    """TensorRT-RTX, which builds for RTX GPUs without having one."""

    name = "tensorrt-rtx"
    extra = "tensorrt-rtx"
    packages = (*TENSORRT_RTX.packages, "cuda-python", "pycuda")
    suffix = ".plan"
    supported_precisions = frozenset({"fp32", "fp16", "int8"})
    options = RtxOptions
    fixed_batch_sizes = True
    pads_batches = True
    may_crash = True
    across_systems = True

    def version(self) -> str | None:
        return TENSORRT_RTX.version()

    def build(
        self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
    ) -> None:
        """Write the engine and, beside it, the builder's list of its layers.

        Raises:
            BackendError: See `builder.build_plan`.
        """
        plan = build_plan(graph, name=path.stem, target=self._target(recipe), progress=progress)
        atomic_write(path, plan.data)
        atomic_write(path.with_suffix(LAYERS), plan.listing.encode())

    def suffixes(self, recipe: Recipe) -> tuple[str, ...]:
        return (self.suffix, LAYERS)

    def load(self, path: Path, *, recipe: Recipe, threads: int, read: ReadFile = Path.read_bytes) -> TensorRTRunner:
        """Deserialise a built engine, which compiles it for the GPU; `threads` is not used.

        Raises:
            BackendError: TensorRT-RTX refuses it; or no driver, GPU or CUDA bindings.
        """
        return TensorRTRunner(path, self._target(recipe), read)

    def precisions(self, path: Path, *, recipe: Recipe) -> Counter[str]:
        """Count precisions among the layers that multiply by weights, as the builder lists them.

        Raises:
            BackendError: The list names none.
        """
        found = precisions(from_log(path.with_suffix(LAYERS).read_text(encoding="utf-8")))
        if not found:
            raise BackendError(f"TensorRT-RTX lists no layer of {path} with weights", fix="report this network")
        return Counter(precision or "unknown" for precision in found)

    def quantization_target(self, recipe: Recipe) -> str:
        return "tensorrt"

    def staged_runner(self, stages: Sequence[TensorRTRunner]) -> StagedRunner:
        return runner.staged_runner(stages)

    def cannot_run(self, recipe: Recipe) -> str:
        try:
            gpu = device()
        except BackendError as error:
            return error.what
        options = self._parsed(recipe)
        return "" if options.supports(gpu.sm) else f"{gpu.name} (SM {gpu.sm}) is not {options.device}"

    def host_facts(self) -> dict[str, str]:
        """Return GPU, compute capability, versions of CUDA, power limit and SM clock; nothing where there is no GPU."""
        try:
            gpu = device()
        except BackendError:
            return {}
        return {**gpu.facts(), **power_and_clocks(gpu.pci_bus_id)}

    def incompatibility(self, manifest: Manifest) -> str:
        """Compare versions and GPU, before TensorRT-RTX reads the engine.

        Raises:
            BackendError: No driver, GPU or CUDA bindings.
        """
        ours, its = self.version(), manifest.backend_version
        if ours != its:
            return f"was built by TensorRT-RTX {its}; this machine has {ours}"
        gpu, options, there = device(), self._parsed(manifest.recipe), manifest.host.backends.get(self.name, {})
        if not options.supports(gpu.sm):
            return f"was built for {options.device} GPUs; this machine has {gpu.name} (SM {gpu.sm})"
        if there.get("gpu") not in (None, gpu.name):
            what = "the engine was checked and timed on %s, this machine has %s: its measured times do not apply"
            log.warning(what, there.get("gpu"), gpu.name)
        return ""

    def _parsed(self, recipe: Recipe) -> RtxOptions:
        options: RtxOptions = self.parse_options(recipe)
        return options

    def _target(self, recipe: Recipe) -> Target:
        chosen = ARCHITECTURES.get(self._parsed(recipe).device)
        options = TensorRTOptions(timing_cache=False)  # kernels are chosen on the GPU, so there is nothing to time
        return Target(TENSORRT_RTX, recipe, options, (chosen[0],) if chosen else ())
