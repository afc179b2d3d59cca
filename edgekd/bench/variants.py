"""The ways of answering that are measured, each driven as a user would drive it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.backends.runner import Runner, StagedRun, StagedRunner
from edgekd.policy import NEVER_EXIT, Decision, confidence, softmax
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import Engine
from edgekd.types import Array

Group: TypeAlias = Literal["exits", "cascade", "no-early-exit", "full", "final"]
Answer: TypeAlias = Callable[[Array], Decision]
BESIDE = {"no-early-exit": "full"}
"""Ways of answering that are also timed in turns with another one, for a ratio near 1."""


def kinds(metadata: ModelMetadata, groups: Sequence[Group]) -> list[str]:
    """The suite's groups for this network: `exits` is one for each exit; a network with one exit has only `final`."""
    if len(metadata.exits) == 1:
        return ["final"]
    every = {"exits": list(metadata.outputs), "cascade": ["cascade"] if metadata.policy.is_tuned else []}
    return [kind for group in groups for kind in every.get(group, [group])]


def graphs(kind: str, exits: int) -> set[str]:
    """Names of the engine's graphs that answer."""
    if exits == 1:
        return {"monolithic"}
    if kind.startswith("exit_"):
        return {f"stage_{k}" for k in range(int(kind.removeprefix("exit_")) + 1)}
    return {
        "full": {"monolithic"},
        "final": {"final"},
    }.get(kind, {f"stage_{k}" for k in range(exits)})


def size_mib(engine: Engine, path: Path, kind: str) -> float:
    """Bytes on disk of the graphs that answer; of the whole file for a student.onnx."""
    if engine.manifest is None:
        return path.stat().st_size / 2**20
    needed = graphs(kind, len(engine.metadata.exits))
    return sum(file.bytes for file in engine.manifest.files.values() if file.graph in needed) / 2**20


def answerer(engine: Engine, kind: str) -> Answer:
    """Load what `kind` needs and return images (N, 3, H, W) -> Decision.

    no-early-exit: the cascade with thresholds that nobody reaches. exit_k: stages 0 to k, then the k-th exit's answer.
    """
    if kind.startswith("exit_"):
        return _one_exit(engine, int(kind.removeprefix("exit_")))
    if kind == "no-early-exit":
        never = (NEVER_EXIT,) * (len(engine.metadata.exits) - 1)
        return Classifier(engine, strategy="cascade", policy=replace(engine.metadata.policy, thresholds=never)).run
    return Classifier(engine, strategy=kind).run  # type: ignore[arg-type]  # Classifier names an unknown one


def _one_exit(engine: Engine, exit_: int) -> Answer:
    staged_runner, policy = engine.staged_runner(exit_ + 1), engine.metadata.policy

    def answer(images: Array) -> Decision:
        with staged_runner(images) as run:
            logits = [run.run_stage() for _ in range(exit_ + 1)][-1]
        probabilities = softmax(logits, policy.temperatures[exit_])
        sure = confidence(probabilities, policy.confidence)
        return Decision(probabilities, np.full(len(images), exit_, np.int64), sure)

    return answer


class _Watched(Engine):
    """The same engine with a clock around its graphs."""

    def __init__(self, engine: Engine) -> None:
        vars(self).update(vars(engine))
        self.inside_ns = 0

    def staged_runner(self, exits: int | None = None) -> StagedRunner:
        inner = super().staged_runner(exits)

        @contextlib.contextmanager
        def start(images: Array) -> Iterator[StagedRun]:
            with inner(images) as found:
                yield _WatchedRun(found, self)

        return start

    @property
    def monolithic(self) -> Runner:
        return self._timed(super().monolithic)

    @property
    def final(self) -> Runner:
        return self._timed(super().final)

    def _timed(self, runner: Runner) -> Runner:
        def call(*xs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
            start = time.perf_counter_ns()
            outputs = runner(*xs)
            self.inside_ns += time.perf_counter_ns() - start
            return outputs

        return call


class _WatchedRun:
    def __init__(self, run: StagedRun, engine: _Watched) -> None:
        self.compact = run.compact
        self._next = run.run_stage
        self._engine = engine

    def run_stage(self) -> Array:
        start = time.perf_counter_ns()
        logits = self._next()
        self._engine.inside_ns += time.perf_counter_ns() - start
        return logits


def overhead_ms(engine: Engine, kind: str, queries: Sequence[Array]) -> float:
    """Median over `queries` of the time around the compiled graphs, in a pass of its own."""
    watched = _Watched(engine)
    answer = answerer(watched, kind)
    around = []
    for query in queries:
        watched.inside_ns, start = 0, time.perf_counter_ns()
        answer(query)
        around.append((time.perf_counter_ns() - start - watched.inside_ns) / 1e6)
    return median(around)
