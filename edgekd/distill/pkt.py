"""Probabilistic knowledge transfer: similarities within a batch follow the teacher's (Passalis & Tefas 2018,
arXiv 1803.10837)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distill.base import DistillationLoss, TrainingBatch

EPSILON = 1e-7


def unit(vectors: Tensor) -> Tensor:
    """Scale each of (B, D) to length 1; a vector not longer than 1e-7 becomes 0 and has no gradient."""
    square = vectors.square().sum(1, keepdim=True)
    long = square > EPSILON**2
    return vectors * torch.where(long, square, 1.0).rsqrt() * long


def similarities(features: Tensor) -> Tensor:
    """Compute (cos + 1) / 2 between all samples of (B, D), each row divided by its sum, in FP32: (B, B)."""
    directions = unit(features.float())
    kernel = ((directions @ directions.T).clamp(-1, 1) + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute the mean over the B^2 entries of t log(t / s), in FP32, with s and t the `similarities`.

    Rows sum to 1, so this is the mean KL divergence of the rows divided by B: of two batches with alike relations, one
    twice as large gives about half the value. The usual weight of 30000 is for batches of 64.

    Args:
        student: Features (B, D_s).
        teacher: Features (B, D_t).
    """
    s, t = similarities(student), similarities(teacher)
    return (t * ((t + EPSILON) / (s + EPSILON)).log()).mean()


class ProbabilisticTransfer(DistillationLoss):
    """`similarity_loss` on the pooled features, weight 30000 as in RepDistiller (batch 64)."""

    weight = 30000.0
    needs = ("pooled",)
    needs_teacher = True

    def forward(self, batch: TrainingBatch) -> Tensor:
        return similarity_loss(*batch.pooled_pair())
