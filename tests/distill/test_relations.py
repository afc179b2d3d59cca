"""RKD and PKT: by hand, against loops in numpy, their minima, gradients where they are known to explode, memory."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.multi_exit_outputs import one_exit, training_batch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from edgekd.distill import rkd
from edgekd.distill.base import TrainingBatch
from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.distill.pkt import similarity_loss
from edgekd.distill.rkd import angle_loss, distance_loss, relation_loss

METHODS = ("rkd", "pkt")
RIGHT_ANGLE = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
LINE = torch.tensor([[0.0], [1.0], [2.0]])


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).requires_grad_()


def batch_of(student: Tensor, teacher: Tensor) -> TrainingBatch:
    """A batch of one class."""
    return training_batch(*(one_exit(len(pooled), pooled=pooled) for pooled in (student, teacher)))


def test_rkd_by_hand() -> None:
    """Distances 3, 4, 5 of mean 4 against 1, 2, 1 of mean 4/3; each twice among the nine pairs, below 1, so squared.

    Angles: the triangle has cosines 0, 3/5 and 4/5, the line 1, -1 and 1; each twice among the 27 triples, the
    difference of -1 and 3/5 counting |d| - 1/2.
    """
    distance = sum(2 * 0.5 * (a - b) ** 2 for a, b in ((3 / 4, 3 / 4), (4 / 4, 6 / 4), (5 / 4, 3 / 4))) / 9
    angle = 2 * (0.5 * (0 - 1) ** 2 + (3 / 5 + 1 - 0.5) + 0.5 * (4 / 5 - 1) ** 2) / 27
    assert distance_loss(RIGHT_ANGLE, LINE).item() == pytest.approx(distance)
    assert angle_loss(RIGHT_ANGLE, LINE).item() == pytest.approx(angle)
    assert relation_loss(RIGHT_ANGLE, LINE).item() == pytest.approx(25 * distance + 50 * angle)


def test_pkt_by_hand() -> None:
    """Two orthogonal rows: kernel 1 and 1/2, so 2/3 and 1/3; two alike: 1/2 and 1/2. Both rows are the same."""
    alike, orthogonal = torch.tensor([[5.0, 0.0], [2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    expected = 2 * (2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)) / 4
    assert similarity_loss(alike, orthogonal).item() == pytest.approx(expected, abs=1e-6)


def test_rkd_against_numpy() -> None:
    s, t = rows(7, 4), rows(7, 9, seed=1)

    def relations(f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        distances = np.array([[math.dist(a, b) for a in f] for b in f])
        cosines = np.zeros((7, 7, 7))
        for i, j, k in itertools.product(range(7), repeat=3):
            if i not in (j, k):
                a, b = f[j] - f[i], f[k] - f[i]
                cosines[i, j, k] = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
        return distances / distances[distances > 0].mean(), cosines

    def smooth_l1(a: np.ndarray, b: np.ndarray) -> float:
        d = np.abs(a - b)
        return float(np.where(d < 1, d**2 / 2, d - 0.5).mean())

    (sd, sa), (td, ta) = (relations(f.detach().numpy().astype(np.float64)) for f in (s, t))
    assert distance_loss(s, t).item() == pytest.approx(smooth_l1(sd, td), rel=1e-5)
    assert angle_loss(s, t).item() == pytest.approx(smooth_l1(sa, ta), rel=1e-5)


def test_pkt_against_numpy() -> None:
    s, t = rows(7, 4), rows(7, 9, seed=1)

    def neighbours(f: np.ndarray) -> np.ndarray:
        f = f / np.linalg.norm(f, axis=1, keepdims=True)
        kernel = (f @ f.T + 1) / 2
        return kernel / kernel.sum(1, keepdims=True)

    p, q = neighbours(t.detach().numpy()), neighbours(s.detach().numpy())
    assert similarity_loss(s, t).item() == pytest.approx((p * np.log(p / q)).mean(), rel=1e-4)


def test_what_changes_nothing() -> None:
    """A student that equals its teacher, or its teacher scaled; for RKD also moved; for PKT each row scaled."""
    f = rows(6, 8)
    assert relation_loss(f, f).item() == 0
    assert similarity_loss(f, f).item() == 0
    assert relation_loss(3 * f + 5, f).item() == pytest.approx(0, abs=1e-6)
    assert similarity_loss(f * torch.arange(1, 7)[:, None], f).item() == pytest.approx(0, abs=1e-7)
    assert relation_loss(rows(1, 4), rows(1, 8)).item() == similarity_loss(rows(1, 4), rows(1, 8)).item() == 0


def test_pkt_depends_on_the_batch() -> None:
    """Each image twice: about half the value, as each neighbour's part halves and its logarithm stays."""
    s, t = rows(6, 4), rows(6, 4, seed=1)
    twice = similarity_loss(s.repeat(2, 1), t.repeat(2, 1)).item()
    assert twice == pytest.approx(similarity_loss(s, t).item() / 2, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["one image", "duplicates", "nearly", "all alike", "dead", "large"])
@pytest.mark.parametrize("name", METHODS)
def test_gradients(name: str, kind: str, dtype: torch.dtype) -> None:
    """Finite and of reasonable size; the teacher has none; autocast changes nothing."""
    s = rows(1 if kind == "one image" else 6, 8).detach()
    if kind in ("duplicates", "nearly"):
        s[1] = s[0] + (1e-7 if kind == "nearly" else 0)
    s = {"all alike": s[:1].repeat(6, 1), "dead": s * 0, "large": s * 10_000}.get(kind, s).to(dtype).requires_grad_()
    t = rows(len(s), 5, seed=1, dtype=dtype)
    criterion = Criterion(LossSettings(method=name, loss_weights={name: 1.0}))
    loss = criterion(batch_of(s, t))
    loss.backward()
    assert s.grad is not None
    assert torch.isfinite(s.grad).all()
    assert s.grad.abs().max() < 100
    assert t.grad is None
    assert not list(criterion.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert criterion(batch_of(s, t)).item() == loss.item()


@pytest.mark.parametrize("loss", [relation_loss, similarity_loss])
def test_gradient_against_differences(loss: object) -> None:
    s, t = rows(5, 3, dtype=torch.float64), rows(5, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(loss, (s, t.detach()), eps=1e-2, atol=1e-3, rtol=2e-2)


def test_angles_in_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Two anchors of 64 at a time: the same value and gradient, and less memory than one array of all B^3 cosines."""
    s, t = rows(64, 8), rows(64, 8, seed=1)
    angle_loss(s, t).backward()
    whole, s.grad = s.grad, None
    value = angle_loss(s, t).item()
    monkeypatch.setattr(rkd, "CHUNK", 2 * 64**2)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = angle_loss(s, t)
        loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-6)
    assert torch.allclose(s.grad, whole, atol=1e-7)
    seen.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    assert max(totals) - min(totals) < 8 * 64**3
