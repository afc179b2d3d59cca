"""Compare the quick choice of `edgekd tune --max-accuracy-drop` with certified ones, by resampling real logits.

    python benchmarks/certification.py student.engine --data DIR --split split.json --out FILE

The validation and test images, on which the engine's logits are recorded once, are the population, so every true loss
is known. Each draw takes N of them (or N / images-a-group groups) with replacement, 2 in 5 for the path and the others
for the test; the quick choice uses all N. A promise is broken where the chosen setting loses more than promised on the
population. Both choices use the exits' own probabilities and their maximum, and the last exit is the reference of both.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from edgekd.artifacts.certificate import Promise
from edgekd.certification.fixed_sequence import certify_path
from edgekd.certification.losses import Outcome, Sample, losses, outcomes
from edgekd.data.images import load_batches
from edgekd.data.split import read_split
from edgekd.errors import ConfigError
from edgekd.files import atomic_write
from edgekd.policy import Policy
from edgekd.runtime.certificate_images import groups_of
from edgekd.runtime.engine import open_engine
from edgekd.runtime.tuning import changed, choose, stage_ms, threshold_path
from edgekd.types import Labels

CERTAINTY, SHARE = 0.9, 0.4
FIXED = {"confidence": "max_probability", "average": "own"}
Indices = npt.NDArray[np.int64]


class Choice(NamedTuple):
    """What was chosen in one draw: its true loss on the population, its latency, and whether images exit early."""

    loss: float
    latency_ms: float
    exits_early: bool


def main() -> None:
    """Record, draw, compare, and write the table."""
    options = argparse.ArgumentParser()
    options.add_argument("engine", type=Path)
    options.add_argument("--data", type=Path, required=True)
    options.add_argument("--split", type=Path, required=True)
    options.add_argument("--out", type=Path, required=True)
    options.add_argument("--draws", type=int, default=50)
    options.add_argument("--sizes", type=int, nargs="+", default=[810, 2000])
    options.add_argument("--limits", type=float, nargs="+", default=[0.5, 1.0, 2.0], help="in points")
    given = options.parse_args()
    population, stages = record(given.engine, given.data, given.split)
    rows = []
    for size in given.sizes:
        for grouped in (False, True):
            rows += compare(population, stages, size, given.draws, given.limits, grouped=grouped)
    atomic_write(given.out, table(population, stages, rows, given).encode())


def record(engine: Path, data: Path, split: Path) -> tuple[Sample, tuple[float, ...]]:
    """Return the logits of the validation and test images, and the stages' times."""
    opened, found = open_engine(engine), read_split(split)
    items = (*found.subset("val"), *found.subset("test"))
    batches = load_batches([data / item.path for item in items], opened.metadata.preprocess)
    first = next(load_batches([data / items[0].path], opened.metadata.preprocess))
    logits = np.concatenate([opened.staged_logits(batch) for batch in batches], axis=1)
    return Sample(logits, np.array([i.label for i in items]), groups_of(items)), stage_ms(opened, first)


def compare(
    population: Sample, stages: tuple[float, ...], size: int, draws: int, limits: list[float], *, grouped: bool
) -> list[str]:
    """Return the table's rows of one number of images."""
    rng = np.random.default_rng(size)
    found: dict[tuple[str, float], list[Choice]] = {}
    for _ in range(draws):
        rows, names = drawn(rng, population, size, grouped=grouped)
        cut = int(np.searchsorted(names, np.unique(names)[round(SHARE * len(np.unique(names)))]))
        sample = dataclasses.replace(population.take(rows), groups=names if grouped else None)
        path, test = (sample.take(part) for part in np.split(np.arange(len(rows)), [cut]))
        for loss, limit, policy in choices(sample, path, test, stages, limits, quick=not grouped):
            truth = true_outcome(policy, population)
            of = losses(Promise("drop" if loss != "change" else "change", 0.5), truth, population).values
            mean = float(of.mean()) if not grouped else group_mean(of, population)
            ms = float(np.cumsum(stages)[truth.exits].mean())
            found.setdefault((loss, limit), []).append(Choice(mean, ms, bool((truth.exits < len(stages) - 1).any())))
    unit = f"{size} images" if not grouped else f"{size} images of {groups_drawn(population, size)} groups"
    return [row(unit, loss, limit, of, sum(stages)) for (loss, limit), of in found.items()]


def drawn(rng: np.random.Generator, population: Sample, size: int, *, grouped: bool) -> tuple[Indices, Indices]:
    """Return indices of drawn images and the number of the draw of each: of the image, or of its group."""
    assert population.groups is not None
    if not grouped:
        return rng.integers(0, len(population), size), np.arange(size)
    members = members_of(tuple(population.groups.tolist()))
    chosen = rng.integers(0, len(members), groups_drawn(population, size))
    sizes = [len(members[g]) for g in chosen]
    return np.concatenate([members[g] for g in chosen]), np.repeat(np.arange(len(chosen)), sizes)


def groups_drawn(population: Sample, size: int) -> int:
    """Return the number of groups that have about `size` images."""
    return round(size * len(np.unique(population.groups)) / len(population))  # type: ignore[arg-type]


@functools.cache
def members_of(groups: tuple[int, ...]) -> list[Indices]:
    """Return the indices of each group's images."""
    return [np.flatnonzero(np.array(groups) == g) for g in sorted(set(groups))]


def group_mean(values: npt.NDArray[np.float64], population: Sample) -> float:
    """Return the mean over groups of the mean over their images."""
    assert population.groups is not None
    return float((np.bincount(population.groups, values) / np.bincount(population.groups)).mean())


def choices(
    sample: Sample, path: Sample, test: Sample, stages: tuple[float, ...], limits: list[float], *, quick: bool
) -> list[tuple[str, float, Policy]]:
    """Return promise, limit and chosen policy: of the quick choice, and of both certified promises."""
    assert sample.labels is not None
    assert path.labels is not None
    found: list[tuple[str, float, Policy]] = []
    right = sample.logits[-1].argmax(axis=1) == sample.labels
    for limit in limits if quick else ():
        try:
            tuned = choose(sample.logits, sample.labels, stages, reference=right, max_accuracy_drop=limit, **FIXED)
        except ConfigError:
            continue
        found.append(("quick", limit, tuned.policy))
    labels = path.labels

    def dropped(answers: Labels, reference: Labels) -> npt.NDArray[np.float64]:
        return (answers != labels).astype(np.float64) - (reference != labels)

    for name, loss in (("drop", dropped), ("change", changed)):
        known = dataclasses.replace(path, labels=None) if name == "change" else path
        points = threshold_path(known.logits, known.labels, stages, loss=loss, **FIXED)
        policies = tuple(point.policy for point in points)
        answers = outcomes(policies, path), outcomes(policies, test)
        for limit in limits:
            promise = Promise(name, limit / 100)  # type: ignore[arg-type]
            result = certify_path(policies, path, test, (promise,), certainty=CERTAINTY, classes=(), answers=answers)
            found.append((name, limit, policies[max(result.certified)]))
    return found


def true_outcome(policy: Policy, population: Sample) -> Outcome:
    """Return the answers of a policy on the population."""
    return outcomes((policy,), population)[0]


def row(unit: str, loss: str, limit: float, of: list[Choice], full_ms: float) -> str:
    """Return a row of the table."""
    name = {
        "quick": "quick: `--max-accuracy-drop`",
        "drop": "certified: `--max-drop`",
        "change": "certified: `--max-change`",
    }[loss]
    broken = np.mean([100 * one.loss > limit + 1e-9 for one in of])
    early = np.mean([one.exits_early for one in of])
    lost = np.mean([100 * one.loss for one in of])
    ms = np.mean([one.latency_ms for one in of])
    return f"| {unit} | {name} | {limit:g} | {broken:.0%} | {early:.0%} | {lost:.2f} | {ms:.2f} | {full_ms / ms:.2f} |"


def table(population: Sample, stages: tuple[float, ...], rows: list[str], given: argparse.Namespace) -> str:
    """Return the page."""
    right = (population.logits.argmax(axis=2) == population.labels).mean(axis=1)
    accuracies = " / ".join(f"{100 * a:.1f}" for a in right)
    times = " + ".join(f"{ms:.2f}" for ms in stages)
    head = (
        "| drawn | choice | promised, points | broken | exits early | true loss, points | ms | × faster |\n"
        "|---|---|---|---|---|---|---|---|\n"
    )
    return (
        "# Quick and certified choices on real logits\n\n"
        f"{given.engine.name}: {len(population)} images that trained nothing; {accuracies} % right at the exits; "
        f"stages of {times} ms.\n{given.draws} draws, certainty {CERTAINTY:g}: of the certified choices at most "
        f"{1 - CERTAINTY:.0%} may be broken, of the quick ones\nnothing is promised. Where no early exit is certified, "
        "the engine answers without early exit. The loss of groups is\nthe mean over groups. Made by:\n\n"
        "    python benchmarks/certification.py student.engine --data DIR --split split.json --out FILE "
        f"--draws {given.draws} --sizes {' '.join(map(str, given.sizes))} --limits "
        f"{' '.join(f'{x:g}' for x in given.limits)}\n\n" + head + "\n".join(rows) + "\n"
    )


if __name__ == "__main__":
    main()
