"""Drift: what is the same is seldom called another, and what differs is found."""

from __future__ import annotations

import math

import numpy as np
import pytest
from certification.population import draw, path
from scipy import stats

from edgekd.certification.drift import KEPT, LEVEL, Drift, compare, kept
from edgekd.certification.losses import Sample
from edgekd.policy import simulate, softmax

POLICY = path((0.9,))[1]


def compared(here: Sample, there: Sample) -> Drift:
    exits, field = (simulate(sample.logits, POLICY).exits for sample in (here, there))
    confidence, others = (softmax(sample.logits[0]).max(axis=1) for sample in (here, there))
    return compare(tuple(np.bincount(exits, minlength=4).tolist()), kept(confidence), field, others)


def test_equal_populations_are_seldom_told_apart() -> None:
    rng, draws = np.random.default_rng(0), 400
    found = sum(compared(draw(rng, 400), draw(rng, 150)).is_found for _ in range(draws))
    assert found / draws <= LEVEL + 3 * math.sqrt(LEVEL * (1 - LEVEL) / draws)


def test_harder_images_are_found() -> None:
    rng = np.random.default_rng(1)
    field = draw(rng, 200)
    blurred = Sample(field.logits * np.float32(0.6))
    drift = compared(draw(rng, 400), blurred)
    assert drift.is_found
    assert drift.median_confidence[1] < drift.median_confidence[0]
    assert drift.exit_shares[1][3] > drift.exit_shares[0][3]


def test_p_values_are_scipys() -> None:
    rng = np.random.default_rng(2)
    confidence, field = rng.random(500), rng.random(300) ** 1.3
    exits = rng.choice(3, 300, p=[0.5, 0.3, 0.2])
    drift = compare((300, 120, 80), kept(np.float32(confidence)), exits, np.float32(field))
    counts = np.bincount(exits, minlength=3)
    assert drift.p_exits == pytest.approx(stats.chi2_contingency([[300, 120, 80], counts], correction=False).pvalue)
    assert drift.p_confidence == pytest.approx(stats.ks_2samp(confidence, field).pvalue, rel=1e-3)
    assert drift.p_value == 2 * min(drift.p_exits, drift.p_confidence)


def test_exits_that_no_image_takes() -> None:
    drift = compare((10, 0, 0), (0.5,) * 10, np.zeros(4, np.int64), np.full(4, 0.5, np.float32))
    assert (drift.p_exits, drift.p_confidence, drift.is_found) == (1.0, 1.0, False)


def test_many_confidences_are_thinned() -> None:
    values = np.float32(np.random.default_rng(3).random(9999))
    few = kept(values)
    assert len(few) == KEPT
    assert (few[0], few[-1]) == (pytest.approx(values.min(), abs=1e-6), pytest.approx(values.max(), abs=1e-6))
    assert list(few) == sorted(few)
