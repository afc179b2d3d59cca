"""The settings of a benchmark: the keys of benchmarks/suites/*.toml."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from edgekd.bench.roc import SPECIFICITY

VariantGroup: TypeAlias = Literal["exits", "cascade", "no-early-exit", "full", "final"]
"""Groups of variants; `exits` expands to one variant for each exit."""


@dataclass(frozen=True)
class Limits:
    """Limits by which a record judges its figures; a figure without one is reported and not judged.

    Attributes:
        faster: Name of an `--against` model to how many times faster than it the cascade has to be.
        accuracy_drop: Percentage points that the cascade may lose against the ensemble of all exits.
        staged: Largest ratio of the cascade without early exit to the monolithic engine.
        overhead_ms: Largest time in Python around the compiled graphs, for one image.
    """

    faster: dict[str, float] = field(default_factory=dict)
    accuracy_drop: float | None = None
    staged: float | None = None
    overhead_ms: float | None = None


@dataclass(frozen=True)
class Suite:
    """Settings of a benchmark: variants, batch sizes and durations.

    Attributes:
        batch_sizes: Batch sizes in ascending order; the first is 1.
        min_count: Smallest number of queries in each process, one for each batch size.
        min_seconds: Shortest time of measuring in each process, at each batch size.
        warmup_seconds: Time before each measurement whose results are discarded.
        rounds: Fresh processes for each variant.
        pool: Largest number of test images that the queries cycle through.
        threads: Threads of every model; all cores that the process may use if None.
        variants: Variants of the engine to measure.
        targets: Limits that the record judges by.
        specificity: Specificity at which each class's sensitivity is read off its ROC curve.
    """

    batch_sizes: tuple[int, ...]
    min_count: tuple[int, ...]
    min_seconds: float
    warmup_seconds: float
    rounds: int
    pool: int
    threads: int | None = None
    variants: tuple[VariantGroup, ...] = ("exits", "cascade", "no-early-exit", "full", "final")
    targets: Limits = field(default_factory=Limits)
    specificity: float = SPECIFICITY

    def __post_init__(self) -> None:
        if self.batch_sizes[:1] != (1,) or list(self.batch_sizes) != sorted(set(self.batch_sizes)):
            raise ValueError("batch_sizes: in ascending order, and the first is 1")
        if len(self.min_count) != len(self.batch_sizes) or min(self.min_count) < 2:
            raise ValueError("min_count: one for each batch size, 2 or more")
        if min(self.rounds, self.pool, 1 if self.threads is None else self.threads) < 1 or not self.variants:
            raise ValueError("rounds, pool, threads and variants: 1 or more")
        if not 0 <= self.specificity <= 1:
            raise ValueError("specificity: from 0 to 1")
        if not all(0 <= seconds <= 1e6 for seconds in (self.min_seconds, self.warmup_seconds)):
            raise ValueError("min_seconds, warmup_seconds: from 0 to a million")
