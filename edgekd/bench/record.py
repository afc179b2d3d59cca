"""record.json: everything a benchmark measured, raw; never changed once written. Tables and pages are views of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from edgekd.artifacts.manifest import MAX_MS, CurvePoint
from edgekd.bench.accuracy import Metrics
from edgekd.bench.latency import Summary, summarise
from edgekd.data.split import check_classes, is_stray
from edgekd.errors import ArtifactError
from edgekd.files import atomic_write
from edgekd.host import HostInfo
from edgekd.policy import Policy
from edgekd.serialization import SCHEMA, read_json, to_json

MAX_EXITS = 1000
"""Exits that no network has; those of other models under test are not in a record."""
SPLIT = {"fingerprint": str, "method": str, "seed": int, "group": str, "groups": int, "leaking": int}


def _need(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(what)


def _are_times(values: Iterable[float]) -> bool:
    """Milliseconds, of which there are some and which can be divided by."""
    values = tuple(values)
    return bool(values) and all(1e-9 <= v <= MAX_MS for v in values)


def _not_negative(values: Iterable[float]) -> bool:
    return all(0 <= v <= MAX_MS for v in values)


@dataclass(frozen=True)
class Timing:
    """One variant at one batch size; one tuple for each round (a fresh process).

    samples_ms: latency of each query. exits: where the query's image left (batch 1 only).
    energy_mj: per image above idle, one number a round; empty where it could not be measured.
    """

    batch: int
    samples_ms: tuple[tuple[float, ...], ...]
    exits: tuple[tuple[int, ...], ...] = ()
    energy_mj: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _need(0 < self.batch < 2**31, "batch: above 0")
        _need(bool(self.samples_ms) and all(map(_are_times, self.samples_ms)), "samples_ms: times in every round")
        lengths = [len(r) for r in self.samples_ms]
        _need(not self.exits or [len(r) for r in self.exits] == lengths, "exits: one for each sample, or none")
        _need(all(0 <= e < MAX_EXITS for r in self.exits for e in r), f"exits: from 0 to {MAX_EXITS}")
        _need(all(-MAX_MS <= e <= MAX_MS for e in self.energy_mj), "energy_mj: finite")


@lru_cache(maxsize=1024)
def summary(timing: Timing) -> Summary:
    """Summary of a timing's queries."""
    return summarise(timing.samples_ms, exits=timing.exits)


@dataclass(frozen=True)
class Variant:
    """One way of answering, measured: one entry a round in load_ms, first_ms, before_mib and peak_mib.

    network, engine: what answered and what ran it. against: another model, not the engine under test.
    answers, exits: class index and exit of every test image. load_ms: opening the engine; first_ms: its first query.
    before_mib: resident memory before loading, test images included; peak_mib: the process's highest.
    overhead_ms: median of a query at batch 1 minus the time inside the compiled graphs. turns_ms: a round's samples of
    no-early-exit and of full, taken in turns in one process; empty for other variants.
    """

    name: str
    network: str
    engine: str
    against: bool
    timings: tuple[Timing, ...]
    metrics: Metrics
    answers: tuple[int, ...]
    exits: tuple[int, ...]
    load_ms: tuple[float, ...]
    first_ms: tuple[float, ...]
    before_mib: tuple[float, ...]
    peak_mib: tuple[float, ...]
    overhead_ms: float
    size_mib: float
    turns_ms: tuple[tuple[tuple[float, ...], ...], ...] = ()

    def __post_init__(self) -> None:
        _need(len(self.answers) == len(self.exits) == self.metrics.n > 0, "answers, exits, metrics.n: of some images")
        _need(all(0 <= e < MAX_EXITS for e in self.exits), f"exits: from 0 to {MAX_EXITS}")
        lists = (self.load_ms, self.first_ms, self.before_mib, self.peak_mib)
        _need(len({len(v) for v in lists}) == 1 and bool(self.load_ms), "load_ms to peak_mib: one entry a round")
        singles = (self.overhead_ms, self.size_mib)
        _need(_not_negative(v for values in (*lists, singles) for v in values), "load_ms to size_mib: not negative")
        turns = all(len(pair) == 2 and all(map(_are_times, pair)) for pair in self.turns_ms)
        _need(turns, "turns_ms: times of two ways in every round")

    @property
    def memory_mib(self) -> float:
        """What the engine added to the process, at most, in any round."""
        return max(peak - before for peak, before in zip(self.peak_mib, self.before_mib))

    @property
    def shares(self) -> tuple[float, ...]:
        """Fraction of the test images that left at each exit up to the last one used."""
        counts = Counter(self.exits)
        return tuple(counts[k] / len(self.exits) for k in range(max(counts) + 1))

    def at(self, batch: int) -> Summary:
        """Summary at one of the suite's batch sizes."""
        return summary(next(t for t in self.timings if t.batch == batch))


@dataclass(frozen=True)
class Target:
    """A figure to reach. rounds: the same figure in each round; limit and met are None where nothing was asked."""

    name: str
    value: float
    unit: str
    rounds: tuple[float, ...] = ()
    limit: float | None = None
    met: bool | None = None
    sign: Literal["≤", "≥"] = "≤"

    def __post_init__(self) -> None:
        if (self.limit is None) != (self.met is None):
            raise ValueError("limit, met: both or none")


@dataclass(frozen=True)
class Record:
    """One benchmark. images and labels: the test part, in the order of every variant's answers.

    engine: what the manifest says of the engine under test. curve: of `edgekd tune`, on validation images.
    preprocess_ms: decode, resize and normalise one file each. load_before, load_after: load averages.
    """

    created: str
    command: str
    scenario: str
    suite: dict[str, Any]
    threads: int
    engine: dict[str, Any]
    policy: Policy
    curve: tuple[CurvePoint, ...]
    split: dict[str, Any]
    classes: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[int, ...]
    host: HostInfo
    load_before: tuple[float, float, float]
    load_after: tuple[float, float, float]
    idle_watts: float | None
    preprocess_ms: tuple[float, ...]
    variants: tuple[Variant, ...]
    targets: tuple[Target, ...] = ()
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_classes(self.classes)
        _need(len(self.labels) == len(self.images) > 0, "images and labels: as many, and some")
        _need(all(0 <= c < len(self.classes) for c in self.labels), "labels: numbers of classes")
        _need(not any(is_stray(i) for i in self.images), "images: paths that stay in the data folder")
        _need(isinstance(self.engine.get("name"), str), "engine.name: missing")
        precision = self.engine.get("precision", {})
        shares = isinstance(precision, dict) and all(isinstance(v, (int, float)) for v in precision.values())
        _need(shares, "engine.precision: shares of layers")
        for key, kind in SPLIT.items():
            _need(isinstance(self.split.get(key), kind), f"split.{key}: missing")
        _need(self.threads > 0 and self.host.cores > 0 and self.host.memory_mib >= 0, "threads, host: above 0")
        _need(_not_negative((*self.load_before, *self.load_after, self.idle_watts or 0)), "load, watts: not negative")
        _need(_are_times(self.preprocess_ms), "preprocess_ms: times")
        _need(len({v.name for v in self.variants}) == len(self.variants) > 0, "variants: some, each once")
        for variant in self.variants:
            self._check(variant)

    def _check(self, v: Variant) -> None:
        """Whether a variant fits the others, the images and the classes."""
        _need([t.batch for t in v.timings] == list(self.batches) and 1 in self.batches[:1], "timings: the same batches")
        _need(len(v.answers) == len(self.images), f"{v.name}: an answer for each image")
        _need(all(0 <= a < len(self.classes) for a in v.answers), f"{v.name}: answers that are classes")
        _need(tuple(v.metrics.per_class) == self.classes, f"{v.name}: metrics of these classes")
        exits = (*v.exits, *(e for t in v.timings for r in t.exits for e in r))
        _need(v.against or max(exits) < len(self.policy.temperatures), f"{v.name}: exits that the policy has")

    @property
    def batches(self) -> tuple[int, ...]:
        return tuple(t.batch for t in self.variants[0].timings)

    def find(self, name: str) -> Variant | None:
        """The variant called so, if it was measured."""
        return next((v for v in self.variants if v.name == name), None)


def refuse_existing(path: Path) -> None:
    """Raise before measuring when the record could not be written afterwards.

    Raises:
        ArtifactError: there is a file.
    """
    if path.exists():
        raise ArtifactError(f"{path} exists, and records are never changed", fix="give another --out, or delete it")


def write_record(path: Path, record: Record | dict[str, Any]) -> None:
    """Write record.json (or another table of samples), each list of numbers on a line of its own.

    Raises:
        ArtifactError: there is a file at `path` already.
    """
    refuse_existing(path)
    # JSON strings hold no raw line break, so what starts with "[\n" is a list and not text
    text = re.sub(r"\[\n[-+\d.,e\s]+\n *\]", lambda m: re.sub(r"\s+", "", m.group()), to_json(record).decode())
    atomic_write(path, text.encode())


def read_record(path: Path) -> Record:
    """Read record.json.

    Raises:
        ArtifactError: missing, damaged, or of another schema.
    """
    return read_json(path, Record, what="benchmark record")
