"""Commands that run without torch: compile, tune, devices and doctor."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.cli.common import (
    DataOption,
    SetOption,
    SplitFile,
    ThreadsOption,
    bar,
    echo,
    next_command,
    one_of,
    read_or_scan,
    reserve,
    say,
)
from edgekd.errors import ConfigError

if TYPE_CHECKING:
    from edgekd.engines import Attempt
    from edgekd.runtime.tune import Tuned

OptionalData = Annotated[Path | None, typer.Option("--data", help="The images, for calibration and the accuracy gate.")]


def compile_(
    source: Annotated[Path, typer.Argument(metavar="STUDENT.ONNX")],
    recipe: Annotated[str, typer.Option(help="fp32, fp16, int8, int8-fp16, dla-int8, or a .toml file.")] = "fp32",
    backend: Annotated[
        str,
        typer.Option(
            help="auto, onnxruntime, openvino or tensorrt.",
            callback=one_of("auto", "onnxruntime", "openvino", "tensorrt"),
        ),
    ] = "auto",
    device: Annotated[str, typer.Option(help="local, or a device of `edgekd devices`.")] = "local",
    data: OptionalData = None,
    split: SplitFile = None,
    out: Annotated[Path | None, typer.Option(help="Engine folder; STUDENT.engine if not given.")] = None,
    threads: ThreadsOption = None,
    set_: SetOption = None,
) -> None:
    """student.onnx to student.engine/: built, checked on the validation split and timed on this machine."""
    from edgekd import specs
    from edgekd.artifact import read_onnx, read_split
    from edgekd.engines import Recipe, compile_engine
    from edgekd.engines.build import refuse_other_folder
    from edgekd.engines.device import require_local
    from edgekd.runtime.images import load_part

    require_local(device)
    out = out or source.with_suffix(".engine")
    asked = specs.load(Recipe, "compile", recipe, overrides=specs.parse_overrides(set_ or []))
    if (data is None) != (split is None):
        raise ConfigError("--data and --split go together", fix="give the images and the split.json of the run")
    refuse_other_folder(out)
    reserve(out, data=data)
    calibration = validation = None
    with bar("read images") as progress:
        if data is not None and split is not None:
            found = read_split(split)
            load = functools.partial(load_part, found, data=data, preprocess=read_onnx(source)[1].preprocess)
            validation = load("val", progress=progress)
            if asked.precision == "int8":
                calibration, _ = load("train", limit=asked.calibration_images, progress=progress)
    with bar("compile") as progress:
        manifest, attempts = compile_engine(
            source,
            out,
            recipe=asked,
            backend=backend,
            calibration=calibration,
            validation=validation,
            threads=threads,
            progress=progress,
        )
    echo(_attempts(attempts))
    ran = ", ".join(f"{name} {share:.0%}" for name, share in manifest.precision.items())
    echo(f"{out}: {manifest.backend} {manifest.backend_version}; asked {asked.name}, ran {ran}")
    for note in manifest.notes:
        echo(f"note: {note}")
    next_command("tune", out, "--data", data or "…", "--split", split or "…", "--max-accuracy-drop", 0.3)


def _attempts(attempts: Iterable[Attempt]) -> str:
    """A row for each backend; a remark of several lines is below, too, and whole."""
    from edgekd.bench.accuracy import aligned

    rows, below = [("backend", "ms at batch 1", "accuracy drop (points) [95 %]", "remarks")], ""
    for a in attempts:
        ms = "–" if a.batch1_ms is None else f"{a.batch1_ms:.2f}"
        drop = "unchecked" if a.drop is None else f"{a.drop:.2f}"
        drop += "" if a.drop_bounds is None else f" [{a.drop_bounds[0]:.2f}, {a.drop_bounds[1]:.2f}]"
        first, *others = a.note.splitlines()
        rows.append((a.backend, ms, drop if a.ok else "refused", first + (" …" if others else "")))
        below += f"\n{a.backend}: {a.note}" if others else ""
    return aligned(rows, remarks=True) + below


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
    from edgekd.artifact import MANIFEST
    from edgekd.engines import open_engine
    from edgekd.files import recover
    from edgekd.runtime.images import load_part
    from edgekd.runtime.tune import save_tuned
    from edgekd.runtime.tune import tune as search

    recover(engine)
    if not (engine / MANIFEST).is_file():
        raise ConfigError(f"{engine} is no engine", fix="thresholds belong to an engine: edgekd compile first")
    reserve(engine / MANIFEST)
    opened = open_engine(engine, threads=threads)
    chosen = read_or_scan(data, split, opened.card.classes)
    with bar("read images") as progress:
        images, labels = load_part(chosen, "val", data=data, preprocess=opened.card.preprocess, progress=progress)
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
    facts = {"asked": asked, "images": len(labels), "fingerprint": chosen.fingerprint}
    save_tuned(engine, tuned, facts, digest=opened.manifest.digest if opened.manifest else "")
    echo(_curve(tuned))
    record = engine.parent / f"{engine.stem}-record.json"
    next_command("bench", engine, "--suite", "quick", "--data", data, "--split", split, "--out", record)


def _curve(tuned: Tuned) -> str:
    """The trade-off curve and the setting that was taken."""
    from edgekd.bench.accuracy import aligned

    rows: list[tuple[str, ...]] = [("expected ms", "accuracy %", "leave at exit (%)", "thresholds")]
    for point in tuned.curve:
        rows.append(_point(point["latency_ms"], point["accuracy"], point["shares"], point["thresholds"]))
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


def devices() -> None:
    """The devices that edgekd knows."""
    from edgekd.bench.accuracy import aligned
    from edgekd.engines.device import table

    echo(aligned(table()))


def doctor() -> None:
    """What is installed, and whether each backend builds and runs a small graph."""
    from edgekd.engines.doctor import report

    lines, healthy = report()
    for line in lines:
        echo(line)
    if not healthy:
        say("error: a backend that is installed does not work")
        raise typer.Exit(1)
