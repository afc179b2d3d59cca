"""Timing queries on the wall clock, and statistics of the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.types import Array

UNSTABLE = 0.025
"""Coefficient of variation above which a result counts as unstable."""
P99_FROM = 1000
"""Number of samples from which the 99th percentile is given."""
TURN = 10
"""Queries of one variant before switching to the next."""


@dataclass(frozen=True)
class Summary:
    """Latency of one query in milliseconds; intervals are 95 % bootstrap intervals.

    Attributes:
        n: Number of samples.
        mean: Mean.
        mean_interval: Interval of the mean.
        p50: Median.
        p50_interval: Interval of the median.
        p90: 90th percentile.
        p99: 99th percentile; None below `P99_FROM` samples.
        cv: Coefficient of variation of queries that did the same work (see `variation`).
    """

    n: int
    mean: float
    mean_interval: tuple[float, float]
    p50: float
    p50_interval: tuple[float, float]
    p90: float
    p99: float | None
    cv: float


def summarise(
    rounds: Sequence[Sequence[float]], *, exits: Sequence[Sequence[int]] = (), resamples: int = 400, seed: int = 0
) -> Summary:
    """Summarise samples without clipping any.

    The bootstrap draws processes first and samples within them second, so that differences between processes widen the
    intervals.

    Args:
        rounds: Samples of each process in ms.
        exits: Exit of each sample, if samples did different amounts of work.
        resamples: Number of bootstrap samples.
        seed: Seed of the bootstrap.
    """
    values = np.concatenate([np.asarray(r, np.float64) for r in rounds])
    means, medians = _bootstrap([np.asarray(r, np.float64) for r in rounds], resamples, seed)
    groups = np.concatenate(exits) if exits else np.zeros(len(values), int)
    return Summary(
        n=len(values),
        mean=float(values.mean()),
        mean_interval=_interval(means),
        p50=float(np.median(values)),
        p50_interval=_interval(medians),
        p90=float(np.quantile(values, 0.9)),
        p99=float(np.quantile(values, 0.99)) if len(values) >= P99_FROM else None,
        cv=variation(values, groups),
    )


def _bootstrap(
    rounds: list[npt.NDArray[np.float64]], resamples: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    means, medians = np.empty(resamples), np.empty(resamples)
    for i in range(resamples):
        chosen = rng.integers(len(rounds), size=len(rounds))
        draw = np.concatenate([rng.choice(rounds[r], size=len(rounds[r])) for r in chosen])
        means[i], medians[i] = draw.mean(), np.median(draw)
    return means, medians


def _interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def variation(values: npt.NDArray[np.float64], groups: npt.NDArray[np.integer[Any]]) -> float:
    """Divide the standard deviation around each group's own mean by the overall mean.

    Queries of a cascade take different exits on purpose; only the spread within an exit is noise.

    Args:
        values: Latencies (N,).
        groups: Group of each value (N,).
    """
    squares = sum(float(((v - v.mean()) ** 2).sum()) for v in (values[groups == g] for g in np.unique(groups)))
    return float(np.sqrt(squares / len(values)) / values.mean())


def time_queries(
    query: Callable[[Array], int], queries: Sequence[Array], *, seconds: float, count: int
) -> tuple[list[float], list[int]]:
    """Time `query` on one batch after the other, cycling through `queries`.

    A warm-up is a call whose result is discarded.

    Args:
        query: Classifies a batch and returns an exit.
        queries: Batches (B, 3, H, W).
        seconds: Minimum duration.
        count: Minimum number of queries.

    Returns:
        Latency of each query in ms, and what it returned.
    """
    clock = time.perf_counter_ns
    samples: list[float] = []
    exits: list[int] = []
    end = clock() + int(seconds * 1e9)
    while len(samples) < count or clock() < end:
        batch = queries[len(samples) % len(queries)]
        start = clock()
        exit_ = query(batch)
        samples.append((clock() - start) / 1e6)
        exits.append(exit_)
    return samples, exits


def time_interleaved(
    variants: Sequence[Callable[[Array], int]], queries: Sequence[Array], *, seconds: float
) -> tuple[tuple[float, ...], ...]:
    """Time several variants on the same queries, `TURN` queries each at a time.

    Other load on the machine slows all of them alike, so their ratio is more precise than that of two processes.

    Args:
        variants: Each classifies a batch and returns an exit.
        queries: Batches (B, 3, H, W).
        seconds: Minimum duration.

    Returns:
        Latencies of each variant in ms.
    """
    samples: list[list[float]] = [[] for _ in variants]
    end = time.perf_counter() + seconds
    while not samples[0] or time.perf_counter() < end:
        turn = [queries[(len(samples[0]) + i) % len(queries)] for i in range(TURN)]
        for variant, own in zip(variants, samples):
            own += time_queries(variant, turn, seconds=0, count=TURN)[0]
    return tuple(tuple(round(s, 4) for s in own) for own in samples)
