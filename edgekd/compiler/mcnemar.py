"""How far a network's accuracy fell, judged from the images that it and its original answer differently.

Images that both get right, or both wrong, say nothing of the difference (McNemar 1947). A limit other than zero leaves
one unknown, how often the two differ at all; the worst rate within its exact interval is taken (Berger and Boos 1994).
So the test is exact for any number of images: of networks that lose just what is allowed, no more than `alpha` are
found to lose more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

OUTSIDE = 0.005
"""Chance that the rate of differing answers is beyond its bound; part of every p-value."""


@dataclass(frozen=True)
class Drop:
    """Of so many images, `lost` were answered rightly before, `gained` are since."""

    images: int
    lost: int
    gained: int

    @classmethod
    def between(cls, before: npt.NDArray[np.bool_], after: npt.NDArray[np.bool_]) -> Drop:
        """From whether each image was, and is, answered rightly, both (N,)."""
        return cls(len(before), int((before & ~after).sum()), int((after & ~before).sum()))

    @property
    def points(self) -> float:
        """Percentage points of accuracy that were lost on these images."""
        return 100 * (self.lost - self.gained) / self.images

    def p_value(self, limit: float) -> float:
        """How often, at most, images like these would show such a loss if the true drop were `limit` points or less."""
        drop, differing = limit / 100, self.lost + self.gained
        if drop >= 0:  # the fewer differ, the more of them may be losses
            rate = max(self._bound(lambda q: _at_least(differing, self.images, q) - OUTSIDE), drop)
        else:
            rate = self._bound(lambda q: _at_least(differing + 1, self.images, q) - 1 + OUTSIDE)
            if rate < -drop:
                return OUTSIDE
        share = (1 + drop / rate) / 2 if drop else 0.5
        return min(1.0, OUTSIDE + _at_least(self.lost, differing, share))

    def interval(self, alpha: float) -> tuple[float, float]:
        """Points between which the true drop lies; each end is wrong with a chance of `alpha` at most."""
        mirrored = Drop(self.images, self.gained, self.lost)
        low, high = (100 * _root(lambda x, d=d: d.p_value(100 * x) - alpha, -1.0) for d in (self, mirrored))  # type: ignore[misc]
        return low, -high

    def _bound(self, rising: Callable[[float], float]) -> float:
        return _root(rising, 0.0)


def _at_least(count: int, of: int, chance: float) -> float:
    """P(X >= count) for a binomial X."""
    if count <= 0 or chance >= 1:
        return float(count <= of)
    if chance <= 0:
        return 0.0
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, of + 1)))])
    k = np.arange(count, of + 1)
    return float(
        np.exp(logs[of] - logs[k] - logs[of - k] + k * math.log(chance) + (of - k) * math.log1p(-chance)).sum()
    )


def _root(rising: Callable[[float], float], low: float) -> float:
    """Where a rising function between `low` and 1 crosses 0."""
    high = 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return low
