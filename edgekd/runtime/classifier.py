"""`Classifier`: images in, labels out, stopping early when sure."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, get_args, overload

import numpy as np
import numpy.typing as npt

from edgekd.backends.staged import resized
from edgekd.data.images import Source, load, load_batch
from edgekd.errors import ArtifactError, BackendError, ConfigError, DataError, nearest
from edgekd.policy import FEW_CLASSES, Decision, Policy, confidence, decide, decide_one, ensemble, softmax
from edgekd.runtime.engine import Engine, open_engine
from edgekd.types import Array

log = logging.getLogger(__name__)

Strategy: TypeAlias = Literal["cascade", "full", "final"]
One = TypeVar("One", bound=Source)
BATCH = 32
"""Largest batch of an engine whose stages were not timed."""


COLUMNS = ("path", "file", "label", "confidence", "exit", "error")
"""What stands beside the probabilities in a row of `Prediction.row` or of `edgekd predict`."""


@dataclass(frozen=True)
class Prediction:
    """One image's answer: class name and index, confidence in 0..1, exit (0 is the first), probability per class.

    path: the image file, if the image was given so. classes: the names that belong to the probabilities.
    Both are no part of the answer: predictions are equal without them.
    """

    label: str
    index: int
    confidence: float
    exit: int
    probabilities: tuple[float, ...]
    path: Path | None = field(default=None, compare=False)
    classes: tuple[str, ...] = field(default=(), compare=False, repr=False)

    def row(self) -> dict[str, str | float | None]:
        """A flat row: path, label, confidence, exit, and a probability under each class's name (see `class_columns`).

        `pandas.DataFrame([p.row() for p in predictions])` is a table of answers.
        """
        path = None if self.path is None else str(self.path)
        plain = {"path": path, "label": self.label, "confidence": self.confidence, "exit": self.exit}
        return plain | dict(zip(class_columns(self.classes), self.probabilities))


def class_columns(classes: Sequence[str]) -> list[str]:
    """Names of columns of probabilities: the classes' own; one that is called like another column gets ` (class)`."""
    return [f"{name} (class)" if name in COLUMNS else name for name in classes]


class Classifier:
    """Classifies images with student.engine/, student.onnx, or an opened engine.

    strategy:
        cascade: stage by stage, each image leaves at the first exit that is sure enough.
        full: every exit, the mean of their probabilities at temperature 1.
        final: the last exit alone, at its temperature.
        Without one: cascade if the engine was tuned, else full.
    policy: instead of the engine's own. threads: for the engine, when a path is given.
    device_side_exit: research; the GPU itself ends the cascade, one image at a time (TensorRT, CUDA from 12.4).

    Larger batches are cut at the largest batch size whose stages were timed at compilation (32 without times).
    In a cascade, images that leave are removed from the batch when the times say that the smaller batch is
    faster, and always without times. OpenVINO compiles anew for each batch size it has not seen, and TensorRT was
    built for the timed ones alone: there, batches are padded up to a timed size.

    Thread-safe: nothing changes after construction, so threads may share one classifier. Processes may not: a process
    forked from the one that opened it is refused. Opened by path, it can be pickled, and is opened anew where it is
    unpickled, if that is the same engine still.

    Raises:
        ConfigError: unknown strategy, a cascade without thresholds, a policy for another number of exits.
        ArtifactError, BackendError: as `edgekd.runtime.engine.open_engine`.
    """

    def __init__(
        self,
        engine: Engine | Path | str,
        *,
        strategy: Strategy | None = None,
        policy: Policy | None = None,
        threads: int | None = None,
        device_side_exit: bool = False,
    ) -> None:
        self._opened: tuple[Path, dict[str, Any]] | None = None
        if isinstance(engine, (str, Path)):
            given = {"strategy": strategy, "policy": policy, "threads": threads, "device_side_exit": device_side_exit}
            self._opened = Path(engine).absolute(), given
            engine = open_engine(Path(engine), threads=threads)
        elif threads is not None:
            raise ConfigError("threads given with an engine that is open already", fix="give them to open_engine")
        self.engine = engine
        self.metadata = engine.metadata
        self.policy = policy or engine.metadata.policy
        self.strategy = self._strategy(strategy)
        exits = range(len(self.metadata.exits))
        if device_side_exit and self.strategy != "cascade":
            raise ConfigError(f"--device-side-exit ends cascades, not '{self.strategy}'", fix="run edgekd tune")
        self._decider = engine.device_cascade(self.policy) if device_side_exit else None
        if self.strategy == "cascade":
            self._staged_runner = engine.staged_runner()
        else:
            self._graph = engine.monolithic if self.strategy == "full" else engine.final
        times = engine.manifest.stage_ms if engine.manifest else {}
        self._stage_ms = [{int(size): stages[k] for size, stages in times.items()} for k in exits]
        self._buckets = sorted(self._stage_ms[0]) if engine.backend.pads_batches else []
        self.batch_size = max(self._stage_ms[0], default=BATCH)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the probabilities."""
        return self.metadata.classes

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the exits, from shallow to deep; `Prediction.exit` counts in them."""
        return tuple(f"exit_{k}" for k in range(len(self.metadata.exits)))

    def __repr__(self) -> str:
        return (
            f"<Classifier {self.engine.name}, {self.strategy}: {len(self.classes)} classes, {len(self.exits)} exits, "
            f"{self.metadata.preprocess.image_size} pixels, threads {self.engine.threads}>"
        )

    def close(self) -> None:
        """Free the engine, one that was given open too. Nothing can be classified afterwards."""
        self.engine.close()
        for graphs in ("_walker", "_graph", "_decider"):
            vars(self).pop(graphs, None)

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._opened is None:
            raise ConfigError(
                "a classifier of an engine that was open before cannot be pickled", fix="give the engine's path instead"
            )
        return _reopen, (*self._opened, self.engine.digest)

    def _strategy(self, strategy: Strategy | None) -> Strategy:
        if len(self.policy.temperatures) != len(self.metadata.exits):
            raise ConfigError(
                f"the policy has {len(self.policy.temperatures)} exits, "
                f"{self.engine.name} has {len(self.metadata.exits)}",
                fix="tune this engine with edgekd tune",
            )
        if strategy is None:
            strategy = "cascade" if self.policy.is_tuned else "full"
            if strategy == "full":
                log.info("no exit thresholds yet, so every exit is asked; edgekd tune sets them")
        if strategy not in get_args(Strategy):
            raise ConfigError(f"no strategy '{strategy}'", fix=nearest(strategy, get_args(Strategy)))
        if strategy == "cascade" and not self.policy.is_tuned:
            raise ConfigError(f"a cascade needs exit thresholds, {self.engine.name} has none", fix="run edgekd tune")
        return strategy

    @overload
    def predict(self, source: Source) -> Prediction: ...
    @overload
    def predict(self, source: list[One] | tuple[One, ...]) -> list[Prediction]: ...
    def predict(self, source: Source | list[One] | tuple[One, ...]) -> Prediction | list[Prediction]:
        """Classify an image, or a list of images in batches.

        source: a path, a file's bytes, a file that is open for reading in binary, a Pillow image, or a uint8 array,
            RGB (H, W, 3) or grey (H, W).

        Raises:
            DataError: an image that cannot be used; a file is named.
        """
        preprocess = self.metadata.preprocess
        if not isinstance(source, (list, tuple)):
            return self._predictions([source], load(source, preprocess)[None])[0]
        found: list[Prediction] = []
        for start in range(0, len(source), self.batch_size):
            batch = source[start : start + self.batch_size]
            found += self._predictions(batch, load_batch(batch, preprocess))
        return found

    def _predictions(self, sources: Sequence[Source], images: Array) -> list[Prediction]:
        decision = self.run(images)
        paths = [Path(s) if isinstance(s, (str, Path)) else None for s in sources]
        indices = decision.probabilities.argmax(axis=1).tolist()
        rows = zip(
            indices, decision.confidence.tolist(), decision.exits.tolist(), decision.probabilities.tolist(), paths
        )
        names = self.metadata.classes
        return [Prediction(names[i], i, sure, exit, tuple(p), path, names) for i, sure, exit, p, path in rows]

    def run(self, images: Array) -> Decision:
        """Classify preprocessed images, float32 (N, 3, H, W).

        Raises:
            DataError: another type or shape.
            BackendError: the engine is closed, was opened before this process was forked, or cannot run; or its answers
                are not finite.
        """
        self.engine.check_usable()
        size = self.metadata.preprocess.image_size
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise DataError(
                f"{images.dtype} of shape {images.shape} is no batch for {self.engine.name}",
                fix=f"give float32 (N, 3, {size}, {size}), or use predict for pictures",
            )
        is_small = len(images) == 1 and len(self.metadata.classes) <= FEW_CLASSES
        cascade = self._cascade_of_one if is_small else self._cascade
        decide = self._on_device if self._decider else cascade if self.strategy == "cascade" else self._at_once
        if 0 < len(images) <= self.batch_size:
            return self._finite(decide(images))
        decision = Decision.empty(len(images), len(self.metadata.classes))
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            found = self._finite(decide(images[part]))
            decision.probabilities[part] = found.probabilities
            decision.exits[part], decision.confidence[part] = found.exits, found.confidence
        return decision

    def _finite(self, decision: Decision) -> Decision:
        if not np.isfinite(decision.confidence).all():
            what = f"{self.engine.name} answers with numbers that are not finite"
            raise BackendError(what, fix="compile with --recipe fp32; if it says so then, train anew")
        return decision

    def _at_once(self, images: Array) -> Decision:
        count, size = len(images), _padded(len(images), self._buckets)
        logits: list[npt.NDArray[Any]] = self._graph(images if size == count else resized(images, size))
        if self.strategy == "full":
            answer = ensemble(np.stack(logits))[:count]
        else:
            answer = softmax(logits[0], self.policy.temperatures[-1])[:count]
        last = np.full(count, len(self.metadata.exits) - 1, np.int64)
        return Decision(answer, last, confidence(answer, self.policy.confidence))

    def _on_device(self, images: Array) -> Decision:
        assert self._decider is not None  # or this is not called
        found = [self._decider(images[i : i + 1]) for i in range(len(images))]
        answers, sure, exits = zip(*found)
        return Decision(np.stack(answers), np.array(exits, np.int64), np.array(sure, np.float32))

    def _cascade_of_one(self, image: Array) -> Decision:
        """`_cascade` without what only a batch needs: Python's share of one image's time."""
        total = [0.0] * len(self.metadata.classes)
        with self._staged_runner(image) as run:
            for exit in range(len(self.metadata.exits)):
                answer, sure, exited, total = decide_one(self.policy, exit, run.run_stage()[0].tolist(), total)
                if exited:  # everybody does at the last exit
                    break
        return Decision(np.array([answer], np.float32), np.array([exit]), np.array([sure], np.float32))

    def _cascade(self, images: Array) -> Decision:
        count, classes = len(images), len(self.metadata.classes)
        decision = Decision.empty(count, classes)
        total, rows = np.zeros((count, classes), np.float32), np.arange(count)  # rows: which image a row is
        waiting, left = np.ones(count, bool), count
        with self._staged_runner(images) as run:
            for exit in range(len(self.metadata.exits)):
                size = self._next_size(exit, left, len(rows))
                if size != len(rows):  # the rows beyond `left` are waited for by nobody
                    keep = np.flatnonzero(waiting)
                    run.compact(keep, size)
                    keep = resized(keep, size)
                    total, rows, waiting = total[keep], rows[keep], np.arange(size) < left
                seen = decide(self.policy, exit, run.run_stage(), total)
                leaving = waiting & seen.exited
                decision.put(rows[leaving], leaving, exit, seen)
                waiting, total = waiting & ~leaving, seen.total
                left = int(np.count_nonzero(waiting))
                if not left:
                    break
        return decision

    def _next_size(self, exit: int, left: int, current: int) -> int:
        size = _padded(left, self._buckets)
        return size if exit == 0 else next_batch(size, current, self._stage_ms[exit])


def _reopen(path: Path, options: dict[str, Any], digest: str) -> Classifier:
    classifier = Classifier(path, **options)
    if classifier.engine.digest != digest:
        raise ArtifactError(f"{path} was replaced since the classifier was pickled", fix="open the new one")
    return classifier


def next_batch(remaining: int, current: int, stage_ms: Mapping[int, float]) -> int:
    """The batch for the next stage: `remaining` rows (those that did not leave) or all `current` ones.

    stage_ms: batch size to the stage's measured milliseconds; between sizes it is interpolated.
    The smaller batch is taken when it is faster, and always when nothing was measured.
    """
    if remaining >= current:
        return current
    if not stage_ms:
        return remaining
    sizes = sorted(stage_ms)
    few, all_ = np.interp([remaining, current], sizes, [stage_ms[s] for s in sizes])
    return remaining if few < all_ else current


def _padded(count: int, buckets: Sequence[int]) -> int:
    return next((size for size in buckets if size >= count), count)
