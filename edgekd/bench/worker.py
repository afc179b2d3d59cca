"""Measures one variant in a fresh process: `python -m edgekd.bench.worker task.json`, which `measure` starts."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekd.bench import energy
from edgekd.bench.latency import time_interleaved, time_queries
from edgekd.bench.memory import peak_mib, resident_mib
from edgekd.bench.variants import Predictor, make_predictor, overhead_ms
from edgekd.child import end_with_parent
from edgekd.errors import EdgekdError
from edgekd.runtime.engine import open_engine
from edgekd.serialization import read_json, to_json
from edgekd.types import Array

OVERHEAD_QUERIES = 100
"""Queries from which the overhead is measured."""


@dataclass(frozen=True)
class WorkerTask:
    """Work of one worker process.

    Attributes:
        engine: Path of the engine or ONNX file.
        variant: Name of the variant.
        images: Path of an .npy file with all test images (N, 3, H, W).
        threads: CPU threads of the engine.
        batch_sizes: See `Suite`; so are min_count, min_seconds and warmup_seconds.
        pool: Number of images kept in memory, which the queries cycle through.
        round: Seed of their choice and order; accuracy and overhead are measured in round 0 only.
        idle_watts: Power when idle; None if energy cannot be measured.
        interleaved_with: Another variant to time interleaved with this one; empty for none.
        digest: Digest of the engine that was opened at the start, so that no other is measured.
    """

    engine: str
    variant: str
    images: str
    threads: int
    batch_sizes: tuple[int, ...]
    min_count: tuple[int, ...]
    min_seconds: float
    warmup_seconds: float
    pool: int
    round: int
    idle_watts: float | None
    interleaved_with: str = ""
    digest: str = ""


@dataclass(frozen=True)
class BatchSamples:
    """The queries of one batch size: latency and exit (batch 1 only) of each, and the energy of an image."""

    samples_ms: tuple[float, ...]
    exits: tuple[int, ...]
    energy_mj: float | None


@dataclass(frozen=True)
class WorkerResult:
    """Measurements of one worker; fields as in `edgekd.bench.record.Variant`, for one round.

    In round 0 it also writes probabilities.npy (N, C), and exits.npy, confidence.npy and deferred.npy (N,).
    """

    load_ms: float
    first_ms: float
    before_mib: float
    peak_mib: float
    batches: tuple[BatchSamples, ...]
    overhead_ms: float | None
    interleaved_ms: tuple[tuple[float, ...], ...] = ()


def main() -> int:
    """Carry out the task in the file named on the command line, and write result.json beside it."""
    end_with_parent()
    path = Path(sys.argv[1])
    try:
        result = measure(read_json(path, WorkerTask, what="worker task"), path.parent)
    except EdgekdError as error:
        sys.stderr.write(str(error).replace("\n", " ") + "\n")
        return 1
    path.with_name("result.json").write_bytes(to_json(result))
    return 0


def measure(task: WorkerTask, out: Path) -> WorkerResult:
    """Load the variant, query it once, time each batch size, then (round 0) measure overhead and predict all images."""
    images = np.load(task.images, mmap_mode="r")
    pool = choose(images, task.pool, seed=task.round)
    before, start = resident_mib(), time.perf_counter_ns()
    engine = open_engine(Path(task.engine), threads=task.threads, digest=task.digest)
    predict = make_predictor(engine, task.variant)
    loaded = time.perf_counter_ns()
    predict(pool[:1])
    first = time.perf_counter_ns()
    batches = tuple(_time_batches(predict, pool, task, at) for at in range(len(task.batch_sizes)))
    peak, overhead = peak_mib(), None
    if task.round == 0:
        overhead = overhead_ms(engine, task.variant, batched(pool, 1)[:OVERHEAD_QUERIES])
        _predict_all(predict, images, out)
    other = task.interleaved_with
    interleaved = _time_interleaved(predict, make_predictor(engine, other), pool, task) if other else ()
    return WorkerResult((loaded - start) / 1e6, (first - loaded) / 1e6, before, peak, batches, overhead, interleaved)


def choose(images: Array, count: int, *, seed: int) -> Array:
    """Load at most `count` of the images (N, 3, H, W) in random order."""
    return np.asarray(images[np.random.default_rng(seed).permutation(len(images))[:count]])


def batched(pool: Array, size: int) -> list[Array]:
    """Cut the pool into whole batches; a pool smaller than one batch is repeated."""
    if len(pool) < size:
        pool = pool[np.arange(size) % len(pool)]
    return [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]


def _time_batches(predict: Predictor, pool: Array, task: WorkerTask, at: int) -> BatchSamples:
    query = _query(predict)
    size, queries = task.batch_sizes[at], batched(pool, task.batch_sizes[at])
    time_queries(query, queries, seconds=task.warmup_seconds, count=1)
    meter = energy.find_meter() if task.idle_watts is not None else None
    end = meter.start() if meter else None
    samples, exits = time_queries(query, queries, seconds=task.min_seconds, count=task.min_count[at])
    spent, energy_mj = end() if end else None, None
    if spent and task.idle_watts is not None:
        energy_mj = 1e3 * (spent.watts - task.idle_watts) * spent.seconds / (len(samples) * size)
    return BatchSamples(tuple(round(s, 4) for s in samples), tuple(exits) if size == 1 else (), energy_mj)


def _time_interleaved(
    predict: Predictor, other: Predictor, pool: Array, task: WorkerTask
) -> tuple[tuple[float, ...], ...]:
    variants, queries = [_query(predict), _query(other)], batched(pool, 1)
    time_interleaved(variants, queries, seconds=task.warmup_seconds)
    return time_interleaved(variants, queries, seconds=2 * task.min_seconds)


def _query(predict: Predictor) -> Callable[[Array], int]:
    return lambda images: int(predict(images).exits[0])


def _predict_all(predict: Predictor, images: Array, out: Path) -> None:
    """Predict one image at a time, as batch 1 is timed: kernels for other batch sizes may round differently."""
    decisions = [predict(np.ascontiguousarray(images[i : i + 1])) for i in range(len(images))]
    _save(out / "probabilities.npy", [d.probabilities for d in decisions])
    _save(out / "exits.npy", [d.exits for d in decisions])
    _save(out / "confidence.npy", [d.confidence for d in decisions])
    _save(out / "deferred.npy", [d.deferred for d in decisions])


def _save(path: Path, rows: Sequence[npt.NDArray[np.generic]]) -> None:
    np.save(path, np.concatenate(rows))


if __name__ == "__main__":
    sys.exit(main())
