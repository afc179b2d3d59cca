from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from edgekd.bench.accuracy import (
    Bin,
    Metrics,
    Rates,
    answered,
    calibration_error,
    exit_accuracies,
    gap,
    metrics,
    reliability,
)
from edgekd.bench.text_tables import confusion_text, text_table
from edgekd.errors import BackendError, DataError

# truth 0 0 0 1 1 2, answers 0 0 1 1 2 2
LABELS = np.array([0, 0, 0, 1, 1, 2])
PROBABILITIES = np.array(
    [[0.8, 0.1, 0.1], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.9, 0.0], [0.1, 0.4, 0.5], [0.0, 0.0, 1.0]], np.float32
)


def points(rates: Rates) -> Rates:
    """Without the intervals, which tests of their own check."""
    return dataclasses.replace(rates, sensitivity_interval=None, specificity_interval=None)


def test_by_hand() -> None:
    result = metrics(PROBABILITIES, LABELS, "abc")
    assert result.n == 6
    assert result.confusion == ((2, 1, 0), (0, 1, 1), (0, 0, 1))
    assert result.accuracy == pytest.approx(4 / 6)
    assert points(result.per_class["a"]) == Rates(3, pytest.approx(2 / 3), 1.0, 1.0, pytest.approx(0.8))
    assert points(result.per_class["b"]) == Rates(2, 0.5, 0.75, 0.5, 0.5)
    assert points(result.per_class["c"]) == Rates(1, 1.0, pytest.approx(0.8), 0.5, pytest.approx(2 / 3))
    assert result.macro.sensitivity == pytest.approx((2 / 3 + 0.5 + 1) / 3)
    assert result.macro.specificity == pytest.approx((1 + 0.75 + 0.8) / 3)
    assert result.balanced_accuracy == result.macro.sensitivity
    # agreement 4/6; by independent answers (3*2 + 2*2 + 1*2)/36 = 1/3
    assert result.kappa == pytest.approx((4 / 6 - 1 / 3) / (1 - 1 / 3))
    # the confidences of right answers are 0.8 0.6 0.9 1.0, of wrong ones 0.7 0.5: 7 of 8 pairs are in order
    assert result.confidence_auc == pytest.approx(7 / 8)


def test_calibration_error_by_hand() -> None:
    # bins of 1/15: 0.92 twice in one bin, one of them right: |0.92 - 0.5| * 2/3; 0.6 alone and right: 0.4 * 1/3
    probabilities = np.array([[0.92, 0.08], [0.92, 0.08], [0.4, 0.6]])
    assert calibration_error(probabilities, np.array([0, 1, 1])) == pytest.approx(0.42 * 2 / 3 + 0.4 / 3)


def test_bins_of_similar_confidence() -> None:
    probabilities = np.array([[0.92, 0.08], [0.93, 0.07], [0.4, 0.6]])
    assert reliability(probabilities, np.array([0, 1, 1])) == (
        Bin(1, pytest.approx(0.6), 1.0),
        Bin(2, pytest.approx(0.925), 0.5),
    )


def test_each_exit_is_measured_on_the_images_that_took_it() -> None:
    exits, correct = np.array([0, 0, 0, 2]), np.array([True, True, False, True])
    found = exit_accuracies(exits, correct, 3)
    assert [(e.images, e.share, e.accuracy) for e in found.values()] == [
        (3, 0.75, pytest.approx(2 / 3)),
        (0, 0.0, None),
        (1, 0.25, 1.0),
    ]
    assert found["exit_2"].accuracy_interval == pytest.approx((0.025, 1.0))


def test_error_among_the_answered() -> None:
    """20 images, 5 deferred; 1 of the 15 others is wrong. Clopper-Pearson of 0/n by hand: 1 - 0.025**(1/n)."""
    deferred, correct = np.arange(20) < 5, np.arange(20) != 19
    found = answered(deferred, correct)
    assert (found.images, found.coverage, found.error) == (15, 0.75, pytest.approx(1 / 15))
    assert answered(deferred, np.ones(20, bool)).error_interval == pytest.approx((0, 1 - 0.025 ** (1 / 15)))
    nothing = answered(np.ones(20, bool), correct)
    assert (nothing.images, nothing.coverage, nothing.error, nothing.error_interval) == (0, 0.0, None, None)


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


def test_same_as_scikit_learn() -> None:
    from sklearn import metrics as sk

    rng = np.random.default_rng(1)
    probabilities = rng.dirichlet(np.full(4, 0.4), size=300)
    labels = np.where(rng.random(300) < 0.7, probabilities.argmax(axis=1), rng.integers(4, size=300))
    answers, result = probabilities.argmax(axis=1), metrics(probabilities, labels, "abcd")
    assert result.balanced_accuracy == pytest.approx(sk.balanced_accuracy_score(labels, answers))
    assert result.kappa == pytest.approx(sk.cohen_kappa_score(labels, answers))
    assert result.nll == pytest.approx(sk.log_loss(labels, probabilities))
    each = [2 * sk.brier_score_loss(labels == c, probabilities[:, c]) / 2 for c in range(4)]  # two-class ones
    assert result.brier == pytest.approx(sum(each))
    assert result.roc_auc == pytest.approx(sk.roc_auc_score(labels, probabilities, multi_class="ovr"))
    correct = answers == labels
    assert result.confidence_auc == pytest.approx(sk.roc_auc_score(correct, probabilities.max(axis=1)))


def test_class_without_images_has_no_say() -> None:
    result = metrics(PROBABILITIES[:5], LABELS[:5], "abc")  # c is answered once and never true
    assert points(result.per_class["c"]) == Rates(0, None, 0.8, None, None)
    assert result.macro.sensitivity == pytest.approx((2 / 3 + 0.5) / 2)
    assert "n/a" in text_table({"x": result})


def test_single_class_has_no_specificity() -> None:
    result = metrics(PROBABILITIES[:3], LABELS[:3], "abc")
    assert result.macro == Rates(3, pytest.approx(2 / 3), None, 1.0, pytest.approx(0.8))


def test_never_named_class_has_precision_zero() -> None:
    result = metrics(PROBABILITIES[:3], np.array([0, 0, 2]), "abc")
    assert points(result.per_class["c"]) == Rates(1, 0.0, 1.0, 0.0, 0.0)


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
    assert first.split()[:3] == ["accuracy", "[95", "%]"]
    assert second.split()[:5] == ["exit_0", "66.67", "[22.28,", "95.67]", "72.22"]


def test_tables_fit_100_columns_and_show_few_of_many_classes() -> None:
    rng = np.random.default_rng(0)
    names = [f"Superficial-Intermediat{c}" for c in range(30)]
    probabilities, labels = rng.dirichlet(np.ones(30), size=500), rng.integers(30, size=500)
    result = metrics(probabilities, labels, names)
    text = text_table({"no-early-exit": result, "cascade": result})
    assert "the 20 of 30 classes with the lowest sensitivity" in text
    assert max(map(len, text.splitlines())) <= 100
    least = min(names, key=lambda name: result.per_class[name].sensitivity)
    assert least in text
    worst = confusion_text(result).splitlines()
    assert worst[0].split() == ["truth", "prediction", "images"]
    counts = np.array(result.confusion) - np.diag(np.diag(result.confusion))
    assert int(worst[1].split()[-1]) == counts.max()
    assert len(worst) == 21


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
