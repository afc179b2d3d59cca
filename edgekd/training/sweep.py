"""The same run with several seeds and folds, side by side; mean and standard deviation of what they score."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd import config, files
from edgekd.errors import ArtifactError, ConfigError
from edgekd.files import atomic_write
from edgekd.schema import parse_json
from edgekd.serialization import to_json
from edgekd.text import aligned, plus_minus
from edgekd.training import run_folder
from edgekd.training.jobs import Job, State, launch
from edgekd.training.protocol import Protocol, refuse_other_settings

TEST, SUMMARY = "test.json", "summary.json"
METRICS = ("accuracy", "sensitivity", "specificity", "precision", "f1")
Scores = dict[str, dict[str, float | None]]
"""Exit to metric to fraction."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    seed: int
    fold: int

    @property
    def name(self) -> str:
        return f"seed{self.seed}-fold{self.fold}"


def members(seeds: str | None, folds: str | None, protocol: Protocol) -> list[Member]:
    """Each of `seeds` (`0,1,2`) with each of `folds` (`all`, or `0,1`); the protocol's own where one is not given.

    Raises:
        ConfigError: no numbers, or folds that the protocol's split does not have.
    """
    kind, _, count = protocol.split.partition(":")
    if folds is not None and (kind != "kfold" or not count.isdecimal()):
        raise ConfigError(
            f"--folds {folds}: the split is {protocol.split}, which has no folds", fix="use --split kfold:5"
        )
    known = range(int(count)) if folds is not None else []
    chosen = list(known) if folds == "all" else _numbers("folds", folds, [protocol.fold])
    if strange := set(chosen).difference(known or [protocol.fold]):
        raise ConfigError(
            f"--folds {folds}: {protocol.split} has no fold {min(strange)}", fix=f"from 0 to {len(known) - 1}"
        )
    return [Member(seed, fold) for seed in _numbers("seeds", seeds, [protocol.seed]) for fold in chosen]


def _numbers(flag: str, text: str | None, default: list[int]) -> list[int]:
    if text is None:
        return default
    words = [word.strip() for word in text.split(",")]
    if not all(map(str.isdecimal, words)) or len(set(words)) < len(words):
        raise ConfigError(f"--{flag} {text}: not a list of different numbers", fix=f"for example --{flag} 0,1,2")
    return list(map(int, words))


def sweep(
    data: Path,
    out: Path,
    *,
    protocol: Protocol,
    of: Sequence[Member],
    teacher: Path | None = None,
    keep_split: bool = True,
    labels: Path | None = None,
    resume: bool = False,
    exclude_bad: bool = False,
    at_once: int = 1,
    on_end: Callable[[Job, State], None] | None = None,
) -> dict[str, State]:
    """Train and test each member in out/<its name>, a normal run folder; write out/summary.json.

    teacher: a run folder for all, or a sweep in which each member finds its own; so for `protocol.weights`.
    keep_split: divide the images as the protocol says, not as the teacher's were. labels: a CSV file instead of class
    folders. resume: keep the runs that are finished, go on with those that were begun. What a run prints is in
    out/<its name>.log.

    Raises:
        ArtifactError: runs that are there already, or were made under other settings.
        ConfigError: one teacher for several folds; a sweep that lacks a member.
    """
    files.refuse_other(out / SUMMARY, files.SUMMARY)
    jobs = []
    for member in of:
        folder = out / member.name
        run_folder.start(folder, resume=resume)
        own_teacher = teacher and of_member(teacher, member)
        asked = dataclasses.replace(
            protocol,
            seed=member.seed,
            fold=member.fold,
            weights=_weights(protocol.weights, member),
            teacher=str(own_teacher.resolve()) if own_teacher else "",
        )
        if own_teacher and not keep_split:
            if own_teacher == teacher and len({m.fold for m in of}) > 1:
                raise ConfigError(
                    f"{teacher} is one teacher, so every fold would have its split",
                    fix="train the teacher with the same --seeds and --folds",
                )
            asked = dataclasses.replace(asked, split=str(own_teacher / run_folder.SPLIT))
        if not finished(folder, asked):
            jobs.append(job(member.name, folder, asked, data=data, labels=labels, exclude_bad=exclude_bad))
    states = launch(jobs, at_once=at_once, on_end=on_end)
    atomic_write(
        out / SUMMARY, to_json(summary({m.name: scores(f) for m in of if (f := out / m.name / TEST).is_file()}))
    )
    return {m.name: states.get(m.name, "done") for m in of}


def of_member(folder: Path, member: Member) -> Path:
    """A member's run in a sweep, or the one run that `folder` is.

    Raises:
        ConfigError: a sweep without that member.
    """
    own = folder / member.name
    if own.is_dir() or not any(folder.glob("seed*-fold*/")):
        return own if own.is_dir() else folder
    raise ConfigError(f"{folder} is a sweep without {member.name}", fix="train it there too")


def _weights(weights: str, member: Member) -> str:
    return str(of_member(path, member)) if (path := Path(weights)).is_dir() else weights


def job(
    name: str,
    folder: Path,
    protocol: Protocol,
    *,
    data: Path,
    labels: Path | None = None,
    exclude_bad: bool = False,
    after: tuple[str, ...] = (),
) -> Job:
    """The commands that train `folder` under `protocol`, or go on with it, and test it; settings are written beside."""
    settings = folder.parent / f"{folder.name}.toml"
    config.write_toml(settings, protocol)
    words = ["distill", "--data", data, "--out", folder, "--protocol", settings, "--split", protocol.split, "--resume"]
    words += ["--labels", labels] if labels else []
    words += ["--exclude-bad"] if exclude_bad else []
    test = ["evaluate", folder, "--data", data, "--out", folder / TEST]
    commands = tuple(tuple(map(str, command)) for command in (words, test))
    return Job(name, commands, folder.parent / f"{folder.name}.log", after)


def finished(folder: Path, asked: Protocol) -> bool:
    """Whether a run is trained and tested.

    Raises:
        ArtifactError: it was begun under other settings than `asked`; they are named.
    """
    if not (folder / run_folder.PROTOCOL).is_file():
        return False
    made = config.load(Protocol, "protocols", str(folder / run_folder.PROTOCOL))
    refuse_other_settings(folder, made, asked)
    return (folder / TEST).is_file()


def scores(path: Path) -> Scores:
    """Accuracy and macro rates of each exit and the ensemble, from what `edgekd evaluate --out` wrote.

    Raises:
        ArtifactError: it is no such file.
    """
    try:
        table = parse_json(path.read_text(encoding="utf-8"))["metrics"]
        found = {name: {m: ({**row, **row["macro"]})[m] for m in METRICS} for name, row in table.items()}
        if not all(v is None or 0 <= v <= 1 for row in found.values() for v in row.values()):
            raise ValueError("a measure that is no fraction")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r})", fix="remove it and run the same command again") from None


def summary(runs: Mapping[str, Scores]) -> dict[str, Any]:
    """Each run's scores, and their mean and standard deviation (n - 1; none of one run)."""
    exits = list(next(iter(runs.values()), {}))
    both = {e: {m: spread([one[e][m] for one in runs.values()]) for m in METRICS} for e in exits}
    mean, sd = ({e: {m: pair[k] for m, pair in row.items()} for e, row in both.items()} for k in range(2))
    return {"n": len(runs), "mean": mean, "sd": sd, "runs": dict(runs)}


def spread(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Mean and standard deviation (n - 1) of the values that are defined."""
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None


def summary_text(found: Mapping[str, Any]) -> str:
    """Percent, as aligned text: a row for each exit."""
    rows = [[f"test, {found['n']} runs", *METRICS]]
    for e, row in found["mean"].items():
        rows.append([e, *(plus_minus(row[m], found["sd"][e][m]) or "–" for m in METRICS)])
    return aligned(rows)
