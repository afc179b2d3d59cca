from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from edgekd.bench.roc import auc_interval, discrimination, roc_auc


def test_delong_on_the_published_ratings() -> None:
    """CT images of Hanley and McNeil 1982, rated 1 to 5: Stata's roctab gives 0.8932, 0.0307, 0.83295 to 0.95339."""
    normal, abnormal = (np.repeat([1, 2, 3, 4, 5], n) for n in ([33, 6, 6, 11, 2], [3, 2, 2, 11, 33]))
    positive = np.arange(109) < 51
    area, deviation = roc_auc(positive, np.concatenate([abnormal, normal]))
    assert area == pytest.approx(0.8932, abs=5e-5)
    assert deviation == pytest.approx(0.0307, abs=5e-5)
    assert area - 1.959964 * deviation == pytest.approx(0.83295, abs=5e-6)
    assert area + 1.959964 * deviation == pytest.approx(0.95339, abs=5e-6)
    low, high = auc_interval(area, deviation) or (0, 0)
    logit = np.log(area / (1 - area))  # Pepe 2003: the standard deviation of the logit is deviation / (area (1 - area))
    width = 1.959964 * deviation / (area * (1 - area))
    assert (low, high) == pytest.approx((1 / (1 + np.exp(width - logit)), 1 / (1 + np.exp(-width - logit))))


def test_separated_images_have_no_interval() -> None:
    area, deviation = roc_auc(np.array([True, True, False, False]), np.array([4.0, 3.0, 2.0, 1.0]))
    assert (area, deviation) == (1.0, 0.0)
    assert auc_interval(area, deviation) is None


def test_measures_are_those_of_scikit_learn() -> None:
    """With ties, which one decimal of the probabilities makes."""
    rng = np.random.default_rng(0)
    labels = rng.integers(3, size=200)
    probabilities = (rng.dirichlet(np.ones(3), size=200) + np.eye(3)[labels] / 3).round(1)
    for c, found in enumerate(discrimination(probabilities, labels, specificity=0.9)):
        scores = probabilities[:, c]
        assert found.roc_auc == pytest.approx(roc_auc_score(labels == c, scores))
        assert found.pr_auc == pytest.approx(average_precision_score(labels == c, scores))
        false, true, _ = roc_curve(labels == c, scores, drop_intermediate=False)
        assert found.sensitivity == pytest.approx(true[false <= 0.1 + 1e-9].max())
        for value, interval in (
            (found.roc_auc, found.roc_auc_interval),
            (found.pr_auc, found.pr_auc_interval),
            (found.sensitivity, found.sensitivity_interval),
        ):
            assert value is not None
            assert interval is not None
            assert interval[0] < value < interval[1]


def test_a_class_without_images_has_no_measures() -> None:
    found = discrimination(np.full((4, 3), 1 / 3), np.array([0, 0, 1, 1]))
    assert found[2].roc_auc is found[2].pr_auc is found[2].sensitivity is None
    assert found[0].roc_auc == 0.5


def test_copies_of_images_do_not_narrow_the_interval() -> None:
    """Obuchowski's variance: ten copies of each image, known as such, tell no more than one."""
    rng = np.random.default_rng(0)
    positive = rng.random(100) < 0.4
    scores = rng.normal(size=100) + positive
    alone = roc_auc(positive, scores)
    groups = np.repeat(np.arange(100), 10)
    copied = roc_auc(np.repeat(positive, 10), np.repeat(scores, 10), groups)
    assert copied == pytest.approx(alone)
    assert roc_auc(np.repeat(positive, 10), np.repeat(scores, 10))[1] < 0.4 * alone[1]


def test_intervals_of_grouped_images_cover_the_area() -> None:
    """Pictures with a shift of their own; the true area is that of two normal distributions, 2 of them per picture."""
    from scipy.stats import norm

    rng, draws, inside, naive = np.random.default_rng(0), 300, 0, 0
    area = norm.cdf(1.5 / (2 * (1 + 1)) ** 0.5)  # difference of two images of variance 1 + 1, pictures independent
    for _ in range(draws):
        groups = np.repeat(np.arange(60), 4)
        positive = np.repeat(rng.random(60) < 0.5, 4)
        scores = 1.5 * positive + rng.normal(size=60)[groups] + rng.normal(size=240)
        for of in (groups, None):
            low, high = auc_interval(*roc_auc(positive, scores, of)) or (0, 0)
            if of is None:
                naive += low <= area <= high
            else:
                inside += low <= area <= high
    assert inside / draws >= 0.95 - 3 * (0.95 * 0.05 / draws) ** 0.5
    assert naive / draws < 0.85
