"""Accuracy, one-vs-rest rates, confusion matrix and calibration error from probabilities: numpy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.errors import BackendError, DataError
from edgekd.text import aligned, percent

BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al. 2017, arXiv 1706.04599)."""


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
    """

    images: int
    sensitivity: float | None
    specificity: float | None
    precision: float | None
    f1: float | None


@dataclass(frozen=True)
class Metrics:
    """Metrics of a classifier on labelled images; fractions, not percent.

    Attributes:
        n: Number of images.
        accuracy: Share that is classified correctly.
        macro: Means over the classes that have images.
        per_class: Class name to its rates.
        confusion: Counts; rows are true classes, columns predicted ones.
        ece: Expected calibration error over `BINS` bins.
    """

    n: int
    accuracy: float
    macro: Rates
    per_class: dict[str, Rates]
    confusion: tuple[tuple[int, ...], ...]
    ece: float

    def __post_init__(self) -> None:
        counts = [count for row in self.confusion for count in row]
        if not (0 <= self.accuracy <= 1 and 0 <= self.ece <= 1):
            raise ValueError("accuracy, ece: fractions from 0 to 1")
        for r in (self.macro, *self.per_class.values()):
            if not all(f is None or 0 <= f <= 1 for f in (r.sensitivity, r.specificity, r.precision, r.f1)):
                raise ValueError("macro, per_class: fractions from 0 to 1")
        if {len(self.confusion), *map(len, self.confusion)} != {len(self.per_class)}:
            raise ValueError("confusion: a row and a column for each class")
        if min(counts) < 0 or sum(counts) != self.n:
            raise ValueError("confusion: counts of all images")


def metrics(
    probabilities: npt.NDArray[np.floating[Any]], labels: npt.NDArray[np.integer[Any]], classes: Sequence[str]
) -> Metrics:
    """Compute all metrics.

    Args:
        probabilities: (N, C).
        labels: True class indices (N,).
        classes: Names of the C classes.

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
    confusion = confusion_matrix(labels, probabilities.argmax(axis=1), len(classes))
    rates = [_rates(confusion, c) for c in range(len(classes))]
    return Metrics(
        n=len(labels),
        accuracy=float(np.trace(confusion) / len(labels)),
        macro=_macro(rates),
        per_class=dict(zip(classes, rates)),
        confusion=tuple(tuple(int(v) for v in row) for row in confusion),
        ece=calibration_error(probabilities, labels),
    )


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
    confidence = probabilities.max(axis=1).astype(np.float64)
    correct = probabilities.argmax(axis=1) == labels
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=confidence - correct, minlength=bins)
    return float(np.abs(gaps).sum() / len(labels))


def _rates(confusion: npt.NDArray[np.int64], c: int) -> Rates:
    hit, images, named = int(confusion[c, c]), int(confusion[c].sum()), int(confusion[:, c].sum())
    others = int(confusion.sum()) - images
    return Rates(
        images=images,
        sensitivity=hit / images if images else None,
        specificity=1 - (named - hit) / others if others else None,
        precision=(hit / named if named else 0.0) if images else None,
        f1=2 * hit / (images + named) if images else None,
    )


def _macro(rates: list[Rates]) -> Rates:
    present = [r for r in rates if r.images]

    def mean(name: str) -> float | None:
        values = [getattr(r, name) for r in present if getattr(r, name) is not None]
        return float(np.mean(values)) if values else None

    return Rates(sum(r.images for r in present), *(mean(n) for n in ("sensitivity", "specificity", "precision", "f1")))


def text_table(results: Mapping[str, Metrics]) -> str:
    """Format percentages as aligned text: a row for each result, then the rates of every class of the last one."""
    head = ["sensitivity", "specificity", "precision", "F1"]
    rows = [["", "accuracy", *head, "calibration error"]]
    for name, result in results.items():
        rows.append([name, percent(result.accuracy), *_cells(result.macro), percent(result.ece)])
    name, last = list(results.items())[-1]
    classes = [[f"class ({name})", "images", *head]]
    for class_, rates in last.per_class.items():
        classes.append([class_, str(rates.images), *_cells(rates)])
    return f"{aligned(rows)}\n\n{aligned(classes)}\n"


def _cells(rates: Rates) -> list[str]:
    return [percent(v) for v in (rates.sensitivity, rates.specificity, rates.precision, rates.f1)]


def confusion_text(result: Metrics) -> str:
    """Format the confusion matrix as aligned text: rows are true classes, columns (numbered) predicted ones."""
    rows = [["truth \\ prediction", *(f"[{c}]" for c in range(len(result.confusion)))]]
    for c, (name, counts) in enumerate(zip(result.per_class, result.confusion)):
        rows.append([f"[{c}] {name}", *(str(v) if v else "." for v in counts)])
    return aligned(rows)
