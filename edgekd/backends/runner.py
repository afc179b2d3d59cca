"""Protocols of compiled graphs and of the staged execution of a batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from edgekd.types import Array


class Runner(Protocol):
    """A compiled graph; threads may call it concurrently."""

    def __call__(self, *xs: npt.NDArray[np.generic]) -> list[npt.NDArray[np.generic]]:
        """Run the graph on its inputs, in graph order.

        Returns:
            The outputs in graph order, as arrays that belong to the caller.
        """


class CompiledGraph(Runner, Protocol):
    """A runner as `Backend.load` returns it.

    Attributes:
        row_shapes: Shapes of one row of the first input and of the first output, -1 for a free dimension.
    """

    row_shapes: tuple[tuple[int, ...], tuple[int, ...]]


class StagedRun(Protocol):
    """One batch on its way through the stages; boundary tensors stay in memory of the backend's choice."""

    def run_stage(self) -> Array:
        """Run the next stage.

        Returns:
            The logits (B, C) of its exit.
        """

    def compact(self, indices: npt.NDArray[np.int64], size: int) -> None:
        """Compact the batch to `indices` (ascending) and pad it to `size`; padding rows are undefined."""


StagedRunner: TypeAlias = Callable[[Array], AbstractContextManager[StagedRun]]
"""Starts a staged run of images (N, 3, H, W)."""
DeviceCascade: TypeAlias = Callable[[Array], tuple[Array, float, int]]
"""Maps one image (1, 3, H, W) to its probabilities (C,), confidence and exit."""
