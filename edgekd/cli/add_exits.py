"""`edgekd add-exits`: early exits for a trained classifier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from edgekd.cli.common import (
    BadOption,
    GroupOption,
    OutOption,
    SizeOption,
    SplitFile,
    bar,
    echo,
    next_command,
    one_of,
    reserve,
)
from edgekd.data.preprocess import Channels, Interpolation, Resize
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.conversion.add_exits import ExitsReport
    from edgekd.conversion.preprocessing import PreprocessOptions
    from edgekd.conversion.source import TrainedClassifier

CHECKED = 500
"""Labelled images, about, on which the accuracy is measured first."""


def add_exits(
    source: Annotated[Path, typer.Argument(help="Any ONNX image classifier, or a run folder.")],
    out: OutOption,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of pictures, with or without labels; default: the run's.")
    ] = None,
    classes: Annotated[Path | None, typer.Option(help="Names of the classes: text, JSON or YAML.")] = None,
    split: SplitFile = None,
    exits: Annotated[str, typer.Option(help="auto, a number of early exits, or names of tensors: A,B.")] = "auto",
    views: Annotated[int, typer.Option(min=1, help="Views of each picture: itself, and random crops and flips.")] = 3,
    heads_share: Annotated[
        float,
        typer.Option("--heads-share", help="Share of the pictures for the heads; the rest is left for tune's promise."),
    ] = 0.6,
    group: GroupOption = None,
    cache: Annotated[Path | None, typer.Option(help="Folder that keeps the computed features.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the divisions, views and heads.")] = 0,
    preprocess: Annotated[
        str | None,
        typer.Option(help="imagenet, inception, clip, caffe, ultralytics, none, or a library's JSON file."),
    ] = None,
    image_size: SizeOption = None,
    mean: Annotated[str | None, typer.Option(metavar="R,G,B", help="Mean of each plane, after scaling.")] = None,
    std: Annotated[str | None, typer.Option(metavar="R,G,B", help="Standard deviation of each plane.")] = None,
    scale: Annotated[float | None, typer.Option(help="Factor on pixels 0..255.")] = None,
    resize: Annotated[
        str | None, typer.Option(help="stretch, crop, shorter or pad.", callback=one_of(*get_args(Resize)))
    ] = None,
    resize_size: Annotated[int | None, typer.Option("--resize-size", help="Side before the centre is taken.")] = None,
    crop: Annotated[float | None, typer.Option(help="Share of --resize-size that is taken, such as 0.875.")] = None,
    interpolation: Annotated[
        str | None,
        typer.Option(
            help="bilinear, bicubic, lanczos, nearest, box or hamming.", callback=one_of(*get_args(Interpolation))
        ),
    ] = None,
    no_antialias: Annotated[
        bool, typer.Option("--no-antialias", help="Resize as TensorFlow and OpenCV do: bilinear without antialiasing.")
    ] = False,
    channels: Annotated[
        str | None, typer.Option(help="rgb, bgr or grey.", callback=one_of(*get_args(Channels)))
    ] = None,
    expect: Annotated[float | None, typer.Option(help="Accuracy in % that its makers state; needs labels.")] = None,
    exclude_bad: BadOption = False,
) -> None:
    """Add early exits to a trained classifier, whose own answers stay what they are; labels are not needed."""
    from edgekd.files import NETWORK

    if not 0 < heads_share <= 1:
        raise ConfigError(f"--heads-share {heads_share} is no share", fix="give a number above 0 and up to 1")
    reserve(out, NETWORK, data=data)
    given: dict[str, Any] = {
        "image_size": image_size,
        "mean": _numbers("mean", mean),
        "std": _numbers("std", std),
        "scale": scale,
        "resize": resize,
        "resize_size": resize_size,
        "crop": crop,
        "interpolation": interpolation,
        "antialias": False if no_antialias else None,
        "channels": channels,
    }
    common = {"out": out, "exits": exits, "views": views, "cache": cache, "seed": seed}
    if source.is_dir():
        if any(v is not None for v in (classes, split, preprocess, group, *given.values())):
            raise ConfigError(
                f"{source} is a run folder: its classes, split and preprocessing are known",
                fix="leave out the options for ONNX files",
            )
        _from_run(source, data, common)
        return
    if data is None:
        raise ConfigError("no pictures to learn from", fix="give their folder with --data; labels are not needed")
    from edgekd.conversion.source import read_classifier
    from edgekd.data.folders import scan_pictures
    from edgekd.data.splitting import group_keys

    if group is not None:  # refused before the network is read
        group_keys([item.path for item in scan_pictures(data).items], group)
    classifier = read_classifier(source, classes=classes, preprocess=_options(preprocess, given))
    for note in classifier.notes:
        echo(f"note: {note}")
    if split is None and expect is not None:
        raise ConfigError("--expect needs labels", fix="give a split.json with --split")
    if split is not None:
        _from_split(classifier, data, split, expect, common)
    else:
        _from_pictures(classifier, data, group or "none", heads_share, exclude_bad, common)


def _from_run(run: Path, data: Path | None, common: dict[str, Any]) -> None:
    import torch

    from edgekd.cli.train import data_folder
    from edgekd.conversion.modules import classifier_of
    from edgekd.data.images import load_subset
    from edgekd.data.split import read_split
    from edgekd.training.run_folder import load_model

    network, trained = load_model(run)
    split, data = read_split(run), data_folder(run, data)
    reserve(common["out"], data=data)
    images, _ = load_subset(split, "val", data=data, preprocess=trained.preprocess, limit=32)
    with torch.no_grad():
        count = len(network(torch.from_numpy(images[:1])).logits)
    if count > 1:
        raise ConfigError(f"{run} holds a student that has {count} exits already", fix="use edgekd export")
    classifier = classifier_of(
        network,
        classes=trained.classes,
        preprocess=trained.preprocess,
        name=trained.network,
        images=images,
        provenance=trained.provenance,
    )
    _with_labels(classifier, data, split, common)
    _next(common["out"], data, run / "split.json")


def _from_split(
    classifier: TrainedClassifier, data: Path, path: Path, expect: float | None, common: dict[str, Any]
) -> None:
    import numpy as np

    from edgekd.cli.common import read_or_scan
    from edgekd.conversion.plausibility import check_accuracy

    split = read_or_scan(data, path, classifier.classes)
    items = split.subset("train")
    some = items[:: max(len(items) // CHECKED, 1)]
    labels = np.array([item.label for item in some], np.int64)
    found = check_accuracy(classifier, [data / item.path for item in some], labels, expect=expect)
    echo(f"accuracy {found.accuracy:.1%} on {len(some)} training images")
    if found.warning:
        echo(f"warning: {found.warning}")
    _with_labels(classifier, data, split, common)
    _next(common["out"], data, path)


def _with_labels(classifier: TrainedClassifier, data: Path, split: Any, common: dict[str, Any]) -> None:
    """Learn from the training subset of a split; its other subsets stay as they are."""
    import numpy as np

    from edgekd.artifacts.training_images import TrainingImages
    from edgekd.conversion.add_exits import add_exits
    from edgekd.data.images import require_unchanged

    items = split.subset("train")
    require_unchanged(items, data, what="train images")
    seen = TrainingImages.of([*items, *split.subsets.get("val", ())], split.group)
    with bar("add exits") as progress:
        report = add_exits(
            classifier,
            items,
            data=data,
            group=split.group,
            labels=np.array([item.label for item in items], np.int64),
            training_images=seen,
            progress=progress,
            **common,
        )
    _print(report, common["out"])
    echo("note: these are training images: an overfitted network and its exits do worse on new ones")


def _from_pictures(
    classifier: TrainedClassifier, data: Path, group: str, share: float, exclude_bad: bool, common: dict[str, Any]
) -> None:
    """Learn from a share of pictures without labels."""
    from edgekd.conversion.add_exits import add_exits, require_enough
    from edgekd.data.pictures import find_pictures
    from edgekd.data.splitting import divide

    with bar("check pictures") as progress:
        pictures = find_pictures(data, group=group, exclude_bad=exclude_bad, progress=progress)
    seen, rest = (pictures, ()) if share == 1 else divide(pictures, share, common["seed"])
    require_enough(len(seen), given=len(pictures))
    with bar("add exits") as progress:
        report = add_exits(classifier, seen, data=data, group=group, progress=progress, **common)
    _print(report, common["out"])
    if rest:
        echo(f"{len(rest)} of {len(pictures)} pictures were not used: tune can make a promise with them")
    else:
        echo("all pictures were used: tune needs others for a promise")
    _next(common["out"], data, None)


def _next(out: Path, data: Path, split: Path | None) -> None:
    files = ("--data", data) if split is None else ("--data", data, "--split", split)
    next_command("compile", out, "--recipe", "int8", *files, "--out", out.with_suffix(".engine"))


def _print(report: ExitsReport, out: Path) -> None:
    from edgekd.conversion.placement import LIMIT
    from edgekd.text import aligned

    head = ("tensor", "shape", "ms up to here", "+ exit ms", "MACs", "head", f"answers at {LIMIT:.1%}", "agrees", "")
    rows = [head]
    for one in report.candidates:
        shapes = " ".join("x".join(map(str, shape)) for shape in one.cut.shapes)
        times = f"{one.before_ms:.2f}", f"{one.exit_ms:.3f}"
        answers = f"{one.answered:.0%}", f"{one.agreement:.1%}"
        chosen = "exit" if one.chosen else ""
        rows.append((one.cut.name, shapes, *times, f"{one.cut.share:.0%}", one.head.kind, *answers, chosen))
    echo(aligned(rows))
    checked = report.checked
    shares = " / ".join(f"{share:.0%}" for share in checked.shares)
    echo(
        f"{len(checked.chosen)} early exits: of {report.held_out} held-out pictures, {shares} leave there and at the "
        f"end, {checked.changed:.1%} with another answer, in {checked.time_ms:.2f} of {report.network_ms:.2f} ms; "
        "thresholds were chosen on one half and applied to the other, both ways"
    )
    echo("note: heads and places were chosen on these pictures, too: new ones may do worse, which edgekd tune measures")
    same = "are the network's to the bit" if report.difference == 0 else f"differ by at most {report.difference:.1e}"
    staged = report.staged_difference
    in_stages = f" (in stages, they differ by at most {staged:.1e})" if staged > report.difference else ""
    echo(f"{out}: heads learned from {report.learned} pictures; the final logits {same}{in_stages}")


def _options(source: str | None, given: dict[str, Any]) -> PreprocessOptions | None:
    """Return the settings given, over those of a preset or file; None if nothing is given."""
    from edgekd.conversion.preprocessing import PreprocessOptions, read_preprocess

    own = PreprocessOptions(**given)
    if source is not None:
        return own.over(read_preprocess(source))
    return own if any(v is not None for v in given.values()) else None


def _numbers(name: str, text: str | None) -> tuple[float, ...] | None:
    if text is None:
        return None
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--{name} {text}: not numbers", fix=f"give --{name} 0.485,0.456,0.406") from None
