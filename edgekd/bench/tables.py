"""A record as Markdown and CSV; the same record gives the same text."""

from __future__ import annotations

from statistics import fmean

from edgekd import text
from edgekd.artifacts.certificate import certificate_sentence
from edgekd.bench.comparisons import accuracy_note, accuracy_table
from edgekd.bench.metrics import HEADLINES, METRICS, TIMING_METRICS, VARIANT_METRICS, Value, legend
from edgekd.bench.record import Record, Timing, Variant
from edgekd.bench.targets import target_text
from edgekd.bench.text_tables import discrimination_rows, rate_rows

Table = tuple[list[str], list[list[str]]]
"""Header and rows, as text."""


def markdown(record: Record) -> str:
    """Render a record as a page: title, table, targets, warnings, and how it was measured."""
    parts = [
        f"## {text.markdown(title(record))}",
        pipe_table(table(record)),
        text.markdown(notes(record)),
        *_accuracies(record),
        *_classes(record),
        "\n".join(f"- {text.markdown(target_text(t))}" for t in record.targets),
        "\n".join(f"- {text.markdown(line)}" for line in certificate_notes(record)),
        "\n".join(f"- Warning: {text.markdown(line)}" for line in record.warnings),
        text.markdown(f"{host_text(record)} {record.scenario}"),
    ]
    return "\n\n".join(p for p in parts if p) + "\n"


def certificate_notes(record: Record) -> list[str]:
    """Return the certificate in one sentence and its warnings; empty without one."""
    found = record.certificate
    return [f"Certified: {certificate_sentence(found)}", *found.warnings] if found else []


def _accuracies(record: Record) -> list[str]:
    found = accuracy_table(record)
    return [pipe_table(found), text.markdown(accuracy_note(record))] if found else []


def _classes(record: Record) -> list[str]:
    return [pipe_table(found) for found in class_tables(record)]


def class_tables(record: Record) -> list[Table]:
    """Make the tables of the classes of the main variant; none for older records, which lack these measures."""
    shown = main_variant(record)
    if not shown.metrics.discrimination:
        return []
    made = (rate_rows(shown.name, shown.metrics), discrimination_rows(shown.name, shown.metrics))
    return [(rows[0], rows[1:]) for rows in made]


def main_variant(record: Record) -> Variant:
    """Return the variant that answers as a user would run the engine."""
    return record.find("cascade") or record.find("full") or record.variants[0]


def title(record: Record) -> str:
    """Return the engine, the machine and the number of images in one line."""
    return f"{record.engine.name} on {record.host.cpu}, {record.threads} threads, {len(record.images)} test images"


def table(record: Record) -> Table:
    """Make the table of all metrics: a row for each variant, and one for preprocessing."""
    timing = [(batch, m) for batch in record.batches for m in TIMING_METRICS if m.is_shown(record, batch)]
    first = next(m for m in TIMING_METRICS if m.title)
    other = [m for m in VARIANT_METRICS if m.is_shown(record)]
    titles = [f"b{batch} {m.title}" if m is first else m.title for batch, m in timing]
    rows = [
        [_label(v), *(m.text(v.timing(batch)) for batch, m in timing), *(m.text(v) for m in other)]
        for v in record.variants
    ]
    preprocessing = Timing(1, (record.preprocess_ms,))
    cells = (m.text(preprocessing) if batch == 1 else "" for batch, m in timing)
    rows.append(["preprocessing (file to array)", *cells, *[""] * len(other)])
    return ["variant", *titles, *(m.title for m in other)], rows


def summary_table(record: Record) -> Table:
    """Make the table of the headline metrics: mean latency at batch 1, accuracy and size of each variant."""
    rows = [[_label(v), *(m.headline_text(v) for m in HEADLINES)] for v in record.variants]
    return ["variant", *(m.headline for m in HEADLINES)], rows


def _label(v: Variant) -> str:
    return f"{v.name} ({v.network}, {v.engine})" if v.baseline else v.name


def pipe_table(cells: Table) -> str:
    """Render a table as Markdown, the first column left-aligned and the others right-aligned."""
    header, rows = cells
    marks = [":--", *["--:"] * (len(header) - 1)]
    lines = ([text.markdown(c) for c in header], marks, *([text.markdown(c) for c in row] for row in rows))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def notes(record: Record) -> str:
    """Explain the columns, and give the start-up times of each variant (means over the rounds)."""
    starts = (f"{v.name} {fmean(v.load_ms):.0f} + {fmean(v.first_ms):.0f}" for v in record.variants)
    return f"{legend(record)} Loading + first query, ms: {', '.join(starts)}."


def host_text(record: Record) -> str:
    """Describe the machine, its software and load, the split and the date."""
    split = record.split
    return (
        f"{record.created}. {record.host}. "
        f"Load average {record.load_before[0]:g} before, {record.load_after[0]:g} after. "
        f"Split {split.method}, seed {split.seed}, grouped by {split.group} "
        f"({split.leaking} of {split.groups} groups leak), fingerprint {split.fingerprint[:12]}."
    )


def to_csv(record: Record) -> str:
    """Render a row for each variant and batch size at full precision; a value that was not measured is empty."""
    rows = (
        [v.name, v.network, v.engine, t.batch, *(_csv_cell(x) for m in METRICS for x in m.values(v, t.batch))]
        for v in record.variants
        for t in v.timings
    )
    header = ["variant", "network", "engine", "batch", *(column for m in METRICS for column in m.csv)]
    return text.csv_line(header) + "".join(map(text.csv_line, rows))


def _csv_cell(value: Value) -> float | str | None:
    return "/".join(f"{x:.4f}" for x in value) if isinstance(value, tuple) else value
