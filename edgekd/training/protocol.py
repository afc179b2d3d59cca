"""Protocol: all settings of a training run, as one frozen table that is written into the run folder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgekd.data.preprocess import Preprocess
from edgekd.distill.criterion import LossSettings
from edgekd.errors import ArtifactError
from edgekd.models.base import FOUR_STAGES, ExitPoint, Stem
from edgekd.schema import to_table
from edgekd.training.augment import Augment
from edgekd.training.precision import Precision

RESUMABLE = ("source", "data", "workers")
"""Settings that may differ between a run and its continuation."""


@dataclass(frozen=True, kw_only=True)
class Protocol(LossSettings):
    """Settings of data, network, loss and optimiser; shipped ones are in `training/protocols/`.

    The settings of the loss are those of `LossSettings`.

    Attributes:
        source: Name of the protocol that the settings come from.
        data: Folder of the images.
        teacher: Run folder of the teacher; empty for none.
        network: Name of the network (see `edgekd.models.networks.build`).
        stem: First layers, of networks that have a choice; `auto` takes those of the initial weights, else imagenet.
        exits: Exits of a multi-exit network (see `edgekd.models.networks.build`).
        weights: Initial weights: `hub`, `none`, or a file or run folder.
        preprocess: Preprocessing of the images.
        augment: Augmentation of the training images.
        split: Method of the split (`ratio:3,1,1`, `ratio:3,1,1,1`, `kfold:5`), or a split.json.
        fold: Fold of a k-fold split.
        group: Grouping of images that must not be separated by the split.
        seed: Seed of initial weights, order and augmentation.
        epochs: Epochs of the run.
        batch_size: Images in a batch, per process.
        sampler: Order of the training images; `pxk` puts per_class images of each of batch_size / per_class classes
            into a batch.
        per_class: Images of a class in a batch of the sampler `pxk`.
        optimizer: Optimiser.
        lr: Peak learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        schedule: `step` multiplies the learning rate by gamma at each milestone; `onecycle` rises over warmup_epochs
            and falls to zero along a cosine.
        milestones: Epochs of the schedule `step`.
        gamma: Factor of the schedule `step`.
        warmup_epochs: Epochs over which the learning rate rises from zero.
        precision: Arithmetic of a training step; `auto` is decided by `precision.choose`.
        clip_norm: Maximum gradient norm; 0 for no clipping.
        ema: Decay of the exponential moving average of the weights; 0 for none.
        anchor_every: Epochs between checkpoints that are kept for students trained with `multipart`; 0 for none.
        workers: Processes that read images.
    """

    source: str = ""
    data: str = ""
    teacher: str = ""
    network: str = ""
    stem: Literal["auto", Stem] = "auto"
    exits: tuple[ExitPoint, ...] = FOUR_STAGES
    weights: str = "hub"
    preprocess: Preprocess = field(default_factory=lambda: Preprocess(224))
    augment: Augment = field(default_factory=Augment)
    split: str = "ratio:3,1,1"
    fold: int = 0
    group: str = "none"
    seed: int = 0
    epochs: int = 180
    batch_size: int = 128
    sampler: Literal["shuffle", "pxk"] = "shuffle"
    per_class: int = 4
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4
    schedule: Literal["step", "onecycle", "constant"] = "step"
    milestones: tuple[int, ...] = (100, 150)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    precision: Literal["auto", Precision] = "auto"
    clip_norm: float = 0.0
    ema: float = 0.0
    anchor_every: int = 0
    workers: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("epochs", "batch_size", "lr"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}: {getattr(self, key)} is not above 0")
        counts = ("clip_norm", "warmup_epochs", "anchor_every", "workers", "seed", "fold")
        for key in ("momentum", "weight_decay", "gamma", *counts):
            if getattr(self, key) < 0:
                raise ValueError(f"{key}: {getattr(self, key)} is negative")
        if min(self.milestones, default=0) < 0:
            raise ValueError("milestones: epochs from 0")
        if self.per_class < 2:
            raise ValueError(f"per_class: {self.per_class} is below 2, so that no batch has two images of a class")
        if self.anchor_every > self.epochs:
            raise ValueError(
                f"anchor_every: {self.anchor_every} is above epochs, {self.epochs}, so none would be saved"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: {self.ema} is not in 0..1")

    def lr_at(self, epoch: float) -> float:
        """Return the learning rate at a fractional epoch, counted from 0."""
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1e-3) / self.warmup_epochs
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        if self.schedule == "onecycle":
            done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
        return self.lr


def refuse_other_settings(folder: Path, made: Protocol, requested: Protocol) -> None:
    """Refuse to continue a run with other settings; `auto` matches the value it was resolved to.

    Args:
        folder: The run folder, for the error.
        made: Settings that the run was started with.
        requested: Settings to continue it with.

    Raises:
        ArtifactError: Settings differ; they are named.
    """
    old, new = to_table(made), to_table(requested)
    other = [
        f"{key} {new.get(key)!r}, not {old.get(key)!r}"
        for key in dict.fromkeys([*new, *old])
        if key not in RESUMABLE and new.get(key) not in (old.get(key), "auto")
    ]
    if other:
        raise ArtifactError(
            f"{folder} was started with other settings than now requested: {'; '.join(other)}",
            fix="omit these to continue with the run's settings, or choose another --out",
        )
