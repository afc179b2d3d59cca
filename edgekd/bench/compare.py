"""Records side by side, or a refusal that names what differs."""

from __future__ import annotations

from collections.abc import Mapping

from edgekd.bench.record import Record
from edgekd.bench.tables import pipe_table
from edgekd.errors import ConfigError
from edgekd.text import markdown, percent


def compare(records: Mapping[str, Record], *, force: bool = False) -> str:
    """One Markdown table: mean latency at batch 1, ratio to the first record, and accuracy, for every variant.

    records: a name for each (its file), two or more. force: compare in spite of differences, which are then listed.

    Raises:
        ConfigError: fewer than two, or host, threads, versions or test images differ; each key is named.
    """
    if len(records) < 2:
        raise ConfigError("one record is nothing to compare", fix="give two or more record.json files")
    differing = differences(records)
    if differing and not force:
        listed = "\n".join(f"  {line}" for line in differing)
        raise ConfigError(
            f"these records do not compare:\n{listed}", fix="measure again alike, or give --force and mind the list"
        )
    notes = "".join(f"- differs: {markdown(line)}\n" for line in differing)
    return pipe_table((_header(records), _rows(records))) + "\n" + (f"\n{notes}" if notes else "")


def conditions(record: Record) -> dict[str, str]:
    """Everything that must be equal for two records' numbers to mean the same."""
    h = record.host
    host = {k: str(getattr(h, k)) for k in ("cpu", "cores", "memory_mib", "governor", "max_mhz", "os", "machine")}
    return {
        **host,
        "python": h.python,
        **{f"{name} version": version for name, version in h.versions.items()},
        "threads": str(record.threads),
        "data fingerprint": record.split["fingerprint"],
        "split": f"{record.split['method']}, seed {record.split['seed']}, {record.split['group']}",
        "test images": str(len(record.images)),
    }


def differences(records: Mapping[str, Record]) -> list[str]:
    """`threads: a.json 2, b.json 1` for every condition that is not the same in all."""
    found = {name: conditions(record) for name, record in records.items()}
    keys = dict.fromkeys(key for facts in found.values() for key in facts)
    return [
        f"{key}: " + ", ".join(f"{name} {facts.get(key, 'none')}" for name, facts in found.items())
        for key in keys
        if len({facts.get(key) for facts in found.values()}) > 1
    ]


def _header(records: Mapping[str, Record]) -> list[str]:
    return ["variant", *(f"{name}: {part}" for name in records for part in ("mean ms", "×", "accuracy %"))]


def _rows(records: Mapping[str, Record]) -> list[list[str]]:
    names = dict.fromkeys(v.name for record in records.values() for v in record.variants)
    return [[name, *(cell for record in records.values() for cell in _cells(name, record, records))] for name in names]


def _cells(name: str, record: Record, records: Mapping[str, Record]) -> list[str]:
    variant, base = record.find(name), next(iter(records.values())).find(name)
    if variant is None:
        return ["–"] * 3
    mean = variant.at(1).mean
    times = f"{mean / base.at(1).mean:.2f}" if base else "–"
    return [f"{mean:.3f}", times, percent(variant.metrics.accuracy)]
