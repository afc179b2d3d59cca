"""Be your own teacher: the deepest exit teaches the shallow ones (Zhang et al., arXiv 1905.08094)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import Loss, Setting, Settings, method
from edgekd.distill.sd import equal_widths
from edgekd.models.base import Outputs


def soft_ce(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of softmax(student / tau) against softmax(teacher / tau), mean over the batch, in FP32.

    student, teacher: logits (B, C). Without KD's factor tau^2. Its least value, at student = teacher, is the entropy
    of the softened teacher and not 0.
    """
    return F.cross_entropy(student.float() / temperature, (teacher.float() / temperature).softmax(dim=1))


def be_your_own_teacher(
    out: Outputs, target: Tensor, *, temperature: float, feature_weight: float, label_smoothing: float = 0.0
) -> Tensor:
    """CE(S_n, y) + sum over shallow exits m < n of 0.7 CE(S_m, y) + 0.3 soft_ce(S_m, sg S_n)
    + feature_weight ||F_m - sg F_n||, in FP32.

    target: (B,); CE is a batch mean; sg stops the gradient. As in the published code (pytorch-self-distillation-final
    47ca93b) the softened term has no tau^2, and the norm is unsquared and taken once over the whole batch of pooled
    features (B, D), so it grows with the square root of B. That code was changed after the paper: it sends F_m
    through a learnt linear layer and leaves out the exit before the deepest; here, as in the paper, it does neither.

    Raises:
        ConfigError: exits whose features differ in width.
    """
    deepest, feature = out.logits[-1].detach(), equal_widths(out.features)[-1].detach().float()
    total = F.cross_entropy(out.logits[-1].float(), target, label_smoothing=label_smoothing)
    for logits, shallow in zip(out.logits[:-1], out.features[:-1]):
        total = total + 0.7 * F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
        total = total + 0.3 * soft_ce(logits, deepest, temperature=temperature)
        total = total + feature_weight * (shallow.float() - feature).norm()
    return total


@method("byot", own_ce=True, exits=True)
def byot(settings: Settings, setting: Setting) -> Loss:
    """`be_your_own_teacher` with the settings' temperature and feature_weight, which by default are the paper's."""
    return lambda step: be_your_own_teacher(
        step.student.out,
        step.target,
        temperature=settings.temperature,
        feature_weight=settings.feature_weight,
        label_smoothing=settings.label_smoothing,
    )
