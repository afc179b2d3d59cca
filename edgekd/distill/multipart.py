"""Multi-part distillation: the student follows the teacher's path (Garg & Singh 2022; arXiv 1904.09149, RCO)."""

from __future__ import annotations

from edgekd.distill.base import Loss, Setting, Settings, method
from edgekd.distill.kd import kd


@method("multipart", weight=0.5, ce_weight=0.5, teacher=True, anchors=True)
def multipart(settings: Settings, setting: Setting) -> Loss:
    """(1 - w) * CE + w * tau^2 * KL with w = 0.5, where the teacher is the anchor of the epoch.

    Anchors are weights that the teacher kept every few epochs of its training (`anchor_every`). The loop puts anchor
    k into the teacher for as many epochs of the student, and leaves the last one in it thereafter.
    """
    return kd(settings, setting)
