"""Base class of distillation methods, and the data passed to them: options, shapes, outputs and batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from edgekd.models.base import Outputs
from edgekd.models.feature_points import MapShape

Need: TypeAlias = Literal["stages", "preactivations", "pooled"]
"""Features that a method can request besides the outputs."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of one method; a method that has some subclasses this.

    A protocol's table with the method's name is read into it, for example `[hybrid]` into `HybridOptions`.
    """


@dataclass(frozen=True, kw_only=True)
class InitOptions(Options):
    """Options of a method with an initial stage.

    Attributes:
        init_epochs: Epochs, counted from the run's first, in which only the method's `init_loss` is trained.
    """

    init_epochs: int = 0

    def __post_init__(self) -> None:
        if self.init_epochs < 0:
            raise ValueError(f"init_epochs: {self.init_epochs} is negative")


@dataclass(frozen=True)
class FeatureShapes:
    """Shapes of a network's features, without the batch dimension.

    Attributes:
        stages: (D, H, W) at each feature point, shallow to deep; empty if no method needs them.
        preactivations: (D, H, W) in front of the last activation of each stage; empty if no method needs them.
        pooled: Width of the feature that the deepest classifier reads; 0 if no method needs it.
        exits: Number of exits; 0 for a missing teacher.
    """

    stages: tuple[MapShape, ...] = ()
    preactivations: tuple[MapShape, ...] = ()
    pooled: int = 0
    exits: int = 0


ONE_EXIT, NO_TEACHER = FeatureShapes(exits=1), FeatureShapes()


@dataclass(frozen=True, kw_only=True)
class LossContext:
    """Facts known before training, shared by all methods of a run.

    Attributes:
        student: Shapes of the student's features.
        teacher: Shapes of the teacher's features; without exits if the run has no teacher.
        labels: Labels of the training images, by index.
        temperature: Temperature tau of softened softmaxes.
        label_smoothing: Label smoothing of every cross-entropy.
    """

    student: FeatureShapes = ONE_EXIT
    teacher: FeatureShapes = NO_TEACHER
    labels: tuple[int, ...] = ()
    temperature: float = 3.0
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class NetworkOutput:
    """Outputs of one network for a batch of B images, with the features that the methods need.

    Attributes:
        outputs: Logits and pooled features of every exit.
        stages: Maps (B, D_k, H_k, W_k) at the feature points, shallow to deep.
        preactivations: Maps (B, D_k, H_k, W_k) in front of the last activation of each stage.
        pooled_feature: (B, D), the input of the deepest classifier; None if no method needs it.
    """

    outputs: Outputs
    stages: tuple[Tensor, ...] = ()
    preactivations: tuple[Tensor, ...] = ()
    pooled_feature: Tensor | None = None

    @property
    def pooled(self) -> Tensor:
        """The input (B, D) of the deepest classifier.

        Raises:
            TypeError: No method declared that it needs it.
        """
        if self.pooled_feature is None:
            raise TypeError("no pooled feature: the method has to declare `needs = ('pooled',)`")
        return self.pooled_feature

    def first(self, count: int) -> NetworkOutput:
        """Return the output for the first `count` images, without `outputs.maps`, which no method reads."""
        logits, features, stages, preactivations = (
            tuple(tensor[:count] for tensor in tensors)
            for tensors in (self.outputs.logits, self.outputs.features, self.stages, self.preactivations)
        )
        pooled = None if self.pooled_feature is None else self.pooled_feature[:count]
        return NetworkOutput(Outputs(logits, features, ()), stages, preactivations, pooled)


@dataclass(frozen=True)
class TrainingBatch:
    """One batch of B training images, after both networks ran on it.

    Attributes:
        student: The student's output.
        target: Labels (B,).
        index: Indices (B,) into the training subset.
        epoch: Epoch from 0.
        teacher_output: The frozen teacher's output; None if the run has no teacher.
    """

    student: NetworkOutput
    target: Tensor
    index: Tensor
    epoch: int = 0
    teacher_output: NetworkOutput | None = None

    @property
    def teacher(self) -> NetworkOutput:
        """The frozen teacher's output.

        Raises:
            TypeError: No method declared that it needs a teacher.
        """
        if self.teacher_output is None:
            raise TypeError("no teacher: the method has to declare `needs_teacher = True`")
        return self.teacher_output

    def pooled_pair(self) -> tuple[Tensor, Tensor]:
        """Return the student's and the teacher's pooled feature, (B, D_s) and (B, D_t)."""
        return self.student.pooled, self.teacher.pooled.detach()

    def stage_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return the student's and the teacher's map at each feature point."""
        return [(s, t.detach()) for s, t in zip(self.student.stages, self.teacher.stages)]

    def preactivation_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """Return the student's and the teacher's pre-activation of each stage."""
        return [(s, t.detach()) for s, t in zip(self.student.preactivations, self.teacher.preactivations)]


class DistillationLoss(nn.Module):
    """Base class of distillation methods: one term of the training loss.

    A new method is a subclass in a file of its own and a line in `edgekd.distill.methods.METHODS`; another package
    registers the class as an entry point in the group `edgekd.distillation_methods`. Parameters of the module are
    trained with the student's and saved in resume.pt, but are not part of the exported network.

    Attributes:
        options: Dataclass that the protocol's table of the method's name is read into.
        weight: Default weight of the method in the training loss, in both stages.
        ce_weight: Default weight of cross-entropy beside this method.
        has_ce: The method contains cross-entropy, so that `ce` is not added to it.
        needs: Features to collect from both networks.
        needs_teacher: The method reads `batch.teacher`.
        needs_exits: The method compares exits, so the student needs two or more.
        needs_anchors: The teacher of each epoch is an anchor, a checkpoint of its own training (`anchor_every`).
        expands_batch: `expand` adds images, and the method's batch contains their outputs.
        init_epochs: Epochs of the initial stage, in which `init_loss` is the whole training loss.
        context: Facts known before training.
    """

    options: ClassVar[type[Options]] = Options
    weight: ClassVar[float] = 1.0
    ce_weight: ClassVar[float] = 1.0
    has_ce: ClassVar[bool] = False
    needs: ClassVar[tuple[Need, ...]] = ()
    needs_teacher: ClassVar[bool] = False
    needs_exits: ClassVar[bool] = False
    needs_anchors: ClassVar[bool] = False
    expands_batch: ClassVar[bool] = False
    init_epochs: int = 0

    def __init__(self, options: Options, context: LossContext) -> None:
        super().__init__()
        self.context = context

    def expand(self, images: Tensor) -> Tensor:
        """Return the images to run both networks on.

        Args:
            images: (B, 3, H, W).

        Returns:
            (N, 3, H, W) with N >= B, the given images first; methods that do not expand the batch receive only those.
        """
        return images

    def init_loss(self, batch: TrainingBatch) -> Tensor:
        """Return the loss of the initial stage, a scalar before weighting."""
        raise NotImplementedError(f"{type(self).__name__} has init_epochs but no init_loss")

    def forward(self, batch: TrainingBatch) -> Tensor:
        """Return the loss of one batch, a scalar before weighting."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")


def no_loss(batch: TrainingBatch) -> Tensor:
    """Return the scalar 0 in FP32, for a method that is trained in its initial stage alone."""
    return batch.target.new_zeros((), dtype=torch.float32)
