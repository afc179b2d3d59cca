"""Cross-entropy at every exit: the baseline without distillation."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from edgekd.distill.base import Loss, Setting, Settings, method


def multi_exit_ce(
    logits: Sequence[Tensor], target: Tensor, *, label_smoothing: float = 0.0, literal: bool = False
) -> Tensor:
    """Sum over exits of CE(S_m, y), each a batch mean, in FP32.

    logits: (B, C) an exit; target: (B,). literal: CE(S_n, y) once more for each exit, as in the formula
    of Gao et al. 2022 (Biomimetics 7:195), whose sum over m counts the deepest exit n + 1 times.
    """
    each = [F.cross_entropy(s.float(), target, label_smoothing=label_smoothing) for s in logits]
    total = sum(each[1:], start=each[0])
    return total + len(each) * each[-1] if literal else total


@method("ce")
def ce(settings: Settings, setting: Setting) -> Loss:
    """Cross-entropy at every exit; on an MSDNet it is that paper's joint training (arXiv 1703.09844)."""
    return lambda step: multi_exit_ce(
        step.student.out.logits, step.target, label_smoothing=settings.label_smoothing, literal=settings.literal_ce
    )
