"""Cross-entropy at every exit: the baseline without distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import DistillationLoss, LossContext, Options, TrainingBatch


def multi_exit_ce(
    logits: Sequence[Tensor], target: Tensor, *, label_smoothing: float = 0.0, literal: bool = False
) -> Tensor:
    """Compute the sum over exits of CE(S_m, y), each a batch mean, in FP32.

    Args:
        logits: (B, C) for each exit, shallow to deep.
        target: Labels (B,).
        label_smoothing: Probability that is spread evenly over the classes.
        literal: Add CE(S_n, y) of the deepest exit once more for each exit, as in the formula of Gao et al. 2022
            (Biomimetics 7:195), whose sum over m counts it n + 1 times.
    """
    each = [F.cross_entropy(s.float(), target, label_smoothing=label_smoothing) for s in logits]
    total = sum(each[1:], start=each[0])
    return total + len(each) * each[-1] if literal else total


@dataclass(frozen=True, kw_only=True)
class CrossEntropyOptions(Options):
    """Options of `ce`.

    Attributes:
        literal: See `multi_exit_ce`.
    """

    literal: bool = False


class CrossEntropy(DistillationLoss):
    """Cross-entropy at every exit; for an MSDNet, the joint training of its paper (arXiv 1703.09844)."""

    options = CrossEntropyOptions

    def __init__(self, options: CrossEntropyOptions, context: LossContext) -> None:
        super().__init__(options, context)
        self.literal = options.literal

    def forward(self, batch: TrainingBatch) -> Tensor:
        smoothing = self.context.label_smoothing
        return multi_exit_ce(
            batch.student.outputs.logits, batch.target, label_smoothing=smoothing, literal=self.literal
        )
