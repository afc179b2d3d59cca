"""`edgekd evaluate`: metrics of a run folder, student.onnx or engine."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, cast, get_args

import typer

from edgekd.cli.common import (
    DataFolder,
    LabelsOption,
    SplitFile,
    ThreadsOption,
    bar,
    echo,
    next_command,
    one_of,
    read_or_scan,
    reserve,
    say,
)
from edgekd.cli.train import data_folder
from edgekd.data.split import Subset
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.data.preprocess import Preprocess
    from edgekd.data.split import Split
    from edgekd.types import Array


def evaluate(
    target: Annotated[Path, typer.Argument(help="Run folder, student.onnx or student.engine.")],
    data: DataFolder = None,
    split: SplitFile = None,
    labels: LabelsOption = None,
    subset: Annotated[
        str, typer.Option(help="train, val, test or certify.", callback=one_of(*get_args(Subset)))
    ] = "test",
    plot: Annotated[Path | None, typer.Option(help="Write the confusion matrix: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the metrics as JSON, with the device and host.")] = None,
    svm: Annotated[
        str | None, typer.Option(metavar="POINT", help="Evaluate a linear SVM on this feature point of a run folder.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Print accuracy, sensitivity, specificity, precision, F1, confusion matrix and calibration of every exit."""
    import numpy as np

    from edgekd.backends.report import describe_host
    from edgekd.bench import accuracy, plots
    from edgekd.data.images import load_subset
    from edgekd.files import MEASURES, PLOT, atomic_write
    from edgekd.policy import softmax
    from edgekd.serialization import to_json

    if plot:
        plots.picture_format(plot)
    classes, preprocess, logits_of, device = _open(target, threads)
    data = data_folder(target, data)
    reserve(out, MEASURES, data=data)
    reserve(plot, PLOT, data=data)
    if labels and split:
        raise ConfigError("--labels and --split", fix="give one of them")
    if not labels and split is None and (target / "split.json").is_file():
        split = target
    chosen = read_or_scan(data, split, classes, labels=labels)
    if svm is not None:
        logits_of = _svm(target, svm, chosen, data)
    with bar("read images") as progress:
        images, truth = load_subset(chosen, cast(Subset, subset), data=data, preprocess=preprocess, progress=progress)
    probabilities = [softmax(one, 1.0) for one in logits_of(images)]
    rows = {f"exit_{k}": accuracy.metrics(p, truth, classes) for k, p in enumerate(probabilities)}
    if len(probabilities) > 1:
        rows["ensemble"] = accuracy.metrics(np.mean(probabilities, axis=0), truth, classes)
    last = list(rows.values())[-1]
    known = _validated(target)
    if subset == "test" and known and (note := accuracy.gap(rows[known[0]], accuracy=known[1], images=known[2])):
        say(f"note: {note}")
    plain = {name: dataclasses.asdict(row) for name, row in rows.items()}
    if out:
        environment = {"device": device, "host": dataclasses.asdict(describe_host())}
        atomic_write(out, to_json({"subset": subset, "metrics": plain, **environment}))
    if as_json:
        echo(json.dumps(plain, indent=1))
    else:
        echo(accuracy.text_table(rows))
        echo(accuracy.confusion_text(last))
    if plot:
        plots.write_confusion(last, plot)
    if (target / "split.json").is_file() and not as_json:
        next_command("export", target, "--out", target.with_name(f"{target.name}.onnx"))


class _Target(NamedTuple):
    """The evaluated model: classes, preprocessing, function from images (N, 3, H, W) to logits (E, N, C), device."""

    classes: tuple[str, ...]
    preprocess: Preprocess
    logits: Callable[[Array], Array]
    device: str


def _open(target: Path, threads: int | None) -> _Target:
    """Open a run folder, student.onnx or engine."""
    if (target / "model.safetensors").is_file() or (target / "protocol.toml").is_file():
        from edgekd.training.evaluate import load, logits

        network, trained, device = load(target)
        return _Target(trained.classes, trained.preprocess, lambda images: logits(network, images), device)
    from edgekd.runtime.engine import open_engine

    engine = open_engine(target, threads=threads)
    return _Target(engine.metadata.classes, engine.metadata.preprocess, engine.logits, engine.backend.name)


def _validated(target: Path) -> tuple[str, float, int] | None:
    """Return the row, accuracy and number of images of a run folder's or an engine's validation."""
    if (target / "metrics.csv").is_file():
        from edgekd.data.split import read_split

        rows = list(csv.DictReader((target / "metrics.csv").read_text(encoding="utf-8").splitlines()))
        row = "ensemble" if "val_exit_1" in rows[0] else "exit_0"
        return row, max(float(r["val_ensemble"]) for r in rows), len(read_split(target).subset("val"))
    if target.is_dir():
        from edgekd.artifacts.manifest import read_manifest

        if found := read_manifest(target).accuracy:
            return f"exit_{len(found.engine) - 1}", found.engine[-1], found.validation_images
    return None


def _svm(run: Path, point: str, split: Split, data: Path) -> Callable[[Array], Array]:
    from edgekd.training.evaluate import load
    from edgekd.training.svm import fit_svm

    network, trained, _ = load(run)
    return fit_svm(network, point, split=split, data=data, preprocess=trained.preprocess)
