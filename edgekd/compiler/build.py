"""student.onnx to student.engine/: build with each backend, check, time, keep the fastest that is exact enough."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

import edgekd
from edgekd.artifacts.manifest import MANIFEST, EngineFile, Manifest, write_manifest
from edgekd.artifacts.metadata import ModelMetadata, read_onnx
from edgekd.artifacts.partition import graphs
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import AUTO, AnyBackend, find_backend, installed
from edgekd.backends.report import describe_host
from edgekd.compiler.gate import Labels, bounds, check, read_back, stage_times, verdict, worst_drop
from edgekd.errors import BackendError, ConfigError, EdgekdError, GateError
from edgekd.files import ENGINE, atomic_folder, sha256
from edgekd.host import checked_threads
from edgekd.runtime.engine import Engine, built_engine, open_engine
from edgekd.types import Array

log = logging.getLogger(__name__)
Progress: TypeAlias = Callable[[float, int], None]

STEPS = 4
"""Progress steps a backend takes: building with checking takes two, reading back one, timing one."""


@dataclass(frozen=True)
class Attempt:
    """What came of one backend, a row of the table that `edgekd compile` prints.

    batch1_ms: all stages one after the other, one image; None if it was not built.
    precision: precision to share of layers, as read back. drop: what the worse of the answers (ensemble and last
        exit) lost on the validation images, in points; None if unchecked. drop_bounds: of the true loss.
    """

    backend: str
    ok: bool
    batch1_ms: float | None = None
    precision: dict[str, float] = dataclasses.field(default_factory=dict)
    drop: float | None = None
    drop_bounds: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class _Job:
    """What is the same for all backends. `quantised(target, heads, reduce_range)` is kept for all that share it."""

    model: onnx.ModelProto
    metadata: ModelMetadata
    recipe: Recipe
    validation: tuple[Array, Labels] | None
    float_logits: Array | None
    quantised: Callable[[str, bool, bool], onnx.ModelProto]
    threads: int
    common: dict[str, Any]


def compile_engine(
    source: Path,
    out: Path,
    *,
    recipe: Recipe,
    backend: str = AUTO,
    calibration: Array | None,
    validation: tuple[Array, Labels] | None,
    reference: Array | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, list[Attempt]]:
    """Build student.engine/ from student.onnx.

    backend: a name, or `auto`: each installed one is built and the one whose stages together take least time on
        one image is kept, among those that pass.
    calibration: preprocessed images (N, 3, H, W) of the training split, for int8.
    validation: preprocessed images and labels of the validation split; None leaves accuracy unchecked, which the
        manifest then says.
    reference: student.onnx's logits (E, N, C) on the validation images, for devices without ONNX Runtime, which
        otherwise computes them.

    Raises:
        ConfigError: int8 without calibration images; `out` is something else than an engine, or holds more.
        BackendError: no backend can build this here, or what ran is not the precision that was asked for.
        GateError: answers lose more accuracy than the recipe allows; the table is in the message.
    """
    refuse_other_folder(out)
    threads = checked_threads(threads)
    backends = installed() if backend == AUTO else [find_backend(backend)]
    if validation and reference is None:
        reference = open_engine(source, threads=threads).logits(validation[0])
    job = _job(source, recipe, calibration, validation, reference, threads)
    built: dict[str, tuple[Manifest, Path]] = {}
    attempts: list[Attempt] = []
    errors: list[EdgekdError] = []
    with atomic_folder(out) as part:
        for i, one in enumerate(backends):
            step = functools.partial(_step, progress, before=i * STEPS, total=len(backends) * STEPS)
            try:
                manifest, folder, attempt = _build(job, part / one.name, backend=one, step=step)
                built[one.name] = manifest, folder
                attempts.append(attempt)
            except (BackendError, GateError) as error:
                if backend != AUTO:
                    raise
                errors.append(error)
                attempts.append(Attempt(one.name, ok=False, note=error.what))
            step(STEPS)
        manifest, folder = built[_fastest(attempts, errors)]
        _keep(part, manifest, folder, others=[b.name for b in backends])
    return manifest, attempts


def refuse_other_folder(out: Path) -> None:
    """See that nothing is lost when an engine is written to `out`: there is none, or an engine and nothing else.

    Raises:
        ConfigError: there is something else, which is named.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_dir() and ENGINE.matches(out / MANIFEST)):
        raise ConfigError(f"{out} is there and is no engine: it would be replaced", fix="choose another --out")
    own = re.compile(rf"{MANIFEST}|(stage_\d+|monolithic|final)\..+|\..+")
    for path in out.iterdir():
        if not (path.is_file() and own.fullmatch(path.name)):
            raise ConfigError(f"{path} would be lost: it is no part of the engine", fix="move it out of that folder")


def _step(progress: Progress | None, done: float, *, before: int, total: int) -> None:
    if progress:
        progress(before + done, total)


def _job(
    source: Path,
    recipe: Recipe,
    calibration: Array | None,
    validation: tuple[Array, Labels] | None,
    reference: Array | None,
    threads: int,
) -> _Job:
    model, metadata = read_onnx(source)
    if recipe.precision == "int8" and (calibration is None or not len(calibration)):
        raise ConfigError("int8 needs calibration images of the training split", fix="give --data and --split")

    @functools.cache
    def quantised(target: str, heads: bool, reduce_range: bool) -> onnx.ModelProto:
        from edgekd.quantization import quantize

        assert calibration is not None  # asked for above
        method = recipe.calibration_method
        return quantize(
            model, metadata, calibration, target=target, heads=heads, reduce_range=reduce_range, method=method
        )

    calibrated = {}
    if recipe.precision == "int8" and calibration is not None:
        digest = hashlib.sha256(np.ascontiguousarray(calibration).tobytes()).hexdigest()
        calibrated = {"images": len(calibration), "method": recipe.calibration_method, "sha256": digest}
    common = {
        "recipe": recipe,
        "source_sha256": sha256(source),
        "calibration": calibrated,
        "edgekd": edgekd.__version__,
    }
    return _Job(model, metadata, recipe, validation, reference, quantised, threads, common)


def _fastest(attempts: list[Attempt], errors: list[EdgekdError]) -> str:
    passed = {a.backend: a.batch1_ms for a in attempts if a.ok and a.batch1_ms is not None}
    if passed:
        return min(passed, key=lambda name: passed[name])
    kind = GateError if any(isinstance(e, GateError) for e in errors) else BackendError
    raise kind("no backend passes:\n" + "\n".join(e.what for e in errors), fix=errors[0].fix)


def _keep(folder: Path, manifest: Manifest, built: Path, *, others: list[str]) -> None:
    for name in manifest.files:
        (built / name).replace(folder / name)
    for other in others:
        shutil.rmtree(folder / other, ignore_errors=True)
    write_manifest(folder, manifest)


def _build(
    job: _Job, folder: Path, *, backend: AnyBackend, step: Callable[[float], None]
) -> tuple[Manifest, Path, Attempt]:
    """Write, check and time one backend's engine, somewhere in `folder`."""
    manifest, engine, folder = _exact_enough(job, folder, backend=backend, step=step)
    step(2)
    precision = read_back(folder, backend, recipe=job.recipe)
    step(3)
    images = job.validation[0] if job.validation else None
    stage_ms, monolithic_ms = stage_times(engine, images, sizes=job.recipe.batch_sizes)
    note = "; ".join([f"in one piece {monolithic_ms:.2f} ms", *manifest.notes])
    attempt = Attempt(backend.name, True, sum(stage_ms["1"]), precision, note=note)
    notes = manifest.notes
    if accuracy := manifest.accuracy:
        worst = worst_drop(accuracy)
        attempt = dataclasses.replace(attempt, drop=worst.points, drop_bounds=bounds(worst, accuracy))
        notes = (*notes, verdict(accuracy, limit=job.recipe.max_accuracy_drop))
    return dataclasses.replace(manifest, precision=precision, stage_ms=stage_ms, notes=notes), folder, attempt


def _exact_enough(
    job: _Job, folder: Path, *, backend: AnyBackend, step: Callable[[float], None]
) -> tuple[Manifest, Engine, Path]:
    """Write and check. int8 heads, which are faster than float ones, are kept if they seem to lose no more than is
    allowed; else both are built, and the one that loses less is kept.

    Raises:
        GateError: neither passes.
    """
    int8 = job.recipe.precision == "int8"
    notes = [] if job.validation else ["no validation images were given: accuracy and parity are unchecked"]
    notes += backend.build_notes(job.recipe)
    passed: list[tuple[float, Manifest, Engine, Path]] = []
    for heads in (True, False) if int8 and len(job.metadata.exits) > 1 else (True,):
        part = folder / ("int8-heads" if heads else "float-heads")
        manifest = _write(job, part, backend=backend, heads=heads, step=step)
        engine = built_engine(part, manifest, threads=job.threads)
        try:
            parity, accuracy = check(engine, job.validation, job.float_logits, recipe=job.recipe)
        except GateError as error:
            refusal = error
            notes.append(f"{'quantised' if heads else 'float'} exit heads were refused: {error.what}")
            continue
        lost = worst_drop(accuracy).points if accuracy else 0.0
        said = [*notes, f"exit heads: {'int8' if heads else 'float'} convolutions"] if int8 else notes
        manifest = dataclasses.replace(manifest, parity=parity, accuracy=accuracy, notes=tuple(said))
        passed.append((lost, manifest, engine, part))
        if lost <= job.recipe.max_accuracy_drop:
            break
        notes.append(f"quantised exit heads lose {lost:.2f} points on the validation images")
    if not passed:
        raise refusal
    return min(passed, key=lambda found: found[0])[1:]


def _write(job: _Job, folder: Path, *, backend: AnyBackend, heads: bool, step: Callable[[float], None]) -> Manifest:
    """Every graph's files, and the manifest as far as it is known by then."""
    backend.check_supports(job.recipe)
    target = backend.quantization_target(job.recipe)
    model = job.quantised(target, heads, backend.reduces_range()) if job.recipe.precision == "int8" else job.model
    folder.mkdir(parents=True)
    files, parts = {}, graphs(model, job.metadata)
    for i, (name, graph) in enumerate(parts.items()):
        progress = functools.partial(lambda i, share: step(2 * (i + share) / len(parts)), i)
        backend.build(graph, folder / f"{name}{backend.suffix}", recipe=job.recipe, progress=progress)
        for file in sorted(folder.glob(f"{name}.*")):
            files[file.name] = EngineFile(name, sha256(file), file.stat().st_size)
    common = {**job.common, "host": describe_host(backend.name)}
    return Manifest(job.metadata, backend.name, str(backend.version()), precision={}, files=files, **common)
