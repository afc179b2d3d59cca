"""FitNets: a middle map of the student, through a regressor, follows the teacher's (Romero et al., arXiv 1412.6550)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.at import same_size
from edgekd.distill.base import Loss, Setting, Settings, Step, method

WEIGHT = 100.0
Map = tuple[int, int, int]


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over all elements of the squared difference of two maps (B, D, H, W), the larger one pooled, in FP32."""
    return F.mse_loss(*same_size(student, teacher))


def regressor(student: Map, teacher: Map) -> nn.Sequential:
    """Convolution and BN from maps (D, H, W) of the student to the teacher's channels.

    1x1 where the sizes are equal; 3x3, stride H_s // H_t, where the student's map is larger (what a quotient with a
    rest leaves over, and a teacher's map that is larger, is average-pooled in the loss).
    """
    stride = max(1, student[1] // teacher[1])
    size = 1 if stride == 1 else 3
    conv = nn.Conv2d(student[0], teacher[0], size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(teacher[0]))


class Hint(nn.Module):
    """`hint_loss` on the second feature point (the only one, if there is one), through `regressor` and ReLU.

    One stage beside cross-entropy, as in RepDistiller. With `--set init_epochs=N` it has the paper's two: N epochs
    of nothing but the hint, in which only layers up to the point learn, then none of it (add kd for the paper's
    second stage).
    """

    init_epochs = 0

    def __init__(self, settings: Settings, setting: Setting) -> None:
        super().__init__()
        assert setting.teacher is not None
        self.at = min(1, len(setting.student.stages) - 1)
        self.two_stages = settings.init_epochs > 0
        self.weight = settings.loss_weights.get("fitnets", WEIGHT)
        both = setting.student.stages[self.at], setting.teacher.stages[self.at]
        self.regressor = nn.Sequential(*regressor(*both), nn.ReLU())

    def init(self, step: Step) -> Tensor:
        return self.weight * self._hint(step)

    def forward(self, step: Step) -> Tensor:
        return step.target.new_zeros((), dtype=torch.float32) if self.two_stages else self._hint(step)

    def _hint(self, step: Step) -> Tensor:
        student, teacher = step.stages()[self.at]
        return hint_loss(self.regressor(student.float()), teacher)


@method("fitnets", weight=WEIGHT, teacher=True, needs=("stages",))
def fitnets(settings: Settings, setting: Setting) -> Loss:
    """`Hint`, weight 100 as in RepDistiller."""
    return Hint(settings, setting)
