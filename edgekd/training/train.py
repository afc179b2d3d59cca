"""`edgekd train` and `edgekd distill`: images (and a teacher) to a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from edgekd.config import write_toml
from edgekd.data.folders import check
from edgekd.data.images import require_unchanged
from edgekd.data.split import Split, Subset, read_split
from edgekd.data.splitting import images_of, make_split
from edgekd.distill.base import needs_anchors, needs_teacher
from edgekd.errors import ConfigError
from edgekd.files import atomic_write, locked
from edgekd.host import default_threads
from edgekd.models.networks import build, has_stems, hub_name, stem_of
from edgekd.models.weights import load_state, read_state
from edgekd.serialization import to_json
from edgekd.training import run_folder
from edgekd.training.dataset import ClassSampler, EpochSampler, ImageSet
from edgekd.training.loader import Loader, loader, start_processes
from edgekd.training.loop import Progress, Task, fit
from edgekd.training.precision import choose
from edgekd.training.protocol import Protocol

log = logging.getLogger(__name__)


def train(
    data: Path,
    out: Path,
    *,
    protocol: Protocol,
    teacher: Path | None = None,
    labels: Path | None = None,
    resume: bool = False,
    exclude_bad: bool = False,
    devices: int = 1,
    on_check: Callable[[int, int], None] | None = None,
    on_split: Callable[[Split], None] | None = None,
    progress: Progress | None = None,
) -> list[dict[str, float]]:
    """Train `protocol.network` on the images under `data` and write the run folder `out`.

    teacher: a run folder, for methods that learn from one; the protocol's if not given. devices: processes or GPUs;
    under torchrun each process calls this alike and the first one writes. labels: a CSV file instead of class folders;
    a run that is resumed has its images in its split.

    Raises:
        EdgekdError: anything wrong with images, split, settings, teacher or weights, before training starts; another
            process trains into `out`.
    """
    if teacher is None and protocol.teacher:
        teacher = Path(protocol.teacher)
    protocol = dataclasses.replace(protocol, teacher=str(teacher.resolve()) if teacher else "")
    if needs_teacher(protocol.method) and teacher is None:
        raise ConfigError(f"method '{protocol.method}' needs a teacher", fix="give a run folder with --teacher")
    fabric = _fabric(devices)
    torch.set_num_threads(min(torch.get_num_threads(), default_threads()))
    with locked(out) if fabric.is_global_zero else contextlib.nullcontext(), _ending_together(fabric):
        if fabric.is_global_zero:
            run_folder.start(out, resume=resume)
            if protocol.workers:
                start_processes()  # they get ready while the images are checked
            split = _split(data, out, protocol=protocol, labels=labels, exclude_bad=exclude_bad, on_check=on_check)
            if on_split:
                on_split(split)
            protocol, net = _decided(protocol, classes=len(split.classes), device=fabric.device)
            task = _task(data, split, net, protocol=protocol, teacher=teacher, fabric=fabric)
            for source in (teacher, Path(protocol.weights)):
                _refuse_seen(source, split)
            if not (
                out / run_folder.SPLIT
            ).is_file():  # nothing is written before all that was asked for proved possible
                write_toml(out / run_folder.PROTOCOL, protocol)
                atomic_write(out / run_folder.SPLIT, to_json(split))
        protocol = fabric.broadcast(protocol)
        if not fabric.is_global_zero:
            split, progress = read_split(out), None
            net = network(protocol, classes=len(split.classes))
            task = _task(data, split, net, protocol=protocol, teacher=teacher, fabric=fabric)
        rows = fit(_fabric(devices, protocol.precision), task, out=out, resume=resume, progress=progress)
    if fabric.world_size > 1:  # gloo's threads must not outlive the interpreter: it would abort now and then
        torch.distributed.destroy_process_group()
    return rows


@contextlib.contextmanager
def _ending_together(fabric: Fabric) -> Iterator[None]:
    """Stop the processes that the first one started with it: they would wait, and then blame the connection."""
    try:
        yield
    except KeyboardInterrupt:
        for process in getattr(fabric.strategy.launcher, "procs", ()):
            process.terminate()
        raise


def _fabric(devices: int, precision: str | None = None) -> Fabric:
    """The processes and their device; those that are already at work together stay together."""
    fabric = Fabric(devices=devices, accelerator="auto", precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def _decided(protocol: Protocol, *, classes: int, device: torch.device) -> tuple[Protocol, nn.Module]:
    """The protocol with what it leaves to `auto` decided, and its network."""
    net, size = network(protocol, classes=classes), protocol.preprocess.image_size
    stem = stem_of(protocol.network, net.state_dict())
    precision = choose(protocol.precision, net, device=device, image_size=size)
    if has_stems(protocol.network):
        hint = "; --set stem=small keeps four times the map" if stem == "imagenet" and size <= 64 else ""
        log.info("stem %s at %d pixels%s", stem, size, hint)
    return dataclasses.replace(protocol, stem=stem, precision=precision), net


def _split(
    data: Path,
    out: Path,
    *,
    protocol: Protocol,
    labels: Path | None,
    exclude_bad: bool,
    on_check: Callable[[int, int], None] | None,
) -> Split:
    """The split of the run that is resumed, whose images must be what they were; or a new one."""
    if (out / run_folder.SPLIT).is_file():
        split = read_split(out)
        require_unchanged([*split.subset("train"), *split.subset("val")], data)
        return split
    images = images_of(data, labels=labels, method=protocol.split)
    checked = check(images, exclude_bad=exclude_bad, progress=on_check)
    return make_split(checked, method=protocol.split, fold=protocol.fold, seed=protocol.seed, group=protocol.group)


def _refuse_seen(folder: Path | None, split: Split) -> None:
    """A teacher, or first weights, must not have been trained on images, by any name, that will test the student.

    Raises:
        ConfigError: the run folder's training part holds some of them.
    """
    if folder is not None and (folder / run_folder.SPLIT).is_file():
        seen = {i.digest for i in read_split(folder).subsets.get("train", ())}
        if common := [i.path for i in split.subsets.get("test", ()) if i.digest in seen]:
            raise ConfigError(
                f"{folder} was trained on {len(common)} of the test images, {min(common)} for one",
                fix=f"use its split: --split {folder / run_folder.SPLIT}",
            )


def _task(
    data: Path, split: Split, net: nn.Module, *, protocol: Protocol, teacher: Path | None, fabric: Fabric
) -> Task:
    return Task(
        network=net,
        train=_loader(data, split, "train", protocol=protocol, fabric=fabric),
        val=_loader(data, split, "val", protocol=protocol, fabric=fabric),
        protocol=protocol,
        header=run_folder.Header(
            protocol.network,
            split.classes,
            protocol.preprocess,
            protocol.exits,
            run_folder.provenance(protocol, split, teacher=teacher),
        ),
        names=[item.path for item in split.subset("train")],
        labels=tuple(item.label for item in split.subset("train")),
        teacher=_teacher(teacher, split, protocol) if teacher and needs_teacher(protocol.method) else None,
        anchors=run_folder.anchors(teacher) if teacher and needs_anchors(protocol.method) else None,
    )


def _loader(data: Path, split: Split, subset: Subset, *, protocol: Protocol, fabric: Fabric) -> Loader:
    items, train = split.subset(subset), subset == "train"
    augment = protocol.augment if train else None
    images = ImageSet(items, data=data, preprocess=protocol.preprocess, augment=augment, seed=protocol.seed)
    rank, world = fabric.global_rank, fabric.world_size
    size, workers = protocol.batch_size, protocol.workers
    sampler = EpochSampler(len(items), seed=protocol.seed, rank=rank, world=world, shuffle=train)
    if train and protocol.sampler == "pxk":
        classes, per_class = [split.classes[i.label] for i in items], protocol.per_class
        sampler = ClassSampler(
            classes, per_class=per_class, batch_size=size, seed=protocol.seed, rank=rank, world=world
        )
    return loader(images, batch_size=size, sampler=sampler, workers=workers, drop_last=train)


def network(protocol: Protocol, *, classes: int) -> nn.Module:
    """The protocol's network with its first weights: from a file or run folder, the hub, or seeded chance.

    Raises:
        ConfigError: see `models.build` and `load_state`.
        ArtifactError: no weights in that file or folder.
    """
    torch.manual_seed(protocol.seed)
    size, weights = protocol.preprocess.image_size, protocol.weights
    state: Mapping[str, Tensor] = {}
    if weights == "hub":
        hub = build(hub_name(protocol.network), classes=classes, image_size=224, pretrained=True)
        state = hub.backbone.state_dict()  # type: ignore[union-attr]
    elif weights != "none":
        path = Path(weights)
        state = read_state(path / run_folder.MODEL if path.is_dir() else path)
    stem = stem_of(protocol.network, state) if protocol.stem == "auto" else protocol.stem
    net = build(protocol.network, classes=classes, image_size=size, exits=protocol.exits, stem=stem)
    if weights != "none":
        log.info("weights %s: %s", weights, load_state(net, state, source=weights).summary())
    return net


def _teacher(folder: Path, split: Split, protocol: Protocol) -> nn.Module:
    """The frozen teacher.

    Raises:
        ConfigError: other classes or another standardisation than the student's.
    """
    net, header = run_folder.load_model(folder)
    if header.classes != split.classes:
        raise ConfigError(
            f"teacher {folder} knows the classes {', '.join(header.classes)}; the data has {', '.join(split.classes)}",
            fix="train a teacher on these classes",
        )
    sizes = header.preprocess.image_size, protocol.preprocess.image_size
    if dataclasses.replace(header.preprocess, image_size=sizes[1]) != protocol.preprocess:
        raise ConfigError(
            f"teacher {folder} was trained with {header.preprocess}, the student asks for {protocol.preprocess}",
            fix="give both the same preprocess.mean, preprocess.std and preprocess.resize",
        )
    if sizes[0] != sizes[1]:
        log.warning("the teacher was trained at %d pixels and now sees images of %d", *sizes)
    return net
