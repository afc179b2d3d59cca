"""Self-distillation: the deepest exit teaches the shallow ones (Gao et al. 2022; BYOT, arXiv 1905.08094)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import Loss, Setting, Settings, method
from edgekd.distill.kd import soft_kl
from edgekd.errors import ConfigError
from edgekd.models.base import Outputs


def self_distillation(out: Outputs, *, temperature: float, feature_weight: float) -> Tensor:
    """Sum over shallow exits m < n of soft_kl(S_m, sg S_n) + feature_weight * MSE(F_m, sg F_n), in FP32.

    sg stops the gradient; the MSE is the mean over all elements of the pooled features (B, D).

    Raises:
        ConfigError: exits whose features differ in width.
    """
    deepest, feature = out.logits[-1].detach(), equal_widths(out.features)[-1].detach().float()
    total = deepest.new_zeros((), dtype=feature.dtype)
    for logits, shallow in zip(out.logits[:-1], out.features[:-1]):
        total = total + soft_kl(logits, deepest, temperature=temperature)
        total = total + feature_weight * F.mse_loss(shallow.float(), feature)
    return total


def equal_widths(features: Sequence[Tensor]) -> Sequence[Tensor]:
    """The exits' pooled features (B, D), if all have one D.

    Raises:
        ConfigError: they have not; each exit's width is given.
    """
    widths = [feature.shape[1] for feature in features]
    if len(set(widths)) > 1:
        each = ", ".join(f"exit_{k} {width}" for k, width in enumerate(widths))
        raise ConfigError(
            f"the exits' pooled features differ in width ({each}), and the method compares them",
            fix="use a student with equally wide exits, such as multi-exit-resnet18, or kd or ce, which need none",
        )
    return features


@method("sd", exits=True)
def sd(settings: Settings, setting: Setting) -> Loss:
    """`self_distillation` with the settings' temperature and feature_weight."""
    return lambda step: self_distillation(
        step.student.out, temperature=settings.temperature, feature_weight=settings.feature_weight
    )
