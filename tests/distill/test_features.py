"""FitNets, AT, VID and AB: by hand, against numpy, their minima and gradients; and all methods with a teacher's
features, RKD and PKT too, through training: resumed exactly, their own parameters saved but not exported."""

from __future__ import annotations

import csv
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.multi_exit_outputs import one_exit, training_batch
from helpers.tiny_protocol import TINY
from safetensors.torch import load_file
from torch import Tensor, nn

from edgekd import config
from edgekd.distill.ab import ActivationBoundaries, BoundaryOptions, boundary_loss
from edgekd.distill.at import attention_loss
from edgekd.distill.base import FeatureShapes, InitOptions, LossContext, Options, TrainingBatch
from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.distill.fitnets import FitNets, hint_loss
from edgekd.distill.vid import VariationalInformation, vid_loss
from edgekd.errors import ConfigError
from edgekd.models.feature_points import MapShape
from edgekd.training import loop, run_folder
from edgekd.training.protocol import Protocol
from edgekd.training.train import train

METHODS = ("fitnets", "at", "vid", "ab")
STUDENT: tuple[MapShape, ...] = ((3, 8, 8), (4, 4, 4))
TEACHER: tuple[MapShape, ...] = ((5, 8, 8), (6, 4, 4))


def array(*values: float) -> Tensor:
    """One image's map (1, 1, 1, W)."""
    return torch.tensor(values).view(1, 1, 1, -1)


def shapes(
    student: tuple[MapShape, ...] = STUDENT, teacher: tuple[MapShape, ...] = TEACHER
) -> dict[str, FeatureShapes]:
    return {"student": FeatureShapes(student, student, exits=1), "teacher": FeatureShapes(teacher, teacher, exits=1)}


def context(student: tuple[MapShape, ...] = STUDENT, teacher: tuple[MapShape, ...] = TEACHER) -> LossContext:
    return LossContext(**shapes(student, teacher))


def batch_of(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], *, epoch: int = 0) -> TrainingBatch:
    """A batch of one class."""
    return training_batch(*(one_exit(len(maps[0]), maps=maps) for maps in (student, teacher)), epoch=epoch)


def maps(sizes: tuple[MapShape, ...], batch: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Random maps; the last two images are one and the same."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, *shape, generator=generator) for shape in sizes]
    for m in made:
        m[-1] = m[max(0, batch - 2)]
    return tuple(m.to(dtype).requires_grad_() for m in made)


def test_by_hand() -> None:
    assert hint_loss(array(1, 2), array(0, 4)).item() == pytest.approx((1 + 4) / 2)
    # squares' means over two channels (3, 4), of length 5; the teacher's (1, 0)
    student = torch.tensor([[[math.sqrt(6), 0.0]], [[0.0, math.sqrt(8)]]])[None]
    assert attention_loss(student, array(7, 0)).item() == pytest.approx((0.4**2 + 0.8**2) / 2)
    assert vid_loss(array(2), array(0), torch.tensor([4.0])).item() == pytest.approx((4 / 4 + math.log(4)) / 2)
    # half a margin short, wrong side, half a margin short, wrong side; 0 counts as off
    loss = boundary_loss(array(0.5, -2, -0.5, 3), array(1, 1, -1, 0))
    assert loss.item() == pytest.approx((0.25 + 9 + 0.25 + 16) * 3 / 1000)


def test_attention_against_numpy() -> None:
    """A student's map twice as large is pooled; other channels are no matter."""
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(4, 3, 6, 8)), rng.normal(size=(4, 7, 3, 4))
    pooled = s.reshape(4, 3, 3, 2, 4, 2).mean((3, 5))
    both = [(f**2).mean(1).reshape(4, -1) for f in (pooled, t)]
    a, b = (m / np.sqrt((m**2).sum(1, keepdims=True)) for m in both)
    expected = pytest.approx(((a - b) ** 2).mean(), rel=1e-5)
    assert attention_loss(torch.tensor(s), torch.tensor(t)).item() == expected
    assert attention_loss(torch.tensor(t), torch.tensor(s)).item() == expected


def test_hint_against_numpy() -> None:
    """1x1 convolution, BN of the batch and ReLU on the second point; weight 100."""
    loss = FitNets(InitOptions(), context())
    s, t = maps(STUDENT), maps(TEACHER, seed=1)
    weight = loss.regressor[0].weight.detach().numpy()[:, :, 0, 0]
    x = np.einsum("od,bdhw->bohw", weight, s[1].detach().numpy())
    x = (x - x.mean((0, 2, 3), keepdims=True)) / np.sqrt(x.var((0, 2, 3), keepdims=True) + 1e-5)
    expected = ((np.maximum(x, 0) - t[1].detach().numpy()) ** 2).mean()
    assert loss(batch_of(s, t)).item() == pytest.approx(expected, rel=1e-5)


def test_vid_against_numpy() -> None:
    loss = VariationalInformation(Options(), context())
    s, t = maps(STUDENT), maps(TEACHER, seed=1)
    expected = 0.0
    for point, student, teacher in zip(loss.points, s, t):
        nn.init.normal_(point.raw_variance)
        x = student.detach().numpy()
        for k in (0, 2, 4):
            x = np.einsum(
                "od,bdhw->bohw", point.mean[k].weight.detach().numpy()[:, :, 0, 0], np.maximum(x, 0) if k else x
            )
        variance = np.log1p(np.exp(point.raw_variance.detach().numpy()))[:, None, None] + 1e-5
        expected += 0.5 * ((x - teacher.detach().numpy()) ** 2 / variance + np.log(variance)).mean()
    assert loss(batch_of(s, t)).item() == pytest.approx(expected, rel=1e-5)


def test_boundaries_against_numpy() -> None:
    """Four points of one shape, so no connectors: weights 1/8, 1/4, 1/2 and 1."""
    four: tuple[MapShape, ...] = ((3, 5, 5),) * 4
    loss = ActivationBoundaries(BoundaryOptions(), context(four, four))
    s, t = maps(four), maps(four, seed=1)
    expected = 0.0
    for weight, student, teacher in zip((1 / 8, 1 / 4, 1 / 2, 1), s, t):
        for a, b in zip(student.detach().numpy().flat, teacher.detach().numpy().flat):
            wrong = max(0.0, 1 - a) if b > 0 else max(0.0, 1 + a)
            expected += weight * wrong**2 / 3 * 3 / 1000
    assert loss.init_loss(batch_of(s, t)).item() == pytest.approx(expected, rel=1e-5)
    assert not list(loss.parameters())


def test_student_that_equals_its_teacher() -> None:
    """0; for VID, whose mean is then exact, half the logarithm of the first variance, 5, at each point."""
    positive = tuple(m.detach().abs() + 1 for m in maps(STUDENT))
    batch, same = batch_of(positive, positive), context(STUDENT, STUDENT)
    hint, vid = FitNets(InitOptions(), same), VariationalInformation(Options(), same)
    ab = ActivationBoundaries(BoundaryOptions(), same)
    for conv in (m for module in (hint, vid) for m in module.modules() if isinstance(m, nn.Conv2d)):
        nn.init.dirac_(conv.weight)
    hint.regressor[1].eval()  # the mean and variance of BN are then 0 and 1
    assert hint(batch).item() == pytest.approx(0, abs=1e-9)
    assert vid(batch).item() == pytest.approx(2 * 0.5 * math.log(5), rel=1e-5)
    assert ab.init_loss(batch).item() == 0  # all at the margin or above
    assert sum(attention_loss(m, m) for m in positive) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", METHODS)
def test_gradients(name: str, batch: int, dtype: torch.dtype) -> None:
    """Finite for one image, duplicates, one class and half precision, of maps whose squares fp16 cannot hold; every
    parameter of the method has one, the teacher has none; autocast changes nothing."""
    criterion = Criterion(LossSettings(method=name), **shapes())
    s, t = (maps(sizes, batch, seed=k, dtype=dtype) for k, sizes in enumerate((STUDENT, TEACHER)))
    s, t = (tuple((300 * m.detach()).requires_grad_() for m in part) for part in (s, t))
    loss = criterion(batch_of(s, t))
    loss.backward()
    used = s[1:] if name == "fitnets" else s
    assert all(torch.isfinite(m.grad).all() and m.grad.abs().sum() > 0 for m in used)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in criterion.parameters())
    assert all(p.grad.abs().sum() > 0 for p in criterion.parameters())
    assert all(m.grad is None for m in t)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion(batch_of(s, t)).item() == loss.item()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("side", [2, 4, 7, 8, 16, 19])
def test_maps_of_other_sizes(name: str, side: int) -> None:
    """The teacher's maps are larger, as large, smaller by a whole factor or not."""
    student: tuple[MapShape, ...] = ((3, 8, 8),)
    teacher: tuple[MapShape, ...] = ((5, side, side),)
    criterion = Criterion(LossSettings(method=name), **shapes(student, teacher))
    loss = criterion(batch_of(maps(student), maps(teacher)))
    assert torch.isfinite(loss)
    assert criterion.terms[name] > 0


def test_dead_maps() -> None:
    """All zero, as behind a dead ReLU."""
    dead = tuple(torch.zeros(2, *shape, requires_grad=True) for shape in STUDENT)
    for name in METHODS:
        Criterion(LossSettings(method=name), **shapes())(batch_of(dead, maps(TEACHER, 2))).backward()
        assert all(torch.isfinite(m.grad).all() for m in dead if m.grad is not None)


def test_first_stages() -> None:
    """AB is alone for 30 epochs and then gone; the hint is a term beside cross-entropy unless it has epochs."""
    s, t = maps(STUDENT), maps(TEACHER, seed=1)

    def terms(epoch: int, **settings: Any) -> dict[str, float]:
        criterion = Criterion(LossSettings(**settings), **shapes())
        criterion(batch_of(s, t, epoch=epoch))
        return {name: float(value) for name, value in criterion.terms.items()}

    assert terms(29, method="ab+kd").keys() == {"ab"}
    assert terms(30, method="ab+kd").keys() == {"ce", "kd", "ab"}
    assert terms(30, method="ab+kd")["ab"] == 0
    assert terms(2, method="ab", options={"ab": BoundaryOptions(init_epochs=2)})["ab"] == 0
    assert terms(0, method="fitnets").keys() == {"ce", "fitnets"}
    assert terms(0, method="fitnets")["fitnets"] > 0
    two = {"fitnets": InitOptions(init_epochs=2)}
    assert terms(1, method="fitnets+kd", options=two).keys() == {"fitnets"}
    assert terms(2, method="fitnets+kd", options=two)["fitnets"] == 0
    # the weight counts in that stage, too
    torch.manual_seed(0)
    usual = terms(0, method="ab")["ab"]
    torch.manual_seed(0)
    assert terms(0, method="ab", loss_weights={"ab": 3.0})["ab"] == pytest.approx(3 * usual)
    with pytest.raises(ConfigError, match=r"ab\.init_epochs.*0 is not above 0"):
        config.load(Protocol, "protocols", "demo", overrides={"ab.init_epochs": 0})


SHORT = replace(TINY, epochs=2, milestones=(1,))


@pytest.fixture(scope="module")
def teacher(cells: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    train(cells, folder, protocol=replace(SHORT, epochs=1))
    return folder


class Stop(Exception):
    pass


def stop_in_second_epoch(done: int, steps: int, loss: float) -> None:
    if done > steps // 2:
        raise Stop


@pytest.mark.parametrize("name", [*METHODS, "rkd", "pkt"])
def test_training(cells: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Stopped in mid-epoch and resumed with the bits of a run in one go. The points make the student's maps larger
    than the teacher's, and narrower."""
    held: list[nn.Module] = []
    freeze = loop.freeze
    monkeypatch.setattr(loop, "freeze", lambda net: held.append(freeze(net)) or held[-1])
    protocol = replace(SHORT, method=name, split=str(teacher / run_folder.SPLIT))
    if name in METHODS:
        protocol = replace(protocol, student_points=("layer1", "layer2"), teacher_points=("layer2", "layer3"))
    if name == "ab":
        protocol = replace(protocol, options={"ab": BoundaryOptions(init_epochs=1)})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(cells, whole, protocol=protocol, teacher=teacher)
    with pytest.raises(Stop):
        train(cells, parts, protocol=protocol, teacher=teacher, progress=stop_in_second_epoch)
    train(cells, parts, protocol=protocol, teacher=teacher, resume=True)

    models = [load_file(folder / run_folder.MODEL) for folder in (whole, parts)]
    states = [torch.load(folder / run_folder.RESUME, weights_only=True) for folder in (whole, parts)]
    for a, b in (models, *([state[part] for state in states] for part in ("network", "criterion"))):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)
    saved = load_file(teacher / run_folder.MODEL)
    assert len(held) == 3
    assert all(torch.equal(v, saved[k]) for net in held for k, v in net.state_dict().items())

    own, student = states[0]["criterion"], run_folder.load_model(whole)[0]
    assert bool(own) == (name in ("fitnets", "vid", "ab"))
    assert models[0].keys() == student.state_dict().keys()
    trained = [k for k in own if not k.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert len(states[0]["optimizer"]["state"]) == len(list(student.parameters())) + len(trained)
    rows = list(csv.DictReader((whole / run_folder.METRICS).open()))
    assert [bool(row["loss_ce"]) for row in rows] == [name != "ab", True]
    assert float(rows[0][f"loss_{name}"]) > 0


@pytest.mark.slow
def test_first_stage_in_two_processes(cells: Path, teacher: Path, tmp_path: Path) -> None:
    """DDP waits for gradients of layers that AB's first stage does not reach."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "edgekd"]
    command += ["distill", "--data", str(cells), "--teacher", str(teacher), "--student", "test_resnet"]
    command += ["--method", "ab", "--weights", "none", "--epochs", "2", "--image-size", "32", "--devices", "2"]
    command += ["--set", "batch_size=4", "--set", "ab.init_epochs=1", "--set", "workers=0"]
    command += ["--split", str(teacher / run_folder.SPLIT), "--out", str(tmp_path / "two")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "two" / run_folder.METRICS).read_text().splitlines()) == 3


def test_impossible_training(cells: Path, teacher: Path, tmp_path: Path) -> None:
    protocol = replace(SHORT, method="ab", split=str(teacher / run_folder.SPLIT))
    with pytest.raises(ConfigError, match="needs 30 epochs for its initial stage, and the run has 2"):
        train(cells, tmp_path / "short", protocol=protocol, teacher=teacher)
    with pytest.raises(ConfigError, match=r"layer1, the teacher .*layer3.*: not as many"):
        train(cells, tmp_path / "points", protocol=replace(protocol, student_points=("layer1",)), teacher=teacher)
