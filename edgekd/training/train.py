"""Training of a network on a folder of images, with or without a teacher, into a run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor

from edgekd.config import write_toml
from edgekd.data.folders import check
from edgekd.data.images import require_unchanged
from edgekd.data.split import Split, Subset, read_split
from edgekd.data.splitting import images_of, make_split
from edgekd.distill.methods import needs_anchors, needs_teacher
from edgekd.errors import ConfigError
from edgekd.files import atomic_write, locked
from edgekd.host import default_threads
from edgekd.models.base import MultiExitNetwork
from edgekd.models.networks import build, has_stems, hub_name, stem_of
from edgekd.models.weights import load_state, read_state
from edgekd.serialization import to_json
from edgekd.training import run_folder
from edgekd.training.dataset import ClassSampler, EpochSampler, ImageSet
from edgekd.training.loader import Loader, start_processes
from edgekd.training.loop import Metrics, Task, TrainingProgress, fit
from edgekd.training.precision import choose
from edgekd.training.protocol import Protocol
from edgekd.types import Progress

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
    on_check: Progress | None = None,
    on_split: Callable[[Split], None] | None = None,
    progress: TrainingProgress | None = None,
) -> list[Metrics]:
    """Train `protocol.network` on the images in `data` and write the run folder `out`.

    Under torchrun every process makes the same call, and the first one writes.

    Args:
        data: Folder of the images.
        out: The run folder.
        protocol: Settings of the run.
        teacher: Run folder of the teacher, for methods that need one; by default the protocol's.
        labels: A CSV file of labels, where the images are not in class folders. A resumed run has them in its split.
        resume: Continue the run in `out`, if there is one.
        exclude_bad: Exclude images that cannot be used; else they are an error.
        devices: Number of processes or GPUs.
        on_check: Called while the images are checked.
        on_split: Called with the split before training.
        progress: Called after each batch.

    Returns:
        One row of metrics for each epoch.

    Raises:
        EdgekdError: Images, split, settings, teacher or weights cannot be used, which is found before training starts;
            or another process trains into `out`; or training fails.
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
                start_processes()  # workers start while the images are checked
            split = _split(data, out, protocol=protocol, labels=labels, exclude_bad=exclude_bad, on_check=on_check)
            if on_split:
                on_split(split)
            protocol, net = _resolved(protocol, classes=len(split.classes), device=fabric.device)
            task = _task(data, split, net, protocol=protocol, teacher=teacher, fabric=fabric)
            for source in (teacher, Path(protocol.weights)):
                _refuse_test_images(source, split)
            if not (out / run_folder.SPLIT).is_file():  # nothing is written before all settings are validated
                write_toml(out / run_folder.PROTOCOL, protocol)
                atomic_write(out / run_folder.SPLIT, to_json(split))
        protocol = fabric.broadcast(protocol)
        if not fabric.is_global_zero:
            split, progress = read_split(out), None
            net = network(protocol, classes=len(split.classes))
            task = _task(data, split, net, protocol=protocol, teacher=teacher, fabric=fabric)
        rows = fit(_fabric(devices, protocol.precision), task, out=out, resume=resume, progress=progress)
    if fabric.world_size > 1:  # gloo's threads must not outlive the interpreter, which would sometimes abort
        torch.distributed.destroy_process_group()
    return rows


@contextlib.contextmanager
def _ending_together(fabric: Fabric) -> Iterator[None]:
    """Stop the processes that the first one started on Ctrl-C: they would wait and then report a lost connection."""
    try:
        yield
    except KeyboardInterrupt:
        for process in getattr(fabric.strategy.launcher, "procs", ()):
            process.terminate()
        raise


def _fabric(devices: int, precision: str | None = None) -> Fabric:
    """Launch the processes on their devices; existing connections are kept."""
    fabric = Fabric(devices=devices, accelerator="auto", precision=precision)  # type: ignore[arg-type]
    fabric.launch()
    return fabric


def _resolved(protocol: Protocol, *, classes: int, device: torch.device) -> tuple[Protocol, MultiExitNetwork]:
    """Resolve the protocol's `auto` settings; return it with its network."""
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
    on_check: Progress | None,
) -> Split:
    """Return the split of the resumed run, whose images must not have changed, or make a new one."""
    if (out / run_folder.SPLIT).is_file():
        split = read_split(out)
        require_unchanged([*split.subset("train"), *split.subset("val")], data)
        return split
    images = images_of(data, labels=labels, method=protocol.split)
    checked = check(images, exclude_bad=exclude_bad, progress=on_check)
    return make_split(checked, method=protocol.split, fold=protocol.fold, seed=protocol.seed, group=protocol.group)


def _refuse_test_images(folder: Path | None, split: Split) -> None:
    """Refuse a teacher, or initial weights, trained on images that test or certify the student; file names may differ.

    Raises:
        ConfigError: The run folder's training images include test images or those for certification.
    """
    if folder is not None and (folder / run_folder.SPLIT).is_file():
        seen = {i.digest for i in read_split(folder).subsets.get("train", ())}
        for subset in ("test", "certify"):
            if common := [i.path for i in split.subsets.get(subset, ()) if i.digest in seen]:
                raise ConfigError(
                    f"{folder} was trained on {len(common)} of the {subset} images, for example {min(common)}",
                    fix=f"use its split: --split {folder / run_folder.SPLIT}",
                )


def _task(
    data: Path, split: Split, net: MultiExitNetwork, *, protocol: Protocol, teacher: Path | None, fabric: Fabric
) -> Task:
    return Task(
        network=net,
        train=_loader(data, split, "train", protocol=protocol, fabric=fabric),
        val=_loader(data, split, "val", protocol=protocol, fabric=fabric),
        protocol=protocol,
        metadata=run_folder.RunMetadata(
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
    return Loader(images, batch_size=size, sampler=sampler, workers=workers, drop_last=train)


def network(protocol: Protocol, *, classes: int) -> MultiExitNetwork:
    """Build the protocol's network with its initial weights: from a file, a run folder, the hub, or seeded random ones.

    Raises:
        ConfigError: See `build` and `load_state`.
        ArtifactError: The file or folder has no weights.
    """
    torch.manual_seed(protocol.seed)
    size, weights = protocol.preprocess.image_size, protocol.weights
    state: Mapping[str, Tensor] = {}
    if weights == "hub":
        hub = build(hub_name(protocol.network), classes=classes, image_size=224, pretrained=True)
        state = hub.backbone.state_dict()
    elif weights != "none":
        path = Path(weights)
        state = read_state(path / run_folder.MODEL if path.is_dir() else path)
    stem = stem_of(protocol.network, state) if protocol.stem == "auto" else protocol.stem
    net = build(protocol.network, classes=classes, image_size=size, exits=protocol.exits, stem=stem)
    if weights != "none":
        log.info("weights %s: %s", weights, load_state(net, state, source=weights).summary())
    return net


def _teacher(folder: Path, split: Split, protocol: Protocol) -> MultiExitNetwork:
    """Load the teacher.

    Raises:
        ConfigError: Its classes or its preprocessing differ from the student's.
    """
    net, metadata = run_folder.load_model(folder)
    if metadata.classes != split.classes:
        raise ConfigError(
            f"teacher {folder} has the classes {', '.join(metadata.classes)}; the data has {', '.join(split.classes)}",
            fix="train a teacher on these classes",
        )
    sizes = metadata.preprocess.image_size, protocol.preprocess.image_size
    if dataclasses.replace(metadata.preprocess, image_size=sizes[1]) != protocol.preprocess:
        raise ConfigError(
            f"teacher {folder} was trained with {metadata.preprocess}, the student uses {protocol.preprocess}",
            fix="give both the same preprocess.mean, preprocess.std and preprocess.resize",
        )
    if sizes[0] != sizes[1]:
        log.warning("the teacher was trained at %d pixels and now sees images of %d", *sizes)
    return net
