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
from edgekd.artifact import MANIFEST, Card, EngineFile, Manifest, read_onnx, write_manifest
from edgekd.engines.backends import find_backend, installed
from edgekd.engines.check import Labels, check, drops, read_back, stage_times
from edgekd.engines.engine import Engine, built_engine, open_engine
from edgekd.engines.graphs import graphs
from edgekd.engines.recipe import Recipe
from edgekd.errors import BackendError, ConfigError, EdgekdError, GateError
from edgekd.files import ENGINE, atomic_folder, sha256
from edgekd.host import default_threads, host
from edgekd.runtime.preprocess import Array

log = logging.getLogger(__name__)
Progress: TypeAlias = Callable[[float, int], None]

STEPS = 4
"""Progress steps a backend takes: building with checking takes two, reading back one, timing one."""


@dataclass(frozen=True)
class Attempt:
    """What came of one backend, a row of the table that `edgekd compile` prints.

    batch1_ms: all stages one after the other, one image; None if it was not built.
    precision: precision to share of layers, as read back. drop: worst loss of an exit, in points; None if unchecked.
    """

    backend: str
    ok: bool
    batch1_ms: float | None = None
    precision: dict[str, float] = dataclasses.field(default_factory=dict)
    drop: float | None = None
    note: str = ""


@dataclass(frozen=True)
class _Job:
    """What is the same for all backends. `quantised(target, heads)` is made once for all that share it."""

    model: onnx.ModelProto
    card: Card
    recipe: Recipe
    validation: tuple[Array, Labels] | None
    float_logits: Array | None
    quantised: Callable[[str, bool], onnx.ModelProto]
    threads: int
    common: dict[str, Any]


def compile_engine(
    source: Path,
    out: Path,
    *,
    recipe: Recipe,
    backend: str = "auto",
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
        GateError: an exit loses more accuracy than the recipe allows; the table is in the message.
    """
    refuse_other_folder(out)
    names = installed() if backend == "auto" else [backend]
    if validation and reference is None:
        reference = open_engine(source, threads=threads).logits(validation[0])
    job = _job(source, recipe, calibration, validation, reference, threads or default_threads())
    built: dict[str, Manifest] = {}
    attempts: list[Attempt] = []
    errors: list[EdgekdError] = []
    with atomic_folder(out) as part:
        for i, name in enumerate(names):
            step = functools.partial(_step, progress, before=i * STEPS, total=len(names) * STEPS)
            try:
                built[name], attempt = _build(job, part / name, backend=name, step=step)
                attempts.append(attempt)
            except (BackendError, GateError) as error:
                if backend != "auto":
                    raise
                errors.append(error)
                attempts.append(Attempt(name, ok=False, note=error.what))
            step(STEPS)
        manifest = built[_fastest(attempts, errors)]
        _keep(part, manifest, others=names)
    return manifest, attempts


def refuse_other_folder(out: Path) -> None:
    """See that nothing is lost when an engine is written to `out`: there is none, or an engine and nothing else.

    Raises:
        ConfigError: there is something else, which is named.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_dir() and ENGINE.has(out / MANIFEST)):
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
    model, card = read_onnx(source)
    if recipe.precision == "int8" and (calibration is None or not len(calibration)):
        raise ConfigError("int8 needs calibration images of the training split", fix="give --data and --split")

    @functools.cache
    def quantised(target: str, heads: bool) -> onnx.ModelProto:
        from edgekd.quantize import quantize  # it reads this package's graphs

        assert calibration is not None  # asked for above
        return quantize(model, card, calibration, target=target, heads=heads, method=recipe.calibration_method)

    calibrated = {}
    if recipe.precision == "int8" and calibration is not None:
        digest = hashlib.sha256(np.ascontiguousarray(calibration).tobytes()).hexdigest()
        calibrated = {"images": len(calibration), "method": recipe.calibration_method, "sha256": digest}
    common = {
        "recipe": dataclasses.asdict(recipe),
        "host": host(),
        "source_sha256": sha256(source),
        "calibration": calibrated,
        "edgekd": edgekd.__version__,
    }
    return _Job(model, card, recipe, validation, reference, quantised, threads, common)


def _fastest(attempts: list[Attempt], errors: list[EdgekdError]) -> str:
    passed = {a.backend: a.batch1_ms for a in attempts if a.ok and a.batch1_ms is not None}
    if passed:
        return min(passed, key=lambda name: passed[name])
    kind = GateError if any(isinstance(e, GateError) for e in errors) else BackendError
    raise kind("no backend passes:\n" + "\n".join(e.what for e in errors), fix=errors[0].fix)


def _keep(folder: Path, manifest: Manifest, *, others: list[str]) -> None:
    for name in manifest.files:
        (folder / manifest.backend / name).replace(folder / name)
    for other in others:
        shutil.rmtree(folder / other, ignore_errors=True)
    write_manifest(folder, manifest)


def _build(job: _Job, folder: Path, *, backend: str, step: Callable[[float], None]) -> tuple[Manifest, Attempt]:
    """Write, check and time one backend's engine."""
    manifest, engine = _exact_enough(job, folder, backend=backend, step=step)
    step(2)
    precision = read_back(folder, backend=backend, recipe=job.recipe)
    step(3)
    images = job.validation[0] if job.validation else None
    stage_ms, monolithic_ms = stage_times(engine, images, sizes=job.recipe.batch_sizes)
    drop = max(drops(manifest.accuracy)) if manifest.accuracy else None
    note = "; ".join([f"in one piece {monolithic_ms:.2f} ms", *(n.splitlines()[0] for n in manifest.notes)])
    manifest = dataclasses.replace(manifest, precision=precision, stage_ms=stage_ms)
    return manifest, Attempt(backend, True, sum(stage_ms["1"]), precision, drop, note)


def _exact_enough(job: _Job, folder: Path, *, backend: str, step: Callable[[float], None]) -> tuple[Manifest, Engine]:
    """Write and check. int8 heads are tried first and kept if they pass: they are faster than float ones.

    Raises:
        GateError: neither passes.
    """
    int8 = job.recipe.precision == "int8"
    notes = [] if job.validation else ["no validation images were given: accuracy and parity are unchecked"]
    for heads in (True, False) if int8 and len(job.card.exits) > 1 else (True,):
        manifest = _write(job, folder, backend=backend, heads=heads, step=step)
        engine = built_engine(folder, manifest, threads=job.threads)
        try:
            parity, accuracy = check(engine, job.validation, job.float_logits, recipe=job.recipe)
        except GateError as error:
            refusal = error
            notes.append(f"quantised exit heads were refused: {error.what}")
            continue
        if int8:
            notes.append(f"exit heads: {'int8' if heads else 'float'} convolutions")
        return dataclasses.replace(manifest, parity=parity, accuracy=accuracy, notes=tuple(notes)), engine
    raise refusal


def _write(job: _Job, folder: Path, *, backend: str, heads: bool, step: Callable[[float], None]) -> Manifest:
    """Every graph's files, and the manifest as far as it is known by then."""
    module = find_backend(backend)
    if job.recipe.tensorrt.dla_core is not None and backend != "tensorrt":
        raise BackendError(f"{backend} builds for no DLA", fix="use --backend tensorrt, or another --recipe")
    target = module.TARGET if job.recipe.tensorrt.dla_core is None else "dla"
    model = job.quantised(target, heads) if job.recipe.precision == "int8" else job.model
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files, parts = {}, graphs(model, job.card)
    for i, (name, graph) in enumerate(parts.items()):
        progress = functools.partial(lambda i, share: step(2 * (i + share) / len(parts)), i)
        module.build(graph, folder / f"{name}{module.SUFFIX}", recipe=job.recipe, progress=progress)
        for file in sorted(folder.glob(f"{name}.*")):
            files[file.name] = EngineFile(name, sha256(file), file.stat().st_size)
    version, here = str(module.version()), module.here() if hasattr(module, "here") else {}
    common = {**job.common, "host": {**job.common["host"], **here}}
    return Manifest(job.card, backend, version, precision={}, files=files, **common)
