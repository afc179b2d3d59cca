"""Knowledge distillation from a teacher to every exit (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import Loss, Setting, Settings, Step, method


def soft_kl(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)), mean over the batch, in FP32.

    student, teacher: logits (B, C). The factor tau^2 keeps gradients of one size when tau changes.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


@method("kd", teacher=True)
def kd(settings: Settings, setting: Setting) -> Loss:
    """Sum over the student's exits of `soft_kl` against the teacher's deepest exit."""

    def loss(step: Step) -> Tensor:
        assert step.teacher is not None
        answer = step.teacher.out.logits[-1].detach()
        each = [soft_kl(s, answer, temperature=settings.temperature) for s in step.student.out.logits]
        return sum(each[1:], start=each[0])

    return loss
