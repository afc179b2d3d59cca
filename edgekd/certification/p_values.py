"""p-values and upper confidence bounds of an expected loss.

The hypothesis of each p-value is that the expected loss is at least (or exceeds) `limit`; a p-value of at most `delta`
certifies, with probability 1 - `delta`, that it does not.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from scipy import optimize, stats

Floats = npt.NDArray[np.float64]
CAP = 0.95
"""Largest share of the wealth that a bet puts at risk (c of Waudby-Smith and Ramdas)."""
MANY = 10_000_000
"""Number of images beyond which none are counted any more."""


def binomial_p_value(losses: npt.ArrayLike, images: int, limit: float) -> Floats:
    """Return P(Bin(images, limit) <= losses), the exact p-value of 0/1 losses.

    Args:
        losses: Their number (...).
        images: Number of images; without any, the p-value is 1.
        limit: Bound of the expected loss, 0..1.
    """
    return np.asarray(stats.binom.cdf(losses, images, limit))


def binomial_upper_bound(losses: int, images: int, delta: float) -> float:
    """Return the upper confidence bound of Clopper and Pearson (1934), the inversion of `binomial_p_value`."""
    return float(stats.beta.ppf(1 - delta, losses + 1, images - losses)) if losses < images else 1.0


def images_needed(limit: float, delta: float, losses: int = 0) -> int:
    """Return the smallest number of images that certify `limit` with this many 0/1 losses among them.

    The trials up to loss number `losses` + 1 have a negative binomial distribution, and are fewer with probability
    `delta`. Without losses the number is log(delta) / log(1 - limit), rounded up.
    """
    return losses + 1 + int(stats.nbinom.ppf(1 - delta, losses + 1, limit))


def images_needed_at_rate(limit: float, delta: float, losses: int, images: int) -> int | None:
    """Return the number of images that certify `limit` if losses go on at the rate that was seen.

    Args:
        limit: Bound of the expected loss, 0..1.
        delta: 1 - certainty.
        losses: Losses seen.
        images: Images seen.

    Returns:
        The number, of the images seen and further ones; None if the rate is not below the limit, or so close to it that
        more than `MANY` were needed.
    """
    needed = images_needed(limit, delta)
    if not losses:
        return needed
    if losses >= limit * images:
        return None
    while needed < MANY:
        expected = math.ceil(losses * needed / images)
        more = images_needed(limit, delta, expected)
        if more <= needed:
            return needed
        needed = more
    return None


def betting_p_value(losses: Floats, limit: float, delta: float) -> Floats:
    """Return the p-value of signed losses by betting: Waudby-Smith and Ramdas 2024 (arXiv 2010.09686).

    W_t = prod over i <= t of 1 - v_i (l_i - limit), with v_t = min(sqrt(2 log(1/delta) / (n s_{t-1})), c / (1 - limit))
    from the losses before t only; p = 1 / max W_t (Ville's inequality). With m_t = (1/2 + sum of l_i) / (t + 1),
    s_t = (1/4 + sum of (l_i - m_i)^2) / (t + 1) and s_0 = 1/4. Valid for losses of at most 1; small and large negative
    ones are allowed as they are. W_t rises with `limit`, so p-values invert to an upper bound.

    Args:
        losses: Losses (..., N), in an order that was fixed before they were looked at.
        limit: Bound of the expected loss, -1..1.
        delta: The level that the bets are made for; the p-value holds at any.

    Returns:
        The p-values (...).
    """
    count = losses.shape[-1]
    if count == 0:
        return np.ones(losses.shape[:-1])
    times = np.arange(1, count + 1)
    means = (0.5 + losses.cumsum(axis=-1)) / (times + 1)
    variances = (0.25 + ((losses - means) ** 2).cumsum(axis=-1)) / (times + 1)
    before = np.concatenate([np.full_like(losses[..., :1], 0.25), variances[..., :-1]], axis=-1)
    bets = np.minimum(np.sqrt(2 * np.log(1 / delta) / (count * before)), CAP / (1 - limit))
    wealth = np.log1p(bets * (limit - losses)).cumsum(axis=-1).max(axis=-1)
    return np.asarray(np.minimum(1.0, np.exp(-wealth)))


def betting_upper_bound(losses: Floats, delta: float) -> float:
    """Return the upper confidence bound (at most 1) of the mean of losses (N) by inversion of `betting_p_value`."""

    def excess(limit: float) -> float:
        return float(betting_p_value(losses, limit, delta)) - delta

    highest = 1 - 1e-9
    if excess(highest) > 0:
        return 1.0
    return float(optimize.brentq(excess, -1.0, highest, xtol=1e-7)) if excess(-1.0) > 0 else -1.0
