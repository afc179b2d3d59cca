"""Options, progress bars and data loading shared by the commands."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from edgekd.errors import ConfigError, DataError, check_known
from edgekd.files import Kind, locked, real, refuse_other
from edgekd.text import terminal, visible

if TYPE_CHECKING:
    from edgekd.data.split import Split

DataFolder = Annotated[
    Path | None, typer.Option("--data", help="Data folder; default: the one recorded in the run folder.")
]
DataOption = Annotated[
    Path, typer.Option("--data", help="Folder of class folders, with or without train/ val/ test/ certify/.")
]
OutOption = Annotated[Path, typer.Option("--out", help="Output path.")]
SplitFile = Annotated[Path | None, typer.Option("--split", help="split.json, or the run folder that contains it.")]
LabelsOption = Annotated[
    Path | None,
    typer.Option("--labels", help="CSV file with the columns path, label and, optionally, group and subset."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the protocol, recipe or suite."),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads of the engine; default: all cores.")]
SizeOption = Annotated[int | None, typer.Option(help="Side of the network's input in pixels.")]
GroupOption = Annotated[
    str | None, typer.Option(help="none, a data layout (cluster, slide, …), or a regular expression.")
]
SeedsOption = Annotated[
    str | None, typer.Option(metavar="0,1,2", help="Sweep: one run per seed, in OUT/seed0-fold0 and so on.")
]
FoldsOption = Annotated[str | None, typer.Option(metavar="all|0,1", help="Sweep: one run per fold of --split kfold:K.")]
JobsOption = Annotated[int, typer.Option(min=1, help="Parallel runs of a sweep.")]
BadOption = Annotated[bool, typer.Option("--exclude-bad", help="Exclude unusable images.")]


FIRST_LINE_S, NEXT_LINE_S = 5.0, 15.0
"""Delay of the first progress line where stderr is not a terminal, and interval of the next ones."""


def echo(text: str, *, bold: bool = False) -> None:
    """Print a result, with control characters escaped."""
    typer.secho(terminal(text), bold=bold)


def say(text: str) -> None:
    """Print a message that is not a result, to stderr."""
    sys.stderr.write(terminal(text) + "\n")


class LogFormatter(logging.Formatter):
    """Formats log lines with control characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal(super().format(record))


_reservations = contextlib.ExitStack()


@contextlib.contextmanager
def reserved() -> Iterator[None]:
    """Keep the reservations of a command until it ends."""
    with _reservations:
        yield


def reserve(out: Path | None, kind: Kind | None = None, *, data: Path | None = None) -> None:
    """Check before the work that an output can be written and replaces nothing else, and lock it.

    Args:
        out: The output; nothing happens without one.
        kind: Kind of file that may be replaced; None for a folder.
        data: The data folder, in which the output may not be.

    Raises:
        ConfigError: The output is in the data folder.
        ArtifactError: Something else exists there, or another process is writing it.
    """
    if out is None:
        return
    if data is not None:
        outside(out, data)
    if kind:
        refuse_other(out, kind)
    _reservations.enter_context(locked(out))


def outside(out: Path, data: Path) -> None:
    """Refuse an output in the data folder, where the next scan would find it."""
    if real(out).is_relative_to(real(data)):
        raise ConfigError(f"{out} is in the data folder {data}", fix="choose a path outside of it")


@contextlib.contextmanager
def resumable(started: Path, how: str = "the same command with --resume") -> Iterator[None]:
    """Tell an interrupted user how to resume the run.

    Args:
        started: File that exists as soon as the run can be resumed.
        how: The command that resumes it.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        if started.exists():
            stop.resume = f"\n  fix: {how} resumes the run"  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[..., None]]:
    """Show a progress bar with rate and remaining time, or, where stderr is not a terminal, a line at intervals."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    shown = Progress(
        *columns,
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = shown.add_task(visible(what), total=None, note="", visible=False)
    due = time.monotonic() + FIRST_LINE_S

    def update(done: int, total: int, loss: float | None = None) -> None:
        nonlocal due
        if not shown.disable and not shown.live.is_started:
            shown.start()
        state = shown.tasks[0]
        note = (f"{state.speed:.3g}/s" if state.speed else "") + (f" loss {loss:.3f}" if loss is not None else "")
        shown.update(task, completed=done, total=total, note=note, visible=True)
        if shown.disable and time.monotonic() >= due:
            due = time.monotonic() + NEXT_LINE_S
            left = f"{timedelta(seconds=int(state.time_remaining))} left " if state.time_remaining else ""
            say(f"{what}: {done}/{total} {left}{note}".rstrip())
        if done == total:  # only one bar can be shown at a time
            shown.stop()

    try:
        yield update
    finally:
        shown.stop()


def next_command(*words: object) -> None:
    """Print the command that comes next, quoted for the shell."""
    echo(f"next: edgekd {shlex.join(map(str, words))}")


def read_or_scan(data: Path, split: Path | None, classes: tuple[str, ...], *, labels: Path | None = None) -> Split:
    """Read the given split; without one, put the images of `data` (or those in `labels`) into the test subset."""
    from edgekd.data.split import Item, Subset, read_split
    from edgekd.data.split import Split as SplitType

    if split is not None:
        given = read_split(split)
        if given.classes != classes:
            raise DataError(
                f"{split} has the classes {', '.join(given.classes)}; the network has {', '.join(classes)}",
                fix="give the split of the run that the network comes from",
            )
        return given
    from edgekd.data.folders import check, scan
    from edgekd.data.labels import read_labels

    folder = read_labels(data, labels, classes=classes) if labels else scan(data, classes=classes)
    checked = check(folder)
    subsets = {
        subset: tuple(
            Item(f.path, f.label, digest=f.digest) for f in checked.folder.items if (f.subset or "test") == subset
        )
        for subset in get_args(Subset)
    }
    return SplitType(classes, subsets, "whole folder", 0, "none", 0, 0, checked.fingerprint)


def one_of(*known: str) -> Callable[[typer.CallbackParam, str | None], str | None]:
    """Return a callback for an option that takes one of a few words."""

    def check(option: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None:
            check_known(f"--{option.name}", value, known)
        return value

    return check
