"""The decision code, with values worked by hand and one property: online = offline."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import pytest

from edgekd.confidence import CONFIDENCE_MEASURES
from edgekd.policy import (
    NEVER_EXIT,
    Average,
    Decision,
    Policy,
    confidence,
    decide_one,
    ensemble,
    simulate,
    softmax,
)
from edgekd.types import Array


def logs(*probabilities: list[list[float]]) -> Array:
    """Logits (E, N, C) whose softmax is these probabilities."""
    return np.log(np.array(probabilities, np.float32))


def test_softmax_by_hand() -> None:
    assert softmax(np.float32([0, np.log(3)])) == pytest.approx([0.25, 0.75])
    assert softmax(np.float32([0, np.log(9)]), 2.0) == pytest.approx([0.25, 0.75])
    assert softmax(np.float32([[1e30, 0], [-1e30, 0]])).tolist() == [[1, 0], [0, 1]]
    assert softmax(np.zeros((2, 4), np.float32), 3.0).dtype == np.float32


@pytest.mark.parametrize(
    ("measure", "expected"),
    [
        ("max_probability", [0.5, 0.25, 1.0]),
        ("margin", [0.25, 0.0, 1.0]),
        ("entropy", [1 - 1.75 / 2, 0.0, 1.0]),  # H = 1.75 bits of log2(4) = 2
    ],
)
def test_confidence_by_hand(measure: str, expected: list[float]) -> None:
    probabilities = np.float32([[0.5, 0.25, 0.125, 0.125], [0.25] * 4, [0, 0, 1, 0]])
    assert confidence(probabilities, measure) == pytest.approx(expected, abs=1e-6)
    assert [CONFIDENCE_MEASURES[measure].one(p.tolist()) for p in probabilities] == pytest.approx(expected, abs=1e-6)


def test_three_images_take_three_exits() -> None:
    logits = logs(
        [[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]],
        [[0.5, 0.5], [0.2, 0.8], [0.7, 0.3]],
        [[0.5, 0.5], [0.5, 0.5], [0.1, 0.9]],
    )
    own = simulate(logits, Policy((1.0,) * 3, (0.85, 0.75), average="own"))
    assert own.exits.tolist() == [0, 1, 2]
    assert own.probabilities == pytest.approx(np.array([[0.9, 0.1], [0.2, 0.8], [0.1, 0.9]]), abs=1e-6)
    assert own.confidence == pytest.approx([0.9, 0.8, 0.9])
    mean = simulate(logits, Policy((1.0,) * 3, (0.85, 0.59), average="mean"))
    assert mean.exits.tolist() == [0, 1, 1]  # means at exit 1: 0.4/0.6 and 0.65/0.35
    assert mean.probabilities == pytest.approx(np.array([[0.9, 0.1], [0.4, 0.6], [0.65, 0.35]]), abs=1e-6)


def pooled(weights: npt.NDArray[np.float64]) -> tuple[tuple[float, ...], ...]:
    """Weights (E, E) as a policy's rows; the last exit's are its own."""
    rows = [tuple(row[: k + 1].tolist()) for k, row in enumerate(weights[:-1])]
    return (*rows, (0.0,) * (len(weights) - 1) + (1.0,))


def test_a_weighted_geometric_mean_by_hand() -> None:
    logits = logs([[0.5, 0.5], [0.8, 0.2]], [[0.8, 0.2], [0.5, 0.5]], [[0.3, 0.7], [0.3, 0.7]])
    policy = Policy((1.0, 2.0, 1.0), (0.8, 0.6), average="geometric", pooling=((1.0,), (0.5, 2.0), (0.0, 0.0, 1.0)))
    found = simulate(logits, policy)  # exit 1: p0^0.5 p1^(2/2), so 8:2, and 2:1 (sqrt 4) for the image that left
    assert found.exits.tolist() == [1, 0]
    assert found.probabilities == pytest.approx(np.array([[0.8, 0.2], [0.8, 0.2]]), abs=1e-6)
    late = simulate(logits, dataclasses.replace(policy, thresholds=(NEVER_EXIT, 0.6)))
    assert late.exits.tolist() == [1, 1]
    assert late.probabilities[1] == pytest.approx([2 / 3, 1 / 3])
    last = simulate(logits, policy.without_early_exit())
    assert last.exits.tolist() == [2, 2]
    assert last.probabilities == pytest.approx(softmax(logits[2]))


@pytest.mark.parametrize(
    ("pooling", "problem"),
    [
        ((), "rows of 1 to 2 weights"),
        (((1.0,), (1.0,)), "rows of 1 to 2 weights"),
        (((1.0,), (0.5, 0.5)), "last exit's weights must be 0, …, 0, 1"),
        (((float("nan"),), (0.0, 1.0)), "weights must be from"),
    ],
)
def test_pooling_weights_that_do_not_fit_are_refused(pooling: tuple[tuple[float, ...], ...], problem: str) -> None:
    with pytest.raises(ValueError, match=f"^pooling: .*{problem}"):
        Policy((1.0, 1.0), average="geometric", pooling=pooling)
    with pytest.raises(ValueError, match="belongs to the average 'geometric', not to 'own'"):
        Policy((1.0, 1.0), pooling=((1.0,), (0.0, 1.0)))


def test_an_unsure_image_is_deferred() -> None:
    logits = logs([[0.9, 0.1], [0.6, 0.4], [0.6, 0.4]], [[0.5, 0.5], [0.3, 0.7], [0.4, 0.6]])
    found = simulate(logits, Policy((1.0, 1.0), (0.85,), defer_below=0.65))
    assert found.exits.tolist() == [0, 1, 1]
    assert found.deferred.tolist() == [False, False, True]
    assert not simulate(logits, Policy((1.0, 1.0), (0.85,))).deferred.any()
    with pytest.raises(ValueError, match="defer_below: must be finite"):
        Policy((1.0,), defer_below=float("inf"))


def test_a_temperature_keeps_an_overconfident_exit_from_answering() -> None:
    logits = logs([[0.9, 0.1]], [[0.2, 0.8]])  # at temperature 2 the first is 3/4, 1/4
    assert simulate(logits, Policy((1.0, 1.0), (0.8,))).exits.tolist() == [0]
    assert simulate(logits, Policy((2.0, 1.0), (0.8,))).exits.tolist() == [1]
    assert simulate(logits, Policy((2.0, 1.0), (0.74,))).probabilities == pytest.approx(np.array([[0.75, 0.25]]))


def test_threshold_bounds(rng: np.random.Generator) -> None:
    logits = np.float32(rng.normal(size=(3, 50, 4)) * 30)  # some confidences are exactly 1
    assert set(simulate(logits, Policy((1.0,) * 3, (0.0, 0.0))).exits) == {0}
    never = simulate(logits, Policy((1.0,) * 3, (NEVER_EXIT, NEVER_EXIT), average="mean"))
    assert set(never.exits) == {2}
    assert never.probabilities == pytest.approx(ensemble(logits), abs=1e-6)


def test_ensemble_is_the_mean_of_probabilities() -> None:
    assert ensemble(logs([[0.9, 0.1]], [[0.5, 0.5]])) == pytest.approx(np.array([[0.7, 0.3]]))


def one_by_one(logits: Array, policy: Policy) -> Decision:
    """What the classifier does with a batch of one, for each image."""
    exits, count, classes = logits.shape
    decision = Decision.empty(count, classes)
    for i in range(count):
        state: list[Any] = [0.0] * classes
        for exit in range(exits):
            answer, sure, exited, state = decide_one(policy, exit, logits[exit, i].tolist(), state)
            if exited:
                decision.probabilities[i], decision.confidence[i], decision.exits[i] = answer, sure, exit
                break
    return decision


@pytest.mark.parametrize(("measure", "average"), list(itertools.product(CONFIDENCE_MEASURES, get_args(Average))))
def test_online_equals_offline(measure: str, average: Average, rng: np.random.Generator) -> None:
    for exits, classes in [(1, 2), (2, 3), (4, 5), (5, 2)]:
        logits = np.float32(rng.normal(size=(exits, 40, classes)) * rng.choice([3, 300], (40, 1)))  # some are certain
        temperatures = tuple(rng.uniform(0.3, 4, exits).tolist())
        pooling = pooled(rng.uniform(-0.2, 1.2, (exits, exits))) if average == "geometric" else ()
        policy = Policy(temperatures, tuple(rng.uniform(0.2, 0.9, exits - 1).tolist()), measure, average, pooling)
        offline, online = simulate(logits, policy), one_by_one(logits, policy)
        assert offline.exits.tolist() == online.exits.tolist()
        assert offline.probabilities == pytest.approx(online.probabilities, abs=1e-6)
        assert offline.confidence == pytest.approx(online.confidence, abs=1e-6)


@pytest.mark.parametrize(("key", "value", "near"), [("confidence", "margn", "margin"), ("average", "meen", "mean")])
def test_an_unknown_word_in_a_policy_is_refused_with_the_nearest(key: str, value: str, near: str) -> None:
    with pytest.raises(ValueError, match=f"^{key}: .*'{value}'.*Did you mean '{near}'"):
        Policy((1.0,), **{key: value})  # type: ignore[arg-type]


def test_is_tuned() -> None:
    assert not Policy((1.0, 1.0)).is_tuned
    assert Policy((1.0, 1.0), (0.5,)).is_tuned
    assert Policy((1.0,)).is_tuned


@pytest.mark.parametrize(("temperatures", "thresholds"), [((), ()), ((0.0,), ()), ((1.0, 1.0), (0.5, 0.5))])
def test_an_invalid_policy_is_refused(temperatures: tuple[float, ...], thresholds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"temperatures|thresholds"):
        Policy(temperatures, thresholds)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
