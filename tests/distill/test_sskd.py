"""Self-supervised distillation against values worked by hand and the authors' layout in numpy; its two stages."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from helpers.multi_exit_outputs import one_exit, training_batch
from helpers.resume import resumes_exactly
from helpers.tiny_protocol import TINY
from torch import Tensor, nn

from edgekd.distill.base import FeatureShapes, LossContext, NetworkOutput, TrainingBatch
from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.distill.methods import METHODS
from edgekd.distill.sskd import (
    SelfSupervisedDistillation,
    SelfSupervisionOptions,
    best_ranked,
    rotation_similarity,
)
from edgekd.errors import ConfigError
from edgekd.training import run_folder
from edgekd.training.train import network, train

Array = npt.NDArray[np.float64]
SHAPES = {"student": FeatureShapes(pooled=4), "teacher": FeatureShapes(pooled=3)}


def loss_of(*, student: int = 4, teacher: int = 3) -> SelfSupervisedDistillation:
    context = LossContext(student=FeatureShapes(pooled=student), teacher=FeatureShapes(pooled=teacher))
    return SelfSupervisedDistillation(SelfSupervisionOptions(), context)


def output(batch: int, width: int, seed: int) -> NetworkOutput:
    """A network's output for `batch` images and their rotations."""
    generator = torch.Generator().manual_seed(seed)
    logits, pooled = (torch.randn(4 * batch, size, generator=generator) for size in (5, width))
    return one_exit(3 * logits.requires_grad_(), pooled=pooled.requires_grad_())


def batch_of(student: NetworkOutput, teacher: NetworkOutput, target: list[int], epoch: int = 60) -> TrainingBatch:
    return training_batch(student, teacher, target=target, epoch=epoch)


def test_rotations_by_hand() -> None:
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).expand(2, 3, 2, 2)
    turned = loss_of().expand(image)
    assert turned.shape == (8, 3, 2, 2)
    assert torch.equal(turned[:2], image)
    assert turned[2::2, 0].flatten(1).tolist() == [[2, 4, 1, 3], [4, 3, 2, 1], [3, 1, 4, 2]]
    assert torch.equal(turned[2::2], turned[3::2])


def test_similarity_by_hand() -> None:
    """Images along two axes; rotations along (1, 0), (1, 1) and (3, 4), the lengths of no matter."""
    axes, diagonal = [[2.0, 0.0], [0.0, 1.0]], math.sqrt(0.5)
    rows = torch.tensor([*axes, *axes, [1.0, 1.0], [1.0, 1.0], [3.0, 4.0], [3.0, 4.0]])
    expected = torch.tensor([[1, 0], [0, 1], [diagonal] * 2, [diagonal] * 2, [0.6, 0.8], [0.6, 0.8]])
    assert torch.allclose(rotation_similarity(rows, 2), expected)


def test_which_answers_are_kept_by_hand() -> None:
    """Class 0 is right: rows 1 and 3 say so, 4, 0 and 2 put it second, third and last."""
    scores = torch.tensor([[2.0, 4, 3, 1], [9, 1, 1, 1], [0, 1, 2, 3], [5, 4, 0, 0], [3, 4, 0, 0]])
    truth = torch.zeros(5, dtype=torch.long)
    assert best_ranked(scores, truth, ratio=1.0).tolist() == [1, 3, 4, 0, 2]
    assert best_ranked(scores, truth, ratio=0.75).tolist() == [1, 3, 4, 0]
    assert best_ranked(scores, truth, ratio=0.0).tolist() == [1, 3]


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(student: Array, teacher: Array, tau: float) -> float:
    p, q = softmax(teacher / tau), softmax(student / tau)
    return float(tau**2 * (p * np.log(p / q)).sum(1).mean())


def kept(scores: Array, truth: Array, ratio: float) -> list[int]:
    ranks = [sorted(row, reverse=True).index(row[int(t)]) for row, t in zip(scores, truth)]
    order = sorted(range(len(ranks)), key=lambda k: ranks[k])
    return order[: len(order) - int(sum(r > 0 for r in ranks) * (1 - ratio) + 0.999)]


def plain(tensor: Tensor) -> Array:
    """The authors' layout: each image, then its rotations."""
    batch = len(tensor) // 4
    return tensor.detach().double().numpy()[[i + turn * batch for i in range(batch) for turn in range(4)]]


def test_against_the_authors_layout() -> None:
    torch.manual_seed(0)
    student, teacher, target = output(6, 4, 1), output(6, 3, 2), [0, 1, 2, 3, 4, 0]
    criterion = Criterion(LossSettings(method="sskd"), **SHAPES)
    loss = criterion.losses["sskd"]
    assert isinstance(loss, SelfSupervisedDistillation)
    found = criterion(batch_of(student, teacher, target)).item()
    s, t = plain(student.outputs.logits[0]), plain(teacher.outputs.logits[0])
    normal, turned = np.arange(24) % 4 == 0, np.arange(24) % 4 != 0
    likely = []
    for head, one in ((loss.student_head, student), (loss.teacher_head, teacher)):
        rows = plain(head(one.pooled))
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        likely.append(rows[turned] @ rows[normal].T)
    rows = kept(likely[1], np.repeat(np.arange(6), 3), 0.75)
    assert len(rows) < 18
    ce = -np.log(softmax(s[normal])[range(6), target]).mean()
    expected = 0.1 * ce + 0.9 * kl(s[normal], t[normal], 4) + 2.7 * kl(s[turned], t[turned], 4)
    assert found == pytest.approx(expected + 10 * kl(likely[0][rows], likely[1][rows], 0.5), rel=1e-4)


def test_a_student_like_its_teacher_costs_nothing() -> None:
    teacher = output(4, 3, 2)
    loss = loss_of(student=3)
    loss.student_head.load_state_dict(loss.teacher_head.state_dict())
    assert loss(batch_of(teacher, teacher, [0, 1, 2, 3])).item() == pytest.approx(0, abs=1e-5)


def test_first_stage_by_hand() -> None:
    """All rotations like all images: ln B. The head then learns to find its image."""
    loss = loss_of()
    alike = one_exit(16, pooled=torch.ones(16, 3))
    assert loss.init_loss(batch_of(output(4, 4, 1), alike, [0] * 4, 0)).item() == pytest.approx(math.log(4), rel=1e-6)
    with torch.no_grad():
        nn.init.eye_(loss.teacher_head[0].weight), nn.init.eye_(loss.teacher_head[2].weight)
        nn.init.zeros_(loss.teacher_head[0].bias), nn.init.zeros_(loss.teacher_head[2].bias)
    own = one_exit(12, pooled=torch.eye(3).repeat(4, 1))
    expected = math.log(1 + 2 / math.e)  # cosines 1, 0, 0
    assert loss.init_loss(batch_of(output(3, 4, 1), own, [0] * 3, 0)).item() == pytest.approx(expected, rel=1e-5)


def test_each_stage_trains_its_own() -> None:
    torch.manual_seed(0)
    criterion = Criterion(LossSettings(method="kd+sskd"), **SHAPES)
    assert criterion.losses["sskd"].init_epochs == 60
    assert criterion.weights == {"ce": 0.1, "kd": 1.0, "sskd": 1.0}
    student, teacher = output(4, 4, 1), output(4, 3, 2)
    criterion(batch_of(student, teacher, [0, 1, 2, 3], 59)).backward()
    with_gradient = {n.split(".")[1] for n, p in criterion.named_parameters() if p.grad is not None}
    assert with_gradient == {"teacher_head"}
    assert set(criterion.terms) == {"sskd"}
    criterion.zero_grad()
    criterion(batch_of(student, teacher, [0, 1, 2, 3], 60)).backward()
    with_gradient = {n.split(".")[1] for n, p in criterion.named_parameters() if p.grad is not None}
    assert with_gradient == {"student_head"}
    assert all(p.grad is None or p.grad.abs().sum() > 0 for p in criterion.parameters())
    assert set(criterion.terms) == {"ce", "kd", "sskd"}  # the first two see the images without rotations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("epoch", [0, 60])
@pytest.mark.parametrize("batch", [1, 3])
def test_gradients_are_finite(batch: int, epoch: int, dtype: torch.dtype) -> None:
    """Batch 1, duplicates of one class, half precision, logits of 100."""
    torch.manual_seed(0)
    logits, pooled = (torch.full((4 * batch, n), 100.0, dtype=dtype).requires_grad_() for n in (5, 4))
    teacher = one_exit(torch.randn(4 * batch, 5) * 100, pooled=torch.full((4 * batch, 3), 100.0))
    criterion = Criterion(LossSettings(method="sskd"), **SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = criterion(batch_of(one_exit(logits, pooled=pooled), teacher, [0] * batch, epoch))
    loss.backward()
    grads = [t.grad for t in (logits, pooled, *criterion.parameters()) if t.grad is not None]
    assert len(grads) == (6 if epoch else 4)
    assert all(torch.isfinite(g).all() for g in grads)


def test_two_stages_of_a_run(cells: Path, tmp_path: Path) -> None:
    """The student's weights rest while the teacher's head learns; both heads are resumed and not exported."""
    assert METHODS["sskd"].needs_teacher
    teacher, out = tmp_path / "t", tmp_path / "s"
    train(cells, teacher, protocol=TINY)
    before = (teacher / run_folder.MODEL).read_bytes()
    settings = {"method": "sskd", "split": str(teacher / run_folder.SPLIT), "epochs": 2}
    protocol = replace(TINY, **settings, options={"sskd": SelfSupervisionOptions(init_epochs=1)})

    def stop(done: int, total: int, loss: float) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(cells, out, protocol=protocol, teacher=teacher, progress=stop)
    first = torch.load(out / run_folder.RESUME, weights_only=True)
    untrained = network(protocol, classes=5)
    assert all(torch.equal(first["network"][n], p) for n, p in untrained.named_parameters())
    whole = resumes_exactly(cells, tmp_path, protocol, teacher=teacher)
    last = torch.load(whole / run_folder.RESUME, weights_only=True)["criterion"]
    assert {n.split(".")[1] for n in last} == {"student_head", "teacher_head"}
    for name, value in first["criterion"].items():
        assert torch.equal(value, last[name]) == ("teacher_head" in name)
    assert (teacher / run_folder.MODEL).read_bytes() == before
    header = (whole / run_folder.METRICS).read_text().splitlines()[0].split(",")
    assert {"loss_ce", "loss_sskd"} <= set(header)
    with pytest.raises(ConfigError, match="60 epochs"):
        train(cells, tmp_path / "short", protocol=replace(protocol, options={}), teacher=teacher)
