"""Batches on their way through stages whose tensors lie in host memory."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from edgekd.backends.base import Runner, StagedRun, StagedRunner
from edgekd.types import Array

Row = TypeVar("Row", bound=np.generic)
Arrays = list[npt.NDArray[np.generic]]


def resized(rows: npt.NDArray[Row], size: int) -> npt.NDArray[Row]:
    """The first `size` rows, repeated from the start where there are fewer."""
    return rows[np.arange(size) % len(rows)]


class HostStagedRun:
    """What lies between stages as arrays, which every stage returns and the next one is given."""

    def __init__(self, stages: Sequence[Runner], xs: Arrays) -> None:
        self._ahead = iter(stages)
        self._xs = xs

    def run_stage(self) -> Array:
        logits, *self._xs = next(self._ahead)(*self._xs)
        return logits  # type: ignore[return-value]  # every backend gives float32

    def compact(self, indices: npt.NDArray[np.int64], size: int) -> None:
        kept = resized(indices, size)
        self._xs = [x[kept] for x in self._xs]


def host_staged_runner(stages: Sequence[Runner]) -> StagedRunner:
    """A walker for any backend and batch."""

    return lambda images: nullcontext(HostStagedRun(stages, [images]))


@dataclass(frozen=True)
class BoundStages:
    """Stages for one batch size, each of which reads where the one before it writes: nothing is moved or set between.

    start: gives the first stage images (N, 3, H, W). read: what each of the others reads.
    run: a call for each stage, which leaves its logits (N, C) in `logits`.
    """

    start: Callable[[Array], object]
    read: list[Arrays]
    run: list[Callable[[], object]]
    logits: list[Array]


class _BoundRun:
    """Through linked stages until rows are left out; from there on as arrays."""

    def __init__(self, stages: Sequence[Runner], linked: BoundStages, images: Array) -> None:
        linked.start(images)
        self._stages = stages
        self._linked = linked
        self._images = images
        self._at = 0
        self._rest: HostStagedRun | None = None

    def run_stage(self) -> Array:
        if self._rest:
            return self._rest.run_stage()
        self._linked.run[self._at]()
        self._at += 1
        logits: Array = self._linked.logits[self._at - 1].copy()
        return logits

    def compact(self, indices: npt.NDArray[np.int64], size: int) -> None:
        if not self._rest:
            xs: Arrays = self._linked.read[self._at - 1] if self._at else [self._images]
            self._rest = HostStagedRun(self._stages[self._at :], xs)
        self._rest.compact(indices, size)


class _Own(threading.local):
    """Each thread's own linked stages, by batch size."""

    def __init__(self) -> None:
        self.sizes: dict[int, BoundStages] = {}


def bound_staged_runner(
    stages: Sequence[Runner], link: Callable[[Array], BoundStages], fits: Callable[[int], bool]
) -> StagedRunner:
    """Batches of a size that `fits` go through linked stages, others as arrays. A thread walks one batch at a time.

    link: makes linked stages for batches like the given images.
    """
    own = _Own()

    def start(images: Array) -> AbstractContextManager[StagedRun]:
        size = len(images)
        if not fits(size):
            return nullcontext(HostStagedRun(stages, [images]))
        if size not in own.sizes:
            own.sizes[size] = link(images)
        return nullcontext(_BoundRun(stages, own.sizes[size], images))

    return start
