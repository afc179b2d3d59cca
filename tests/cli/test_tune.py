"""edgekd tune: exits that do not pay are cut out, and every command takes the plain network that may be left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from helpers.cli import edgekd
from helpers.two_lights import write_network, write_pictures

from edgekd.artifacts.manifest import read_manifest, void_reason
from edgekd.artifacts.metadata import put_metadata, read_student
from edgekd.compiler import exit_selection
from edgekd.compiler.gain import Gain, Ratio
from edgekd.data.folders import check, scan
from edgekd.data.split import read_split
from edgekd.data.splitting import make_split
from edgekd.runtime.classifier import Classifier
from edgekd.serialization import to_json
from edgekd.testing.students import small_student

FASTER = Gain({1: Ratio(0.5, 1.0, 0.5, 0.49, 0.51), 32: Ratio(16.0, 32.0, 0.5, 0.49, 0.51)})
SLOWER = Gain({1: Ratio(1.3, 1.0, 1.3, 1.29, 1.31), 32: Ratio(42.0, 32.0, 1.31, 1.3, 1.32)})


@pytest.fixture
def files(cells: Path, tmp_path: Path) -> tuple[Path, ...]:
    """The engine of a small student for the synthetic cells, compiled by ONNX Runtime, and the words for its images."""
    split = tmp_path / "split.json"
    split.write_bytes(to_json(make_split(check(scan(cells)))))
    student = read_student(small_student(tmp_path / "student.onnx"))
    put_metadata(student.model, replace(student.metadata, classes=read_split(split).classes))
    onnx.save(student.model, str(tmp_path / "student.onnx"))
    edgekd("compile", tmp_path / "student.onnx", "--backend", "onnxruntime", "--set", "batch_sizes=[1,4]")
    return tmp_path / "student.engine", cells, split


def test_the_plain_network_that_is_left(files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, cells, split = files
    images = ("--data", cells, "--split", split)
    goal = ("--max-accuracy-drop", "100")
    monkeypatch.setattr(exit_selection, "measure_gain", lambda *_: SLOWER)
    final = Classifier(engine, strategy="final").predict(sorted(cells.rglob("*.png"))[:4])
    said = edgekd("tune", engine, *images, *goal)
    assert "is cut out" in said
    assert "the engine is the plain network, without early exit" in said
    manifest = read_manifest(engine)
    assert len(manifest.metadata.exits) == 1
    assert manifest.tuning.shares == (1.0,)
    left = Classifier(engine)
    assert [p.label for p in left.predict(sorted(cells.rglob("*.png"))[:4])] == [p.label for p in final]
    left.close()
    edgekd("tune", engine, *images, *goal)
    out = engine.parent / "predictions.json"
    edgekd("predict", engine, cells, "--out", out)
    assert {row["exit"] for row in json.loads(out.read_text())} == {"exit_0"}
    edgekd("evaluate", engine, *images)
    quick = ("min_seconds=0.02", "warmup_seconds=0.01", "min_count=[4,2]", "rounds=1")
    flags = [word for value in quick for word in ("--set", value)]
    said = edgekd("bench", engine, *images, "--no-report", *flags, "--out", engine.parent / "record.json")
    assert "final" in said


def test_exits_are_kept_on_request(files: tuple[Path, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, cells, split = files
    monkeypatch.setattr(exit_selection, "measure_gain", lambda *_: pytest.fail("it measured"))
    edgekd("tune", engine, "--data", cells, "--split", split, "--latency-ms", "100", "--keep-exits")
    assert len(read_manifest(engine).metadata.exits) == 3


def test_a_promise_is_certified_for_the_exits_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exit is kept while it pays; where the certified setting does not, the engine answers without early exit."""
    write_pictures(tmp_path / "pictures", 400, group=2)
    write_network(tmp_path / "student.onnx")
    engine = tmp_path / "student.engine"
    edgekd("compile", tmp_path / "student.onnx", "--backend", "onnxruntime", "--set", "batch_sizes=[1,32]")
    words = ("tune", engine, "--data", tmp_path / "pictures", "--max-change", "2")
    for module in ("exit_selection", "gain"):
        monkeypatch.setattr(f"edgekd.compiler.{module}.measure_gain", lambda *_: FASTER)
    said = edgekd(*words)
    assert "the certified setting beside the plain network: batch 1" in said
    manifest = read_manifest(engine)
    assert manifest.certificate is not None
    assert len(manifest.metadata.exits) == 2
    assert void_reason(manifest) == ""
    monkeypatch.setattr("edgekd.compiler.gain.measure_gain", lambda *_: SLOWER)
    assert "it is no faster, so it is not used" in edgekd(*words)
    manifest = read_manifest(engine)
    assert manifest.certificate is None
    assert manifest.metadata.policy.is_last_exit
    monkeypatch.setattr(exit_selection, "measure_gain", lambda *_: SLOWER)
    assert "exit_0 does not pay and is cut out" in edgekd(*words)
    assert len(read_manifest(engine).metadata.exits) == 1
