"""Engines of stages alone: they answer as engines with every graph do, and what needs a graph in one piece has it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekd.artifacts.manifest import NETWORK_FILE, read_manifest
from edgekd.artifacts.metadata import read_student
from edgekd.backends.base import load_recipe
from edgekd.compiler import exit_selection, gain
from edgekd.compiler.build import compile_engine
from edgekd.compiler.exit_selection import tune_exits
from edgekd.compiler.whole_graphs import with_graphs
from edgekd.errors import ArtifactError
from edgekd.policy import NEVER_EXIT, Policy
from edgekd.runtime.classifier import Classifier
from edgekd.runtime.engine import Engine, open_engine
from edgekd.runtime.tuning import PathPoint
from edgekd.testing.students import small_student
from edgekd.types import Array

IMAGES = np.random.default_rng(3).normal(size=(11, 3, 16, 16)).astype(np.float32)
EARLY, NEVER = Policy((1.0,) * 3, (0.3, 0.3), average="own"), Policy((1.0,) * 3, (NEVER_EXIT,) * 2, average="own")


def compiled(tmp_path: Path, *, graphs: str, backend: str = "onnxruntime", precision: str = "fp32") -> Path:
    student, out = read_student(small_student(tmp_path / "student.onnx")), tmp_path / f"{graphs}.engine"
    settings = load_recipe(precision, {"batch_sizes": [1, 4], "graphs": graphs, "max_accuracy_drop": 100.0})
    labels = open_engine(tmp_path / "student.onnx").logits(IMAGES)[-1].argmax(axis=1)
    given = {"calibration": IMAGES, "validation": (IMAGES, labels)}
    compile_engine(student, out, recipe=settings, backend=backend, **given)
    return out


@pytest.mark.parametrize(("backend", "precision"), [("onnxruntime", "fp32"), ("openvino", "int8"), ("ncnn", "fp32")])
def test_stages_alone_answer_as_every_graph(tmp_path: Path, backend: str, precision: str) -> None:
    pytest.importorskip(backend)
    paths = [compiled(tmp_path, graphs=g, backend=backend, precision=precision) for g in ("stages", "all")]
    stages, every = map(open_engine, paths)
    assert {f.graph for f in stages.manifest.files.values()} == {"stage_0", "stage_1", "stage_2", "network"}
    assert {f.graph for f in every.manifest.files.values()} >= {"monolithic", "final"}
    assert stages.manifest.parity.staged_to_monolithic is None
    assert stages.manifest.precision == every.manifest.precision
    for engine in (stages, every):
        engine.largest_batch = 4 if engine is stages else None  # as a backend with fixed batch sizes has
    tolerance = 1e-5 if precision == "fp32" else 0.05  # of the range: int8 is rounded in other places
    for count in (1, 3, 11):
        for name in ("monolithic", "final"):
            found, expected = (np.stack(getattr(engine, name)(IMAGES[:count])) for engine in (stages, every))
            np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.ptp(expected))
    for strategy in ("full", "final"):
        found, expected = (Classifier(e, strategy=strategy).run(IMAGES).probabilities for e in (stages, every))
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)


def test_the_plain_network_of_a_comparison_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against its own stages a cascade would seem to gain by exits that only save what their heads cost."""
    folder = compiled(tmp_path, graphs="stages")
    engine, timed = open_engine(folder), list[Engine]()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(gain, "_ratio", lambda classifiers, *_: timed.extend(c.engine for c in classifiers))
    gain.measure_gain(engine, folder, EARLY, IMAGES, sizes=(1,))
    cascade, plain = timed
    assert cascade is engine
    assert not engine.has("final")
    assert plain.has("final")
    assert not plain.has("monolithic")  # nothing needs it
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_copy_without_its_network_cannot_be_compared(tmp_path: Path) -> None:
    folder = compiled(tmp_path, graphs="stages")
    (folder / NETWORK_FILE).unlink()
    engine = open_engine(folder)
    with pytest.raises(ArtifactError, match="stages alone") as caught, with_graphs(engine, folder, ["final"]):
        pass
    assert "--graphs all" in caught.value.fix
    found = tune_exits(folder, _search(EARLY), IMAGES)
    assert "unknown whether the exits pay" in found.messages[0]
    assert found.tuned.policy == EARLY


def test_an_engine_that_never_exits_early_gets_the_graph_that_it_runs(tmp_path: Path) -> None:
    folder = compiled(tmp_path, graphs="stages")
    before = open_engine(folder).final(IMAGES)[0]
    found = tune_exits(folder, _search(NEVER), IMAGES)
    assert found.engine.manifest == read_manifest(folder)
    assert found.engine.has("final")
    classifier = Classifier(folder, policy=NEVER)
    np.testing.assert_allclose(classifier.engine.final(IMAGES)[0], before, rtol=0, atol=1e-4)
    assert {path.name for path in folder.iterdir()} == {*found.engine.manifest.files, "manifest.json"}
    assert set(classifier.engine._runners) == {"final"}


def _search(policy: Policy) -> exit_selection.Search[PathPoint]:
    def find(logits: Array, stages: tuple[float, ...]) -> PathPoint:
        return PathPoint(policy, sum(stages), 0.0, ())

    return find
