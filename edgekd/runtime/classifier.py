"""`Classifier`: images to labels, with early exit."""

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
COLUMNS = ("path", "file", "label", "confidence", "exit", "deferred", "error")
"""Columns beside the probabilities in `Prediction.row` and in the output of `edgekd predict`."""


@dataclass(frozen=True)
class Prediction:
    """The prediction for one image.

    Attributes:
        label: Name of the predicted class.
        index: Its index in `classes`.
        confidence: Confidence of the exit, 0..1.
        exit: Index of the exit that the image took, from 0.
        probabilities: Probability of each class.
        path: The image file, if the image was given as one. Ignored in comparisons.
        classes: Names of the classes. Ignored in comparisons.
        deferred: True if the confidence is too low for an answer (`Policy.defer_below`): a person should look at it.
    """

    label: str
    index: int
    confidence: float
    exit: int
    probabilities: tuple[float, ...]
    path: Path | None = field(default=None, compare=False)
    classes: tuple[str, ...] = field(default=(), compare=False, repr=False)
    deferred: bool = False

    def row(self) -> dict[str, str | float | None]:
        """Return path, label, confidence, exit, deferred and each class's probability (see `class_columns`) as a row.

        `pandas.DataFrame([p.row() for p in predictions])` makes a table of predictions.
        """
        path = None if self.path is None else str(self.path)
        row: dict[str, str | float | None] = {"path": path, "label": self.label, "confidence": self.confidence}
        return (
            row
            | {"exit": self.exit, "deferred": self.deferred}
            | dict(zip(class_columns(self.classes), self.probabilities))
        )


def class_columns(classes: Sequence[str]) -> list[str]:
    """Return a column name for each class: its own, with ` (class)` appended where that is one of `COLUMNS`."""
    return [f"{name} (class)" if name in COLUMNS else name for name in classes]


class Classifier:
    """Classifies images with student.engine/, student.onnx, or an opened engine.

    Larger batches are split at the largest batch size whose stages were timed at compilation (32 without times). In a
    cascade, images that exit are removed from the batch if the times say that the smaller batch is faster, and always
    without times. Where a backend needs timed batch sizes, batches are padded to one.

    Thread-safe: nothing changes after construction, so threads may share one classifier. Processes may not: a process
    forked from the one that opened it is refused. A classifier opened by path can be pickled; unpickling opens the
    same engine again and fails if it was replaced.

    Args:
        engine: Path of student.engine/ or student.onnx, or an opened engine.
        strategy: `cascade` runs stage by stage, and each image takes the first exit whose threshold it reaches; `full`
            averages the probabilities of all exits at temperature 1; `final` runs the last exit alone, at its
            temperature, and so does a cascade in which no image can exit early and the last exit answers by itself.
            `full` and `final` are fastest with the graphs of `edgekd compile --graphs all`: without them, all stages
            run, one after the other. Default: `cascade` if the engine was tuned, else `full`.
        policy: Replaces the engine's own policy.
        threads: CPU threads of the engine, when a path is given.
        device_side_exit: Experimental: the GPU itself ends the cascade, one image at a time (TensorRT, CUDA 12.4 or
            later).

    Raises:
        ConfigError: Unknown strategy, a cascade without thresholds, or a policy for another number of exits.
        ArtifactError, BackendError: See `edgekd.runtime.engine.open_engine`.
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
            raise ConfigError("threads given with an engine that is already open", fix="give them to open_engine")
        self.engine = engine
        self.metadata = engine.metadata
        self.policy = policy or engine.metadata.policy
        self.strategy = self._strategy(strategy)
        exits = range(len(self.metadata.exits))
        if device_side_exit and self.strategy != "cascade":
            raise ConfigError(f"--device-side-exit ends cascades, not '{self.strategy}'", fix="run edgekd tune")
        self._decider = engine.device_cascade(self.policy) if device_side_exit else None
        self._runs_stages = self.strategy == "cascade" and not self.policy.is_last_exit
        if self._runs_stages:
            self._staged_runner = engine.staged_runner()
        else:
            self._graph = engine.monolithic if self.strategy == "full" else engine.final
        times = engine.manifest.stage_ms if engine.manifest else {}
        self._stage_ms = [{int(size): stages[k] for size, stages in times.items()} for k in exits]
        self._buckets = sorted(self._stage_ms[0]) if engine.backend.pads_batches else []
        self.batch_size = max(self._stage_ms[0], default=BATCH)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in the order of the probabilities."""
        return self.metadata.classes

    @property
    def exits(self) -> tuple[str, ...]:
        """Exit names, shallow to deep; `Prediction.exit` indexes them."""
        return tuple(f"exit_{k}" for k in range(len(self.metadata.exits)))

    def __repr__(self) -> str:
        return (
            f"<Classifier {self.engine.name}, {self.strategy}: {len(self.classes)} classes, {len(self.exits)} exits, "
            f"image size {self.metadata.preprocess.image_size}, threads {self.engine.threads}>"
        )

    def close(self) -> None:
        """Free the engine, even one that was given open. The classifier cannot be used afterwards."""
        self.engine.close()
        for graphs in ("_staged_runner", "_graph", "_decider"):
            vars(self).pop(graphs, None)

    def __enter__(self) -> Classifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        if self._opened is None:
            raise ConfigError(
                "a classifier of an already opened engine cannot be pickled", fix="give the engine's path instead"
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
                log.info("no exit thresholds yet, so all exits are averaged; edgekd tune sets them")
        if strategy not in get_args(Strategy):
            raise ConfigError(f"no strategy '{strategy}'", fix=nearest(strategy, get_args(Strategy)))
        if strategy == "cascade" and not self.policy.is_tuned:
            raise ConfigError(f"a cascade needs exit thresholds; {self.engine.name} has none", fix="run edgekd tune")
        return strategy

    @overload
    def predict(self, source: Source) -> Prediction: ...
    @overload
    def predict(self, source: list[One] | tuple[One, ...]) -> list[Prediction]: ...
    def predict(self, source: Source | list[One] | tuple[One, ...]) -> Prediction | list[Prediction]:
        """Classify an image, or a list of images in batches.

        Args:
            source: A path, the bytes of a file, a file opened for reading in binary mode, a Pillow image, or a uint8
                array, RGB (H, W, 3) or grey (H, W); or a list of these.

        Returns:
            A prediction, or a list of them in the order of the images.

        Raises:
            DataError: An image cannot be used; a file is named.
        """
        preprocess = self.metadata.preprocess
        if not isinstance(source, (list, tuple)):
            return self._predictions([source], load(source, preprocess)[None])[0]
        predictions: list[Prediction] = []
        for start in range(0, len(source), self.batch_size):
            batch = source[start : start + self.batch_size]
            predictions += self._predictions(batch, load_batch(batch, preprocess))
        return predictions

    def _predictions(self, sources: Sequence[Source], images: Array) -> list[Prediction]:
        decision = self.run(images)
        paths = [Path(s) if isinstance(s, (str, Path)) else None for s in sources]
        indices = decision.probabilities.argmax(axis=1).tolist()
        confidences, exits, deferred = decision.confidence.tolist(), decision.exits.tolist(), decision.deferred.tolist()
        rows = zip(indices, confidences, exits, decision.probabilities.tolist(), paths, deferred)
        names = self.metadata.classes
        return [Prediction(names[i], i, c, exit, tuple(p), path, names, d) for i, c, exit, p, path, d in rows]

    def run(self, images: Array) -> Decision:
        """Classify preprocessed images.

        Args:
            images: float32 (N, 3, H, W).

        Raises:
            DataError: Another type or shape.
            BackendError: The engine is closed, belongs to the process that this one was forked from, or cannot run;
                or its outputs are not finite.
        """
        self.engine.check_usable()
        size = self.metadata.preprocess.image_size
        if images.dtype != np.float32 or images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise DataError(
                f"{images.dtype} of shape {images.shape} is not a batch for {self.engine.name}",
                fix=f"give float32 (N, 3, {size}, {size}), or call predict with images",
            )
        if 0 < len(images) <= self.batch_size:
            return self._decision(images)
        decision = Decision.empty(len(images), len(self.metadata.classes), self.policy.defer_below)
        for start in range(0, len(images), self.batch_size):
            batch = slice(start, start + self.batch_size)
            decided = self._decision(images[batch])
            decision.probabilities[batch] = decided.probabilities
            decision.exits[batch], decision.confidence[batch] = decided.exits, decided.confidence
        return decision

    def _decision(self, images: Array) -> Decision:
        """Classify one batch by the chosen strategy."""
        if self._decider:
            decision = self._on_device(images)
        elif not self._runs_stages:
            decision = self._at_once(images)
        elif len(images) == 1 and len(self.metadata.classes) <= FEW_CLASSES:
            decision = self._cascade_of_one(images)
        else:
            decision = self._cascade(images)
        if not np.isfinite(decision.confidence).all():
            what = f"{self.engine.name} returned values that are not finite"
            raise BackendError(what, fix="compile with --recipe fp32; if that fails too, train again")
        return decision

    def _at_once(self, images: Array) -> Decision:
        """Classify with one graph: all exits averaged, or the last exit alone."""
        count, size = len(images), _padded(len(images), self._buckets)
        logits: list[npt.NDArray[Any]] = self._graph(images if size == count else resized(images, size))
        if self.strategy == "full":
            probabilities = ensemble(np.stack(logits))[:count]
        else:
            probabilities = softmax(logits[0], self.policy.temperatures[-1])[:count]
        last = np.full(count, len(self.metadata.exits) - 1, np.int64)
        confidences = confidence(probabilities, self.policy.confidence)
        return Decision(probabilities, last, confidences, self.policy.defer_below)

    def _on_device(self, images: Array) -> Decision:
        assert self._decider is not None  # otherwise this is not called
        decided = [self._decider(images[i : i + 1]) for i in range(len(images))]
        probabilities, confidences, exits = zip(*decided)
        taken, confidence = np.array(exits, np.int64), np.array(confidences, np.float32)
        return Decision(np.stack(probabilities), taken, confidence, self.policy.defer_below)

    def _cascade_of_one(self, image: Array) -> Decision:
        """Run `_cascade` for one image, without the overhead that only a batch needs."""
        state: list[Any] = [0.0] * len(self.metadata.classes)
        with self._staged_runner(image) as run:
            for exit in range(len(self.metadata.exits)):
                logits = run.run_stage()[0].tolist()
                probabilities, confidence, exited, state = decide_one(self.policy, exit, logits, state)
                if exited:  # always true at the last exit
                    break
        rows = np.array([probabilities], np.float32), np.array([exit]), np.array([confidence], np.float32)
        return Decision(*rows, self.policy.defer_below)

    def _cascade(self, images: Array) -> Decision:
        """Run stage by stage, compacting the batch to the images that have not exited where that is faster."""
        count, classes = len(images), len(self.metadata.classes)
        decision = Decision.empty(count, classes, self.policy.defer_below)
        state = np.zeros((count, classes), np.float32)
        rows = np.arange(count)  # image of each row of the batch
        active, survivors = np.ones(count, bool), count
        with self._staged_runner(images) as run:
            for exit in range(len(self.metadata.exits)):
                size = self._next_size(exit, survivors, len(rows))
                if size != len(rows):  # rows from `survivors` on are padding
                    kept = np.flatnonzero(active)
                    run.compact(kept, size)
                    kept = resized(kept, size)
                    state, rows, active = state[kept], rows[kept], np.arange(size) < survivors
                decided = decide(self.policy, exit, run.run_stage(), state)
                exited = active & decided.exited
                decision.put(rows[exited], exited, exit, decided)
                active, state = active & ~exited, decided.state
                survivors = int(np.count_nonzero(active))
                if not survivors:
                    break
        return decision

    def _next_size(self, exit: int, survivors: int, current: int) -> int:
        size = _padded(survivors, self._buckets)
        return size if exit == 0 else next_batch(size, current, self._stage_ms[exit])


def _reopen(path: Path, options: dict[str, Any], digest: str) -> Classifier:
    classifier = Classifier(path, **options)
    if classifier.engine.digest != digest:
        raise ArtifactError(f"{path} was replaced after the classifier was pickled", fix="open the new one")
    return classifier


def next_batch(survivors: int, current: int, stage_ms: Mapping[int, float]) -> int:
    """Choose the batch size of the next stage: the survivors' or the current one.

    Args:
        survivors: Number of images that have not exited, padded to a timed size where the backend needs that.
        current: Current batch size.
        stage_ms: Measured milliseconds of the stage by batch size; interpolated between sizes.

    Returns:
        `survivors` if that batch is faster or nothing was measured, else `current`.
    """
    if survivors >= current:
        return current
    if not stage_ms:
        return survivors
    sizes = sorted(stage_ms)
    compacted, whole = np.interp([survivors, current], sizes, [stage_ms[s] for s in sizes])
    return survivors if compacted < whole else current


def _padded(count: int, buckets: Sequence[int]) -> int:
    return next((size for size in buckets if size >= count), count)
