"""One variant in one fresh process: `python -m edgekd.bench.worker job.json`, started by `edgekd.bench.suite`."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgekd.bench import energy
from edgekd.bench.latency import rotate, take_turns
from edgekd.bench.memory import peak_mib, resident_mib
from edgekd.bench.variants import Answer, answerer, overhead_ms
from edgekd.errors import EdgekdError
from edgekd.runtime.engine import open_engine
from edgekd.serialization import read_json, to_json
from edgekd.types import Array

OVERHEAD_QUERIES = 100


@dataclass(frozen=True)
class Job:
    """What to measure. images: an .npy of all test images; pool: how many of them are kept in memory and rotated.

    round: seeds the choice and order of the pool. Accuracy and overhead are measured in round 0 only.
    beside: another way of answering that is timed in turns with this one; empty for none. digest: of the engine that
    was opened at the start, so that no other one is measured.
    """

    engine: str
    kind: str
    images: str
    threads: int
    batch_sizes: tuple[int, ...]
    min_count: tuple[int, ...]
    min_seconds: float
    warmup_seconds: float
    pool: int
    round: int
    idle_watts: float | None
    beside: str = ""
    digest: str = ""


@dataclass(frozen=True)
class Batch:
    """Samples of one batch size."""

    samples_ms: tuple[float, ...]
    exits: tuple[int, ...]
    energy_mj: float | None


@dataclass(frozen=True)
class Outcome:
    """What came of a job; round 0 leaves probabilities.npy (N, C) and exits.npy (N,) beside it.

    turns_ms: samples of this way and of the one beside it, at batch 1.
    """

    load_ms: float
    first_ms: float
    before_mib: float
    peak_mib: float
    batches: tuple[Batch, ...]
    overhead_ms: float | None
    turns_ms: tuple[tuple[float, ...], ...] = ()


def run(job: Job, out: Path) -> Outcome:
    """Load, ask once, measure each batch size, then (round 0) overhead and accuracy on every test image."""
    images = np.load(job.images, mmap_mode="r")
    pool = take(images, job.pool, seed=job.round)
    before, start = resident_mib(), time.perf_counter_ns()
    engine = open_engine(Path(job.engine), threads=job.threads, digest=job.digest)
    answer = answerer(engine, job.kind)
    loaded = time.perf_counter_ns()
    answer(pool[:1])
    first = time.perf_counter_ns()
    batches = tuple(_measure(answer, pool, job, at) for at in range(len(job.batch_sizes)))
    peak, around = peak_mib(), None
    if job.round == 0:
        around = overhead_ms(engine, job.kind, cut(pool, 1)[:OVERHEAD_QUERIES])
        _answer_all(answer, images, out)
    turns = _turns(answer, answerer(engine, job.beside), pool, job) if job.beside else ()
    return Outcome((loaded - start) / 1e6, (first - loaded) / 1e6, before, peak, batches, around, turns)


def take(images: Array, count: int, *, seed: int) -> Array:
    """At most `count` of the images in random order, in memory."""
    return np.asarray(images[np.random.default_rng(seed).permutation(len(images))[:count]])


def cut(pool: Array, batch: int) -> list[Array]:
    """Whole batches of the pool, which is repeated when it is smaller than one."""
    if len(pool) < batch:
        pool = pool[np.arange(batch) % len(pool)]
    return [pool[i : i + batch] for i in range(0, len(pool) - batch + 1, batch)]


def _query(answer: Answer) -> Callable[[Array], int]:
    return lambda x: int(answer(x).exits[0])


def _turns(answer: Answer, beside: Answer, pool: Array, job: Job) -> tuple[tuple[float, ...], ...]:
    ways, queries = [_query(answer), _query(beside)], cut(pool, 1)
    take_turns(ways, queries, seconds=job.warmup_seconds)
    return take_turns(ways, queries, seconds=2 * job.min_seconds)


def _measure(answer: Answer, pool: Array, job: Job, at: int) -> Batch:
    query = _query(answer)
    batch, queries = job.batch_sizes[at], cut(pool, job.batch_sizes[at])
    rotate(query, queries, seconds=job.warmup_seconds, count=1)
    packages = energy.domains() if job.idle_watts is not None else []
    counters, start = energy.counters(packages), time.perf_counter()
    samples, exits = rotate(query, queries, seconds=job.min_seconds, count=job.min_count[at])
    seconds, spent = time.perf_counter() - start, energy.joules(counters, energy.counters(packages))
    energy_mj = None if job.idle_watts is None else 1e3 * (spent - job.idle_watts * seconds) / (len(samples) * batch)
    return Batch(tuple(round(s, 4) for s in samples), tuple(exits) if batch == 1 else (), energy_mj)


def _answer_all(answer: Answer, images: Array, out: Path) -> None:
    """One image at a time, as they are timed at batch 1: kernels for other batch sizes may round differently."""
    decisions = [answer(np.ascontiguousarray(images[i : i + 1])) for i in range(len(images))]
    _save(out / "probabilities.npy", [d.probabilities for d in decisions])
    _save(out / "exits.npy", [d.exits for d in decisions])


def _save(path: Path, rows: Sequence[npt.NDArray[np.generic]]) -> None:
    np.save(path, np.concatenate(rows))


def _die_with_parent() -> None:
    """The parent holds the other end of stdin; it closes however the parent ends."""
    os.read(0, 1)  # not sys.stdin: its lock would be held when the interpreter shuts down
    os._exit(1)


def main() -> int:
    """Run the job named on the command line; outcome.json lies beside it afterwards."""
    threading.Thread(target=_die_with_parent, daemon=True).start()
    path = Path(sys.argv[1])
    try:
        outcome = run(read_json(path, Job, what="bench job"), path.parent)
    except EdgekdError as error:
        sys.stderr.write(error.what.replace("\n", " ") + "\n")
        return 1
    path.with_name("outcome.json").write_bytes(to_json(outcome))
    return 0


if __name__ == "__main__":
    sys.exit(main())
