"""How to compile: the keys of compile/*.toml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TensorRT:
    """What only TensorRT asks for.

    workspace_share: how much of the GPU memory that is free at build time may be scratch.
    optimization_level: 0 builds fastest, 5 searches longest.
    timing_cache: keep measured kernels in the user's cache folder, which makes the next build short.
    library_tactics: try cuBLAS, cuBLASLt and cuDNN, too, in versions that can (below 11).
    version_compatible: the next major version runs the engine, too. hardware_compatible: other GPUs from SM 8.0 on do.
    strip_weights: engine files without weights, which are put in on opening, from ONNX files beside them.
    dla_core: a deep learning accelerator to build for; what it cannot do runs on the GPU.
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
        if self.dla_core is not None and self.dla_core < 0:
            raise ValueError("dla_core: 0 is the first")


@dataclass(frozen=True)
class Recipe:
    """One compile recipe; `config.load(Recipe, "compile", "int8")` reads a shipped one.

    float_layers: what computes in float in an int8 engine computes in this.
    max_accuracy_drop: percentage points that the answers of the ensemble and the last exit may lose on the validation
        split.
    calibration_images, calibration_method: for int8 only.
    batch_sizes: whose stage times are measured into the manifest, and for which TensorRT builds.
    static_batch_sizes: OpenVINO compiles a copy of each graph for these; other sizes share one graph of any size.
    """

    precision: Literal["fp32", "fp16", "int8"]
    float_layers: Literal["fp32", "fp16"] = "fp32"
    max_accuracy_drop: float = 0.5
    calibration_images: int = 256
    calibration_method: Literal["minmax", "entropy", "percentile"] = "minmax"
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    static_batch_sizes: tuple[int, ...] = (1, 32)
    tensorrt: TensorRT = field(default_factory=TensorRT)

    def __post_init__(self) -> None:
        if self.float_layers != "fp32" and self.precision != "int8":
            raise ValueError("float_layers: only where the other layers are int8")
        if self.calibration_images < 1:
            raise ValueError("calibration_images: at least 1")
        if 1 not in self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError("batch_sizes: sizes from 1 on, and 1 among them")
        if min(self.static_batch_sizes, default=1) < 1:
            raise ValueError("static_batch_sizes: at least 1 each")
        if self.tensorrt.dla_core is not None and not (self.halves and len(set(self.batch_sizes)) == 1):
            raise ValueError("tensorrt.dla_core: a DLA knows no fp32 (set float_layers), and one batch size alone")

    @property
    def halves(self) -> bool:
        """Whether 16-bit floats are asked for."""
        return "fp16" in (self.precision, self.float_layers)

    @property
    def name(self) -> str:
        """For tables: fp32, fp16, int8, int8-fp16, dla-int8, …"""
        floats = "-fp16" if self.float_layers == "fp16" else ""
        return f"dla-{self.precision}" if self.tensorrt.dla_core is not None else f"{self.precision}{floats}"
