"""Fit temperatures and exit thresholds on validation images, on the compiled engine.

Many combinations of thresholds are compared on a few hundred images, so the fastest one that just meets the bound owes
that partly to luck, and misses it on new images. Two measures counter this: a coarse grid (a dozen thresholds for each
of three exits), and a margin of one standard error: the square root of the number of images that only one of cascade
and ensemble classifies correctly. In simulations with 300 and 810 images and an allowed drop of 0.3 points, the mean
drop on new images was 0.3 points; with ten times as many combinations and no margin it was 0.8.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.manifest import CurvePoint, Tuning, read_manifest, write_manifest
from edgekd.confidence import CONFIDENCE_MEASURES
from edgekd.errors import ArtifactError, ConfigError, check_known
from edgekd.policy import NEVER_EXIT, Average, Policy, decide, ensemble, simulate
from edgekd.runtime.engine import Engine
from edgekd.types import Array, Labels, Progress

log = logging.getLogger(__name__)

Floats = npt.NDArray[np.float64]
Loss: TypeAlias = Callable[[Labels, Labels], npt.NDArray[Any]]
"""Maps answers (N,) and reference answers (N,) to the loss of each image (N,), 0 where they are the same."""
PATH_POINTS = 60
"""Largest number of settings in a path."""
COMBINATIONS = 2000
"""Largest number of threshold combinations tried (exceeded with more than eleven exits: two thresholds for each)."""
CURVE_POINTS = 25
AUTO = "auto"
"""As a confidence measure or average: choose it on the images."""


@dataclass(frozen=True)
class Tuned:
    """The chosen thresholds and their result on the validation images.

    Attributes:
        policy: Policy with the fitted temperatures and chosen thresholds.
        accuracy: Accuracy of the cascade, 0..1.
        accuracy_error: Standard error of the difference between `accuracy` and `ensemble_accuracy`.
        ensemble_accuracy: Accuracy of the mean of all exits, 0..1.
        latency_ms: Mean latency of an image at batch size 1, from the stages' times.
        shares: Share of the images that take each exit, 0..1.
        curve: Pareto front of accuracy and latency, fast to slow; at most CURVE_POINTS.
    """

    policy: Policy
    accuracy: float
    accuracy_error: float
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
    confidence: str = "max_probability",
    average: Average = "mean",
    progress: Progress | None = None,
) -> Tuned:
    """Fit a temperature for each exit and choose thresholds.

    Args:
        engine: The compiled engine; nothing is written to it.
        images: Validation images (N, 3, H, W), preprocessed.
        labels: Their class indices (N,).
        max_accuracy_drop: Allowed loss against the ensemble, in percentage points; the fastest combination is chosen.
        latency_ms: Allowed mean latency of an image at batch size 1; the most accurate combination is chosen.
        confidence: Name of a confidence measure.
        average: See `Policy.average`.
        progress: Called with the images done and their number.

    Raises:
        ConfigError: Not exactly one goal, no combination meets it, or an unknown measure or average.
    """
    check_known("--confidence", confidence, CONFIDENCE_MEASURES)
    check_known("--average", average, get_args(Average))
    if (max_accuracy_drop is None) == (latency_ms is None):
        raise ConfigError("exactly one goal is needed", fix="give --max-accuracy-drop 0.3 (points) or --latency-ms 2.5")
    logits = _logits(engine, images, progress)
    stages = stage_ms(engine, images[:1])
    temperatures = tuple(fit_temperature(exit_logits, labels) for exit_logits in logits)
    policy = Policy(temperatures, confidence=confidence, average=average)
    return choose(logits, labels, stages, policy=policy, max_accuracy_drop=max_accuracy_drop, latency_ms=latency_ms)


def _logits(engine: Engine, images: Array, progress: Progress | None, *, batch: int = 32) -> Array:
    batches = []
    for start in range(0, len(images), batch):
        batches.append(engine.logits(images[start : start + batch]))
        if progress:
            progress(min(start + batch, len(images)), len(images))
    return np.concatenate(batches, axis=1)


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


def fit_temperature(logits: Array, labels: Labels) -> float:
    """Find the temperature in 0.25..10 with the least negative log-likelihood.

    Golden-section search on the logarithm of the temperature.

    Args:
        logits: Logits (N, C) of one exit.
        labels: Class indices (N,).

    Returns:
        The temperature; logits are divided by it.
    """

    def loss(at: float) -> float:
        scaled = logits.astype(np.float64) / np.exp(at)
        scaled -= scaled.max(axis=1, keepdims=True)
        return float((np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(labels)), labels]).sum())

    low, high, golden = np.log(0.25), np.log(10.0), (5**0.5 - 1) / 2
    while high - low > 1e-3:
        a, b = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


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
    """
    target = logits[-1].argmax(axis=1) if labels is None else labels
    temperatures = tuple(fit_temperature(exit_logits, target) for exit_logits in logits)
    measure: str = "max_probability" if confidence == AUTO else confidence
    policy = Policy(temperatures, confidence=measure, average="own" if average == AUTO else average)  # type: ignore[arg-type]
    policy = policy.without_early_exit()
    reference = simulate(logits, policy).probabilities.argmax(axis=1)
    settings = [policy]
    grid = _grid(logits, reference, stages, policy, np.ones(len(reference), bool))
    best = -1.0
    for i in np.lexsort([-grid.correct, grid.latency_ms]).tolist():
        if grid.correct[i] > best and grid.latency_ms[i] < sum(stages):
            best = grid.correct[i]
            settings.insert(1, dataclasses.replace(policy, thresholds=tuple(grid.thresholds[i].tolist())))
    spread = np.linspace(0, len(settings) - 1, min(len(settings), points)).round().astype(int)
    return tuple(_path_point(logits, settings[i], stages, reference, loss) for i in spread)


def _path_point(logits: Array, policy: Policy, stages: tuple[float, ...], reference: Labels, loss: Loss) -> PathPoint:
    decision = simulate(logits, policy)
    shares = np.bincount(decision.exits, minlength=len(stages)) / len(reference)
    mean = float(np.mean(loss(decision.probabilities.argmax(axis=1), reference)))
    return PathPoint(policy, float(shares @ np.cumsum(stages)), mean, tuple(shares.tolist()))


@dataclass(frozen=True)
class Grid:
    """Results of S combinations of thresholds for E exits.

    Attributes:
        thresholds: Thresholds (S, E - 1).
        correct: Number of images (S,) classified correctly.
        differing: Number of images (S,) that only one of cascade and ensemble classifies correctly.
        latency_ms: Mean latency (S,).
        shares: Share (S, E) of the images that take each exit.
    """

    thresholds: Floats
    correct: Floats
    differing: Floats
    latency_ms: Floats
    shares: Floats


def choose(
    logits: Array,
    labels: Labels,
    stages: tuple[float, ...],
    *,
    policy: Policy,
    max_accuracy_drop: float | None = None,
    latency_ms: float | None = None,
) -> Tuned:
    """Choose thresholds for one of the two goals; pure NumPy.

    Args:
        logits: Logits (E, N, C) of all exits.
        labels: Class indices (N,).
        stages: Milliseconds of each stage at batch size 1.
        policy: Temperatures, confidence measure and average to use.
        max_accuracy_drop: See `tune`.
        latency_ms: See `tune`.

    Raises:
        ConfigError: No combination meets the goal.
    """
    ensemble_correct = ensemble(logits).argmax(axis=1) == labels
    grid = _grid(logits, labels, stages, policy, ensemble_correct)
    count, target = len(labels), int(ensemble_correct.sum())
    if latency_ms is not None:
        best = _within_latency(grid, latency_ms)
    else:
        assert max_accuracy_drop is not None, "one goal"
        best = _within_drop(grid, target, count, max_accuracy_drop)
    chosen = _trade_off(grid, best, count)
    return Tuned(
        dataclasses.replace(policy, thresholds=chosen.thresholds),
        accuracy=chosen.accuracy,
        accuracy_error=float(np.sqrt(grid.differing[best]) / count),
        ensemble_accuracy=target / count,
        latency_ms=chosen.latency_ms,
        shares=chosen.shares,
        curve=_curve(grid, count),
    )


def _grid(
    logits: Array, labels: Labels, stages: tuple[float, ...], policy: Policy, ensemble_correct: npt.NDArray[np.bool_]
) -> Grid:
    """Evaluate every combination of candidate thresholds."""
    exits, count, _ = logits.shape
    confidences, correct = _at_every_exit(logits, labels, policy)
    differing = correct != ensemble_correct
    per_exit = max(2, int(min(50, COMBINATIONS ** (1 / max(exits - 1, 1)) + 1e-9)))
    candidates = [_candidates(confidences[exit], per_exit) for exit in range(exits - 1)]
    combinations = np.array(list(itertools.product(*candidates, [0.0])), np.float32)  # every image takes the last exit
    images = np.arange(count)

    def evaluate(thresholds: Array) -> tuple[int, int, npt.NDArray[np.int64]]:
        """Return the numbers of images that are correct, that differ from the ensemble, and that take each exit."""
        taken = (confidences >= thresholds[:, None]).argmax(axis=0)  # the first exit whose threshold is reached
        return (
            int(np.count_nonzero(correct[taken, images])),
            int(np.count_nonzero(differing[taken, images])),
            np.bincount(taken, minlength=exits),
        )

    right, other, takers = (np.array(column, np.float64) for column in zip(*map(evaluate, combinations)))
    latency_ms = (takers * np.cumsum(stages)).sum(axis=1) / count
    return Grid(combinations[:, :-1].astype(np.float64), right, other, latency_ms, takers / count)


def _at_every_exit(logits: Array, labels: Labels, policy: Policy) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the confidence (E, N) and correctness (E, N) of every image at every exit, as if none had exited."""
    policy = dataclasses.replace(policy, thresholds=(NEVER_EXIT,) * (len(logits) - 1))
    state, decisions = np.zeros_like(logits[0]), []
    for exit, exit_logits in enumerate(logits):
        decisions.append(decide(policy, exit, exit_logits, state))
        state = decisions[-1].state
    correct = [decision.probabilities.argmax(axis=1) == labels for decision in decisions]
    return np.stack([decision.confidence for decision in decisions]), np.stack(correct)


def _candidates(confidences: Array, count: int) -> Array:
    """Return the thresholds to try: always exit, some quantiles, never exit.

    Most quantiles are low, because the images at a late exit have a low confidence.
    """
    quantiles = np.linspace(0, 1, count)[1:-1] ** 2
    return np.array([0.0, *np.quantile(confidences, quantiles), NEVER_EXIT][:count], np.float32)


def _within_drop(grid: Grid, target: int, count: int, drop: float) -> int:
    """Return the index of the fastest combination that meets the bound `drop` with a margin of one standard error."""
    least = target - drop / 100 * count - 1e-6
    safest = grid.correct - np.sqrt(grid.differing)
    if grid.correct.max() < least:
        best = (target - grid.correct.max()) / count * 100
        raise ConfigError(
            f"no thresholds keep within {drop:g} points of the ensemble; the best loses {best:.2f}",
            fix=f"give --max-accuracy-drop {np.ceil(best * 100) / 100:g}, or train longer",
        )
    if safest.max() >= least:
        return _first(grid.latency_ms, among=safest >= least)
    log.warning("%d images are too few to guarantee %g points; the safest thresholds are chosen", count, drop)
    return _first(-safest, grid.latency_ms, among=grid.correct >= least)


def _within_latency(grid: Grid, limit: float) -> int:
    """Return the index of the most accurate combination within `limit` milliseconds."""
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


def _curve(grid: Grid, count: int) -> tuple[CurvePoint, ...]:
    best, front = -1.0, []
    for i in np.lexsort([-grid.correct, grid.latency_ms]).tolist():
        if grid.correct[i] > best:
            best = grid.correct[i]
            front.append(i)
    spread = np.linspace(0, len(front) - 1, min(len(front), CURVE_POINTS)).round().astype(int)
    return tuple(_trade_off(grid, front[i], count) for i in spread)


def _trade_off(grid: Grid, i: int, count: int) -> CurvePoint:
    return CurvePoint(
        accuracy=float(grid.correct[i] / count),
        latency_ms=float(grid.latency_ms[i]),
        thresholds=tuple(grid.thresholds[i].tolist()),
        shares=tuple(grid.shares[i].tolist()),
    )
