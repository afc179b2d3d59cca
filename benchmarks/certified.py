"""Write the table of certified early exit from benchmark records: `benchmarks/certified.sh` makes them.

python benchmarks/certified.py OUT.md NAME=record.json …
"""

from __future__ import annotations

import sys
from pathlib import Path

from edgekd.artifacts.certificate import evidence_text, short_text
from edgekd.bench.record import Record, read_record
from edgekd.bench.tables import pipe_table
from edgekd.files import atomic_write
from edgekd.text import percent

HEAD = (
    "network",
    "original ms",
    "without exits ms",
    "with exits ms",
    "× faster",
    "accuracy %",
    "certified",
    "test images",
)


def row(name: str, record: Record) -> tuple[str, ...]:
    """Return one row: the original in FP32, the same without exits on the backend, and with those that paid."""
    original = next((v for v in record.variants if v.baseline), None)
    plain = record.find("final")
    assert plain is not None, "bench measures the last exit alone"
    cascade = record.find("cascade")
    ms = plain.latency(1).mean
    accuracies = [v for v in (original, plain, cascade) if v]
    shown = [name, f"{original.latency(1).mean:.2f}" if original else "–", f"{ms:.2f}"]
    if cascade is None:
        shown += ["–", "1 (no exit pays)"]
        changed = ""
    else:
        fast = cascade.latency(1).mean
        shown += [f"{fast:.2f}", f"{ms / fast:.2f}"]
        count = sum(a != b for a, b in zip(cascade.predictions, plain.predictions))
        changed = f"{count} of {len(plain.predictions)} changed ({100 * count / len(plain.predictions):.1f} %)"
    shown.append(" / ".join(percent(v.metrics.accuracy) for v in accuracies))
    found = record.certificate
    shown.append(f"{short_text(found)}: {evidence_text(found.evidence[0])}" if found else "no early exit")
    return (*shown, changed)


def table(records: dict[str, Record]) -> str:
    """Return the table as Markdown."""
    return pipe_table((HEAD, [row(name, record) for name, record in records.items()]))


if __name__ == "__main__":
    out, *given = sys.argv[1:]
    named = dict(one.split("=", 1) for one in given)
    text = table({name: read_record(Path(path)) for name, path in named.items()})
    atomic_write(Path(out), text.encode())
    print(text)
