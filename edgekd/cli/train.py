"""edgekd train, and what it shares with edgekd distill."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgekd import config
from edgekd.cli.common import (
    BadOption,
    DataOption,
    FoldsOption,
    GroupOption,
    JobsOption,
    LabelsOption,
    OutOption,
    SeedsOption,
    SetOption,
    SizeOption,
    bar,
    echo,
    next_command,
    outside,
    reserve,
    resumable,
)
from edgekd.errors import ConfigError
from edgekd.training.request import TrainRequest

if TYPE_CHECKING:
    from edgekd.training.protocol import Protocol

SHARED_OPTIONS: dict[str, Any] = {
    "protocol": Annotated[
        str | None, typer.Option(help="Shipped protocol or a .toml file; default: finetune.", show_default=False)
    ],
    "weights": Annotated[str | None, typer.Option(help="Initial weights: hub, none, a file or a run folder.")],
    "epochs": Annotated[int | None, typer.Option(help="Passes over the training images.")],
    "lr": Annotated[float | None, typer.Option("--lr", help="Peak learning rate.")],
    "batch_size": Annotated[int | None, typer.Option("--batch-size", help="Batch size of each process.")],
    "image_size": SizeOption,
    "seed": Annotated[int | None, typer.Option(help="Seed of split, initial weights and augmentation.")],
    "split": Annotated[
        str | None,
        typer.Option(help="ratio:3,1,1 (train, val, test), ratio:3,1,1,1 (and certify), kfold:5, or a split.json."),
    ],
    "fold": Annotated[int | None, typer.Option(help="Fold of kfold that is the test subset.")],
    "group": GroupOption,
    "precision": Annotated[
        str | None,
        typer.Option("--precision", help="auto (the fastest on this machine), 32-true, bf16-mixed or 16-mixed."),
    ],
    "workers": Annotated[
        int | None, typer.Option("--workers", help="Processes that load images; 0 loads them in the training process.")
    ],
    "overrides": SetOption,
    "labels": LabelsOption,
    "resume": Annotated[bool, typer.Option("--resume", help="Resume an interrupted run.")],
    "exclude_bad": BadOption,
    "devices": Annotated[int, typer.Option(help="GPUs or processes (under torchrun).")],
    "seeds": SeedsOption,
    "folds": FoldsOption,
    "jobs": JobsOption,
}
"""Options of train and distill, by field of `TrainRequest`."""
STUDENT_SETTINGS = (
    *("protocol", "epochs", "lr", "batch_size", "image_size", "precision", "workers", "overrides"),
    *("labels", "exclude_bad"),
)
"""Fields of a teacher's request that also apply to its student."""
TEACHER_ONLY = ("network=", "method=", "exits=", "weights=")
"""Overrides of a teacher's request that do not apply to its student."""


def training_command(**options: Any) -> Callable[[Callable[[TrainRequest], None]], Callable[..., None]]:
    """Return a decorator that makes a function of a `TrainRequest` a command with the options of its fields.

    Args:
        options: The command's own options, annotated as Typer takes them, by field of `TrainRequest`.
    """
    defaults = {field.name: field.default for field in fields(TrainRequest)}

    def parameter(name: str, annotation: Any) -> inspect.Parameter:
        default = {MISSING: inspect.Parameter.empty, (): None}.get(defaults[name], defaults[name])
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    def decorate(function: Callable[[TrainRequest], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**given: Any) -> None:
            given["overrides"] = tuple(given["overrides"] or ())
            function(TrainRequest(command=function.__name__, **given))  # type: ignore[arg-type]

        shown = {"data": DataOption, "out": OutOption, **options, **SHARED_OPTIONS}
        command.__signature__ = inspect.Signature([parameter(*one) for one in shown.items()])  # type: ignore[attr-defined]
        return command

    return decorate


@training_command(
    network=Annotated[
        str | None,
        typer.Option("--model", help="Any timm or torchvision classifier, or a student; default: the protocol's."),
    ]
)
def train(request: TrainRequest) -> None:
    """Train a teacher or a plain network on labels alone, into a run folder, or one for each seed and fold."""
    protocol = run_training(request)
    settings = replace(request, overrides=tuple(o for o in request.overrides if not o.startswith(TEACHER_ONLY)))
    sweep = ("split", "group", "fold", "seeds", "folds", "jobs") if request.is_sweep else ()
    weights = _students_weights(protocol, request.out)
    first = ["--weights", weights] if weights else []
    out = request.out
    student = out.with_name("student" if out.name != "student" else "student-2")
    words = [*first, *settings.words(*STUDENT_SETTINGS, *sweep)]
    next_command("distill", "--data", request.data, "--teacher", out, *words, "--out", student)


def run_training(request: TrainRequest) -> Protocol:
    """Train the run, or the sweep, that is requested.

    Returns:
        The settings of the run; of a sweep, those that its runs share.
    """
    from edgekd.training.resolve import resolve
    from edgekd.training.run_folder import PROTOCOL

    outside(request.out, request.data)
    protocol = resolve(request)
    if request.is_sweep:
        reserve(request.out)
        with resumable(request.out):
            _train_sweep(request, protocol)
    else:
        with resumable(request.out / PROTOCOL):
            _train(request, protocol)
    return protocol


def _students_weights(protocol: Protocol, run: Path) -> str | None:
    """Return a student's initial weights after this run: the run's if they fit the student, else those of this run."""
    from edgekd.models.networks import hub_name
    from edgekd.training.resolve import DEFAULT_STUDENT

    if protocol.network.removeprefix("multi-exit-") == hub_name(DEFAULT_STUDENT):
        return str(run)
    return protocol.weights if protocol.weights in ("none", "hub") else None


def _train_sweep(request: TrainRequest, protocol: Protocol) -> None:
    from edgekd.errors import TrainingError
    from edgekd.training import sweep
    from edgekd.training.jobs import failure_reason

    out = request.out
    states = sweep.run_sweep(request, protocol, on_end=lambda job, state: echo(f"{out / job.name}: {state}"))
    echo(sweep.summary_text(json.loads((out / sweep.SUMMARY).read_text())))
    if failed := [out / f"{name}.log" for name, state in states.items() if state == "failed"]:
        lines = [f"{len(failed)} of {len(states)} runs failed; each log ends with the reason:"]
        lines += [f"  {log}: {failure_reason(log)}" for log in failed]
        raise TrainingError(
            "\n".join(lines), fix="fix the cause and run the same command with --resume: finished runs are kept"
        )


def _train(request: TrainRequest, protocol: Protocol) -> None:
    from edgekd.data.splitting import summary
    from edgekd.training.train import train

    with bar("check images") as checked, bar("train") as trained:
        history = train(
            request.data,
            request.out,
            protocol=protocol,
            labels=request.labels,
            resume=request.resume,
            exclude_bad=request.exclude_bad,
            devices=request.devices,
            on_check=checked,
            on_split=lambda split: echo(summary(split)),
            progress=trained,
        )
    best = max(history, key=lambda row: (row["val_ensemble"], row["epoch"]))
    echo(f"{request.out}: best epoch {best['epoch']:.0f}, validation accuracy {best['val_ensemble']:.2%}")


def data_folder(run: Path, data: Path | None) -> Path:
    """Return the images given, or those that a run folder was trained on.

    Raises:
        ConfigError: Neither is a folder.
    """
    if data is None and (run / "protocol.toml").is_file():
        from edgekd.training.protocol import Protocol

        data = Path(config.load(Protocol, "protocols", str(run / "protocol.toml")).data)
    if data is None or not data.is_dir():
        raise ConfigError(f"no images at {data}", fix="give their folder with --data")
    return data
