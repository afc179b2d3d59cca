"""The check of an engine that was built where it cannot run, on the machine that runs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edgekd.artifacts.manifest import STUDENT_FILE, Manifest, read_manifest, write_manifest
from edgekd.artifacts.metadata import StudentModel, read_student
from edgekd.backends.report import describe_host
from edgekd.compiler.gate import Validation, check, stage_times, verdict
from edgekd.errors import ArtifactError, ConfigError
from edgekd.runtime.engine import open_engine, reference_engine
from edgekd.types import Array, Labels


def float_network(folder: Path) -> StudentModel:
    """Read the network that a pending engine was compiled from.

    Raises:
        ArtifactError: The folder is no engine, or a file of it is missing, damaged or edited.
    """
    read_manifest(folder)
    return read_student(folder / STUDENT_FILE)


def complete(folder: Path, images: Array, labels: Labels, *, threads: int | None = None) -> Manifest:
    """Check a pending engine against its float network, time its stages, and write the completed manifest.

    An engine that is refused stays pending. The float network is removed from a completed engine.

    Args:
        folder: The engine folder.
        images: Preprocessed images (N, 3, H, W) of the validation split.
        labels: Labels (N,).
        threads: CPU threads of the float network; all that the process may use if None.

    Returns:
        The manifest.

    Raises:
        ConfigError: There are no images.
        ArtifactError, BackendError: See `open_engine`; or the engine was rewritten in the meantime.
        GateError: Predictions differ or lose more accuracy than the recipe allows.
    """
    if not len(images):
        raise ConfigError("a pending engine needs validation images for its check", fix="give a split that has some")
    engine = open_engine(folder, threads=threads, pending=True)
    manifest = engine.manifest
    if manifest is None or not manifest.pending:
        raise ArtifactError(f"{folder} is not pending", fix="omit the check")
    student = float_network(folder)
    reference = reference_engine(student.model, student.metadata, threads=engine.threads).logits(images)
    report = check(engine, Validation(images, labels, reference), recipe=manifest.recipe)
    if report.refusal:
        raise report.refusal
    assert report.accuracy is not None, "there are images"
    stage_ms, _ = stage_times(engine, images, sizes=manifest.recipe.batch_sizes)
    notes = (*manifest.notes[1:], f"built on {manifest.host.system} {manifest.host.machine}, checked and timed later")
    completed = dataclasses.replace(
        manifest,
        host=describe_host(manifest.backend),
        files={name: file for name, file in manifest.files.items() if name != STUDENT_FILE},
        parity=report.parity,
        accuracy=report.accuracy,
        stage_ms=stage_ms,
        notes=(*notes, verdict(report.accuracy, limit=manifest.recipe.max_accuracy_drop)),
        pending=(),
    )
    if read_manifest(folder).digest != engine.digest:
        raise ArtifactError(f"{folder} was rewritten while it was being checked", fix="run the command again")
    write_manifest(folder, completed)
    (folder / STUDENT_FILE).unlink(missing_ok=True)
    return read_manifest(folder)
