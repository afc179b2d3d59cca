"""Self-supervised knowledge distillation (SSKD, Xu et al., arXiv 2006.07114)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.base import Loss, Setting, Settings, Step, View, method
from edgekd.distill.kd import soft_kl

KD, TURNED, SIMILAR = 0.9, 2.7, 10.0
"""Weights: answers to the images, answers to their rotations, and likeness of rotations to images."""


def likeness(feature: Tensor, batch: int) -> Tensor:
    """(3B, B) cosine of each rotated image with each image, in FP32, from features (4B, D) of both, images first."""
    rows = F.normalize(feature.float(), dim=1)
    return rows[batch:] @ rows[:batch].T


def best_ranked(scores: Tensor, target: Tensor, *, ratio: float) -> Tensor:
    """Which rows of a teacher's scores (R, C) to learn from: indices of those that put target (R,) first, and of the
    wrong ones the share `ratio` that rank it best."""
    rank = (scores > scores.gather(1, target[:, None])).sum(1)
    wrong = int((rank > 0).sum())
    return rank.argsort(stable=True)[: len(rank) - wrong + int(wrong * ratio)]


class SelfSupervision(nn.Module):
    """0.9 * KD + 2.7 * KD on rotations + 10 * KD of likenesses, with a self-supervision head for each network.

    The answers' terms are `soft_kl` at temperature 4 against the teacher's deepest exit, summed over the student's; the
    likenesses are those of the heads' outputs, `soft_kl` at 0.5. Of the rotations that the teacher gets wrong,
    `ratio_turned` and `ratio_similar` are kept. First the teacher's head learns, for `init_epochs`, to find the image
    that a rotated one was; the student's weights rest meanwhile, while its batch-norm statistics already move.
    """

    init_epochs = 60

    def __init__(self, *, student: int, teacher: int, ratio_turned: float = 1.0, ratio_similar: float = 0.75) -> None:
        super().__init__()
        self.student_head, self.teacher_head = _head(student), _head(teacher)
        self.ratio_turned, self.ratio_similar = ratio_turned, ratio_similar

    def expand(self, images: Tensor) -> Tensor:
        """(B, 3, H, H) to (4B, 3, H, H): the images, and all of them turned by 90, 180 and 270 degrees."""
        return torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])

    def init(self, step: Step) -> Tensor:
        """Cross-entropy of the teacher's likenesses, each rotated image belonging to its own."""
        assert step.teacher is not None
        own = torch.arange(len(step.target), device=step.target.device).repeat(3)
        return F.cross_entropy(self._likeness(self.teacher_head, step.teacher, len(step.target)), own)

    def forward(self, step: Step) -> Tensor:
        assert step.teacher is not None
        batch, answer = len(step.target), step.teacher.out.logits[-1].detach()
        kept = batch + best_ranked(answer[batch:], step.target.repeat(3), ratio=self.ratio_turned)
        total = answer.new_zeros((), dtype=torch.float32)
        for logits in step.student.out.logits:
            total = total + KD * soft_kl(logits[:batch], answer[:batch], temperature=4.0)
            total = total + TURNED * soft_kl(logits[kept], answer[kept], temperature=4.0)
        with torch.no_grad():
            teacher = self._likeness(self.teacher_head, step.teacher, batch)
            own = torch.arange(batch, device=teacher.device).repeat(3)
            kept = best_ranked(teacher, own, ratio=self.ratio_similar)
        student = self._likeness(self.student_head, step.student, batch)
        return total + SIMILAR * soft_kl(student[kept], teacher[kept], temperature=0.5)

    def _likeness(self, head: nn.Module, view: View, batch: int) -> Tensor:
        assert view.pooled is not None
        return likeness(head(view.pooled.float()), batch)


def _head(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))


@method("sskd", ce_weight=0.1, teacher=True, needs=("pooled",))
def sskd(settings: Settings, setting: Setting) -> Loss:
    """`SelfSupervision` with the weights, temperatures, ratios and 60 first epochs of the authors' code.

    Their separate learning rate for the first stage is not kept: the protocol's schedule runs through both.
    """
    assert setting.teacher is not None
    return SelfSupervision(student=setting.student.pooled, teacher=setting.teacher.pooled)
