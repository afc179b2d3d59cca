"""Choosing thresholds: a toy worked by hand, agreement with `simulate`, and the real thing on a real engine."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest

from edgekd.artifacts.manifest import Manifest, read_manifest, write_manifest
from edgekd.artifacts.recipe import Recipe
from edgekd.errors import ArtifactError, ConfigError
from edgekd.host import host_info
from edgekd.policy import Average, ensemble, simulate, softmax
from edgekd.runtime.engine import open_engine
from edgekd.runtime.thresholds import fit_temperature
from edgekd.runtime.tuning import CURVE_POINTS, choose, save_tuned, threshold_path, tune
from edgekd.types import Array, Labels

OWN = {"confidence": "max_probability", "average": "own"}
MS = (1.0, 1.0, 1.0)


def toy() -> tuple[Array, Labels]:
    """100 images of class 0. Exit 0 is sure (0.95) and right of 60, unsure (0.6) of 40 and wrong about half of them.
    Exit 1 is sure (0.9) and right of 20 of those 40, unsure of the rest and wrong about 4. Exit 2 is right."""
    first = np.full((3, 100), 0.95)
    first[0, 60:] = [0.6, 0.4] * 20
    first[1, 60:] = [0.9] * 20 + [0.6, 0.6, 0.6, 0.6, 0.4] * 4
    return np.float32(np.log(np.stack([first, 1 - first], axis=-1))), np.zeros(100, np.int64)


def test_the_fastest_setting_without_loss() -> None:
    tuned = choose(*toy(), MS, **OWN, max_accuracy_drop=0.0)
    assert (tuned.accuracy, tuned.reference_accuracy, tuned.accuracy_error) == (1.0, 1.0, 0.0)
    assert tuned.shares == pytest.approx((0.6, 0.2, 0.2))
    assert tuned.latency_ms == pytest.approx(0.6 * 1 + 0.2 * 2 + 0.2 * 3)


@pytest.mark.parametrize(
    ("limit", "accuracy", "latency"), [(1.0, 0.8, 1.0), (1.4, 0.96, 1.4), (1.6, 1, 1.6), (9, 1, 1.6)]
)
def test_the_most_accurate_setting_within_a_latency(limit: float, accuracy: float, latency: float) -> None:
    tuned = choose(*toy(), MS, **OWN, latency_ms=limit)
    assert tuned.accuracy == pytest.approx(accuracy)
    assert tuned.latency_ms == pytest.approx(latency)


def test_the_bound_is_kept_with_a_standard_error() -> None:
    """Leaving 4 images wrong costs 4 points, and 4 + sqrt(4) with the margin."""
    assert choose(*toy(), MS, **OWN, max_accuracy_drop=5.9).accuracy == 1.0
    tuned = choose(*toy(), MS, **OWN, max_accuracy_drop=6.1)
    assert (tuned.accuracy, tuned.latency_ms) == pytest.approx((0.96, 1.4))
    assert tuned.accuracy_error == pytest.approx(2 / 100)


def test_the_toy_curve() -> None:
    curve = choose(*toy(), MS, **OWN, latency_ms=9).curve
    found = [(point.accuracy, point.latency_ms) for point in curve]
    assert found == [pytest.approx(p) for p in [(0.8, 1.0), (0.96, 1.4), (1.0, 1.6)]]


def noisy(exits: int, count: int, seed: int) -> tuple[Array, Labels]:
    """Logits that get better with depth, of images that are easy to different degrees; 5 classes."""
    rng = np.random.default_rng(seed)
    labels, ease = rng.integers(0, 5, count), rng.gamma(3, 1.5, (count, 1))
    shared = rng.normal(size=(count, 5))
    signal = ease * np.eye(5)[labels]
    logits = [signal * (0.7 + 0.4 * k / exits) + shared + rng.normal(size=(count, 5)) for k in range(exits)]
    return np.float32(logits), labels


@pytest.mark.parametrize("exits", [1, 2, 3, 4, 6])
@pytest.mark.parametrize(
    ("measure", "average"), [("max_probability", "mean"), ("margin", "own"), ("entropy", "geometric")]
)
def test_reported_results_equal_a_simulation(exits: int, measure: str, average: Average) -> None:
    logits, labels = noisy(exits, 200, seed=exits)
    stages = tuple(0.5 + 0.1 * k for k in range(exits))
    tuned = choose(logits, labels, stages, confidence=measure, average=average, max_accuracy_drop=5.0)
    assert tuned.policy.is_tuned
    for thresholds, promised in [
        (tuned.policy.thresholds, (tuned.accuracy, tuned.latency_ms, *tuned.shares)),
        *((p.thresholds, (p.accuracy, p.latency_ms, *p.shares)) for p in tuned.curve),
    ]:
        found = simulate(logits, dataclasses.replace(tuned.policy, thresholds=thresholds))
        shares = np.bincount(found.exits, minlength=exits) / len(labels)
        accuracy = (found.probabilities.argmax(axis=1) == labels).mean()
        assert promised == pytest.approx((accuracy, shares @ np.cumsum(stages), *shares))
    ensemble_right = ensemble(logits).argmax(axis=1) == labels
    assert tuned.ensemble_accuracy == ensemble_right.mean()
    assert tuned.reference_accuracy == max(ensemble_right.mean(), (logits[-1].argmax(axis=1) == labels).mean())
    assert tuned.accuracy >= tuned.reference_accuracy - 0.05
    assert len(tuned.curve) <= CURVE_POINTS
    for name in ("accuracy", "latency_ms"):
        assert (np.diff([getattr(point, name) for point in tuned.curve]) > 0).all()


def test_a_wider_bound_is_never_slower() -> None:
    logits, labels = noisy(4, 400, seed=9)
    times = [choose(logits, labels, (1.0,) * 4, max_accuracy_drop=d).latency_ms for d in (0.5, 1, 2, 4, 8)]
    assert times == sorted(times, reverse=True)
    assert times[-1] < times[0]


def test_a_path_leads_from_never_to_the_fastest() -> None:
    logits, labels = noisy(4, 300, seed=2)
    stages = (1.0, 0.5, 0.5, 2.0)
    path = threshold_path(logits, labels, stages)
    assert path[0].policy == path[0].policy.without_early_exit()
    assert (path[0].loss, path[0].latency_ms, path[0].shares) == (0, 4, (0, 0, 0, 1))
    assert 10 < len(path) <= 60
    assert (np.diff([point.latency_ms for point in path]) < 0).all()
    assert path[-1].shares == (1, 0, 0, 0)
    reference = logits[-1].argmax(axis=1)
    for point in path:
        found = simulate(logits, point.policy)
        assert point.loss == np.mean(found.probabilities.argmax(axis=1) != reference)
        assert point.latency_ms == pytest.approx(np.cumsum(stages)[found.exits].mean())


def test_the_average_is_chosen_by_the_accuracy_without_early_exit() -> None:
    """Exits with the same signal and noise of their own: the mean is better. One good exit at the end: the last is."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 600)
    signal = 2 * np.eye(4)[labels]
    alike = np.float32(signal + rng.normal(size=(3, 600, 4)))
    assert choose(alike, labels, MS, max_accuracy_drop=1).policy.average == "mean"
    alike[2] += np.float32(6 * np.eye(4)[labels])
    alike[:2] *= 9  # early exits that are sure and often wrong
    assert choose(alike, labels, MS, max_accuracy_drop=1).policy.average in ("own", "geometric")


def test_too_few_images_for_the_margin(caplog: pytest.LogCaptureFixture) -> None:
    logits = np.float32([[[2, 0]] * 9 + [[0, 2]], [[0.1, 0]] * 7 + [[0, 0.1], [0, 5], [5, 0]]])
    labels = np.zeros(10, np.int64)  # exit 0 is wrong about image 9, exit 1 about 7 and 8, the ensemble about 8
    with caplog.at_level(logging.WARNING):
        tuned = choose(logits, labels, (1.0, 1.0), **OWN, max_accuracy_drop=0.0)
    assert (tuned.accuracy, tuned.reference_accuracy, tuned.shares) == (0.9, 0.9, (1.0, 0.0))
    assert "10 images are too few" in caplog.text


def test_unreachable_goals_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"0\.5 ms; the fastest take 1\.000 ms"):
        choose(*toy(), MS, **OWN, latency_ms=0.5)
    with pytest.raises(ConfigError, match=r"-1 points of the network without early exit; the best loses 0\.00"):
        choose(*toy(), MS, **OWN, max_accuracy_drop=-1.0)


def test_temperature_recovers_a_known_scaling() -> None:
    rng = np.random.default_rng(0)
    true = np.float32(rng.normal(size=(4000, 4)) * 2)
    labels = (softmax(true).cumsum(axis=1) < rng.random((4000, 1))).sum(axis=1)
    for scale in (0.5, 1.0, 3.0):
        assert fit_temperature(true * np.float32(scale), labels) == pytest.approx(scale, rel=0.08)


def test_temperature_bounds() -> None:
    sure = np.float32(np.eye(3)[[0, 1, 2] * 5] * 4)
    right = np.array([0, 1, 2] * 5)
    assert fit_temperature(sure, right) == pytest.approx(0.25, rel=0.01)
    assert fit_temperature(sure, (right + 1) % 3) == pytest.approx(10, rel=0.01)


def test_tune_a_real_engine_and_keep_it(student_onnx: Path, tmp_path: Path) -> None:
    engine = open_engine(student_onnx, threads=1)
    images = np.random.default_rng(1).normal(size=(34, 3, 32, 32)).astype(np.float32)
    labels = engine.logits(images)[3].argmax(axis=1)
    seen: list[tuple[int, int]] = []
    tuned = tune(engine, images, labels, latency_ms=1e6, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(32, 34), (34, 34)]
    assert 0 < tuned.latency_ms < 1e6

    write_manifest(tmp_path, Manifest(engine.metadata, "onnxruntime", "1", Recipe("fp32"), {}, host_info(), {}, ""))
    save_tuned(tmp_path, tuned, {"images": 34}, digest=read_manifest(tmp_path).digest)
    with pytest.raises(ArtifactError, match="rewritten while"):
        save_tuned(tmp_path, tuned, {}, digest="of what it was before")
    kept = read_manifest(tmp_path)
    assert kept.metadata.policy == tuned.policy
    assert kept.curve == tuned.curve
    assert kept.tuning is not None
    assert kept.tuning.images == 34
    assert kept.tuning.accuracy == tuned.accuracy


def toy_images() -> tuple[Array, Labels]:
    return np.zeros((1, 3, 32, 32), np.float32), np.zeros(1, np.int64)


@pytest.mark.parametrize("words", [{"confidence": "margn"}, {"average": "meen"}])
def test_unknown_words_are_refused_with_the_nearest(words: dict[str, str], student_onnx: Path) -> None:
    ((option, word),) = words.items()
    near = {"margn": "margin", "meen": "mean"}[word]
    with pytest.raises(ConfigError, match=rf"unknown --{option} '{word}'[\s\S]*Did you mean '{near}'"):
        tune(open_engine(student_onnx), *toy_images(), latency_ms=1.0, **words)  # type: ignore[arg-type]


def test_exactly_one_goal_is_required(student_onnx: Path) -> None:
    engine, (images, labels) = open_engine(student_onnx), toy_images()
    with pytest.raises(ConfigError, match="one goal"):
        tune(engine, images, labels)
    with pytest.raises(ConfigError, match="one goal"):
        tune(engine, images, labels, max_accuracy_drop=1.0, latency_ms=1.0)
