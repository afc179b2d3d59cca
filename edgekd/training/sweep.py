"""Sweeps: one run for each seed and fold, several at a time; mean and standard deviation of their test metrics."""

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
from edgekd.training.jobs import ChildJob, JobState, run_jobs
from edgekd.training.protocol import Protocol, refuse_other_settings
from edgekd.training.request import EvaluateRequest, TrainRequest
from edgekd.training.resolve import has_teachers_split

TEST, SUMMARY = "test.json", "summary.json"
METRICS = ("accuracy", "sensitivity", "specificity", "precision", "f1")
Scores = dict[str, dict[str, float | None]]
"""Exit to metric to fraction."""


@dataclass(frozen=True)
class SweepMember:
    """The run of one seed and fold."""

    seed: int
    fold: int

    @property
    def name(self) -> str:
        """Name of its run folder in the sweep's folder."""
        return f"seed{self.seed}-fold{self.fold}"


def run_sweep(
    request: TrainRequest, protocol: Protocol, *, on_end: Callable[[ChildJob, JobState], None] | None = None
) -> dict[str, JobState]:
    """Train and test each member in `request.out / member.name`, a normal run folder, and write summary.json.

    The teacher, or the initial weights, may be one run folder for all members, or a sweep with one for each member.
    Members that are trained and tested are kept. A run's output is appended to `request.out / f"{member.name}.log"`.

    Args:
        request: The sweep; its `seeds` and `folds` name the members.
        protocol: The settings that the members share (see `resolve`).
        on_end: Called after each run.

    Returns:
        Member name to state, in the order of the members.

    Raises:
        ArtifactError: A run exists and is not resumed, or was made with other settings.
        ConfigError: Mutually exclusive flags; one teacher for several folds; a sweep without one of the members.
    """
    _refuse_conflicts(request)
    files.refuse_other(request.out / SUMMARY, files.SUMMARY)
    members = sweep_members(request.seeds, request.folds, protocol)
    like_teacher = has_teachers_split(protocol, request)
    if like_teacher:
        _refuse_one_teacher_for_many_folds(Path(protocol.teacher), members)
    jobs = []
    for member in members:
        folder = request.out / member.name
        run_folder.start(folder, resume=request.resume)
        own = _member_protocol(protocol, member, like_teacher=like_teacher)
        if not is_finished(folder, own):
            jobs.append(train_job(member.name, own, dataclasses.replace(request, out=folder)))
    states = run_jobs(jobs, at_once=request.jobs, on_end=on_end)
    tested = {m.name: scores(path) for m in members if (path := request.out / m.name / TEST).is_file()}
    atomic_write(request.out / SUMMARY, to_json(summary(tested)))
    return {member.name: states.get(member.name, "done") for member in members}


def _refuse_conflicts(request: TrainRequest) -> None:
    conflicts = {
        "--seed does not go with --seeds": request.seed is not None and request.seeds,
        "--fold does not go with --folds": request.fold is not None and request.folds,
        "--devices does not go with --seeds and --folds": request.devices != 1,
    }
    for conflict, found in conflicts.items():
        if found:
            raise ConfigError(conflict, fix="give one of them")


def _refuse_one_teacher_for_many_folds(teacher: Path, members: Sequence[SweepMember]) -> None:
    if len({member.fold for member in members}) > 1 and member_folder(teacher, members[0]) == teacher:
        raise ConfigError(
            f"{teacher} is a single teacher, so every fold would use its split",
            fix="train the teacher with the same --seeds and --folds",
        )


def sweep_members(seeds: str | None, folds: str | None, protocol: Protocol) -> list[SweepMember]:
    """Return each of `seeds` with each of `folds`; the protocol's own where one is not given.

    Args:
        seeds: Numbers, `0,1,2`.
        folds: `all`, or numbers, `0,1`.
        protocol: Has the number of folds in its split.

    Raises:
        ConfigError: No numbers, or folds that the protocol's split does not have.
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
    return [SweepMember(seed, fold) for seed in _numbers("seeds", seeds, [protocol.seed]) for fold in chosen]


def _numbers(flag: str, text: str | None, default: list[int]) -> list[int]:
    if text is None:
        return default
    words = [word.strip() for word in text.split(",")]
    if not all(map(str.isdecimal, words)) or len(set(words)) < len(words):
        raise ConfigError(f"--{flag} {text}: not a list of distinct numbers", fix=f"for example --{flag} 0,1,2")
    return list(map(int, words))


def _member_protocol(protocol: Protocol, member: SweepMember, *, like_teacher: bool) -> Protocol:
    weights, teacher, split = protocol.weights, protocol.teacher, protocol.split
    if teacher:
        teacher = str(member_folder(Path(teacher), member).resolve())
    if like_teacher:
        split = f"{teacher}/{run_folder.SPLIT}"
    if Path(weights).is_dir():
        weights = str(member_folder(Path(weights), member))
    return dataclasses.replace(
        protocol, seed=member.seed, fold=member.fold, weights=weights, teacher=teacher, split=split
    )


def member_folder(folder: Path, member: SweepMember) -> Path:
    """Return the member's run folder in the sweep `folder`, or `folder` itself if it is one run.

    Raises:
        ConfigError: A sweep without that member.
    """
    own = folder / member.name
    if own.is_dir() or not any(folder.glob("seed*-fold*/")):
        return own if own.is_dir() else folder
    raise ConfigError(f"{folder} is a sweep without {member.name}", fix="train it there too")


def train_job(name: str, protocol: Protocol, request: TrainRequest, *, depends_on: tuple[str, ...] = ()) -> ChildJob:
    """Return the job that trains the run folder `request.out`, or continues it, and tests it.

    The settings are written beside the folder, as `request.out` with `.toml`.

    Args:
        name: Name of the job.
        protocol: All settings of the run.
        request: Gives the run folder and how to read the images; its other fields are ignored.
        depends_on: Names of the jobs that must finish first.
    """
    folder = request.out
    settings = folder.parent / f"{folder.name}.toml"
    config.write_toml(settings, protocol)
    train = TrainRequest(
        command="distill",
        data=request.data,
        out=folder,
        protocol=str(settings),
        split=protocol.split,
        labels=request.labels,
        exclude_bad=request.exclude_bad,
        resume=True,
    )
    test = EvaluateRequest(run=folder, data=request.data, out=folder / TEST)
    return ChildJob(name, (train, test), folder.parent / f"{folder.name}.log", depends_on)


def is_finished(folder: Path, protocol: Protocol) -> bool:
    """Return True if a run is trained and tested.

    Raises:
        ArtifactError: It was started with other settings than `protocol`; they are named.
    """
    if not (folder / run_folder.PROTOCOL).is_file():
        return False
    made = config.load(Protocol, "protocols", str(folder / run_folder.PROTOCOL))
    refuse_other_settings(folder, made, protocol)
    return (folder / TEST).is_file()


def scores(path: Path) -> Scores:
    """Read accuracy and macro-averaged rates of each exit and the ensemble, as `edgekd evaluate --out` writes them.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    try:
        table = parse_json(path.read_text(encoding="utf-8"))["metrics"]
        found = {name: {m: ({**row, **row["macro"]})[m] for m in METRICS} for name, row in table.items()}
        if not all(v is None or 0 <= v <= 1 for row in found.values() for v in row.values()):
            raise ValueError("a metric outside 0..1")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged ({error!r})", fix="remove it and run the same command again") from None


def summary(runs: Mapping[str, Scores]) -> dict[str, Any]:
    """Return the scores of each run, with their mean and standard deviation (see `mean_and_sd`) by exit and metric."""
    mean: Scores = {}
    sd: Scores = {}
    for name in next(iter(runs.values()), {}):
        mean[name], sd[name] = {}, {}
        for metric in METRICS:
            mean[name][metric], sd[name][metric] = mean_and_sd([run[name][metric] for run in runs.values()])
    return {"n": len(runs), "mean": mean, "sd": sd, "runs": dict(runs)}


def mean_and_sd(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Return mean and sample standard deviation (n - 1) of the defined values; None of too few."""
    known = [v for v in values if v is not None]
    return statistics.mean(known) if known else None, statistics.stdev(known) if len(known) > 1 else None


def summary_text(found: Mapping[str, Any]) -> str:
    """Format a summary as an aligned table in percent, one row per exit."""
    rows = [[f"test, {found['n']} runs", *METRICS]]
    for name, row in found["mean"].items():
        rows.append([name, *(plus_minus(row[m], found["sd"][name][m]) or "–" for m in METRICS)])
    return aligned(rows)
