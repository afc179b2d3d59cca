"""TensorRT from 8.5 to 11 on desktop GPUs and Jetsons: fp32, fp16, int8, and int8 with the rest in fp16 or on a DLA."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx

from edgekd.artifacts.manifest import Manifest
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import Backend, ReadFile
from edgekd.backends.cuda.device import device
from edgekd.backends.cuda.smi import power_and_clocks
from edgekd.backends.runner import DeviceCascade as DeviceCascadeRunner
from edgekd.backends.runner import StagedRunner
from edgekd.backends.tensorrt import layers, runner
from edgekd.backends.tensorrt.builder import build_plan
from edgekd.backends.tensorrt.device_exit import DeviceCascade
from edgekd.backends.tensorrt.library import TENSORRT, parse_version
from edgekd.backends.tensorrt.options import TensorRTOptions, parse_options, tensorrt_target
from edgekd.backends.tensorrt.runner import TensorRTRunner
from edgekd.errors import BackendError
from edgekd.files import atomic_write
from edgekd.host import l4t_release
from edgekd.policy import Policy

log = logging.getLogger(__name__)

_MAJORS = {8: 0, 9: 1, 10: 1, 11: 2}
"""Version-compatible engines cross one of these steps, upwards."""


class TensorRTBackend(Backend[TensorRTRunner]):
    """TensorRT on the first GPU, or on a deep learning accelerator."""

    name = "tensorrt"
    extra = "tensorrt"
    packages = (*TENSORRT.packages, "cuda-python", "pycuda")
    suffix = ".plan"
    supported_precisions = frozenset({"fp32", "fp16", "int8"})
    options = TensorRTOptions
    fixed_batch_sizes = True
    pads_batches = True
    may_crash = True

    def version(self) -> str | None:
        return TENSORRT.version()

    @property
    def install_command(self) -> str:
        """On a Jetson, TensorRT is part of JetPack; PyPI's does not support its GPU."""
        if l4t_release():
            return "sudo apt install python3-libnvinfer, and an environment with --system-site-packages"
        return super().install_command

    def build(
        self, graph: onnx.ModelProto, path: Path, *, recipe: Recipe, progress: Callable[[float], None] | None = None
    ) -> None:
        """Write the engine and, if its weights are stripped, the graph that holds them beside it.

        Raises:
            BackendError: See `builder.build_plan`; or no driver, GPU or CUDA bindings.
        """
        with device():
            plan = build_plan(graph, name=path.stem, target=tensorrt_target(recipe), progress=progress)
        atomic_write(path, plan.data)
        if parse_options(recipe).strip_weights:
            atomic_write(path.with_suffix(".onnx"), plan.graph.SerializeToString())

    def suffixes(self, recipe: Recipe) -> tuple[str, ...]:
        return (self.suffix, ".onnx") if parse_options(recipe).strip_weights else (self.suffix,)

    def load(self, path: Path, *, recipe: Recipe, threads: int, read: ReadFile = Path.read_bytes) -> TensorRTRunner:
        """Deserialise a built engine; the GPU does the work, so `threads` is not used.

        Raises:
            BackendError: TensorRT refuses it; or no driver, GPU or CUDA bindings.
        """
        return TensorRTRunner(path, tensorrt_target(recipe), read)

    def precisions(self, path: Path, *, recipe: Recipe) -> Counter[str]:
        """Count precisions among the layers that multiply by weights, as TensorRT's engine inspector names them.

        What the inspector does not tell is left out, with a warning.

        Raises:
            BackendError: The inspector's report cannot be read.
        """
        opened = TensorRTRunner(path, tensorrt_target(recipe))
        try:
            found = layers.precisions(layers.from_inspector(inspector_report(opened)))
        except ValueError as error:
            raise opened.library.failed(f"TensorRT's inspector gives no layers of {path}: {error}") from error
        told = [precision for precision in found if precision]
        if len(told) < len(found) or not found:
            log.warning(
                "TensorRT's inspector tells the precision of %d of %d layers of %s that multiply by weights",
                len(told),
                len(found),
                path.stem,
            )
        return Counter(told)

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
        """Return GPU, compute capability (`sm`), versions of CUDA, driver and bindings, power limit, SM clock, waiting.

        Raises:
            BackendError: No driver, GPU or CUDA bindings.
        """
        gpu = device()
        return {**gpu.facts(), **power_and_clocks(gpu.pci_bus_id)}

    def incompatibility(self, manifest: Manifest) -> str:
        """Compare versions and GPU, before TensorRT reads the engine.

        Raises:
            BackendError: No driver, GPU or CUDA bindings; or CUDA does not start for TensorRT.
        """
        requested, gpu, there = parse_options(manifest.recipe), device(), manifest.host.backends.get(self.name, {})
        if there.get("cuda_driver") != gpu.cuda["driver"]:
            TENSORRT.check_starts()  # on the driver of the build it does: a builder was made
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


def inspector_report(opened: TensorRTRunner) -> str:
    """Return the engine inspector's JSON on all layers; below TensorRT 10 on those of all batch sizes."""
    with device():
        inspector = opened.engine.create_engine_inspector()
        inspector.execution_context = opened.context(opened.sizes[0])  # without one, formats are unknown
        return str(inspector.get_engine_information(opened.library.trt.LayerInformationFormat.JSON))
