"""`edgekd bench`: measures every variant of an engine, and other models, in rounds of fresh processes."""

from __future__ import annotations

import datetime
import json
import logging
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.certificate import Certificate
from edgekd.artifacts.manifest import Manifest, void_reason
from edgekd.artifacts.partition import WHOLE
from edgekd.backends.report import describe_host
from edgekd.bench import energy, variants
from edgekd.bench.accuracy import answered, metrics
from edgekd.bench.intervals import group_numbers
from edgekd.bench.record import EngineFacts, Record, SplitFacts, Timing, Variant
from edgekd.bench.suite import Suite
from edgekd.bench.targets import targets, warnings
from edgekd.bench.worker import OVERHEAD_QUERIES, WorkerResult, WorkerTask
from edgekd.child import start_child
from edgekd.compiler.whole_graphs import write_with_graphs
from edgekd.data.images import load, load_subset
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import Split
from edgekd.errors import BackendError, ConfigError
from edgekd.files import sha256, temporary_folder
from edgekd.host import load_average
from edgekd.runtime.engine import Engine, open_engine
from edgekd.serialization import flat, read_json, to_json
from edgekd.types import Array, Labels, Progress

log = logging.getLogger(__name__)
PREPROCESSED = 200
"""Files on which preprocessing is timed."""
PILOT_QUERIES = 3
"""Queries of each batch size from which the duration of a benchmark is estimated."""


@dataclass(frozen=True)
class Entry:
    """One variant to be measured.

    Attributes:
        name: Row of the table.
        engine: The opened engine.
        path: Path of its folder or file.
        variant: Name of the variant.
        baseline: True for an `--against` model.
    """

    name: str
    engine: Engine
    path: Path
    variant: str
    baseline: bool


def bench(
    engine_path: Path,
    *,
    suite: Suite,
    data: Path,
    split: Split,
    against: Mapping[str, Path] | None = None,
    command: str = "",
    progress: Progress | None = None,
    on_estimate: Callable[[float], None] | None = None,
) -> Record:
    """Measure student.engine/ or student.onnx on the split's test images.

    Args:
        engine_path: The engine under test.
        suite: Settings of the benchmark.
        data: Folder of the images.
        split: The split whose test images are used.
        against: Name to engine folder or ONNX file of other networks, which predict with their last exit.
        command: The command line, for the record.
        progress: Called with the number of worker processes done and their total.
        on_estimate: Called once with the estimated duration in seconds, from a short pilot of each network.

    Raises:
        ConfigError: Names or classes that do not fit.
        ArtifactError, DataError: See `open_engine` and `load_subset`.
        BackendError: A worker process failed; its last line of output is given.
    """
    engine = open_engine(engine_path, threads=suite.threads)
    entries = plan(engine, engine_path, suite, against or {})
    _same_classes(entries, split)
    before, meter = load_average(), energy.find_meter()
    watts = energy.idle_watts(meter)
    items = split.subset("test")
    groups = group_numbers(items)
    with temporary_folder("bench") as folder:
        entries = _complete(entries, folder)
        images, labels = _prepare(entries, split, data, folder)
        preprocess_ms = _time_preprocessing([data / i.path for i in items], engine.metadata.preprocess)
        if on_estimate:
            on_estimate(_estimate_seconds(entries, suite, images, len(labels), folder))
        measured = _measure(entries, suite, images, labels, groups, watts, folder, progress)
    record = Record(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        scenario=_scenario(suite, engine.threads),
        suite=suite,
        threads=engine.threads,
        engine=engine_facts(engine, engine_path),
        policy=engine.metadata.policy,
        curve=engine.manifest.curve if engine.manifest else (),
        certificate=_certificate(engine.manifest) if engine.manifest else None,
        split=SplitFacts(split.fingerprint, split.method, split.seed, split.group, split.groups, split.leaking),
        classes=engine.metadata.classes,
        images=tuple(i.path for i in items),
        labels=tuple(labels.tolist()),
        host=describe_host(*(e.engine.backend.name for e in entries)),
        load_before=before,
        load_after=load_average(),
        idle_watts=watts,
        energy_source=meter.source if meter and watts is not None else "",
        preprocess_ms=preprocess_ms,
        variants=tuple(measured),
        groups=() if groups is None else tuple(groups.tolist()),
    )
    return replace(record, targets=targets(record), warnings=warnings(record))


def plan(engine: Engine, path: Path, suite: Suite, against: Mapping[str, Path]) -> list[Entry]:
    """List the variants to measure, in the order of the table.

    Args:
        engine: The engine under test, opened.
        path: Its folder or file.
        suite: Settings of the benchmark.
        against: Name to engine folder or ONNX file of other networks.

    Raises:
        ConfigError: Another model has the name of a variant, or a limit names no such model.
    """
    if unknown := suite.targets.faster.keys() - against.keys():
        what = f"targets.faster.{min(unknown)}: no model has this name"
        raise ConfigError(what, fix=f"add --against {min(unknown)}=PATH, or remove the limit")
    names = variants.variant_names(engine.metadata, suite.variants)
    entries = [Entry(name, engine, path, name, False) for name in names]
    for name, other in against.items():
        if name in {e.name for e in entries}:
            raise ConfigError(f"--against {name}={other}: '{name}' is already a row", fix="choose another name")
        entries.append(Entry(name, open_engine(other, threads=suite.threads), other, "final", True))
    return entries


def _complete(entries: list[Entry], folder: Path) -> list[Entry]:
    """Replace engines that lack a graph in one piece, which a variant runs or is timed against, by copies with it.

    Raises:
        ArtifactError, BackendError: See `write_with_graphs`.
    """
    complete: dict[Path, tuple[Engine, Path]] = {}
    for path in dict.fromkeys(entry.path for entry in entries):
        own = [entry for entry in entries if entry.path == path]
        engine, run = own[0].engine, {name for entry in own for name in _graphs_run(entry)}
        out = write_with_graphs(engine, path, sorted(run.intersection(WHOLE)), folder / f"engine_{len(complete)}")
        complete[path] = (engine if out == path else open_engine(out, threads=engine.threads), out)
    return [replace(e, engine=complete[e.path][0], path=complete[e.path][1]) for e in entries]


def _graphs_run(entry: Entry) -> set[str]:
    exits, other = len(entry.engine.metadata.exits), variants.INTERLEAVED_WITH.get(entry.variant)
    graphs = variants.graph_names(entry.variant, exits)
    return graphs | variants.graph_names(other, exits) if other else graphs


def _same_classes(entries: list[Entry], split: Split) -> None:
    for entry in entries:
        if entry.engine.metadata.classes != split.classes:
            raise ConfigError(
                f"{entry.path} has the classes {', '.join(entry.engine.metadata.classes)}; "
                f"the split has {', '.join(split.classes)}",
                fix="give the split that it was trained with",
            )


def _prepare(
    entries: list[Entry], split: Split, data: Path, folder: Path
) -> tuple[dict[Preprocess, Path], npt.NDArray[np.int64]]:
    """Write the test images as one .npy for each kind of preprocessing; return these and the labels (N,)."""
    paths: dict[Preprocess, Path] = {}
    labels = np.empty(0, np.int64)
    for preprocess in dict.fromkeys(e.engine.metadata.preprocess for e in entries):
        images, labels = load_subset(split, "test", data=data, preprocess=preprocess)
        paths[preprocess] = folder / f"images_{len(paths)}.npy"
        np.save(paths[preprocess], images)
    return paths, labels


def _time_preprocessing(paths: list[Path], preprocess: Preprocess) -> tuple[float, ...]:
    samples = []
    for path in paths[:: -(-len(paths) // PREPROCESSED)]:
        start = time.perf_counter_ns()
        load(path, preprocess)
        samples.append(round((time.perf_counter_ns() - start) / 1e6, 4))
    return tuple(samples)


def _estimate_seconds(
    entries: list[Entry], suite: Suite, images: Mapping[Preprocess, Path], count: int, folder: Path
) -> float:
    """Estimate the duration of `_measure` for `count` images from one short process for each network."""
    short = replace(suite, min_count=(PILOT_QUERIES,) * len(suite.batch_sizes), min_seconds=0.0, warmup_seconds=0.0)
    pilots: dict[Path, tuple[float, list[float]]] = {}
    for i, entry in enumerate(entries):
        if entry.path not in pilots:
            task = _task(entry, short, images[entry.engine.metadata.preprocess], 1, None)
            start = time.perf_counter()
            result = run_worker(replace(task, interleaved_with=""), folder / f"pilot_{i}", name=entry.name)
            samples = [batch.samples_ms for batch in result.batches]
            outside = time.perf_counter() - start - sum(map(sum, samples)) / 1e3
            pilots[entry.path] = outside, [median(s) / 1e3 for s in samples]
    return sum(
        expected_seconds(suite, *pilots[e.path], count=count, interleaved=e.variant in variants.INTERLEAVED_WITH)
        for e in entries
    )


def expected_seconds(suite: Suite, outside: float, query: list[float], *, count: int, interleaved: bool) -> float:
    """Return the duration of all rounds of one variant.

    Args:
        suite: The settings.
        outside: Seconds of a process besides its queries.
        query: Seconds of a query at each batch size.
        count: Number of test images.
        interleaved: The variant is also timed interleaved with another.
    """
    measuring = sum(
        suite.warmup_seconds + max(suite.min_seconds, least * each) for least, each in zip(suite.min_count, query)
    )
    pair = suite.warmup_seconds + 2 * suite.min_seconds if interleaved else 0.0
    return suite.rounds * (outside + measuring + pair) + (count + OVERHEAD_QUERIES) * query[0]


def _measure(
    entries: list[Entry],
    suite: Suite,
    images: Mapping[Preprocess, Path],
    labels: Labels,
    groups: Labels | None,
    watts: float | None,
    folder: Path,
    progress: Progress | None,
) -> list[Variant]:
    results: dict[str, list[WorkerResult]] = {e.name: [] for e in entries}
    for round_ in range(suite.rounds):
        for at, entry in enumerate(entries):
            task = _task(entry, suite, images[entry.engine.metadata.preprocess], round_, watts)
            results[entry.name].append(run_worker(task, folder / f"{round_}_{at}", name=entry.name))
            if progress:
                progress(round_ * len(entries) + at + 1, suite.rounds * len(entries))
    return [_variant(e, suite, results[e.name], folder / f"0_{at}", labels, groups) for at, e in enumerate(entries)]


def _task(entry: Entry, suite: Suite, images: Path, round_: int, watts: float | None) -> WorkerTask:
    return WorkerTask(
        engine=str(entry.path.resolve()),
        variant=entry.variant,
        images=str(images),
        threads=entry.engine.threads,
        batch_sizes=suite.batch_sizes,
        min_count=suite.min_count,
        min_seconds=suite.min_seconds,
        warmup_seconds=suite.warmup_seconds,
        pool=suite.pool,
        round=round_,
        idle_watts=watts,
        interleaved_with=variants.INTERLEAVED_WITH.get(entry.variant, ""),
        digest=entry.engine.digest,
    )


def run_worker(task: WorkerTask, folder: Path, *, name: str) -> WorkerResult:
    """Carry out a task in a fresh process, which ends when this one does.

    Args:
        task: Work of the process.
        folder: Folder to make, for the task and its results.
        name: Row of the table, for errors.

    Raises:
        BackendError: The process failed.
    """
    folder.mkdir()
    (folder / "task.json").write_bytes(to_json(task))
    with (folder / "stderr").open("wb") as stderr:
        words = str(folder / "task.json")
        worker = start_child("edgekd.bench.worker", words, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            code = worker.wait()
        finally:
            worker.kill()
            worker.communicate()
    if code:
        lines = (folder / "stderr").read_text(errors="replace").strip().splitlines()
        words = lines[-1] if lines else f"exit code {code}"
        reason = f"ended by signal {-code}{f', after: {words}' if lines else ''}" if code < 0 else words
        raise BackendError(f"measuring {name} failed: {reason}", fix="edgekd doctor checks what is installed")
    return read_json(folder / "result.json", WorkerResult, what="worker result")


def _variant(
    entry: Entry, suite: Suite, results: list[WorkerResult], folder: Path, labels: Labels, groups: Labels | None
) -> Variant:
    probabilities: Array = np.load(folder / "probabilities.npy")
    answers = probabilities.argmax(axis=1)
    defers = entry.engine.metadata.policy.defer_below > 0 and not entry.variant.startswith("exit_")
    return Variant(
        name=entry.name,
        network=entry.engine.metadata.network,
        engine=entry.engine.name,
        baseline=entry.baseline,
        timings=tuple(_timing(results, at, size) for at, size in enumerate(suite.batch_sizes)),
        metrics=metrics(
            probabilities,
            labels,
            entry.engine.metadata.classes,
            groups=groups,
            confidences=np.load(folder / "confidence.npy"),
            specificity=suite.specificity,
        ),
        predictions=tuple(answers.tolist()),
        exits=tuple(np.load(folder / "exits.npy").tolist()),
        load_ms=tuple(r.load_ms for r in results),
        first_ms=tuple(r.first_ms for r in results),
        before_mib=tuple(r.before_mib for r in results),
        peak_mib=tuple(r.peak_mib for r in results),
        overhead_ms=results[0].overhead_ms or 0.0,
        interleaved_ms=tuple(r.interleaved_ms for r in results if r.interleaved_ms),
        size_mib=variants.size_mib(entry.engine, entry.path, entry.variant),
        answered=answered(np.load(folder / "deferred.npy"), answers == labels, groups) if defers else None,
    )


def _timing(results: list[WorkerResult], at: int, size: int) -> Timing:
    batches = [r.batches[at] for r in results]
    return Timing(
        batch=size,
        samples_ms=tuple(b.samples_ms for b in batches),
        exits=tuple(b.exits for b in batches) if size == 1 else (),
        energy_mj=tuple(b.energy_mj for b in batches if b.energy_mj is not None),
    )


def _certificate(manifest: Manifest) -> Certificate | None:
    """Return the certificate, if it is valid, without the confidences that only a check of drift needs."""
    if reason := void_reason(manifest):
        log.warning("%s", reason)
        return None
    return replace(manifest.certificate, confidences=()) if manifest.certificate else None


def engine_facts(engine: Engine, path: Path) -> EngineFacts:
    """Return the manifest without the fields that a record stores elsewhere: classes, policy, curve, certificate."""
    manifest = engine.manifest
    if manifest is None:
        return EngineFacts(path.name, engine.name, engine.backend.name, sha256(path))
    table = json.loads(to_json(manifest))
    facts = {**table, "provenance": manifest.metadata.provenance}
    for key in ("metadata", "curve", "certificate", "attempts", "backend", "source_sha256", "precision"):
        facts.pop(key, None)
    final = manifest.accuracy.predictions["final"] if manifest.accuracy else None
    return EngineFacts(
        path=path.name,
        name=engine.name,
        backend=manifest.backend,
        source_sha256=manifest.source_sha256,
        precision=manifest.precision,
        final_accuracy=final.engine if final else None,
        validation_images=final.images if final else 0,
        facts=flat(facts),
    )


def _scenario(suite: Suite, threads: int) -> str:
    return (
        "Single stream at batch 1 (the next query when the last is done), offline at larger batches. Wall clock on the "
        "host, from float32 images in memory to the decision in memory; preprocessing is measured separately. "
        f"{threads} threads; the backend's own spin-waiting is included. Real test images in rotation (at most "
        f"{suite.pool}, chosen anew each round), {suite.rounds} rounds of fresh processes, variant by variant, "
        f"{suite.warmup_seconds:g} s warm-up discarded, then at least {suite.min_seconds:g} s and "
        f"{'/'.join(map(str, suite.min_count))} queries a process. No sample was clipped."
    )
