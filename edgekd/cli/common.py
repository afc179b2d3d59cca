"""What the commands share: options, progress, the images they are given."""

from __future__ import annotations

import contextlib
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.errors import ConfigError, DataError, check_known
from edgekd.files import Kind, locked, real, refuse_other
from edgekd.text import terminal, visible

if TYPE_CHECKING:
    from edgekd.data.split import Split

DataFolder = Annotated[Path | None, typer.Option("--data", help="The images; a run folder remembers its own.")]
DataOption = Annotated[Path, typer.Option("--data", help="Folder of class folders, with or without train/ val/ test/.")]
OutOption = Annotated[Path, typer.Option("--out", help="What to write.")]
SplitFile = Annotated[Path | None, typer.Option("--split", help="split.json, or the run folder that holds it.")]
LabelsOption = Annotated[
    Path | None,
    typer.Option("--labels", help="CSV file with columns path and label, optionally group and subset."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the protocol, recipe or suite."),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of the engine; all cores if not given.")]
SizeOption = Annotated[int | None, typer.Option(help="Side of the input in pixels.")]
GroupOption = Annotated[
    str | None, typer.Option(help="none, cluster (SIPaKMeD), slide (Kather 2016), or a regular expression.")
]
SeedsOption = Annotated[
    str | None, typer.Option(metavar="0,1,2", help="A sweep: a run for each seed, in OUT/seed0-fold0 and so on.")
]
FoldsOption = Annotated[
    str | None, typer.Option(metavar="all|0,1", help="A sweep: a run for each of these folds of --split kfold:K.")
]
JobsOption = Annotated[int, typer.Option(min=1, help="Runs of a sweep in parallel.")]
BadOption = Annotated[bool, typer.Option("--exclude-bad", help="Train without the images that cannot be used.")]


FIRST_LINE_S, NEXT_LINE_S = 5.0, 15.0
"""When progress is first told where stderr is no terminal, and how often then."""


def echo(text: str, *, bold: bool = False) -> None:
    """Print a result; names in it cannot steer the terminal."""
    typer.secho(terminal(text), bold=bold)


def say(text: str) -> None:
    """Tell the user something that is no result."""
    sys.stderr.write(terminal(text) + "\n")


class LogFormatter(logging.Formatter):
    """Log lines that cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return terminal(super().format(record))


_reservations = contextlib.ExitStack()


@contextlib.contextmanager
def reserved() -> Iterator[None]:
    """Around a command: what it reserves is its own until it ends."""
    with _reservations:
        yield


def reserve(out: Path | None, kind: Kind | None = None, *, data: Path | None = None) -> None:
    """Before the work: see that `out` can be written, that nothing else is lost by it, and that nobody else writes it.

    kind: what may be replaced, for a file. data: the images, among which it may not lie.

    Raises:
        ConfigError: it lies in the data folder. ArtifactError: something else is there, or another process writes it.
    """
    if out is None:
        return
    if data is not None:
        outside(out, data)
    if kind:
        refuse_other(out, kind)
    _reservations.enter_context(locked(out))


def outside(out: Path, data: Path) -> None:
    """Refuse an output among the images: the next scan would take it for some of them."""
    if real(out).is_relative_to(real(data)):
        raise ConfigError(f"{out} lies in the folder of the images, {data}", fix="choose a place outside of it")


@contextlib.contextmanager
def resumable(begun: Path, how: str = "the same command with --resume") -> Iterator[None]:
    """Say how to go on with a run that is interrupted. begun: what is there once it can be."""
    try:
        yield
    except KeyboardInterrupt as stop:
        if begun.exists():
            stop.resume = f"\n  fix: {how} goes on from there"  # type: ignore[attr-defined]
        raise


@contextlib.contextmanager
def bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar with rate and time left; where stderr is no terminal, a line of them now and then."""
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
        if done == total:  # two bars cannot be shown at once
            shown.stop()

    try:
        yield update
    finally:
        shown.stop()


def next_command(*words: object) -> None:
    """Every command ends by saying what comes next, as a shell takes it."""
    echo(f"next: edgekd {shlex.join(map(str, words))}")


def read_or_scan(data: Path, split: Path | None, classes: tuple[str, ...], *, labels: Path | None = None) -> Split:
    """Read the given split; without one, put the images of `data` (or those in `labels`) into the test subset."""
    from edgekd.data.split import Item, read_split
    from edgekd.data.split import Split as SplitType

    if split is not None:
        found = read_split(split)
        if found.classes != classes:
            raise DataError(
                f"{split} has the classes {', '.join(found.classes)}; the network knows {', '.join(classes)}",
                fix="give the split of the run that the network comes from",
            )
        return found
    from edgekd.data.folders import check, scan  # light modules: no torch
    from edgekd.data.labels import read_labels

    folder = read_labels(data, labels, classes=classes) if labels else scan(data, classes=classes)
    checked = check(folder)
    subsets = {
        subset: tuple(
            Item(f.path, f.label, digest=f.digest) for f in checked.folder.items if (f.subset or "test") == subset
        )
        for subset in ("train", "val", "test")
    }
    return SplitType(classes, subsets, "whole folder", 0, "none", 0, 0, checked.fingerprint)


def one_of(*known: str) -> Callable[[typer.CallbackParam, str | None], str | None]:
    """Callback of an option that takes one of a few words."""

    def check(option: typer.CallbackParam, value: str | None) -> str | None:
        if value is not None:
            check_known(f"--{option.name}", value, known)
        return value

    return check
