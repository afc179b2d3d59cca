"""Relational distillation: distances and angles between a batch's features, as the teacher sees them (Park et al. 2019,
arXiv 1904.05068).

Computed in FP64, since near samples leave small differences of large numbers, and returned in FP32.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from edgekd.distill.base import Loss, Setting, Settings, Step, method

DISTANCE_WEIGHT, ANGLE_WEIGHT = 25.0, 50.0
LEAST_MEAN = 1e-6
TOO_CLOSE = 1e-4
"""Two samples nearer than this part of the mean distance have no direction: its gradient would explode."""
CHUNK = 1 << 21
"""Cosines of one network that are held at a time (16 MiB), unless one anchor has more."""


def distances(features: Tensor) -> tuple[Tensor, Tensor]:
    """Euclidean distances (B, B) between features (B, D), and the mean of those above 0 (at least 1e-6), in FP64."""
    features = features.double()
    each = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    return each, (each.sum() / (each > 0).sum().clamp(min=1)).clamp(min=LEAST_MEAN)


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth-L1 between the distances, each over its network's mean distance; mean over all B^2 pairs."""
    (s, s_mean), (t, t_mean) = distances(student), distances(teacher)
    return F.smooth_l1_loss(s / s_mean, t / t_mean).float()


def angle_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Smooth-L1 between the cosines of the angles at i from j to k; mean over all B^3 triples (i, j, k).

    The cosines exist for `CHUNK // B^2` anchors i at a time, or one, and are computed again in the backward pass. At
    the peak that is about seven arrays of 16 MiB (or of 8 B^2 bytes, if that is more), not of 8 B^3 bytes.
    """
    batch, networks = len(student), (_products(student), _products(teacher))
    rows = max(1, CHUNK // batch**2)

    def part(start: int) -> Tensor:
        s, t = (_cosines(*products, start, start + rows) for products in networks)
        return F.huber_loss(s, t, reduction="sum")  # smooth_l1_loss would hold one of them until the backward pass

    starts = range(0, batch, rows)
    sums = [checkpoint(part, start, use_reentrant=False, preserve_rng_state=False) for start in starts]
    return (torch.stack(sums).sum() / batch**3).float()


def _products(features: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) each: scalar products about the features' centre, and one over the distances, 0 where `TOO_CLOSE`."""
    each, mean = distances(features)
    centred = features.double() - features.double().mean(0)
    return centred @ centred.T, torch.where(each > TOO_CLOSE * mean, each, math.inf).reciprocal()


def _cosines(products: Tensor, closeness: Tensor, start: int, stop: int) -> Tensor:
    """(A, B, B) for the A anchors from start to stop: <j - i, k - i> over both lengths."""
    at, near, own = products[start:stop], closeness[start:stop], products.diagonal()[start:stop]
    scalar = products - at[:, :, None] - at[:, None, :] + own[:, None, None]
    return scalar * near[:, :, None] * near[:, None, :]


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """25 `distance_loss` + 50 `angle_loss` on features (B, D)."""
    return DISTANCE_WEIGHT * distance_loss(student, teacher) + ANGLE_WEIGHT * angle_loss(student, teacher)


@method("rkd", teacher=True, needs=("pooled",))
def rkd(settings: Settings, setting: Setting) -> Loss:
    """`relation_loss` on the pooled features, weight 1 as in RepDistiller."""

    def loss(step: Step) -> Tensor:
        return relation_loss(*step.pooled())

    return loss
