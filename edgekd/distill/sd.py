"""Self-distillation: the deepest exit teaches the shallow exits (Gao et al. 2022; BYOT, arXiv 1905.08094)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import DistillationLoss, LossContext, Options, TrainingBatch
from edgekd.distill.kd import soft_kl
from edgekd.errors import ConfigError
from edgekd.models.base import Outputs


def self_distillation(outputs: Outputs, *, temperature: float, feature_weight: float) -> Tensor:
    """Compute the sum over shallow exits m < n of soft_kl(S_m, sg S_n) + feature_weight * MSE(F_m, sg F_n), in FP32.

    sg stops the gradient; the MSE is the mean over all elements of the pooled features (B, D).

    Raises:
        ConfigError: The exits' features differ in width.
    """
    deepest, feature = outputs.logits[-1].detach(), equal_widths(outputs.features)[-1].detach().float()
    total = deepest.new_zeros((), dtype=feature.dtype)
    for logits, shallow in zip(outputs.logits[:-1], outputs.features[:-1]):
        total = total + soft_kl(logits, deepest, temperature=temperature)
        total = total + feature_weight * F.mse_loss(shallow.float(), feature)
    return total


def equal_widths(features: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the exits' pooled features (B, D) if all have the same D.

    Raises:
        ConfigError: They have not; each exit's width is given.
    """
    widths = [feature.shape[1] for feature in features]
    if len(set(widths)) > 1:
        each = ", ".join(f"exit_{k} {width}" for k, width in enumerate(widths))
        raise ConfigError(
            f"the exits' pooled features differ in width ({each}), and the method compares them",
            fix="use a student with equally wide exits, such as multi-exit-resnet18, or kd or ce, which need none",
        )
    return features


@dataclass(frozen=True, kw_only=True)
class SelfDistillationOptions(Options):
    """Options of `sd` and of `byot`.

    Attributes:
        feature_weight: Weight lambda of the feature term.
    """

    feature_weight: float = 0.03

    def __post_init__(self) -> None:
        if self.feature_weight < 0:
            raise ValueError(f"feature_weight: {self.feature_weight} is negative")


class SelfDistillation(DistillationLoss):
    """`self_distillation` at the protocol's temperature."""

    options = SelfDistillationOptions
    needs_exits = True

    def __init__(self, options: SelfDistillationOptions, context: LossContext) -> None:
        super().__init__(options, context)
        self.feature_weight = options.feature_weight

    def forward(self, batch: TrainingBatch) -> Tensor:
        return self_distillation(
            batch.student.outputs, temperature=self.context.temperature, feature_weight=self.feature_weight
        )
