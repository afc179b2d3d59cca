"""Losses against values worked by hand, an independent numpy formulation, and their known minima."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from helpers.multi_exit_outputs import THREE_EXITS, one_exit, outputs, training_batch

from edgekd import config
from edgekd.distill.base import FeatureShapes
from edgekd.distill.ce import multi_exit_ce
from edgekd.distill.criterion import Criterion, LossSettings
from edgekd.distill.kd import soft_kl
from edgekd.distill.methods import method_names, needs_teacher
from edgekd.distill.sd import self_distillation
from edgekd.errors import ConfigError
from edgekd.models.base import Outputs
from edgekd.training.protocol import Protocol

LN3 = math.log(3.0)


def test_soft_kl_by_hand() -> None:
    """Teacher (3/4, 1/4), student (1/2, 1/2) at tau 1: 3/4 ln(3/2) + 1/4 ln(1/2)."""
    teacher, student = torch.tensor([[LN3, 0.0]]), torch.zeros(1, 2)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert soft_kl(student, teacher, temperature=1.0).item() == pytest.approx(expected, abs=1e-6)
    # the same probabilities at tau 2 from logits twice as large, times tau^2
    assert soft_kl(student, 2 * teacher, temperature=2.0).item() == pytest.approx(4 * expected, abs=1e-5)
    # a batch mean: repeating the sample changes nothing
    repeated = soft_kl(student.repeat(5, 1), teacher.repeat(5, 1), temperature=1.0)
    assert repeated.item() == pytest.approx(expected, abs=1e-6)


def test_soft_kl_against_numpy() -> None:
    rng = np.random.default_rng(0)
    s, t = rng.normal(size=(2, 7, 5)) * 3

    def softmax(x: np.ndarray) -> np.ndarray:
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = softmax(t / 3), softmax(s / 3)
    expected = 9 * (p * (np.log(p) - np.log(q))).sum(1).mean()
    assert soft_kl(torch.tensor(s), torch.tensor(t), temperature=3.0).item() == pytest.approx(expected, rel=1e-5)


def test_cross_entropy_is_summed_over_exits_and_literally_counts_the_deepest_again() -> None:
    target = torch.tensor([0])
    logits = [torch.tensor([[0.0, 0.0]]), torch.tensor([[LN3, 0.0]])]
    shallow, deepest = math.log(2.0), math.log(4 / 3)
    assert multi_exit_ce(logits, target).item() == pytest.approx(shallow + deepest, abs=1e-6)
    assert multi_exit_ce(logits, target, literal=True).item() == pytest.approx(shallow + 3 * deepest, abs=1e-6)


def test_self_distillation_by_hand() -> None:
    """One shallow exit as in `test_soft_kl_by_hand`; features (0, 2) and (1, 0) give MSE 2.5."""
    out = Outputs(
        (torch.zeros(1, 2), torch.tensor([[LN3, 0.0]])), (torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])), ()
    )
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert self_distillation(out, temperature=1.0, feature_weight=0.1).item() == pytest.approx(kl + 0.25, abs=1e-6)


def test_equal_exits_and_teacher_cost_nothing() -> None:
    out = outputs(exits=1)
    same = Outputs(out.logits * 3, out.features * 3, ())
    assert self_distillation(same, temperature=3.0, feature_weight=1.0).item() == pytest.approx(0, abs=1e-6)
    assert soft_kl(out.logits[0], out.logits[0], temperature=3.0).item() == pytest.approx(0, abs=1e-6)


def test_gradients_stop_at_the_deepest_exit_and_the_teacher() -> None:
    out = outputs()
    self_distillation(out, temperature=3.0, feature_weight=0.03).backward()
    assert out.logits[-1].grad is None
    assert out.features[-1].grad is None
    assert all(s.grad is not None and s.grad.abs().sum() > 0 for s in (*out.logits[:-1], *out.features[:-1]))
    teacher = torch.randn(6, 5, requires_grad=True)
    Criterion(LossSettings(method="kd"))(training_batch(outputs(), one_exit(teacher))).backward()
    assert teacher.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 4])
def test_gradients_are_finite(dtype: torch.dtype, batch: int) -> None:
    """Batch 1, duplicates of one class, half precision, logits of 100."""
    logits = [torch.full((batch, 5), 100.0, dtype=dtype).requires_grad_() for _ in range(4)]
    features = [torch.full((batch, 8), 200.0, dtype=dtype).requires_grad_() for _ in range(4)]
    out = Outputs(tuple(logits), tuple(features), ())
    criterion = Criterion(LossSettings(method="kd+sd"), student=FeatureShapes(exits=4))
    criterion(training_batch(out, one_exit(torch.randn(batch, 5) * 100))).backward()
    assert all(torch.isfinite(t.grad).all() for t in logits if t.grad is not None)


def test_criterion_sums_its_weighted_terms() -> None:
    out, target, teacher = outputs(), torch.tensor([0, 1, 2, 3, 4, 0]), torch.randn(6, 5)
    settings = LossSettings(method="kd+sd", loss_weights={"ce": 0.5, "kd": 2.0, "sd": 0.1})
    criterion = Criterion(settings, student=THREE_EXITS)
    total = criterion(training_batch(out, one_exit(teacher), target=target))
    expected = (
        0.5 * multi_exit_ce(out.logits, target)
        + 2 * sum(soft_kl(s, teacher, temperature=3.0) for s in out.logits)
        + 0.1 * self_distillation(out, temperature=3.0, feature_weight=0.03)
    )
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert set(criterion.terms) == {"ce", "kd", "sd"}
    assert sum(criterion.terms.values()).item() == pytest.approx(total.item(), rel=1e-6)


def test_names_of_methods() -> None:
    assert method_names("kd+sd") == method_names("ce+kd+sd") == ["ce", "kd", "sd"]
    assert needs_teacher("kd+sd")
    assert not needs_teacher("sd")
    with pytest.raises(ConfigError, match="Did you mean 'kd'"):
        method_names("kdd")
    with pytest.raises(ConfigError, match="twice"):
        method_names("kd+kd")
    with pytest.raises(ConfigError, match="Did you mean 'kd'"):
        Criterion(LossSettings(method="kd", loss_weights={"kdd": 1.0}))
    with pytest.raises(ConfigError, match="compares exits"):
        Criterion(LossSettings(method="sd"))


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"loss_weights": {"kd": -1.0}}, {"label_smoothing": 1.0}])
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossSettings(**wrong)


def test_a_method_that_did_not_declare_what_it_reads() -> None:
    batch = training_batch(one_exit(2))
    with pytest.raises(TypeError, match="declare `needs_teacher = True`"):
        batch.stage_pairs()
    with pytest.raises(TypeError, match=r"declare `needs = \('pooled',\)`"):
        _ = batch.student.pooled


def test_an_unknown_method_s_options() -> None:
    with pytest.raises(ConfigError, match=r"hybrd: unknown key; .*Did you mean 'hybrid'"):
        config.load(Protocol, "protocols", "demo", overrides={"hybrd.margin": 1.0})
    with pytest.raises(ConfigError, match=r"sd\.feature_weight.*-1\.0 is negative"):
        config.load(Protocol, "protocols", "demo", overrides={"sd.feature_weight": -1.0})
