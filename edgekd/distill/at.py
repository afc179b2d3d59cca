"""Attention transfer: the student's maps are strong where the teacher's are (Zagoruyko & Komodakis 2017,
arXiv 1612.03928)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import DistillationLoss, TrainingBatch


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Average-pool the larger of two maps (B, D, H, W) to the (H, W) of the smaller; both are returned in FP32."""
    height, width = map(min, zip(student.shape[2:], teacher.shape[2:]))

    def pooled(features: Tensor) -> Tensor:
        fits = features.shape[2:] == (height, width)
        return features.float() if fits else F.adaptive_avg_pool2d(features.float(), (height, width))

    return pooled(student), pooled(teacher)


def attention(features: Tensor) -> Tensor:
    """Compute the mean square over the channels, (B, D, H, W) to (B, H*W), each image scaled to length 1, in FP32."""
    return F.normalize(features.float().square().mean(1).flatten(1), dim=1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of `attention` over batch and positions; numbers of channels may differ."""
    student, teacher = same_size(student, teacher)
    return (attention(student) - attention(teacher)).square().mean()


class AttentionTransfer(DistillationLoss):
    """Sum over all feature points of `attention_loss`; weight 1000 as in RepDistiller."""

    weight = 1000.0
    needs = ("stages",)
    needs_teacher = True

    def forward(self, batch: TrainingBatch) -> Tensor:
        return torch.stack([attention_loss(student, teacher) for student, teacher in batch.stage_pairs()]).sum()
