"""Activation boundaries: the student's neurons are active where the teacher's are (Heo et al. 2019,
arXiv 1811.03233)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.at import same_size
from edgekd.distill.base import DistillationLoss, InitOptions, LossContext, TrainingBatch, no_loss
from edgekd.distill.fitnets import regressor
from edgekd.models.feature_points import MapShape

MARGIN = 1.0


def boundary_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the squared hinge loss, margin 1, of the student against the sign of the teacher, in FP32.

    It is 3/1000 of the sum over all elements, divided by B; being a sum, it grows with the maps. It is 0 where both
    have the same sign and the student is at least the margin away from 0.

    Args:
        student: Map (B, D, H, W) before the activation.
        teacher: Map (B, D, H, W) before the activation; the larger of both is average-pooled.
    """
    student, teacher = same_size(student, teacher)
    side = torch.where(teacher > 0, 1.0, -1.0)
    return F.relu(MARGIN - side * student).square().sum() / len(student) * 3 / 1000


def connector(student: MapShape, teacher: MapShape) -> nn.Module:
    """Build the identity for maps of one shape (D, H, W), else the regressor of FitNets."""
    return nn.Identity() if student == teacher else regressor(student, teacher)


@dataclass(frozen=True, kw_only=True)
class BoundaryOptions(InitOptions):
    """Options of `ab`.

    Attributes:
        init_epochs: Epochs of the method, above 0.
    """

    init_epochs: int = 30

    def __post_init__(self) -> None:
        if self.init_epochs < 1:
            raise ValueError(f"init_epochs: {self.init_epochs} is not above 0, and the method has no other epochs")


class ActivationBoundaries(DistillationLoss):
    """Sum over the n feature points, i from 0, of `boundary_loss` through a `connector`, times 2^(i + 1 - n).

    The factors are 1/4, 1/2, 1 for three points as printed, and 1/8, 1/4, 1/2, 1 for four as in RepDistiller. This loss
    is trained alone for the first 30 epochs, in which no classifier learns, and not at all afterwards. Those epochs are
    part of the run's (RepDistiller adds them to its 240); `--set ab.init_epochs=N` shortens them.
    """

    options = BoundaryOptions
    needs = ("preactivations",)
    needs_teacher = True

    def __init__(self, options: BoundaryOptions, context: LossContext) -> None:
        super().__init__(options, context)
        self.init_epochs = options.init_epochs
        shapes = context.student.preactivations, context.teacher.preactivations
        self.connectors = nn.ModuleList(map(connector, *shapes))

    def init_loss(self, batch: TrainingBatch) -> Tensor:
        pairs = zip(self.connectors, batch.preactivation_pairs())
        each = [boundary_loss(connect(student.float()), teacher) for connect, (student, teacher) in pairs]
        return torch.stack([2.0 ** (i + 1 - len(each)) * value for i, value in enumerate(each)]).sum()

    def forward(self, batch: TrainingBatch) -> Tensor:
        return no_loss(batch)
