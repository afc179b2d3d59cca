"""Hybrid loss: cross-entropy and triplets (Chen et al. 2022, Sensors 22:3272; mining as in arXiv 1703.07737)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from edgekd.distill.base import DistillationLoss, LossContext, Options, TrainingBatch


@dataclass(frozen=True, kw_only=True)
class HybridOptions(Options):
    """Options of `hybrid`.

    Attributes:
        mining: `all` triplets of a batch, or the `hard`est of each anchor.
        margin: Margin of the triplet loss.
        squared: Use squared distances.
    """

    mining: Literal["all", "hard"] = "all"
    margin: float = 1.0
    squared: bool = True

    def __post_init__(self) -> None:
        if self.margin < 0:
            raise ValueError(f"margin: {self.margin} is negative")


class HybridLoss(DistillationLoss):
    """Triplet loss on the deepest pooled feature, which is not normalised; cross-entropy is `ce`'s."""

    options = HybridOptions
    needs = ("pooled",)

    def __init__(self, options: HybridOptions, context: LossContext) -> None:
        super().__init__(options, context)
        self.margin, self.squared = options.margin, options.squared
        self.mine = batch_all if options.mining == "all" else batch_hard

    def forward(self, batch: TrainingBatch) -> Tensor:
        apart = distances(batch.student.pooled, squared=self.squared)
        return self.mine(apart, batch.target, margin=self.margin)


def distances(feature: Tensor, *, squared: bool) -> Tensor:
    """Compute Euclidean distances (B, B) of rows (B, D), in FP32; the gradient between equal rows is 0."""
    rows = feature.float()
    apart = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.square() if squared else apart


def batch_all(apart: Tensor, target: Tensor, *, margin: float) -> Tensor:
    """Compute the mean of max(0, margin + d(a, p) - d(a, n)) over the triplets in which it is positive; 0 if none is.

    Args:
        apart: Distances d (B, B).
        target: Labels (B,); a and p are different images of one class, n is of another.
        margin: Margin.
    """
    anchor, positive = _positives(target).nonzero(as_tuple=True)
    other = target[anchor, None] != target
    cost = (margin + apart[anchor, positive, None] - apart[anchor])[other].relu()
    return cost.sum() / (cost > 0).sum().clamp(min=1)


def batch_hard(apart: Tensor, target: Tensor, *, margin: float) -> Tensor:
    """Compute the mean over anchors of max(0, margin + d(a, farthest p) - d(a, nearest n)).

    An anchor without another image of its class, or of any other class, is excluded; 0 if none remains.

    Args:
        apart: Distances d (B, B).
        target: Labels (B,).
        margin: Margin.
    """
    positive, negative = _positives(target), target[:, None] != target
    farthest = apart.masked_fill(~positive, -torch.inf).amax(1)
    nearest = apart.masked_fill(~negative, torch.inf).amin(1)
    usable = positive.any(1) & negative.any(1)
    cost = (margin + farthest[usable] - nearest[usable]).relu()
    return cost.sum() / usable.sum().clamp(min=1)


def _positives(target: Tensor) -> Tensor:
    """Return a mask (B, B) of pairs of different images of one class."""
    same = target[:, None] == target
    return same & ~torch.eye(len(target), dtype=torch.bool, device=target.device)
