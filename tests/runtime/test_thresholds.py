"""Fits to recorded logits, compared with `simulate`, with numbers worked by hand, or with what made the data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edgekd.policy import NEVER_EXIT, Average, Policy, simulate, softmax
from edgekd.runtime.thresholds import (
    COMBINATIONS,
    at_every_exit,
    candidate_thresholds,
    exits_taken,
    fit_pooling,
    threshold_grid,
)
from edgekd.types import Array, Labels


def noisy(exits: int, count: int, classes: int = 4) -> tuple[Array, Labels]:
    """Logits of exits with noise of their own and the same signal: together they are better than each."""
    rng = np.random.default_rng(exits)
    labels = rng.integers(0, classes, count)
    signal = rng.gamma(2, 1, (count, 1)) * np.eye(classes)[labels]
    return np.float32(signal + rng.normal(size=(exits, count, classes))), labels


@pytest.mark.parametrize("average", ["own", "mean", "geometric"])
def test_exits_and_answers_are_those_of_a_simulation(average: Average) -> None:
    logits, labels = noisy(4, 300)
    pooling = fit_pooling(logits, labels, (1.0,) * 4) if average == "geometric" else ()
    policy = Policy((1.0,) * 4, confidence="margin", average=average, pooling=pooling)
    (confidences,), answers = at_every_exit(logits, policy, ("margin",))
    losses = (answers != answers[-1]).astype(np.float64)
    thresholds = candidate_thresholds(confidences, losses, (1.0, 0.5, 0.5, 2.0))
    taken = exits_taken(confidences, thresholds)
    for i in (0, 60, 100, 140, 199):
        found = simulate(logits, Policy((1.0,) * 4, tuple(thresholds[i].tolist()), "margin", average, pooling))
        assert found.exits.tolist() == taken[i].tolist()
        assert found.probabilities.argmax(axis=1).tolist() == answers[taken[i], np.arange(300)].tolist()


def test_one_number_leads_from_never_to_always() -> None:
    logits, _ = noisy(3, 500)
    (confidences,), answers = at_every_exit(logits, Policy((1.0,) * 3), ("max_probability",))
    losses = (answers != answers[-1]).astype(np.float64)
    thresholds = candidate_thresholds(confidences, losses, (1.0, 1.0, 2.0))
    assert thresholds[0].tolist() == [NEVER_EXIT, NEVER_EXIT]
    assert thresholds[-1].tolist() == [0, 0]
    assert (np.diff(thresholds, axis=0) <= 0).all()
    early = candidate_thresholds(confidences, losses, (1.0, 8.0, 1.0))  # the second exit saves a ninth of the first's
    assert (early[:-1, 1] >= thresholds[:-1, 1]).all()
    assert early[100, 1] > thresholds[100, 1]


def test_a_threshold_is_where_the_modelled_loss_is_what_the_time_saved_allows() -> None:
    """The loss is 1 - confidence, so at the δ that allows 0.2 the threshold is near 0.8."""
    rng = np.random.default_rng(0)
    confidences = np.float32([rng.uniform(0.01, 0.99, 20_000), np.ones(20_000)])
    losses = np.stack([rng.random(20_000) > confidences[0], np.zeros(20_000)]).astype(np.float64)
    thresholds = candidate_thresholds(confidences, losses, (1.0, 1.0))
    nearest = np.abs(np.geomspace(1e-6, 1, 200) - 0.2).argmin()
    assert thresholds[nearest, 0] == pytest.approx(0.8, abs=0.02)


def test_an_exit_that_loses_nothing_and_one_exit_alone() -> None:
    confidences, losses = np.full((2, 50), 0.7, np.float32), np.zeros((2, 50))
    shares = (exits_taken(confidences, candidate_thresholds(confidences, losses, (1.0, 1.0))) == 0).mean(axis=1)
    assert (shares[0], shares[-1]) == (0, 1)
    assert candidate_thresholds(confidences[:1], losses[:1], (1.0,)).shape == (200, 0)


def test_pooling_is_better_than_each_exit_on_new_images() -> None:
    logits, labels = noisy(3, 2000)
    pooling = fit_pooling(logits[:, :1000], labels[:1000], (1.0,) * 3)
    assert pooling[2] == (0.0, 0.0, 1.0)
    assert pooling[1][0] == pytest.approx(pooling[1][1], rel=0.25)  # equally good exits with independent noise
    pooled = softmax(pooling[1][0] * logits[0, 1000:] + pooling[1][1] * logits[1, 1000:])
    own = softmax(logits[1, 1000:])
    likelihood = [np.log(p[np.arange(1000), labels[1000:]]).mean() for p in (pooled, own)]
    assert likelihood[0] > likelihood[1] + 0.1


def test_a_grid_has_never_and_always_and_stays_small() -> None:
    confidences = np.random.default_rng(0).random((4, 100), np.float32)
    grid = threshold_grid(confidences)
    assert len(grid) <= COMBINATIONS
    for corner in itertools.product([0.0, NEVER_EXIT], repeat=3):
        assert (grid == corner).all(axis=1).any()
    assert threshold_grid(confidences[:1]).shape == (0, 0)
    assert threshold_grid(np.zeros((6, 9), np.float32)).shape == (0, 5)
