"""Confidence intervals of proportions, and the groups of images that hang together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from edgekd.data.split import Item
from edgekd.types import Labels

LEVEL = 0.95
"""Confidence level of every interval."""
Interval: TypeAlias = tuple[float, float]


def group_numbers(items: Sequence[Item]) -> Labels | None:
    """Number the pictures that images were cut from: (N,), or None where no group is known.

    An image without a group is a group of its own.
    """
    if not any(item.group for item in items):
        return None
    names = [(item.group, "" if item.group else item.path) for item in items]
    numbers = {name: k for k, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int64)


def proportion_interval(hits: npt.NDArray[np.bool_], groups: Labels | None = None) -> Interval:
    """Return the interval of the rate of hits: Clopper and Pearson's, on the effective number of images.

    Images of one group resemble each other, so they count for fewer than they are: n is divided by the design effect
    (Korn and Graubard 1998, Survey Methodology 24, 193-201). Where all images agree, no effect can be estimated, and
    each group counts as one image.

    Args:
        hits: True for each image that counts (N,), N > 0.
        groups: Group of each image (N,); None if all images are independent.
    """
    from scipy.special import betaincinv

    n, rate, tail = float(len(hits)), float(hits.mean()), (1 - LEVEL) / 2
    if groups is not None:
        n = _effective_images(hits, groups, rate)
    k = rate * n
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    return low, high


def _effective_images(hits: npt.NDArray[np.bool_], groups: Labels, rate: float) -> float:
    from scipy.special import stdtrit

    n, (_, places) = len(hits), np.unique(groups, return_inverse=True)
    count = int(places.max()) + 1
    if count == n:
        return float(n)
    if rate in (0, 1) or count == 1:
        return float(count)
    differences = np.bincount(places, weights=hits - rate)
    variance = count / (count - 1) * float((differences**2).sum()) / n**2
    if not variance:
        return float(n)
    freedom = stdtrit(n - 1, (1 - LEVEL) / 2) / stdtrit(count - 1, (1 - LEVEL) / 2)
    return min(float(n), rate * (1 - rate) / variance * float(freedom) ** 2)
