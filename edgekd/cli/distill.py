"""edgekd distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import next_command
from edgekd.cli.train import run_training, training_command
from edgekd.errors import ConfigError
from edgekd.training.request import TrainRequest


def parse_exits(text: str | None) -> tuple[int | str, ...] | None:
    """Return the stage numbers and names of feature points in `2,blocks.6,final`.

    Raises:
        ConfigError: An empty entry.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ConfigError(f"--exits {text}: an exit without a name", fix="for example --exits 1,2,3,4")
    return tuple(int(name) if name.isdecimal() else name for name in names)


@training_command(
    teacher=Annotated[Path | None, typer.Option(help="Run folder of the teacher, or its sweep.")],
    network=Annotated[
        str | None,
        typer.Option("--student", help="Multi-exit network; default: the protocol's, or multi-exit-resnet18."),
    ],
    method=Annotated[str | None, typer.Option(help="Names joined with +: ce, kd, sd, at, …")],
    exits=Annotated[
        str | None,
        typer.Option(
            help="Stages or feature points that end in an exit: 1,2,3,4 or blocks.2,final.", callback=parse_exits
        ),
    ],
)
def distill(request: TrainRequest) -> None:
    """Train a multi-exit student, with or without a teacher, into a run folder, or one for each seed and fold."""
    protocol = run_training(request)
    run = request.out
    if request.is_sweep:
        from edgekd.training.sweep import sweep_members

        run /= sweep_members(request.seeds, request.folds, protocol)[0].name
    next_command("export", run, "--out", run.with_name(f"{run.name}.onnx"))
