"""Compilation of student.onnx: build with each backend, gate, time, and keep the fastest engine that passes."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import onnx

from edgekd._version import __version__
from edgekd.artifacts.manifest import (
    MANIFEST,
    NETWORK,
    NETWORK_FILE,
    Calibration,
    EngineFile,
    Manifest,
    write_manifest,
)
from edgekd.artifacts.metadata import ModelMetadata, StudentModel
from edgekd.artifacts.partition import graph_names, graphs
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import AUTO, AnyBackend, find_backend, installed
from edgekd.backends.report import describe_host
from edgekd.compiler.gate import (
    GateReport,
    Validation,
    bounds,
    check,
    read_back,
    stage_times,
    verdict,
    worst_drop,
)
from edgekd.errors import BackendError, ConfigError, EdgekdError, GateError
from edgekd.files import ENGINE, atomic_folder, sha256
from edgekd.host import HostInfo, checked_threads
from edgekd.progress import Span
from edgekd.quantization import quantize
from edgekd.runtime.engine import Engine, built_engine, reference_engine
from edgekd.types import Array, Labels, Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Attempt:
    """The result of one backend, a row of the table that `edgekd compile` prints.

    Attributes:
        backend: Name of the backend.
        ok: True if the engine was built and passed the gate.
        batch1_ms: Time of all stages in sequence on one image; None if there is no engine.
        precision: Precision to fraction of layers, as read back.
        drop: Percentage points that the worse of the predictions (ensemble, last exit) lost on the validation images;
            None if unchecked.
        drop_bounds: Confidence interval of the true drop.
        note: Remarks, or why it was refused.
    """

    backend: str
    ok: bool
    batch1_ms: float | None = None
    precision: dict[str, float] = field(default_factory=dict)
    drop: float | None = None
    drop_bounds: tuple[float, float] | None = None
    note: str = ""


def compile_engine(
    student: StudentModel,
    out: Path,
    *,
    recipe: Recipe,
    backend: str = AUTO,
    calibration: Array | None = None,
    validation: tuple[Array, Labels] | None,
    reference: Array | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> tuple[Manifest, list[Attempt]]:
    """Compile student.onnx into student.engine/.

    Args:
        student: The network.
        out: Folder to write; an engine there is replaced.
        recipe: Precision, batch sizes and options.
        backend: Name of a backend, or `auto`: every installed one is tried, and of the engines that pass the gate, the
            one whose stages together take least time on one image is kept.
        calibration: Preprocessed images (N, 3, H, W) of the training split, for int8.
        validation: Preprocessed images (N, 3, H, W) and labels (N,) of the validation split; None leaves parity and
            accuracy unchecked, which the manifest then notes.
        reference: Logits (E, N, C) of student.onnx on the validation images, for devices without ONNX Runtime, which
            otherwise computes them.
        threads: CPU threads of the engine; all that the process may use if None.
        progress: Called with the percentage done and 100.

    Returns:
        The manifest, and the result of every backend.

    Raises:
        ConfigError: int8 without calibration images; `out` is not an engine, or holds other files.
        BackendError: No backend can build the engine here, or what ran is not the requested precision.
        GateError: Predictions lose more accuracy than the recipe allows; the table is in the message.
    """
    refuse_other_folder(out)
    if recipe.precision == "int8" and (calibration is None or not len(calibration)):
        raise ConfigError("int8 needs calibration images of the training split", fix="give --data and --split")
    backends = installed() if backend == AUTO else [find_backend(backend)]
    threads, span = checked_threads(threads), Span(progress)
    gated = _validation(student, validation, reference, threads)
    compilation = Compilation(student, recipe, calibration, gated, threads)
    with atomic_folder(out) as folder:
        results = []
        for one in backends:
            results.append(_result(compilation, one, folder / one.name, span.part(1 / len(backends))))
            if backend != AUTO and results[0].error:
                raise results[0].error
        best = _fastest(results)
        for name in best.manifest.files:
            (best.folder / name).replace(folder / name)
        for one in backends:
            shutil.rmtree(folder / one.name, ignore_errors=True)
        write_manifest(folder, best.manifest)
    return best.manifest, [result.attempt for result in results]


def refuse_other_folder(out: Path) -> None:
    """Check that writing an engine to `out` loses nothing: it does not exist, or is an engine and nothing else.

    Raises:
        ConfigError: It holds something else, which is named.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out.is_dir() and ENGINE.matches(out / MANIFEST)):
        raise ConfigError(f"{out} exists and is not an engine: it would be replaced", fix="choose another --out")
    own = re.compile(rf"{MANIFEST}|(stage_\d+|monolithic|final|{NETWORK})\..+|\..+")
    for path in out.iterdir():
        if not (path.is_file() and own.fullmatch(path.name)):
            raise ConfigError(f"{path} would be lost: it is not part of the engine", fix="move it out of that folder")


def _validation(
    student: StudentModel, validation: tuple[Array, Labels] | None, reference: Array | None, threads: int
) -> Validation | None:
    """Return the validation split with the reference logits, which are computed if they are not given."""
    if validation is None:
        return None
    images, labels = validation
    if reference is None:
        reference = reference_engine(student.model, student.metadata, threads=threads).logits(images)
    return Validation(images, labels, reference)


@dataclass(frozen=True)
class _Engine:
    """An engine that passed the gate."""

    attempt: Attempt
    manifest: Manifest
    folder: Path
    error: None = None


@dataclass(frozen=True)
class _Failure:
    """A backend without an engine."""

    attempt: Attempt
    error: EdgekdError


def _result(compilation: Compilation, backend: AnyBackend, folder: Path, span: Span) -> _Engine | _Failure:
    try:
        return compilation.compile(backend, folder, span)
    except (BackendError, GateError) as error:
        return _Failure(Attempt(backend.name, ok=False, note=error.what), error)


def _fastest(results: list[_Engine | _Failure]) -> _Engine:
    """Return the engine whose stages take least time on one image.

    Raises:
        GateError, BackendError: There is none; with every backend's reason.
    """
    engines = [result for result in results if isinstance(result, _Engine)]
    if engines:
        return min(engines, key=lambda engine: sum(engine.manifest.stage_ms["1"]))
    errors = [result.error for result in results if isinstance(result, _Failure)]
    kind = GateError if any(isinstance(e, GateError) for e in errors) else BackendError
    raise kind("no backend passes:\n" + "\n".join(e.what for e in errors), fix=errors[0].fix)


@dataclass(frozen=True)
class _Candidate:
    """One engine, with int8 or with float exit heads, and the gate's report on it."""

    heads: str
    folder: Path
    manifest: Manifest
    engine: Engine
    report: GateReport

    @property
    def note(self) -> str:
        """The reason why another candidate may be preferred."""
        if self.report.refusal:
            return f"{self.heads} exit heads were refused: {self.report.refusal.what}"
        return f"{self.heads} exit heads lose {self.report.drop:.2f} points on the validation images"


class Compilation:
    """The compilation of one network with one recipe, for any number of backends.

    Args:
        student: The network.
        recipe: Precision, batch sizes and options.
        calibration: Images (N, 3, H, W) of the training split; int8 only.
        validation: Validation split; None to leave the engine unchecked.
        threads: CPU threads of the engine.
    """

    def __init__(
        self,
        student: StudentModel,
        recipe: Recipe,
        calibration: Array | None,
        validation: Validation | None,
        threads: int,
    ) -> None:
        self._student = student
        self._recipe = recipe
        self._images = calibration
        self._calibration = _calibration(recipe, calibration)
        self._validation = validation
        self._threads = threads
        self._quantized: dict[tuple[str, bool, bool], onnx.ModelProto] = {}
        self._hosts: dict[str, HostInfo] = {}

    def compile(self, backend: AnyBackend, folder: Path, span: Span) -> _Engine:
        """Build, gate and time an engine in `folder`.

        Raises:
            BackendError: The backend cannot build it, or what ran is not the requested precision.
            GateError: It is not accurate enough.
        """
        backend.check_supports(self._recipe)
        best, notes = self._most_accurate(backend, folder, span.part(0.9))
        precision = read_back(best.folder, best.manifest.metadata, backend, recipe=self._recipe)
        if not precision:
            notes.append(f"{backend.name} does not tell which precision runs")
        images = self._validation.images if self._validation else None
        stage_ms, monolithic_ms = stage_times(best.engine, images, sizes=self._recipe.batch_sizes)
        span.fraction(1)
        whole = [] if monolithic_ms is None else [f"in one piece {monolithic_ms:.2f} ms"]
        note = "; ".join([*whole, *notes])
        attempt = Attempt(backend.name, True, sum(stage_ms["1"]), precision, note=note)
        if accuracy := best.report.accuracy:
            worst = worst_drop(accuracy)
            attempt = replace(attempt, drop=worst.points, drop_bounds=bounds(worst, accuracy))
            notes.append(verdict(accuracy, limit=self._recipe.max_accuracy_drop))
        manifest = replace(
            best.manifest,
            precision=precision,
            parity=best.report.parity,
            accuracy=best.report.accuracy,
            stage_ms=stage_ms,
            notes=tuple(notes),
        )
        return _Engine(attempt, manifest, best.folder)

    def _most_accurate(self, backend: AnyBackend, folder: Path, span: Span) -> tuple[_Candidate, list[str]]:
        """Build candidates, and choose the one that loses least.

        int8 exit heads, which are faster than float ones, are kept if they pass and lose no more than is allowed; else
        float heads are tried, too.

        Returns:
            The candidate and the notes for its manifest.

        Raises:
            GateError: None passes; the last one's.
        """
        is_int8 = self._recipe.precision == "int8"
        heads = ["quantised", "float"] if is_int8 and len(self._student.metadata.exits) > 1 else ["quantised"]
        candidates: list[_Candidate] = []
        for one in heads:
            candidates.append(self._candidate(backend, folder / f"{one}-heads", one, span.part(1 / len(heads))))
            report = candidates[-1].report
            if report.refusal is None and report.drop <= self._recipe.max_accuracy_drop:
                break
        passed = [candidate for candidate in candidates if candidate.report.refusal is None]
        if not passed and (refusal := candidates[-1].report.refusal):
            raise refusal
        best = min(passed, key=lambda candidate: candidate.report.drop)
        notes = [] if self._validation else ["no validation images were given: accuracy and parity are unchecked"]
        notes += backend.build_notes(self._recipe)
        notes += [candidate.note for candidate in candidates if candidate is not best]
        if is_int8:
            notes.append(f"exit heads: {'int8' if best.heads == 'quantised' else 'float'} convolutions")
        return best, notes

    def _candidate(self, backend: AnyBackend, folder: Path, heads: str, span: Span) -> _Candidate:
        """Quantise, partition, build and gate one engine."""
        model = self._student.model
        if self._recipe.precision == "int8":
            model = self._quantise(backend, heads == "quantised", span.part(0.3))
        manifest = self._build(backend, folder, model, span.part(0.6))
        engine = built_engine(folder, manifest, threads=self._threads)
        report = check(engine, self._validation, recipe=self._recipe)
        span.fraction(1)
        return _Candidate(heads, folder, manifest, engine, report)

    def _quantise(self, backend: AnyBackend, heads: bool, span: Span) -> onnx.ModelProto:
        """Return the Q/DQ graph for a backend; backends with the same needs share one."""
        assert self._images is not None  # `compile_engine` checks it
        key = backend.quantization_target(self._recipe), heads, backend.reduces_range()
        if key not in self._quantized:
            target, _, reduce_range = key
            self._quantized[key] = quantize(
                self._student.model,
                self._student.metadata,
                self._images,
                target=target,
                heads=heads,
                reduce_range=reduce_range,
                method=self._recipe.calibration_method,
                progress=span,
            )
        return self._quantized[key]

    def _build(self, backend: AnyBackend, folder: Path, model: onnx.ModelProto, span: Span) -> Manifest:
        """Build every graph, and return the manifest as far as it is known."""
        files = build_graphs(backend, folder, model, self._student.metadata, recipe=self._recipe, span=span)
        if backend.name not in self._hosts:
            self._hosts[backend.name] = describe_host(backend.name)
        return Manifest(
            self._student.metadata,
            backend.name,
            str(backend.version()),
            self._recipe,
            precision={},
            host=self._hosts[backend.name],
            files=files,
            source_sha256=self._student.sha256,
            calibration=self._calibration,
            edgekd=__version__,
        )


def build_graphs(
    backend: AnyBackend,
    folder: Path,
    model: onnx.ModelProto,
    metadata: ModelMetadata,
    *,
    recipe: Recipe,
    span: Span,
) -> dict[str, EngineFile]:
    """Partition a network, build its graphs, and keep the network beside them if exits can be cut out of it.

    Args:
        backend: The backend.
        folder: Folder to write to; it is made.
        model: The network, quantised if the recipe is int8.
        metadata: Its metadata.
        recipe: Precision, batch sizes, options, and which graphs.
        span: Progress.

    Returns:
        The files of the engine.

    Raises:
        BackendError: The backend cannot build a graph.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = graph_names(metadata, whole=recipe.graphs == "all")
    files = build_parts(backend, folder, graphs(model, metadata, names), recipe=recipe, span=span)
    if len(metadata.exits) == 1:
        return files
    network = folder / NETWORK_FILE
    onnx.save(model, str(network))
    return files | {network.name: EngineFile(NETWORK, sha256(network), network.stat().st_size)}


def build_parts(
    backend: AnyBackend, folder: Path, parts: Mapping[str, onnx.ModelProto], *, recipe: Recipe, span: Span
) -> dict[str, EngineFile]:
    """Build graphs in `folder`, and return their files.

    Raises:
        BackendError: The backend cannot build one.
    """
    files = {}
    for name, graph in parts.items():
        part = span.part(1 / len(parts))
        backend.build(graph, folder / f"{name}{backend.suffix}", recipe=recipe, progress=part.fraction)
        part.fraction(1)
        for file in sorted(folder.glob(f"{name}.*")):
            files[file.name] = EngineFile(name, sha256(file), file.stat().st_size)
    return files


def _calibration(recipe: Recipe, images: Array | None) -> Calibration | None:
    if recipe.precision != "int8" or images is None:
        return None
    digest = hashlib.sha256(np.ascontiguousarray(images).tobytes()).hexdigest()
    return Calibration(len(images), recipe.calibration_method, digest)
