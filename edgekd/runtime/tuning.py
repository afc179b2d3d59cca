"""Choose temperatures, averaging, confidence measure and exit thresholds on images, on the compiled engine.

`tune` is the quick way: the fastest setting within an allowed drop on the validation images, or the most accurate one
within a latency. It promises nothing, since the images that chose the setting cannot judge it. A margin of one standard
error (the square root of the number of images that only one of cascade and reference classifies correctly) kept the
mean drop on new images below 1 point where 1 was allowed, but not below 0.3: 300 or 800 images cannot tell that apart
(benchmarks/results/exit-policies.md). `threshold_path` lists settings for a promise that is tested on other
images (`edgekd.certification`).
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast, get_args

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.manifest import CurvePoint, Tuning, read_manifest, write_manifest
from edgekd.confidence import CONFIDENCE_MEASURES
from edgekd.errors import ArtifactError, ConfigError, check_known
from edgekd.policy import Average, Policy, ensemble
from edgekd.runtime.engine import Engine
from edgekd.runtime.thresholds import (
    Floats,
    at_every_exit,
    candidate_thresholds,
    exits_taken,
    fit_pooling,
    fit_temperature,
    threshold_grid,
)
from edgekd.types import Array, Labels, Progress

log = logging.getLogger(__name__)

Loss: TypeAlias = Callable[[Labels, Labels], npt.NDArray[Any]]
"""Maps answers (N,) and reference answers (N,) to the loss of each image (N,), 0 where they are the same."""
PATH_POINTS = 60
"""Largest number of settings in a path."""
CURVE_POINTS = 25
MEASURES = ("max_probability", "margin")
"""Confidence measures that `auto` chooses from; entropy is worse with
the mean and no better otherwise (benchmarks/results/exit-policies.md)."""
AUTO = "auto"
"""As a confidence measure or average: choose it on the images."""


@dataclass(frozen=True)
class Tuned:
    """The chosen thresholds and their result on the validation images.

    Attributes:
        policy: Policy with the fitted temperatures and chosen thresholds.
        accuracy: Accuracy of the cascade, 0..1.
        accuracy_error: Standard error of the difference between `accuracy` and `reference_accuracy`.
        reference_accuracy: Accuracy without early exit, 0..1: see `right_without_early_exit`.
        ensemble_accuracy: Accuracy of the mean of all exits, 0..1.
        latency_ms: Mean latency of an image at batch size 1, from the stages' times.
        shares: Share of the images that take each exit, 0..1.
        curve: Pareto front of accuracy and latency, fast to slow; at most CURVE_POINTS.
    """

    policy: Policy
    accuracy: float
    accuracy_error: float
    reference_accuracy: float
    ensemble_accuracy: float
    latency_ms: float
    shares: tuple[float, ...]
    curve: tuple[CurvePoint, ...]


def tune(
    engine: Engine,
    images: Array,
    labels: Labels,
    *,
    max_accuracy_drop: float | None = None,
    latency_ms: float | None = None,
    confidence: str = AUTO,
    average: str = AUTO,
    progress: Progress | None = None,
) -> Tuned:
    """Fit a policy to images.

    Args:
        engine: The compiled engine; nothing is written to it.
        images: Validation images (N, 3, H, W), preprocessed.
        labels: Their class indices (N,).
        max_accuracy_drop: Allowed loss against the network without early exit (`right_without_early_exit`), in
            percentage points; the fastest setting is chosen.
        latency_ms: Allowed mean latency of an image at batch size 1; the most accurate setting is chosen.
        confidence: Name of a confidence measure, or `auto` for the best on these images.
        average: See `Policy.average`, or `auto` for the best on these images.
        progress: Called with the images done and their number.

    Raises:
        ConfigError: Not exactly one goal, no setting meets it, or an unknown measure or average.
    """
    check_known("--confidence", confidence, (AUTO, *CONFIDENCE_MEASURES))
    check_known("--average", average, (AUTO, *get_args(Average)))
    check_goal(max_accuracy_drop, latency_ms)
    logits = engine.logits(images, progress=progress)
    stages = stage_ms(engine, images[:1])
    return choose(
        logits,
        labels,
        stages,
        confidence=confidence,
        average=average,
        max_accuracy_drop=max_accuracy_drop,
        latency_ms=latency_ms,
    )


def check_goal(max_accuracy_drop: float | None, latency_ms: float | None) -> None:
    """Check that exactly one goal is given.

    Raises:
        ConfigError: None or both are.
    """
    if (max_accuracy_drop is None) == (latency_ms is None):
        raise ConfigError("exactly one goal is needed", fix="give --max-accuracy-drop 0.3 (points) or --latency-ms 2.5")


def save_tuned(folder: Path, tuned: Tuned, provenance: Mapping[str, Any], *, digest: str) -> None:
    """Write the policy, the curve and their provenance into an engine's manifest.

    Args:
        folder: The engine folder.
        tuned: Result of `tune`.
        provenance: Goal, number of images and fingerprint of the data.
        digest: Digest of the manifest when the engine was opened.

    Raises:
        ArtifactError: The manifest has changed since: the thresholds belong to an engine that no longer exists.
    """
    manifest = read_manifest(folder)
    if manifest.digest != digest:
        raise ArtifactError(f"{folder} was rewritten while it was being tuned", fix="tune it again")
    facts = {k: v for k, v in vars(tuned).items() if k not in ("policy", "curve")}
    metadata = dataclasses.replace(manifest.metadata, policy=tuned.policy)
    tuning = Tuning(**facts, **provenance)
    kept = dataclasses.replace(manifest, metadata=metadata, curve=tuned.curve, tuning=tuning, certificate=None)
    write_manifest(folder, kept)


def stage_ms(engine: Engine, image: Array, *, rounds: int = 20) -> tuple[float, ...]:
    """Return the milliseconds of each stage at batch size 1, from the manifest or else measured now.

    Args:
        engine: The engine.
        image: One image (1, 3, H, W) to measure with.
        rounds: Number of measurements, of which the median is returned.
    """
    if engine.manifest and "1" in engine.manifest.stage_ms:
        return engine.manifest.stage_ms["1"]
    stages = [engine.stage(k) for k in range(len(engine.metadata.exits))]
    samples = np.empty((rounds + 3, len(stages)))  # the first three warm up
    for times in samples:
        xs: list[npt.NDArray[Any]] = [image]
        for k, stage in enumerate(stages):
            start = time.perf_counter()
            _, *xs = stage(*xs)
            times[k] = (time.perf_counter() - start) * 1000
    return tuple(np.median(samples[3:], axis=0).tolist())


@dataclass(frozen=True)
class PathPoint:
    """One setting of a path, and its result on the path images.

    Attributes:
        policy: The policy.
        latency_ms: Mean latency of an image at batch size 1, from the stages' times.
        loss: Mean loss against the same policy without early exit.
        shares: Share of the images that take each exit, 0..1.
    """

    policy: Policy
    latency_ms: float
    loss: float
    shares: tuple[float, ...]


def changed(answers: Labels, reference: Labels) -> npt.NDArray[np.bool_]:
    """Return the loss 1 of each image (N,) whose answer is not the reference's."""
    return np.not_equal(answers, reference)


def threshold_path(
    logits: Array,
    labels: Labels | None,
    stages: tuple[float, ...],
    *,
    loss: Loss = changed,
    confidence: str = AUTO,
    average: str = AUTO,
    points: int = PATH_POINTS,
) -> tuple[PathPoint, ...]:
    """Find settings from the safest to the fastest, to be tested in this order on other images.

    All of them have the same answers without early exit.

    Args:
        logits: Logits (E, N, C) of all exits for the path images.
        labels: Their class indices (N,), for the temperatures and pooling weights; None to fit the last exit's answers.
        stages: Milliseconds of each stage at batch size 1.
        loss: The loss to keep low.
        confidence: Name of a confidence measure, or `auto` to choose on these images.
        average: See `Policy.average`; `auto` chooses between `own` and `geometric`, whose answers without early exit
            are the last exit's.
        points: Largest number of settings.

    Returns:
        The settings, slowest first. The first never exits early, and its loss is 0; of the others each is faster than
        the one before.

    Raises:
        ConfigError: Unknown measure or average.
    """
    targets = logits[-1].argmax(axis=1) if labels is None else labels
    averages = ("own", "geometric") if average == AUTO else (average,)
    paths = []
    for family in _families(logits, targets, stages, averages, confidence):
        reference = family.answers[-1]
        losses = family.mean(np.stack([loss(answers, reference) for answers in family.answers]))
        paths.append((_mean_latency_ms(losses, family.latency_ms, len(reference)), family, losses))
    _, family, losses = min(paths, key=lambda path: path[0])
    faster = np.flatnonzero(np.diff(family.latency_ms, prepend=np.inf) < 0)
    times = family.latency_ms[faster]
    even = np.linspace(times[0], times[-1], min(len(faster), points))
    kept = np.unique(np.abs(times - even[:, None]).argmin(axis=1))
    return tuple(
        PathPoint(family.policy_of(i), float(family.latency_ms[i]), float(losses[i]), tuple(family.shares[i].tolist()))
        for i in faster[kept]
    )


def _mean_latency_ms(losses: Floats, latency_ms: Floats, count: int) -> float:
    """Return the latency within a bound of the loss, averaged over bounds; the loss has a standard error as margin."""
    safest = losses + np.sqrt(np.maximum(losses, 0) / count)
    return float(np.mean([latency_ms[safest <= bound].min() for bound in (0.0025, 0.005, 0.01, 0.02, 0.04)]))


@dataclass(frozen=True, eq=False)
class _Family:
    """The settings of one confidence measure and average, from never to always at the first exit.

    Attributes:
        policy: The policy, without thresholds.
        thresholds: Thresholds (S, E - 1).
        answers: Answers (E, N) of every exit.
        taken: The exit (S, N) of every image.
        shares: Share (S, E) of the images that take each exit.
        latency_ms: Mean latency (S,).
    """

    policy: Policy
    thresholds: Array
    answers: Labels
    taken: npt.NDArray[np.int8]
    shares: Floats
    latency_ms: Floats

    def mean(self, table: npt.NDArray[Any]) -> Floats:
        """Return the mean (S,) over the images of what `table` (E, N) has for them at the exit that they take."""
        return np.asarray(table[self.taken, np.arange(table.shape[1])].mean(axis=1))

    def policy_of(self, setting: int) -> Policy:
        return dataclasses.replace(self.policy, thresholds=tuple(self.thresholds[setting].tolist()))


def _families(
    logits: Array,
    targets: Labels,
    stages: tuple[float, ...],
    averages: Sequence[str],
    confidence: str,
    *,
    combine: bool = False,
) -> Iterator[_Family]:
    """Yield the settings of each average and confidence measure, with `combine` those of `threshold_grid` too."""
    check_known("--confidence", confidence, (AUTO, *CONFIDENCE_MEASURES))
    measures = MEASURES if confidence == AUTO else (confidence,)
    temperatures = tuple(fit_temperature(exit_logits, targets) for exit_logits in logits)
    for average in averages:
        check_known("--average", average, get_args(Average))
        pooling = fit_pooling(logits, targets, temperatures) if average == "geometric" else ()
        policy = Policy(temperatures, average=cast(Average, average), pooling=pooling)
        every, answers = at_every_exit(logits, policy, measures)
        losses = (answers != answers[-1]).astype(np.float64)
        for measure, confidences in zip(measures, every):
            thresholds = candidate_thresholds(confidences, losses, stages)
            if combine:
                thresholds = np.concatenate([thresholds, threshold_grid(confidences)])
            taken = exits_taken(confidences, thresholds)
            shares = np.stack([(taken == exit).mean(axis=1) for exit in range(len(logits))], axis=1)
            named = dataclasses.replace(policy, confidence=measure)
            yield _Family(named, thresholds, answers, taken, shares, shares @ np.cumsum(stages))


def choose(
    logits: Array,
    labels: Labels,
    stages: tuple[float, ...],
    *,
    confidence: str = AUTO,
    average: str = AUTO,
    reference: npt.NDArray[np.bool_] | None = None,
    max_accuracy_drop: float | None = None,
    latency_ms: float | None = None,
) -> Tuned:
    """Choose a policy for one of the two goals; needs no engine.

    Args:
        logits: Logits (E, N, C) of all exits.
        labels: Class indices (N,).
        stages: Milliseconds of each stage at batch size 1.
        confidence: See `tune`.
        average: See `tune`.
        reference: Mask (N,) of the images that are right without early exit; default: `right_without_early_exit`.
        max_accuracy_drop: See `tune`.
        latency_ms: See `tune`.

    Raises:
        ConfigError: No setting meets the goal, or an unknown measure or average.
    """
    if reference is None:
        reference = right_without_early_exit(logits, labels)
    averages = _averages(logits, labels) if average == AUTO else (average,)
    families = list(_families(logits, labels, stages, averages, confidence, combine=True))
    right = [family.answers == labels for family in families]
    count = len(labels)
    grid = _Grid(
        np.concatenate([family.latency_ms for family in families]),
        np.concatenate([family.mean(mask) for family, mask in zip(families, right)]) * count,
        np.concatenate([family.mean(mask != reference) for family, mask in zip(families, right)]) * count,
    )
    if latency_ms is not None:
        best = _within_latency(grid, latency_ms)
    else:
        assert max_accuracy_drop is not None, "one goal"
        best = _within_drop(grid, int(reference.sum()), count, max_accuracy_drop)
    sizes = [len(family.latency_ms) for family in families]
    which = int(np.searchsorted(np.cumsum(sizes), best, side="right"))
    family, accuracy = families[which], families[which].mean(right[which])
    chosen = _trade_off(family, accuracy, best - sum(sizes[:which]))
    return Tuned(
        dataclasses.replace(family.policy, thresholds=chosen.thresholds),
        accuracy=chosen.accuracy,
        accuracy_error=float(np.sqrt(grid.differing[best]) / count),
        reference_accuracy=float(reference.mean()),
        ensemble_accuracy=float((ensemble(logits).argmax(axis=1) == labels).mean()),
        latency_ms=chosen.latency_ms,
        shares=chosen.shares,
        curve=_curve(family, accuracy),
    )


def _averages(logits: Array, labels: Labels) -> tuple[str, ...]:
    """Return the averages to compare: those with the more accurate answers where no image exits early.

    The ensemble and the last exit have to differ by more than one standard error. Otherwise the worse of them would be
    chosen where it has luck.
    """
    ensemble_right, final_right = _right(logits, labels)
    gain = np.count_nonzero(ensemble_right) - np.count_nonzero(final_right)
    if gain**2 <= np.count_nonzero(ensemble_right != final_right):
        return get_args(Average)
    return ("mean",) if gain > 0 else ("own", "geometric")


def _right(logits: Array, labels: Labels) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Return the masks (N,) of correct answers of the ensemble and of the last exit."""
    return ensemble(logits).argmax(axis=1) == labels, logits[-1].argmax(axis=1) == labels


def is_mean_better(logits: Array, labels: Labels) -> bool:
    """Return True if the mean of the exits has more correct answers than the last exit, by two standard errors."""
    ensemble_right, final_right = _right(logits, labels)
    gain = np.count_nonzero(ensemble_right) - np.count_nonzero(final_right)
    return bool(gain > 2 * np.sqrt(np.count_nonzero(ensemble_right != final_right)) > 0)


def right_without_early_exit(logits: Array, labels: Labels) -> npt.NDArray[np.bool_]:
    """Return the mask (N,) of correct answers of the last exit or of the ensemble, whichever has more."""
    ensemble_right, final_right = _right(logits, labels)
    return np.asarray(max(final_right, ensemble_right, key=np.count_nonzero))


@dataclass(frozen=True, eq=False)
class _Grid:
    """The settings of all families: mean latency, images that are right, and images that only one of setting and
    reference has right (all (S,))."""

    latency_ms: Floats
    correct: Floats
    differing: Floats


def _within_drop(grid: _Grid, target: int, count: int, drop: float) -> int:
    """Return the index of the fastest setting that meets the bound `drop` with a margin of one standard error."""
    least = target - drop / 100 * count - 1e-6
    safest = grid.correct - np.sqrt(grid.differing)
    if grid.correct.max() < least:
        best = (target - grid.correct.max()) / count * 100
        raise ConfigError(
            f"no thresholds keep within {drop:g} points of the network without early exit; the best loses {best:.2f}",
            fix=f"give --max-accuracy-drop {np.ceil(best * 100) / 100:g}, or train longer",
        )
    if safest.max() >= least:
        return _first(grid.latency_ms, among=safest >= least)
    log.warning("%d images are too few to guarantee %g points; the safest thresholds are chosen", count, drop)
    return _first(-safest, grid.latency_ms, among=grid.correct >= least)


def _within_latency(grid: _Grid, limit: float) -> int:
    """Return the index of the most accurate setting within `limit` milliseconds."""
    if grid.latency_ms.min() > limit + 1e-9:
        raise ConfigError(
            f"no thresholds keep within {limit:g} ms; the fastest take {grid.latency_ms.min():.3f} ms",
            fix="allow more, or compile with --recipe int8",
        )
    return _first(-grid.correct, grid.latency_ms, among=grid.latency_ms <= limit + 1e-9)


def _first(*keys: Floats, among: npt.NDArray[np.bool_]) -> int:
    """Return the index with the smallest first key (ties: second key, and so on) where `among` is True."""
    indices = np.flatnonzero(among)
    return int(indices[np.lexsort([key[indices] for key in reversed(keys)])[0]])


def _curve(family: _Family, accuracy: Floats) -> tuple[CurvePoint, ...]:
    best, front = -1.0, []
    for i in np.lexsort([-accuracy, family.latency_ms]).tolist():
        if accuracy[i] > best:
            best = accuracy[i]
            front.append(i)
    spread = np.linspace(0, len(front) - 1, min(len(front), CURVE_POINTS)).round().astype(int)
    return tuple(_trade_off(family, accuracy, front[i]) for i in spread)


def _trade_off(family: _Family, accuracy: Floats, i: int) -> CurvePoint:
    return CurvePoint(
        accuracy=float(accuracy[i]),
        latency_ms=float(family.latency_ms[i]),
        thresholds=family.policy_of(i).thresholds,
        shares=tuple(family.shares[i].tolist()),
    )
