from __future__ import annotations

import json

import numpy as np
import pytest

from edgekd.bench.evaluation import Evaluation, evaluate_decisions
from edgekd.policy import Decision

CLASSES = ("a", "b")
LABELS = np.repeat([0, 1], 50)


def decision(wrong: int, exits: int | np.ndarray = 0, defer_below: float = 0.0) -> Decision:
    """Answers of which the first `wrong` are wrong; the confidence falls from 1 to 0.6."""
    answers = np.where(np.arange(100) < wrong, 1 - LABELS, LABELS)
    confidence = np.linspace(0.6, 1, 100, dtype=np.float32)
    probabilities = np.where(np.eye(2)[answers] == 1, confidence[:, None], 1 - confidence[:, None])
    return Decision(probabilities.astype(np.float32), np.broadcast_to(exits, 100), confidence, defer_below)


def cascade(defer_below: float = 0.0) -> dict[str, Decision]:
    return {
        "exit_0": decision(20),
        "exit_1": decision(4),
        "ensemble": decision(6),
        "no-early-exit": decision(4),
        "cascade": decision(5, np.arange(100) // 75, defer_below),
    }


def evaluated(**options: object) -> Evaluation:
    return evaluate_decisions(cascade(), LABELS, CLASSES, **options)  # type: ignore[arg-type]


def test_a_cascade_is_measured_exit_by_exit_and_against_no_early_exit() -> None:
    found = evaluated()
    assert [found.rows[name].accuracy for name in found.rows] == [0.8, 0.96, 0.94, 0.96, 0.95]
    assert {name: e.share for name, e in found.exits.items()} == {"exit_0": 0.75, "exit_1": 0.25}
    assert found.exits["exit_0"].accuracy == pytest.approx(70 / 75)
    assert found.no_early_exit is not None
    assert (found.no_early_exit.lost, found.no_early_exit.gained) == (1, 0)
    text = found.text()
    assert "cascade against no-early-exit: -1.00 points (1 lost, 0 gained), p 1.000: within noise" in text
    assert max(map(len, text.splitlines())) <= 100
    table = json.loads(json.dumps(found.table()))
    assert table["cascade"]["exits"]["exit_1"]["images"] == 25
    assert table["cascade"]["no_early_exit"]["lost"] == 1
    assert "answered" not in table["cascade"]


def test_deferred_images_are_left_out_of_the_error() -> None:
    """Below 0.62 are the first five, the wrong ones: 0.6 + 0.4 * 5 / 99 = 0.6202."""
    found = evaluate_decisions(cascade(0.62), LABELS, CLASSES)
    assert found.answered is not None
    assert (found.answered.coverage, found.answered.error) == (0.95, 0.0)
    assert "95.00 [" in found.text()
    assert "deferred to a person" in found.text()
    assert found.table()["cascade"]["answered"]["images"] == 95


def test_rows_are_compared_with_those_of_the_same_name_or_the_other_networks_answer() -> None:
    found = evaluated(against={"exit_0": decision(0)}, name="plain.onnx")
    against = found.against
    assert against is not None
    assert against.rows == dict.fromkeys(found.rows, "exit_0")
    assert (against.paired["cascade"].lost, against.paired["cascade"].gained) == (5, 0)
    assert {c: (p.images, p.lost) for c, p in against.classes.items()} == {"a": (50, 5), "b": (50, 0)}
    text = found.text()
    assert "exit_0 against exit_0 of plain.onnx: -20.00 points (20 lost, 0 gained), p < 0.001: a difference" in text
    assert "no class differs beyond noise" in text
    table = found.table()
    assert table["cascade"]["against"]["classes"]["a"]["lost"] == 5
    assert table["exit_0"]["against"]["name"] == "plain.onnx"
    same = evaluated(against=cascade(), name="student.onnx").against
    assert same is not None
    assert same.rows["ensemble"] == "ensemble"


def test_groups_are_the_units_of_intervals_and_tests() -> None:
    """Ten copies of ten images: the interval of 80 % is that of 8 of 10 groups."""
    groups = np.arange(100) // 10
    grouped, alone = evaluated(groups=groups).rows["exit_0"], evaluated().rows["exit_0"]
    assert (grouped.groups, alone.groups) == (10, None)
    assert grouped.accuracy_interval is not None
    assert alone.accuracy_interval is not None
    assert grouped.accuracy_interval[0] < 0.5 < alone.accuracy_interval[0]
    assert "10 groups of images" in evaluated(groups=groups).text()
