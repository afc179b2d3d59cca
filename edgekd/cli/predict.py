"""`edgekd predict`: labels for images and folders of images, without PyTorch."""

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
from typing import TYPE_CHECKING, Annotated, Literal, cast, get_args

import typer
from rich.cells import cell_len

from edgekd.cli.common import ThreadsOption, bar, echo, reserve
from edgekd.errors import ConfigError, DataError, check_known
from edgekd.files import PREDICTIONS, atomic_path
from edgekd.text import csv_line, visible

if TYPE_CHECKING:
    from edgekd import Classifier, Prediction
    from edgekd.runtime.classifier import Strategy

SHOWN = 5
"""Largest number of unusable inputs that the final error names; each of them also has a row."""
Input = tuple[Path, "DataError | None"]
"""An image file, and why it cannot be used if that is known before it is read."""


def predict(
    engine: Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE", help="Engine folder or student.onnx.")],
    images: Annotated[list[str], typer.Argument(help="Images, folders of images, and quoted patterns: 'cells/**'.")],
    strategy: Annotated[str | None, typer.Option(help="cascade, full or final.")] = None,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Number of most probable classes to print.")] = 1,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="CSV: add a column for each class.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array, one object per line.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", help="Write NAME.csv or NAME.json atomically instead of printing.")
    ] = None,
    device_side_exit: Annotated[
        bool,
        typer.Option("--device-side-exit", help="Experimental: decide exits on the GPU (TensorRT)."),
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Classify images and folders of images, in the given order.

    An image whose confidence is too low for an answer is marked as deferred to a person (edgekd tune --defer). An
    unusable image gets a row with the reason, and the exit code is 1.
    """
    from edgekd.runtime.classifier import Classifier, Strategy

    if strategy is not None:
        check_known("--strategy", strategy, get_args(Strategy))
    form = _form(out, as_json=as_json, as_csv=as_csv)
    if probabilities and form == "table":
        raise ConfigError("--probabilities needs --csv", fix="give --csv, or --json, which always includes them")
    reserve(out, PREDICTIONS)
    classifier = Classifier(
        engine,
        strategy=cast("Strategy | None", strategy),
        threads=threads,
        device_side_exit=device_side_exit,
    )
    if top_k > len(classifier.classes):
        raise ConfigError(
            f"--top-k {top_k}: the network has {len(classifier.classes)} classes", fix="give a smaller number"
        )
    forms: dict[str, type[_Rows]] = {"json": _Json, "csv": _Csv, "table": _Table}
    rows = forms[form](classifier.classes, top_k, probabilities, classifier.policy.defer_below > 0)
    inputs, bad = [one for source in images for one in _inputs(source)], list[str]()
    with _sink(out) as write, bar("predict") as progress:
        write(rows.head)
        try:
            for done, (path, result) in enumerate(_results(classifier, inputs), start=1):
                write(rows.row(path, result))
                if isinstance(result, DataError):
                    bad.append(visible(result.what))
                if out or not sys.stdout.isatty():  # rows on a terminal show the progress
                    progress(done, len(inputs))
        finally:  # an interrupted JSON array is closed, too
            write(rows.tail)
    if out:
        echo(f"{out}: {len(inputs) - len(bad)} of {len(inputs)} images classified")
    if bad:
        more = [f"and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
        raise DataError("\n".join([*bad[:SHOWN], *more]), fix="the other images were classified")


def _form(out: Path | None, *, as_json: bool, as_csv: bool) -> Literal["json", "csv", "table"]:
    """Choose the output format by the flags, or by the suffix of the file."""
    if as_json and as_csv:
        raise ConfigError("--json and --csv", fix="give one of them")
    kind = out.suffix.lower() if out and not (as_json or as_csv) else ""
    if as_json or kind == ".json":
        return "json"
    if as_csv or kind == ".csv":
        return "csv"
    if out:
        raise ConfigError(f"--out {out} ends in neither .csv nor .json", fix="give --csv or --json")
    return "table"


def _inputs(source: str) -> Iterator[Input]:
    """Expand an argument to image files; an unusable one is kept, with the reason."""
    try:
        yield from ((path, None) for path in _files(source))
    except DataError as error:
        yield Path(source), error
    except OSError as error:  # a name that is too long, or an unreadable folder
        yield Path(source), DataError(f"{source}: {error.strerror}", fix="check the path and its permissions")


def _files(source: str) -> Sequence[Path]:
    """Find the image files of a path or pattern. Folders that a pattern matches are searched unless it has a `**`."""
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


def _results(classifier: Classifier, inputs: Sequence[Input]) -> Iterator[tuple[Path, Prediction | DataError]]:
    """Classify the inputs in order, a batch at a time."""
    for start in range(0, len(inputs), classifier.batch_size):
        batch = inputs[start : start + classifier.batch_size]
        results = iter(_classified(classifier, [path for path, error in batch if error is None]))
        yield from ((path, error or next(results)) for path, error in batch)


def _classified(classifier: Classifier, files: list[Path]) -> list[Prediction | DataError]:
    """Classify a batch at once, or one by one if a file in it cannot be used."""
    try:
        return list(classifier.predict(files))
    except DataError as error:
        return [error] if len(files) == 1 else [one for file in files for one in _classified(classifier, [file])]


@contextlib.contextmanager
def _sink(out: Path | None) -> Iterator[Callable[[str], object]]:
    """Provide the function that writes rows: to a file, or to standard output, flushed after each row."""
    if out:
        with atomic_path(out) as part, part.open("w", encoding="utf-8", newline="") as file:
            yield file.write
    else:
        stream = sys.stdout  # bound now, because a progress bar replaces it

        def write(text: str) -> None:
            stream.write(text)
            stream.flush()

        yield write


@dataclass
class _Rows(ABC):
    """An output format: text before, for and after the rows, with line ends."""

    classes: tuple[str, ...]
    top_k: int
    probabilities: bool
    defers: bool
    tail = ""

    @property
    @abstractmethod
    def head(self) -> str: ...

    @abstractmethod
    def row(self, path: Path, result: Prediction | DataError) -> str: ...


def _why(path: Path, error: DataError) -> str:
    return error.what.removeprefix(f"{path}: ")


def _top(result: Prediction, count: int) -> list[tuple[str, float]]:
    """Return the most probable classes and their probabilities."""
    order = sorted(range(len(result.classes)), key=lambda k: -result.probabilities[k])
    return [(result.classes[k], result.probabilities[k]) for k in order[:count]]


class _Json(_Rows):
    head = "[\n"
    tail = "]\n"
    comma = ""

    def row(self, path: Path, result: Prediction | DataError) -> str:
        table: dict[str, object] = {"file": str(path)}
        if isinstance(result, DataError):
            table["error"] = _why(path, result)
        else:
            table |= {"label": result.label, "index": result.index, "confidence": result.confidence}
            table |= {"exit": f"exit_{result.exit}", "deferred": result.deferred}
            table["probabilities"] = result.probabilities
            if self.top_k > 1:
                table["top"] = [{"label": name, "probability": p} for name, p in _top(result, self.top_k)]
        comma, self.comma = self.comma, ","
        return comma + json.dumps(table).replace("\x7f", r"\u007f") + "\n"


class _Csv(_Rows):
    @property
    def head(self) -> str:
        from edgekd.runtime.classifier import class_columns

        top = [f"{what}_{k}" for k in range(2, self.top_k + 1) for what in ("label", "probability")]
        each = class_columns(self.classes) if self.probabilities else []
        return csv_line(["file", "label", "confidence", "exit", "deferred", "error", *top, *each])

    def row(self, path: Path, result: Prediction | DataError) -> str:
        if isinstance(result, DataError):
            more = 2 * (self.top_k - 1) + len(self.classes) * self.probabilities
            return csv_line([str(path), "", "", "", "", _why(path, result), *[""] * more])
        top = [cell for name, p in _top(result, self.top_k)[1:] for cell in (name, f"{p:.6f}")]
        each = [f"{p:.6f}" for p in result.probabilities] if self.probabilities else []
        decided = [f"{result.confidence:.4f}", f"exit_{result.exit}", str(result.deferred).lower()]
        return csv_line([str(path), result.label, *decided, "", *top, *each])


class _Table(_Rows):
    """Columns of fixed width, the file last, so that each row can be printed at once.

    Where the policy defers images, a column marks them.
    """

    @property
    def head(self) -> str:
        deferred = ["deferred"] * self.defers
        return self._line(
            "label", "confidence", "exit", *deferred, *(f"#{k}" for k in range(2, self.top_k + 1)), "file"
        )

    def row(self, path: Path, result: Prediction | DataError) -> str:
        if isinstance(result, DataError):
            return self._line(*["–"] * (2 + self.top_k + self.defers), f"{path}: {_why(path, result)}")
        others = [f"{name} {p:.3f}" for name, p in _top(result, self.top_k)[1:]]
        deferred = ["yes" if result.deferred else ""] * self.defers
        decided = (result.label, f"{result.confidence:.3f}", f"exit_{result.exit}")
        return self._line(*decided, *deferred, *others, str(path))

    def _line(self, *cells: str) -> str:
        from edgekd.text import aligned

        return aligned([[*self._widest, ""], cells], remarks=True).splitlines()[1] + "\n"

    @cached_property
    def _widest(self) -> list[str]:
        longest = max([*self.classes, "label"], key=lambda name: cell_len(visible(name)))
        return [longest, "confidence", "exit_0", *["deferred"] * self.defers, *[f"{longest} 0.000"] * (self.top_k - 1)]
