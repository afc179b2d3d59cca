"""BYOT's loss: values worked by hand, an independent numpy formulation, its minimum, and where gradients stop."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.multi_exit_outputs import THREE_EXITS, outputs, training_batch
from scipy.special import log_softmax

from edgekd.distill.byot import be_your_own_teacher, soft_ce
from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.distill.methods import method_names
from edgekd.distill.sd import SelfDistillationOptions
from edgekd.errors import ConfigError
from edgekd.models.base import Outputs

LN3 = math.log(3.0)


def test_soft_ce_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2): ln 2. At tau 2 the teacher's logits are halved, and no tau^2."""
    teacher, student = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
    assert soft_ce(student, teacher, temperature=1.0).item() == pytest.approx(math.log(2), abs=1e-6)
    assert soft_ce(teacher, student, temperature=2.0).item() == pytest.approx(
        math.log(1 + math.sqrt(3)) - LN3 / 4, abs=1e-6
    )
    assert soft_ce(student.repeat(5, 1), teacher.repeat(5, 1), temperature=1.0).item() == pytest.approx(math.log(2))


def test_loss_by_hand() -> None:
    """Shallow exit (1/2, 1/2), deepest (3/4, 1/4), label 0; features 3 and 4 apart in two images, so a norm of 5."""
    logits = (torch.zeros(2, 2), torch.tensor([[LN3, 0.0]] * 2))
    features = (torch.tensor([[3.0], [4.0]]), torch.zeros(2, 1))
    value = be_your_own_teacher(
        Outputs(logits, features, ()), torch.tensor([0, 0]), temperature=1.0, feature_weight=0.1
    )
    assert value.item() == pytest.approx(math.log(4 / 3) + (0.7 + 0.3) * math.log(2) + 0.5, abs=1e-6)


def test_loss_against_numpy() -> None:
    out, target = outputs(), torch.tensor([0, 1, 2, 3, 4, 0])
    s, f = ([t.detach().double().numpy() for t in part] for part in (out.logits, out.features))

    hot = np.eye(5)[target.numpy()]
    expected = -(hot * log_softmax(s[2], axis=1)).sum() / 6
    for m in range(2):
        expected -= 0.7 * (hot * log_softmax(s[m], axis=1)).sum() / 6
        expected -= 0.3 * (np.exp(log_softmax(s[2] / 3, axis=1)) * log_softmax(s[m] / 3, axis=1)).sum() / 6
        expected += 0.03 * np.sqrt(((f[m] - f[2]) ** 2).sum())
    loss = Criterion(LossSettings(method="byot"), student=THREE_EXITS)
    assert loss(training_batch(out, target=target)).item() == pytest.approx(expected, rel=1e-5)


def test_equal_exits_leave_the_teacher_s_entropy() -> None:
    """Where the exits agree, only the labels and the entropy of the softened teacher are left, and no gradient of the
    softened and the feature term, though the norm has a kink there."""
    logits, features = torch.randn(4, 5), torch.randn(4, 8)
    shallow = [logits.clone().requires_grad_(), features.clone().requires_grad_()]
    out = Outputs((shallow[0], logits), (shallow[1], features), ())
    value = be_your_own_teacher(out, torch.arange(4), temperature=3.0, feature_weight=0.03)
    hard = torch.nn.functional.cross_entropy(logits, torch.arange(4))
    p = (logits / 3).softmax(1)
    entropy = -(p * p.log()).sum(1).mean()
    assert value.item() == pytest.approx((1.7 * hard + 0.3 * entropy).item(), rel=1e-5)
    value.backward()
    of_labels = 0.7 * (logits.softmax(1) - torch.eye(4, 5)) / 4
    torch.testing.assert_close(shallow[0].grad, of_labels)
    assert shallow[1].grad is not None
    assert not shallow[1].grad.any()


def test_the_deepest_exit_learns_from_labels_alone() -> None:
    out, target = outputs(), torch.tensor([0, 1, 2, 3, 4, 0])
    be_your_own_teacher(out, target, temperature=3.0, feature_weight=0.03).backward()
    assert out.features[-1].grad is None
    alone = out.logits[-1].detach().requires_grad_()
    torch.nn.functional.cross_entropy(alone, target).backward()
    torch.testing.assert_close(out.logits[-1].grad, alone.grad)
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (*out.logits[:-1], *out.features[:-1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4])
def test_gradients_are_finite(dtype: torch.dtype, batch: int) -> None:
    """Batch 1, one class, and features of 1,000, whose squares overflow half precision; then the same image twice."""
    for out in (outputs(batch, dtype=dtype, scale=1e3), twice(outputs(1, dtype=dtype), batch)):
        loss = Criterion(LossSettings(method="byot"), student=THREE_EXITS)
        value = loss(training_batch(out))
        value.backward()
        assert value.dtype == torch.float32
        assert all(torch.isfinite(t.grad).all() for t in (*out.logits, *out.features[:-1]) if t.grad is not None)


def twice(out: Outputs, batch: int) -> Outputs:
    """One image's answer repeated, every exit like the deepest."""
    logits, features = (
        tuple(part[-1].detach().repeat(batch, 1).requires_grad_() for _ in part) for part in (out.logits, out.features)
    )
    return Outputs(logits, features, ())


def test_settings_reach_the_loss() -> None:
    out, target = outputs(), torch.tensor([0, 1, 2, 3, 4, 0])
    options = {"byot": SelfDistillationOptions(feature_weight=0.5)}
    settings = LossSettings(method="byot", temperature=5.0, label_smoothing=0.1, options=options)
    expected = be_your_own_teacher(out, target, temperature=5.0, feature_weight=0.5, label_smoothing=0.1)
    assert Criterion(settings, student=THREE_EXITS)(training_batch(out, target=target)).item() == pytest.approx(
        expected.item()
    )
    smooth = be_your_own_teacher(out, target, temperature=3.0, feature_weight=0.0, label_smoothing=0.1)
    plain = be_your_own_teacher(out, target, temperature=3.0, feature_weight=0.0)
    parts = [torch.nn.functional.cross_entropy(s, target, label_smoothing=0.1) for s in out.logits]
    hard = [torch.nn.functional.cross_entropy(s, target) for s in out.logits]
    difference = sum((w * (a - b) for w, a, b in zip((0.7, 0.7, 1.0), parts, hard)), start=torch.zeros(()))
    assert (smooth - plain).item() == pytest.approx(difference.item(), abs=1e-5)


def test_it_brings_its_own_cross_entropy_and_needs_exits() -> None:
    assert method_names("byot") == ["byot"]
    with pytest.raises(ConfigError, match="compares exits"):
        Criterion(LossSettings(method="byot"))


def test_unequal_widths_are_named() -> None:
    out = Outputs((torch.zeros(1, 2),) * 2, (torch.zeros(1, 4), torch.zeros(1, 8)), ())
    with pytest.raises(ConfigError, match="exit_0 4, exit_1 8"):
        Criterion(LossSettings(method="byot"), student=THREE_EXITS)(training_batch(out))
