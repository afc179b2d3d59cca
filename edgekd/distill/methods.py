"""Distillation methods by name; several are combined with `+`, for example `kd+at`."""

from __future__ import annotations

from edgekd.distill.base import DistillationLoss, Need
from edgekd.errors import ConfigError
from edgekd.registry import Registry

METHODS: Registry[type[DistillationLoss]] = Registry(
    "distillation method",
    "distillation_methods",
    DistillationLoss,
    {
        "ce": "edgekd.distill.ce:CrossEntropy",
        "kd": "edgekd.distill.kd:KnowledgeDistillation",
        "sd": "edgekd.distill.sd:SelfDistillation",
        "byot": "edgekd.distill.byot:BeYourOwnTeacher",
        "scan": "edgekd.distill.scan:Scan",
        "fitnets": "edgekd.distill.fitnets:FitNets",
        "at": "edgekd.distill.at:AttentionTransfer",
        "vid": "edgekd.distill.vid:VariationalInformation",
        "ab": "edgekd.distill.ab:ActivationBoundaries",
        "rkd": "edgekd.distill.rkd:RelationalDistillation",
        "pkt": "edgekd.distill.pkt:ProbabilisticTransfer",
        "crd": "edgekd.distill.crd:ContrastiveDistillation",
        "sskd": "edgekd.distill.sskd:SelfSupervisedDistillation",
        "hybrid": "edgekd.distill.hybrid:HybridLoss",
        "multipart": "edgekd.distill.multipart:MultiPartDistillation",
    },
)
"""Name to the method's class."""


def method_names(text: str) -> list[str]:
    """Return the methods in an expression: `kd+sd` is `["ce", "kd", "sd"]`, without `ce` if a method contains it.

    Raises:
        ConfigError: An unknown or repeated name.
    """
    parts = text.split("+")
    if len(set(parts)) < len(parts):
        raise ConfigError(f"method '{text}' names one method twice", fix="name each once, for example kd+sd")
    if any(METHODS[part].has_ce for part in parts) and "ce" not in parts:
        return parts
    return ["ce", *(part for part in parts if part != "ce")]


def needs_teacher(text: str) -> bool:
    """Return True if a method in the expression learns from a teacher."""
    return any(METHODS[name].needs_teacher for name in method_names(text))


def needs_anchors(text: str) -> bool:
    """Return True if a method in the expression learns from anchors, checkpoints of the teacher's training."""
    return any(METHODS[name].needs_anchors for name in method_names(text))


def feature_needs(text: str) -> frozenset[Need]:
    """Return the features that the methods in the expression need."""
    return frozenset(need for name in method_names(text) for need in METHODS[name].needs)
