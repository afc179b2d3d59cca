"""Multi-part distillation: the student follows the teacher's training (Garg & Singh 2022; RCO, arXiv 1904.09149)."""

from __future__ import annotations

from edgekd.distill.kd import KnowledgeDistillation


class MultiPartDistillation(KnowledgeDistillation):
    """(1 - w) * CE + w * tau^2 * KL with w = 0.5, where the teacher is the anchor of the epoch.

    Anchors are checkpoints that the teacher kept every few epochs of its training (`anchor_every`). The training loop
    loads anchor k into the teacher for as many epochs of the student, and the last anchor for all epochs after it.
    """

    weight = 0.5
    ce_weight = 0.5
    needs_anchors = True
