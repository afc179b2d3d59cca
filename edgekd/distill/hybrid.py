"""Hybrid loss: cross-entropy and triplets (Chen et al. 2022, Sensors 22:3272; mining as in arXiv 1703.07737)."""

from __future__ import annotations

import torch
from torch import Tensor

from edgekd.distill.base import Loss, Setting, Settings, Step, method


def distances(feature: Tensor, *, squared: bool) -> Tensor:
    """(B, B) Euclidean distances of the rows (B, D), in FP32. Their gradient between equal rows is 0."""
    rows = feature.float()
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.square() if squared else apart


def batch_all(apart: Tensor, target: Tensor, *, margin: float) -> Tensor:
    """Mean of max(0, margin + d(a, p) - d(a, n)) over the triplets in which it is positive; 0 if there are none.

    apart: (B, B) distances d; target: (B,). a and p are different images of one class, n is of another.
    """
    anchor, positive = _pairs(target).nonzero(as_tuple=True)
    other = target[anchor, None] != target
    cost = (margin + apart[anchor, positive, None] - apart[anchor])[other].relu()
    return cost.sum() / (cost > 0).sum().clamp(min=1)


def batch_hard(apart: Tensor, target: Tensor, *, margin: float) -> Tensor:
    """Mean over anchors of max(0, margin + d(a, farthest p) - d(a, nearest n)), as in `batch_all`.

    An anchor without another image of its class, or of any other, is left out; 0 if that leaves none.
    """
    positive, negative = _pairs(target), target[:, None] != target
    farthest = apart.masked_fill(~positive, -torch.inf).amax(1)
    nearest = apart.masked_fill(~negative, torch.inf).amin(1)
    usable = positive.any(1) & negative.any(1)
    cost = (margin + farthest[usable] - nearest[usable]).relu()
    return cost.sum() / usable.sum().clamp(min=1)


def _pairs(target: Tensor) -> Tensor:
    """(B, B): whether two images are of one class, and not the same image."""
    same = target[:, None] == target
    return same & ~torch.eye(len(target), dtype=torch.bool, device=target.device)


@method("hybrid", needs=("pooled",))
def hybrid(settings: Settings, setting: Setting) -> Loss:
    """The triplet term on the deepest pooled feature, not normalised; `label_smoothing` is cross-entropy's."""
    mine = batch_all if settings.triplet.mining == "all" else batch_hard

    def loss(step: Step) -> Tensor:
        assert step.student.pooled is not None
        apart = distances(step.student.pooled, squared=settings.triplet.squared)
        return mine(apart, step.target, margin=settings.triplet.margin)

    return loss
