"""Drift: two-sample tests, without labels, of whether a certificate applies to the images of the field."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy import stats

from edgekd.types import Array

KEPT = 2000
"""Largest number of confidences that a certificate keeps: evenly spaced ones of the sorted confidences."""
LEVEL = 0.01
"""Level of both tests together."""
EXPECTED = 5.0
"""Smallest expected count for which the chi-square distribution is close enough; rarer exits are counted together."""


@dataclass(frozen=True)
class Drift:
    """Comparison of field images with those of a certificate.

    Attributes:
        images: Number of field images.
        p_exits: p-value of equal shares of the exits (chi-square test).
        p_confidence: p-value of equal distributions of the confidence at the first exit (Kolmogorov and Smirnov).
        exit_shares: Share of the certificate's images and of the field images that take each exit.
        median_confidence: Median confidence at the first exit of both.
    """

    images: int
    p_exits: float
    p_confidence: float
    exit_shares: tuple[tuple[float, ...], tuple[float, ...]]
    median_confidence: tuple[float, float]

    @property
    def p_value(self) -> float:
        """The smaller p-value, corrected for two tests (Bonferroni)."""
        return min(1.0, 2 * min(self.p_exits, self.p_confidence))

    @property
    def is_found(self) -> bool:
        """True if the field images differ from those of the certificate."""
        return self.p_value < LEVEL


def kept(confidences: Array) -> tuple[float, ...]:
    """Return the sorted confidences (N,) that a certificate keeps; at most `KEPT`."""
    spread = np.linspace(0, len(confidences) - 1, min(len(confidences), KEPT)).round().astype(int)
    return tuple(np.sort(confidences).astype(np.float64).round(6)[spread].tolist())


def compare(
    exit_counts: tuple[int, ...], confidences: tuple[float, ...], exits: npt.NDArray[np.int64], confidence: Array
) -> Drift:
    """Compare field images with those of a certificate.

    Args:
        exit_counts: `Certificate.exit_counts`.
        confidences: `Certificate.confidences`.
        exits: Exit (N,) that each field image takes, from 0.
        confidence: Confidence (N,) of each field image at the first exit.
    """
    table = np.array([exit_counts, np.bincount(exits, minlength=len(exit_counts))])
    field = confidence.astype(np.float64).round(6)
    return Drift(
        len(exits),
        _p_of_equal_shares(table),
        float(stats.ks_2samp(confidences, field).pvalue),
        tuple(tuple(row.tolist()) for row in table / table.sum(axis=1, keepdims=True)),  # type: ignore[arg-type]
        (float(np.median(confidences)), float(np.median(field))),
    )


def _p_of_equal_shares(table: npt.NDArray[np.int64]) -> float:
    """Return the p-value of the chi-square test of counts (2, E), of which rare columns are added up."""
    expected = table.sum(axis=0) * table.sum(axis=1).min() / table.sum()
    rare = expected < EXPECTED
    pooled = np.column_stack([table[:, ~rare], table[:, rare].sum(axis=1)]) if rare.any() else table
    pooled = pooled[:, pooled.sum(axis=0) > 0]
    return float(stats.chi2_contingency(pooled, correction=False).pvalue) if pooled.shape[1] > 1 else 1.0
