"""Suspicious accuracies are explained by the mistake that was made, and pictures of another kind are noticed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from edgekd.conversion.plausibility import check_accuracy, check_answers
from edgekd.conversion.preprocessing import PreprocessOptions
from edgekd.conversion.source import TrainedClassifier, read_classifier
from edgekd.types import Labels

COLOURS = ["red", "green", "blue", "dark"]


@pytest.fixture
def classifier(tmp_path: Path) -> TrainedClassifier:
    """Names the strongest plane of pixels 0..255, or darkness."""
    weights = np.vstack([np.eye(3), np.zeros((1, 3))]).astype(np.float32)
    nodes = [
        helper.make_node("GlobalAveragePool", ["x"], ["pool"]),
        helper.make_node("Flatten", ["pool"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w", "b"], ["y"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", 3, 16, 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b", 4])],
        [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(np.float32([0, 0, 0, 90]), "b")],
    )
    path = tmp_path / "colours.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), str(path))
    plain = PreprocessOptions(mean=(0.0,), std=(1.0,), scale=1.0)
    return read_classifier(path, classes=COLOURS, preprocess=plain)


def pictures(count: int) -> tuple[list[np.ndarray], Labels]:
    rng, labels = np.random.default_rng(0), np.arange(count) % 4
    made = []
    for label in labels:
        pixels = rng.integers(0, 80, (16, 16, 3))
        pixels[..., label % 3] += 140 * (label < 3)
        made.append(pixels.astype(np.uint8))
    return made, labels


def test_a_right_classifier_is_not_suspicious(classifier: TrainedClassifier) -> None:
    found = check_accuracy(classifier, *pictures(60), expect=99.0)
    assert (found.accuracy, found.warning) == (1.0, "")


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"channels": "bgr"}, "--channels rgb"),
        ({"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "scale": 1 / 255}, "--preprocess none"),
    ],
)
def test_a_mistake_of_preprocessing_is_found(changes: dict, cause: str, classifier: TrainedClassifier) -> None:
    wrong = dataclasses.replace(classifier, preprocess=dataclasses.replace(classifier.preprocess, **changes))
    found = check_accuracy(wrong, *pictures(80), expect=97.0)
    assert found.accuracy < 0.6
    assert f"{cause} gives 100.0%" in found.warning


def test_another_order_of_classes_is_found(classifier: TrainedClassifier) -> None:
    images, labels = pictures(80)
    found = check_accuracy(classifier, images, (labels + 1) % 4)
    assert found.accuracy == 0
    assert "classes in another order (--classes) gives 100.0%" in found.warning


def test_random_labels_have_no_explanation(classifier: TrainedClassifier) -> None:
    images, _ = pictures(80)
    found = check_accuracy(classifier, images, np.random.default_rng(1).integers(0, 4, 80))
    assert "no better than always answering" in found.warning
    assert "neither another preset" in found.warning


def test_pictures_that_it_was_not_made_for() -> None:
    rng = np.random.default_rng(0)
    assert check_answers(5 * rng.normal(size=(40, 10))) == ""
    assert "100% of 40 pictures get the same answer" in check_answers(rng.normal(size=(40, 10)) + 9 * np.eye(10)[3])
    assert "hardly more than guessing" in check_answers(0.01 * rng.normal(size=(40, 10)))
