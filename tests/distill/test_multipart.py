"""Following a teacher's path: its anchors on disk, which epoch learns from which, and what is missing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.multi_exit_outputs import one_exit, training_batch
from helpers.resume import resumes_exactly
from helpers.tiny_protocol import TINY
from safetensors.torch import load_file
from torch import Tensor

from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.distill.methods import needs_anchors, needs_teacher
from edgekd.errors import ArtifactError
from edgekd.training import loop, run_folder
from edgekd.training.train import train

FIVE = replace(TINY, epochs=5)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def test_value_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2), label 0, tau 2: half of ln 2 and half of 4 KL at tau 2."""
    batch = training_batch(*(one_exit(torch.tensor([logits])) for logits in ([0.0, 0], [2 * math.log(3), 0])))
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    criterion = Criterion(LossSettings(method="multipart", temperature=2.0))
    assert criterion(batch).item() == pytest.approx(0.5 * math.log(2) + 0.5 * 4 * kl, rel=1e-5)
    settings = LossSettings(method="multipart", temperature=2.0, loss_weights={"ce": 0.2, "multipart": 0.8})
    assert Criterion(settings)(batch).item() == pytest.approx(0.2 * math.log(2) + 0.8 * 4 * kl, rel=1e-5)
    assert needs_teacher("multipart")
    assert needs_anchors("hybrid+multipart")
    assert not needs_anchors("kd+hybrid")


def test_anchors_of_garg2022() -> None:
    """Ten anchors of five epochs: the student's epochs 0 to 4 learn from the first; after 50 the last stays."""
    anchors = run_folder.Anchors(5, tuple(run_folder.anchor(Path("t"), 5 * k) for k in range(1, 11)))
    names = [anchors.at(epoch).name for epoch in (0, 4, 5, 49, 50, 80)]
    assert [int(name[6:10]) for name in names] == [5, 5, 10, 50, 50, 50]


@pytest.fixture(scope="module")
def teacher(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five epochs, an anchor every second one."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(cells, folder, protocol=replace(FIVE, anchor_every=2))
    return folder


def test_anchors_are_the_weights_of_their_epochs(cells: Path, teacher: Path, tmp_path: Path) -> None:
    """Those of a run that ends there; a run that is stopped and resumed writes the same files."""
    assert sorted(p.name for p in (teacher / "anchors").iterdir()) == [f"epoch_000{k}.safetensors" for k in (2, 4)]
    short = replace(FIVE, epochs=2, anchor_every=2)
    whole = resumes_exactly(cells, tmp_path, short)
    kept = load_file(run_folder.anchor(whole, 2))
    assert same(kept, torch.load(whole / run_folder.RESUME, weights_only=True)["network"])
    assert same(kept, load_file(run_folder.anchor(teacher, 2)))
    assert same(kept, load_file(run_folder.anchor(tmp_path / "stopped", 2)))


def test_averaged_weights_are_kept_if_there_are_any(cells: Path, tmp_path: Path) -> None:
    train(cells, tmp_path / "t", protocol=replace(FIVE, epochs=1, anchor_every=1, ema=0.9))
    average = torch.load(tmp_path / "t" / run_folder.RESUME, weights_only=True)["ema"]
    kept = load_file(run_folder.anchor(tmp_path / "t", 1))
    assert same(kept, {n.removeprefix("module."): v for n, v in average.items() if n != "n_averaged"})


def test_student_follows_the_anchors(
    cells: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six epochs of a student: anchors 2, 2, 4, 4 and then 4 for good, each read when its epoch begins."""
    files = {p: p.read_bytes() for p in teacher.rglob("*.safetensors")}
    read, held = [], []
    read_state, freeze = loop.read_state, loop.freeze
    monkeypatch.setattr(loop, "read_state", lambda path: read.append(path) or read_state(path))
    monkeypatch.setattr(loop, "freeze", lambda net: held.append(freeze(net)) or held[-1])
    protocol = replace(FIVE, method="multipart", epochs=6, split=str(teacher / run_folder.SPLIT), anchor_every=3)
    train(cells, tmp_path / "s", protocol=protocol, teacher=teacher)
    assert [path.name[9:10] for path in read] == list("224444")
    assert same({n: v.contiguous() for n, v in held[0].state_dict().items()}, load_file(run_folder.anchor(teacher, 4)))
    assert not held[0].training
    assert {p: p.read_bytes() for p in teacher.rglob("*.safetensors")} == files
    assert [run_folder.anchor(tmp_path / "s", k).is_file() for k in (3, 6)] == [True, True]
    read.clear()
    resumes_exactly(cells, tmp_path, replace(protocol, epochs=3), teacher=teacher)
    assert [path.name[9:10] for path in read] == list("2242244")


def test_missing_anchors(cells: Path, teacher: Path, tmp_path: Path) -> None:
    """None kept, a gap, a damaged or foreign file: known before anything is trained or written."""
    protocol = replace(FIVE, method="multipart", split=str(teacher / run_folder.SPLIT))
    train(cells, tmp_path / "t", protocol=replace(FIVE, epochs=1, data=str(cells)))
    with pytest.raises(ArtifactError, match=r"epoch_0001\.safetensors(.|\n)*edgekd train .*--set anchor_every=1 --out"):
        train(cells, tmp_path / "s", protocol=protocol, teacher=tmp_path / "t")
    file = run_folder.anchor(teacher, 4)
    whole = file.read_bytes()
    try:
        file.unlink()
        with pytest.raises(ArtifactError, match=r"has no anchor .*epoch_0004(.|\n)*edgekd train .*anchor_every=2"):
            train(cells, tmp_path / "s", protocol=protocol, teacher=teacher)
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArtifactError, match=r"epoch_0004\.safetensors is damaged"):
            train(cells, tmp_path / "s", protocol=protocol, teacher=teacher)
        train(cells, tmp_path / "o", protocol=replace(FIVE, network="test_efficientnet", epochs=1))
        file.write_bytes((tmp_path / "o" / run_folder.MODEL).read_bytes())
        with pytest.raises(ArtifactError, match=r"epoch_0004\.safetensors is not an anchor of test_resnet"):
            train(cells, tmp_path / "s", protocol=protocol, teacher=teacher)
    finally:
        file.write_bytes(whole)
    assert not (tmp_path / "s").exists()
