"""The gate's statistics: counts against scipy, its error rates summed over every outcome."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from edgekd.compiler.gate import ALPHA
from edgekd.compiler.mcnemar import OUTSIDE, Drop

LIMIT = 0.5
"""Points that the shipped recipes allow."""
IMAGES = 168
"""As small a validation split as a user had; one image is 0.6 points."""


def outcomes(images: int, lost: float, gained: float) -> Iterator[tuple[Drop, float]]:
    """What can come of images of which such shares are lost and gained, and how likely it is."""
    counts = np.arange(images + 1)
    for k in counts[stats.binom.pmf(counts, images, lost) > 1e-7]:
        others = np.arange(images - k + 1)
        chance = stats.binom.pmf(k, images, lost) * stats.binom.pmf(others, images - k, gained / (1 - lost))
        yield from ((Drop(images, int(k), int(g)), float(p)) for g, p in zip(others, chance) if p > 1e-8)


@functools.cache
def is_refused(drop: Drop) -> bool:
    return drop.p_value(LIMIT) <= ALPHA / 2  # two answers share it


def refused(images: int, *, drop: float, gained: float) -> float:
    """How often a network is refused that loses `drop` and `gained`, and gains `gained`."""
    return sum(p for found, p in outcomes(images, drop + gained, gained) if is_refused(found))


@pytest.mark.parametrize("images", [30, IMAGES, 300])
@pytest.mark.parametrize("gained", [0.0, 0.005, 0.02, 0.1])
def test_what_loses_just_what_is_allowed_is_seldom_refused(images: int, gained: float) -> None:
    assert refused(images, drop=LIMIT / 100, gained=gained) <= ALPHA / 2


@pytest.mark.parametrize(("drop", "gained", "least"), [(0.1, 0.0, 0.95), (0.1, 0.01, 0.9), (0.2, 0.05, 0.99)])
def test_what_is_broken_is_refused_with_few_images(drop: float, gained: float, least: float) -> None:
    assert refused(IMAGES, drop=drop, gained=gained) >= least


def test_less_than_an_image_is_no_loss() -> None:
    """What used to refuse 6 of 6 networks: one or two images of 168, whoever gained what."""
    for lost, gained in [(1, 0), (2, 0), (3, 1), (5, 3)]:
        assert Drop(IMAGES, lost, gained).p_value(LIMIT) > 0.3


@pytest.mark.parametrize(("lost", "gained"), [(5, 0), (8, 2), (12, 2), (0, 4), (40, 11)])
def test_without_a_limit_it_is_mcnemars_exact_test(lost: int, gained: int) -> None:
    want = stats.binomtest(lost, lost + gained, alternative="greater").pvalue
    assert Drop(IMAGES, lost, gained).p_value(0.0) == pytest.approx(min(1, want + OUTSIDE))


def test_with_a_limit_the_rate_is_at_its_exact_bound() -> None:
    rate = stats.beta.ppf(OUTSIDE, 14, IMAGES - 13)  # Clopper and Pearson's, for 14 of 168
    want = OUTSIDE + stats.binom.sf(11, 14, (1 + 0.005 / rate) / 2)
    assert Drop(IMAGES, 12, 2).p_value(LIMIT) == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    "counts", [(IMAGES, 0, 0), (IMAGES, 12, 2), (300, 0, 6), (1000, 10, 5), (20, 20, 0), (1, 0, 1)]
)
def test_interval(counts: tuple[int, int, int]) -> None:
    """It holds what was seen, its ends are where the tests turn, and swapping losses and gains mirrors it."""
    drop = Drop(*counts)
    low, high = drop.interval(ALPHA)
    assert -100 <= low <= drop.points <= high <= 100
    images, lost, gained = counts
    assert Drop(images, gained, lost).interval(ALPHA) == pytest.approx((-high, -low))
    if low > -100:
        assert drop.p_value(low - 0.01) <= ALPHA <= drop.p_value(low + 0.01)


def test_the_interval_holds_the_truth() -> None:
    """Every end is missed with a chance of ALPHA at most, wherever the truth is."""
    for lost, gained in [(0.03, 0.02), (0.06, 0.0), (0.01, 0.04)]:
        truth, under, over = 100 * (lost - gained), 0.0, 0.0
        for drop, chance in outcomes(60, lost, gained):
            low, high = drop.interval(ALPHA)
            under, over = under + chance * (truth < low), over + chance * (truth > high)
        assert under <= ALPHA
        assert over <= ALPHA


def test_between() -> None:
    before, after = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 0, 1, 0], bool)
    assert Drop.between(before, after) == Drop(5, lost=2, gained=1)
    assert Drop(5, 2, 1).points == pytest.approx(20)
