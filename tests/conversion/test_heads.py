"""Exit heads: what they learn, and that the graph with their folded weights computes the same."""

from __future__ import annotations

import numpy as np
import pytest

from edgekd.conversion.attach import head_graph
from edgekd.conversion.cut_points import CutPoint
from edgekd.conversion.features import opened_graph
from edgekd.conversion.heads import Head, Lesson, train_heads


@pytest.fixture(scope="module")
def lesson() -> tuple[list[np.ndarray], Lesson]:
    """Features of which the first two decide between three classes, on scales of their own; and useless ones."""
    rng = np.random.default_rng(0)
    useful = rng.normal(size=(400, 1, 6)).astype(np.float32)
    weights = np.array([[4, 0, -4], [0, 4, -4], [0, 0, 0], [0, 0, 0], [0, 0, 0], [0, 0, 0]], np.float32)
    answers = useful @ weights
    scaled = useful * np.array([1e-2, 1e3, 1, 1, 1, 0], np.float32) + np.float32(5)
    noise = rng.normal(size=(400, 1, 6)).astype(np.float32)
    rows = np.arange(400)
    return [noise, scaled], Lesson(rows[:300], rows[300:], answers)


@pytest.fixture(scope="module")
def heads(lesson: tuple[list[np.ndarray], Lesson]) -> tuple[Head, ...]:
    return train_heads(*lesson)


def test_heads_learn_the_answers_of_the_network(
    lesson: tuple[list[np.ndarray], Lesson], heads: tuple[Head, ...]
) -> None:
    pooled, of = lesson
    useless, useful = heads
    answers = of.answers[of.held_out, 0].argmax(axis=1)
    assert (useful.logits.argmax(axis=1) == answers).mean() > 0.9
    assert (useless.logits.argmax(axis=1) == answers).mean() < 0.6
    assert useful.loss < 0.5 < useless.loss
    again = train_heads(pooled, of)[1]
    np.testing.assert_array_equal(again.logits, useful.logits)


def test_the_head_in_onnx_computes_the_same(lesson: tuple[list[np.ndarray], Lesson], heads: tuple[Head, ...]) -> None:
    pooled, of = lesson
    for features, head in zip(pooled, heads):
        graph = opened_graph(head_graph(CutPoint(("features",), ((6,),), 0.5), head))
        np.testing.assert_allclose(graph(features[of.held_out, 0])[0], head.logits, rtol=1e-3, atol=1e-3)
