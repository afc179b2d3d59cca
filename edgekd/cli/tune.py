"""edgekd tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from edgekd.cli.common import (
    DataOption,
    ThreadsOption,
    bar,
    echo,
    next_command,
    read_or_scan,
    reserve,
)
from edgekd.errors import ConfigError, check_known

if TYPE_CHECKING:
    from edgekd.artifacts.manifest import CurvePoint
    from edgekd.runtime.tuning import Tuned


def tune(
    engine: Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE")],
    data: DataOption,
    split: Annotated[Path, typer.Option(help="split.json, or the run folder that contains it.")],
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Allowed loss by early exit, in points; chooses the fastest setting.")
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Allowed mean ms per image; chooses the most accurate setting.")
    ] = None,
    confidence: Annotated[
        str, typer.Option(help="auto, max_probability, margin, entropy, or one from an installed package.")
    ] = "auto",
    average: Annotated[
        str,
        typer.Option(
            help="own: the exit's probabilities; mean, geometric: averaged over the exits so far; auto: the best."
        ),
    ] = "auto",
    threads: ThreadsOption = None,
) -> None:
    """Fit temperatures and exit thresholds on the validation images, on the compiled engine itself."""
    from edgekd.artifacts.manifest import MANIFEST
    from edgekd.confidence import CONFIDENCE_MEASURES
    from edgekd.data.images import load_subset
    from edgekd.files import recover
    from edgekd.policy import Average
    from edgekd.runtime.engine import open_engine
    from edgekd.runtime.tuning import AUTO, save_tuned
    from edgekd.runtime.tuning import tune as search

    check_known("--confidence", confidence, (AUTO, *CONFIDENCE_MEASURES))
    check_known("--average", average, (AUTO, *get_args(Average)))
    recover(engine)
    if not (engine / MANIFEST).is_file():
        raise ConfigError(f"{engine} is not an engine folder", fix="thresholds are part of an engine: compile it first")
    reserve(engine / MANIFEST)
    opened = open_engine(engine, threads=threads)
    images_split = read_or_scan(data, split, opened.metadata.classes)
    with bar("read images") as progress:
        images, labels = load_subset(
            images_split, "val", data=data, preprocess=opened.metadata.preprocess, progress=progress
        )
    with bar("tune") as progress:
        tuned = search(
            opened,
            images,
            labels,
            max_accuracy_drop=max_accuracy_drop,
            latency_ms=latency_ms,
            confidence=confidence,
            average=average,
            progress=progress,
        )
    goals = {"max_accuracy_drop": max_accuracy_drop, "latency_ms": latency_ms}
    goal = {name: value for name, value in goals.items() if value is not None}
    provenance = {"goal": goal, "images": len(labels), "fingerprint": images_split.fingerprint}
    save_tuned(engine, tuned, provenance, digest=opened.manifest.digest if opened.manifest else "")
    echo(_curve(tuned))
    record = engine.parent / f"{engine.stem}-record.json"
    next_command("bench", engine, "--suite", "quick", "--data", data, "--split", split, "--out", record)


def _curve(tuned: Tuned) -> str:
    """Format the trade-off curve, with the chosen setting as the last line."""
    from edgekd.artifacts.manifest import CurvePoint
    from edgekd.text import aligned

    chosen = CurvePoint(tuned.accuracy, tuned.latency_ms, tuned.policy.thresholds, tuned.shares)
    rows = [("expected ms", "accuracy %", "exit share %", "thresholds"), *map(_row, tuned.curve)]
    rows += [("", "", "", ""), _row(chosen)]
    lost, policy = 100 * (tuned.reference_accuracy - tuned.accuracy), tuned.policy
    return (
        aligned(rows)
        + f"\nchosen: the last line, with {policy.confidence} and the average {policy.average}; {lost:+.2f} points "
        + f"lost to the {tuned.reference_accuracy:.2%} without early exit "
        + f"(standard error {100 * tuned.accuracy_error:.2f}) on the validation images"
    )


def _row(point: CurvePoint) -> tuple[str, str, str, str]:
    shares = " / ".join(f"{100 * share:.0f}" for share in point.shares)
    thresholds = " ".join("never" if t > 1 else f"{t:.4f}" for t in point.thresholds)
    return f"{point.latency_ms:.3f}", f"{100 * point.accuracy:.2f}", shares, thresholds
