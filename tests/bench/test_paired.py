from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, permutation_test

from edgekd.bench.paired import (
    ALPHA,
    Paired,
    compare_answers,
    compare_classes,
    holm,
    method,
    sign_flip_p_value,
    verdict,
    verdicts,
)


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (5, 0), (1, 6), (20, 20), (310, 250)])
def test_independent_images_give_mcnemars_exact_test(lost: int, gained: int) -> None:
    labels = np.zeros(700, int)
    answers, others = np.zeros(700, int), np.zeros(700, int)
    answers[:lost], others[lost : lost + gained] = 1, 1
    found = compare_answers(labels, answers, others)
    expected = binomtest(lost, lost + gained).pvalue if lost + gained else 1.0
    assert found == Paired(700, lost, gained, pytest.approx(expected))
    assert found.points == pytest.approx((gained - lost) / 7)
    assert compare_answers(labels, answers, others, groups=np.arange(700)).p_value == pytest.approx(expected)


def test_sign_flips_by_hand() -> None:
    """3, 1 and -1 of 8 signs each: |sum| >= 3 for +++, ++-, +-+ (5, 3, 3) and their mirror images: 6 of 8."""
    assert sign_flip_p_value(np.array([3, 1, -1, 0])) == pytest.approx(6 / 8)
    assert sign_flip_p_value(np.array([3, 1, 1])) == pytest.approx(2 / 8)


def test_sign_flips_are_those_of_scipy() -> None:
    differences = np.random.default_rng(0).integers(-3, 5, size=12)
    exact = permutation_test(
        (differences, np.zeros(12, int)), lambda x, y: (x - y).sum(), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip_p_value(differences) == pytest.approx(exact.pvalue)


def test_equal_networks_are_seldom_called_different_on_grouped_images() -> None:
    """Both are right at the same rate, but each picture suits one of them: tests of images err too often."""
    rng, draws = np.random.default_rng(0), 600
    false = {"groups": 0, "images": 0}
    for _ in range(draws):
        groups = np.repeat(np.arange(60), rng.integers(1, 15, size=60))
        shift = rng.choice([-0.09, 0.09], size=60)[groups]
        answers, others = (rng.random(len(groups)) < 0.1 + s for s in (shift, -shift))
        labels = np.zeros(len(groups), int)
        false["groups"] += compare_answers(labels, answers, others, groups=groups).p_value <= ALPHA
        false["images"] += compare_answers(labels, answers, others).p_value <= ALPHA
    assert false["groups"] / draws <= ALPHA + 3 * (ALPHA * (1 - ALPHA) / draws) ** 0.5
    assert false["images"] / draws > 2 * ALPHA


def test_a_difference_of_grouped_images_is_found() -> None:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(100), 8)
    answers, others = (rng.random(800) < rate for rate in (0.04, 0.12))
    assert compare_answers(np.zeros(800, int), answers, others, groups=groups).p_value < 0.001


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []


def test_only_what_the_test_finds_is_called_a_difference() -> None:
    few, many, none = Paired(800, 3, 1, 0.625), Paired(800, 20, 2, 0.0001), Paired(800, 0, 0, 1.0)
    assert verdict(few, 0.625) == "-0.25 points (3 lost, 1 gained), p 0.625: within noise"
    assert verdict(many, 0.0001) == "-2.25 points (20 lost, 2 gained), p < 0.001: a difference"
    assert verdict(none, 1.0) == "the same images are right"
    barely = Paired(800, 12, 3, 0.0352)  # with another comparison beside it, p is 0.07
    assert verdicts({"a": barely})["a"].endswith("a difference")
    assert verdicts({"a": barely, "b": few})["a"].endswith("within noise")
    assert method(None, 1) == "McNemar's exact test"
    assert "over 160 groups" in method(160, 3)


def test_classes_are_compared_on_their_own_images() -> None:
    labels = np.array([0, 0, 1, 1, 1])
    found = compare_classes(labels, labels, np.array([0, 1, 0, 0, 1]), "abc")
    assert {c: (p.images, p.lost, p.gained) for c, p in found.items()} == {"a": (2, 0, 1), "b": (3, 0, 2)}
