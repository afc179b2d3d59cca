"""The gain of the cascade over the plain network, measured on this machine: both in one process, in turns.

Other processes only ever add time, so each batch counts with the least time of its rounds.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekd.compiler.whole_graphs import with_graphs
from edgekd.policy import Policy
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import Engine
from edgekd.types import Array

SIZES = (1, 32)
"""Batch sizes at which a tuned engine must not be slower than the plain network."""
TOLERANCE = 0.02
"""A ratio of times that is nearer to 1 is taken as equal where equal is enough."""
UNCLEAR = 0.1
"""Width of an interval around 1 from which on nothing is decided by it."""
ROUNDS = 9
"""Least number of rounds."""
SECONDS = 2.0
"""Seconds for which one batch size is measured, or longer if the rounds take longer."""
PATIENCE = 5
"""As many times as long is measured on a busy machine, until it is clear which one is faster."""
RESAMPLES = 200
IMAGES = 512
"""Images whose exits are looked up to choose the ones to measure with."""


@dataclass(frozen=True)
class Ratio:
    """Times of the cascade and of the plain network at one batch size.

    Attributes:
        cascade_ms: Mean milliseconds of a batch in the cascade.
        plain_ms: The same with the final graph.
        ratio: The cascade's time over the plain network's.
        low: Lower end of its 95 % interval, by bootstrap over the rounds.
        high: Upper end.
    """

    cascade_ms: float
    plain_ms: float
    ratio: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """False if disturbances were so large that either may be the faster one."""
        return not self.low <= 1 <= self.high or self.high - self.low < UNCLEAR


@dataclass(frozen=True)
class Gain:
    """Gain of the exits of an engine under a policy.

    Attributes:
        by_size: Batch size to the measurement.
    """

    by_size: dict[int, Ratio]

    @property
    def pays(self) -> bool:
        """True if the cascade is clearly faster on single images, and in batches not slower than the plain network."""
        return all(
            r.high < 1 if size == 1 else r.low <= 1 and r.ratio <= 1 + TOLERANCE for size, r in self.by_size.items()
        )

    @property
    def is_clear(self) -> bool:
        """False if the machine was too busy to tell which one is faster."""
        return all(ratio.is_clear for ratio in self.by_size.values())

    def __str__(self) -> str:
        parts = [
            f"batch {size}: {r.cascade_ms:.2f} ms, plain {r.plain_ms:.2f} ms, ratio {r.ratio:.2f} "
            f"[{r.low:.2f}, {r.high:.2f}]"
            for size, r in self.by_size.items()
        ]
        return "; ".join(parts)


def measure_gain(
    engine: Engine,
    folder: Path,
    policy: Policy,
    images: Array,
    *,
    sizes: tuple[int, ...] = SIZES,
    seconds: float = SECONDS,
) -> Gain:
    """Time the cascade under a policy against the final graph, in turns on the same images.

    Args:
        engine: The engine.
        folder: Its folder, from whose network the final graph is built if the engine has none.
        policy: The policy of the cascade, with thresholds.
        images: Preprocessed images (N, 3, H, W) like those that the engine will see: the shares of the exits count.
        sizes: Batch sizes.
        seconds: Seconds for each batch size.

    Raises:
        ArtifactError, BackendError: See `write_with_graphs`.
    """
    images = images[np.linspace(0, len(images) - 1, min(len(images), IMAGES)).round().astype(int)]
    with with_graphs(engine, folder, ["final"]) as plain:
        classifiers = Classifier(engine, policy=policy), Classifier(plain, strategy="final", policy=policy)
        by_exit = np.argsort(classifiers[0].run(images).exits, kind="stable")
        return Gain({size: _ratio(classifiers, images[by_exit], size, seconds) for size in sizes})


def _ratio(classifiers: tuple[Classifier, ...], images: Array, size: int, seconds: float) -> Ratio:
    warm_up = _queries(images, size, count=2)
    start = time.perf_counter()
    for query in warm_up:
        _times(classifiers, query, first=0)
    one = (time.perf_counter() - start) / len(warm_up)
    queries = _queries(images, size, count=int(np.clip(seconds / ROUNDS / one, max(2, 16 // size), len(images))))
    rounds: list[npt.NDArray[np.float64]] = []
    start = time.perf_counter()
    while True:
        turns = [_times(classifiers, query, first=(len(rounds) + i) % 2) for i, query in enumerate(queries)]
        rounds.append(np.array(turns))
        spent = time.perf_counter() - start
        if len(rounds) >= ROUNDS and spent >= seconds:
            ratio = _of_rounds(np.stack(rounds))
            if ratio.is_clear or spent >= PATIENCE * seconds:
                return ratio


def _of_rounds(times: npt.NDArray[np.float64]) -> Ratio:
    """Compare the seconds (rounds, queries, 2) of cascade and plain network."""
    cascade_ms, plain_ms = 1e3 * times.min(axis=0).mean(axis=0)
    drawn = np.random.default_rng(0).integers(len(times), size=(RESAMPLES, len(times)))
    means = np.stack([times[rows].min(axis=0).mean(axis=0) for rows in drawn])
    low, high = np.quantile(means[:, 0] / means[:, 1], [0.025, 0.975])
    return Ratio(float(cascade_ms), float(plain_ms), float(cascade_ms / plain_ms), float(low), float(high))


def _queries(images: Array, size: int, *, count: int) -> list[Array]:
    """Return batches in which the exits have the shares that they have in `images`, which are sorted by exit."""
    rows = np.linspace(0, len(images) - 1, size * count).round().astype(int).reshape(size, count)
    return [np.ascontiguousarray(images[rows[:, i]]) for i in range(count)]


def _times(classifiers: tuple[Classifier, ...], query: Array, *, first: int) -> list[float]:
    """Return the seconds of each classifier for one batch."""
    seconds = [0.0, 0.0]
    for i in (first, 1 - first):
        start = time.perf_counter()
        classifiers[i].run(query)
        seconds[i] = time.perf_counter() - start
    return seconds
