"""p-values against closed forms, MAPIE, the recursion as its paper writes it, and simulated losses at the bound."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from edgekd.certification.p_values import (
    betting_p_value,
    betting_upper_bound,
    binomial_p_value,
    binomial_upper_bound,
    images_needed,
    images_needed_at_rate,
)

NEEDED = {
    0.003: ((767, 998), (1296, 1580), (1773, 2097), (3090, 3502)),
    0.005: ((460, 598), (777, 947), (1063, 1258), (1853, 2100)),
    0.01: ((230, 299), (388, 473), (531, 628), (926, 1049)),
    0.02: ((114, 149), (194, 236), (265, 313), (462, 523)),
}
"""Images that certify a bound with 0, 1, 2 and 5 losses, at a certainty of 90 % and 95 %."""


@pytest.mark.parametrize("limit", NEEDED)
def test_images_needed(limit: float) -> None:
    found = tuple((images_needed(limit, 0.1, k), images_needed(limit, 0.05, k)) for k in (0, 1, 2, 5))
    assert found == NEEDED[limit]
    assert images_needed(limit, 0.1) == math.ceil(math.log(0.1) / math.log(1 - limit))


def test_one_image_fewer_does_not_certify() -> None:
    assert binomial_p_value(2, 531, 0.01) <= 0.1 < binomial_p_value(2, 530, 0.01)
    assert binomial_p_value(0, 0, 0.01) == 1


def test_images_needed_at_the_rate_of_losses() -> None:
    assert images_needed_at_rate(0.01, 0.1, 0, 100) == 230
    assert images_needed_at_rate(0.01, 0.1, 10, 1000) is None
    needed = images_needed_at_rate(0.01, 0.1, 2, 400)  # a rate of half the limit
    assert needed is not None
    assert binomial_p_value(math.ceil(needed / 200), needed, 0.01) <= 0.1


@pytest.mark.parametrize(("k", "n"), [(0, 230), (3, 405), (17, 810), (5, 5)])
def test_the_exact_bound_is_clopper_and_pearsons(k: int, n: int) -> None:
    bound = stats.binomtest(k, n, alternative="less").proportion_ci(0.9, method="exact").high
    assert binomial_upper_bound(k, n, 0.1) == pytest.approx(bound)
    if k < n:
        assert binomial_p_value(k, n, bound) == pytest.approx(0.1)


def test_the_exact_test_is_never_worse_than_mapies() -> None:
    risk_control = pytest.importorskip("mapie.risk_control.methods")
    k, n = np.arange(0, 30), 810
    mapie = risk_control.compute_hoeffding_bentkus_p_value(k / n, n, np.array([0.02]))[:, 0]
    exact = np.array([binomial_p_value(int(x), n, 0.02) for x in k])
    assert (exact <= mapie + 1e-12).all()
    binary = risk_control.compute_hoeffding_bentkus_p_value(k / n, n, np.array([0.02]), binary=True)[:, 0]
    assert (exact <= binary + 1e-12).all()


def by_the_paper(losses: list[float], limit: float, delta: float) -> float:
    """The betting p-value, loss by loss."""
    total = squares = log_wealth = highest = 0.0
    variance = 0.25
    for t, loss in enumerate(losses, start=1):
        bet = min(math.sqrt(2 * math.log(1 / delta) / (len(losses) * variance)), 0.95 / (1 - limit))
        log_wealth += math.log(1 - bet * (loss - limit))
        highest = max(highest, log_wealth)
        total += loss
        mean = (0.5 + total) / (t + 1)
        squares += (loss - mean) ** 2
        variance = (0.25 + squares) / (t + 1)
    return min(1.0, math.exp(-highest))


@pytest.mark.parametrize("limit", [0.002, 0.01, 0.05])
def test_betting_is_the_papers_recursion(limit: float) -> None:
    losses = np.random.default_rng(0).choice([-1.0, 0.0, 1.0, 0.25], (4, 700), p=[0.01, 0.97, 0.01, 0.01])
    found = betting_p_value(losses, limit, 0.1)
    assert found == pytest.approx([by_the_paper(row.tolist(), limit, 0.1) for row in losses])
    assert found.min() < 1


def test_betting_without_losses_needs_few_images_more_than_the_exact_test() -> None:
    """With bets capped at 1/2, as for losses scaled to 0..1, 405 images would not do: 405 log 1.005 < log 10."""
    assert betting_p_value(np.zeros(405), 0.01, 0.1) < 0.1
    assert betting_p_value(np.zeros(230), 0.01, 0.1) > 0.1
    assert betting_p_value(np.zeros(0), 0.01, 0.1) == 1


def test_the_betting_bound_is_where_the_test_turns() -> None:
    losses = np.random.default_rng(1).choice([-1.0, 0.0, 1.0], 800, p=[0.01, 0.98, 0.01])
    bound = betting_upper_bound(losses, 0.1)
    assert betting_p_value(losses, bound - 1e-5, 0.1) > 0.1 >= betting_p_value(losses, bound + 1e-5, 0.1)
    rising = [float(betting_p_value(losses, limit, 0.1)) for limit in np.linspace(-0.5, 0.9, 60)]
    assert (np.diff(rising) <= 0).all()
    assert betting_upper_bound(np.ones(50), 0.1) == 1
    assert betting_upper_bound(-np.ones(50), 0.1) < 0


@pytest.mark.parametrize("limit", [0.005, 0.01, 0.03])
@pytest.mark.parametrize("gained", [0.0, 0.01])
def test_losses_at_the_bound_are_seldom_certified(limit: float, gained: float) -> None:
    """A true mean loss of exactly `limit` is certified at most in a share delta of draws, plus 3 standard errors."""
    draws, delta, n = 3000, 0.1, 500
    lost = limit + gained
    losses = np.random.default_rng(2).choice([1.0, 0.0, -1.0], (draws, n), p=[lost, 1 - lost - gained, gained])
    most = delta + 3 * math.sqrt(delta * (1 - delta) / draws)
    assert (betting_p_value(losses, limit, delta) <= delta).mean() <= most
    k = np.arange(n + 1)  # for the exact test, over every count
    p = np.array([binomial_p_value(int(x), n, limit) for x in k])
    assert stats.binom.pmf(k, n, limit)[p <= delta].sum() <= delta


@pytest.mark.parametrize(
    ("n", "lost", "gained", "exact", "betting"),
    [
        (400, 0, 0, 0.57, 0.62),
        (810, 0.003, 0.003, 0.66, 0.55),
        (1600, 0.01, 0.008, 1.40, 0.89),
        (810, 0.02, 0.02, 2.76, 1.34),
    ],
)
def test_median_bounds_of_the_reference(n: int, lost: float, gained: float, exact: float, betting: float) -> None:
    """Median 90 % upper bounds, in points, of guarantees.md: `lost` with the exact test, `drop` by betting."""
    losses = np.random.default_rng(4).choice([1.0, 0.0, -1.0], (150, n), p=[lost, 1 - lost - gained, gained])
    counts = (losses == 1).sum(axis=1)
    assert 100 * np.median([binomial_upper_bound(int(k), n, 0.1) for k in counts]) == pytest.approx(exact, abs=0.16)
    assert 100 * np.median([betting_upper_bound(row, 0.1) for row in losses]) == pytest.approx(betting, abs=0.16)
