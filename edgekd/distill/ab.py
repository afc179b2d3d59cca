"""Activation boundaries: the student's neurons shall be on and off where the teacher's are (Heo et al. 2019,
arXiv 1811.03233)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.at import same_size
from edgekd.distill.base import Loss, Setting, Settings, Step, method
from edgekd.distill.fitnets import Map, regressor
from edgekd.errors import ConfigError

MARGIN = 1.0


def boundary_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared hinge with margin 1 on the side of 0 where the teacher is: 3/1000 of the sum over all elements,
    divided by B, in FP32. A sum, so it grows with the maps.

    student, teacher: maps (B, D, H, W) before the activation, the larger one pooled. 0 where both have one sign
    and the student is the margin or more away from 0.
    """
    student, teacher = same_size(student, teacher)
    side = torch.where(teacher > 0, 1.0, -1.0)
    return F.relu(MARGIN - side * student).square().sum() / len(student) * 3 / 1000


def connector(student: Map, teacher: Map) -> nn.Module:
    """Nothing for maps (D, H, W) of one shape, else fitnets' `regressor`."""
    return nn.Identity() if student == teacher else regressor(student, teacher)


class Boundaries(nn.Module):
    """Sum over the n feature points, i from 0, of `boundary_loss` through a `connector`, times 2^(i + 1 - n): for
    three of them 1/4, 1/2, 1 as printed, for four 1/8, 1/4, 1/2, 1 as in RepDistiller.

    It is all of the first 30 epochs, in which no classifier learns; afterwards there is none of it. These epochs are
    among the run's own (RepDistiller's come before its 240); `--set init_epochs=N` shortens them, and a run must be
    longer.
    """

    init_epochs = 30

    def __init__(self, settings: Settings, setting: Setting) -> None:
        super().__init__()
        assert setting.teacher is not None
        self.weight = settings.loss_weights.get("ab", 1.0)
        self.connectors = nn.ModuleList(map(connector, setting.student.preact, setting.teacher.preact))

    def init(self, step: Step) -> Tensor:
        assert step.teacher is not None
        triples = zip(self.connectors, step.student.preact, step.teacher.preact)
        each = [boundary_loss(connect(student.float()), teacher.detach()) for connect, student, teacher in triples]
        return self.weight * torch.stack([2.0 ** (i + 1 - len(each)) * value for i, value in enumerate(each)]).sum()

    def forward(self, step: Step) -> Tensor:
        return step.target.new_zeros((), dtype=torch.float32)


@method("ab", teacher=True, needs=("preact",))
def ab(settings: Settings, setting: Setting) -> Loss:
    """`Boundaries`.

    Raises:
        ConfigError: init_epochs is 0, which leaves nothing of the method.
    """
    if settings.init_epochs == 0:
        what = "method 'ab' works in its initial epochs only, and init_epochs is 0"
        raise ConfigError(what, fix="leave init_epochs out for 30, or give it a number above 0")
    return Boundaries(settings, setting)
