"""FitNets: a regressor on a middle map of the student predicts the teacher's map (Romero et al., arXiv 1412.6550)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.at import same_size
from edgekd.distill.base import DistillationLoss, InitOptions, LossContext, TrainingBatch, no_loss
from edgekd.models.feature_points import MapShape


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean squared difference of two maps (B, D, H, W), the larger one average-pooled, in FP32."""
    return F.mse_loss(*same_size(student, teacher))


def regressor(student: MapShape, teacher: MapShape) -> nn.Sequential:
    """Build a convolution and BN from the student's map to the teacher's channels.

    The convolution is 1x1, or 3x3 with stride H_s // H_t where the student's map is larger. Any remaining difference in
    size is average-pooled in the loss.

    Args:
        student: (D, H, W) of the student's map.
        teacher: (D, H, W) of the teacher's map.
    """
    stride = max(1, student[1] // teacher[1])
    size = 1 if stride == 1 else 3
    conv = nn.Conv2d(student[0], teacher[0], size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(teacher[0]))


class FitNets(DistillationLoss):
    """`hint_loss` at the second feature point (or the only one), through `regressor` and ReLU; weight 100.

    By default it has one stage beside cross-entropy, as in RepDistiller. `--set fitnets.init_epochs=N` gives the
    paper's two: N epochs of the hint alone, which train only layers up to the point, then none of it (add kd for the
    paper's second stage).
    """

    options = InitOptions
    weight = 100.0
    needs = ("stages",)
    needs_teacher = True

    def __init__(self, options: InitOptions, context: LossContext) -> None:
        super().__init__(options, context)
        self.init_epochs = options.init_epochs
        self.point = min(1, len(context.student.stages) - 1)
        shapes = context.student.stages[self.point], context.teacher.stages[self.point]
        self.regressor = nn.Sequential(*regressor(*shapes), nn.ReLU())

    def init_loss(self, batch: TrainingBatch) -> Tensor:
        student, teacher = batch.stage_pairs()[self.point]
        return hint_loss(self.regressor(student.float()), teacher)

    def forward(self, batch: TrainingBatch) -> Tensor:
        return no_loss(batch) if self.init_epochs else self.init_loss(batch)
