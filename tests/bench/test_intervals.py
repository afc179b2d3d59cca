from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from edgekd.bench.intervals import group_numbers, proportion_interval
from edgekd.data.split import Item


@pytest.mark.parametrize(("hits", "images"), [(0, 8), (8, 8), (1, 8), (759, 808)])
def test_independent_images_give_clopper_and_pearson(hits: int, images: int) -> None:
    interval = binomtest(hits, images).proportion_ci(0.95, method="exact")
    found = np.arange(images) < hits
    assert proportion_interval(found) == pytest.approx((interval.low, interval.high))
    assert proportion_interval(found, np.arange(images) * 7) == pytest.approx((interval.low, interval.high))


def test_images_that_all_agree_count_once_a_group() -> None:
    """20 images of 4 pictures, all right: 4 of 4, so the lower end is 0.025**(1/4)."""
    assert proportion_interval(np.ones(20, bool), np.arange(20) // 5) == pytest.approx((0.025**0.25, 1))
    assert proportion_interval(np.zeros(20, bool), np.zeros(20, int)) == pytest.approx((0, 0.975))


def test_copies_of_an_image_do_not_narrow_the_interval() -> None:
    """By hand: groups of equal images have the variance of their number; the t quantiles make it a little wider."""
    hits = np.arange(60) < 48
    copied = proportion_interval(np.repeat(hits, 10), np.repeat(np.arange(60), 10))
    alone = proportion_interval(hits)
    assert copied[0] < alone[0] < 0.8 < alone[1] < copied[1]
    assert np.subtract(*copied) == pytest.approx(np.subtract(*alone), rel=0.05)


def test_intervals_cover_the_rate_of_grouped_images() -> None:
    """Pictures of 1 to 9 cells whose rate varies: 95 % of the intervals contain 0.9; independent ones miss it often."""
    rng, inside, naive = np.random.default_rng(0), 0, 0
    draws = 400
    for _ in range(draws):
        groups = np.repeat(np.arange(80), rng.integers(1, 10, size=80))
        hits = rng.random(len(groups)) < rng.beta(1.8, 0.2, size=80)[groups]
        low, high = proportion_interval(hits, groups)
        inside += low <= 0.9 <= high
        low, high = proportion_interval(hits)
        naive += low <= 0.9 <= high
    error = (0.95 * 0.05 / draws) ** 0.5
    assert inside / draws >= 0.95 - 3 * error
    assert naive / draws < 0.85


def test_group_numbers() -> None:
    items = [Item("a.png", 0, "x"), Item("b.png", 0), Item("c.png", 0, "y"), Item("d.png", 0, "x"), Item("e.png", 0)]
    numbers = group_numbers(items)
    assert numbers is not None
    assert numbers.tolist() == [0, 1, 2, 0, 3]
    assert group_numbers(items[1:2]) is None
