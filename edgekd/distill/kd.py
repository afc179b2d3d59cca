"""Knowledge distillation from a teacher to every exit (Hinton et al., arXiv 1503.02531)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import DistillationLoss, TrainingBatch


def soft_kl(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """Compute tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)), mean over the batch, in FP32.

    The factor tau^2 keeps the size of the gradients when tau changes.

    Args:
        student: Logits (B, C).
        teacher: Logits (B, C).
        temperature: tau.
    """
    log_student = F.log_softmax(student.float() / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


class KnowledgeDistillation(DistillationLoss):
    """Sum over the student's exits of `soft_kl` against the teacher's deepest exit."""

    needs_teacher = True

    def forward(self, batch: TrainingBatch) -> Tensor:
        teacher = batch.teacher.outputs.logits[-1].detach()
        each = [soft_kl(s, teacher, temperature=self.context.temperature) for s in batch.student.outputs.logits]
        return sum(each[1:], start=each[0])
