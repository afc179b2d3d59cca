"""`edgekd evaluate` of a tuned engine: its cascade, its comparison with another network, and the plots."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers.cli import edgekd
from PIL import Image

from edgekd.artifacts.metadata import put_metadata, read_onnx
from edgekd.policy import softmax
from edgekd.runtime.engine import open_engine

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for i in range(30):
        path = folder / "abcde"[i % 5] / f"{i:02}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def tuned(student_onnx: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with thresholds at the medians of its confidences, which defers about half of the last answers."""
    from edgekd.data.images import load_batch

    path = tmp_path_factory.mktemp("tuned") / "tuned.onnx"
    model, metadata = read_onnx(student_onnx)
    images = load_batch(sorted(data.rglob("*.png")), metadata.preprocess)
    medians = np.median(softmax(open_engine(student_onnx, threads=1).logits(images)).max(axis=-1), axis=1).tolist()
    policy = dataclasses.replace(metadata.policy, thresholds=tuple(medians[:3]), defer_below=medians[3])
    put_metadata(model, dataclasses.replace(metadata, policy=policy))
    onnx.save(model, str(path))
    return path


def test_every_row_of_a_tuned_engine(tuned: Path, student_onnx: Path, data: Path, tmp_path: Path) -> None:
    words = ("evaluate", tuned, "--data", data, "--against", student_onnx, "--specificity", "0.8")
    rows = json.loads(edgekd(*words, "--json", "--out", tmp_path / "measures.json"))
    assert list(rows) == [*(f"exit_{k}" for k in range(4)), "ensemble", "no-early-exit", "cascade"]
    cascade = rows["cascade"]
    assert sum(e["images"] for e in cascade["exits"].values()) == 30
    assert cascade["no_early_exit"]["images"] == 30
    assert 0 < cascade["answered"]["images"] < 30
    assert cascade["specificity"] == 0.8
    assert (cascade["against"]["name"], cascade["against"]["row"]) == ("student.onnx", "ensemble")  # it has no cascade
    same = {"name": "student.onnx", "row": "exit_2", "images": 30, "lost": 0, "gained": 0, "p_value": 1.0}
    assert rows["exit_2"]["against"] == same | {"groups": None}
    assert json.loads((tmp_path / "measures.json").read_text())["metrics"] == rows
    text = edgekd(*words)
    assert "exit_2 against exit_2 of student.onnx: the same images are right" in text
    assert "cascade against no-early-exit: " in text
    assert "deferred to a person" in text
    assert "sensitivity at 80 % spec." in text


def test_the_reliability_diagram_is_a_plot(tuned: Path, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "calibration.png"
    edgekd("evaluate", tuned, "--data", data, "--plot-calibration", path)
    with Image.open(path) as image:
        assert min(image.size) > 300
    assert "no suffix of a plot" in edgekd("evaluate", tuned, "--data", data, "--plot-calibration", "x.jpg", code=1)


def test_networks_with_other_classes_are_refused(tuned: Path, data: Path, tmp_path: Path) -> None:
    model, metadata = read_onnx(tuned)
    put_metadata(model, dataclasses.replace(metadata, classes=tuple("abcdf")))
    onnx.save(model, str(other := tmp_path / "other.onnx"))
    assert "has the classes a, b, c, d, f" in edgekd("evaluate", tuned, "--data", data, "--against", other, code=1)
