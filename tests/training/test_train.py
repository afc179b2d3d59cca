"""The loop: exact resume, several processes, a frozen teacher, a loss that is not finite, run folders."""

from __future__ import annotations

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file
from torch import nn

from edgekd import config
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import read_split
from edgekd.data.synthetic import write_cells
from edgekd.errors import ArtifactError, ConfigError, TrainingError
from edgekd.models.networks import build
from edgekd.training import loop, run_folder
from edgekd.training.augment import Augment
from edgekd.training.protocol import Protocol
from edgekd.training.train import network, train

TINY = Protocol(
    network="multi-exit-resnet18",
    method="sd",
    weights="none",
    precision="32-true",
    stem="small",
    exits=(2, 4),
    preprocess=Preprocess(16),
    augment=Augment(crop_scale=(0.7, 1.0), hflip=0.5),
    epochs=3,
    batch_size=16,
    lr=0.02,
    milestones=(2,),
    workers=0,
)
FLAGS = [
    *("--student", "multi-exit-resnet18", "--method", "sd", "--weights", "none", "--exits", "2,4", "--epochs", "3"),
    *("--image-size", "16", "--batch-size", "16", "--workers", "0", "--precision", "32-true"),
    *("--set", "ema=0.9", "--set", "stem=small"),
]


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twice as many as elsewhere, so that a few epochs learn something."""
    folder = tmp_path_factory.mktemp("cells") / "cells"
    write_cells(folder, count=120, size=24)
    return folder


def distill(cells: Path, out: Path, *more: str, launcher: tuple[str, ...] = (sys.executable,)) -> subprocess.Popen[str]:
    command = [*launcher, "-m", "edgekd", "distill", "--data", str(cells), "--out", str(out), *FLAGS, *more]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


def finished(process: subprocess.Popen[str]) -> str:
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    return text


def same_weights(a: Path, b: Path) -> bool:
    left, right = load_file(a / run_folder.MODEL), load_file(b / run_folder.MODEL)
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.slow
def test_killed_at_any_point_and_resumed_ends_with_the_same_bits(cells: Path, tmp_path: Path) -> None:
    """SIGKILL before the first epoch's end and again in mid-epoch, against one that was never killed."""
    finished(distill(cells, tmp_path / "whole"))
    out = tmp_path / "killed"
    for wait_for in (run_folder.PROTOCOL, run_folder.RESUME):
        process = distill(cells, out, "--resume")
        while not (out / wait_for).exists() and process.poll() is None:
            time.sleep(0.02)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finished(distill(cells, out, "--resume"))
    assert same_weights(tmp_path / "whole", out)
    states = [torch.load(f / run_folder.RESUME, weights_only=True) for f in (tmp_path / "whole", out)]
    for subset in ("network", "ema"):
        assert all(torch.equal(states[0][subset][k], states[1][subset][k]) for k in states[0][subset])
    assert not list(out.glob(".*partial*"))


@pytest.mark.slow
def test_two_processes(cells: Path, tmp_path: Path) -> None:
    """torchrun with gloo: one run folder, every image seen, a validation score over both halves."""
    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    finished(distill(cells, tmp_path / "two", "--devices", "2", "--set", "batch_size=8", launcher=torchrun))
    rows = list(csv.DictReader((tmp_path / "two" / run_folder.METRICS).open()))
    assert len(rows) == 3
    val = len(read_split(tmp_path / "two").subset("val"))
    hits = float(rows[-1]["val_ensemble"]) * val
    assert hits == pytest.approx(round(hits), abs=1e-3)  # padded samples are not counted
    run_folder.load_model(tmp_path / "two")


def test_run_folder_and_weights(cells: Path, tmp_path: Path) -> None:
    history = train(cells, tmp_path / "run", protocol=replace(TINY, epochs=2))
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        *(run_folder.PROTOCOL, run_folder.SPLIT, run_folder.METRICS, run_folder.MODEL, run_folder.RESUME, "tensorboard")
    }
    assert config.load(Protocol, "protocols", str(folder / run_folder.PROTOCOL)) == replace(TINY, epochs=2)
    assert [row["epoch"] for row in history] == [1, 2]
    assert history[1]["loss"] < history[0]["loss"]
    assert {"loss_ce", "loss_sd", "val_exit_1", "val_ensemble", "data_wait", "rss_mib"} <= history[0].keys()
    net, metadata = run_folder.load_model(folder)
    assert metadata.exits == (2, 4)
    assert len(net(torch.zeros(1, 3, 16, 16)).logits) == 2
    with pytest.raises(ArtifactError, match="already holds a run"):
        train(cells, folder, protocol=TINY)
    with pytest.raises(ArtifactError, match="other settings"):
        train(cells, folder, protocol=replace(TINY, lr=0.5), resume=True)


def test_teacher_is_untouched_and_absent_from_the_student(cells: Path, tmp_path: Path) -> None:
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    train(cells, teacher, protocol=replace(TINY, network="resnet18", method="ce", epochs=1))
    before = (teacher / run_folder.MODEL).read_bytes()
    held: list[nn.Module] = []
    original = loop.freeze
    loop.freeze = lambda net: held.append(original(net)) or held[0]  # type: ignore[func-returns-value]
    try:
        train(
            cells,
            student,
            protocol=replace(TINY, method="kd+sd", split=str(teacher / run_folder.SPLIT)),
            teacher=teacher,
        )
    finally:
        loop.freeze = original
    saved = load_file(teacher / run_folder.MODEL)
    assert (teacher / run_folder.MODEL).read_bytes() == before
    assert all(torch.equal(v.contiguous(), saved[k]) for k, v in held[0].state_dict().items())
    assert not held[0].train().training
    assert read_split(student) == read_split(teacher)
    bare = build("multi-exit-resnet18", classes=5, image_size=16, exits=(2, 4))
    assert load_file(student / run_folder.MODEL).keys() == bare.state_dict().keys()


def test_teacher_of_other_classes_or_standardisation(cells: Path, tmp_path: Path) -> None:
    train(cells, tmp_path / "t", protocol=replace(TINY, network="resnet18", method="ce", epochs=1))
    other = replace(TINY, method="kd", preprocess=Preprocess(16, mean=(0.5, 0.5, 0.5)))
    with pytest.raises(ConfigError, match="was trained with"):
        train(cells, tmp_path / "s", protocol=other, teacher=tmp_path / "t")
    write_cells(tmp_path / "more", count=60, size=24)
    (tmp_path / "more" / "halo").rename(tmp_path / "more" / "ring")
    with pytest.raises(ConfigError, match=r"has the classes .*halo.*; the data has .*ring"):
        train(tmp_path / "more", tmp_path / "s2", protocol=replace(TINY, method="kd"), teacher=tmp_path / "t")
    with pytest.raises(ConfigError, match="needs a teacher"):
        train(cells, tmp_path / "s3", protocol=replace(TINY, method="kd"))


def test_a_teacher_that_has_seen_the_test_images(cells: Path, tmp_path: Path) -> None:
    train(cells, tmp_path / "t", protocol=replace(TINY, network="resnet18", method="ce", epochs=1))
    for wrong in (replace(TINY, method="kd", seed=1), replace(TINY, seed=1, weights=str(tmp_path / "t"))):
        with pytest.raises(ConfigError, match=r"was trained on \d+ of the test images, for example .*\.png"):
            train(cells, tmp_path / "s", protocol=wrong, teacher=tmp_path / "t" if wrong.method == "kd" else None)
    for file in sorted(cells.rglob("*.png")):
        (tmp_path / "renamed" / file.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "renamed" / file.parent.name / f"x{file.name[::-1]}.png")
    with pytest.raises(ConfigError, match=r"was trained on \d+ of the test images"):
        train(tmp_path / "renamed", tmp_path / "s", protocol=replace(TINY, weights=str(tmp_path / "t")))
    assert not (tmp_path / "s").exists()


def test_a_loss_that_is_not_finite_names_the_files(cells: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"not finite at epoch \d, batch \d+(.|\n)*\.png"):
        train(cells, tmp_path / "nan", protocol=replace(TINY, lr=1e18, method="ce"))


def test_learning_rate_schedules() -> None:
    step = replace(TINY, lr=1.0, milestones=(2, 3), epochs=4, gamma=0.1)
    assert [step.lr_at(e) for e in (0, 1.9, 2, 3)] == pytest.approx([1, 1, 0.1, 0.01])
    cycle = replace(TINY, lr=1.0, schedule="onecycle", warmup_epochs=1.0, epochs=5)
    assert [cycle.lr_at(e) for e in (0.5, 1, 3, 5)] == pytest.approx([0.501, 1, 0.5, 0])


def test_first_weights_from_a_run_folder(cells: Path, tmp_path: Path) -> None:
    """A fine-tuned plain network gives its backbone to the multi-exit student."""
    train(cells, tmp_path / "plain", protocol=replace(TINY, network="resnet18", method="ce", epochs=1))
    student = network(replace(TINY, weights=str(tmp_path / "plain")), classes=5)
    plain = load_file(tmp_path / "plain" / run_folder.MODEL)
    assert torch.equal(student.state_dict()["backbone.layer4.1.conv2.weight"], plain["backbone.layer4.1.conv2.weight"])


def test_clipping_bounds_the_step(cells: Path, tmp_path: Path) -> None:
    """One plain SGD step of lr 1 moves the weights no further than clip_norm."""
    plain_sgd = replace(TINY, method="ce", lr=1.0, momentum=0.0, weight_decay=0.0)
    protocol = replace(plain_sgd, epochs=1, batch_size=64, clip_norm=0.01)
    before = {k: v.clone() for k, v in network(protocol, classes=5).named_parameters()}
    train(cells, tmp_path / "clip", protocol=protocol)
    after = load_file(tmp_path / "clip" / run_folder.MODEL)
    moved = torch.sqrt(sum(((after[k] - v) ** 2).sum() for k, v in before.items()))
    assert 0.005 < moved.item() <= 0.0101


@pytest.mark.parametrize("damage", ["half", "garbage"])
def test_damaged_run_folders(cells: Path, tmp_path: Path, damage: str) -> None:
    train(cells, tmp_path / "run", protocol=replace(TINY, epochs=1))
    for name in (run_folder.RESUME, run_folder.MODEL):
        path = tmp_path / "run" / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage == "half" else b"garbage")
    with pytest.raises(ArtifactError, match=r"resume\.pt is damaged"):
        train(cells, tmp_path / "run", protocol=replace(TINY, epochs=1), resume=True)
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        run_folder.load_model(tmp_path / "run")
    with pytest.raises(ArtifactError, match="it is not a run folder"):
        run_folder.load_model(cells)


def test_validation_is_the_mean_of_probabilities() -> None:
    """Two exits that disagree: the ensemble follows the more confident one."""

    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> loop.Outputs:
            confident, unconfident = torch.tensor([[5.0, 0.0]]), torch.tensor([[0.0, 0.5]])
            return loop.Outputs((confident.expand(len(x), 2), unconfident.expand(len(x), 2)), (), ())

    batches = [(torch.zeros(3, 3, 4, 4), torch.tensor([0, 0, 1]), torch.arange(3))]
    scores = loop.validate(Fabric(accelerator="cpu"), Fixed(), batches, 2)
    assert scores == pytest.approx({"val_exit_0": 2 / 3, "val_exit_1": 1 / 3, "val_ensemble": 2 / 3})
