"""Triplets against values worked by hand and an independent loop; what plain shuffling can do to them; training."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.multi_exit_outputs import one_exit, training_batch
from helpers.resume import resumes_exactly
from helpers.tiny_protocol import TINY
from torch import Tensor

from edgekd import config
from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.distill.hybrid import HybridOptions, batch_all, batch_hard, distances
from edgekd.errors import ConfigError
from edgekd.training import run_folder
from edgekd.training.protocol import Protocol
from edgekd.training.train import train

MINE = {"all": batch_all, "hard": batch_hard}


def value(feature: Tensor, target: list[int], mining: str, *, squared: bool = True, margin: float = 1.0) -> float:
    return MINE[mining](distances(feature, squared=squared), torch.tensor(target), margin=margin).item()


def test_by_hand() -> None:
    """Images at 0, 2 and 3 on a line, the last of another class. Squared distances are 4, 9 and 1: the anchor at 0
    costs 1 + 4 - 9 < 0, the one at 2 costs 1 + 4 - 1 = 4. Plain ones are 2, 3 and 1: costs 0 and 2."""
    line, target = torch.tensor([[0.0], [2.0], [3.0]]), [0, 0, 1]
    assert value(line, target, "all") == pytest.approx(4)  # over the one triplet that costs
    assert value(line, target, "hard") == pytest.approx(2)  # over the two anchors that have a positive
    assert value(line, target, "all", squared=False) == pytest.approx(2)
    assert value(line, target, "hard", squared=False) == pytest.approx(1)
    assert value(line, target, "all", margin=7) == pytest.approx((2 + 10) / 2)


@pytest.mark.parametrize("squared", [True, False])
def test_against_loops_over_triplets(squared: bool) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 4)), rng.integers(0, 3, 9)
    d = ((x[:, None] - x) ** 2).sum(-1) ** (1 if squared else 0.5)
    every, hardest = [], []
    for a in range(9):
        positives = [p for p in range(9) if y[p] == y[a] and p != a]
        negatives = [n for n in range(9) if y[n] != y[a]]
        every += [1 + d[a, p] - d[a, n] for p in positives for n in negatives]
        if positives:
            hardest.append(max(0, 1 + max(d[a, positives]) - min(d[a, negatives])))
    costly = [v for v in every if v > 0]
    assert 0 < len(costly) < len(every)
    feature = torch.tensor(x)
    assert value(feature, y.tolist(), "all", squared=squared) == pytest.approx(np.mean(costly), rel=1e-5)
    assert value(feature, y.tolist(), "hard", squared=squared) == pytest.approx(np.mean(hardest), rel=1e-5)


@pytest.mark.parametrize("mining", ["all", "hard"])
def test_known_values(mining: str) -> None:
    """Nothing where classes are a margin further apart than wide, the margin where all is one point."""
    apart = torch.tensor([[0.0, 0.0], [0.0, 0.5], [9.0, 0.0], [9.0, 0.5]])
    assert value(apart, [0, 0, 1, 1], mining) == 0
    assert value(torch.ones(4, 2), [0, 0, 1, 1], mining, margin=0.7) == pytest.approx(0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("mining", ["all", "hard"])
@pytest.mark.parametrize("target", [[0], [0, 0, 0], [0, 1, 2], [0, 0, 1]], ids=["one", "class", "lone", "duplicates"])
def test_gradients_are_finite(target: list[int], mining: Any, squared: bool, dtype: torch.dtype) -> None:
    """Batch 1, one class, classes of one image, duplicates; large values in half precision, and autocast."""
    feature = torch.full((len(target), 8), 200.0, dtype=dtype).requires_grad_()
    options = {"hybrid": HybridOptions(mining=mining, squared=squared)}
    criterion = Criterion(LossSettings(method="hybrid", options=options))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(training_batch(one_exit(len(target), pooled=feature), target=target))
    loss.backward()
    assert feature.grad is not None
    assert torch.isfinite(feature.grad).all()
    assert criterion.terms["hybrid"].item() == (1 if target == [0, 0, 1] else 0)


def test_combines_with_distillation_and_smooth_labels() -> None:
    feature, target = torch.tensor([[0.0], [2.0], [3.0]]), [0, 0, 1]
    criterion = Criterion(LossSettings(method="kd+hybrid", label_smoothing=0.1, loss_weights={"hybrid": 2.0}))
    output = one_exit(3, pooled=feature)
    total = criterion(training_batch(output, output, target=target))
    assert criterion.terms["hybrid"].item() == pytest.approx(2 * 4)
    assert criterion.terms["kd"].item() == pytest.approx(0, abs=1e-6)
    assert total.item() == pytest.approx(2 * 4 + math.log(5), rel=1e-5)


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    pairs = ["method=hybrid", "hybrid.mining=hard", "hybrid.squared=false", "sampler=pxk", "per_class=2"]
    protocol = config.load(Protocol, "protocols", "demo", overrides=config.parse_overrides(pairs))
    assert protocol.options["hybrid"] == HybridOptions(mining="hard", squared=False)
    config.write_toml(tmp_path / "protocol.toml", protocol)
    assert config.load(Protocol, "protocols", str(tmp_path / "protocol.toml")) == protocol
    wrong = config.parse_overrides(["hybrid.mining=semi", "hybrid.margins=1", "per_class=0"])
    with pytest.raises(ConfigError, match=r"(?s)hybrid\.mar.*Did you mean 'margin'.*'semi' is none of all, hard"):
        config.load(Protocol, "protocols", "demo", overrides=wrong)
    for key in ("hybrid.margin=-1", "per_class=1", "anchor_every=9"):
        with pytest.raises(ConfigError, match=key.partition("=")[0].replace("hybrid.", r"hybrid\.")):
            config.load(Protocol, "protocols", "demo", overrides=config.parse_overrides([key]))


def test_training_on_batches_of_classes(cells: Path, tmp_path: Path) -> None:
    """A plain network without a teacher: its pooled feature is what goes into the classifier."""
    protocol = replace(
        TINY,
        method="hybrid",
        options={"hybrid": HybridOptions(squared=False)},
        label_smoothing=0.1,
        sampler="pxk",
        per_class=2,
        epochs=2,
    )
    whole = resumes_exactly(cells, tmp_path, protocol)
    rows = (whole / run_folder.METRICS).read_text().splitlines()
    assert "loss_hybrid" in rows[0]
    assert len(rows) == 3
    with pytest.raises(ConfigError, match="a batch of 16 images, 2 of a class, cannot be made of 5 classes"):
        train(cells, tmp_path / "no", protocol=replace(protocol, batch_size=16))
    assert not (tmp_path / "no").exists()
