"""Relational distillation: distances and angles within a batch follow the teacher's (Park et al. 2019,
arXiv 1904.05068).

Computed in FP64, since close samples give small differences of large numbers, and returned in FP32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgekd.distill.base import DistillationLoss, TrainingBatch

DISTANCE_WEIGHT, ANGLE_WEIGHT = 25.0, 50.0
MIN_MEAN = 1e-6
MIN_DISTANCE = 1e-4
"""Fraction of the mean distance below which two samples have no direction: its gradient would explode."""
CHUNK = 1 << 21
"""Maximum number of cosines of one network in memory at a time (16 MiB), unless one anchor has more."""


class RelationalDistillation(DistillationLoss):
    """`relation_loss` on the pooled features, weight 1 as in RepDistiller."""

    needs = ("pooled",)
    needs_teacher = True

    def forward(self, batch: TrainingBatch) -> Tensor:
        return relation_loss(*batch.pooled_pair())


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute 25 `distance_loss` + 50 `angle_loss` on features (B, D_s) and (B, D_t)."""
    return DISTANCE_WEIGHT * distance_loss(student, teacher) + ANGLE_WEIGHT * angle_loss(student, teacher)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute smooth L1 between distances relative to each network's mean distance; mean over all B^2 pairs."""
    (s, s_mean), (t, t_mean) = distances(student), distances(teacher)
    return F.smooth_l1_loss(s / s_mean, t / t_mean).float()


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Compute smooth L1 between the cosines of the angles at i from j to k; mean over all B^3 triples (i, j, k).

    The cosines are held for `CHUNK // B^2` anchors i at a time, or one, and recomputed in the backward pass. The peak
    is about seven arrays of 16 MiB (or of 8 B^2 bytes, if that is more) in place of 8 B^3 bytes.
    """
    batch, networks = len(student), (_products(student), _products(teacher))
    rows = max(1, CHUNK // batch**2)

    def chunk(start: int) -> Tensor:
        s, t = (_cosines(*products, start, start + rows) for products in networks)
        return F.huber_loss(s, t, reduction="sum")  # smooth_l1_loss would hold one of them until the backward pass

    starts = range(0, batch, rows)
    sums = [checkpoint(chunk, start, use_reentrant=False, preserve_rng_state=False) for start in starts]
    return (torch.stack(sums).sum() / batch**3).float()


def _products(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, B) each: scalar products about the features' mean, and inverse distances, 0 below `MIN_DISTANCE`."""
    each, mean = distances(features)
    centred = features.double() - features.double().mean(0)
    return centred @ centred.T, torch.where(each > MIN_DISTANCE * mean, each, math.inf).reciprocal()


def _cosines(products: Tensor, closeness: Tensor, start: int, stop: int) -> Tensor:
    """Return (A, B, B) for the A anchors from start to stop: <j - i, k - i> over both lengths."""
    at, near, own = products[start:stop], closeness[start:stop], products.diagonal()[start:stop]
    scalar = products - at[:, :, None] - at[:, None, :] + own[:, None, None]
    return scalar * near[:, :, None] * near[:, None, :]


def distances(features: Tensor) -> tuple[Tensor, Tensor]:
    """Compute distances (B, B) between features (B, D), and the mean of those above 0 (at least 1e-6), in FP64."""
    features = features.double()
    each = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    return each, (each.sum() / (each > 0).sum().clamp(min=1)).clamp(min=MIN_MEAN)
