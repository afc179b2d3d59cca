"""`edgekd add-exits` from a network of another framework's kind to labels, on real files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
import torch
from helpers.cli import edgekd
from helpers.small_classifiers import Residual

from edgekd import export_module
from edgekd.artifacts.metadata import read_student
from edgekd.artifacts.training_images import unseen
from edgekd.conversion.features import opened_graph
from edgekd.data.images import load_batch
from edgekd.data.pictures import find_pictures
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import read_split
from edgekd.data.synthetic import write_cells
from edgekd.runtime.engine import open_engine
from edgekd.training.run_folder import load_model, save_model


class Trained(NamedTuple):
    """A trained network as ONNX, its class names, and a folder of pictures."""

    onnx: Path
    classes: Path
    pictures: Path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A small residual network, trained for a few seconds on 400 synthetic cells of 24 pixels."""
    folder = tmp_path_factory.mktemp("trained")
    write_cells(folder / "cells", count=400, size=24)
    files = sorted((folder / "cells").rglob("*.png"))
    names = sorted({file.parent.name for file in files})
    images = torch.from_numpy(load_batch(files, Preprocess(16)))
    labels = torch.tensor([names.index(file.parent.name) for file in files])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Residual()
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        for _ in range(60):
            rows = torch.randint(len(files), (64,))
            loss = torch.nn.functional.cross_entropy(network(images[rows]), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    export_module(network, classes=names, preprocess=Preprocess(16), out=folder / "plain.onnx")
    (folder / "classes.txt").write_text("\n".join(names))
    return Trained(folder / "plain.onnx", folder / "classes.txt", folder / "cells")


@pytest.fixture(scope="module")
def student(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("student") / "student.onnx"
    said = edgekd("add-exits", trained.onnx, *_options(trained), "--exits", "2", "--out", out)
    assert "2 early exits" in said
    assert "thresholds were chosen on one half and applied to the other" in said
    assert "new ones may do worse" in said
    assert "the final logits are the network's to the bit" in said
    assert "next: edgekd compile" in said
    assert [path.name for path in out.parent.iterdir() if not path.name.endswith("-lock")] == ["student.onnx"]
    return out


def _options(trained: Trained) -> list[str | Path]:
    return ["--data", trained.pictures, "--classes", trained.classes, "--preprocess", "imagenet", "--resize", "stretch"]


def test_the_final_answers_stay_what_they_were(student: Path, trained: Trained) -> None:
    images = load_batch(sorted(trained.pictures.rglob("*.png")), Preprocess(16))
    expected = opened_graph(onnx.load(trained.onnx))(images)[0]
    engine = open_engine(student)
    assert len(engine.metadata.exits) == 3
    np.testing.assert_array_equal(engine.final(images)[-1], expected)
    np.testing.assert_array_equal(engine.logits(images)[-1], expected)
    staged = engine.staged_logits(images)[-1]
    np.testing.assert_allclose(staged, expected, atol=1e-5)
    np.testing.assert_array_equal(staged.argmax(axis=1), expected.argmax(axis=1))


def test_heads_answer_like_the_network(student: Path, trained: Trained) -> None:
    metadata = read_student(student).metadata
    pictures = find_pictures(trained.pictures)
    rest = unseen(pictures, metadata.training_images)
    used = metadata.provenance["added_exits"]["pictures"]
    assert (used["views"], used["learned"] + used["held_out"] + len(rest)) == (3, 400)
    assert len(rest) == pytest.approx(160, abs=16)  # the default leaves 40 % of the groups
    logits = open_engine(student).logits(load_batch([trained.pictures / p.path for p in rest], Preprocess(16)))
    answers = logits.argmax(axis=2)
    assert (answers[:-1] == answers[-1]).mean(axis=1).min() > 0.6  # 0.2 at random


@pytest.mark.parametrize(
    ("recipe", "backend"), [("fp32", "onnxruntime"), ("int8", "onnxruntime"), ("int8", "openvino")]
)
def test_it_compiles_without_labels_and_predicts(
    recipe: str, backend: str, student: Path, trained: Trained, tmp_path: Path
) -> None:
    pytest.importorskip(backend)
    out = tmp_path / "student.engine"
    said = edgekd(
        *("compile", student, "--recipe", recipe, "--backend", backend, "--data", trained.pictures, "--out", out),
        *("--set", "max_accuracy_drop=20"),
    )
    assert "accuracy is agreement with the answers of student.onnx" in said
    assert "--max-change" in said
    table = edgekd("predict", out, next(trained.pictures.rglob("*.png")))
    assert any(name in table for name in trained.classes.read_text().split())


def test_a_run_folder_gets_exits_from_its_training_images(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekd.conversion.add_exits.LEAST_PICTURES", 100)
    run, out = tmp_path / "run", tmp_path / "student.onnx"
    words = ["--model", "resnet18", "--protocol", "demo", "--image-size", "16", "--epochs", "1", "--set", "stem=small"]
    edgekd("train", "--data", trained.pictures, "--out", run, "--split", "ratio:2,1,1", *words)
    network, metadata = load_model(run)
    files = [trained.pictures / item.path for item in read_split(run).subset("train")]
    with torch.no_grad():  # so short a training gives one answer to all images
        network.backbone.fc.bias -= network(torch.from_numpy(load_batch(files, Preprocess(16)))).logits[0].mean(0)
    save_model(run / "model.safetensors", network, metadata)
    assert "these are training images" in edgekd("add-exits", run, "--exits", "1", "--views", "1", "--out", out)
    student = read_student(out).metadata
    assert len(student.exits) == 2
    used = student.provenance["added_exits"]["pictures"]
    assert used["learned"] + used["held_out"] == len(files)


def test_named_tensors_become_the_exits(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "student.onnx"
    said = edgekd("add-exits", trained.onnx, *_options(trained), "--exits", "nothing,nope", "--out", out, code=1)
    assert "'nothing', 'nope' are no tensors to exit at" in said
    said = edgekd("add-exits", trained.onnx, *_options(trained), "--exits", "0", "--out", out, code=1)
    assert "give a number from 1 to" in said
    tensor = read_student_cut(trained.onnx)
    words = ["--exits", tensor, "--views", "1", "--heads-share", "1", "--no-antialias", "--out", out]
    assert "all pictures were used" in edgekd("add-exits", trained.onnx, *_options(trained), *words)
    metadata = read_student(out).metadata
    assert metadata.exits[0].boundary == (tensor,)
    assert not metadata.preprocess.antialias


def read_student_cut(path: Path) -> str:
    """The tensor behind the first residual block."""
    from edgekd.conversion.cut_points import find_cut_points
    from edgekd.conversion.source import read_classifier

    return [cut for cut in find_cut_points(read_classifier(path).model) if len(cut.tensors) == 1][1].name


def test_labels_are_not_expected_without_a_split(trained: Trained, tmp_path: Path) -> None:
    words = ["add-exits", trained.onnx, *_options(trained), "--expect", "95", "--out", tmp_path / "student.onnx"]
    assert "--expect needs labels" in edgekd(*words, code=1)


def test_too_few_pictures_are_refused(trained: Trained, tmp_path: Path) -> None:
    few = tmp_path / "few"
    few.mkdir()
    for file in sorted(trained.pictures.rglob("*.png"))[:50]:
        (few / f"{file.parent.name}-{file.name}").write_bytes(file.read_bytes())
    words = ["add-exits", trained.onnx, *_options(trained)[2:], "--data", few, "--out", tmp_path / "student.onnx"]
    said = edgekd(*words, code=1)
    assert "50 pictures (30 of them for the exit heads) are too few to train exit heads: at least 200" in said
    said = edgekd(*words, "--heads-share", "1", code=1)
    assert "50 pictures are too few" in said
    assert not (tmp_path / "student.onnx").exists()


def test_the_same_answer_to_all_pictures_is_refused(trained: Trained, tmp_path: Path) -> None:
    model = onnx.load(trained.onnx)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("fc.weight"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tuple(tensor.dims), np.float32), tensor.name))
    onnx.save(model, str(tmp_path / "constant.onnx"))
    words = ["add-exits", tmp_path / "constant.onnx", *_options(trained), "--out", tmp_path / "student.onnx"]
    assert "the same answer to all" in edgekd(*words, code=1)


def test_another_file_is_not_replaced(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    words = ["add-exits", trained.onnx, *_options(trained), "--out", tmp_path / "notes.txt"]
    assert "it would be replaced" in edgekd(*words, code=1)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_interruption_leaves_nothing(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("edgekd.conversion.add_exits.train_heads", interrupt)
    out = tmp_path / "new" / "student.onnx"
    said = edgekd("add-exits", trained.onnx, *_options(trained), "--out", out, code=130)
    assert "unfinished output was removed" in said
    assert not out.parent.exists()
