"""edgekd distill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import (
    BadOption,
    BatchOption,
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
    SplitOption,
    WeightsOption,
    WorkersOption,
    next_command,
)
from edgekd.cli.train import STUDENT, _exits, _run


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
    exclude_bad: BadOption = False,
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
