"""Probabilistic knowledge transfer: who is whose neighbour in a batch, as the teacher sees it (Passalis & Tefas 2018,
arXiv 1803.10837)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distill.base import Loss, Setting, Settings, Step, method

EPSILON = 1e-7


def unit(vectors: Tensor) -> Tensor:
    """(B, D), each scaled to length 1; one not longer than 1e-7 becomes 0 and gets no gradient."""
    square = vectors.square().sum(1, keepdim=True)
    long = square > EPSILON**2
    return vectors * torch.where(long, square, 1.0).rsqrt() * long


def neighbours(features: Tensor) -> Tensor:
    """(cos + 1) / 2 between all samples of (B, D), itself included, each row divided by its sum, in FP32: (B, B)."""
    directions = unit(features.float())
    kernel = ((directions @ directions.T).clamp(-1, 1) + 1) / 2
    return kernel / kernel.sum(1, keepdim=True)


def neighbour_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the B^2 entries of t log(t / s), s and t the `neighbours` of features (B, D); in FP32.

    Rows sum to 1, so this is the KL divergence's mean over rows divided by B: of two batches with alike
    relations, one twice as large gives about half the value, and the usual weight of 30000 is one for batches of 64.
    """
    s, t = neighbours(student), neighbours(teacher)
    return (t * ((t + EPSILON) / (s + EPSILON)).log()).mean()


@method("pkt", weight=30000.0, teacher=True, needs=("pooled",))
def pkt(settings: Settings, setting: Setting) -> Loss:
    """`neighbour_loss` on the pooled features, weight 30000 as in RepDistiller (batch 64)."""

    def loss(step: Step) -> Tensor:
        return neighbour_loss(*step.pooled())

    return loss
