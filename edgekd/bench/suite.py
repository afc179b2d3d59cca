"""`bench`: every variant of an engine, and other models beside it, each round in fresh processes that take turns."""

from __future__ import annotations

import datetime
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekd.backends.report import describe_host
from edgekd.bench import energy, variants
from edgekd.bench.accuracy import metrics
from edgekd.bench.record import Record, Timing, Variant
from edgekd.bench.targets import Limits, targets, warnings
from edgekd.bench.variants import Group
from edgekd.bench.worker import OVERHEAD_QUERIES, Job, Outcome
from edgekd.data.images import load, load_subset
from edgekd.data.preprocess import Preprocess
from edgekd.data.split import Split
from edgekd.errors import BackendError, ConfigError
from edgekd.files import sha256, temporary_folder
from edgekd.host import load_average
from edgekd.runtime.engine import Engine, open_engine
from edgekd.serialization import read_json, to_json
from edgekd.types import Array

log = logging.getLogger(__name__)
PREPROCESSED = 200
"""Files on which pre-processing is timed."""
PILOT = 3
"""Queries of each batch size from which the time of a bench is foretold."""


@dataclass(frozen=True)
class Suite:
    """What to measure, from benchmarks/suites/*.toml.

    batch_sizes: start with 1. min_seconds and min_count (one a batch size): each process measures until both are
    reached. warmup_seconds: thrown away. rounds: fresh processes a variant. pool: test images that are rotated.
    targets: limits that the record judges by; without them it has figures and no verdicts.
    """

    batch_sizes: tuple[int, ...]
    min_count: tuple[int, ...]
    min_seconds: float
    warmup_seconds: float
    rounds: int
    pool: int
    threads: int | None = None
    variants: tuple[Group, ...] = ("exits", "cascade", "no-early-exit", "full", "final")
    targets: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.batch_sizes[:1] != (1,) or list(self.batch_sizes) != sorted(set(self.batch_sizes)):
            raise ValueError("batch_sizes: rising, and the first is 1")
        if len(self.min_count) != len(self.batch_sizes) or min(self.min_count) < 2:
            raise ValueError("min_count: one for each batch size, 2 or more")
        if min(self.rounds, self.pool, 1 if self.threads is None else self.threads) < 1 or not self.variants:
            raise ValueError("rounds, pool, threads and variants: 1 or more")
        if not all(0 <= seconds <= 1e6 for seconds in (self.min_seconds, self.warmup_seconds)):
            raise ValueError("min_seconds, warmup_seconds: from 0 to a million")


@dataclass(frozen=True)
class Entry:
    """One variant to be measured: its name in the table, the engine, where it lies, and the way of answering."""

    name: str
    engine: Engine
    path: Path
    kind: str
    against: bool


def bench(
    engine_path: Path,
    *,
    suite: Suite,
    data: Path,
    split: Split,
    against: Mapping[str, Path] | None = None,
    command: str = "",
    progress: Callable[[int, int], None] | None = None,
    foretell: Callable[[float], None] | None = None,
) -> Record:
    """Measure student.engine/ or student.onnx on the split's test images.

    against: name to engine folder or ONNX file of other networks; they answer with their last exit.
    progress: called with (worker processes done, all). foretell: called once, with the seconds that measuring will
        take, by a short pilot of each network.

    Raises:
        ConfigError: names or classes that do not fit. ArtifactError, DataError: as reading the engine and the images.
        BackendError: a worker failed; its last words are given.
    """
    engine = open_engine(engine_path, threads=suite.threads)
    entries = plan(engine, engine_path, suite, against or {})
    _same_classes(entries, split)
    before, watts = load_average(), energy.idle_watts(energy.domains())
    items = split.subset("test")
    with temporary_folder("bench") as folder:
        images, labels = _prepare(entries, split, data, folder)
        preprocess_ms = _time_preprocessing([data / i.path for i in items], engine.metadata.preprocess)
        if foretell:
            foretell(_seconds(entries, suite, images, len(labels), folder))
        measured = _measure(entries, suite, images, labels, watts, folder, progress)
    record = Record(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        command=command,
        scenario=_scenario(suite, engine.threads),
        suite=json.loads(to_json(suite)),
        threads=engine.threads,
        engine=_facts(engine, engine_path),
        policy=engine.metadata.policy,
        curve=engine.manifest.curve if engine.manifest else (),
        split={k: getattr(split, k) for k in ("fingerprint", "method", "seed", "group", "groups", "leaking")},
        classes=engine.metadata.classes,
        images=tuple(i.path for i in items),
        labels=tuple(labels.tolist()),
        host=describe_host(*(e.engine.backend.name for e in entries)),
        load_before=before,
        load_after=load_average(),
        idle_watts=watts,
        preprocess_ms=preprocess_ms,
        variants=tuple(measured),
    )
    return replace(record, targets=targets(record, suite.targets), warnings=warnings(record))


def plan(engine: Engine, path: Path, suite: Suite, against: Mapping[str, Path]) -> list[Entry]:
    """Everything that will be measured, in the order of the table.

    Raises:
        ConfigError: another model has the name of a variant.
    """
    entries = [Entry(kind, engine, path, kind, False) for kind in variants.kinds(engine.metadata, suite.variants)]
    for name, other in against.items():
        if name in {e.name for e in entries}:
            raise ConfigError(f"--against {name}={other}: '{name}' is a row already", fix="give it another name")
        entries.append(Entry(name, open_engine(other, threads=suite.threads), other, "final", True))
    return entries


def _same_classes(entries: list[Entry], split: Split) -> None:
    for entry in entries:
        if entry.engine.metadata.classes != split.classes:
            raise ConfigError(
                f"{entry.path} knows {', '.join(entry.engine.metadata.classes)}; "
                f"the split has {', '.join(split.classes)}",
                fix="give the split that it was trained with",
            )


def _prepare(
    entries: list[Entry], split: Split, data: Path, folder: Path
) -> tuple[dict[Preprocess, Path], npt.NDArray[np.int64]]:
    """The test images as one .npy for each kind of pre-processing, and their labels (N,)."""
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


def _seconds(entries: list[Entry], suite: Suite, images: Mapping[Preprocess, Path], count: int, folder: Path) -> float:
    """How long `_measure` will take for `count` images, by one short process for each network."""
    short = replace(suite, min_count=(PILOT,) * len(suite.batch_sizes), min_seconds=0.0, warmup_seconds=0.0)
    pilots: dict[Path, tuple[float, list[float]]] = {}
    for i, entry in enumerate(entries):
        if entry.path not in pilots:
            job = replace(_job(entry, short, images[entry.engine.metadata.preprocess], 1, None), beside="")
            start = time.perf_counter()
            outcome = run_worker(job, folder / f"pilot_{i}", name=entry.name)
            samples = [batch.samples_ms for batch in outcome.batches]
            around = time.perf_counter() - start - sum(map(sum, samples)) / 1e3
            pilots[entry.path] = around, [median(s) / 1e3 for s in samples]
    return sum(expected_seconds(suite, *pilots[e.path], count=count, beside=e.kind in variants.BESIDE) for e in entries)


def expected_seconds(suite: Suite, around: float, query: list[float], *, count: int, beside: bool) -> float:
    """What the rounds of one variant take. around: of a process, besides its measuring; query: of each batch size."""
    measuring = sum(
        suite.warmup_seconds + max(suite.min_seconds, least * each) for least, each in zip(suite.min_count, query)
    )
    turns = suite.warmup_seconds + 2 * suite.min_seconds if beside else 0.0
    return suite.rounds * (around + measuring + turns) + (count + OVERHEAD_QUERIES) * query[0]


def _measure(
    entries: list[Entry],
    suite: Suite,
    images: Mapping[Preprocess, Path],
    labels: npt.NDArray[np.int64],
    watts: float | None,
    folder: Path,
    progress: Callable[[int, int], None] | None,
) -> list[Variant]:
    outcomes: dict[str, list[Outcome]] = {e.name: [] for e in entries}
    for turn in range(suite.rounds):
        for at, entry in enumerate(entries):
            job = _job(entry, suite, images[entry.engine.metadata.preprocess], turn, watts)
            where = folder / f"{turn}_{at}"
            outcomes[entry.name].append(run_worker(job, where, name=entry.name))
            if progress:
                progress(turn * len(entries) + at + 1, suite.rounds * len(entries))
    return [_variant(e, suite, outcomes[e.name], folder / f"0_{at}", labels) for at, e in enumerate(entries)]


def _job(entry: Entry, suite: Suite, images: Path, turn: int, watts: float | None) -> Job:
    return Job(
        engine=str(entry.path.resolve()),
        kind=entry.kind,
        images=str(images),
        threads=entry.engine.threads,
        batch_sizes=suite.batch_sizes,
        min_count=suite.min_count,
        min_seconds=suite.min_seconds,
        warmup_seconds=suite.warmup_seconds,
        pool=suite.pool,
        round=turn,
        idle_watts=watts,
        beside=variants.BESIDE.get(entry.kind, ""),
        digest=entry.engine.digest,
    )


def run_worker(job: Job, folder: Path, *, name: str) -> Outcome:
    """Do `job` in a fresh process that ends when this one does, however that happens.

    Raises:
        BackendError: it failed.
    """
    folder.mkdir()
    (folder / "job.json").write_bytes(to_json(job))
    command = [sys.executable, "-m", "edgekd.bench.worker", str(folder / "job.json")]
    with (folder / "stderr").open("wb") as stderr:
        worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=stderr)
        try:
            code = worker.wait()
        finally:
            worker.kill()
            worker.communicate()
    if code:
        said = (folder / "stderr").read_text(errors="replace").strip().splitlines()
        reason = f"ended by signal {-code}" if code < 0 else said[-1] if said else f"exit code {code}"
        raise BackendError(f"measuring {name} failed: {reason}", fix="edgekd doctor checks what is installed")
    return read_json(folder / "outcome.json", Outcome, what="outcome")


def _variant(
    entry: Entry, suite: Suite, outcomes: list[Outcome], folder: Path, labels: npt.NDArray[np.int64]
) -> Variant:
    probabilities: Array = np.load(folder / "probabilities.npy")
    return Variant(
        name=entry.name,
        network=entry.engine.metadata.network,
        engine=entry.engine.name,
        against=entry.against,
        timings=tuple(_timing(outcomes, at, size) for at, size in enumerate(suite.batch_sizes)),
        metrics=metrics(probabilities, labels, entry.engine.metadata.classes),
        answers=tuple(probabilities.argmax(axis=1).tolist()),
        exits=tuple(np.load(folder / "exits.npy").tolist()),
        load_ms=tuple(o.load_ms for o in outcomes),
        first_ms=tuple(o.first_ms for o in outcomes),
        before_mib=tuple(o.before_mib for o in outcomes),
        peak_mib=tuple(o.peak_mib for o in outcomes),
        overhead_ms=outcomes[0].overhead_ms or 0.0,
        turns_ms=tuple(o.turns_ms for o in outcomes if o.turns_ms),
        size_mib=variants.size_mib(entry.engine, entry.path, entry.kind),
    )


def _timing(outcomes: list[Outcome], at: int, size: int) -> Timing:
    batches = [o.batches[at] for o in outcomes]
    return Timing(
        batch=size,
        samples_ms=tuple(b.samples_ms for b in batches),
        exits=tuple(b.exits for b in batches) if size == 1 else (),
        energy_mj=tuple(b.energy_mj for b in batches if b.energy_mj is not None),
    )


def _facts(engine: Engine, path: Path) -> dict[str, Any]:
    """What the manifest says, without the metadata's classes and the curve that the record holds elsewhere."""
    if engine.manifest is None:
        return {"path": path.name, "name": engine.name, "backend": engine.backend.name, "source_sha256": sha256(path)}
    facts = json.loads(to_json(engine.manifest))
    metadata = facts.pop("metadata")
    return {"path": path.name, "name": engine.name, **facts, "curve": [], "provenance": metadata["provenance"]}


def _scenario(suite: Suite, threads: int) -> str:
    return (
        "Single stream at batch 1 (the next query when the last is done), offline at larger batches. Wall clock on the "
        "host, from float32 images in memory to the decision in memory; pre-processing is apart. "
        f"{threads} threads; the backend's own spin-waiting is in. Real test images in rotation ({suite.pool} at most, "
        f"another choice each round), {suite.rounds} rounds of fresh processes taking turns, "
        f"{suite.warmup_seconds:g} s warm-up thrown away, then at least {suite.min_seconds:g} s and "
        f"{'/'.join(map(str, suite.min_count))} queries a process. No sample was clipped."
    )
