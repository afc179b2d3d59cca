"""The variants of an engine that are measured, each run as a user would run it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.metadata import ModelMetadata
from edgekd.backends.runner import Runner, StagedRun, StagedRunner
from edgekd.bench.suite import VariantGroup
from edgekd.policy import Decision, confidence, softmax
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import Engine
from edgekd.types import Array

Predictor: TypeAlias = Callable[[Array], Decision]
"""Images (N, 3, H, W) to the decisions on them."""
INTERLEAVED_WITH = {"no-early-exit": "full"}
"""Variants that are also timed interleaved with another one, for a ratio near 1."""
UNREACHABLE = 1.5
"""A threshold above any confidence. With `NEVER_EXIT`, a classifier would run the final graph instead of the stages."""


def variant_names(metadata: ModelMetadata, groups: Sequence[VariantGroup]) -> list[str]:
    """List the variants of a network that a suite's groups expand to; a network with one exit has only `final`."""
    if len(metadata.exits) == 1:
        return ["final"]
    every = {"exits": list(metadata.outputs), "cascade": ["cascade"] if metadata.policy.is_tuned else []}
    return [name for group in groups for name in every.get(group, [group])]


def size_mib(engine: Engine, path: Path, variant: str) -> float:
    """Return the size of the graphs that a variant runs; of the whole file for a student.onnx."""
    if engine.manifest is None:
        return path.stat().st_size / 2**20
    needed = graph_names(variant, len(engine.metadata.exits))
    return sum(file.bytes for file in engine.manifest.files.values() if file.graph in needed) / 2**20


def graph_names(variant: str, exits: int) -> set[str]:
    """Return the names of the engine's graphs that a variant runs."""
    if exits == 1:
        return {"monolithic"}
    if variant.startswith("exit_"):
        return {f"stage_{k}" for k in range(int(variant.removeprefix("exit_")) + 1)}
    stages = {f"stage_{k}" for k in range(exits)}
    return {"full": {"monolithic"}, "final": {"final"}}.get(variant, stages)


def make_predictor(engine: Engine, variant: str) -> Predictor:
    """Load the graphs of a variant and return a function that classifies with them, as a user would run it.

    Args:
        engine: An opened engine.
        variant: `no-early-exit` is the cascade with thresholds above any confidence; `exit_k` runs stages 0 to k
            and predicts from exit k; the others are strategies of `Classifier`.
    """
    if variant.startswith("exit_"):
        return _single_exit(engine, int(variant.removeprefix("exit_")))
    if variant == "no-early-exit":
        never = (UNREACHABLE,) * (len(engine.metadata.exits) - 1)
        return Classifier(engine, strategy="cascade", policy=replace(engine.metadata.policy, thresholds=never)).run
    return Classifier(engine, strategy=variant).run  # type: ignore[arg-type]  # which refuses unknown ones


def _single_exit(engine: Engine, exit_: int) -> Predictor:
    staged_runner, policy = engine.staged_runner(exit_ + 1), engine.metadata.policy

    def predict(images: Array) -> Decision:
        with staged_runner(images) as run:
            logits = [run.run_stage() for _ in range(exit_ + 1)][-1]
        probabilities = softmax(logits, policy.temperatures[exit_])
        confidences = confidence(probabilities, policy.confidence)
        return Decision(probabilities, np.full(len(images), exit_, np.int64), confidences)

    return predict


def overhead_ms(engine: Engine, variant: str, queries: Sequence[Array]) -> float:
    """Return the median time outside of the compiled graphs for one of `queries`, measured in a pass of its own."""
    timed = _TimedEngine(engine)
    predict = make_predictor(cast(Engine, timed), variant)
    outside = []
    for query in queries:
        timed.inside_ns, start = 0, time.perf_counter_ns()
        predict(query)
        outside.append((time.perf_counter_ns() - start - timed.inside_ns) / 1e6)
    return median(outside)


class _TimedEngine:
    """Wraps an engine and sums up the time spent inside its graphs."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.inside_ns = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    @property
    def monolithic(self) -> Runner:
        return self._timed(self._engine.monolithic)

    @property
    def final(self) -> Runner:
        return self._timed(self._engine.final)

    def staged_runner(self, exits: int | None = None) -> StagedRunner:
        inner = self._engine.staged_runner(exits)

        @contextlib.contextmanager
        def start(images: Array) -> Iterator[StagedRun]:
            with inner(images) as run:
                yield _TimedRun(run, self)

        return start

    def _timed(self, runner: Runner) -> Runner:
        def call(*xs: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
            start = time.perf_counter_ns()
            outputs = runner(*xs)
            self.inside_ns += time.perf_counter_ns() - start
            return outputs

        return call


class _TimedRun:
    def __init__(self, run: StagedRun, engine: _TimedEngine) -> None:
        self.compact = run.compact
        self._run_stage = run.run_stage
        self._engine = engine

    def run_stage(self) -> Array:
        start = time.perf_counter_ns()
        logits = self._run_stage()
        self._engine.inside_ns += time.perf_counter_ns() - start
        return logits
