"""Compilation of student.onnx: build with each backend, gate, time, and keep the fastest engine that passes."""

from __future__ import annotations

import hashlib
import itertools
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
    PENDING,
    STUDENT,
    STUDENT_FILE,
    Calibration,
    EngineFile,
    Manifest,
    write_manifest,
)
from edgekd.artifacts.metadata import ModelMetadata, StudentModel
from edgekd.artifacts.partition import graph_names, graphs
from edgekd.artifacts.recipe import Recipe
from edgekd.backends.base import AUTO, REFERENCE, AnyBackend, find_backend, installed
from edgekd.backends.report import describe_host
from edgekd.compiler.gate import (
    LEAST_INT8,
    GateReport,
    Validation,
    bounds,
    check,
    read_back,
    stage_times,
    times_in_turns,
    verdict,
    worst_drop,
)
from edgekd.compiler.int8 import Int8Search, Quantization, Target, described
from edgekd.errors import BackendError, ConfigError, EdgekdError, GateError
from edgekd.files import ENGINE, atomic_folder, sha256
from edgekd.host import HostInfo, checked_threads
from edgekd.progress import Span
from edgekd.quantization.blocks import Block
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
        The manifest, and the result of every backend. Where the backend can build but not run, the engine is pending:
        `pending.complete` checks it on the machine that runs it. `auto` builds no such engine.

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
    is_pending = backend != AUTO and bool(backends[0].cannot_run(recipe))
    gated = None if is_pending else _validation(student, validation, reference, threads)
    compilation = Compilation(student, recipe, calibration, gated, threads)
    with atomic_folder(out) as folder:
        results = []
        for one in backends:
            part = span.part(1 / len(backends))
            results.append(_result(compilation, one, folder / one.name, part, may_be_pending=backend != AUTO))
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
    own = re.compile(rf"{MANIFEST}|(stage_\d+|monolithic|final|{NETWORK}|{STUDENT})\..+|\..+")
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


def _result(
    compilation: Compilation, backend: AnyBackend, folder: Path, span: Span, *, may_be_pending: bool
) -> _Engine | _Failure:
    try:
        return compilation.compile(backend, folder, span, may_be_pending=may_be_pending)
    except (BackendError, GateError) as error:
        return _Failure(Attempt(backend.name, ok=False, note=error.what), error)


def _fastest(results: list[_Engine | _Failure]) -> _Engine:
    """Return the engine whose stages take least time on one image.

    Raises:
        GateError, BackendError: There is none; with every backend's reason.
    """
    engines = [result for result in results if isinstance(result, _Engine)]
    if engines:
        return min(engines, key=lambda engine: sum(engine.manifest.stage_ms.get("1", ())))
    errors = [result.error for result in results if isinstance(result, _Failure)]
    kind = GateError if any(isinstance(e, GateError) for e in errors) else BackendError
    raise kind("no backend passes:\n" + "\n".join(e.what for e in errors), fix=errors[0].fix)


@dataclass(frozen=True)
class _Candidate:
    """One engine, quantised in one way (None: float), and the gate's report on it."""

    quantization: Quantization | None
    folder: Path
    manifest: Manifest
    engine: Engine
    report: GateReport

    @property
    def heads(self) -> str:
        """The kind of exit heads."""
        return "quantised" if self.quantization is None or self.quantization.heads else "float"

    @property
    def note(self) -> str:
        """The reason why another candidate may be preferred."""
        is_plain = len(self.manifest.metadata.exits) == 1
        what, was, loses = ("plain int8", "was", "loses") if is_plain else (f"{self.heads} exit heads", "were", "lose")
        if self.report.refusal:
            return f"{what} {was} refused: {self.report.refusal.what}"
        return f"{what} {loses} {self.report.drop:.2f} points on the validation images"

    def within(self, limit: float) -> bool:
        """Return True if it passes and loses no more than `limit` points on the validation images."""
        return self.report.refusal is None and self.report.drop <= limit


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
        self._search = (
            Int8Search(student, calibration) if recipe.precision == "int8" and calibration is not None else None
        )
        self._quantized: dict[tuple[Target, Quantization], onnx.ModelProto] = {}
        self._hosts: dict[str, HostInfo] = {}

    def compile(self, backend: AnyBackend, folder: Path, span: Span, *, may_be_pending: bool) -> _Engine:
        """Build, gate and time an engine in `folder`; or only build it, if it cannot run here and may be pending.

        Raises:
            BackendError: The backend cannot build it, or what ran is not the requested precision; or it cannot run
                here and may not be pending.
            GateError: It is not accurate enough.
        """
        backend.check_supports(self._recipe)
        if reason := backend.cannot_run(self._recipe):
            if not may_be_pending:
                what = f"{backend.name} cannot run here, so its engine would be pending: {reason}"
                raise BackendError(what, fix=f"give --backend {backend.name} to build one for another machine")
            return self._pending(backend, folder, span, reason)
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

    def _pending(self, backend: AnyBackend, folder: Path, span: Span, reason: str) -> _Engine:
        """Build an engine that cannot run here, with its float network, by which it is checked where it can.

        Nothing tells here what int8 exit heads would cost, so heads stay float.
        """
        model = self._student.model
        notes = [f"pending, since it cannot run where it was built: {reason}", *backend.build_notes(self._recipe)]
        if self._recipe.precision == "int8":
            way = Quantization(heads=False, method=self._recipe.calibration_method)
            model = self._quantise(backend, way, span.part(0.3))
            notes.append("exit heads: float convolutions")
        built = self._build(backend, folder, model, span.part(0.6))
        precision = read_back(folder, self._student.metadata, backend, recipe=self._recipe)
        student = folder / STUDENT_FILE
        onnx.save(self._student.model, str(student))
        files = built.files | {STUDENT_FILE: EngineFile(STUDENT, sha256(student), student.stat().st_size)}
        manifest = replace(built, precision=precision, files=files, notes=tuple(notes), pending=PENDING)
        span.fraction(1)
        return _Engine(Attempt(backend.name, True, None, precision, note="; ".join(notes)), manifest, folder)

    def _most_accurate(self, backend: AnyBackend, folder: Path, span: Span) -> tuple[_Candidate, list[str]]:
        """Build candidates, and choose the one that loses least.

        int8 exit heads, which are faster than float ones, are kept if they pass and lose no more than is allowed; else
        float heads are tried, too, and then what `_mended` finds.

        Returns:
            The candidate and the notes for its manifest.

        Raises:
            GateError: None passes; that of the one that loses least, and what was tried.
        """
        is_int8, limit = self._recipe.precision == "int8", self._recipe.max_accuracy_drop
        heads = [True, False] if is_int8 and len(self._student.metadata.exits) > 1 else [True]
        ways = [Quantization(one, self._recipe.calibration_method) if is_int8 else None for one in heads]
        candidates: list[_Candidate] = []
        for way in ways:
            candidates.append(self._candidate(backend, folder, way, span.part(0.5 / len(ways))))
            if candidates[-1].within(limit):
                break
        plain, tried = list(candidates), list[str]()
        if is_int8 and self._recipe.int8_attempts and not candidates[-1].within(limit):
            more, tried = self._mended(backend, folder, plain, span.part(0.5))
            candidates += more
        best = _least_lossy(candidates)
        if refusal := best.report.refusal:
            what = "\n".join([refusal.what, *(f"  {line}" for line in tried)])
            raise GateError(what, fix=refusal.fix)
        notes = [] if self._validation else ["no validation images were given: accuracy and parity are unchecked"]
        notes += backend.build_notes(self._recipe)
        notes += [candidate.note for candidate in plain if candidate is not best]
        notes += tried
        if len(candidates) > len(plain):
            notes.append(self._cost(best, plain[0]))
        if is_int8:
            notes.append(f"exit heads: {'int8' if best.heads == 'quantised' else 'float'} convolutions")
        return best, notes

    def _mended(
        self, backend: AnyBackend, folder: Path, plain: list[_Candidate], span: Span
    ) -> tuple[list[_Candidate], list[str]]:
        """Build int8 candidates that lose less, until one is good enough: other ranges and corrections, then blocks.

        What is tried is chosen on calibration images. Of the most sensitive blocks 1, 2, 4, … are left in float, so
        that few candidates are judged on the validation images.

        Returns:
            The candidates, and what was tried, for the manifest or the refusal.
        """
        assert self._search is not None  # int8
        if find_backend(REFERENCE).version() is None:
            return [], ["ONNX Runtime is not installed, so no cause was looked for"]
        target, limit = self._target(backend), self._recipe.max_accuracy_drop
        nearest = min(plain, key=lambda candidate: candidate.report.drop)
        start = nearest.quantization
        assert start is not None  # int8
        found: list[_Candidate] = []
        improved = self._search.improve(target, start, span.part(0.3))
        tried = [str(improved)]

        def build(way: Quantization, share: float) -> bool:
            found.append(self._candidate(backend, folder, way, span.part(share)))
            for other in found:
                if other is not _least_lossy(found):
                    other.engine.close()
            tried.append(f"{described(way, start)}: {found[-1].report.drop:+.2f} points")
            return found[-1].within(limit)

        if improved.quantization != start and build(improved.quantization, 0.1):
            return found, tried
        attempts = self._recipe.int8_attempts - len(found)
        sensitive = self._search.sensitive_blocks(target, improved.quantization, span.part(0.3)) if attempts else []
        for count in _doubling(_affordable(sensitive, *self._search.layers(start.heads)), attempts):
            if build(replace(improved.quantization, floats=tuple(sensitive[:count])), 0.3 / attempts):
                break
        if not sensitive and attempts:
            tried.append("no block in float brings the logits nearer")
        return found, tried

    def _cost(self, best: _Candidate, plain: _Candidate) -> str:
        """Return what the chosen engine takes compared with plain int8, timed in turns, and how many were judged."""
        if best.quantization is None or best.quantization == plain.quantization:
            return "none of these loses less: plain int8 is kept"
        images = self._validation.images if self._validation else None
        before, after = (sum(ms) for ms in times_in_turns([plain.engine, best.engine], images))
        floats = "; ".join(block.name for block in best.quantization.floats)
        return (
            f"{f'left in float: {floats}; ' if floats else ''}stages take {after:.2f} ms on one image, "
            f"{after / before:.2f} times the {before:.2f} ms of plain int8; "
            "chosen by logits on calibration images, judged on the validation images"
        )

    def _candidate(self, backend: AnyBackend, folder: Path, way: Quantization | None, span: Span) -> _Candidate:
        """Quantise, partition, build and gate one engine, in a folder of its own."""
        folder = folder / str(len(list(folder.glob("*"))))
        model = self._student.model
        if way is not None:
            model = self._quantise(backend, way, span.part(0.3))
        manifest = self._build(backend, folder, model, span.part(0.6))
        if way is not None and manifest.calibration is not None:
            manifest = replace(manifest, calibration=replace(manifest.calibration, method=way.method))
        engine = built_engine(folder, manifest, threads=self._threads)
        report = check(engine, self._validation, recipe=self._recipe)
        span.fraction(1)
        return _Candidate(way, folder, manifest, engine, report)

    def _target(self, backend: AnyBackend) -> Target:
        return Target(backend.quantization_target(self._recipe), backend.reduces_range())

    def _quantise(self, backend: AnyBackend, way: Quantization, span: Span) -> onnx.ModelProto:
        """Return the Q/DQ graph for a backend; backends with the same needs share one."""
        assert self._search is not None  # int8
        key = self._target(backend), way
        if key not in self._quantized:
            self._quantized[key] = self._search.graph(*key, span)
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


def _least_lossy(candidates: list[_Candidate]) -> _Candidate:
    """Return the candidate that loses least, of those that pass if any does."""
    return min(candidates, key=lambda candidate: (candidate.report.refusal is not None, candidate.report.drop))


def _affordable(sensitive: list[Block], quantized: int, layers: int) -> int:
    """Return how many blocks may be float for `read_back` to accept the engine as int8."""
    floats = itertools.accumulate(block.convolutions for block in sensitive)
    return sum(quantized - count >= LEAST_INT8 * layers for count in floats)


def _doubling(most: int, attempts: int) -> list[int]:
    """Return 1, 2, 4, … up to `most`, which is the last, and no more than `attempts` numbers."""
    counts = sorted({min(2**k, most) for k in range(most.bit_length() + 1)} - {0})
    return counts if len(counts) <= attempts else [*counts[: attempts - 1], counts[-1]] if attempts else []


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
