"""The training loop, on Lightning Fabric, for teachers and students."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import resource
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchmetrics.classification import MulticlassAccuracy

from edgekd.distill.base import NO_TEACHER, TrainingBatch
from edgekd.distill.criterion import Criterion
from edgekd.distill.feature_taps import FeatureTaps, tap_features
from edgekd.distill.methods import feature_needs
from edgekd.errors import ArtifactError, ConfigError, TrainingError
from edgekd.models.base import MultiExitNetwork, Outputs
from edgekd.models.weights import read_state
from edgekd.serialization import to_json
from edgekd.training.loader import Loader
from edgekd.training.protocol import Protocol
from edgekd.training.run_folder import (
    MODEL,
    RESUME,
    Anchors,
    RunMetadata,
    anchor,
    load_resume,
    save_model,
    save_resume,
    write_metrics,
)

log = logging.getLogger(__name__)

TrainingProgress: TypeAlias = Callable[[int, int, float], None]
"""Callback after each batch: the number of batches done, their total over all epochs, and the loss."""
Metrics: TypeAlias = dict[str, float]
"""One epoch's metrics by name."""


@dataclass
class Task:
    """Networks, data and settings of a training run.

    The feature taps and the criterion are made with the task, so that settings which do not fit the networks are
    refused before training.

    Attributes:
        network: The network to train.
        train: Batches of training images.
        val: Batches of validation images.
        protocol: Settings.
        metadata: Metadata of the trained network.
        names: Names of the training images, by index.
        labels: Labels of the training images, by index.
        teacher: The teacher, which is frozen and put into eval mode.
        anchors: The teacher's anchors; if given, each epoch first loads that epoch's anchor into the teacher.
        student_taps: Runs the network and collects its features.
        teacher_taps: The same for the teacher.
        criterion: The training loss.

    Raises:
        ConfigError: Method, feature points and networks do not fit together.
    """

    network: MultiExitNetwork
    train: Loader
    val: Loader
    protocol: Protocol
    metadata: RunMetadata
    names: list[str]
    labels: tuple[int, ...]
    teacher: MultiExitNetwork | None = None
    anchors: Anchors | None = None
    student_taps: FeatureTaps = field(init=False)
    teacher_taps: FeatureTaps | None = field(init=False, default=None)
    criterion: Criterion = field(init=False)

    def __post_init__(self) -> None:
        protocol, size, needs = self.protocol, self.protocol.preprocess.image_size, feature_needs(self.protocol.method)
        self.student_taps = tap_features(self.network, needs, protocol.student_points, image_size=size)
        if self.teacher is not None:
            teacher = freeze(self.teacher)
            self.teacher_taps = tap_features(teacher, needs, protocol.teacher_points, image_size=size)
            _check_points(self.student_taps, self.teacher_taps)
        teacher_shapes = self.teacher_taps.shapes if self.teacher_taps else NO_TEACHER
        self.criterion = Criterion(
            protocol, student=self.student_taps.shapes, teacher=teacher_shapes, labels=self.labels
        )
        for name, loss in self.criterion.losses.items():
            if loss.init_epochs >= protocol.epochs:
                raise ConfigError(
                    f"method '{name}' needs {loss.init_epochs} epochs for its initial stage, "
                    f"and the run has {protocol.epochs}",
                    fix=f"give more --epochs, or shorten that stage with --set {name}.init_epochs=…",
                )


def freeze(teacher: MultiExitNetwork) -> MultiExitNetwork:
    """Put a teacher permanently into eval mode without gradients: a later `.train()` has no effect."""
    teacher.eval().requires_grad_(False)
    teacher.train = lambda mode=True: teacher  # type: ignore[method-assign]
    return teacher


def _check_points(student: FeatureTaps, teacher: FeatureTaps) -> None:
    own, others = student.stages or student.preactivations, teacher.stages or teacher.preactivations
    if len(own) != len(others):
        raise ConfigError(
            f"the student has the feature points {', '.join(own)}, the teacher {', '.join(others)}: not as many",
            fix="name as many with --set student_points=[…] and --set teacher_points=[…]",
        )


def fit(
    fabric: Fabric, task: Task, *, out: Path, resume: bool = False, progress: TrainingProgress | None = None
) -> list[Metrics]:
    """Train, and write the run folder after every epoch.

    model.safetensors has the weights of the epoch with the best validation accuracy of the ensemble, the later one if
    two are equal; averaged weights, if the protocol's `ema` is on. Anchors are kept every `anchor_every` epochs. On a
    CPU, a run that was killed and resumed ends with the same bits: every epoch is seeded anew, and augmentation is a
    function of seed, epoch and image alone.

    Args:
        fabric: Processes and devices.
        task: Networks, data and settings.
        out: The run folder.
        resume: Continue from resume.pt, if there is one.
        progress: Called after each batch.

    Returns:
        One row of metrics for each epoch.

    Raises:
        TrainingError: The loss is not finite; the batch's files are named.
        ArtifactError: resume.pt is damaged or belongs to other settings.
    """
    protocol, session = task.protocol, _start_session(fabric, task)
    digest = hashlib.sha256(
        to_json(dataclasses.replace(protocol, source="", data="", teacher="", workers=0))
    ).hexdigest()
    state = (load_resume(out, digest=digest) if resume else None) or {"epoch": 0, "history": [], "best": -1.0}
    _restore(session, state, out)
    history: list[Metrics] = state["history"]
    best: float = state["best"]
    board = _open_tensorboard(out, history) if fabric.is_global_zero else None
    for epoch in range(state["epoch"], protocol.epochs):
        torch.manual_seed(protocol.seed * 100_003 + epoch * 101 + fabric.global_rank)
        if task.teacher is not None and task.anchors is not None:
            task.teacher.load_state_dict(read_state(task.anchors.at(epoch)))
        row = {"epoch": epoch + 1.0} | _train_epoch(session, epoch, progress)
        row |= validate(fabric, session.kept, task.val, len(task.metadata.classes))
        history.append(row | {"rss_mib": _rss_mib()})
        if fabric.is_global_zero:
            if row["val_ensemble"] >= best:
                save_model(out / MODEL, session.kept, task.metadata)
            if protocol.anchor_every and (epoch + 1) % protocol.anchor_every == 0:
                save_model(anchor(out, epoch + 1), session.kept, task.metadata)
            best = max(best, row["val_ensemble"])
            write_metrics(out, history)
            log.info(_summary(history[-1], protocol.epochs))
            _write_tensorboard(board, history[-1])
            saved = {name: part.state_dict() for name, part in session.stateful().items()}
            save_resume(out, saved | {"epoch": epoch + 1, "history": history, "best": best, "digest": digest})
        fabric.barrier()
    return history


def _restore(session: _Session, state: Mapping[str, Any], out: Path) -> None:
    """Load the states of resume.pt; before the first epoch there are none."""
    try:
        for name, part in session.stateful().items():
            if name in state:
                part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        what = f"{out / RESUME} does not fit these networks: {' '.join(str(error).split())[:200]}"
        raise ArtifactError(what, fix="resume with the version of edgekd that wrote it, or train again") from None


@dataclass
class _Session:
    """A task on its device.

    Attributes:
        fabric: Processes and devices.
        task: Networks, data and settings.
        model: The network, wrapped by Fabric.
        criterion: The training loss.
        optimizer: The optimiser, wrapped by Fabric.
        ema: The averaged weights, if the protocol has them.
    """

    fabric: Fabric
    task: Task
    model: Any
    criterion: Criterion
    optimizer: Any
    ema: AveragedModel | None

    @property
    def kept(self) -> nn.Module:
        """The network that is validated and saved: the averaged one, if there is one."""
        return self.ema.module if self.ema else self.task.network

    def stateful(self) -> dict[str, Any]:
        """Return everything whose state is saved in resume.pt, by its name there."""
        parts = {"network": self.task.network, "criterion": self.criterion, "optimizer": self.optimizer}
        return parts | ({"ema": self.ema} if self.ema else {})


def _start_session(fabric: Fabric, task: Task) -> _Session:
    """Move a task to its device, and make its optimiser and averaged weights."""
    network = task.network.to(memory_format=torch.channels_last)
    criterion = task.criterion.to(fabric.device)
    parameters = (p for module in (network, criterion) for p in module.parameters())
    model, wrapped_optimizer = fabric.setup(network, optimizer(parameters, task.protocol))
    if task.teacher is not None:
        fabric.to_device(task.teacher).to(memory_format=torch.channels_last)  # in place
    ema = None
    if decay := task.protocol.ema:
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        ema = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    return _Session(fabric, task, model, criterion, wrapped_optimizer, ema)


def optimizer(parameters: Iterator[nn.Parameter], protocol: Protocol) -> torch.optim.Optimizer:
    """Return the protocol's optimiser over `parameters`."""
    lr, decay = protocol.lr, protocol.weight_decay
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=protocol.momentum, weight_decay=decay)
    adam = torch.optim.AdamW if protocol.optimizer == "adamw" else torch.optim.Adam
    return adam(parameters, lr=lr, weight_decay=decay)


def _train_epoch(session: _Session, epoch: int, progress: TrainingProgress | None) -> Metrics:
    """Train for one epoch.

    Returns:
        Mean loss and its terms, learning rate, images per second, and the fraction of time spent waiting for data.
    """
    task, protocol, loader = session.task, session.task.protocol, session.task.train
    session.model.train()
    sums: dict[str, Tensor] = {}
    seen, waited, steps, started = 0, 0.0, len(loader), time.perf_counter()
    loader.set_epoch(epoch)
    batches = iter(loader)
    for step in range(steps):
        requested = time.perf_counter()
        images, target, index = session.fabric.to_device(next(batches))
        waited += time.perf_counter() - requested
        for group in session.optimizer.param_groups:
            group["lr"] = protocol.lr_at(epoch + step / steps)
        loss = _train_step(session, images.contiguous(memory_format=torch.channels_last), target, index, epoch)
        if not torch.isfinite(loss):
            raise _not_finite(task, index, epoch, step)
        for name, value in {"loss": loss, **{f"loss_{k}": v for k, v in session.criterion.terms.items()}}.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
        seen += len(images)
        if progress:
            progress(epoch * steps + step + 1, protocol.epochs * steps, float(loss))
    seconds = time.perf_counter() - started
    speed = {"images_per_s": seen * session.fabric.world_size / seconds, "data_wait": waited / seconds}
    return {k: float(v) / steps for k, v in sums.items()} | {"lr": protocol.lr_at(epoch + 1 - 1 / steps)} | speed


def _train_step(session: _Session, images: Tensor, target: Tensor, index: Tensor, epoch: int) -> Tensor:
    """Run forward, backward and update on one batch.

    Values that are not finite change nothing, except in FP16, whose scaled gradients may overflow: there the step is
    skipped.

    Returns:
        The loss; NaN if a gradient is not finite.
    """
    task, images, teacher = session.task, session.criterion.expand(images), None
    if task.teacher_taps is not None:
        with torch.no_grad(), session.fabric.autocast():
            teacher = task.teacher_taps(images)
    student = task.student_taps(images, call=session.model)
    loss: Tensor = session.criterion(TrainingBatch(student, target, index, epoch, teacher))
    if session.fabric.world_size > 1:  # DDP waits for a gradient of every layer, and an initial stage omits some
        loss = loss + 0 * sum(s.sum() for s in student.outputs.logits)
    if torch.isfinite(loss):
        session.optimizer.zero_grad(set_to_none=True)
        session.fabric.backward(loss)
        _average_gradients(session)
        if limit := task.protocol.clip_norm:
            norm = session.fabric.clip_gradients(
                session.model, session.optimizer, max_norm=limit, error_if_nonfinite=False
            )
            if task.protocol.precision != "16-mixed" and norm is not None and not torch.isfinite(norm):
                return loss.detach() * torch.nan
        session.optimizer.step()
        if session.ema is not None:
            session.ema.update_parameters(task.network)
    return loss.detach()


def _average_gradients(session: _Session) -> None:
    """Average the gradients of the methods' own parameters over all processes: DDP wraps the network alone."""
    if session.fabric.world_size > 1:
        for parameter in session.criterion.parameters():
            if parameter.grad is not None:
                parameter.grad = session.fabric.all_reduce(parameter.grad, reduce_op="mean")  # type: ignore[assignment]


def _not_finite(task: Task, index: Tensor, epoch: int, step: int) -> TrainingError:
    terms = ", ".join(f"{k} {float(v):.3g}" for k, v in task.criterion.terms.items())
    files = "\n".join(f"  {task.names[i]}" for i in index.tolist())
    return TrainingError(
        f"the loss or its gradient is not finite at epoch {epoch + 1}, batch {step + 1} ({terms}); its files:\n{files}",
        fix="lower --lr, add --set clip_norm=1, or look at these files",
    )


@torch.no_grad()
def validate(fabric: Fabric, network: nn.Module, loader: Loader, classes: int) -> Metrics:
    """Measure the accuracy of each exit, and of the ensemble, the mean of their probabilities.

    Args:
        fabric: Processes and devices; each process has its share of the images.
        network: The network.
        loader: Batches of validation images.
        classes: Number of classes.

    Returns:
        `val_exit_0`, …, and `val_ensemble`, fractions over all processes.
    """
    network.eval()
    scores: list[MulticlassAccuracy] = []
    for batch in loader:
        images, target, index = fabric.to_device(batch)
        with fabric.autocast():
            outputs: Outputs = network(images.contiguous(memory_format=torch.channels_last))
        probabilities = [s.float().softmax(1) for s in outputs.logits]
        scores = scores or [
            MulticlassAccuracy(classes, average="micro").to(fabric.device) for _ in range(len(probabilities) + 1)
        ]
        own = index % fabric.world_size == fabric.global_rank  # others pad the last round of processes
        for score, p in zip(scores, [*probabilities, torch.stack(probabilities).mean(0)]):
            score.update(p[own], target[own])
    values = [float(score.compute()) for score in scores]
    return {f"val_exit_{k}": v for k, v in enumerate(values[:-1])} | {"val_ensemble": values[-1]}


def _summary(row: Metrics, epochs: int) -> str:
    """Return an epoch's metrics in one line."""
    exits = " ".join(f"{row[k]:.2%}" for k in row if k.startswith("val_exit"))
    return (
        f"epoch {row['epoch']:.0f}/{epochs}: loss {row['loss']:.4f}, validation {exits}, ensemble "
        f"{row['val_ensemble']:.2%}; {row['images_per_s']:.0f} images/s, {row['data_wait']:.0%} waiting for data"
    )


def _rss_mib() -> float:
    """Return this process's peak memory so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _open_tensorboard(out: Path, history: list[Metrics]) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=len(history) + 1)


def _write_tensorboard(board: Any, row: Metrics) -> None:
    for name, value in row.items():
        board.add_scalar(name, value, int(row["epoch"]))
    board.flush()
