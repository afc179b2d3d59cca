"""`edgekd reproduce`: the papers' tables, measured beside the printed ones."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from edgekd.cli.common import (
    BadOption,
    FoldsOption,
    GroupOption,
    JobsOption,
    SeedsOption,
    SetOption,
    bar,
    echo,
    outside,
    reserve,
    resumable,
    say,
)
from edgekd.errors import ConfigError


def reproduce(
    table: Annotated[
        str, typer.Argument(metavar="[TABLE]", help="Name of a table, such as gao2022-table3; see --list.")
    ] = "",
    data: Annotated[Path | None, typer.Option(help="Folder of class folders with the paper's images.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder for run folders; tables share them.")] = Path("runs/papers"),
    out: Annotated[Path, typer.Option(help="Folder for the tables.")] = Path("benchmarks/results/papers"),
    weights: Annotated[Path | None, typer.Option(help="Folder of ImageNet weights, NETWORK.safetensors each.")] = None,
    row: Annotated[list[str] | None, typer.Option(metavar="LABEL", help="Run this row only; may be repeated.")] = None,
    seeds: SeedsOption = None,
    folds: FoldsOption = None,
    budget: Annotated[str, typer.Option(metavar="1h30m", help="Reduce the runs to fit into this time.")] = "",
    group: GroupOption = None,
    protocol: Annotated[str, typer.Option(help="Train with this protocol instead of the paper's.")] = "",
    substitutes: Annotated[
        list[str] | None,
        typer.Option("--substitute", metavar="NETWORK=OTHER", help="Replace one network by another."),
    ] = None,
    set_: SetOption = None,
    exclude_bad: BadOption = False,
    jobs: JobsOption = 1,
    list_: Annotated[
        bool, typer.Option("--list", help="List the rows of all tables, or of one, and their state.")
    ] = False,
) -> None:
    """Reproduce a paper's table: run the missing jobs, keep finished ones, and print our numbers beside the paper's."""
    if list_:
        _list(table, out)
        return
    if not table or data is None:
        raise ConfigError("no table and images given", fix="edgekd reproduce TABLE --data DIR, or --list")
    from edgekd import config
    from edgekd.errors import TrainingError
    from edgekd.files import PAPER, RESULT
    from edgekd.reproduce.execute import Options, stem
    from edgekd.reproduce.execute import reproduce as run
    from edgekd.reproduce.report import text
    from edgekd.training.jobs import failure_reason

    options = Options(
        data=data,
        runs=runs,
        out=out,
        weights=weights,
        protocol=protocol,
        overrides=config.parse_overrides(set_ or []),
        substitutes=dict(_pair(text) for text in substitutes or []),
        group=group,
        rows=tuple(row or ()),
        seeds=seeds,
        folds=folds,
        budget=budget,
        at_once=jobs,
        exclude_bad=exclude_bad,
    )
    outside(runs, data)
    name = stem(table, options.group)
    reserve(out / f"{name}.json", RESULT, data=data)
    reserve(out / f"{name}.md", PAPER)
    with bar("check images") as checked, resumable(runs, "the same command"):
        result, failed = run(
            table, options, say=echo, on_check=checked, on_end=lambda job, state: say(f"{job.name}: {state}")
        )
    echo(text(result))
    if failed:
        lines = [f"  {name}: {failure_reason(log)} ({log})" for name, log in failed.items()]
        raise TrainingError(
            "\n".join([f"{len(failed)} of the runs failed:", *lines]),
            fix="fix the cause and run the same command again: finished runs are kept",
        )


def _pair(text: str) -> tuple[str, str]:
    name, sign, other = text.partition("=")
    if not (name and sign and other):
        raise ConfigError(
            f"--substitute {text} is not NETWORK=OTHER", fix="for example --substitute resnest50d=resnet50"
        )
    return name, other


def _list(table: str, out: Path) -> None:
    from edgekd.reproduce import table_spec
    from edgekd.reproduce.report import row_states

    for name in [table] if table else table_spec.names():
        echo(f"{name}: {table_spec.read(name).caption}", bold=True)
        rows = row_states(name, out)
        wide = max(len(label) for label, _, _ in rows)
        for label, state, why in rows:
            echo(f"  {label:<{wide}}  {state}" + (f": {why}" if why else ""))
