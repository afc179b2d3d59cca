"""Comparison of two classifiers on the same images: an exact test, without which a difference is not called one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.types import Labels

ALPHA = 0.05
"""Largest p-value, adjusted for all comparisons of a table, of what is called a difference."""


@dataclass(frozen=True)
class Paired:
    """Answers of one classifier against those of another.

    Attributes:
        images: Number of images.
        lost: Images that the other classifies correctly, and this one does not.
        gained: Images that this one classifies correctly, and the other does not.
        p_value: Two-sided p-value of `sign_flip_p_value`: McNemar's exact test if all images are independent.
        groups: Number of groups that the images form; None if all are independent.
    """

    images: int
    lost: int
    gained: int
    p_value: float
    groups: int | None = None

    @property
    def points(self) -> float:
        """Accuracy of this one minus that of the other, in percentage points."""
        return 100 * (self.gained - self.lost) / self.images


def compare_answers(
    labels: Labels, answers: npt.NDArray[Any], others: npt.NDArray[Any], *, groups: Labels | None = None
) -> Paired:
    """Compare two classifiers.

    Args:
        labels: True class indices (N,), N > 0.
        answers: Class indices (N,) that this one predicts.
        others: Those that the other one predicts.
        groups: Group of each image (N,); None if all images are independent.
    """
    change = (answers == labels).astype(np.int64) - (others == labels)
    places = np.arange(len(labels)) if groups is None else np.unique(groups, return_inverse=True)[1]
    sums = np.bincount(places, weights=change).astype(np.int64)
    return Paired(
        images=len(labels),
        lost=int((change < 0).sum()),
        gained=int((change > 0).sum()),
        p_value=sign_flip_p_value(sums),
        groups=None if groups is None else len(sums),
    )


def compare_classes(
    labels: Labels,
    answers: npt.NDArray[Any],
    others: npt.NDArray[Any],
    classes: Sequence[str],
    *,
    groups: Labels | None = None,
) -> dict[str, Paired]:
    """Compare two classifiers on the images of each class that has some; arguments as for `compare_answers`."""
    return {
        name: compare_answers(labels[own], answers[own], others[own], groups=None if groups is None else groups[own])
        for c, name in enumerate(classes)
        if (own := labels == c).any()
    }


def sign_flip_p_value(differences: npt.NDArray[np.int64]) -> float:
    """Return the exact two-sided p-value of the sum of differences (G,) when the sign of each is a coin toss.

    Two classifiers that are equally good are equally likely to be ahead by d images in a group as to be behind by d.
    With one image a group this is McNemar's exact test. With more, it is the permutation test whose large-sample form
    is that of Durkalski et al. 2003 (Statistics in Medicine 22, 2417-2428): both have the variance sum of d squared, so
    the groups are taken as independent, and nothing is assumed on the images of a group.
    """
    sizes = np.abs(differences[differences != 0])
    mass = np.ones(1)  # of each sum from -total to total
    for size in sizes.tolist():
        wider = np.zeros(len(mass) + 2 * size)
        wider[: len(mass)] += mass / 2
        wider[2 * size :] += mass / 2
        mass = wider
    sums = np.arange(len(mass)) - int(sizes.sum())
    return float(min(1.0, mass[np.abs(sums) >= abs(int(differences.sum()))].sum()))


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that the probability of any false difference among them stays below `ALPHA` (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    stepped = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return [float(p) for p in adjusted]


def p_text(p: float) -> str:
    """Format a p-value."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def verdict(paired: Paired, p: float) -> str:
    """Describe a comparison, as `-0.25 points (3 lost, 1 gained), p 0.625: within noise`.

    Args:
        paired: The comparison.
        p: Its p-value, adjusted for all comparisons that are made beside it.
    """
    if not paired.lost + paired.gained:
        return "the same images are right"
    called = "a difference" if p <= ALPHA else "within noise"
    return f"{paired.points:+.2f} points ({paired.lost} lost, {paired.gained} gained), p {p_text(p)}: {called}"


def short_verdict(paired: Paired, p: float) -> str:
    """Describe a comparison in a table's cell, as `-0.25, p 0.625: within noise`; arguments as for `verdict`."""
    if not paired.lost + paired.gained:
        return "same images right"
    return f"{paired.points:+.2f}, p {p_text(p)}: {'difference' if p <= ALPHA else 'within noise'}"


def verdicts(comparisons: Mapping[str, Paired]) -> dict[str, str]:
    """Describe comparisons that are made together, by name."""
    adjusted = holm([paired.p_value for paired in comparisons.values()])
    return {name: verdict(paired, p) for (name, paired), p in zip(comparisons.items(), adjusted)}


def method(groups: int | None, comparisons: int) -> str:
    """Describe the test behind the verdicts."""
    test = "McNemar's exact test" if groups is None else f"exact sign-flip test over {groups} groups of images"
    return f"{test}, p adjusted for {comparisons} comparisons (Holm)" if comparisons > 1 else test
