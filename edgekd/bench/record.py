"""record.json: everything a benchmark measured, raw; never changed once written. Tables and pages are views of it."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from edgekd.artifact import SCHEMA, read_json
from edgekd.bench.accuracy import Metrics
from edgekd.bench.host import Host
from edgekd.bench.latency import Summary, summarise
from edgekd.errors import ArtifactError
from edgekd.files import atomic_write, to_json
from edgekd.runtime.policy import Policy


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
    no-leaving and of full, taken in turns in one process; empty for other variants.
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
    curve: tuple[dict[str, Any], ...]
    split: dict[str, Any]
    classes: tuple[str, ...]
    images: tuple[str, ...]
    labels: tuple[int, ...]
    host: Host
    load_before: tuple[float, float, float]
    load_after: tuple[float, float, float]
    idle_watts: float | None
    preprocess_ms: tuple[float, ...]
    variants: tuple[Variant, ...]
    targets: tuple[Target, ...] = ()
    warnings: tuple[str, ...] = ()
    schema: int = SCHEMA

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
