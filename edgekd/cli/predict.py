"""`edgekd predict`: labels for images and folders of images, without torch."""

from __future__ import annotations

import contextlib
import glob
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.cells import cell_len

from edgekd.cli.common import ThreadsOption, bar, echo, reserve
from edgekd.errors import ConfigError, DataError
from edgekd.files import ANSWERS, atomic_path
from edgekd.text import csv_line, visible

if TYPE_CHECKING:
    from edgekd import Classifier, Prediction

SHOWN = 5
"""Inputs that could not be used and are named at the end; each has a row."""
Input = tuple[Path, "DataError | None"]


def predict(
    engine: Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE", help="Engine folder or student.onnx.")],
    images: Annotated[list[str], typer.Argument(help="Images, folders of images, and quoted patterns: 'cells/**'.")],
    strategy: Annotated[str | None, typer.Option(help="cascade, full or final.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Give the so many likeliest classes.")] = 1,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="CSV: a column for each class.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON array, one object a line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write NAME.csv or NAME.json, whole or not at all, and print nothing.")
    ] = None,
    device_side_exit: Annotated[
        bool,
        typer.Option("--device-side-exit", help="Research: the GPU itself ends the cascade (TensorRT)."),
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Labels for images and folders of images, in their order and as they come.

    An image that cannot be used has a row that says why, and the exit code is 1.
    """
    from edgekd import Classifier

    form = _form(out, as_json=as_json, as_csv=as_csv)
    if probabilities and form == "table":
        raise ConfigError("--probabilities goes with --csv", fix="give --csv, or --json, which has them always")
    reserve(out, ANSWERS)
    classifier = Classifier(
        engine,
        strategy=strategy,  # type: ignore[arg-type]  # checked there
        threads=threads,
        device_side_exit=device_side_exit,
    )
    if top_k > len(classifier.classes):
        raise ConfigError(f"--top-k {top_k}: the network has {len(classifier.classes)} classes", fix="give fewer")
    forms: dict[str, type[_Rows]] = {"json": _Json, "csv": _Csv, "table": _Table}
    rows = forms[form](classifier.classes, top_k, probabilities)
    inputs, bad = [one for source in images for one in _inputs(source)], list[str]()
    with _sink(out) as write, bar("predict") as progress:
        write(rows.head)
        try:
            for done, (path, answer) in enumerate(_answers(classifier, inputs), start=1):
                write(rows.row(path, answer))
                if isinstance(answer, DataError):
                    bad.append(visible(answer.what))
                if out or not sys.stdout.isatty():  # where rows are seen, they are the progress
                    progress(done, len(inputs))
        finally:  # an interrupted array is whole, too
            write(rows.tail)
    if out:
        echo(f"{out}: {len(inputs) - len(bad)} of {len(inputs)} images answered")
    if bad:
        more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        raise DataError("\n".join([*bad[:SHOWN], *more]), fix="the other images were answered")


def _form(out: Path | None, *, as_json: bool, as_csv: bool) -> Literal["json", "csv", "table"]:
    """What is asked for by a flag, or by the name of the file."""
    if as_json and as_csv:
        raise ConfigError("--json and --csv", fix="give one of them")
    kind = out.suffix.lower() if out and not (as_json or as_csv) else ""
    if as_json or kind == ".json":
        return "json"
    if as_csv or kind == ".csv":
        return "csv"
    if out:
        raise ConfigError(f"--out {out}: neither CSV nor JSON by its name", fix="give --csv or --json")
    return "table"


def _inputs(source: str) -> Iterator[Input]:
    """The images that an argument stands for, or the argument itself and why it cannot be used."""
    try:
        yield from ((path, None) for path in _files(source))
    except DataError as error:
        yield Path(source), error
    except OSError as error:  # a name that is too long, a folder that may not be read
        yield Path(source), DataError(f"{source}: {error.strerror}", fix="check the path and its rights")


def _files(source: str) -> Sequence[Path]:
    """A pattern stands for the images that it matches, and those in folders that it matches unless it has a `**`."""
    from edgekd.data.folders import image_files
    from edgekd.data.preprocess import EXTENSIONS

    path = Path(source)
    if path.is_dir():
        found = image_files(path)
    elif glob.has_magic(source) and not path.exists():
        matches = [Path(name) for name in sorted(glob.glob(source, recursive=True))]  # noqa: PTH207
        found = [p for p in matches if p.suffix.lower() in EXTENSIONS and not p.is_dir()]
        if "**" not in source:
            found += [file for folder in matches if folder.is_dir() for file in image_files(folder)]
    else:
        return [path]
    if not found:
        raise DataError(f"no images in {source}", fix="give a folder with images, or image files")
    return found


def _answers(classifier: Classifier, inputs: Sequence[Input]) -> Iterator[tuple[Path, Prediction | DataError]]:
    """An answer for each input, in order, a batch at a time."""
    for start in range(0, len(inputs), classifier.batch_size):
        batch = inputs[start : start + classifier.batch_size]
        found = iter(_predicted(classifier, [path for path, error in batch if error is None]))
        yield from ((path, error or next(found)) for path, error in batch)


def _predicted(classifier: Classifier, files: list[Path]) -> list[Prediction | DataError]:
    """A batch at once; one by one if a file in it cannot be used."""
    try:
        return list(classifier.predict(files))
    except DataError as error:
        return [error] if len(files) == 1 else [one for file in files for one in _predicted(classifier, [file])]


@contextlib.contextmanager
def _sink(out: Path | None) -> Iterator[Callable[[str], object]]:
    """Where rows go: to standard output one by one, so that a reader has them at once and a kill leaves whole ones."""
    if out:
        with atomic_path(out) as part, part.open("w", encoding="utf-8", newline="") as file:
            yield file.write
    else:
        stream = sys.stdout  # now: a progress bar takes its place

        def write(text: str) -> None:
            stream.write(text)
            stream.flush()

        yield write


@dataclass
class _Rows(ABC):
    """Text before, for and after the rows; each row ends its line."""

    classes: tuple[str, ...]
    top_k: int
    probabilities: bool
    tail = ""

    @property
    @abstractmethod
    def head(self) -> str: ...

    @abstractmethod
    def row(self, path: Path, answer: Prediction | DataError) -> str: ...


def _why(path: Path, error: DataError) -> str:
    return error.what.removeprefix(f"{path}: ")


def _top(answer: Prediction, count: int) -> list[tuple[str, float]]:
    """The likeliest classes and their probabilities."""
    order = sorted(range(len(answer.classes)), key=lambda k: -answer.probabilities[k])
    return [(answer.classes[k], answer.probabilities[k]) for k in order[:count]]


class _Json(_Rows):
    head = "[\n"
    tail = "]\n"
    comma = ""

    def row(self, path: Path, answer: Prediction | DataError) -> str:
        table: dict[str, object] = {"file": str(path)}
        if isinstance(answer, DataError):
            table["error"] = _why(path, answer)
        else:
            table |= {"label": answer.label, "index": answer.index, "confidence": answer.confidence}
            table |= {"exit": f"exit_{answer.exit}", "probabilities": answer.probabilities}
            if self.top_k > 1:
                table["top"] = [{"label": name, "probability": p} for name, p in _top(answer, self.top_k)]
        comma, self.comma = self.comma, ","
        return comma + json.dumps(table).replace("\x7f", r"\u007f") + "\n"


class _Csv(_Rows):
    @property
    def head(self) -> str:
        from edgekd.runtime.classifier import class_columns

        top = [f"{what}_{k}" for k in range(2, self.top_k + 1) for what in ("label", "probability")]
        each = class_columns(self.classes) if self.probabilities else []
        return csv_line(["file", "label", "confidence", "exit", "error", *top, *each])

    def row(self, path: Path, answer: Prediction | DataError) -> str:
        if isinstance(answer, DataError):
            more = 2 * (self.top_k - 1) + len(self.classes) * self.probabilities
            return csv_line([str(path), "", "", "", _why(path, answer), *[""] * more])
        top = [cell for name, p in _top(answer, self.top_k)[1:] for cell in (name, f"{p:.6f}")]
        each = [f"{p:.6f}" for p in answer.probabilities] if self.probabilities else []
        return csv_line([str(path), answer.label, f"{answer.confidence:.4f}", f"exit_{answer.exit}", "", *top, *each])


class _Table(_Rows):
    """Columns as wide as they can become, the file last: nothing has to wait for other rows."""

    @property
    def head(self) -> str:
        return self._line("label", "confidence", "left at", *(f"#{k}" for k in range(2, self.top_k + 1)), "file")

    def row(self, path: Path, answer: Prediction | DataError) -> str:
        if isinstance(answer, DataError):
            return self._line(*["–"] * (2 + self.top_k), f"{path}: {_why(path, answer)}")
        others = [f"{name} {p:.3f}" for name, p in _top(answer, self.top_k)[1:]]
        return self._line(answer.label, f"{answer.confidence:.3f}", f"exit_{answer.exit}", *others, str(path))

    def _line(self, *cells: str) -> str:
        from edgekd.text import aligned

        return aligned([[*self._widest, ""], cells], remarks=True).splitlines()[1] + "\n"

    @cached_property
    def _widest(self) -> list[str]:
        longest = max([*self.classes, "label"], key=lambda name: cell_len(visible(name)))
        return [longest, "confidence", "left at", *[f"{longest} 0.000"] * (self.top_k - 1)]
