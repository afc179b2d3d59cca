"""Exact test of an accuracy drop, from the images that a network and its original classify differently.

Images that both classify correctly, or both incorrectly, carry no information on the difference (McNemar 1947). A limit
other than zero leaves a nuisance parameter, the rate at which the two differ; the p-value is the maximum over its exact
confidence interval (Berger and Boos 1994). So the test is exact for any number of images: of networks that lose exactly
the limit, a fraction of at most `alpha` is rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

OUTSIDE = 0.005
"""Probability that the rate of differing images is beyond its bound; part of every p-value."""


@dataclass(frozen=True)
class Drop:
    """The change of accuracy on the same images.

    Attributes:
        images: Number of images.
        lost: Images that were classified correctly before and are not any more.
        gained: Images that are classified correctly now and were not before.
    """

    images: int
    lost: int
    gained: int

    @classmethod
    def between(cls, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> Drop:
        """Return the drop between two runs; `before` and `after` are (N,), True for correctly classified images."""
        return cls(len(before), int((before & ~after).sum()), int((after & ~before).sum()))

    @property
    def points(self) -> float:
        """Percentage points of accuracy that were lost on these images."""
        return 100 * (self.lost - self.gained) / self.images

    def p_value(self, limit: float) -> float:
        """Return the p-value of such a loss under the hypothesis that the true drop is at most `limit` points."""
        drop, differing = limit / 100, self.lost + self.gained
        alike = self.images - differing
        if drop >= 0:  # the fewer differ, the more of them may be losses; bounds of Clopper and Pearson
            rate = max(stats.beta.ppf(OUTSIDE, differing, alike + 1) if differing else 0.0, drop)
        else:
            rate = stats.beta.ppf(1 - OUTSIDE, differing + 1, alike) if alike else 1.0
            if rate < -drop:
                return OUTSIDE
        share = (1 + drop / rate) / 2 if drop else 0.5
        return float(min(1.0, OUTSIDE + stats.binom.sf(self.lost - 1, differing, share)))

    def interval(self, alpha: float) -> tuple[float, float]:
        """Return the confidence interval of the true drop, in points; each end fails with probability `alpha`."""
        mirrored = Drop(self.images, self.gained, self.lost)
        low, high = (100 * _root(lambda x, d=d: d.p_value(100 * x) - alpha, -1.0) for d in (self, mirrored))  # type: ignore[misc]
        return low, -high


def _root(increasing: Callable[[float], float], low: float) -> float:
    """Return the root of an increasing function between `low` and 1."""
    high = 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if increasing(middle) > 0 else (middle, high)
    return low
