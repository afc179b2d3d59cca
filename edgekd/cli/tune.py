"""edgekd tune."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.common import (
    DataOption,
    ThreadsOption,
    bar,
    echo,
    next_command,
    one_of,
    read_or_scan,
    reserve,
)
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.runtime.tuning import Tuned


def tune(
    engine: Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE")],
    data: DataOption,
    split: Annotated[Path, typer.Option(help="split.json, or the run folder that holds it.")],
    max_accuracy_drop: Annotated[
        float | None, typer.Option(help="Points below the ensemble; the fastest within.")
    ] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Mean ms an image; the most accurate within.")] = None,
    confidence: Annotated[
        str,
        typer.Option(
            help="max_probability, margin or entropy.", callback=one_of("max_probability", "margin", "entropy")
        ),
    ] = "max_probability",
    average: Annotated[
        str,
        typer.Option(help="own: the exit's probabilities; mean: of all so far.", callback=one_of("own", "mean")),
    ] = "mean",
    threads: ThreadsOption = None,
) -> None:
    """Fit temperatures and exit thresholds on the validation images, on the compiled engine itself."""
    from edgekd.artifacts.manifest import MANIFEST
    from edgekd.data.images import load_subset
    from edgekd.files import recover
    from edgekd.runtime.engine import open_engine
    from edgekd.runtime.tuning import save_tuned
    from edgekd.runtime.tuning import tune as search

    recover(engine)
    if not (engine / MANIFEST).is_file():
        raise ConfigError(f"{engine} is no engine", fix="thresholds belong to an engine: edgekd compile first")
    reserve(engine / MANIFEST)
    opened = open_engine(engine, threads=threads)
    chosen = read_or_scan(data, split, opened.metadata.classes)
    with bar("read images") as progress:
        images, labels = load_subset(chosen, "val", data=data, preprocess=opened.metadata.preprocess, progress=progress)
    with bar("tune") as progress:
        tuned = search(
            opened,
            images,
            labels,
            max_accuracy_drop=max_accuracy_drop,
            latency_ms=latency_ms,
            confidence=confidence,  # type: ignore[arg-type]  # checked above
            average=average,  # type: ignore[arg-type]
            progress=progress,
        )
    goal = {"max_accuracy_drop": max_accuracy_drop, "latency_ms": latency_ms}
    asked = {k: v for k, v in goal.items() if v is not None}
    facts = {"goal": asked, "images": len(labels), "fingerprint": chosen.fingerprint}
    save_tuned(engine, tuned, facts, digest=opened.manifest.digest if opened.manifest else "")
    echo(_curve(tuned))
    record = engine.parent / f"{engine.stem}-record.json"
    next_command("bench", engine, "--suite", "quick", "--data", data, "--split", split, "--out", record)


def _curve(tuned: Tuned) -> str:
    """The trade-off curve and the setting that was taken."""
    from edgekd.text import aligned

    rows: list[tuple[str, ...]] = [("expected ms", "accuracy %", "leave at exit (%)", "thresholds")]
    for point in tuned.curve:
        rows.append(_point(point.latency_ms, point.accuracy, point.shares, point.thresholds))
    rows.append(("", "", "", ""))
    rows.append(_point(tuned.latency_ms, tuned.accuracy, tuned.shares, tuned.policy.thresholds))
    lost = 100 * (tuned.ensemble_accuracy - tuned.accuracy)
    return (
        aligned(rows)
        + f"\ntaken: the last line; {lost:+.2f} points lost to the ensemble's {tuned.ensemble_accuracy:.2%} "
        + f"(standard error {100 * tuned.accuracy_error:.2f}) on the validation images"
    )


def _point(
    ms: float, accuracy: float, shares: Iterable[float], thresholds: Iterable[float]
) -> tuple[str, str, str, str]:
    leave = " / ".join(f"{100 * s:.0f}" for s in shares)
    return f"{ms:.3f}", f"{100 * accuracy:.2f}", leave, " ".join("never" if t > 1 else f"{t:.4f}" for t in thresholds)
