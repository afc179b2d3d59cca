"""Variational information distillation: the student's maps predict the teacher's, with a learnt variance
(Ahn et al. 2019, arXiv 1904.05835)."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.at import same_size
from edgekd.distill.base import DistillationLoss, LossContext, Options, TrainingBatch

INITIAL_VARIANCE, MIN_VARIANCE = 5.0, 1e-5


def vid_loss(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Compute the mean over all elements of 1/2 [(mean - teacher)^2 / variance + log variance], in FP32.

    It has no lower bound: it falls without limit as errors and variances shrink.

    Args:
        mean: Predicted map (B, D, H, W).
        teacher: The teacher's map (B, D, H, W).
        variance: (D,), above 0.
    """
    variance = variance.float()[:, None, None]
    return 0.5 * ((mean.float() - teacher.float()).square() / variance + variance.log()).mean()


class Predictor(nn.Module):
    """`vid_loss` at one feature point: three 1x1 convolutions predict the mean, softplus gives each channel's variance.

    Args:
        student: Channels of the student's map.
        teacher: Channels of the teacher's map.
    """

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        widths = (student, teacher, teacher, teacher)
        convs = [nn.Conv2d(a, b, 1, bias=False) for a, b in itertools.pairwise(widths)]
        self.mean = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        raw = math.log(math.expm1(INITIAL_VARIANCE - MIN_VARIANCE))  # the inverse of softplus
        self.raw_variance = nn.Parameter(torch.full((teacher,), raw))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = same_size(student, teacher)
        return vid_loss(self.mean(student), teacher, F.softplus(self.raw_variance) + MIN_VARIANCE)


class VariationalInformation(DistillationLoss):
    """Sum over all feature points of `Predictor`, at the smaller of both map sizes; weight 1 as in RepDistiller."""

    needs = ("stages",)
    needs_teacher = True

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__(options, context)
        pairs = zip(context.student.stages, context.teacher.stages)
        self.points = nn.ModuleList(Predictor(student[0], teacher[0]) for student, teacher in pairs)

    def forward(self, batch: TrainingBatch) -> Tensor:
        return torch.stack([point(*maps) for point, maps in zip(self.points, batch.stage_pairs())]).sum()
