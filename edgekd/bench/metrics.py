"""The metrics of a benchmark. Each is declared once; tables, CSV, legend, comparison and report iterate over them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean
from typing import Generic, TypeAlias, TypeVar

from edgekd.bench.record import Record, Timing, Variant, summary
from edgekd.text import percent

T = TypeVar("T")
Value: TypeAlias = float | tuple[float, ...] | None
MISSING = "–"
"""Shown in place of a value that was not measured."""


@dataclass(frozen=True)
class Metric(ABC, Generic[T]):
    """A quantity, and how the views of a record show it.

    Attributes:
        csv: Columns of the CSV file, one for each value that `measure` returns.
        measure: Returns the values of a timing or variant; None for what was not measured.
        title: Column of the table, omitted if no variant has a value; empty for a metric that is in the CSV file only.
        cell: Formats the values for the table.
        legend: Explanation of the column.
        headline: Column of the summary and of `edgekd compare`; empty for a metric that neither shows.
        headline_cell: Formats the first value for that column.
        has_ratio: `edgekd compare` shows it as a multiple of the first record's, too.
    """

    csv: tuple[str, ...]
    measure: Callable[[T], tuple[Value, ...]]
    title: str = ""
    cell: Callable[..., str] = "{:.2f}".format
    legend: str = ""
    headline: str = ""
    headline_cell: Callable[..., str] = "{:.2f}".format
    has_ratio: bool = False

    def text(self, measured: T) -> str:
        """Format the values for the table."""
        values = self.measure(measured)
        return MISSING if values[0] is None else self.cell(*values)

    def headline_text(self, variant: Variant) -> str:
        """Format the first value at batch 1 for the summary."""
        value = self.values(variant)[0]
        return MISSING if value is None else self.headline_cell(value)

    @abstractmethod
    def values(self, variant: Variant, batch: int = 1) -> tuple[Value, ...]:
        """Return the values of a variant, at one of the suite's batch sizes if they depend on it."""

    def is_shown(self, record: Record, batch: int = 1) -> bool:
        """Return True if it has a column in the record's table."""
        return bool(self.title) and any(self.values(v, batch)[0] is not None for v in record.variants)


class TimingMetric(Metric[Timing]):
    """A metric of a variant's queries at one batch size."""

    def values(self, variant: Variant, batch: int = 1) -> tuple[Value, ...]:
        return self.measure(variant.timing(batch))


class VariantMetric(Metric[Variant]):
    """A metric of a variant as a whole."""

    def values(self, variant: Variant, batch: int = 1) -> tuple[Value, ...]:
        return self.measure(variant)


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{percent(value)} [{percent(low)}, {percent(high)}]"


TIMING_METRICS = (
    TimingMetric(("n",), lambda t: (summary(t).n,)),
    TimingMetric(
        ("p50_ms", "p50_low_ms", "p50_high_ms"),
        lambda t: (summary(t).p50, *summary(t).p50_interval),
        title="p50",
        legend="median latency of a query in ms",
    ),
    TimingMetric(("p90_ms",), lambda t: (summary(t).p90,), title="p90", legend="90th percentile"),
    TimingMetric(
        ("p99_ms",), lambda t: (summary(t).p99,), title="p99", legend="99th percentile, given from 1000 queries on"
    ),
    TimingMetric(
        ("mean_ms", "mean_low_ms", "mean_high_ms"),
        lambda t: (summary(t).mean, *summary(t).mean_interval),
        title="mean [95 %]",
        cell="{:.2f} [{:.2f}, {:.2f}]".format,
        legend="mean and its 95 % bootstrap interval",
        headline="mean ms",
        has_ratio=True,
    ),
    TimingMetric(("variation",), lambda t: (summary(t).cv,)),
    TimingMetric(
        ("images_per_s",),
        lambda t: (1000 * t.batch / summary(t).mean,),
        title="images/s",
        cell="{:.0f}".format,
        legend="throughput",
    ),
    TimingMetric(
        ("energy_mj",),
        lambda t: (fmean(t.energy_mj) if t.energy_mj else None,),
        title="energy mJ",
        legend="energy above idle, for one image",
    ),
)
VARIANT_METRICS = (
    VariantMetric(
        ("accuracy",),
        lambda v: (v.metrics.accuracy,),
        title="accuracy %",
        cell=percent,
        legend="share of the test images that are classified correctly",
        headline="accuracy %",
        headline_cell=percent,
    ),
    VariantMetric(
        ("accuracy_low", "accuracy_high"),
        lambda v: v.metrics.accuracy_interval or (None, None),
        title="[95 %]",
        cell=lambda low, high: f"[{percent(low)}, {percent(high)}]",
        legend="its 95 % interval (Clopper-Pearson, on the effective number of images where they form groups)",
    ),
    VariantMetric(("sensitivity",), lambda v: (v.metrics.macro.sensitivity,)),
    VariantMetric(("specificity",), lambda v: (v.metrics.macro.specificity,)),
    VariantMetric(("precision",), lambda v: (v.metrics.macro.precision,)),
    VariantMetric(("f1",), lambda v: (v.metrics.macro.f1,)),
    VariantMetric(("ece",), lambda v: (v.metrics.ece,)),
    VariantMetric(("kappa",), lambda v: (v.metrics.kappa,)),
    VariantMetric(("brier",), lambda v: (v.metrics.brier,)),
    VariantMetric(("nll",), lambda v: (v.metrics.nll,)),
    VariantMetric(("pr_auc",), lambda v: (v.metrics.pr_auc,)),
    VariantMetric(
        ("roc_auc",),
        lambda v: (v.metrics.roc_auc,),
        title="ROC-AUC",
        cell="{:.3f}".format,
        legend="area under the ROC curve of a class against the others, mean of the classes",
    ),
    VariantMetric(
        ("confidence_auc",),
        lambda v: (v.metrics.confidence_auc,),
        title="confidence AUC",
        cell="{:.3f}".format,
        legend="area under the ROC curve of the confidence against whether the answer is right",
    ),
    VariantMetric(
        ("coverage", "coverage_low", "coverage_high"),
        lambda v: (v.answered.coverage, *v.answered.coverage_interval) if v.answered else (None,) * 3,
        title="answered %",
        cell=_with_interval,
        legend="share of the test images that are not deferred to a person, and its 95 % interval",
    ),
    VariantMetric(
        ("answered_error", "answered_error_low", "answered_error_high"),
        lambda v: (v.answered.error, *(v.answered.error_interval or (None, None))) if v.answered else (None,) * 3,
        title="wrong of these %",
        cell=_with_interval,
        legend="share of the answered images that are classified incorrectly, and its 95 % interval",
    ),
    VariantMetric(
        ("memory_mib",),
        lambda v: (v.memory_mib,),
        title="memory MiB",
        cell="{:.0f}".format,
        legend="resident memory that the engine adds to the process at its peak",
    ),
    VariantMetric(
        ("size_mib",),
        lambda v: (v.size_mib,),
        title="size MiB",
        cell="{:.1f}".format,
        legend="size of the files that the variant needs",
        headline="size MiB",
        headline_cell="{:.1f}".format,
    ),
    VariantMetric(("load_ms",), lambda v: (fmean(v.load_ms),)),
    VariantMetric(("first_ms",), lambda v: (fmean(v.first_ms),)),
    VariantMetric(("overhead_ms",), lambda v: (v.overhead_ms,)),
    VariantMetric(
        ("exit_shares",),
        lambda v: (v.shares,),
        title="exit share %",
        cell=lambda shares: " / ".join(f"{100 * share:.0f}" for share in shares),
        legend="share of the test images that exit at each exit",
    ),
)
METRICS: tuple[TimingMetric | VariantMetric, ...] = (*TIMING_METRICS, *VARIANT_METRICS)
"""In the order of the columns."""
HEADLINES = tuple(metric for metric in METRICS if metric.headline)


def legend(record: Record) -> str:
    """Explain the columns of a record's table."""
    shown = (m for m in METRICS if m.legend and any(m.is_shown(record, batch) for batch in record.batches))
    return "; ".join(f"{metric.title}: {metric.legend}" for metric in shown) + "."
