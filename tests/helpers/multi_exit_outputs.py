"""Outputs and batches for tests of losses."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from edgekd.distill.base import FeatureShapes, NetworkOutput, TrainingBatch
from edgekd.models.base import Outputs

THREE_EXITS = FeatureShapes(exits=3)


def outputs(batch: int = 6, *, exits: int = 3, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Outputs:
    """Exits with 5 classes and 8 features."""
    generator = torch.Generator().manual_seed(1)

    def tensor(width: int) -> Tensor:
        return (torch.randn(batch, width, generator=generator) * scale).to(dtype).requires_grad_()

    return Outputs(tuple(tensor(5) for _ in range(exits)), tuple(tensor(8) for _ in range(exits)), ())


def one_exit(logits: Tensor | int, *, pooled: Tensor | None = None, maps: tuple[Tensor, ...] = ()) -> NetworkOutput:
    """A network's output with one exit; a number stands for so many images with logits of 0 for 5 classes."""
    logits = torch.zeros(logits, 5, requires_grad=True) if isinstance(logits, int) else logits
    return NetworkOutput(Outputs((logits,), (), ()), maps, maps, pooled)


def training_batch(
    student: NetworkOutput | Outputs,
    teacher: NetworkOutput | None = None,
    *,
    target: Tensor | Sequence[int] | None = None,
    index: Sequence[int] | None = None,
    epoch: int = 0,
) -> TrainingBatch:
    """A batch of the first epoch; by default all images are of class 0, with indices from 0."""
    student = student if isinstance(student, NetworkOutput) else NetworkOutput(student)
    target = torch.zeros(len(student.outputs.logits[0])) if target is None else torch.as_tensor(target)
    indices = torch.arange(len(target)) if index is None else torch.tensor(index)
    return TrainingBatch(student, target.long(), indices, epoch, teacher)
