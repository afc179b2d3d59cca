"""Options of the TensorRT backends, and what an engine is built for."""

from __future__ import annotations

from dataclasses import dataclass

from edgekd.artifacts.recipe import Recipe
from edgekd.backends.tensorrt.library import TENSORRT, Library
from edgekd.errors import ConfigError
from edgekd.schema import from_dict


@dataclass(frozen=True)
class TensorRTOptions:
    """The `[tensorrt]` table of a recipe.

    Attributes:
        workspace_share: Fraction of the GPU memory that is free at build time that may be scratch memory.
        optimization_level: 0 builds fastest, 5 searches longest for fast kernels.
        timing_cache: Keep measured kernels in the user's cache folder, which makes the next build short.
        library_tactics: Try cuBLAS, cuBLASLt and cuDNN, too, in versions that can (below 11).
        version_compatible: The next major version can run the engine.
        hardware_compatible: Other GPUs from SM 8.0 on can run the engine.
        strip_weights: Engine files without weights, which are put in on loading, from ONNX files beside them.
        dla_core: Deep learning accelerator to build for; layers that it lacks run on the GPU.
    """

    workspace_share: float = 0.5
    optimization_level: int = 3
    timing_cache: bool = True
    library_tactics: bool = True
    version_compatible: bool = False
    hardware_compatible: bool = False
    strip_weights: bool = False
    dla_core: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.workspace_share <= 1:
            raise ValueError("workspace_share: above 0, at most 1")
        if not 0 <= self.optimization_level <= 5:
            raise ValueError("optimization_level: 0 to 5")


def parse_options(recipe: Recipe, *, where: str = "the recipe") -> TensorRTOptions:
    """Parse the `[tensorrt]` table of a recipe.

    Raises:
        ConfigError: Unknown keys, wrong values, or a DLA for a recipe that it cannot run.
    """
    options = from_dict(TensorRTOptions, recipe.options.get("tensorrt", {}), where=where, at="tensorrt.")
    if options.dla_core is not None and not (recipe.uses_fp16 and len(set(recipe.batch_sizes)) == 1):
        what = f"{where}:\n  tensorrt.dla_core: a DLA has no fp32 (set float_layers), and one batch size only"
        raise ConfigError(what, fix="correct these keys")
    return options


@dataclass(frozen=True)
class Target:
    """An engine to build: for what, and by which library.

    Attributes:
        library: The library that builds and runs it.
        recipe: Precision and batch sizes.
        options: The library's options.
        compute_capabilities: Names of GPU architectures, as `trt.ComputeCapability` has them; empty for the GPU here.
    """

    library: Library
    recipe: Recipe
    options: TensorRTOptions
    compute_capabilities: tuple[str, ...] = ()


def tensorrt_target(recipe: Recipe) -> Target:
    """Return what TensorRT builds for a recipe."""
    return Target(TENSORRT, recipe, parse_options(recipe))
