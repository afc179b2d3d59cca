"""edgekd tune."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from edgekd.cli.common import (
    DataOption,
    GroupOption,
    SplitFile,
    ThreadsOption,
    bar,
    echo,
    next_command,
    read_or_scan,
    reserve,
)
from edgekd.cli.pending import complete_pending
from edgekd.cli.promises import (
    CertaintyOption,
    CostsOption,
    DeferOption,
    MaxChangeOption,
    MaxCostOption,
    MaxDropOption,
    MaxLostOption,
    MaxMissOption,
    MinSensitivityOption,
    PerExitOption,
    ReferenceOption,
    certificate_lines,
    certified_table,
    needs_labels,
    promises_of,
)
from edgekd.errors import ArtifactError, BackendError, ConfigError, check_known

if TYPE_CHECKING:
    from edgekd.artifacts.manifest import CurvePoint
    from edgekd.artifacts.metadata import ModelMetadata
    from edgekd.runtime.certificate_images import CertificateImages
    from edgekd.runtime.certify import Request
    from edgekd.runtime.engine import Engine
    from edgekd.runtime.tuning import Tuned
    from edgekd.types import Array


def tune(
    engine: Annotated[Path, typer.Argument(metavar="STUDENT.ENGINE")],
    data: DataOption,
    split: SplitFile = None,
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
    keep_exits: Annotated[
        bool, typer.Option("--keep-exits", help="Keep exits that do not pay on this machine, for comparison.")
    ] = False,
    max_change: MaxChangeOption = None,
    max_lost: MaxLostOption = None,
    max_drop: MaxDropOption = None,
    max_miss: MaxMissOption = None,
    min_sensitivity: MinSensitivityOption = None,
    costs: CostsOption = None,
    max_cost: MaxCostOption = None,
    defer: DeferOption = None,
    per_exit: PerExitOption = False,
    certainty: CertaintyOption = 0.9,
    reference: ReferenceOption = None,
    group: GroupOption = None,
    seed: Annotated[int, typer.Option(help="Seed of the division of the images of a certificate.")] = 0,
    threads: ThreadsOption = None,
) -> None:
    """Fit temperatures and exit thresholds on the compiled engine itself, with a certificate if a promise is given.

    Exits that do not pay on this machine are cut out of the engine.
    """
    from edgekd.artifacts.manifest import MANIFEST
    from edgekd.compiler.exit_selection import tune_engine
    from edgekd.confidence import CONFIDENCE_MEASURES
    from edgekd.data.images import load_subset
    from edgekd.files import recover
    from edgekd.policy import Average
    from edgekd.runtime.engine import open_engine
    from edgekd.runtime.tuning import AUTO, check_goal, save_tuned

    check_known("--confidence", confidence, (AUTO, *CONFIDENCE_MEASURES))
    check_known("--average", average, (AUTO, *get_args(Average)))
    recover(engine)
    if not (engine / MANIFEST).is_file():
        raise ConfigError(f"{engine} is not an engine folder", fix="thresholds are part of an engine: compile it first")
    reserve(engine / MANIFEST)
    complete_pending(engine, data, split, threads=threads)
    opened = open_engine(engine, threads=threads)
    promised = functools.partial(
        promises_of,
        opened.metadata.classes,
        max_change=max_change,
        max_lost=max_lost,
        max_drop=max_drop,
        max_miss=max_miss,
        min_sensitivity=min_sensitivity,
        costs=costs,
        max_cost=max_cost,
        defer=defer,
        per_exit=per_exit,
    )
    promises, matrix = promised(exits=len(opened.metadata.exits))
    if promises:
        if max_accuracy_drop is not None or latency_ms is not None:
            raise ConfigError("a promise and --max-accuracy-drop or --latency-ms", fix="give only the promise")
        from edgekd.runtime.certify import Request

        other = open_engine(reference, threads=threads) if reference else None
        name = reference.name if reference else "without early exit"
        request = Request(promises, certainty, matrix, other, name, seed)
        certificate_images = _images(opened.metadata, data, split, request, group)
        search = {"confidence": confidence, "average": average}
        pixels = None
        if not keep_exits:
            opened, pixels = _prune(opened, engine, certificate_images, request, search)
            request = dataclasses.replace(request, promises=promised(exits=len(opened.metadata.exits))[0])
        _certify(opened, engine, certificate_images, request, search, pixels=pixels)
        if split is not None:
            record = engine.parent / f"{engine.stem}-record.json"
            next_command("bench", engine, "--suite", "quick", "--data", data, "--split", split, "--out", record)
        else:
            next_command("predict", engine, data)
        return
    check_goal(max_accuracy_drop, latency_ms)
    if split is None:
        raise ConfigError("--split is missing", fix="give it, or a promise that needs no labels: --max-change 1")
    images_split = read_or_scan(data, split, opened.metadata.classes)
    with bar("read images") as progress:
        images, labels = load_subset(
            images_split, "val", data=data, preprocess=opened.metadata.preprocess, progress=progress
        )
    opened.close()
    with bar("tune") as progress:
        selection = tune_engine(
            engine,
            images,
            labels,
            max_accuracy_drop=max_accuracy_drop,
            latency_ms=latency_ms,
            confidence=confidence,
            average=average,
            threads=threads,
            keep_exits=keep_exits,
            progress=progress,
        )
    goals = {"max_accuracy_drop": max_accuracy_drop, "latency_ms": latency_ms}
    goal = {name: value for name, value in goals.items() if value is not None}
    provenance = {"goal": goal, "images": len(labels), "fingerprint": images_split.fingerprint}
    save_tuned(engine, selection.tuned, provenance, digest=selection.engine.digest)
    echo(_curve(selection.tuned))
    for message in selection.messages:
        echo(message)
    if opened.manifest and opened.manifest.certificate:
        echo("the certificate is void: it was for another exit policy")
    if max_accuracy_drop is not None:
        echo("no promise: new images may lose more; with --max-drop and --certainty it is tested, and certified")
    record = engine.parent / f"{engine.stem}-record.json"
    next_command("bench", engine, "--suite", "quick", "--data", data, "--split", split, "--out", record)


def _images(
    metadata: ModelMetadata, data: Path, split: Path | None, request: Request, group: str | None
) -> CertificateImages:
    """Read which images choose settings, and which test them."""
    from edgekd.runtime.certificate_images import images_of_folder, images_of_split

    if split is not None:
        return images_of_split(data, read_or_scan(data, split, metadata.classes), group=group, seed=request.seed)
    labelled = needs_labels(request.promises)
    with bar("check images") as progress:
        return images_of_folder(data, metadata, group=group, with_labels=labelled, seed=request.seed, progress=progress)


def _prune(
    opened: Engine, engine: Path, images: CertificateImages, request: Request, search: dict[str, str]
) -> tuple[Engine, Array]:
    """Cut out exits that do not pay with a setting that is likely to be certified.

    Returns:
        The engine as it is then, and the pixels of the images that decided.
    """
    from edgekd.compiler.exit_selection import tune_exits
    from edgekd.runtime.certify import path_images, path_search

    chosen, pixels = path_images(images, opened.metadata.preprocess, seed=request.seed)
    find = path_search(chosen, len(images.test), request, opened.metadata, **search)
    with bar("select exits") as progress:
        selection = tune_exits(engine, find, pixels, threads=opened.threads, progress=progress)
    for message in selection.messages:
        echo(message)
    return selection.engine, pixels


def _certify(
    opened: Engine,
    engine: Path,
    images: CertificateImages,
    request: Request,
    search: dict[str, str],
    *,
    pixels: Array | None,
) -> None:
    """Search for a certificate, and write the policy with or without it.

    A certified setting that is no faster than the plain network is not used; without early exit, no answer changes.
    """
    from edgekd.certification.losses import can_exit_early
    from edgekd.compiler.gain import measure_gain
    from edgekd.compiler.whole_graphs import add_final
    from edgekd.runtime.certify import save_certified, search_certificate, without_early_exit

    with bar("tune") as progress:
        found = search_certificate(opened, images, request, **search, progress=progress)
    if pixels is not None and can_exit_early(found.policy):
        try:
            gain = measure_gain(opened, engine, found.policy, pixels)
        except (ArtifactError, BackendError) as error:
            echo(f"it is unknown whether the certified setting is faster: {error.what} ({error.fix})")
        else:
            echo(f"the certified setting beside the plain network: {gain}")
            if gain.is_clear and not gain.pays and not request.is_absolute:
                echo("it is no faster, so it is not used")
                found = without_early_exit(found)
    if found.policy.is_last_exit and not found.certificate:
        opened = add_final(opened, engine)
    save_certified(engine, found.policy, found.certificate, found.attempt, digest=opened.digest)
    echo(certified_table(found))
    for line in found.limits:
        echo(line)
    if not can_exit_early(found.policy):
        echo("no early exit is certified: the engine now answers without early exit")
    for line in certificate_lines(found.certificate) if found.certificate else ():
        echo(line)


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
