"""The training loss: a weighted sum of distillation methods."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from edgekd.distill.base import (
    NO_TEACHER,
    ONE_EXIT,
    DistillationLoss,
    FeatureShapes,
    LossContext,
    Options,
    TrainingBatch,
)
from edgekd.distill.methods import METHODS, method_names
from edgekd.errors import ConfigError, nearest
from edgekd.schema import option_tables


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """Settings of the training loss, a part of a protocol.

    Attributes:
        method: Names of methods joined with `+`; cross-entropy is always included.
        temperature: Temperature tau of every softened softmax, except where a method has its own.
        loss_weights: Method name to its weight in the sum, in place of the method's default.
        label_smoothing: Label smoothing of every cross-entropy.
        student_points: Feature points (`edgekd models show NAME --features`) for methods that compare maps; the ends
            of the stages if empty.
        teacher_points: The same for the teacher.
        options: Options of single methods, each from the table of the method's name.
    """

    method: str = "ce"
    temperature: float = 3.0
    loss_weights: dict[str, float] = field(default_factory=dict)
    label_smoothing: float = 0.0
    student_points: tuple[str, ...] = ()
    teacher_points: tuple[str, ...] = ()
    options: dict[str, Options] = field(default_factory=dict, metadata=option_tables(METHODS))

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature: {self.temperature} is not above 0")
        for name, weight in self.loss_weights.items():
            if weight < 0:
                raise ValueError(f"loss_weights.{name}: {weight} is negative")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"label_smoothing: {self.label_smoothing} is not in 0..1")


class Criterion(nn.Module):
    """Weighted sum of the methods that `settings.method` names.

    Args:
        settings: The methods, their weights and options.
        student: Shapes of the student's features.
        teacher: Shapes of the teacher's features.
        labels: Labels of the training images, by index.

    Attributes:
        weights: Method name to its weight.
        losses: Method name to its loss.
        terms: Method name to its last weighted value.

    Raises:
        ConfigError: A weight for a method that is not part of the sum, or a method that compares exits with a student
            of one exit.
    """

    def __init__(
        self,
        settings: LossSettings,
        *,
        student: FeatureShapes = ONE_EXIT,
        teacher: FeatureShapes = NO_TEACHER,
        labels: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        context = LossContext(
            student=student,
            teacher=teacher,
            labels=labels,
            temperature=settings.temperature,
            label_smoothing=settings.label_smoothing,
        )
        self.weights = method_weights(settings)
        for name in self.weights:
            if METHODS[name].needs_exits and student.exits < 2:
                raise ConfigError(
                    f"method '{name}' compares exits, and the student has one",
                    fix="use a multi-exit student, or kd, which needs no exits",
                )
        self.losses: dict[str, DistillationLoss] = {}
        for name in self.weights:
            method = METHODS[name]
            self.losses[name] = method(settings.options.get(name, method.options()), context)
            self.add_module(name, self.losses[name])
        self.terms: dict[str, Tensor] = {}

    def expand(self, images: Tensor) -> Tensor:
        """Return the images to run both networks on: (B, 3, H, W), followed by those that methods add."""
        for loss in self.losses.values():
            images = loss.expand(images)
        return images

    def forward(self, batch: TrainingBatch) -> Tensor:
        """Return the weighted sum, a scalar in FP32; in an initial stage, of that stage's methods alone."""
        with torch.autocast(batch.target.device.type, enabled=False):  # products of features need FP32
            values = self._values(batch)
        self.terms = {name: value.detach() for name, value in values.items()}
        return sum(values.values(), start=torch.zeros((), device=batch.target.device))

    def _values(self, batch: TrainingBatch) -> dict[str, Tensor]:
        plain, count = batch, len(batch.target)
        if len(batch.student.outputs.logits[0]) > count:
            teacher = batch.teacher_output.first(count) if batch.teacher_output else None
            plain = dataclasses.replace(batch, student=batch.student.first(count), teacher_output=teacher)
        seen = {name: batch if loss.expands_batch else plain for name, loss in self.losses.items()}
        if initial := [name for name, loss in self.losses.items() if batch.epoch < loss.init_epochs]:
            return {name: self.weights[name] * self.losses[name].init_loss(seen[name]) for name in initial}
        return {name: self.weights[name] * loss(seen[name]) for name, loss in self.losses.items()}


def method_weights(settings: LossSettings) -> dict[str, float]:
    """Return each method's weight in the sum.

    Raises:
        ConfigError: An unknown method, or a weight for a method that is not part of the sum.
    """
    methods = {name: METHODS[name] for name in method_names(settings.method)}
    weights = {name: method.weight for name, method in methods.items()}
    if "ce" in weights:
        weights["ce"] = min(method.ce_weight for method in methods.values())
    if unknown := sorted(settings.loss_weights.keys() - weights.keys()):
        raise ConfigError(
            f"loss_weights.{unknown[0]}: method '{settings.method}' has no such part", fix=nearest(unknown[0], weights)
        )
    return weights | settings.loss_weights
