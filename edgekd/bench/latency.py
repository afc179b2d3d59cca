"""Timing queries on the wall clock, and what may be said of the samples."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.types import Array

UNSTABLE = 0.025
"""Coefficient of variation above which a result is called unstable."""
P99_FROM = 1000
"""Samples below which no 99th percentile is given."""
TURN = 10
"""Queries of one way of answering before it is the next one's turn."""


@dataclass(frozen=True)
class Summary:
    """Latency of one query in milliseconds; intervals are 95 % bootstrap ones. p99 is None below 1000 samples.

    cv: coefficient of variation of queries that did the same work (see `variation`).
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
    """Summary of samples (ms), one list a process; no sample is clipped.

    The bootstrap draws processes first and samples inside them second, so that what differs from process to process
    widens the interval. exits: where each sample left, when samples did different amounts of work.
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
    """Standard deviation around each group's own mean, over the overall mean.

    The queries of a cascade leave at different exits on purpose; only the spread among equals is noise.
    """
    squares = sum(float(((v - v.mean()) ** 2).sum()) for v in (values[groups == g] for g in np.unique(groups)))
    return float(np.sqrt(squares / len(values)) / values.mean())


def rotate(
    query: Callable[[Array], int], queries: Sequence[Array], *, seconds: float, count: int
) -> tuple[list[float], list[int]]:
    """Ask `query` for one batch after the other, around and around, until `seconds` passed and `count` were asked.

    Returns latencies (ms) and what each query returned. A warm-up is a call whose result is thrown away.
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


def take_turns(
    ways: Sequence[Callable[[Array], int]], queries: Sequence[Array], *, seconds: float
) -> tuple[tuple[float, ...], ...]:
    """Latencies (ms) of several ways on the same queries, some queries each at a time, until `seconds` passed.

    What else the machine does slows all of them alike, so their ratio is worth more than that of two processes.
    """
    samples: list[list[float]] = [[] for _ in ways]
    end = time.perf_counter() + seconds
    while not samples[0] or time.perf_counter() < end:
        turn = [queries[(len(samples[0]) + i) % len(queries)] for i in range(TURN)]
        for way, own in zip(ways, samples):
            own += rotate(way, turn, seconds=0, count=TURN)[0]
    return tuple(tuple(round(s, 4) for s in own) for own in samples)
