"""Commands that need torch: train, distill, evaluate (of run folders) and export."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd.cli.common import (
    BadOption,
    DataFolder,
    DataOption,
    DevicesOption,
    EpochsOption,
    FoldOption,
    GroupOption,
    OutOption,
    ProtocolOption,
    ResumeOption,
    SeedOption,
    SetOption,
    SizeOption,
    SplitFile,
    SplitOption,
    ThreadsOption,
    WeightsOption,
    bar,
    next_command,
    part_named,
    read_or_scan,
)
from edgekd.errors import ConfigError

if TYPE_CHECKING:
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
) -> None:
    """Train a teacher or a plain network: images to a run folder."""
    flags: dict[str, Any] = {
        "data": str(data.resolve()),
        "network": model,
        "method": "ce",
        "weights": weights,
        "epochs": epochs,
        "preprocess.image_size": image_size,
    }
    flags |= {"seed": seed, "split": split, "fold": fold, "group": group}
    asked = _protocol(protocol, out, flags, set_, resume=resume)
    _train(data, out, asked, None, resume, leave_out_bad, devices)
    next_command(f"edgekd distill --data {data} --teacher {out} --student multi-exit-resnet18 --out runs/student")


def distill(
    data: DataOption,
    out: OutOption,
    teacher: Annotated[Path | None, typer.Option(help="Run folder of the teacher.")] = None,
    student: Annotated[str, typer.Option(help="Multi-exit network.")] = "multi-exit-resnet18",
    method: Annotated[str | None, typer.Option(help="ce, kd, sd or kd+sd.")] = None,
    exits: Annotated[str | None, typer.Option(help="Stages that end in an exit, for example 1,2,3,4.")] = None,
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
) -> None:
    """Train a multi-exit student, with or without a teacher: images to a run folder."""
    if split is None and group is None and teacher is not None and not resume:
        split = str(teacher / "split.json")
    flags: dict[str, Any] = {
        "data": str(data.resolve()),
        "network": student,
        "method": method,
        "weights": weights,
        "epochs": epochs,
        "preprocess.image_size": image_size,
    }
    flags |= {"seed": seed, "split": split, "fold": fold, "group": group, "exits": _exits(exits)}
    asked = _protocol(protocol, out, flags, set_, resume=resume)
    _train(data, out, asked, teacher, resume, leave_out_bad, devices)
    next_command(f"edgekd export {out} --out student.onnx")


def _exits(text: str | None) -> list[int] | None:
    try:
        return None if text is None else [int(e) for e in text.split(",")]
    except ValueError:
        raise ConfigError(f"--exits {text}: not a list of stages", fix="for example --exits 1,2,3,4") from None


def _protocol(name: str, out: Path, flags: dict[str, Any], pairs: list[str] | None, *, resume: bool) -> Protocol:
    """The protocol asked for; a run that is resumed keeps its own, with what is asked for now on top."""
    from edgekd import specs
    from edgekd.training.protocol import Protocol

    if resume and (out / "protocol.toml").is_file():
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
    part: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    plot: Annotated[Path | None, typer.Option(help="Write the ensemble's confusion matrix as a picture.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    threads: ThreadsOption = None,
) -> None:
    """Accuracy, sensitivity, specificity, precision, F1, confusion matrix and calibration of every exit."""
    import numpy as np

    from edgekd.bench import accuracy
    from edgekd.runtime.images import load_part
    from edgekd.runtime.policy import softmax

    card, logits_of = _answers(target, threads)
    data = _data(target, data)
    if split is None and (target / "split.json").is_file():
        split = target
    chosen = read_or_scan(data, split, card.classes)
    with bar("read images") as progress:
        images, labels = load_part(chosen, part_named(part), data=data, preprocess=card.preprocess, progress=progress)
    probabilities = [softmax(one, 1.0) for one in logits_of(images)]
    rows = {f"exit_{k}": accuracy.metrics(p, labels, card.classes) for k, p in enumerate(probabilities)}
    if len(probabilities) > 1:
        rows["ensemble"] = accuracy.metrics(np.mean(probabilities, axis=0), labels, card.classes)
    last = list(rows.values())[-1]
    if as_json:
        from edgekd.artifact import to_json

        typer.echo(json.dumps({k: json.loads(to_json(v)) for k, v in rows.items()}, indent=1))
    else:
        typer.echo(accuracy.text_table(rows))
        typer.echo(accuracy.confusion_text(last))
    if plot:
        from edgekd.bench.report import confusion_png

        confusion_png(last, plot)
    if (target / "split.json").is_file() and not as_json:
        next_command(f"edgekd export {target} --out student.onnx")


def _answers(target: Path, threads: int | None) -> tuple[Any, Callable[[Any], Any]]:
    """(card or header, images to logits (E, N, C)) of a run folder, student.onnx or engine."""
    if (target / "model.safetensors").is_file() or (target / "protocol.toml").is_file():
        from edgekd.training.evaluate import logits
        from edgekd.training.run import load_model

        network, header = load_model(target)
        return header, lambda images: logits(network, images)
    from edgekd.engines import open_engine

    engine = open_engine(target, threads=threads)
    return engine.card, engine.logits


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
        answer = network(torch.from_numpy(batch[:1]))
    card = header.card(len(answer.logits), len(answer.maps))
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
