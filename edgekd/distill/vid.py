"""Variational information distillation: the student's maps predict the teacher's with a learnt variance
(Ahn et al. 2019, arXiv 1904.05835)."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.at import same_size
from edgekd.distill.base import Loss, Setting, Settings, Step, method

FIRST_VARIANCE, LEAST_VARIANCE = 5.0, 1e-5


def vid_loss(mean: Tensor, teacher: Tensor, variance: Tensor) -> Tensor:
    """Mean over all elements of 1/2 [(mean - teacher)^2 / variance + log variance], in FP32.

    mean, teacher: maps (B, D, H, W); variance: (D,), above 0. No bound at 0: ever smaller errors and variances
    make it ever more negative.
    """
    variance = variance.float()[:, None, None]
    return 0.5 * ((mean.float() - teacher.float()).square() / variance + variance.log()).mean()


class Predictor(nn.Module):
    """One feature point's `vid_loss`: three 1x1 convolutions give the mean, softplus a channel's variance."""

    def __init__(self, student: int, teacher: int) -> None:
        super().__init__()
        widths = (student, teacher, teacher, teacher)
        convs = [nn.Conv2d(a, b, 1, bias=False) for a, b in itertools.pairwise(widths)]
        self.mean = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        raw = math.log(math.expm1(FIRST_VARIANCE - LEAST_VARIANCE))  # the inverse of softplus
        self.raw_variance = nn.Parameter(torch.full((teacher,), raw))

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = same_size(student, teacher)
        return vid_loss(self.mean(student), teacher, F.softplus(self.raw_variance) + LEAST_VARIANCE)


class Information(nn.Module):
    """Sum over all feature points of `Predictor`."""

    def __init__(self, setting: Setting) -> None:
        super().__init__()
        assert setting.teacher is not None
        pairs = zip(setting.student.stages, setting.teacher.stages)
        self.points = nn.ModuleList(Predictor(student[0], teacher[0]) for student, teacher in pairs)

    def forward(self, step: Step) -> Tensor:
        return torch.stack([point(*maps) for point, maps in zip(self.points, step.stages())]).sum()


@method("vid", teacher=True, needs=("stages",))
def vid(settings: Settings, setting: Setting) -> Loss:
    """`Information`, weight 1 as in RepDistiller; the smaller of two map sizes counts."""
    return Information(setting)
