"""Temperatures and exit thresholds from validation images, on the compiled engine.

Many settings are compared on some hundred images, so the fastest that just keeps a bound there owes it partly to
luck and breaks it on new images. Two things hold against it: a coarse grid (a dozen thresholds for each of three
exits), and a bound that the drop has to keep with one standard error added: the square root of the number of
images that only one of cascade and ensemble gets right. In simulations with 300 and 810 images and 0.3 points
allowed, the mean drop on new images was 0.3 points this way; with ten times the settings and no margin it was 0.8.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.manifest import CurvePoint, Tuning, read_manifest, write_manifest
from edgekd.errors import ArtifactError, ConfigError, check_known
from edgekd.policy import NEVER_EXIT, Average, Measure, Policy, decide, ensemble
from edgekd.runtime.engine import Engine
from edgekd.types import Array, Progress

log = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
SETTINGS = 2000
"""Settings tried at most (unless there are more than eleven exits: 2 thresholds are tried for each)."""
CURVE_POINTS = 25


@dataclass(frozen=True)
class Tuned:
    """Thresholds and what they cost on the validation images.

    accuracy, ensemble_accuracy: 0..1. accuracy_error: standard error of the difference between the two.
    latency_ms: mean over the images of their stages' times at batch 1. shares: how many leave at each exit, 0..1.
    curve: settings of which no other is faster and as accurate, fast to slow; at most CURVE_POINTS.
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
    confidence: Measure = "max_probability",
    average: Average = "mean",
    progress: Progress | None = None,
) -> Tuned:
    """Fit a temperature per exit and choose thresholds.

    images: (N, 3, H, W) of the validation split, labels: (N,).
    max_accuracy_drop: points below the ensemble's accuracy; the fastest setting within is taken.
    latency_ms: expected milliseconds an image at batch 1; the most accurate setting within is taken.

    Raises:
        ConfigError: not exactly one of the two, none of the settings reaches it, or an unknown confidence or average.
    """
    check_known("confidence", confidence, get_args(Measure))
    check_known("average", average, get_args(Average))
    if (max_accuracy_drop is None) == (latency_ms is None):
        raise ConfigError("one goal is needed", fix="give --max-accuracy-drop 0.3 (points) or --latency-ms 2.5")
    logits = _logits(engine, images, progress)
    stages = stage_ms(engine, images[:1])
    temperatures = tuple(fit_temperature(found, labels) for found in logits)
    base = Policy(temperatures, confidence=confidence, average=average)
    return choose(logits, labels, stages, policy=base, max_accuracy_drop=max_accuracy_drop, latency_ms=latency_ms)


def _logits(engine: Engine, images: Array, progress: Progress | None, *, batch: int = 32) -> Array:
    found = []
    for start in range(0, len(images), batch):
        found.append(engine.logits(images[start : start + batch]))
        if progress:
            progress(min(start + batch, len(images)), len(images))
    return np.concatenate(found, axis=1)


def save_tuned(folder: Path, tuned: Tuned, provenance: Mapping[str, Any], *, digest: str) -> None:
    """Write the thresholds, the curve and `provenance` (what was asked, on which images) into the manifest.

    digest: the manifest's when the engine was opened.

    Raises:
        ArtifactError: it is another by now: the thresholds were found on an engine that is gone.
    """
    manifest = read_manifest(folder)
    if manifest.digest != digest:
        raise ArtifactError(f"{folder} was written anew while it was tuned", fix="tune it again")
    facts = {k: v for k, v in vars(tuned).items() if k not in ("policy", "curve")}
    metadata = dataclasses.replace(manifest.metadata, policy=tuned.policy)
    tuning = Tuning(**facts, **provenance)
    write_manifest(folder, dataclasses.replace(manifest, metadata=metadata, curve=tuned.curve, tuning=tuning))


def stage_ms(engine: Engine, image: Array, *, rounds: int = 20) -> tuple[float, ...]:
    """Milliseconds of each stage at batch 1: the manifest's, else measured now (medians) on `image` (1, 3, H, W)."""
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
    """The temperature in 0.25..10 with the least negative log-likelihood, by golden section on its logarithm."""

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
class Grid:
    """S settings: thresholds (S, E-1), images answered right (S,), images that only one of setting and ensemble
    answers right (S,), mean milliseconds (S,), and the share that leaves at each exit (S, E).
    """

    thresholds: Floats
    right: Floats
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
    """The thresholds for one of the two goals, from logits (E, N, C) and stage times; pure numpy, see `tune`."""
    ensemble_right = ensemble(logits).argmax(axis=1) == labels
    grid = _grid(logits, labels, stages, policy, ensemble_right)
    count, target = len(labels), int(ensemble_right.sum())
    if latency_ms is not None:
        pick = _within_latency(grid, latency_ms)
    else:
        assert max_accuracy_drop is not None, "one goal"
        pick = _within_drop(grid, target, count, max_accuracy_drop)
    return Tuned(
        dataclasses.replace(policy, thresholds=tuple(grid.thresholds[pick].tolist())),
        accuracy=float(grid.right[pick] / count),
        accuracy_error=float(np.sqrt(grid.differing[pick]) / count),
        ensemble_accuracy=target / count,
        latency_ms=float(grid.latency_ms[pick]),
        shares=tuple(grid.shares[pick].tolist()),
        curve=_curve(grid, count),
    )


def _within_drop(grid: Grid, target: int, count: int, drop: float) -> int:
    least = target - drop / 100 * count - 1e-6
    safest = grid.right - np.sqrt(grid.differing)
    if grid.right.max() < least:
        best = (target - grid.right.max()) / count * 100
        raise ConfigError(
            f"no thresholds keep within {drop:g} points of the ensemble; the best loses {best:.2f}",
            fix=f"give --max-accuracy-drop {np.ceil(best * 100) / 100:g}, or train longer",
        )
    if safest.max() >= least:
        return _first(grid.latency_ms, among=safest >= least)
    log.warning("%d images are too few to be sure of %g points; the safest thresholds are taken", count, drop)
    return _first(-safest, grid.latency_ms, among=grid.right >= least)


def _within_latency(grid: Grid, limit: float) -> int:
    if grid.latency_ms.min() > limit + 1e-9:
        raise ConfigError(
            f"no thresholds keep within {limit:g} ms; the fastest take {grid.latency_ms.min():.3f} ms",
            fix="allow more, or compile with --recipe int8",
        )
    return _first(-grid.right, grid.latency_ms, among=grid.latency_ms <= limit + 1e-9)


def _first(*keys: Floats, among: npt.NDArray[np.bool_]) -> int:
    """The index with the least first key (then second …) among the marked."""
    indices = np.flatnonzero(among)
    return int(indices[np.lexsort([key[indices] for key in reversed(keys)])[0]])


def _grid(
    logits: Array, labels: Labels, stages: tuple[float, ...], policy: Policy, ensemble_right: npt.NDArray[np.bool_]
) -> Grid:
    exits, count, _ = logits.shape
    confidences, right = _exits(logits, labels, policy)
    tries = max(2, int(min(50, SETTINGS ** (1 / max(exits - 1, 1)) + 1e-9)))
    reach = np.ones((1, count), np.float32)  # for each setting so far, who comes as far as this exit
    thresholds, shares = np.empty((1, 0)), np.empty((1, 0))
    sums = np.zeros((3, 1))  # right, differing, images x milliseconds
    for exit in range(exits):
        tried = _candidates(confidences[exit], tries if exit < exits - 1 else 1)
        exited = (confidences[exit] >= tried[:, None]).astype(np.float32)  # (tried, N)
        facts = [right[exit], right[exit] != ensemble_right, np.full(count, sum(stages[: exit + 1]))]
        sums = np.stack([(s[:, None] + reach @ (exited * fact).T).ravel() for s, fact in zip(sums, facts)])
        shares = _crossed(shares, (reach @ exited.T / count).ravel())
        thresholds = _crossed(thresholds, np.tile(tried, len(reach)))
        reach = (reach[:, None] * (1 - exited)).reshape(-1, count)
    return Grid(thresholds[:, :-1], sums[0], sums[1], sums[2] / count, shares)


def _crossed(table: Floats, column: npt.NDArray[np.floating[Any]]) -> Floats:
    """Every row of the table (S, C) repeated as often as the column (S * K,) has values for it: (S * K, C + 1)."""
    return np.column_stack([np.repeat(table, len(column) // len(table), axis=0), column])


def _exits(logits: Array, labels: Labels, policy: Policy) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Confidence and correctness (E, N) of every exit, were all images to come there."""
    policy = dataclasses.replace(policy, thresholds=(NEVER_EXIT,) * (len(logits) - 1))
    total, steps = np.zeros_like(logits[0]), []
    for exit, found in enumerate(logits):
        steps.append(decide(policy, exit, found, total))
        total = steps[-1].total
    right = [seen.probabilities.argmax(axis=1) == labels for seen in steps]
    return np.stack([seen.confidence for seen in steps]), np.stack(right)


def _candidates(confidences: Array, tries: int) -> Array:
    """Always, some quantiles, never. More of them low: whom a late exit sees is unsure already."""
    quantiles = np.linspace(0, 1, tries)[1:-1] ** 2
    return np.array([0.0, *np.quantile(confidences, quantiles), NEVER_EXIT][:tries], np.float32)


def _curve(grid: Grid, count: int) -> tuple[CurvePoint, ...]:
    best, front = -1.0, []
    for i in np.lexsort([-grid.right, grid.latency_ms]).tolist():
        if grid.right[i] > best:
            best = grid.right[i]
            front.append(i)
    spread = np.linspace(0, len(front) - 1, min(len(front), CURVE_POINTS)).round().astype(int)
    return tuple(_point(grid, front[i], count) for i in spread)


def _point(grid: Grid, i: int, count: int) -> CurvePoint:
    return CurvePoint(
        accuracy=float(grid.right[i] / count),
        latency_ms=float(grid.latency_ms[i]),
        thresholds=tuple(grid.thresholds[i].tolist()),
        shares=tuple(grid.shares[i].tolist()),
    )
