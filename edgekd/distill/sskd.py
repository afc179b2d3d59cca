"""Self-supervised knowledge distillation (SSKD, Xu et al., arXiv 2006.07114)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgekd.distill.base import DistillationLoss, InitOptions, LossContext, NetworkOutput, TrainingBatch
from edgekd.distill.kd import soft_kl

KD_WEIGHT, ROTATION_WEIGHT, SIMILARITY_WEIGHT = 0.9, 2.7, 10.0
"""Weights of the predictions for the images, of those for their rotations, and of the similarities."""
KD_TEMPERATURE, SIMILARITY_TEMPERATURE = 4.0, 0.5
KEPT_ROTATIONS, KEPT_SIMILARITIES = 1.0, 0.75
"""Fractions of the rotated images that the teacher misclassifies and that are still used for training."""


@dataclass(frozen=True, kw_only=True)
class SelfSupervisionOptions(InitOptions):
    """Options of `sskd`.

    Attributes:
        init_epochs: Epochs in which the teacher's self-supervision head is trained.
    """

    init_epochs: int = 60


class SelfSupervisedDistillation(DistillationLoss):
    """0.9 * KD + 2.7 * KD on rotations + 10 * KD of similarities, with a self-supervision head for each network.

    The first two terms are `soft_kl` at temperature 4 against the teacher's deepest exit, summed over the student's
    exits. The similarities are those of the heads' outputs, compared by `soft_kl` at temperature 0.5. First the
    teacher's head is trained, for `init_epochs`, to match each rotated image with its original; meanwhile the student's
    weights are constant, but its batch-norm statistics already change. Weights, temperatures, fractions and the 60
    initial epochs are those of the authors' code; their separate learning rate for the initial stage is not
    implemented: the protocol's schedule covers both stages.
    """

    options = SelfSupervisionOptions
    ce_weight = 0.1
    needs = ("pooled",)
    needs_teacher = True
    expands_batch = True

    def __init__(self, options: SelfSupervisionOptions, context: LossContext) -> None:
        super().__init__(options, context)
        self.init_epochs = options.init_epochs
        self.student_head, self.teacher_head = _head(context.student.pooled), _head(context.teacher.pooled)

    def expand(self, images: Tensor) -> Tensor:
        """Append the images rotated by 90, 180 and 270 degrees: (B, 3, H, H) to (4B, 3, H, H)."""
        return torch.cat([torch.rot90(images, turns, (2, 3)) for turns in range(4)])

    def init_loss(self, batch: TrainingBatch) -> Tensor:
        """Return the cross-entropy of the teacher's similarities, with each rotated image's original as its class."""
        count = len(batch.target)
        original = torch.arange(count, device=batch.target.device).repeat(3)
        return F.cross_entropy(_similarity(self.teacher_head, batch.teacher, count), original)

    def forward(self, batch: TrainingBatch) -> Tensor:
        count, teacher_logits = len(batch.target), batch.teacher.outputs.logits[-1].detach()
        kept = count + best_ranked(teacher_logits[count:], batch.target.repeat(3), ratio=KEPT_ROTATIONS)
        total = teacher_logits.new_zeros((), dtype=torch.float32)
        for logits in batch.student.outputs.logits:
            total = total + KD_WEIGHT * soft_kl(logits[:count], teacher_logits[:count], temperature=KD_TEMPERATURE)
            total = total + ROTATION_WEIGHT * soft_kl(logits[kept], teacher_logits[kept], temperature=KD_TEMPERATURE)
        with torch.no_grad():
            teacher = _similarity(self.teacher_head, batch.teacher, count)
            original = torch.arange(count, device=teacher.device).repeat(3)
            kept = best_ranked(teacher, original, ratio=KEPT_SIMILARITIES)
        student = _similarity(self.student_head, batch.student, count)
        return total + SIMILARITY_WEIGHT * soft_kl(student[kept], teacher[kept], temperature=SIMILARITY_TEMPERATURE)


def _similarity(head: nn.Module, output: NetworkOutput, count: int) -> Tensor:
    return rotation_similarity(head(output.pooled.float()), count)


def rotation_similarity(feature: Tensor, count: int) -> Tensor:
    """Compute the cosine of each rotated image with each image, in FP32.

    Args:
        feature: Features (4B, D), those of the B images first.
        count: B.

    Returns:
        (3B, B).
    """
    rows = F.normalize(feature.float(), dim=1)
    return rows[count:] @ rows[:count].T


def best_ranked(scores: Tensor, target: Tensor, *, ratio: float) -> Tensor:
    """Select the rows of a teacher's scores to learn from.

    Args:
        scores: (R, C).
        target: Correct classes (R,).
        ratio: Fraction of the wrong rows to keep, those that rank the correct class best.

    Returns:
        Indices of the rows that rank the correct class first, and of the kept wrong ones.
    """
    rank = (scores > scores.gather(1, target[:, None])).sum(1)
    wrong = int((rank > 0).sum())
    return rank.argsort(stable=True)[: len(rank) - wrong + int(wrong * ratio)]


def _head(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
