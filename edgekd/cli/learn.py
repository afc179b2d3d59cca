"""Commands that need torch: train, distill, evaluate (of run folders) and export."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgekd.cli.common import (
    BadOption,
    BatchOption,
    DataFolder,
    DataOption,
    DevicesOption,
    EpochsOption,
    FoldOption,
    FoldsOption,
    GroupOption,
    JobsOption,
    LabelsOption,
    LrOption,
    OutOption,
    PrecisionOption,
    ProtocolOption,
    ResumeOption,
    SeedOption,
    SeedsOption,
    SetOption,
    SizeOption,
    SplitFile,
    SplitOption,
    ThreadsOption,
    WeightsOption,
    WorkersOption,
    bar,
    echo,
    next_command,
    one_of,
    outside,
    read_or_scan,
    reserve,
    resumable,
    say,
)
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.artifact import Part, Split
    from edgekd.training.protocol import Protocol


STUDENT = "multi-exit-resnet18"
SAME = ("weights", "epochs", "lr", "batch_size", "seed", "split", "fold", "group", "precision", "workers")
"""Options of train and distill that are called like the protocol's key."""
SETTINGS = (
    *("protocol", "weights", "epochs", "lr", "batch_size", "image_size", "precision", "workers", "set_"),
    *("labels", "leave_out_bad"),
)
"""Options of train that hold for its student, too."""
NETWORKS_OWN = ("network=", "method=", "exits=", "weights=")
"""What is set for a network and not for its student."""


def train(
    data: DataOption,
    out: OutOption,
    model: Annotated[
        str | None, typer.Option(help="Any timm or torchvision classifier, or a student; else the protocol's.")
    ] = None,
    protocol: ProtocolOption = None,
    weights: WeightsOption = None,
    epochs: EpochsOption = None,
    lr: LrOption = None,
    batch_size: BatchOption = None,
    image_size: SizeOption = None,
    seed: SeedOption = None,
    split: SplitOption = None,
    fold: FoldOption = None,
    group: GroupOption = None,
    precision: PrecisionOption = None,
    workers: WorkersOption = None,
    set_: SetOption = None,
    labels: LabelsOption = None,
    resume: ResumeOption = False,
    leave_out_bad: BadOption = False,
    devices: DevicesOption = 1,
    seeds: SeedsOption = None,
    folds: FoldsOption = None,
    jobs: JobsOption = 1,
) -> None:
    """Train a teacher or a plain network on labels alone: images to a run folder, or to one for each seed and fold."""
    given = locals()
    _, made = _run(given, {"network": ("--model", model)}, method="ce")
    many = ("split", "group", "fold", "seeds", "folds", "jobs") if seeds or folds else ()
    first = _first_weights(made, out)
    again = _again(given | {"weights": first}, *SETTINGS, *many)
    student = out.with_name("student" if out.name != "student" else "student-2")
    next_command("distill", "--data", data, "--teacher", out, *again, "--out", student)


def distill(
    data: DataOption,
    out: OutOption,
    teacher: Annotated[Path | None, typer.Option(help="Run folder of the teacher, or its sweep.")] = None,
    student: Annotated[
        str | None,
        typer.Option(help=f"Multi-exit network; else the protocol's, else {STUDENT}.", show_default=False),
    ] = None,
    method: Annotated[str | None, typer.Option(help="Names joined with +: ce, kd, sd, at, …")] = None,
    exits: Annotated[
        str | None, typer.Option(help="Stages or feature points that end in an exit: 1,2,3,4 or blocks.2,final.")
    ] = None,
    protocol: ProtocolOption = None,
    weights: WeightsOption = None,
    epochs: EpochsOption = None,
    lr: LrOption = None,
    batch_size: BatchOption = None,
    image_size: SizeOption = None,
    seed: SeedOption = None,
    split: SplitOption = None,
    fold: FoldOption = None,
    group: GroupOption = None,
    precision: PrecisionOption = None,
    workers: WorkersOption = None,
    set_: SetOption = None,
    labels: LabelsOption = None,
    resume: ResumeOption = False,
    leave_out_bad: BadOption = False,
    devices: DevicesOption = 1,
    seeds: SeedsOption = None,
    folds: FoldsOption = None,
    jobs: JobsOption = 1,
) -> None:
    """Train a multi-exit student, with or without a teacher: images to a run folder, or one for each seed and fold."""
    given = locals()
    flags = {"network": ("--student", student), "method": ("--method", method), "exits": ("--exits", _exits(exits))}
    run, _ = _run(given, flags | {"teacher": ("--teacher", teacher and str(teacher.resolve()))})
    next_command("export", run, "--out", run.with_name(f"{run.name}.onnx"))


def _run(given: dict[str, Any], flags: dict[str, tuple[str, Any]], *, method: str = "") -> tuple[Path, Protocol]:
    """What `train` and `distill` do with their options: one run, or a sweep; a run folder and what was asked for.

    flags: protocol key to the option that gives it, and its value. method: the command's own, whatever the protocol
    says, unless `--set` does.
    """
    from edgekd import specs
    from edgekd.training.protocol import refuse_other_settings

    data, out, name = given["data"], given["out"], given["protocol"]
    outside(out, data)
    flags |= {key: (f"--{key.replace('_', '-')}", given[key]) for key in SAME}
    flags |= {"data": ("--data", str(data.resolve())), "preprocess.image_size": ("--image-size", given["image_size"])}
    values = {key: value for key, (_, value) in flags.items() if value is not None}
    values |= specs.parse_overrides(given["set_"] or [])
    many = given["seeds"] or given["folds"]
    own = out / "protocol.toml"
    resumed = given["resume"] and not many and own.is_file()
    if resumed and name is None:
        asked = _load(str(own), values, flags)
    else:
        asked = _fresh(name, values, flags, method)
        as_teacher = asked.teacher and not {"split", "group"} & values.keys() and not Path(asked.split).is_file()
        if many:
            reserve(out)
            with resumable(out):
                return _sweep(given, asked, as_teacher=bool(as_teacher)), asked
        if as_teacher:
            asked = dataclasses.replace(asked, split=f"{asked.teacher}/split.json")
    if resumed:
        made = _load(str(own), {}, {})
        refuse_other_settings(out, made, asked)
        asked = dataclasses.replace(made, data=asked.data, workers=asked.workers)
    with resumable(own):
        _train(asked, given)
    return out, asked


def _load(name: str, values: dict[str, Any], flags: dict[str, tuple[str, Any]]) -> Protocol:
    from edgekd import specs
    from edgekd.training.protocol import Protocol

    flag_of = {key: flag for key, (flag, value) in flags.items() if value is not None}
    return specs.load(Protocol, "protocols", name, overrides=values, flags=flag_of)


def _fresh(name: str | None, values: dict[str, Any], flags: dict[str, tuple[str, Any]], method: str) -> Protocol:
    """The protocol with what was given on top; the command's own method and student where nothing else says."""
    asked = _load(name or "finetune", values, flags)
    if method and "method" not in values:
        if asked.method != method and Path(name or "").suffix:
            say(f"train learns from labels alone; the method {asked.method} in {name} is for edgekd distill")
        asked = dataclasses.replace(asked, method=method)
    if method and not asked.network:
        raise ConfigError("no network is named", fix="give one with --model, or as the protocol's network")
    return asked if asked.network else dataclasses.replace(asked, network=STUDENT)


def _again(given: dict[str, Any], *names: str) -> list[str]:
    """The options with these names as they were given."""
    words = []
    for name in names:
        value = given.get(name)
        for one in value if isinstance(value, list) else [value]:
            if one is None or one is False or str(one).startswith(NETWORKS_OWN):
                continue
            words += [f"--{name.strip('_').replace('_', '-')}", *([] if one is True else [str(one)])]
    return words


def _first_weights(made: Protocol, run: Path) -> str | None:
    """What a student starts from after such a run: its weights if they fit the student's backbone, else as it did."""
    from edgekd.models import hub_name

    if made.network and made.network.removeprefix("multi-exit-") == hub_name(STUDENT):
        return str(run)
    return made.weights if made.weights in ("none", "hub") else None


def _sweep(given: dict[str, Any], protocol: Protocol, *, as_teacher: bool) -> Path:
    from edgekd.errors import TrainingError
    from edgekd.training import sweep

    for flag, many, default in (("seed", "seeds", None), ("fold", "folds", None), ("devices", "seeds", 1)):
        if given[flag] != default and (given[many] or flag == "devices"):
            raise ConfigError(f"--{flag} does not go with --{many}", fix="give one of them")
    out, of = given["out"], sweep.members(given["seeds"], given["folds"], protocol)
    states = sweep.sweep(
        given["data"],
        out,
        protocol=protocol,
        of=of,
        teacher=Path(protocol.teacher) if protocol.teacher else None,
        keep_split=not as_teacher,
        labels=given["labels"],
        resume=given["resume"],
        leave_out_bad=given["leave_out_bad"],
        at_once=given["jobs"],
        on_end=lambda job, state: echo(f"{out / job.name}: {state}"),
    )
    echo(sweep.summary_text(json.loads((out / sweep.SUMMARY).read_text())))
    if failed := [name for name, state in states.items() if state == "failed"]:
        raise TrainingError(
            "\n".join([f"{len(failed)} of {len(of)} runs failed; each log ends with the reason:", *_logs(out, failed)]),
            fix="mend it and run the same command with --resume: what is done is kept",
        )
    return Path(out / of[0].name)


def _logs(out: Path, names: list[str]) -> list[str]:
    from edgekd.training.launch import reason

    return [f"  {path}: {reason(path)}" for path in (out / f"{name}.log" for name in names)]


def _exits(text: str | None) -> list[int | str] | None:
    """`2,blocks.6,final` as stage numbers and names of feature points."""
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise ConfigError(f"--exits {text}: an exit without a name", fix="for example --exits 1,2,3,4")
    return [int(part) if part.isdecimal() else part for part in parts]


def _train(protocol: Protocol, given: dict[str, Any]) -> None:
    from edgekd.data.splits import summary
    from edgekd.training.train import train

    with bar("check images") as checked, bar("train") as trained:
        history = train(
            given["data"],
            given["out"],
            protocol=protocol,
            **{name: given[name] for name in ("labels", "resume", "leave_out_bad", "devices")},
            on_check=checked,
            on_split=lambda split: echo(summary(split)),
            progress=trained,
        )
    best = max(history, key=lambda row: (row["val_ensemble"], row["epoch"]))
    echo(f"{given['out']}: best epoch {best['epoch']:.0f}, validation accuracy {best['val_ensemble']:.2%}")


def evaluate(
    target: Annotated[Path, typer.Argument(help="Run folder, student.onnx or student.engine.")],
    data: DataFolder = None,
    split: SplitFile = None,
    labels: LabelsOption = None,
    part: Annotated[str, typer.Option(help="train, val or test.", callback=one_of("train", "val", "test"))] = "test",
    plot: Annotated[Path | None, typer.Option(help="Write the confusion matrix: .png, .svg or .pdf.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the measures as JSON, with what they were made on.")] = None,
    svm: Annotated[
        str | None, typer.Option(metavar="POINT", help="Of a linear SVM on this feature point instead.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Accuracy, sensitivity, specificity, precision, F1, confusion matrix and calibration of every exit."""
    import numpy as np

    from edgekd.bench import accuracy, plots
    from edgekd.bench.host import host
    from edgekd.files import MEASURES, PLOT, atomic_write, to_json
    from edgekd.runtime.images import load_part
    from edgekd.runtime.policy import softmax

    if plot:
        plots.picture_format(plot)
    card, logits_of, device = _answers(target, threads)
    data = _data(target, data)
    reserve(out, MEASURES, data=data)
    reserve(plot, PLOT, data=data)
    if labels and split:
        raise ConfigError("--labels and --split", fix="give one of them")
    if not labels and split is None and (target / "split.json").is_file():
        split = target
    chosen = read_or_scan(data, split, card.classes, labels=labels)
    if svm is not None:
        logits_of = _svm(target, svm, chosen, data)
    with bar("read images") as progress:
        images, truth = load_part(chosen, cast("Part", part), data=data, preprocess=card.preprocess, progress=progress)
    probabilities = [softmax(one, 1.0) for one in logits_of(images)]
    rows = {f"exit_{k}": accuracy.metrics(p, truth, card.classes) for k, p in enumerate(probabilities)}
    if len(probabilities) > 1:
        rows["ensemble"] = accuracy.metrics(np.mean(probabilities, axis=0), truth, card.classes)
    last = list(rows.values())[-1]
    known = _validated(target)
    if part == "test" and known and (note := accuracy.gap(rows[known[0]], accuracy=known[1], images=known[2])):
        say(f"note: {note}")
    plain = {name: dataclasses.asdict(row) for name, row in rows.items()}
    if out:
        made_on = {"device": device, "host": dataclasses.asdict(host())}
        atomic_write(out, to_json({"part": part, "metrics": plain, **made_on}))
    if as_json:
        echo(json.dumps(plain, indent=1))
    else:
        echo(accuracy.text_table(rows))
        echo(accuracy.confusion_text(last))
    if plot:
        plots.write_confusion(last, plot)
    if (target / "split.json").is_file() and not as_json:
        next_command("export", target, "--out", target.with_name(f"{target.name}.onnx"))


def _answers(target: Path, threads: int | None) -> tuple[Any, Callable[[Any], Any], str]:
    """(card or header, images to logits (E, N, C), what runs it) of a run folder, student.onnx or engine."""
    if (target / "model.safetensors").is_file() or (target / "protocol.toml").is_file():
        from edgekd.training.evaluate import load, logits

        network, header, device = load(target)
        return header, lambda images: logits(network, images), device
    from edgekd.engines import open_engine

    engine = open_engine(target, threads=threads)
    return engine.card, engine.logits, engine.backend


def _validated(target: Path) -> tuple[str, float, int] | None:
    """(row, accuracy, images) of what a run folder, or an engine, scored in validation."""
    if (target / "metrics.csv").is_file():
        from edgekd.artifact import read_split

        rows = list(csv.DictReader((target / "metrics.csv").read_text(encoding="utf-8").splitlines()))
        row = "ensemble" if "val_exit_1" in rows[0] else "exit_0"
        return row, max(float(r["val_ensemble"]) for r in rows), len(read_split(target).part("val"))
    if target.is_dir():
        from edgekd.artifact import read_manifest

        if found := read_manifest(target).accuracy:
            return f"exit_{len(found['engine']) - 1}", found["engine"][-1], found["validation_images"]
    return None


def _svm(run: Path, point: str, split: Split, data: Path) -> Callable[[Any], Any]:
    from edgekd.training.evaluate import load
    from edgekd.training.svm import fit_svm

    network, header, _ = load(run)
    return fit_svm(network, point, split=split, data=data, preprocess=header.preprocess)


def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    out: OutOption,
    data: DataFolder = None,
    images: Annotated[int, typer.Option(help="How many validation images to check on.")] = 32,
) -> None:
    """Run folder to student.onnx: opset 17, dynamic batch, checked against torch on real images."""
    import torch

    from edgekd.artifact import read_split
    from edgekd.export import export
    from edgekd.files import NETWORK
    from edgekd.runtime.images import load_part
    from edgekd.training.run import load_model

    network, header = load_model(run)
    split, data = read_split(run), _data(run, data)
    reserve(out, NETWORK, data=data)
    batch, _ = load_part(split, "val", data=data, preprocess=header.preprocess, limit=images)
    with torch.no_grad():
        card = header.card(network(torch.from_numpy(batch[:1])))
    worst = export(network, card, out=out, images=batch, names=[i.path for i in split.part("val")])
    echo(f"{out}: {len(card.exits)} exits, largest difference from torch {worst:.1e} on {len(batch)} images")
    files: tuple[object, ...] = ("--data", data, "--split", run / "split.json", "--out", out.with_suffix(".engine"))
    next_command("compile", out, "--recipe", "int8", *files)


def _data(run: Path, data: Path | None) -> Path:
    """The images given, or those that a run folder was trained on."""
    if data is None and (run / "protocol.toml").is_file():
        data = Path(_load(str(run / "protocol.toml"), {}, {}).data)
    if data is None or not data.is_dir():
        raise ConfigError(f"no images at {data}", fix="give their folder with --data")
    return data
