"""One training loop for teachers and students, on Lightning Fabric."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy

from edgekd.distill.base import Setting, Step, needs
from edgekd.distill.criterion import Criterion
from edgekd.distill.feature_taps import Viewer, viewer
from edgekd.errors import ArtifactError, ConfigError, TrainingError
from edgekd.models.base import Outputs
from edgekd.models.weights import read_state
from edgekd.serialization import to_json
from edgekd.training.protocol import Protocol
from edgekd.training.run_folder import (
    MODEL,
    RESUME,
    Anchors,
    Header,
    anchor,
    load_resume,
    save_model,
    save_resume,
    write_metrics,
)

log = logging.getLogger(__name__)

Progress = Callable[[int, int, float], None]
"""Called after each batch with (batches done, batches in all, loss)."""


@dataclass
class Task:
    """What `fit` works on. The teacher is frozen, in eval mode, and no part of the network; with anchors, an epoch
    starts by reading that epoch's into it. labels: by index. What the losses see of both networks, and the losses
    themselves, are found when the task is made, so that what does not go together is refused before training.

    Raises:
        ConfigError: a method, feature points and networks that do not go together.
    """

    network: nn.Module
    train: DataLoader[Any]
    val: DataLoader[Any]
    protocol: Protocol
    header: Header
    names: list[str]
    labels: tuple[int, ...]
    teacher: nn.Module | None = None
    anchors: Anchors | None = None
    student_view: Viewer = field(init=False)
    teacher_view: Viewer | None = field(init=False, default=None)
    criterion: Criterion = field(init=False)

    def __post_init__(self) -> None:
        self.student_view, self.teacher_view, setting = _views(self)
        self.criterion = Criterion(self.protocol, setting)
        for name, count in self.criterion.init_epochs.items():
            if count >= self.protocol.epochs:
                raise ConfigError(
                    f"method '{name}' needs {count} epochs for its first stage, and the run has {self.protocol.epochs}",
                    fix="give more --epochs, or shorten that stage with --set init_epochs=…",
                )


def optimizer(parameters: Iterator[nn.Parameter], protocol: Protocol) -> torch.optim.Optimizer:
    """The protocol's optimiser over `parameters`."""
    lr, decay = protocol.lr, protocol.weight_decay
    if protocol.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=protocol.momentum, weight_decay=decay)
    adam = torch.optim.AdamW if protocol.optimizer == "adamw" else torch.optim.Adam
    return adam(parameters, lr=lr, weight_decay=decay)


def fit(
    fabric: Fabric, task: Task, *, out: Path, resume: bool = False, progress: Progress | None = None
) -> list[dict[str, float]]:
    """Train and write the run folder after every epoch; return one row of metrics an epoch.

    The weights kept in model.safetensors are those of the epoch with the best validation accuracy of the
    ensemble (the later one of equals). A run that was killed and is resumed ends with the same bits on a CPU:
    every epoch seeds anew, and augmentation depends on seed, epoch and image alone. The same weights, averaged ones if
    the protocol's `ema` is on, are kept as anchors after every `anchor_every` epochs.

    Raises:
        TrainingError: the loss is not finite; the batch's files are named.
        ArtifactError: resume.pt is damaged or belongs to other settings.
    """
    protocol, network = task.protocol, task.network.to(memory_format=torch.channels_last)
    digest = hashlib.sha256(
        to_json(dataclasses.replace(protocol, source="", data="", teacher="", workers=0))
    ).hexdigest()
    live = _setup(fabric, task, network)
    parts: dict[str, Any] = {"network": network, "criterion": live.criterion, "optimizer": live.optim}
    parts |= {"ema": live.ema} if live.ema else {}
    kept = live.ema.module if live.ema else network
    state = (load_resume(out, digest=digest) if resume else None) or {"epoch": 0, "history": [], "best": -1.0}
    try:
        for name, part in parts.items():
            if name in state:
                part.load_state_dict(state[name])
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
        what = f"{out / RESUME} does not fit these networks: {' '.join(str(error).split())[:200]}"
        raise ArtifactError(what, fix="resume with the edgekd that wrote it, or train anew") from None
    history: list[dict[str, float]] = state["history"]
    best: float = state["best"]
    board = _board(out, history) if fabric.is_global_zero else None
    for epoch in range(state["epoch"], protocol.epochs):
        torch.manual_seed(protocol.seed * 100_003 + epoch * 101 + fabric.global_rank)
        if task.teacher is not None and task.anchors is not None:
            task.teacher.load_state_dict(read_state(task.anchors.at(epoch)))
        row = {"epoch": epoch + 1.0} | _train_epoch(live, epoch, progress)
        row |= validate(fabric, kept, task.val, len(task.header.classes))
        history.append(row | {"rss_mib": _rss_mib()})
        if fabric.is_global_zero:
            if row["val_ensemble"] >= best:
                save_model(out / MODEL, kept, task.header)
            if protocol.anchor_every and (epoch + 1) % protocol.anchor_every == 0:
                save_model(anchor(out, epoch + 1), kept, task.header)
            best = max(best, row["val_ensemble"])
            write_metrics(out, history)
            log.info(_line(history[-1], protocol.epochs))
            _log(board, history[-1])
            saved = {name: part.state_dict() for name, part in parts.items()}
            save_resume(out, saved | {"epoch": epoch + 1, "history": history, "best": best, "digest": digest})
        fabric.barrier()
    return history


@dataclass
class _Live:
    """A task on its device: the wrapped network, the losses, the optimiser and the averaged weights."""

    fabric: Fabric
    task: Task
    model: Any
    criterion: Criterion
    optim: Any
    ema: AveragedModel | None


def _setup(fabric: Fabric, task: Task, network: nn.Module) -> _Live:
    criterion = task.criterion.to(fabric.device)
    parameters = (p for module in (network, criterion) for p in module.parameters())
    model, optim = fabric.setup(network, optimizer(parameters, task.protocol))
    if task.teacher is not None:
        task.teacher = fabric.to_device(task.teacher).to(memory_format=torch.channels_last)
    ema = None
    if decay := task.protocol.ema:
        average = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        ema = AveragedModel(network, multi_avg_fn=average, use_buffers=True)
    return _Live(fabric, task, model, criterion, optim, ema)


def _views(task: Task) -> tuple[Viewer, Viewer | None, Setting]:
    """What the losses will see, tried once on the CPU."""
    protocol, size, parts = task.protocol, task.protocol.preprocess.image_size, needs(task.protocol.method)
    student = viewer(task.network, parts, protocol.student_points, image_size=size)
    teacher = None
    if task.teacher is not None:
        teacher = viewer(freeze(task.teacher), parts, protocol.teacher_points, image_size=size)
        mine, others = student.stages or student.preact, teacher.stages or teacher.preact
        if len(mine) != len(others):
            raise ConfigError(
                f"the student has the feature points {', '.join(mine)}, the teacher {', '.join(others)}: not as many",
                fix="name as many with --set student_points=[…] and --set teacher_points=[…]",
            )
    shapes = teacher.shapes(size) if teacher else None
    return student, teacher, Setting(student.shapes(size), shapes, task.labels, len(task.header.classes))


def freeze(teacher: nn.Module) -> nn.Module:
    """Eval mode and no gradients, for good: a later `.train()` changes nothing."""
    teacher.eval().requires_grad_(False)
    teacher.train = lambda mode=True: teacher  # type: ignore[method-assign]
    return teacher


def _train_epoch(live: _Live, epoch: int, progress: Progress | None) -> dict[str, float]:
    """One pass: mean loss and its terms, learning rate, images a second, share of the time spent waiting for data."""
    task, protocol, loader = live.task, live.task.protocol, live.task.train
    live.model.train()
    sums: dict[str, Tensor] = {}
    seen, waited, steps, started = 0, 0.0, len(loader), time.perf_counter()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    batches = iter(loader)
    for step in range(steps):
        asked = time.perf_counter()
        images, target, index = live.fabric.to_device(next(batches))
        waited += time.perf_counter() - asked
        for group in live.optim.param_groups:
            group["lr"] = protocol.lr_at(epoch + step / steps)
        loss = _step(live, images.contiguous(memory_format=torch.channels_last), target, index, epoch)
        if not torch.isfinite(loss):
            _stop(task, index, epoch, step, live.criterion)
        for name, value in {"loss": loss, **{f"loss_{k}": v for k, v in live.criterion.terms.items()}}.items():
            sums[name] = sums.get(name, torch.zeros_like(value)) + value
        seen += len(images)
        if progress:
            progress(epoch * steps + step + 1, protocol.epochs * steps, float(loss))
    seconds = time.perf_counter() - started
    speed = {"images_per_s": seen * live.fabric.world_size / seconds, "data_wait": waited / seconds}
    return {k: float(v) / steps for k, v in sums.items()} | {"lr": protocol.lr_at(epoch + 1 - 1 / steps)} | speed


def _step(live: _Live, images: Tensor, target: Tensor, index: Tensor, epoch: int) -> Tensor:
    """Forward, backward and update on one batch; returns the loss, NaN for a gradient that is not finite.

    What is not finite changes nothing, but in FP16, whose scaled gradients may overflow: such a step is left out.
    """
    images, teacher = live.criterion.expand(images), None
    if live.task.teacher_view is not None:
        with torch.no_grad(), live.fabric.autocast():
            teacher = live.task.teacher_view(images)
    student = live.task.student_view(images, call=live.model)
    loss: Tensor = live.criterion(Step(student, teacher, target, index, epoch))
    if live.fabric.world_size > 1:  # DDP waits for a gradient of every layer, and a first stage leaves some out
        loss = loss + 0 * sum(s.sum() for s in student.out.logits)
    if torch.isfinite(loss):
        live.optim.zero_grad(set_to_none=True)
        live.fabric.backward(loss)
        _share_gradients(live)
        if limit := live.task.protocol.clip_norm:
            norm = live.fabric.clip_gradients(live.model, live.optim, max_norm=limit, error_if_nonfinite=False)
            if live.task.protocol.precision != "16-mixed" and not torch.isfinite(norm):  # type: ignore[arg-type]
                return loss.detach() * torch.nan
        live.optim.step()
        if live.ema is not None:
            live.ema.update_parameters(live.task.network)
    return loss.detach()


def _share_gradients(live: _Live) -> None:
    """The methods' own parameters are outside the wrapped network: their gradients are averaged here."""
    if live.fabric.world_size > 1:
        for parameter in live.criterion.parameters():
            if parameter.grad is not None:
                parameter.grad = live.fabric.all_reduce(parameter.grad, reduce_op="mean")  # type: ignore[assignment]


def _stop(task: Task, index: Tensor, epoch: int, step: int, criterion: Criterion) -> None:
    terms = ", ".join(f"{k} {float(v):.3g}" for k, v in criterion.terms.items())
    files = "\n".join(f"  {task.names[i]}" for i in index.tolist())
    raise TrainingError(
        f"the loss or its gradient is not finite at epoch {epoch + 1}, batch {step + 1} ({terms}); its files:\n{files}",
        fix="lower --lr, add --set clip_norm=1, or look at these files",
    )


@torch.no_grad()
def validate(fabric: Fabric, network: nn.Module, loader: Any, classes: int) -> dict[str, float]:
    """Accuracy of each exit and of the ensemble (mean of probabilities) on the images of all processes."""
    network.eval()
    scores: list[MulticlassAccuracy] = []
    for batch in loader:
        images, target, index = fabric.to_device(batch)
        with fabric.autocast():
            out: Outputs = network(images.contiguous(memory_format=torch.channels_last))
        probabilities = [s.float().softmax(1) for s in out.logits]
        scores = scores or [
            MulticlassAccuracy(classes, average="micro").to(fabric.device) for _ in range(len(probabilities) + 1)
        ]
        mine = index % fabric.world_size == fabric.global_rank  # the rest fills up the last round of processes
        for score, p in zip(scores, [*probabilities, torch.stack(probabilities).mean(0)]):
            score.update(p[mine], target[mine])
    values = [float(score.compute()) for score in scores]
    return {f"val_exit_{k}": v for k, v in enumerate(values[:-1])} | {"val_ensemble": values[-1]}


def _line(row: dict[str, float], epochs: int) -> str:
    """An epoch in one line."""
    exits = " ".join(f"{row[k]:.2%}" for k in row if k.startswith("val_exit"))
    return (
        f"epoch {row['epoch']:.0f}/{epochs}: loss {row['loss']:.4f}, validation {exits}, ensemble "
        f"{row['val_ensemble']:.2%}; {row['images_per_s']:.0f} images/s, {row['data_wait']:.0%} waiting for data"
    )


def _rss_mib() -> float:
    """Peak memory of this process so far, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _board(out: Path, history: list[dict[str, float]]) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=len(history) + 1)


def _log(board: Any, row: dict[str, float]) -> None:
    for name, value in row.items():
        board.add_scalar(name, value, int(row["epoch"]))
    board.flush()
