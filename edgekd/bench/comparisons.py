"""Tests of a record's accuracies against each other, on the images that all of them were measured on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edgekd.bench.paired import Paired, compare_answers, holm, method, short_verdict, verdicts
from edgekd.bench.record import Record, Variant
from edgekd.types import Labels

UNKNOWN_GROUPS = "the record does not state which images belong together, so p is too small if some do"


def compare_variants(record: Record, variant: Variant, other: Variant) -> Paired:
    """Compare the answers of two variants of a record."""
    return _compare(record, variant, other, _groups(record))


def accuracy_table(record: Record) -> tuple[list[str], list[list[str]]] | None:
    """Make a table of the variants against the network without early exit and against each `--against` model.

    Returns:
        Header and rows; None without anything to compare with.
    """
    pairs = _pairs(record)
    if not pairs:
        return None
    adjusted = holm([paired.p_value for paired in pairs.values()])
    cells = {pair: short_verdict(paired, p) for (pair, paired), p in zip(pairs.items(), adjusted)}
    names, others = (dict.fromkeys(pair[k] for pair in pairs) for k in (0, 1))
    rows = [[name, *(cells.get((name, other), "") for other in others)] for name in names]
    return ["accuracy, points", *(f"against {other}" for other in others)], rows


def accuracy_note(record: Record) -> str:
    """Describe the test behind `accuracy_table`."""
    how = _method(record, _groups(record), len(_pairs(record)))
    return f"Difference of accuracy on the same {len(record.images)} images, by {how}."


def _pairs(record: Record) -> dict[tuple[str, str], Paired]:
    """Compare each variant of the engine with each other network, and with the engine without early exit."""
    return {
        (v.name, other.name): compare_variants(record, v, other)
        for v in record.variants
        for other in record.variants
        if not v.baseline and (other.baseline or other.name == "no-early-exit") and v.name != other.name
    }


def record_lines(records: Mapping[str, Record]) -> list[str]:
    """Test the variants of records against those of the first one, in words."""
    (base, first), *others = records.items()
    lines, found = [], {}
    for name, record in others:
        if (record.images, record.labels, record.classes) != (first.images, first.labels, first.classes):
            lines.append(f"{name}: other test images than {base}, so the accuracies were not tested against each other")
            continue
        for variant in record.variants:
            if other := first.find(variant.name):
                found[f"{variant.name} of {name} against {base}"] = _compare(first, variant, other, _groups(first))
    lines += [f"accuracy of {pair}: {text}" for pair, text in verdicts(found).items()]
    if found:
        lines.append(f"tested by {_method(first, _groups(first), len(found))}")
    return lines


def _compare(record: Record, variant: Variant, other: Variant, groups: Labels | None) -> Paired:
    answers, others = np.array(variant.predictions), np.array(other.predictions)
    return compare_answers(np.array(record.labels), answers, others, groups=groups)


def _groups(record: Record) -> Labels | None:
    return np.array(record.groups) if record.groups else None


def _method(record: Record, groups: Labels | None, count: int) -> str:
    unknown = f"; {UNKNOWN_GROUPS}" if groups is None and record.split.groups else ""
    return method(None if groups is None else len(np.unique(groups)), count) + unknown
