"""Commands that need torch: train, distill, evaluate (of run folders) and export."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from edgekd.cli.common import (
    BadOption,
    DataFolder,
    DataOption,
    DevicesOption,
    EpochsOption,
    FoldOption,
    FoldsOption,
    GroupOption,
    JobsOption,
    OutOption,
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
    bar,
    next_command,
    one_of,
    read_or_scan,
)
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.artifact import Part, Split
    from edgekd.training.protocol import Protocol


def train(
    data: DataOption,
    out: OutOption,
    model: Annotated[str, typer.Option(help="Any timm or torchvision classifier, or a student.")],
    protocol: ProtocolOption = "finetune",
    weights: WeightsOption = None,
    epochs: EpochsOption = None,
    image_size: SizeOption = None,
    seed: SeedOption = None,
    split: SplitOption = None,
    fold: FoldOption = None,
    group: GroupOption = None,
    set_: SetOption = None,
    resume: ResumeOption = False,
    leave_out_bad: BadOption = False,
    devices: DevicesOption = 1,
    seeds: SeedsOption = None,
    folds: FoldsOption = None,
    jobs: JobsOption = 1,
) -> None:
    """Train a teacher or a plain network: images to a run folder, or to one for each seed and fold."""
    _run(locals(), {"network": model, "method": "ce"}, teacher=None)
    next_command(f"edgekd distill --data {data} --teacher {out} --student multi-exit-resnet18 --out runs/student")


def distill(
    data: DataOption,
    out: OutOption,
    teacher: Annotated[Path | None, typer.Option(help="Run folder of the teacher, or its sweep.")] = None,
    student: Annotated[str, typer.Option(help="Multi-exit network.")] = "multi-exit-resnet18",
    method: Annotated[str | None, typer.Option(help="Names joined with +: ce, kd, sd, at, …")] = None,
    exits: Annotated[
        str | None, typer.Option(help="Stages or feature points that end in an exit: 1,2,3,4 or blocks.2,final.")
    ] = None,
    protocol: ProtocolOption = "finetune",
    weights: WeightsOption = None,
    epochs: EpochsOption = None,
    image_size: SizeOption = None,
    seed: SeedOption = None,
    split: SplitOption = None,
    fold: FoldOption = None,
    group: GroupOption = None,
    set_: SetOption = None,
    resume: ResumeOption = False,
    leave_out_bad: BadOption = False,
    devices: DevicesOption = 1,
    seeds: SeedsOption = None,
    folds: FoldsOption = None,
    jobs: JobsOption = 1,
) -> None:
    """Train a multi-exit student, with or without a teacher: images to a run folder, or one for each seed and fold."""
    run = _run(locals(), {"network": student, "method": method, "exits": _exits(exits)}, teacher=teacher)
    next_command(f"edgekd export {run} --out student.onnx")


def _run(given: dict[str, Any], flags: dict[str, Any], *, teacher: Path | None) -> Path:
    """What `train` and `distill` do with their options: one run, or a sweep; returns a run folder."""
    data, out, resume = given["data"], given["out"], given["resume"]
    flags |= {name: given[name] for name in ("weights", "epochs", "seed", "split", "fold", "group")}
    flags |= {"data": str(data.resolve()), "preprocess.image_size": given["image_size"]}
    as_teacher = teacher is not None and given["split"] is None and given["group"] is None
    if given["seeds"] or given["folds"]:
        return _sweep(given, _protocol(given["protocol"], out, flags, given["set_"]), teacher, as_teacher=as_teacher)
    resumed = resume and (out / "protocol.toml").is_file()
    if as_teacher and not resumed:
        flags["split"] = f"{teacher}/split.json"
    asked = _protocol(given["protocol"], out, flags, given["set_"], resume=resumed)
    _train(data, out, asked, teacher, resume, given["leave_out_bad"], given["devices"])
    return Path(out)


def _sweep(given: dict[str, Any], protocol: Protocol, teacher: Path | None, *, as_teacher: bool) -> Path:
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
        teacher=teacher,
        keep_split=not as_teacher,
        resume=given["resume"],
        leave_out_bad=given["leave_out_bad"],
        at_once=given["jobs"],
        on_end=lambda job, state: typer.echo(f"{out / job.name}: {state}"),
    )
    typer.echo(sweep.summary_text(json.loads((out / sweep.SUMMARY).read_text())))
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


def _protocol(
    name: str, out: Path, flags: dict[str, Any], pairs: list[str] | None, *, resume: bool = False
) -> Protocol:
    """The protocol asked for; a run that is resumed keeps its own, with what is asked for now on top."""
    from edgekd import specs
    from edgekd.training.protocol import Protocol

    if resume:
        name, flags = str(out / "protocol.toml"), {k: v for k, v in flags.items() if k != "method"}
    overrides = {k: v for k, v in flags.items() if v is not None} | specs.parse_overrides(pairs or [])
    return specs.load(Protocol, "protocols", name, overrides=overrides)


def _train(
    data: Path, out: Path, protocol: Protocol, teacher: Path | None, resume: bool, leave_out_bad: bool, devices: int
) -> None:
    from edgekd.data.splits import summary
    from edgekd.training.train import train

    with bar("check images") as checked, bar("train") as trained:
        history = train(
            data,
            out,
            protocol=protocol,
            teacher=teacher,
            resume=resume,
            leave_out_bad=leave_out_bad,
            devices=devices,
            on_check=checked,
            on_split=lambda split: typer.echo(summary(split)),
            progress=trained,
        )
    best = max(history, key=lambda row: (row["val_ensemble"], row["epoch"]))
    typer.echo(f"{out}: best epoch {best['epoch']:.0f}, validation accuracy {best['val_ensemble']:.2%}")


def evaluate(
    target: Annotated[Path, typer.Argument(help="Run folder, student.onnx or student.engine.")],
    data: DataFolder = None,
    split: SplitFile = None,
    part: Annotated[str, typer.Option(help="train, val or test.", callback=one_of("train", "val", "test"))] = "test",
    plot: Annotated[Path | None, typer.Option(help="Write the ensemble's confusion matrix as a picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the measures as JSON, with what they were made on.")] = None,
    svm: Annotated[
        str | None, typer.Option(metavar="POINT", help="Of a linear SVM on this feature point instead.")
    ] = None,
    threads: ThreadsOption = None,
) -> None:
    """Accuracy, sensitivity, specificity, precision, F1, confusion matrix and calibration of every exit."""
    import numpy as np

    from edgekd.bench import accuracy
    from edgekd.bench.host import host
    from edgekd.files import atomic_write, to_json
    from edgekd.runtime.images import load_part
    from edgekd.runtime.policy import softmax

    card, logits_of, device = _answers(target, threads)
    data = _data(target, data)
    if split is None and (target / "split.json").is_file():
        split = target
    chosen = read_or_scan(data, split, card.classes)
    if svm is not None:
        logits_of = _svm(target, svm, chosen, data)
    with bar("read images") as progress:
        images, labels = load_part(chosen, cast("Part", part), data=data, preprocess=card.preprocess, progress=progress)
    probabilities = [softmax(one, 1.0) for one in logits_of(images)]
    rows = {f"exit_{k}": accuracy.metrics(p, labels, card.classes) for k, p in enumerate(probabilities)}
    if len(probabilities) > 1:
        rows["ensemble"] = accuracy.metrics(np.mean(probabilities, axis=0), labels, card.classes)
    last = list(rows.values())[-1]
    plain = {name: dataclasses.asdict(row) for name, row in rows.items()}
    if out:
        made_on = {"device": device, "host": dataclasses.asdict(host())}
        atomic_write(out, to_json({"part": part, "metrics": plain, **made_on}))
    if as_json:
        typer.echo(json.dumps(plain, indent=1))
    else:
        typer.echo(accuracy.text_table(rows))
        typer.echo(accuracy.confusion_text(last))
    if plot:
        from edgekd.bench.report import confusion_png

        confusion_png(last, plot)
    if (target / "split.json").is_file() and not as_json:
        next_command(f"edgekd export {target} --out student.onnx")


def _answers(target: Path, threads: int | None) -> tuple[Any, Callable[[Any], Any], str]:
    """(card or header, images to logits (E, N, C), what runs it) of a run folder, student.onnx or engine."""
    if (target / "model.safetensors").is_file() or (target / "protocol.toml").is_file():
        from edgekd.training.evaluate import load, logits

        network, header, device = load(target)
        return header, lambda images: logits(network, images), device
    from edgekd.engines import open_engine

    engine = open_engine(target, threads=threads)
    return engine.card, engine.logits, engine.backend


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
    from edgekd.runtime.images import load_part
    from edgekd.training.run import load_model

    network, header = load_model(run)
    split, data = read_split(run), _data(run, data)
    batch, _ = load_part(split, "val", data=data, preprocess=header.preprocess, limit=images)
    with torch.no_grad():
        card = header.card(network(torch.from_numpy(batch[:1])))
    worst = export(network, card, out=out, images=batch, names=[i.path for i in split.part("val")])
    typer.echo(f"{out}: {len(card.exits)} exits, largest difference from torch {worst:.1e} on {len(batch)} images")
    engine, files = out.with_suffix(".engine"), f"--data {data} --split {run / 'split.json'}"
    next_command(f"edgekd compile {out} --recipe int8 {files} --out {engine}")


def _data(run: Path, data: Path | None) -> Path:
    """The images given, or those that a run folder was trained on."""
    from edgekd import specs
    from edgekd.training.protocol import Protocol

    if data is None and (run / "protocol.toml").is_file():
        data = Path(specs.load(Protocol, "protocols", str(run / "protocol.toml")).data)
    if data is None or not data.is_dir():
        raise ConfigError(f"no images at {data}", fix="give their folder with --data")
    return data
