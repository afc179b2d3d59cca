"""Recipes: the settings of compilation, from compile/*.toml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from edgekd.schema import TABLES

Option: TypeAlias = bool | int | float | str | tuple[int, ...] | tuple[float, ...] | tuple[str, ...]


@dataclass(frozen=True)
class Recipe:
    """Settings of a compilation: the keys of compile/*.toml. `edgekd.backends.base.load_recipe` reads one.

    Attributes:
        precision: Precision of convolutions and matrix products.
        float_layers: Precision of the layers of an int8 engine that are not quantised.
        max_accuracy_drop: Percentage points of accuracy that the predictions of the ensemble and of the last exit may
            lose on the validation split.
        calibration_images: Images of the training split that activation ranges are calibrated on; int8 only.
        calibration_method: How the end of an activation's range is chosen; int8 only.
        int8_attempts: Further engines that may be built and judged when int8 loses too much, 0 for none: with other
            ranges and corrections first, then with blocks in float.
        batch_sizes: Batch sizes whose stage times are measured into the manifest, and which backends with fixed batch
            sizes build for.
        graphs: `stages` builds the stages alone, in which a cascade runs; `all` also builds `monolithic` (every exit in
            one piece) and `final` (the last exit alone), which other strategies and comparisons run.
        options: Backend name to its options, as TOML has them; in TOML, a table called like the backend.
            `Backend.parse_options` parses them.
    """

    precision: Literal["fp32", "fp16", "int8"]
    float_layers: Literal["fp32", "fp16"] = "fp32"
    max_accuracy_drop: float = 0.5
    calibration_images: int = 256
    calibration_method: Literal["minmax", "entropy", "percentile"] = "minmax"
    int8_attempts: int = 6
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    graphs: Literal["stages", "all"] = "stages"
    options: dict[str, dict[str, Option]] = field(default_factory=dict, metadata=TABLES)

    def __post_init__(self) -> None:
        if self.float_layers != "fp32" and self.precision != "int8":
            raise ValueError("float_layers: only where the other layers are int8")
        if self.calibration_images < 1:
            raise ValueError("calibration_images: at least 1")
        if self.int8_attempts < 0:
            raise ValueError("int8_attempts: at least 0")
        if 1 not in self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError("batch_sizes: sizes from 1 on, and 1 among them")

    @property
    def precisions(self) -> frozenset[str]:
        """The precisions that a backend must support."""
        return frozenset({self.precision, self.float_layers if self.precision == "int8" else self.precision})

    @property
    def uses_fp16(self) -> bool:
        """True if 16-bit floats are requested."""
        return "fp16" in self.precisions

    @property
    def name(self) -> str:
        """The name in tables and messages: fp32, fp16, int8 or int8-fp16."""
        return f"{self.precision}-fp16" if self.float_layers == "fp16" else self.precision
