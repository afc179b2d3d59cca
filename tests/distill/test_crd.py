"""Contrast against values worked by hand and the published formula, its negatives, its memory, and training."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.multi_exit_outputs import one_exit, training_batch
from helpers.resume import resumes_exactly
from helpers.tiny_protocol import TINY
from torch import Tensor

from edgekd.data.split import read_split
from edgekd.distill.base import FeatureShapes, LossContext, TrainingBatch
from edgekd.distill.crd import ContrastiveDistillation, ContrastiveOptions, nce
from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.distill.methods import METHODS
from edgekd.errors import ConfigError
from edgekd.training import run_folder
from edgekd.training.train import train

LABELS = (0, 0, 1, 2, 0, 1, 2, 0, 0)
SHAPES = {"student": FeatureShapes(pooled=4), "teacher": FeatureShapes(pooled=3)}


def contrast(negatives: int = 6) -> ContrastiveDistillation:
    torch.manual_seed(0)
    options = ContrastiveOptions(width=5, negatives=negatives)
    return ContrastiveDistillation(options, LossContext(labels=LABELS, **SHAPES))


def batch_of(student: Tensor, teacher: Tensor, index: list[int]) -> TrainingBatch:
    pair = (one_exit(len(index), pooled=pooled) for pooled in (student, teacher))
    return training_batch(*pair, target=[LABELS[i] for i in index], index=index)


def features(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 4, generator=generator), torch.randn(batch, 3, generator=generator)


def test_nce_by_hand() -> None:
    """One image, one negative. Score ln 3 for the positive and 0 for the negative, mean 1, K = 1: the sigmoids are
    3/4 and 1/2, so that a direction costs ln(4/3) + ln 2. A mean of 3 makes them 1/2 and 3/4."""
    scores = torch.tensor([[[math.log(3), 0.0]], [[math.log(3), 0.0]]])
    expected = math.log(4 / 3) + math.log(2)
    assert nce(scores, torch.zeros(2)).item() == pytest.approx(2 * expected, rel=1e-6)
    other = torch.tensor([0.0, math.log(3)])
    assert nce(scores, other).item() == pytest.approx(expected + math.log(2) + math.log(4 / 3), rel=1e-6)
    assert nce(scores.repeat(1, 4, 1), torch.zeros(2)).item() == pytest.approx(2 * expected, rel=1e-6)  # batch mean


def test_against_the_published_formula() -> None:
    """Equation 18 as printed, with N, Z and the authors' epsilon, on the same draws; two batches, one memory."""
    loss, (s, t), index = contrast(), features(3), [1, 2, 8]
    bank, count, k, z = loss.bank.double().numpy().copy(), len(LABELS), 6, [0.0, 0.0]
    weights = [(e.weight.detach().double().numpy(), e.bias.detach().double().numpy()) for e in loss.embed]
    for seed in range(2):
        torch.manual_seed(seed)
        drawn = np.concatenate(
            [np.array(index)[:, None], loss.sample_negatives(torch.tensor([0, 1, 0])).numpy()], axis=1
        )
        torch.manual_seed(seed)
        found = loss(batch_of(s, t, index)).item()
        embedded = [x.double().numpy() @ w.T + b for x, (w, b) in zip((s, t), weights)]
        embedded = [e / np.linalg.norm(e, axis=1, keepdims=True) for e in embedded]
        expected = 0.0
        for way, (mine, other) in enumerate([(embedded[1], bank[0]), (embedded[0], bank[1])]):
            p = np.exp(np.einsum("bd,bkd->bk", mine, other[drawn]) / 0.07)
            z[way] = z[way] or p.mean() * count
            p, noise = p / z[way], k / count
            expected -= (np.log(p[:, 0] / (p[:, 0] + noise + 1e-7))).sum() / 3
            expected -= np.log(noise / (p[:, 1:] + noise + 1e-7)).sum() / 3
        assert found == pytest.approx(expected, rel=1e-4)
        for way in (0, 1):
            moved = 0.5 * bank[way, index] + 0.5 * embedded[way]
            bank[way, index] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        np.testing.assert_allclose(loss.bank.numpy(), bank, atol=1e-5)
    np.testing.assert_allclose(loss.log_mean.numpy(), np.log(np.array(z) / count), rtol=1e-4)


def test_least_where_networks_agree() -> None:
    """Next to nothing when each image is found and every other rejected."""
    confident = torch.tensor([[[100.0, -100.0, -100.0]]]).repeat(2, 1, 1)
    assert nce(confident, torch.zeros(2)).item() == pytest.approx(0, abs=1e-6)
    assert nce(-confident, torch.zeros(2)).item() > 500


def test_negatives_are_of_other_classes_and_all_alike() -> None:
    """Classes of 5, 2 and 2 images: 4, 7 and 7 candidates, each drawn as often."""
    torch.manual_seed(0)
    drawn = contrast(negatives=28_000).sample_negatives(torch.tensor([0, 1, 2])).numpy()
    for own, row in enumerate(drawn):
        others = [i for i, label in enumerate(LABELS) if label != own]
        assert sorted(set(row)) == others
        np.testing.assert_allclose(np.bincount(row)[others], 28_000 / len(others), rtol=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("index", [[0], [0, 1], [0, 0, 2]], ids=["one", "class", "duplicates"])
def test_gradients_are_finite(index: list[int], dtype: torch.dtype) -> None:
    """exp(1 / 0.07) is beyond half precision; so are sums of these features."""
    criterion = Criterion(LossSettings(method="crd"), **SHAPES, labels=LABELS)
    s, t = (torch.full((len(index), width), 200.0, dtype=dtype) for width in (4, 3))
    for _ in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = criterion(batch_of(s.requires_grad_(), t, index))
        loss.backward()
    grads = [s.grad, *(p.grad for p in criterion.parameters())]
    assert len(grads) == 5
    assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads[1:])
    assert grads[0] is not None
    assert torch.isfinite(grads[0]).all()
    assert torch.isfinite(criterion.losses["crd"].bank).all()  # type: ignore[attr-defined]


def test_one_class_has_no_negatives() -> None:
    assert METHODS["crd"].weight == 0.8
    with pytest.raises(ConfigError, match="the training images have 1 class"):
        Criterion(LossSettings(method="crd"), **SHAPES, labels=(1, 1, 1))


def test_memory_and_embeddings_are_trained_saved_and_resumed(cells: Path, tmp_path: Path) -> None:
    train(cells, tmp_path / "t", protocol=replace(TINY, network="test_efficientnet"))
    before = (tmp_path / "t" / run_folder.MODEL).read_bytes()
    protocol = replace(TINY, method="crd", epochs=2, split=str(tmp_path / "t" / run_folder.SPLIT))
    whole = resumes_exactly(cells, tmp_path, protocol, teacher=tmp_path / "t")
    assert (tmp_path / "t" / run_folder.MODEL).read_bytes() == before
    saved = torch.load(whole / run_folder.RESUME, weights_only=True)["criterion"]
    assert {name.removeprefix("crd.") for name in saved} == {
        *("bank", "log_mean", "embed.0.weight", "embed.0.bias", "embed.1.weight", "embed.1.bias")
    }
    assert saved["crd.bank"].shape == (2, len(read_split(whole).subset("train")), 128)
    assert saved["crd.log_mean"].isfinite().all()


TWO = """
import sys
from pathlib import Path
import torch
from edgekd.data.preprocess import Preprocess
from edgekd.distill.sskd import SelfSupervisionOptions
from edgekd.training import loop
from edgekd.training.protocol import Protocol
from edgekd.training.train import train

data, teacher, out = map(Path, sys.argv[1:])
kept, start = [], loop._start_session
loop._start_session = lambda *args: kept.append(start(*args)) or kept[0]
protocol = Protocol(network="test_resnet", method="crd+sskd", weights="none", preprocess=Preprocess(32), epochs=3,
                    batch_size=8, lr=0.01, workers=0, split=str(teacher / "split.json"),
                    options={"sskd": SelfSupervisionOptions(init_epochs=1)})
train(data, out, protocol=protocol, teacher=teacher, devices=2)
session, rank = kept[0], kept[0].fabric.global_rank
torch.save([session.criterion.state_dict(), session.task.network.state_dict()], f"{out}-{rank}.pt")
"""


@pytest.mark.slow
def test_two_processes_keep_one_memory(cells: Path, tmp_path: Path) -> None:
    """Under torchrun with gloo: banks, embeddings and self-supervision heads end with the same bits on both."""
    train(cells, tmp_path / "t", protocol=TINY)
    (tmp_path / "two.py").write_text(TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "two.py"), str(cells), str(tmp_path / "t"), str(tmp_path / "out")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (left, mine), (right, other) = (torch.load(tmp_path / f"out-{rank}.pt", weights_only=True) for rank in (0, 1))
    assert {name.partition(".")[0] for name in left} == {"crd", "sskd"}
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert all(torch.equal(mine[name], other[name]) for name in mine if "running" not in name)  # DDP's own habit
