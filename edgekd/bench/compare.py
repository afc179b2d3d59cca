"""Records side by side, or a refusal that names what differs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from edgekd.artifacts.certificate import certificate_sentence
from edgekd.bench.comparisons import record_lines
from edgekd.bench.metrics import HEADLINES, MISSING, TimingMetric, VariantMetric
from edgekd.bench.record import Record, Variant
from edgekd.bench.tables import pipe_table
from edgekd.errors import ConfigError
from edgekd.text import markdown


def compare(records: Mapping[str, Record], *, force: bool = False) -> str:
    """Put records side by side in one Markdown table: the headline metrics of every variant.

    Args:
        records: Name (of its file) to record; two or more.
        force: Compare in spite of differences, which are then listed below the table.

    Raises:
        ConfigError: Fewer than two records, or they were not measured under the same conditions; each is named.
    """
    if len(records) < 2:
        raise ConfigError("a single record cannot be compared", fix="give two or more record.json files")
    differing = differences(records)
    if differing and not force:
        listed = "\n".join(f"  {line}" for line in differing)
        raise ConfigError(
            f"these records were measured under different conditions:\n{listed}",
            fix="measure again under the same, or give --force",
        )
    lines = [*(f"differs: {line}" for line in differing), *record_lines(records), *_certificates(records)]
    notes = "".join(f"- {markdown(line)}\n" for line in lines)
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
    """Return the conditions that must be equal for two records to be compared, except the facts of backends."""
    host = dataclasses.asdict(dataclasses.replace(record.host, versions={}, facts={}, backends={}))
    return {
        **{key: str(value) for key, value in host.items()},
        **{f"{name} version": version for name, version in record.host.versions.items()},
        **record.host.facts,
        "threads": str(record.threads),
        "energy": record.energy_source or "not measured",
        "data fingerprint": record.split.fingerprint,
        "split": f"{record.split.method}, seed {record.split.seed}, {record.split.group}",
        "test images": str(len(record.images)),
    }


def _differing(found: Mapping[str, Mapping[str, str]]) -> list[str]:
    keys = dict.fromkeys(key for facts in found.values() for key in facts)
    return [
        f"{key}: " + ", ".join(f"{name} {facts.get(key, 'none')}" for name, facts in found.items())
        for key in keys
        if len({facts.get(key) for facts in found.values()}) > 1
    ]


def _certificates(records: Mapping[str, Record]) -> list[str]:
    """List what is certified for each record's engine, if anything is for any."""
    if not any(record.certificate for record in records.values()):
        return []
    found = {name: record.certificate for name, record in records.items()}
    return [f"{name}: {certificate_sentence(c) if c else 'nothing is certified'}" for name, c in found.items()]


def _header(records: Mapping[str, Record]) -> list[str]:
    titles = [title for m in HEADLINES for title in ([m.headline, "×"] if m.has_ratio else [m.headline])]
    return ["variant", *(f"{name}: {title}" for name in records for title in titles)]


def _rows(records: Mapping[str, Record]) -> list[list[str]]:
    names = dict.fromkeys(v.name for record in records.values() for v in record.variants)
    first = next(iter(records.values()))
    return [
        [
            name,
            *(text for r in records.values() for m in HEADLINES for text in _cells(m, r.find(name), first.find(name))),
        ]
        for name in names
    ]


def _cells(metric: TimingMetric | VariantMetric, variant: Variant | None, first: Variant | None) -> list[str]:
    """Format a metric, and its ratio to that of the first record."""
    texts = [metric.headline_text(variant) if variant else MISSING]
    if metric.has_ratio:
        ours, base = (metric.values(v)[0] if v else None for v in (variant, first))
        texts.append(f"{ours / base:.2f}" if isinstance(ours, float) and isinstance(base, float) else MISSING)
    return texts
