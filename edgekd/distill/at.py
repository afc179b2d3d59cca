"""Attention transfer: where the teacher's maps are strong, the student's shall be (Zagoruyko & Komodakis 2017,
arXiv 1612.03928)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import Loss, Setting, Settings, Step, method


def same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Two maps (B, D, H, W) in FP32, the larger one average-pooled to the smaller one's (H, W)."""
    height, width = map(min, zip(student.shape[2:], teacher.shape[2:]))

    def small(features: Tensor) -> Tensor:
        fits = features.shape[2:] == (height, width)
        return features.float() if fits else F.adaptive_avg_pool2d(features.float(), (height, width))

    return small(student), small(teacher)


def attention(features: Tensor) -> Tensor:
    """Mean over the channels of the squares, (B, D, H, W) to (B, H*W), each image's scaled to length 1, in FP32."""
    return F.normalize(features.float().square().mean(1).flatten(1), dim=1)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over batch and places of the squared difference of `attention`; the channels need not be as many."""
    student, teacher = same_size(student, teacher)
    return (attention(student) - attention(teacher)).square().mean()


@method("at", weight=1000.0, teacher=True, needs=("stages",))
def at(settings: Settings, setting: Setting) -> Loss:
    """Sum over all feature points of `attention_loss`; weight 1000 as in RepDistiller."""

    def loss(step: Step) -> Tensor:
        return torch.stack([attention_loss(student, teacher) for student, teacher in step.stages()]).sum()

    return loss
