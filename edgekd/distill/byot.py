"""Be your own teacher: the deepest exit teaches the shallow exits (Zhang et al., arXiv 1905.08094)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import DistillationLoss, LossContext, TrainingBatch
from edgekd.distill.sd import SelfDistillationOptions, equal_widths
from edgekd.models.base import Outputs


def soft_ce(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Compute the cross-entropy of softmax(student / tau) against softmax(teacher / tau), mean over the batch, in FP32.

    There is no factor tau^2 as in KD. The minimum, at student = teacher, is the entropy of the softened teacher, not 0.

    Args:
        student: Logits (B, C).
        teacher: Logits (B, C).
        temperature: tau.
    """
    return F.cross_entropy(student.float() / temperature, (teacher.float() / temperature).softmax(dim=1))


def be_your_own_teacher(
    outputs: Outputs, target: Tensor, *, temperature: float, feature_weight: float, label_smoothing: float = 0.0
) -> Tensor:
    """Compute CE(S_n, y) + sum over shallow exits m < n of 0.7 CE(S_m, y) + 0.3 soft_ce(S_m, sg S_n)
    + feature_weight ||F_m - sg F_n||, in FP32.

    CE is a batch mean; sg stops the gradient. As in the published code (pytorch-self-distillation-final 47ca93b) the
    softened term has no tau^2, and the norm is unsquared and taken once over the whole batch of pooled features (B, D),
    so that it grows with the square root of B. That code was changed after the paper: it passes F_m through a learnt
    linear layer and omits the exit before the deepest. This function does neither, as in the paper.

    Args:
        outputs: The student's outputs.
        target: Labels (B,).
        temperature: tau of the softened term.
        feature_weight: Weight of the norm.
        label_smoothing: Label smoothing of CE.

    Raises:
        ConfigError: The exits' features differ in width.
    """
    deepest, feature = outputs.logits[-1].detach(), equal_widths(outputs.features)[-1].detach().float()
    total = F.cross_entropy(outputs.logits[-1].float(), target, label_smoothing=label_smoothing)
    for logits, shallow in zip(outputs.logits[:-1], outputs.features[:-1]):
        total = total + 0.7 * F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
        total = total + 0.3 * soft_ce(logits, deepest, temperature=temperature)
        total = total + feature_weight * (shallow.float() - feature).norm()
    return total


class BeYourOwnTeacher(DistillationLoss):
    """`be_your_own_teacher` at the protocol's temperature; the default feature weight is the paper's."""

    options = SelfDistillationOptions
    has_ce = True
    needs_exits = True

    def __init__(self, options: SelfDistillationOptions, context: LossContext) -> None:
        super().__init__(options, context)
        self.feature_weight = options.feature_weight

    def forward(self, batch: TrainingBatch) -> Tensor:
        return be_your_own_teacher(
            batch.student.outputs,
            batch.target,
            temperature=self.context.temperature,
            feature_weight=self.feature_weight,
            label_smoothing=self.context.label_smoothing,
        )
