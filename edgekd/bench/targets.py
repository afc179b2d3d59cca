"""Figures derived from a record, what was to be reached, and what to be wary of."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from edgekd.bench.accuracy import gap
from edgekd.bench.latency import UNSTABLE
from edgekd.bench.record import Record, Target, Variant


@dataclass(frozen=True)
class Limits:
    """What a suite asks for in its [targets]; what it leaves out is measured and not judged.

    faster: the cascade against the same network without exits in ONNX Runtime FP32, times, at least.
    accuracy_drop: the cascade below all exits together, points, at most.
    staged: a cascade that nobody leaves against the monolithic engine, times, at most.
    overhead_ms: Python around the compiled graphs at batch 1, at most.
    """

    faster: float | None = None
    accuracy_drop: float | None = None
    staged: float | None = None
    overhead_ms: float | None = None


def targets(record: Record, limits: Limits) -> tuple[Target, ...]:
    """The ratios of mean latency at batch 1, the cascade's accuracy and the overhead, each against its limit."""
    cascade, full, never = map(record.find, ("cascade", "full", "no-early-exit"))
    found = []
    if cascade:
        found += [_faster(cascade, other, limits.faster) for other in record.variants if other.against]
        found.append(_at_most("Python around the engine, an image", cascade.overhead_ms, "ms", limits.overhead_ms))
    if cascade and full:
        gain = 100 * (cascade.metrics.accuracy - full.metrics.accuracy)
        least = None if limits.accuracy_drop is None else -limits.accuracy_drop
        found.append(_at_least("cascade's accuracy minus that of all exits together", gain, "points", least))
    if never:
        rounds = tuple(fmean(staged) / fmean(whole) for staged, whole in never.turns_ms)
        name = "cascade that nobody leaves / monolithic engine, in turns"
        found.append(_at_most(name, fmean(rounds), "×", limits.staged, rounds))
    return tuple(found)


def ratio(slow: Variant, fast: Variant) -> tuple[float, tuple[float, ...]]:
    """Mean latency at batch 1 of one over the other: of all queries, and in each round."""
    pairs = zip(slow.timings[0].samples_ms, fast.timings[0].samples_ms)
    return slow.at(1).mean / fast.at(1).mean, tuple(fmean(a) / fmean(b) for a, b in pairs)


def _faster(cascade: Variant, other: Variant, limit: float | None) -> Target:
    """Judged only against the same network without exits, run as a user would run it today."""
    value, rounds = ratio(other, cascade)
    name = f"cascade faster than {other.name} ({other.network}, {other.engine})"
    judged = cascade.network == f"multi-exit-{other.network}" and other.engine == "onnxruntime fp32"
    return _at_least(name, value, "×", limit if judged else None, rounds)


def _at_least(name: str, value: float, unit: str, limit: float | None, rounds: tuple[float, ...] = ()) -> Target:
    return Target(name, value, unit, rounds, limit, None if limit is None else value >= limit, "≥")


def _at_most(name: str, value: float, unit: str, limit: float | None, rounds: tuple[float, ...] = ()) -> Target:
    return Target(name, value, unit, rounds, limit, None if limit is None else value <= limit)


def target_text(t: Target) -> str:
    """Figure, range over the rounds, limit, met or not."""
    spread = f" (rounds {min(t.rounds):.2f} to {max(t.rounds):.2f})" if len(t.rounds) > 1 else ""
    verdict = "" if t.met is None else f"; asked {t.sign} {t.limit:g}: {'met' if t.met else 'NOT met'}"
    signed = "+" if t.unit == "points" and t.sign == "≥" else ""
    return f"{t.name}: {t.value:{signed}.2f} {t.unit}{spread}{verdict}"


def warnings(record: Record) -> tuple[str, ...]:
    """What a reader of the numbers has to know."""
    found = []
    shaky = [
        f"{v.name} ({100 * v.at(b).cv:.0f} %, batch {b})"
        for v in record.variants
        for b in record.batches
        if v.at(b).cv > UNSTABLE and (b == 1 or len(set(v.exits)) == 1)  # batches of a cascade differ in work
    ]
    if shaky:
        found.append(f"unstable, coefficient of variation over {100 * UNSTABLE:g} %: {', '.join(shaky)}")
    if record.load_before[0] > record.host.cores / 2:
        found.append(f"the machine was busy before the start: load average {record.load_before[0]:g}")
    if record.split["leaking"]:
        found.append(
            f"{record.split['leaking']} of {record.split['groups']} pictures have pieces on both sides of the split, "
            "so accuracy is flattered"
        )
    final, validated = record.find("final"), record.engine.get("accuracy")
    if final and validated:
        known = validated["answers"]["final"]
        if far := gap(final.metrics, accuracy=known["engine"], images=known["images"]):
            found.append(f"final: {far}")
    if not record.policy.is_tuned:
        found.append("no exit thresholds, so no cascade was measured; edgekd tune sets them")
    if record.idle_watts is None:
        found.append("energy: not measured (no RAPL counter that this user may read)")
    return tuple(found)
