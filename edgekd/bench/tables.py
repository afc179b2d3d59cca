"""A record as Markdown and CSV; the same record gives the same text."""

from __future__ import annotations

from collections.abc import Sequence

from edgekd import text
from edgekd.bench.latency import Summary, summarise
from edgekd.bench.record import Record, Variant
from edgekd.bench.targets import target_text
from edgekd.text import percent

Table = tuple[list[str], list[list[str]]]


def markdown(record: Record) -> str:
    """Title, the table of variants, targets, warnings, and how it was measured."""
    parts = [
        f"## {text.markdown(title(record))}",
        pipe_table(table(record)),
        text.markdown(f"{LEGEND} {start_text(record)}"),
        "\n".join(f"- {text.markdown(target_text(t))}" for t in record.targets),
        "\n".join(f"- Warning: {text.markdown(line)}" for line in record.warnings),
        text.markdown(f"{host_text(record)} {record.scenario}"),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


LEGEND = (
    "Latency in ms a query: median, 90th percentile (99th from 1000 queries), mean with its 95 % bootstrap interval. "
    "Memory: what the engine adds to the process at most; size: the files that answer; leave: share of the test images "
    "at each exit."
)


def title(record: Record) -> str:
    """What was measured, on what."""
    return f"{record.engine['name']} on {record.host.cpu}, {record.threads} threads, {len(record.images)} test images"


def start_text(record: Record) -> str:
    """Load and first inference of each kind of engine, means over the rounds."""
    texts = [
        f"{v.name} {sum(v.load_ms) / len(v.load_ms):.0f} + {sum(v.first_ms) / len(v.first_ms):.0f}"
        for v in record.variants
    ]
    return f"Load + first query, ms: {', '.join(texts)}."


def host_text(record: Record) -> str:
    """Machine, software, load, split and date."""
    split = record.split
    return (
        f"{record.created}. {record.host}. "
        f"Load average {record.load_before[0]:g} before, {record.load_after[0]:g} after. "
        f"Split {split['method']}, seed {split['seed']}, grouped by {split['group']} "
        f"({split['leaking']} of {split['groups']} groups leak), fingerprint {split['fingerprint'][:12]}."
    )


def table(record: Record) -> Table:
    """Header and rows of text: every variant, and pre-processing apart."""
    has_p99 = {b: any(v.at(b).p99 is not None for v in record.variants) for b in record.batches}
    header = ["variant"]
    for b in record.batches:
        header += [f"b{b} p50", "p90", *(["p99"] if has_p99[b] else []), "mean [95 %]", "images/s"]
    measured = record.idle_watts is not None
    header += ["accuracy %", "memory MiB", "size MiB", *(["energy mJ"] if measured else []), "leave %"]
    rows = [_row(record, v, has_p99, measured) for v in record.variants]
    pre = _cells(summarise([record.preprocess_ms]), 1, has_p99[1])
    rows.append(["pre-processing (file to array)", *pre, *[""] * (len(header) - 1 - len(pre))])
    return header, rows


def _row(record: Record, v: Variant, has_p99: dict[int, bool], measured: bool) -> list[str]:
    name = f"{v.name} ({v.network}, {v.engine})" if v.against else v.name
    cells = [cell for b in record.batches for cell in _cells(v.at(b), b, has_p99[b])]
    energy = [f"{sum(e) / len(e):.2f}" if (e := v.timings[0].energy_mj) else "not measured"] if measured else []
    leave = " / ".join(f"{100 * s:.0f}" for s in v.shares) if v.name in ("cascade", "no-early-exit") else ""
    return [name, *cells, percent(v.metrics.accuracy), f"{v.memory_mib:.0f}", f"{v.size_mib:.1f}", *energy, leave]


def _cells(s: Summary, batch: int, p99: bool) -> list[str]:
    low, high = s.mean_interval
    tail = [("–" if s.p99 is None else f"{s.p99:.2f}")] if p99 else []
    mean = f"{s.mean:.2f} [{low:.2f}, {high:.2f}]"
    return [f"{s.p50:.2f}", f"{s.p90:.2f}", *tail, mean, f"{1000 * batch / s.mean:.0f}"]


def pipe_table(cells: Table) -> str:
    """Markdown, the first column to the left and the others to the right."""
    header, rows = cells
    marks = [":--", *["--:"] * (len(header) - 1)]
    lines = ([text.markdown(c) for c in header], marks, *([text.markdown(c) for c in row] for row in rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


COLUMNS = (
    "variant,network,engine,batch,n,mean_ms,mean_low_ms,mean_high_ms,p50_ms,p50_low_ms,p50_high_ms,p90_ms,p99_ms,"
    "variation,images_per_s,energy_mj,accuracy,sensitivity,specificity,precision,f1,ece,memory_mib,size_mib,"
    "load_ms,first_ms,overhead_ms,shares\n"
)


def to_csv(record: Record) -> str:
    """One row for each variant and batch size, full precision; empty where something was not measured."""
    rows = (_csv_row(v, t.batch, v.at(t.batch), t.energy_mj) for v in record.variants for t in v.timings)
    return COLUMNS + "".join(map(text.csv_line, rows))


def _csv_row(v: Variant, batch: int, s: Summary, energy: Sequence[float]) -> list[object]:
    m, macro = v.metrics, v.metrics.macro
    times = [s.n, s.mean, *s.mean_interval, s.p50, *s.p50_interval, s.p90, s.p99, s.cv, 1000 * batch / s.mean]
    rates = [m.accuracy, macro.sensitivity, macro.specificity, macro.precision, macro.f1, m.ece]
    rest = [v.memory_mib, v.size_mib, _mean(v.load_ms), _mean(v.first_ms), v.overhead_ms]
    shares = "/".join(f"{x:.4f}" for x in v.shares)
    return [v.name, v.network, v.engine, batch, *times, _mean(energy), *rates, *rest, shares]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
