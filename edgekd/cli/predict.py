"""`edgekd predict`: labels for images and folders of images, without torch."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.common import ThreadsOption, bar, one_of
from edgekd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from edgekd import Classifier, Prediction


def predict(
    engine: Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE", help="Engine folder or student.onnx.")],
    images: Annotated[list[Path], typer.Argument(help="Images, and folders of images.")],
    strategy: Annotated[
        str | None, typer.Option(help="cascade, full or final.", callback=one_of("cascade", "full", "final"))
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    device_side_exit: Annotated[
        bool,
        typer.Option("--device-side-exit", help="Research: the GPU itself ends the cascade (TensorRT)."),
    ] = False,
    threads: ThreadsOption = None,
) -> None:
    """Labels for images and folders of images; files that cannot be used are named and the exit code is 1."""
    from edgekd import Classifier

    if as_json and as_csv:
        raise ConfigError("--json and --csv", fix="give one of them")
    classifier = Classifier(
        engine,
        strategy=strategy,  # type: ignore[arg-type]  # checked there
        threads=threads,
        device_side_exit=device_side_exit,
    )
    answers: dict[Path, Prediction] = {}
    bad: list[str] = []
    files = _files(images)
    with bar("predict") as progress:
        for start in range(0, len(files), classifier.batch_size):
            _predict(classifier, files[start : start + classifier.batch_size], answers, bad)
            progress(len(answers) + len(bad), len(files))
    _print(answers, as_json=as_json, as_csv=as_csv)
    if bad:
        raise DataError("\n".join(bad), fix="the other images were answered")


def _files(sources: list[Path]) -> list[Path]:
    from edgekd.runtime.preprocess import EXTENSIONS

    found: list[Path] = []
    for source in sources:
        if not source.is_dir():
            found.append(source)
            continue
        inside = sorted(p for p in source.rglob("*") if p.suffix.lower() in EXTENSIONS and not p.name.startswith("."))
        if not inside:
            raise DataError(f"no images in {source}", fix="give a folder with images, or image files")
        found += inside
    return found


def _predict(classifier: Classifier, files: list[Path], answers: dict[Path, Prediction], bad: list[str]) -> None:
    """A batch at once; one by one if a file in it cannot be used."""
    try:
        answers.update(zip(files, classifier.predict(list(files))))
    except DataError as error:
        if len(files) == 1:
            bad.append(error.what)
            return
        for file in files:
            _predict(classifier, [file], answers, bad)


def _print(answers: dict[Path, Prediction], *, as_json: bool, as_csv: bool) -> None:
    from edgekd.bench.accuracy import aligned

    rows = [{"file": str(f), **dataclasses.asdict(p), "exit": f"exit_{p.exit}"} for f, p in answers.items()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
    elif as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(("file", "label", "confidence", "exit"))
        writer.writerows((r["file"], r["label"], f"{r['confidence']:.4f}", r["exit"]) for r in rows)
    elif rows:
        table = [(r["file"], r["label"], f"{r['confidence']:.3f}", r["exit"]) for r in rows]
        typer.echo(aligned([("file", "label", "confidence", "left at"), *table]))
