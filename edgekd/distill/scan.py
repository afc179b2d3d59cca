"""SCAN's loss: the deepest exit teaches the shallow ones (Zhang et al., NeurIPS 2019)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import Loss, Setting, Settings, method
from edgekd.distill.byot import soft_ce
from edgekd.distill.sd import equal_widths
from edgekd.models.base import Outputs

FEATURE_WEIGHT = 5e-7


def scan_loss(out: Outputs, target: Tensor, *, temperature: float, label_smoothing: float = 0.0) -> Tensor:
    """CE(S_n, y) + sum over shallow exits m < n of 0.5 CE(S_m, y) + 0.5 tau^2 soft_ce(S_m, sg S_n)
    + 5e-7 ||F_m - sg F_n||^2, in FP32.

    target: (B,); CE is a batch mean; sg stops the gradient. As in the published code (pytorch-scalable-neural-networks
    aac136e: tau = 3, and a factor 9), the squares of the pooled features (B, D) are summed over the batch, of 128
    images there.

    Raises:
        ConfigError: exits whose features differ in width.
    """
    deepest, feature = out.logits[-1].detach(), equal_widths(out.features)[-1].detach().float()
    total = F.cross_entropy(out.logits[-1].float(), target, label_smoothing=label_smoothing)
    for logits, shallow in zip(out.logits[:-1], out.features[:-1]):
        total = total + 0.5 * F.cross_entropy(logits.float(), target, label_smoothing=label_smoothing)
        total = total + 0.5 * temperature**2 * soft_ce(logits, deepest, temperature=temperature)
        total = total + FEATURE_WEIGHT * (shallow.float() - feature).square().sum()
    return total


@method("scan", own_ce=True, exits=True)
def scan(settings: Settings, setting: Setting) -> Loss:
    """`scan_loss` with the settings' temperature."""
    return lambda step: scan_loss(
        step.student.out, step.target, temperature=settings.temperature, label_smoothing=settings.label_smoothing
    )
