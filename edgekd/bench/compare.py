"""Records side by side, or a refusal that names what differs."""

from __future__ import annotations

import dataclasses
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


def differences(records: Mapping[str, Record]) -> list[str]:
    """List every condition that is not the same in all records, as `threads: a.json 2, b.json 1`.

    Whatever a host or a backend reports is a condition; a backend's facts are compared among the records that use it.
    """
    found = _differing({name: conditions(record) for name, record in records.items()})
    reported = {name: record.host.backends for name, record in records.items()}
    for backend in dict.fromkeys(backend for backends in reported.values() for backend in backends):
        using = {name: backends[backend] for name, backends in reported.items() if backend in backends}
        found += [f"{backend} {line}" for line in _differing(using)]
    return found


def conditions(record: Record) -> dict[str, str]:
    """Everything but the backends' facts that must be equal for two records' numbers to mean the same."""
    host = dataclasses.asdict(dataclasses.replace(record.host, versions={}, facts={}, backends={}))
    return {
        **{key: str(value) for key, value in host.items()},
        **{f"{name} version": version for name, version in record.host.versions.items()},
        **record.host.facts,
        "threads": str(record.threads),
        "data fingerprint": record.split["fingerprint"],
        "split": f"{record.split['method']}, seed {record.split['seed']}, {record.split['group']}",
        "test images": str(len(record.images)),
    }


def _differing(found: Mapping[str, Mapping[str, str]]) -> list[str]:
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
