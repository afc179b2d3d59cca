"""Figures derived from a record, their limits, and warnings about the numbers."""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from edgekd.bench.accuracy import gap
from edgekd.bench.comparisons import compare_variants
from edgekd.bench.latency import UNSTABLE
from edgekd.bench.paired import ALPHA, p_text
from edgekd.bench.record import Record, Target, Variant


def targets(record: Record) -> tuple[Target, ...]:
    """Derive the ratios of mean latency at batch 1, the cascade's accuracy and the overhead.

    Figures for which the suite has a limit are judged by it.
    """
    limits = record.suite.targets
    cascade, full, no_early_exit = map(record.find, ("cascade", "full", "no-early-exit"))
    found = []
    if cascade:
        found += [_faster(cascade, v, limits.faster.get(v.name)) for v in record.variants if v.baseline]
        found.append(_at_most("Python overhead for one image", cascade.overhead_ms, "ms", limits.overhead_ms))
    if cascade and full:
        gain = 100 * (cascade.metrics.accuracy - full.metrics.accuracy)
        least = None if limits.accuracy_drop is None else -limits.accuracy_drop
        name = "accuracy of the cascade minus that of all exits' ensemble"
        paired = compare_variants(record, cascade, full)
        found.append(replace(_at_least(name, gain, "points", least), p_value=paired.p_value))
    if no_early_exit:
        rounds = tuple(fmean(staged) / fmean(whole) for staged, whole in no_early_exit.interleaved_ms)
        name = "cascade without early exit / monolithic engine, interleaved"
        found.append(_at_most(name, fmean(rounds), "×", limits.staged, rounds))
    return tuple(found)


def ratio(slow: Variant, fast: Variant) -> tuple[float, tuple[float, ...]]:
    """Return the ratio of two mean latencies at batch 1: of all queries, and in each round."""
    pairs = zip(slow.timings[0].samples_ms, fast.timings[0].samples_ms)
    return slow.latency(1).mean / fast.latency(1).mean, tuple(fmean(a) / fmean(b) for a, b in pairs)


def _faster(cascade: Variant, other: Variant, limit: float | None) -> Target:
    value, rounds = ratio(other, cascade)
    name = f"cascade faster than {other.name} ({other.network}, {other.engine})"
    return _at_least(name, value, "×", limit, rounds)


def _at_least(name: str, value: float, unit: str, limit: float | None, rounds: tuple[float, ...] = ()) -> Target:
    return Target(name, value, unit, rounds, limit, None if limit is None else value >= limit, "≥")


def _at_most(name: str, value: float, unit: str, limit: float | None, rounds: tuple[float, ...] = ()) -> Target:
    return Target(name, value, unit, rounds, limit, None if limit is None else value <= limit)


def target_text(t: Target) -> str:
    """Format a figure, its range over the rounds, its limit and the verdict."""
    spread = f" (rounds {min(t.rounds):.2f} to {max(t.rounds):.2f})" if len(t.rounds) > 1 else ""
    verdict = "" if t.met is None else f"; required {t.sign} {t.limit:g}: {'met' if t.met else 'NOT met'}"
    noise = ""
    if t.p_value is not None:
        noise = f", {'a difference' if t.p_value <= ALPHA else 'within noise'} (p {p_text(t.p_value)})"
    signed = "+" if t.unit == "points" and t.sign == "≥" else ""
    return f"{t.name}: {t.value:{signed}.2f} {t.unit}{noise}{spread}{verdict}"


def warnings(record: Record) -> tuple[str, ...]:
    """List caveats that a reader of the numbers must know."""
    found = []
    shaky = [
        f"{v.name} ({100 * v.latency(b).cv:.0f} %, batch {b})"
        for v in record.variants
        for b in record.batches
        if v.latency(b).cv > UNSTABLE and (b == 1 or len(set(v.exits)) == 1)  # batches of a cascade differ in work
    ]
    if shaky:
        found.append(f"unstable, coefficient of variation over {100 * UNSTABLE:g} %: {', '.join(shaky)}")
    if record.load_before[0] > record.host.cores / 2:
        found.append(f"the machine was busy before the start: load average {record.load_before[0]:g}")
    if record.split.leaking:
        found.append(
            f"{record.split.leaking} of {record.split.groups} groups have images on both sides of the split, "
            "so the accuracy is optimistic"
        )
    final, validated = record.find("final"), record.engine.final_accuracy
    images = record.engine.validation_images
    if final and validated is not None and (far := gap(final.metrics, accuracy=validated, images=images)):
        found.append(f"final: {far}")
    if not record.policy.is_tuned:
        found.append("no exit thresholds, so no cascade was measured; edgekd tune sets them")
    if record.idle_watts is None:
        found.append("energy: not measured (no RAPL counter or INA3221 sensor that this user may read)")
    elif record.energy_source.startswith("sum of"):
        found.append(f"energy: that of the {record.energy_source}; the board has no sensor for its whole input")
    return tuple(found)
