"""Staged runs whose boundary tensors are in host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeAlias, TypeVar, cast

import numpy as np
import numpy.typing as npt

from edgekd.backends.runner import Runner, StagedRun, StagedRunner
from edgekd.types import Array

Scalar = TypeVar("Scalar", bound=np.generic)
Arrays: TypeAlias = list[npt.NDArray[np.generic]]


def host_staged_runner(stages: Sequence[Runner]) -> StagedRunner:
    """Return a staged runner for any backend and batch size: each stage's outputs are given to the next."""
    return lambda images: nullcontext(HostStagedRun(stages, [images]))


def bound_staged_runner(
    stages: Sequence[Runner], bind: Callable[[Array], BoundStages], fits: Callable[[int], bool]
) -> StagedRunner:
    """Return a staged runner that runs some batch sizes through bound stages, the others as `host_staged_runner`.

    Args:
        stages: Runners of the stages.
        bind: Makes bound stages for batches like the given images (N, 3, H, W).
        fits: Returns True for batch sizes that have bound stages. A thread runs one batch at a time.
    """
    own = _ThreadStages()

    def start(images: Array) -> AbstractContextManager[StagedRun]:
        size = len(images)
        if not fits(size):
            return nullcontext(HostStagedRun(stages, [images]))
        if size not in own.by_size:
            own.by_size[size] = bind(images)
        return nullcontext(_BoundRun(stages, own.by_size[size], images))

    return start


@dataclass(frozen=True)
class BoundStages:
    """Stages for one batch size, each of which reads where the one before it writes, so nothing is copied or set.

    Attributes:
        start: Gives images (N, 3, H, W) to the first stage.
        inputs: Inputs of each of the other stages.
        run: Runs each stage, which leaves its logits (N, C) in `logits`.
        logits: Logits of each stage.
    """

    start: Callable[[Array], object]
    inputs: list[Arrays]
    run: list[Callable[[], object]]
    logits: list[Array]


class HostStagedRun:
    """A staged run whose boundary tensors are arrays that each stage returns."""

    def __init__(self, stages: Sequence[Runner], xs: Arrays) -> None:
        self._remaining = iter(stages)
        self._xs = xs

    def run_stage(self) -> Array:
        logits, *self._xs = next(self._remaining)(*self._xs)
        return cast(Array, logits)

    def compact(self, indices: npt.NDArray[np.int64], size: int) -> None:
        padded = resized(indices, size)
        self._xs = [x[padded] for x in self._xs]


class _BoundRun:
    """A run through bound stages until the batch is compacted; from there on as arrays."""

    def __init__(self, stages: Sequence[Runner], bound: BoundStages, images: Array) -> None:
        bound.start(images)
        self._stages = stages
        self._bound = bound
        self._images = images
        self._at = 0
        self._rest: HostStagedRun | None = None

    def run_stage(self) -> Array:
        if self._rest:
            return self._rest.run_stage()
        self._bound.run[self._at]()
        self._at += 1
        logits: Array = self._bound.logits[self._at - 1].copy()
        return logits

    def compact(self, indices: npt.NDArray[np.int64], size: int) -> None:
        if not self._rest:
            xs: Arrays = self._bound.inputs[self._at - 1] if self._at else [self._images]
            self._rest = HostStagedRun(self._stages[self._at :], xs)
        self._rest.compact(indices, size)


class _ThreadStages(threading.local):
    """Each thread's own bound stages, by batch size."""

    def __init__(self) -> None:
        self.by_size: dict[int, BoundStages] = {}


def resized(rows: npt.NDArray[Scalar], size: int) -> npt.NDArray[Scalar]:
    """Return the first `size` rows, repeated from the start where there are fewer."""
    return rows[np.arange(size) % len(rows)]
