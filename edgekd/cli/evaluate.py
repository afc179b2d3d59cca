"""`edgekd evaluate`: metrics of a run folder, student.onnx or engine."""

from __future__ import annotations

import csv
import dataclasses
import functools
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
    from edgekd.policy import Decision
    from edgekd.runtime.engine import Engine
    from edgekd.types import Array, Labels


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
    against: Annotated[
        Path | None, typer.Option(help="Compare with this run folder, student.onnx or engine on the same images.")
    ] = None,
    specificity: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Specificity at which each class's sensitivity is given, 0 to 1.")
    ] = 0.95,
    plot_calibration: Annotated[
        Path | None, typer.Option(help="Write the reliability diagram: .png, .svg or .pdf.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Print accuracy, rates of each class with intervals, confusion matrix and calibration of every exit.

    For a tuned engine, its cascade has a row, too, and is compared with the same network without early exit.
    """
    from edgekd.backends.report import describe_host
    from edgekd.bench import plots
    from edgekd.bench.accuracy import gap
    from edgekd.bench.evaluation import evaluate_decisions
    from edgekd.bench.intervals import group_numbers
    from edgekd.data.images import load_subset
    from edgekd.files import MEASURES, PLOT, atomic_write
    from edgekd.serialization import to_json

    for picture in filter(None, (plot, plot_calibration)):
        plots.picture_format(picture)
    own = _open(target, threads)
    other = _open(against, threads) if against else None
    if other and other.classes != own.classes:
        what = f"{against} has the classes {', '.join(other.classes)}; {target} has {', '.join(own.classes)}"
        raise ConfigError(what, fix="compare networks with the same classes, in the same order")
    data = data_folder(target, data)
    reserve(out, MEASURES, data=data)
    reserve(plot, PLOT, data=data)
    reserve(plot_calibration, PLOT, data=data)
    if labels and split:
        raise ConfigError("--labels and --split", fix="give one of them")
    if not labels and split is None and (target / "split.json").is_file():
        split = target
    chosen = read_or_scan(data, split, own.classes, labels=labels)
    if svm is not None:
        own = own._replace(logits=_svm(target, svm, chosen, data))

    def decide(of: _Target) -> tuple[dict[str, Decision], Labels]:
        with bar("read images") as progress:
            images, truth = load_subset(
                chosen, cast(Subset, subset), data=data, preprocess=of.preprocess, progress=progress
            )
        return _decisions(of, images), truth

    decisions, truth = decide(own)
    found = evaluate_decisions(
        decisions,
        truth,
        own.classes,
        groups=group_numbers(chosen.subset(cast(Subset, subset))),
        specificity=specificity,
        against=decide(other)[0] if other else None,
        name=against.name if against else "",
    )
    last = list(found.rows.values())[-1]
    known = _validated(target)
    if subset == "test" and known and (note := gap(found.rows[known[0]], accuracy=known[1], images=known[2])):
        say(f"note: {note}")
    if out:
        environment = {"device": own.device, "host": dataclasses.asdict(describe_host())}
        atomic_write(out, to_json({"subset": subset, "metrics": found.table(), **environment}))
    echo(json.dumps(found.table(), indent=1) if as_json else found.text())
    if plot:
        plots.write_confusion(last, plot)
    if plot_calibration:
        plots.write_reliability(last, plot_calibration)
    if (target / "split.json").is_file() and not as_json:
        next_command("export", target, "--out", target.with_name(f"{target.name}.onnx"))


class _Target(NamedTuple):
    """The evaluated model.

    Attributes:
        classes: Class names.
        preprocess: Its preprocessing.
        logits: Function from images (N, 3, H, W) to logits (E, N, C).
        device: Where it runs.
        name: Name for tables.
        engine: The engine; None for a run folder.
    """

    classes: tuple[str, ...]
    preprocess: Preprocess
    logits: Callable[[Array], Array]
    device: str
    name: str
    engine: Engine | None = None


def _open(target: Path, threads: int | None) -> _Target:
    """Open a run folder, student.onnx or engine."""
    if (target / "model.safetensors").is_file() or (target / "protocol.toml").is_file():
        from edgekd.training.evaluate import load, logits

        network, trained, device = load(target)
        own = functools.partial(logits, network)
        return _Target(trained.classes, trained.preprocess, own, device, target.name)
    from edgekd.runtime.engine import open_engine

    engine = open_engine(target, threads=threads)
    of = engine.metadata
    return _Target(of.classes, of.preprocess, engine.logits, engine.backend.name, engine.name, engine)


def _decisions(target: _Target, images: Array) -> dict[str, Decision]:
    """Return the answers of each exit, of the ensemble, and of a tuned engine's cascade without and with early exit.

    The last ones are those that `edgekd predict` gives.
    """
    import numpy as np

    from edgekd.bench.variants import make_predictor
    from edgekd.policy import Decision, Policy, confidence, ensemble, softmax

    def decision(probabilities: Array, exit: int) -> Decision:
        exits = np.full(len(probabilities), exit, np.int64)
        return Decision(probabilities, exits, confidence(probabilities, policy.confidence))

    logits = target.logits(images)
    policy = target.engine.metadata.policy if target.engine else Policy((1.0,) * len(logits))
    found = {f"exit_{k}": decision(softmax(one, t), k) for k, (one, t) in enumerate(zip(logits, policy.temperatures))}
    if len(logits) > 1:
        found["ensemble"] = decision(ensemble(logits), len(logits) - 1)
        if target.engine and policy.is_tuned:
            for name in ("no-early-exit", "cascade"):
                found[name] = make_predictor(target.engine, name)(images)
    return found


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
