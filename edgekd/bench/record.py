"""record.json: everything a benchmark measured, raw; never changed once written. Tables and pages are views of it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from edgekd.artifacts.certificate import Certificate
from edgekd.artifacts.manifest import MAX_MS, CurvePoint
from edgekd.bench.accuracy import Answered, Metrics
from edgekd.bench.latency import Summary, summarise
from edgekd.bench.suite import Suite
from edgekd.data.split import check_classes, is_stray
from edgekd.errors import ArtifactError
from edgekd.files import atomic_write
from edgekd.host import HostInfo
from edgekd.policy import Policy
from edgekd.serialization import SCHEMA, Fact, read_json, to_json

MAX_EXITS = 1000
"""More exits than any network has; the number of exits of `--against` models is not in a record."""


@dataclass(frozen=True)
class EngineFacts:
    """The engine under test.

    Attributes:
        path: Name of its folder or file.
        name: Backend and precision.
        backend: Name of the backend.
        source_sha256: Digest of student.onnx.
        precision: Precision to its share of the layers, as read back; empty for student.onnx.
        final_accuracy: Accuracy of the last exit on validation images when it was built, 0..1; None if unknown.
        validation_images: Number of these images.
        facts: Remaining fields of the manifest that the record does not store elsewhere, keys joined by dots.
    """

    path: str
    name: str
    backend: str
    source_sha256: str
    precision: dict[str, float] = field(default_factory=dict)
    final_accuracy: float | None = None
    validation_images: int = 0
    facts: dict[str, Fact] = field(default_factory=dict)

    def __post_init__(self) -> None:
        accuracy = self.final_accuracy
        _check(accuracy is None or (0 <= accuracy <= 1 and self.validation_images > 0), "final_accuracy: from 0 to 1")


@dataclass(frozen=True)
class SplitFacts:
    """The split whose test images were used; fields as in `edgekd.data.split.Split`."""

    fingerprint: str
    method: str
    seed: int
    group: str
    groups: int
    leaking: int


@dataclass(frozen=True)
class Timing:
    """The queries of one variant at one batch size; each tuple has an entry for each round (a fresh process).

    Attributes:
        batch: Batch size.
        samples_ms: Latency of each query.
        exits: Exit of each query's image, at batch 1 only.
        energy_mj: Energy above idle for one image; empty where it could not be measured.
    """

    batch: int
    samples_ms: tuple[tuple[float, ...], ...]
    exits: tuple[tuple[int, ...], ...] = ()
    energy_mj: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        _check(0 < self.batch < 2**31, "batch: above 0")
        _check(bool(self.samples_ms) and all(map(_are_times, self.samples_ms)), "samples_ms: times in every round")
        lengths = [len(r) for r in self.samples_ms]
        _check(not self.exits or [len(r) for r in self.exits] == lengths, "exits: one for each sample, or none")
        _check(all(0 <= e < MAX_EXITS for r in self.exits for e in r), f"exits: from 0 to {MAX_EXITS}")
        _check(all(-MAX_MS <= e <= MAX_MS for e in self.energy_mj), "energy_mj: finite")


@lru_cache(maxsize=1024)
def summary(timing: Timing) -> Summary:
    """Summarise a timing's queries."""
    return summarise(timing.samples_ms, exits=timing.exits)


@dataclass(frozen=True)
class Variant:
    """One way to classify images, measured; `load_ms` to `peak_mib` have an entry for each round.

    Attributes:
        name: `exit_0`, `cascade` and so on, or the name of an `--against` model.
        network: Name of the network.
        engine: Backend and precision.
        baseline: True for an `--against` model.
        timings: One for each batch size.
        metrics: Accuracy and rates on the test images.
        predictions: Class index of every test image.
        exits: Exit of every test image.
        load_ms: Time to open the engine.
        first_ms: Time of its first query.
        before_mib: Resident memory before loading, test images included.
        peak_mib: Largest resident memory of the process.
        overhead_ms: Median of a query at batch 1 minus the time inside the compiled graphs.
        size_mib: Size of the files that the variant needs.
        interleaved_ms: For each round, samples of this variant and of the one that it was interleaved with in the same
            process (no-early-exit with full); empty for other variants.
        answered: Images that are not passed on to a person; None if the policy passes none on.
    """

    name: str
    network: str
    engine: str
    baseline: bool
    timings: tuple[Timing, ...]
    metrics: Metrics
    predictions: tuple[int, ...]
    exits: tuple[int, ...]
    load_ms: tuple[float, ...]
    first_ms: tuple[float, ...]
    before_mib: tuple[float, ...]
    peak_mib: tuple[float, ...]
    overhead_ms: float
    size_mib: float
    interleaved_ms: tuple[tuple[tuple[float, ...], ...], ...] = ()
    answered: Answered | None = None

    def __post_init__(self) -> None:
        _check(len(self.predictions) == len(self.exits) == self.metrics.n > 0, "predictions, exits: one for each image")
        _check(all(0 <= e < MAX_EXITS for e in self.exits), f"exits: from 0 to {MAX_EXITS}")
        lists = (self.load_ms, self.first_ms, self.before_mib, self.peak_mib)
        _check(len({len(v) for v in lists}) == 1 and bool(self.load_ms), "load_ms to peak_mib: one entry a round")
        singles = (self.overhead_ms, self.size_mib)
        _check(_not_negative(v for values in (*lists, singles) for v in values), "load_ms to size_mib: not negative")
        pairs = all(len(pair) == 2 and all(map(_are_times, pair)) for pair in self.interleaved_ms)
        _check(pairs, "interleaved_ms: times of two variants in every round")

    @property
    def memory_mib(self) -> float:
        """Memory that the engine added to the process at its peak, in the round with the most."""
        return max(peak - before for peak, before in zip(self.peak_mib, self.before_mib))

    @property
    def shares(self) -> tuple[float, ...]:
        """Fraction of the test images that took each exit, up to the last one taken."""
        counts = Counter(self.exits)
        return tuple(counts[k] / len(self.exits) for k in range(max(counts) + 1))

    def timing(self, batch: int) -> Timing:
        """Return the queries at one of the suite's batch sizes."""
        return next(t for t in self.timings if t.batch == batch)

    def latency(self, batch: int) -> Summary:
        """Summarise the queries at one of the suite's batch sizes."""
        return summary(self.timing(batch))


@dataclass(frozen=True)
class Target:
    """A figure and its limit.

    Attributes:
        name: Description of the figure.
        value: The figure.
        unit: Its unit.
        rounds: The same figure in each round.
        limit: Limit that the suite sets, or None.
        met: True if the figure keeps it; None without one.
        sign: Direction of the limit.
        p_value: p-value of a difference of accuracies on the same images; None for other figures.
    """

    name: str
    value: float
    unit: str
    rounds: tuple[float, ...] = ()
    limit: float | None = None
    met: bool | None = None
    sign: Literal["≤", "≥"] = "≤"
    p_value: float | None = None

    def __post_init__(self) -> None:
        if (self.limit is None) != (self.met is None):
            raise ValueError("limit, met: both or none")
        _check(self.p_value is None or 0 <= self.p_value <= 1, "p_value: from 0 to 1")


@dataclass(frozen=True)
class Record:
    """One benchmark.

    Attributes:
        created: Date and time, ISO 8601.
        command: The command line.
        scenario: Description of how it was measured.
        suite: The settings.
        threads: CPU threads of every model.
        engine: The engine under test.
        policy: Its exit policy.
        curve: Trade-off of accuracy and latency that `edgekd tune` found on the validation images.
        split: Where the test images come from.
        classes: Class names.
        images: Paths of the test images, in the order of every variant's predictions.
        labels: Their class indices.
        groups: Number of the picture that each was cut from; empty where no group is known.
        host: The machine.
        load_before: Load averages before the benchmark.
        load_after: Load averages after it.
        idle_watts: Power when idle; None where it cannot be read.
        energy_source: What the energy is that of: processor packages, or rails of a Jetson; empty where none is read.
        preprocess_ms: Time to decode, resize and normalise one file each.
        variants: The measured variants.
        targets: Figures derived from the variants.
        warnings: Remarks on the validity of the numbers.
        certificate: What the policy keeps on images like those of the certificate; None if nothing is certified.
    """

    created: str
    command: str
    scenario: str
    suite: Suite
    threads: int
    engine: EngineFacts
    policy: Policy
    curve: tuple[CurvePoint, ...]
    split: SplitFacts
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
    groups: tuple[int, ...] = ()
    certificate: Certificate | None = None
    energy_source: str = ""
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        check_classes(self.classes)
        _check(len(self.labels) == len(self.images) > 0, "images, labels: the same number of both, above 0")
        _check(all(0 <= c < len(self.classes) for c in self.labels), "labels: numbers of classes")
        _check(len(self.groups) in (0, len(self.images)), "groups: one for each image, or none")
        _check(all(0 <= g < len(self.images) for g in self.groups), "groups: numbers below that of the images")
        _check(not any(is_stray(i) for i in self.images), "images: paths that stay in the data folder")
        _check(self.threads > 0 and self.host.cores > 0 and self.host.memory_mib >= 0, "threads, host: above 0")
        _check(_not_negative((*self.load_before, *self.load_after, self.idle_watts or 0)), "load, watts: not negative")
        _check(_are_times(self.preprocess_ms), "preprocess_ms: times")
        _check(len({v.name for v in self.variants}) == len(self.variants) > 0, "variants: one or more, each once")
        for variant in self.variants:
            self._check_variant(variant)

    def _check_variant(self, v: Variant) -> None:
        """Check that a variant fits the others, the images and the classes."""
        _check(
            [t.batch for t in v.timings] == list(self.batches) and 1 in self.batches[:1], "timings: the same batches"
        )
        _check(len(v.predictions) == len(self.images), f"{v.name}: a prediction for each image")
        _check(all(0 <= p < len(self.classes) for p in v.predictions), f"{v.name}: predictions of its classes")
        _check(tuple(v.metrics.per_class) == self.classes, f"{v.name}: metrics of these classes")
        exits = (*v.exits, *(e for t in v.timings for r in t.exits for e in r))
        _check(v.baseline or max(exits) < len(self.policy.temperatures), f"{v.name}: exits that the policy has")

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes, in ascending order."""
        return tuple(t.batch for t in self.variants[0].timings)

    def find(self, name: str) -> Variant | None:
        """Return the variant called `name`, or None if it was not measured."""
        return next((v for v in self.variants if v.name == name), None)


def refuse_existing(path: Path) -> None:
    """Check before measuring that the record can be written afterwards.

    Raises:
        ArtifactError: There is a file.
    """
    if path.exists():
        raise ArtifactError(f"{path} exists, and records are never changed", fix="give another --out, or delete it")


def write_record(path: Path, record: Record | dict[str, Any]) -> None:
    """Write record.json (or another table of samples), each list of numbers on a line of its own.

    Raises:
        ArtifactError: There is a file at `path` already.
    """
    refuse_existing(path)
    # JSON strings hold no raw line break, so what starts with "[\n" is a list and not text
    text = re.sub(r"\[\n[-+\d.,e\s]+\n *\]", lambda m: re.sub(r"\s+", "", m.group()), to_json(record).decode())
    atomic_write(path, text.encode())


def read_record(path: Path) -> Record:
    """Read record.json.

    Raises:
        ArtifactError: Missing, damaged, or of another schema.
    """
    return read_json(path, Record, what="benchmark record")


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _are_times(values: Iterable[float]) -> bool:
    """Return True if there are values, and all are milliseconds above 0."""
    values = tuple(values)
    return bool(values) and all(1e-9 <= v <= MAX_MS for v in values)


def _not_negative(values: Iterable[float]) -> bool:
    return all(0 <= v <= MAX_MS for v in values)
