"""SCAN's loss: the deepest exit teaches the shallow exits (Zhang et al., NeurIPS 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import DistillationLoss, TrainingBatch
from edgekd.distill.byot import soft_ce
from edgekd.distill.sd import equal_widths
from edgekd.models.base import Outputs

FEATURE_WEIGHT = 5e-7


def scan_loss(outputs: Outputs, target: Tensor, *, temperature: float, label_smoothing: float = 0.0) -> Tensor:
    """Compute CE(S_n, y) + sum over shallow exits m < n of 0.5 CE(S_m, y) + 0.5 tau^2 soft_ce(S_m, sg S_n)
    + 5e-7 ||F_m - sg F_n||^2, in FP32.

    CE is a batch mean; sg stops the gradient. As in the published code (pytorch-scalable-neural-networks aac136e:
    tau = 3, and a factor 9), the squares of the pooled features (B, D) are summed over the batch, of 128 images there.

    Args:
        outputs: The student's outputs.
        target: Labels (B,).
        temperature: tau of the softened term.
        label_smoothing: Label smoothing of CE.

    Raises:
        ConfigError: The exits' features differ in width.
    """
    deepest, feature = outputs.logits[-1].detach(), equal_widths(outputs.features)[-1].detach().float()
    total = F.cross_entropy(outputs.logits[-1].float(), target, label_smoothing=label_smoothing)
    for logits, shallow in zip(outputs.logits[:-1], outputs.features[:-1]):
        total = total + 0.5 * F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
        total = total + 0.5 * temperature**2 * soft_ce(logits, deepest, temperature=temperature)
        total = total + FEATURE_WEIGHT * (shallow.float() - feature).square().sum()
    return total


class Scan(DistillationLoss):
    """`scan_loss` at the protocol's temperature."""

    has_ce = True
    needs_exits = True

    def forward(self, batch: TrainingBatch) -> Tensor:
        return scan_loss(
            batch.student.outputs,
            batch.target,
            temperature=self.context.temperature,
            label_smoothing=self.context.label_smoothing,
        )
