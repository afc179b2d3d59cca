"""How to compile: the keys of compile/*.toml."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """One compile recipe; `specs.load(Recipe, "compile", "int8")` reads a shipped one.

    max_accuracy_drop: percentage points that any exit may lose on the validation split.
    calibration_images, calibration_method: for int8 only.
    batch_sizes: whose stage times are measured into the manifest.
    static_batch_sizes: OpenVINO compiles a copy of each graph for these; other sizes share one graph of any size.
    """

    precision: Literal["fp32", "fp16", "int8"]
    max_accuracy_drop: float = 0.5
    calibration_images: int = 256
    calibration_method: Literal["minmax", "entropy", "percentile"] = "minmax"
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    static_batch_sizes: tuple[int, ...] = (1, 32)

    def __post_init__(self) -> None:
        if self.calibration_images < 1:
            raise ValueError("calibration_images: at least 1")
        if 1 not in self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError("batch_sizes: sizes from 1 on, and 1 among them")
        if min(self.static_batch_sizes, default=1) < 1:
            raise ValueError("static_batch_sizes: at least 1 each")
