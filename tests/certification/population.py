"""A synthetic population of images that a four-exit network classifies, easy and hard ones."""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import numpy.typing as npt

from edgekd.certification.losses import Sample
from edgekd.policy import Policy

CLASSES = ("a", "b", "c", "d", "e")
Indices = npt.NDArray[np.int64]
EXITS, SIZE = 4, 40_000


@functools.cache
def population(seed: int = 0) -> Sample:
    """Logits that get better with depth, 1 in 20 of the labels wrong; groups of 1 to 8 images that hang together."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(SIZE), rng.integers(1, 9, SIZE))[:SIZE]
    labels = rng.integers(0, 5, SIZE)
    ease = rng.gamma(2, 2.2, groups.max() + 1)[groups] * rng.uniform(0.8, 1.2, SIZE)
    shared, signal = rng.normal(size=(SIZE, 5)), ease[:, None] * np.eye(5)[labels]
    logits = [signal * (0.7 + 0.15 * k) + shared + rng.normal(size=(SIZE, 5)) * (1.3 - 0.25 * k) for k in range(EXITS)]
    return Sample(np.float32(logits), np.where(rng.random(SIZE) < 0.05, (labels + 1) % 5, labels), groups)


def path(thresholds: tuple[float, ...]) -> tuple[Policy, ...]:
    """Policies from no early exit to one threshold for all exits that many images reach."""
    base = Policy((1.0,) * EXITS).without_early_exit()
    return (base, *(dataclasses.replace(base, thresholds=(t,) * (EXITS - 1)) for t in thresholds))


def rows(rng: np.random.Generator, count: int, *, groups: bool = False) -> tuple[Indices, Indices | None]:
    """Draw images independently, or (about `count`) images of groups that are drawn independently, with their group."""
    if not groups:
        return rng.integers(0, SIZE, count), None
    starts = np.searchsorted(of := groups_of_images(), np.arange(of.max() + 2))
    chosen = rng.integers(0, len(starts) - 1, round(count / 4.5))
    drawn = np.concatenate([np.arange(starts[g], starts[g + 1]) for g in chosen])
    return drawn, np.repeat(np.arange(len(chosen)), starts[chosen + 1] - starts[chosen])  # drawn twice: two groups


def groups_of_images() -> Indices:
    groups = population().groups
    assert groups is not None
    return groups


def draw(rng: np.random.Generator, count: int, *, groups: bool = False) -> Sample:
    """Draw a sample; see `rows`."""
    images, named = rows(rng, count, groups=groups)
    return dataclasses.replace(population().take(images), groups=named)
