"""Ranking measures of one class against the others: ROC-AUC, PR-AUC, sensitivity at a fixed specificity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.bench.intervals import LEVEL, Interval
from edgekd.types import Labels

SPECIFICITY = 0.95
"""Specificity at which the sensitivity is read off the ROC curve."""
RESAMPLES = 400
"""Bootstrap samples."""
BOOTSTRAP_LIMIT = 1_000_000
"""Images times classes up to which bootstrap intervals are computed: seconds."""
CHUNK = 4_000_000
"""Largest number of weights that are handled at a time: 32 MB."""
Flags = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Discrimination:
    """Separation of one class from the others by its probability; None without images of both kinds.

    Attributes:
        roc_auc: Area under the ROC curve.
        roc_auc_interval: See `auc_interval`; None for an area of 0 or 1.
        pr_auc: Area under the precision-recall curve (average precision).
        pr_auc_interval: Percentile interval of a bootstrap by group; None above `BOOTSTRAP_LIMIT`.
        sensitivity: Sensitivity at the fixed specificity, read off the ROC curve of these same images.
        sensitivity_interval: As for `pr_auc_interval`.
    """

    roc_auc: float | None = None
    roc_auc_interval: Interval | None = None
    pr_auc: float | None = None
    pr_auc_interval: Interval | None = None
    sensitivity: float | None = None
    sensitivity_interval: Interval | None = None


def discrimination(
    probabilities: Scores, labels: Labels, *, groups: Labels | None = None, specificity: float = SPECIFICITY
) -> list[Discrimination]:
    """Measure each class against the others.

    Args:
        probabilities: (N, C).
        labels: True class indices (N,).
        groups: Group of each image (N,); None if all images are independent.
        specificity: The fixed specificity, 0..1.
    """
    few = probabilities.size <= BOOTSTRAP_LIMIT
    weights = np.concatenate(
        [np.ones((1, len(labels)), np.float32), *([_resampled(len(labels), groups)] if few else [])]
    )
    return [_of_class(labels == c, p, weights, groups, specificity) for c, p in enumerate(probabilities.T)]


def _of_class(
    positive: Flags, scores: Scores, weights: npt.NDArray[np.float32], groups: Labels | None, specificity: float
) -> Discrimination:
    if positive.all() or not positive.any():
        return Discrimination()
    area, deviation = roc_auc(positive, scores, groups)
    (precision, *precisions), (sensitivity, *sensitivities) = _at_thresholds(positive, scores, weights, specificity)
    return Discrimination(
        roc_auc=area,
        roc_auc_interval=auc_interval(area, deviation),
        pr_auc=precision,
        pr_auc_interval=_percentiles(precisions),
        sensitivity=sensitivity,
        sensitivity_interval=_percentiles(sensitivities),
    )


def roc_auc(positive: Flags, scores: Scores, groups: Labels | None = None) -> tuple[float, float]:
    """Return the area under the ROC curve and its standard deviation.

    The area is the probability that a positive image scores higher than a negative one. The variance is that of DeLong,
    DeLong and Clarke-Pearson 1988 (Biometrics 44, 837-845) from mid-ranks (Sun and Xu 2014), and with groups its
    extension to clustered data by Obuchowski 1997 (Biometrics 53, 567-578).

    Args:
        positive: True for positive images (N,); both kinds are needed.
        scores: Higher for images that are more likely to be positive (N,).
        groups: Group of each image (N,); None if all images are independent.

    Returns:
        The area, and its standard deviation; NaN with fewer than two groups of either kind.
    """
    from scipy.stats import rankdata

    ranks, count = rankdata(scores), len(scores)
    others = np.empty(count)  # share of the images of the other kind that the image is ranked properly against
    others[positive] = (ranks[positive] - rankdata(scores[positive])) / (~positive).sum()
    others[~positive] = 1 - (ranks[~positive] - rankdata(scores[~positive])) / positive.sum()
    area = float(others[positive].mean())
    places = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    count = int(places.max()) + 1
    kinds = (positive, ~positive)
    sums = [np.bincount(places[k], weights=others[k] - area, minlength=count) / k.sum() for k in kinds]
    held = [len(np.unique(places[k])) for k in kinds]
    if min(held) < 2:
        return area, float("nan")
    own = sum(float((s**2).sum()) * k / (k - 1) for s, k in zip(sums, held))
    both = count / (count - 1) * 2 * float((sums[0] * sums[1]).sum())
    return area, max(own + both, 0.0) ** 0.5


def auc_interval(area: float, deviation: float) -> Interval | None:
    """Return the interval of an area on the logit scale, where it stays within 0..1; None if it cannot be estimated."""
    from scipy.special import expit, logit, ndtri

    if not (0 < area < 1 and deviation > 0):
        return None
    width = -ndtri((1 - LEVEL) / 2) * deviation / (area * (1 - area))
    return float(expit(logit(area) - width)), float(expit(logit(area) + width))


def _at_thresholds(
    positive: Flags, scores: Scores, weights: npt.NDArray[np.float32], specificity: float
) -> tuple[list[float], list[float]]:
    """Return average precision, and sensitivity at the specificity, for each row of weights (B, N).

    NaN for a row without weight on both kinds.
    """
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))  # images with equal scores go together
    precisions, sensitivities = [], []
    for rows in np.array_split(weights, -(-weights.size // CHUNK)):
        sorted_ = rows[:, order].astype(np.float64)
        named = sorted_.cumsum(axis=1)[:, ends]
        hits = (sorted_ * positive[order]).cumsum(axis=1)[:, ends]
        images, negatives = hits[:, -1:], named[:, -1:] - hits[:, -1:]
        with np.errstate(invalid="ignore"):
            shares = hits / images  # NaN without images
            precision = np.divide(hits, named, out=np.zeros_like(hits), where=named > 0)
            precisions += (np.diff(shares, prepend=0, axis=1) * precision).sum(axis=1).tolist()
            allowed = named - hits <= (1 - specificity) * negatives * (1 + 1e-9)
            best = np.max(shares, axis=1, initial=0, where=allowed)
            sensitivities += np.where((images * negatives)[:, 0] > 0, best, np.nan).tolist()
    return precisions, sensitivities


def _resampled(count: int, groups: Labels | None) -> npt.NDArray[np.float32]:
    """Draw groups with replacement: how often each image is in each sample (B, N)."""
    places = np.arange(count) if groups is None else np.unique(groups, return_inverse=True)[1]
    held = int(places.max()) + 1
    drawn = np.random.default_rng(0).multinomial(held, np.full(held, 1 / held), size=RESAMPLES)
    return drawn.astype(np.float32)[:, places]


def _percentiles(values: Sequence[float]) -> Interval | None:
    known = [v for v in values if not np.isnan(v)]
    if not known:
        return None
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
