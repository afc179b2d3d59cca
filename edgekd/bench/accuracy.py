"""Measures of a classifier on labelled images, from its probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.bench.intervals import Interval, proportion_interval
from edgekd.bench.roc import SPECIFICITY, Discrimination, auc_interval, discrimination, roc_auc
from edgekd.errors import BackendError, DataError
from edgekd.types import Labels

BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al. 2017, arXiv 1706.04599)."""
RATES = ("sensitivity", "specificity", "precision", "f1")


@dataclass(frozen=True)
class Rates:
    """Rates of one class against the rest, 0..1; None where a rate is not defined.

    Attributes:
        images: Number of images of the class.
        sensitivity: True positives over images of the class; None without such images.
        specificity: True negatives over images of other classes; None without such images.
        precision: True positives over predictions of the class; 0 for a class that has images and was never predicted,
            None for one without images.
        f1: Harmonic mean of precision and sensitivity; None without images of the class.
        sensitivity_interval: See `proportion_interval`; None in means over classes and in older records.
        specificity_interval: As for `sensitivity_interval`.
    """

    images: int
    sensitivity: float | None
    specificity: float | None
    precision: float | None
    f1: float | None
    sensitivity_interval: Interval | None = None
    specificity_interval: Interval | None = None


@dataclass(frozen=True)
class Bin:
    """Images of similar confidence: their number, mean confidence, and accuracy."""

    images: int
    confidence: float
    accuracy: float


@dataclass(frozen=True)
class Metrics:
    """Metrics of a classifier on labelled images; fractions, not percent. None where undefined and in older records.

    Attributes:
        n: Number of images.
        accuracy: Share that is classified correctly.
        macro: Means over the classes that have images.
        per_class: Class name to its rates.
        confusion: Counts; rows are true classes, columns predicted ones.
        ece: Expected calibration error over `BINS` bins.
        accuracy_interval: See `proportion_interval`.
        balanced_accuracy: Mean sensitivity of the classes that have images.
        kappa: Cohen's kappa: agreement with the truth beyond that of independent answers; -1..1.
        brier: Brier score: mean squared distance between probabilities and truth; 0..2.
        nll: Mean negative logarithm of the true class's probability.
        roc_auc: Mean area under the ROC curve over the classes.
        pr_auc: Mean area under the precision-recall curve over the classes.
        specificity: The fixed specificity of `discrimination`.
        discrimination: Class name to its separation from the other classes.
        confidence_auc: Area under the ROC curve of the confidence, as a score of whether the answer is correct.
        confidence_auc_interval: Its interval.
        reliability: The bins of the calibration error that have images, in ascending order.
        groups: Number of groups that the images form, which all intervals allow for; None if they are independent.
    """

    n: int
    accuracy: float
    macro: Rates
    per_class: dict[str, Rates]
    confusion: tuple[tuple[int, ...], ...]
    ece: float
    accuracy_interval: Interval | None = None
    balanced_accuracy: float | None = None
    kappa: float | None = None
    brier: float | None = None
    nll: float | None = None
    roc_auc: float | None = None
    pr_auc: float | None = None
    specificity: float = SPECIFICITY
    discrimination: dict[str, Discrimination] = field(default_factory=dict)
    confidence_auc: float | None = None
    confidence_auc_interval: Interval | None = None
    reliability: tuple[Bin, ...] = ()
    groups: int | None = None

    def __post_init__(self) -> None:
        counts = [count for row in self.confusion for count in row]
        if not (0 <= self.accuracy <= 1 and 0 <= self.ece <= 1):
            raise ValueError("accuracy, ece: fractions from 0 to 1")
        for r in (self.macro, *self.per_class.values()):
            intervals = (r.sensitivity_interval, r.specificity_interval)
            if not _are_fractions(r.sensitivity, r.specificity, r.precision, r.f1, *intervals):
                raise ValueError("macro, per_class: fractions from 0 to 1")
        for d in self.discrimination.values():
            if not _are_fractions(*vars(d).values()):
                raise ValueError("discrimination: fractions from 0 to 1")
        areas = (self.roc_auc, self.pr_auc, self.confidence_auc, self.confidence_auc_interval)
        if not _are_fractions(self.accuracy_interval, self.balanced_accuracy, self.specificity, *areas):
            raise ValueError("accuracy_interval to confidence_auc_interval: fractions from 0 to 1")
        if not (-1 <= (self.kappa or 0) <= 1 and 0 <= (self.brier or 0) <= 2 and (self.nll or 0) >= 0):
            raise ValueError("kappa, brier, nll: from -1 to 1, from 0 to 2, and not negative")
        if not all(b.images > 0 and _are_fractions(b.confidence, b.accuracy) for b in self.reliability):
            raise ValueError("reliability: images in every bin, and fractions from 0 to 1")
        if {len(self.confusion), *map(len, self.confusion)} != {len(self.per_class)}:
            raise ValueError("confusion: a row and a column for each class")
        if self.discrimination and self.discrimination.keys() != self.per_class.keys():
            raise ValueError("discrimination: of every class")
        if min(counts) < 0 or sum(counts) != self.n:
            raise ValueError("confusion: counts of all images")
        if self.reliability and sum(b.images for b in self.reliability) != self.n:
            raise ValueError("reliability: bins of all images")


def _are_fractions(*values: float | Interval | None) -> bool:
    flat = [v for value in values for v in (value if isinstance(value, tuple) else (value,))]
    return all(v is None or 0 <= v <= 1 for v in flat)


def metrics(
    probabilities: npt.NDArray[np.floating[Any]],
    labels: npt.NDArray[np.integer[Any]],
    classes: Sequence[str],
    *,
    groups: Labels | None = None,
    confidences: npt.NDArray[np.floating[Any]] | None = None,
    specificity: float = SPECIFICITY,
) -> Metrics:
    """Compute all metrics.

    Args:
        probabilities: (N, C).
        labels: True class indices (N,).
        classes: Names of the C classes.
        groups: Group of each image (N,), of images that resemble each other; None if all are independent.
        confidences: Confidence of each answer (N,); its probability if None.
        specificity: Specificity at which each class's sensitivity is read off its ROC curve.

    Raises:
        DataError: No images, or shapes and labels that do not fit the classes.
        BackendError: Probabilities that are not finite.
    """
    if len(labels) == 0 or probabilities.shape != (len(labels), len(classes)):
        raise DataError(
            f"probabilities {probabilities.shape} do not fit {len(labels)} labels and {len(classes)} classes",
            fix="evaluate on a folder with the network's own classes",
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"labels range from {labels.min()} to {labels.max()}, the network has {len(classes)} classes")
    if not np.isfinite(probabilities).all():
        raise BackendError("the network returns values that are not finite", fix="compile with --recipe fp32")
    answers = probabilities.argmax(axis=1)
    correct = answers == labels
    confusion = confusion_matrix(labels, answers, len(classes))
    rates = [_rates(confusion, c, labels, answers, groups) for c in range(len(classes))]
    macro = _macro(rates)
    separation = discrimination(probabilities, labels.astype(np.int64), groups=groups, specificity=specificity)
    scores = probabilities.max(axis=1) if confidences is None else confidences
    area = None if correct.all() or not correct.any() else roc_auc(correct, scores, groups)
    return Metrics(
        n=len(labels),
        accuracy=float(np.trace(confusion) / len(labels)),
        macro=macro,
        per_class=dict(zip(classes, rates)),
        confusion=tuple(tuple(int(v) for v in row) for row in confusion),
        ece=calibration_error(probabilities, labels),
        accuracy_interval=proportion_interval(correct, groups),
        balanced_accuracy=macro.sensitivity,
        kappa=cohen_kappa(confusion),
        brier=brier_score(probabilities, labels),
        nll=float(-np.log(np.maximum(_of_truth(probabilities, labels), np.finfo(np.float32).eps)).mean()),
        roc_auc=_mean(d.roc_auc for d in separation),
        pr_auc=_mean(d.pr_auc for d in separation),
        specificity=specificity,
        discrimination=dict(zip(classes, separation)),
        confidence_auc=area and area[0],
        confidence_auc_interval=area and auc_interval(*area),
        reliability=reliability(probabilities, labels),
        groups=None if groups is None else len(np.unique(groups)),
    )


@dataclass(frozen=True)
class ExitAccuracy:
    """Images that took one exit: their number and share of all, and accuracy among them (None without any)."""

    images: int
    share: float
    accuracy: float | None
    accuracy_interval: Interval | None


def exit_accuracies(
    exits: npt.NDArray[np.integer[Any]], correct: npt.NDArray[np.bool_], count: int, groups: Labels | None = None
) -> dict[str, ExitAccuracy]:
    """Measure a cascade exit by exit.

    Args:
        exits: Exit that each image took (N,).
        correct: True for images that are classified correctly (N,).
        count: Number of exits.
        groups: Group of each image (N,); None if all are independent.

    Returns:
        Name of each exit to the images that took it.
    """
    found = {}
    for k in range(count):
        own = exits == k
        hits, some = correct[own], bool(own.any())
        interval = proportion_interval(hits, None if groups is None else groups[own]) if some else None
        share, accuracy = float(own.mean()), float(hits.mean()) if some else None
        found[f"exit_{k}"] = ExitAccuracy(int(own.sum()), share, accuracy, interval)
    return found


@dataclass(frozen=True)
class Answered:
    """Images that are not passed on to a person (`Policy.defer_below`).

    Attributes:
        images: Their number.
        coverage: Their share of all images.
        coverage_interval: Its interval.
        error: Share of them that is classified incorrectly; None without any.
        error_interval: Its interval.
    """

    images: int
    coverage: float
    coverage_interval: Interval
    error: float | None
    error_interval: Interval | None


def answered(deferred: npt.NDArray[np.bool_], correct: npt.NDArray[np.bool_], groups: Labels | None = None) -> Answered:
    """Measure a classifier that passes some images on to a person.

    Args:
        deferred: True for images that are passed on (N,).
        correct: True for images that are classified correctly (N,).
        groups: Group of each image (N,); None if all are independent.
    """
    kept = ~deferred
    wrong, some = ~correct[kept], bool(kept.any())
    interval = proportion_interval(wrong, None if groups is None else groups[kept]) if some else None
    error = float(wrong.mean()) if some else None
    return Answered(int(kept.sum()), float(kept.mean()), proportion_interval(kept, groups), error, interval)


def cohen_kappa(confusion: npt.NDArray[np.int64]) -> float | None:
    """Return Cohen's kappa of a confusion matrix (C, C); None if truth and answers are all of one class."""
    n = confusion.sum()
    agreed, expected = np.trace(confusion) / n, (confusion.sum(axis=0) * confusion.sum(axis=1)).sum() / n**2
    return None if expected == 1 else float((agreed - expected) / (1 - expected))


def brier_score(probabilities: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.integer[Any]]) -> float:
    """Return the mean over the images of the sum over the classes of (probability - truth) squared (Brier 1950)."""
    squares = (probabilities.astype(np.float64) ** 2).sum(axis=1)
    return float((squares - 2 * _of_truth(probabilities, labels) + 1).mean())


def _of_truth(
    probabilities: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.integer[Any]]
) -> npt.NDArray[np.float64]:
    """Return the probability of the true class (N,)."""
    return np.asarray(probabilities[np.arange(len(labels)), labels], np.float64)


def confusion_matrix(
    labels: npt.NDArray[np.integer[Any]], predictions: npt.NDArray[np.integer[Any]], classes: int
) -> npt.NDArray[np.int64]:
    """Count images (C, C): rows are true classes, columns predicted ones."""
    return np.bincount(labels * classes + predictions, minlength=classes**2).reshape(classes, classes)


def gap(test: Metrics, *, accuracy: float, images: int) -> str:
    """Describe a significant difference between test and validation accuracy; empty if there is none.

    The two proportions are compared by the pooled z-test. A difference is significant from 3 standard errors (one in
    370 cases by coincidence). The best epoch was selected on the validation images, which favours them by much less.

    Args:
        test: Metrics on the test images.
        accuracy: Accuracy on the validation images, 0..1.
        images: Number of validation images.
    """
    pooled = (accuracy * images + test.accuracy * test.n) / (images + test.n)
    error = (pooled * (1 - pooled) * (1 / images + 1 / test.n)) ** 0.5
    if abs(test.accuracy - accuracy) <= 3 * error:
        return ""
    lower, why = "above", "the test images are easier, or some of them were trained on"
    if test.accuracy < accuracy:
        lower, why = "below", "the test images differ in kind, or validation images resemble training images"
    return (
        f"accuracy on {test.n} test images, {test.accuracy:.2%}, is far {lower} the {accuracy:.2%} on {images} "
        f"validation images ({abs(test.accuracy - accuracy) / error:.1f} standard errors): {why}"
    )


def calibration_error(
    probabilities: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.integer[Any]], *, bins: int = BINS
) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins, weighted by their counts.

    Expected calibration error as in Guo et al. 2017 (arXiv 1706.04599).
    """
    bins_ = reliability(probabilities, labels, bins=bins)
    return sum(b.images * abs(b.confidence - b.accuracy) for b in bins_) / len(labels)


def reliability(
    probabilities: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.integer[Any]], *, bins: int = BINS
) -> tuple[Bin, ...]:
    """Return mean confidence and accuracy in equal-width bins of the confidence, without the empty bins."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    counts, sums, right = (np.bincount(place, weights=w, minlength=bins) for w in (None, confidence, correct))
    return tuple(Bin(int(n), min(float(s / n), 1.0), float(r / n)) for n, s, r in zip(counts, sums, right) if n)


def _rates(
    confusion: npt.NDArray[np.int64],
    c: int,
    labels: npt.NDArray[np.integer[Any]],
    answers: npt.NDArray[np.integer[Any]],
    groups: Labels | None,
) -> Rates:
    hit, images, named = int(confusion[c, c]), int(confusion[c].sum()), int(confusion[:, c].sum())
    others = int(confusion.sum()) - images
    own = labels == c

    def interval(among: npt.NDArray[np.bool_]) -> Interval:
        right = (answers == c) == own
        return proportion_interval(right[among], None if groups is None else groups[among])

    return Rates(
        images=images,
        sensitivity=hit / images if images else None,
        specificity=1 - (named - hit) / others if others else None,
        precision=(hit / named if named else 0.0) if images else None,
        f1=2 * hit / (images + named) if images else None,
        sensitivity_interval=interval(own) if images else None,
        specificity_interval=interval(~own) if others else None,
    )


def _macro(rates: list[Rates]) -> Rates:
    present = [r for r in rates if r.images]
    sensitivity, specificity, precision, f1 = (_mean(getattr(r, name) for r in present) for name in RATES)
    return Rates(sum(r.images for r in present), sensitivity, specificity, precision, f1)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None
