"""edgekd compile."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from edgekd.backends import BUILTIN
from edgekd.cli.common import (
    SetOption,
    SplitFile,
    ThreadsOption,
    bar,
    echo,
    next_command,
    one_of,
    reserve,
)
from edgekd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from edgekd.artifacts.metadata import StudentModel
    from edgekd.artifacts.recipe import Recipe
    from edgekd.compiler.build import Attempt
    from edgekd.types import Array, Labels, Progress

RTX = "tensorrt-rtx"
LEAST_SEEN = 20
"""Fewest pictures without labels to compile with."""
GATE_PICTURES = 500
"""Most pictures without labels for the gate."""

OptionalData = Annotated[
    Path | None, typer.Option("--data", help="Image folder, for calibration and the accuracy gate.")
]


def _known_backend(option: typer.CallbackParam, value: str) -> str:
    from edgekd.backends.base import AUTO, BACKENDS  # onnx takes long to import

    return one_of(AUTO, *BACKENDS)(option, value) or AUTO


def compile_(
    source: Annotated[Path, typer.Argument(metavar="STUDENT.ONNX")],
    recipe: Annotated[str, typer.Option(help="fp32, fp16, int8, int8-fp16, dla-int8, or a .toml file.")] = "fp32",
    backend: Annotated[
        str,
        typer.Option(
            help=f"auto (the fastest of the installed ones), {', '.join(BUILTIN)}, or one of another package.",
            callback=_known_backend,
        ),
    ] = "auto",
    device: Annotated[
        str | None,
        typer.Option(help="RTX GPUs that tensorrt-rtx builds for: rtx-30, rtx-40, rtx-50 or portable (the default)."),
    ] = None,
    data: OptionalData = None,
    split: SplitFile = None,
    out: Annotated[Path | None, typer.Option(help="Engine folder; default: STUDENT.engine.")] = None,
    graphs: Annotated[
        str | None,
        typer.Option(
            help="stages (a cascade needs no more; the default) or all: also the network in one piece.",
            callback=one_of("stages", "all"),
        ),
    ] = None,
    threads: ThreadsOption = None,
    set_: SetOption = None,
) -> None:
    """Compile student.onnx into student.engine/, checked on the validation split and timed on this machine."""
    from edgekd import config
    from edgekd.artifacts.manifest import has_certificate
    from edgekd.artifacts.metadata import read_student
    from edgekd.backends.base import find_backend, load_recipe
    from edgekd.compiler.build import compile_engine, refuse_other_folder
    from edgekd.data.images import load_subset
    from edgekd.data.split import read_split

    out = out or source.with_suffix(".engine")
    overrides = config.parse_overrides(set_ or []) | ({"graphs": graphs} if graphs else {})
    if device is not None:
        if backend != RTX:
            raise ConfigError(f"--device is for --backend {RTX}", fix="omit it: others build for this machine")
        overrides[f"{RTX}.device"] = device
    compile_recipe = load_recipe(recipe, overrides=overrides)
    if recipe in config.names("compile") and "batch_sizes" not in overrides:
        compile_recipe = _with_batch_sizes_of_board(compile_recipe)
    if data is None and split is not None:
        raise ConfigError("--split without --data", fix="give the images, too")
    refuse_other_folder(out)
    reserve(out, data=data)
    had_certificate = has_certificate(out)
    student = read_student(source)
    calibration = validation = None
    with bar("read images") as progress:
        if data is not None and split is not None:
            found = read_split(split)
            load = functools.partial(load_subset, found, data=data, preprocess=student.metadata.preprocess)
            validation = load("val", progress=progress)
            if compile_recipe.precision == "int8":
                calibration, _ = load("train", limit=compile_recipe.calibration_images, progress=progress)
        elif data is not None:
            calibration, validation = seen_pictures(student, data, compile_recipe, progress)
    with bar("compile") as progress:
        manifest, attempts = compile_engine(
            student,
            out,
            recipe=compile_recipe,
            backend=backend,
            calibration=calibration,
            validation=validation,
            threads=threads,
            progress=progress,
        )
    echo(_attempts(attempts))
    ran = ", ".join(f"{name} {share:.0%}" for name, share in manifest.precision.items())
    name = find_backend(manifest.backend).recipe_name(manifest.recipe)
    echo(f"{out}: {manifest.backend} {manifest.backend_version}; recipe {name}, runs {ran}")
    for note in manifest.notes:
        echo(f"note: {note}")
    if manifest.pending:
        unknown = ", ".join(manifest.pending)
        echo(f"pending: {unknown} are unknown until it has run; copy it to its GPU and check it there:")
    if had_certificate:
        echo("the certificate of the replaced engine is void: certify this one with edgekd tune --max-change 1")
    if data is not None and split is None:
        echo("note: without labels, accuracy is agreement with the answers of student.onnx")
        next_command("tune", out, "--data", data, "--max-change", 1.0, "--certainty", 0.9)
    else:
        next_command("tune", out, "--data", data or "…", "--split", split or "…", "--max-accuracy-drop", 0.3)


def seen_pictures(
    student: StudentModel, data: Path, recipe: Recipe, progress: Progress
) -> tuple[Array | None, tuple[Array, Labels]]:
    """Load pictures that the network has learned from: every other one to calibrate, the rest for the gate.

    The others are not read: they are left for a promise. The gate's labels are the network's own answers.

    Raises:
        ConfigError: It is not known what the network has learned from.
        DataError: The folder holds hardly any of these pictures.
    """
    from edgekd.artifacts.training_images import seen
    from edgekd.data.folders import check, scan_pictures
    from edgekd.data.images import load_batch
    from edgekd.host import default_threads
    from edgekd.runtime.engine import reference_engine

    if student.metadata.training_images is None:
        raise ConfigError("--data and --split go together", fix="give the images and the run's split.json")
    items = check(scan_pictures(data), exclude_bad=True, progress=progress).folder.items
    known = seen(items, student.metadata.training_images)
    if len(known) < LEAST_SEEN:
        raise DataError(
            f"{data} holds {len(known)} of the pictures that the network has learned from: {LEAST_SEEN} are needed",
            fix="give the folder that was given to edgekd add-exits",
        )
    parts = known[::2][: recipe.calibration_images], known[1::2][:GATE_PICTURES]
    preprocess = student.metadata.preprocess
    calibration, images = (
        load_batch([data / item.path for item in part], preprocess, progress=progress) for part in parts
    )
    final = reference_engine(student.model, student.metadata, threads=default_threads()).logits(images)[-1]
    return calibration if recipe.precision == "int8" else None, (images, final.argmax(axis=1))


def _with_batch_sizes_of_board(recipe: Recipe) -> Recipe:
    """Return a shipped recipe with the batch sizes of this machine's device profile, if it has one."""
    from edgekd.artifacts.recipe import Recipe
    from edgekd.device_profiles import profile_of
    from edgekd.host import board

    found = profile_of(board())
    if found is None or not found[1].batch_sizes or recipe.batch_sizes != Recipe.batch_sizes:
        return recipe
    sizes = ", ".join(map(str, found[1].batch_sizes))
    echo(f"batch sizes {sizes}, from the device profile {found[0]} ({board()}); --set batch_sizes=[…] chooses others")
    return dataclasses.replace(recipe, batch_sizes=found[1].batch_sizes)


def _attempts(attempts: Iterable[Attempt]) -> str:
    """Format a row for each backend; a remark of several lines is repeated below in full."""
    from edgekd.text import aligned

    rows, below = [("backend", "ms at batch 1", "accuracy drop (points) [95 %]", "remarks")], ""
    for a in attempts:
        ms = "–" if a.batch1_ms is None else f"{a.batch1_ms:.2f}"
        drop = "unchecked" if a.drop is None else f"{a.drop:.2f}"
        drop += "" if a.drop_bounds is None else f" [{a.drop_bounds[0]:.2f}, {a.drop_bounds[1]:.2f}]"
        first, *others = a.note.splitlines() or [""]
        rows.append((a.backend, ms, drop if a.ok else "refused", first + (" …" if others else "")))
        below += f"\n{a.backend}: {a.note}" if others else ""
    return aligned(rows, remarks=True) + below
