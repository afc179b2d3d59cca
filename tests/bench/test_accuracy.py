from __future__ import annotations

import numpy as np
import pytest

from edgekd.bench.accuracy import Metrics, Rates, calibration_error, confusion_text, gap, metrics, text_table
from edgekd.errors import BackendError, DataError

# truth 0 0 0 1 1 2, answers 0 0 1 1 2 2
LABELS = np.array([0, 0, 0, 1, 1, 2])
PROBABILITIES = np.array(
    [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.9, 0.0], [0.1, 0.4, 0.5], [0.0, 0.0, 1.0]], np.float32
)


def test_by_hand() -> None:
    result = metrics(PROBABILITIES, LABELS, "abc")
    assert result.n == 6
    assert result.confusion == ((2, 1, 0), (0, 1, 1), (0, 0, 1))
    assert result.accuracy == pytest.approx(4 / 6)
    assert result.per_class["a"] == Rates(3, pytest.approx(2 / 3), 1.0, 1.0, pytest.approx(0.8))
    assert result.per_class["b"] == Rates(2, 0.5, 0.75, 0.5, 0.5)
    assert result.per_class["c"] == Rates(1, 1.0, pytest.approx(0.8), 0.5, pytest.approx(2 / 3))
    assert result.macro.sensitivity == pytest.approx((2 / 3 + 0.5 + 1) / 3)
    assert result.macro.specificity == pytest.approx((1 + 0.75 + 0.8) / 3)


def test_calibration_error_by_hand() -> None:
    # bins of 1/15: 0.92 twice in one bin, one of them right: |0.92 - 0.5| * 2/3; 0.6 alone and right: 0.4 * 1/3
    probabilities = np.array([[0.92, 0.08], [0.92, 0.08], [0.4, 0.6]])
    assert calibration_error(probabilities, np.array([0, 1, 1])) == pytest.approx(0.42 * 2 / 3 + 0.4 / 3)


def test_certain_and_right_is_perfectly_calibrated() -> None:
    result = metrics(np.eye(3, dtype=np.float32), np.arange(3), "abc")
    assert (result.accuracy, result.ece, result.macro.f1) == (1.0, 0.0, 1.0)


def test_same_as_torchmetrics() -> None:
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("torchmetrics.functional.classification")
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(5), size=400)
    labels = np.where(rng.random(400) < 0.6, probabilities.argmax(axis=1), rng.integers(5, size=400))
    result = metrics(probabilities, labels, "abcde")
    p, t = torch.from_numpy(probabilities), torch.from_numpy(labels)
    for name, function in (
        ("sensitivity", reference.multiclass_recall),
        ("specificity", reference.multiclass_specificity),
        ("precision", reference.multiclass_precision),
        ("f1", reference.multiclass_f1_score),
    ):
        assert getattr(result.macro, name) == pytest.approx(float(function(p, t, num_classes=5, average="macro")))
        per_class = function(p, t, num_classes=5, average="none").tolist()
        assert [getattr(r, name) for r in result.per_class.values()] == pytest.approx(per_class)
    assert result.accuracy == pytest.approx(float(reference.multiclass_accuracy(p, t, num_classes=5, average="micro")))
    assert np.array_equal(result.confusion, reference.multiclass_confusion_matrix(p, t, num_classes=5).numpy())
    assert result.ece == pytest.approx(float(reference.multiclass_calibration_error(p, t, num_classes=5)), abs=1e-5)


def test_class_without_images_has_no_say() -> None:
    result = metrics(PROBABILITIES[:5], LABELS[:5], "abc")  # c is answered once and never true
    assert result.per_class["c"] == Rates(0, None, 0.8, None, None)
    assert result.macro.sensitivity == pytest.approx((2 / 3 + 0.5) / 2)
    assert "n/a" in text_table({"x": result})


def test_single_class_has_no_specificity() -> None:
    result = metrics(PROBABILITIES[:3], LABELS[:3], "abc")
    assert result.macro == Rates(3, pytest.approx(2 / 3), None, 1.0, pytest.approx(0.8))


def test_never_named_class_has_precision_zero() -> None:
    result = metrics(PROBABILITIES[:3], np.array([0, 0, 2]), "abc")
    assert result.per_class["c"] == Rates(1, 0.0, 1.0, 0.0, 0.0)


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(DataError, match="do not fit"):
        metrics(PROBABILITIES, LABELS, "ab")
    with pytest.raises(DataError, match="do not fit"):
        metrics(PROBABILITIES[:0], LABELS[:0], "abc")
    with pytest.raises(DataError, match="labels range"):
        metrics(PROBABILITIES, LABELS + 1, "abc")
    with pytest.raises(BackendError, match="not finite"):
        metrics(PROBABILITIES * np.nan, LABELS, "abc")


def test_texts() -> None:
    result = metrics(PROBABILITIES, LABELS, ("cell", "b", "c"))
    assert confusion_text(result).splitlines() == [
        "truth \\ prediction  [0]  [1]  [2]",
        "[0] cell              2    1    .",
        "[1] b                 .    1    1",
        "[2] c                 .    .    1",
    ]
    first, second, *_ = text_table({"exit_0": result, "ensemble": result}).splitlines()
    assert first.split() == ["accuracy", "sensitivity", "specificity", "precision", "F1", "calibration", "error"]
    assert second.split()[:3] == ["exit_0", "66.67", "72.22"]


def scored(right: int, images: int) -> Metrics:
    answers = np.arange(images) < right
    return metrics(np.stack([answers, ~answers], axis=1).astype(float), np.zeros(images, int), "ab")


@pytest.mark.parametrize(
    ("right", "images", "validation", "of", "said"),
    [
        (70, 100, 0.95, 200, "far below the 95.00% on 200 validation images (6.0 standard errors)"),
        (95, 100, 0.70, 200, "far above the 70.00% on 200 validation images"),
        (7, 10, 0.9, 10, ""),  # as far apart, on few images
        (90, 100, 0.95, 200, ""),
        (10, 10, 1.0, 10, ""),
    ],
)
def test_a_gap_that_chance_does_not_explain(right: int, images: int, validation: float, of: int, said: str) -> None:
    """Pooled by hand: (190 + 70) / 300 = 0.8667; sqrt(0.8667 * 0.1333 * (1/200 + 1/100)) = 0.0416; 0.25 of it 6.0."""
    found = gap(scored(right, images), accuracy=validation, images=of)
    assert said in found
    assert bool(said) == bool(found)
