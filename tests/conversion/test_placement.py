"""The choice of exits, on times and answers small enough to work out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.conversion.placement import Times, answered, cross_validate, place_exits

RIGHT, UNCERTAIN, WRONG = [9.0, 0.0], [0.6, 0.5], [0.5, 0.6]
ANSWERS = np.zeros(10, np.int64)
FIRST = np.array([RIGHT] * 6 + [WRONG] * 4, np.float32)
SECOND = np.array([RIGHT] * 9 + [WRONG], np.float32)
TIMES = Times(np.array([1, 5], np.float32), np.array([0.1, 0.1], np.float32), 10.0)


def test_a_head_answers_the_most_confident_up_to_the_first_change_too_many() -> None:
    assert answered(FIRST, ANSWERS) == 0.6
    assert answered(FIRST, ANSWERS, limit=0.2) == 0.8


def test_the_fastest_cascade_is_chosen() -> None:
    found = place_exits(TIMES, [FIRST, SECOND], ANSWERS)
    # six leave after 1 + 0.1 ms, three after 5 + 0.2, one after 10 + 0.2
    assert (found.chosen, found.changed) == ((0, 1), 0)
    assert found.shares == pytest.approx((0.6, 0.3, 0.1))
    assert found.time_ms == pytest.approx((6 * 1.1 + 3 * 5.2 + 10.2) / 10)


def test_one_exit_is_the_best_one() -> None:
    found = place_exits(TIMES, [FIRST, SECOND], ANSWERS, count=1)
    # the first saves more: (6 * 1.1 + 4 * 10.1) / 10 = 4.7, the second (9 * 5.1 + 10.1) / 10 = 5.6
    assert found.chosen == (0,)
    assert found.time_ms == pytest.approx(4.7)


def test_as_many_exits_as_are_asked_for() -> None:
    useless = np.array([UNCERTAIN] * 5 + [WRONG] * 5, np.float32)
    assert place_exits(TIMES, [useless, SECOND], ANSWERS, count=2).chosen == (0, 1)


def test_an_exit_that_costs_more_than_it_saves_is_left_out() -> None:
    dear = Times(TIMES.before, np.array([5.0, 0.1], np.float32), 10.0)
    assert place_exits(dear, [FIRST, SECOND], ANSWERS).chosen == (1,)
    useless = Times(TIMES.before, np.array([20.0, 20.0], np.float32), 10.0)
    found = place_exits(useless, [FIRST, SECOND], ANSWERS)
    assert (found.chosen, found.shares, found.time_ms) == ((), (1.0,), 10.0)


def test_thresholds_of_one_half_are_applied_to_the_other() -> None:
    first = np.arange(10) % 2 == 0
    # even pictures: the four confident ones are right; odd ones: the two most confident are wrong
    logits = np.array([RIGHT] * 7 + [[0.0, 12.0], WRONG, [0.0, 12.0]], np.float32)
    times = Times(np.array([1], np.float32), np.array([0.1], np.float32), 10.0)
    assert place_exits(times, [logits[first]], ANSWERS[first]).shares == pytest.approx((0.8, 0.2))
    found = cross_validate(times, [logits], ANSWERS, first)
    # the odd half answers nothing by itself, so no even picture leaves; the even half's threshold lets all odd ones go
    assert found.shares == pytest.approx((0.5, 0.5))
    assert found.changed == pytest.approx(0.2)
    assert found.time_ms == pytest.approx((5 * 1.1 + 5 * 10.1) / 10)
    assert cross_validate(times, [logits], ANSWERS, np.zeros(10, bool)).shares == (0, 1)
