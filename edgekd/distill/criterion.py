"""The training criterion: a weighted sum of distillation losses."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from edgekd.distill.base import METHODS, Setting, Settings, Step, weights
from edgekd.errors import ConfigError


class Criterion(nn.Module):
    """The weighted sum of the methods that `settings.method` names; `terms` holds each one's last weighted value.

    Raises:
        ConfigError: a method that compares exits, and the student has one; a weight for no part of the method.
    """

    def __init__(self, settings: Settings, setting: Setting | None = None) -> None:
        super().__init__()
        setting = setting or Setting()
        self.weights = weights(settings)
        for name in self.weights:
            if METHODS[name].exits and setting.student.exits < 2:
                raise ConfigError(
                    f"method '{name}' compares exits, and the student has one",
                    fix="use a multi-exit student, or kd, which needs no exits",
                )
        self.losses = {name: METHODS[name].make(settings, setting) for name in self.weights}
        self.terms: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            if isinstance(loss, nn.Module):  # a method that owns parameters
                self.add_module(name, loss)
        asked = settings.init_epochs
        lengths = {n: int(loss.init_epochs) for n, loss in self.losses.items() if hasattr(loss, "init_epochs")}
        self.init_epochs = {n: asked if asked >= 0 else own for n, own in lengths.items()}

    def expand(self, images: Tensor) -> Tensor:
        """The images to run both networks on: (B, 3, H, W), and whatever a method adds behind them."""
        for loss in self.losses.values():
            if hasattr(loss, "expand"):
                images = loss.expand(images)
        return images

    def forward(self, step: Step) -> Tensor:
        with torch.autocast(step.target.device.type, enabled=False):  # products of features need FP32
            values = self._values(step)
        self.terms = {name: value.detach() for name, value in values.items()}
        return sum(values.values(), start=torch.zeros((), device=step.target.device))

    def _values(self, step: Step) -> dict[str, Tensor]:
        plain, batch = step, len(step.target)
        if len(step.student.out.logits[0]) > batch:
            teacher = step.teacher.first(batch) if step.teacher else None
            plain = dataclasses.replace(step, student=step.student.first(batch), teacher=teacher)
        views = {n: step if hasattr(loss, "expand") else plain for n, loss in self.losses.items()}
        if first := [n for n, epochs in self.init_epochs.items() if step.epoch < epochs]:
            return {n: self.losses[n].init(views[n]) for n in first}  # type: ignore[attr-defined]
        return {n: self.weights[n] * loss(views[n]) for n, loss in self.losses.items()}
