"""Everything that a training run is asked for, as one frozen table that is written into the run folder."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from edgekd.data.preprocess import Preprocess
from edgekd.distill.base import Settings
from edgekd.errors import ArtifactError
from edgekd.models.base import Stem
from edgekd.training.augment import Augment
from edgekd.training.precision import Precision

PLACES = ("source", "data", "workers")
"""Settings that may differ between a run and its continuation."""


@dataclass(frozen=True, kw_only=True)
class Protocol(Settings):
    """Settings of data, network, losses and optimiser; files under `training/protocols/`.

    data, teacher: where the images and the teacher's run folder are. stem: of networks that have a choice (see
    `models.build`); `auto` keeps that of the first weights, else imagenet. lr: the peak. schedule `step` multiplies by
    gamma at each milestone (epochs); `onecycle` rises over warmup_epochs and falls to zero along a cosine. precision:
    `auto` is left to `precision.choose`. ema: decay of the averaged weights, 0 for none. weights: `hub`, `none`, or a
    file. clip_norm: largest gradient norm, 0 for no clipping. sampler: `pxk` puts per_class images of each of
    batch_size / per_class classes into a batch. anchor_every: keep the weights every so many epochs for students that
    follow this network's path (method `multipart`); 0 for never.
    """

    source: str = ""
    data: str = ""
    teacher: str = ""
    network: str = ""
    stem: Literal["auto", Stem] = "auto"
    exits: tuple[int | str, ...] = (1, 2, 3, 4)
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
            raise ValueError("milestones: epochs from 0 on")
        if self.per_class < 2:
            raise ValueError(f"per_class: {self.per_class} is below 2, so that no two images of a class meet")
        if self.anchor_every > self.epochs:
            raise ValueError(f"anchor_every: {self.anchor_every} is above epochs, {self.epochs}, so none would be kept")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema: {self.ema} is not in 0..1")

    def lr_at(self, epoch: float) -> float:
        """Learning rate at a fractional epoch, counted from 0."""
        if epoch < self.warmup_epochs:
            return self.lr * (epoch + 1e-3) / self.warmup_epochs
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(epoch >= m for m in self.milestones)
        if self.schedule == "onecycle":
            done = (epoch - self.warmup_epochs) / max(self.epochs - self.warmup_epochs, 1e-9)
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(done, 1)))
        return self.lr


def refuse_other_settings(folder: Path, made: Protocol, asked: Protocol) -> None:
    """A run goes on as it was begun; what is now left to `auto` is as it was then.

    Raises:
        ArtifactError: other settings are asked for than `folder` was made with; they are named.
    """
    pairs = {f.name: (getattr(made, f.name), getattr(asked, f.name)) for f in fields(made) if f.name not in PLACES}
    other = [f"{k} {new!r}, not {old!r}" for k, (old, new) in pairs.items() if new not in (old, "auto")]
    if other:
        raise ArtifactError(
            f"{folder} was begun under other settings than now asked for: {'; '.join(other)}",
            fix="leave these out to go on with it as it is, or choose another --out",
        )
